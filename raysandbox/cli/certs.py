"""`raysandbox cluster certs …`: certificates of the cluster's members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from raysandbox.cli.look import AsJson, application
from raysandbox.cli.member import Addresses, Dir, fail, opened, take_up
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.registry import NODES, Registry

__all__ = ["app"]

app = application("Certificates of the cluster's members.")

Out = Annotated[Path, typer.Option(help="Directory of the member; made if new.")]
Days = Annotated[float, typer.Option(help="How long they live.")]
Name = Annotated[str, typer.Argument(metavar="ROLE/NAME")]


def _registry(path: Path) -> Registry:
    try:
        return Registry(opened(path))
    except ClusterError as error:
        fail(error)


def _split(member: str) -> tuple[str, str]:
    role, _, name = member.partition("/")
    return role, name


@app.command()
def issue(
    role: Annotated[str, typer.Argument(help="node, driver, operator or observer.")],
    name: Annotated[str, typer.Argument(help="The member's own name.")],
    out: Out,
    cluster: Dir,
    address: Addresses = [],  # noqa: B006 - typer copies it
    days: Days = 365,
) -> None:
    """Issue a member's identity into a directory of its own.

    raysandbox cluster certs issue driver alice --address 10.0.0.2 --out alice
    """
    registry = _registry(cluster)
    try:
        for uri in registry.issue(role, name, address, out, days):
            print(uri)
        _say_nodes(registry, role, name, address)
        if role in NODES:
            # The guard needs the list of the new issuer of workers.
            take_up(registry.dir)
    except ClusterError as error:
        fail(error)


def _say_nodes(registry: Registry, role: str, name: str, address: list[str]) -> None:
    if role == "node" and name not in registry.dir.inventory().nodes:
        where = " ".join(f"--address {a}" for a in address)
        typer.echo(
            f"it may join after `raysandbox cluster nodes add {name} {where} "
            f"--cluster {registry.dir.path}`",
            err=True,
        )


@app.command("list")
def list_(cluster: Dir, as_json: AsJson = False) -> None:
    """List issued certificates; exit 1 if one in use ends within 30 days."""
    from raysandbox.cluster.registry import describe

    registry = _registry(cluster)
    try:
        records = registry.records()
    except ClusterError as error:
        fail(error)
    latest = {record.uri: record for record in records}
    if as_json:
        rows = [
            {**r.as_json(), "state": r.state(), "in_use": latest[r.uri] is r}
            for r in records
        ]
        print(json.dumps(rows))
    else:
        table = Table("identity", "addresses", "until", "state")
        for record in records:
            state = record.state()
            if latest[record.uri] is not record and state in ("valid", "expiring"):
                state = "renewed"
            table.add_row(
                describe(record), " ".join(record.addresses), record.end[:10], state
            )
        Console().print(table)
    if any(r.state() in ("expiring", "expired") for r in latest.values()):
        raise typer.Exit(1)


@app.command()
def renew(
    member: Name, out: Out, cluster: Dir, days: Days = 365,
    address: Addresses = [],  # noqa: B006 - typer copies it
) -> None:  # fmt: skip
    """Issue a member's certificates again, into its directory or a new one.

    The old ones stay valid until they end. What takes the new ones up:

    the guard and the workers' issuer: at once, or after `raysandbox cluster
    reload` where they run; workers that start from then on.

    raylet, GCS, agents and drivers: when they restart. They keep what they read
    at their start, also when they connect again.

    `raysandbox cluster certs rolling` writes the steps for the whole cluster.
    """
    registry = _registry(cluster)
    role, name = _split(member)
    try:
        addresses = address or list(registry.addresses_of(role, name))
        made = registry.issue(role, name, addresses, out, days, renew=True)
        until = registry.records()[-1].end[:10]
        print(f"{member}: {len(made)} certificates in {out}, until {until}")
        take_up(registry.dir)
    except ClusterError as error:
        fail(error)


@app.command()
def revoke(
    member: Annotated[
        str, typer.Argument(metavar="ROLE/NAME", help="Or a whole identity.")
    ],
    cluster: Dir,
) -> None:
    """Revoke a member; the guard closes its connections."""
    registry = _registry(cluster)
    try:
        for uri in registry.revoke(member):
            print(f"revoked {uri}")
        take_up(registry.dir)
    except ClusterError as error:
        fail(error)


@app.command()
def rolling(
    cluster: Dir,
    within_days: Annotated[
        float, typer.Option(help="Members whose certificates end in so many days.")
    ] = 30,
    member_dir: Annotated[
        str, typer.Option(help="The cluster directory on nodes.")
    ] = "/etc/raysandbox/cluster",
    days: Days = 365,
) -> None:
    """Write a shell script that renews and restarts one member after the other."""
    from raysandbox.cluster.rolling import script

    registry = _registry(cluster)
    try:
        text = script(registry, within_days=within_days, days=days, there=member_dir)
    except ClusterError as error:
        fail(error)
    print(text, end="")


@app.command()
def bundle(
    role: str, name: str, out: Out, cluster: Dir,
    address: Addresses = [],  # noqa: B006 - typer copies it
) -> None:  # fmt: skip
    """Make a member's directory without keys: it makes them itself (`certs csr`)."""
    registry = _registry(cluster)
    try:
        registry.bundle(role, name, address, out)
        _say_nodes(registry, role, name, address)
    except ClusterError as error:
        fail(error)
    print(f"{out}: take it to {role}/{name}; there, `raysandbox cluster certs csr`")


@app.command()
def csr(cluster: Dir) -> None:
    """Make this member's keys and signing requests, in DIR/pending.

    Take the .csr files (and workers.crl) to the CA; the keys stay.
    """
    from raysandbox.cluster.pending import make

    try:
        for path, uri in make(opened(cluster)):
            print(f"{path}  {uri}")
    except ClusterError as error:
        fail(error)


@app.command()
def sign(
    requests: Annotated[Path, typer.Argument(help="Directory with .csr files.")],
    member: Name, out: Annotated[Path, typer.Option(help="Directory for the .pem.")],
    cluster: Dir, address: Addresses = [],  # noqa: B006 - typer copies it
    days: Days = 365,
) -> None:  # fmt: skip
    """Sign a member's requests with the cluster's CA.

    The member is named here, not by its requests; one that asks for another
    identity is refused.
    """
    from raysandbox.cluster.pending import sign_all

    registry = _registry(cluster)
    role, name = _split(member)
    try:
        for path in sign_all(registry, requests, role, name, address, out, days):
            print(path)
        take_up(registry.dir)
    except ClusterError as error:
        fail(error)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Directory with .pem files.")],
    cluster: Dir,
) -> None:
    """Install certificates for the keys that `certs csr` made: all or none."""
    from raysandbox.cluster.pending import install_all

    directory = opened(cluster)
    try:
        for line in install_all(directory, source):
            print(line)
        take_up(directory)
    except ClusterError as error:
        fail(error)


@app.command()
def trust(
    crl: Annotated[Path, typer.Argument(help="Revocation list, PEM.")],
    cluster: Dir,
    issuer: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option(help="Certificate of a node's workers' issuer whose list it is."),
    ] = None,
) -> None:
    """Install a revocation list of an external CA."""
    registry = _registry(cluster)
    try:
        whose = registry.trust(_read(crl), _read(issuer) if issuer else b"")
        print(f"list of {whose} installed")
        take_up(registry.dir)
    except ClusterError as error:
        fail(error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClusterError(
            where=str(path), what=f"can't be read: {error.strerror}"
        ) from None
