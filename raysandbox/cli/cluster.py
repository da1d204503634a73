"""`raysandbox cluster …`, `raysandbox start`, `raysandbox audit`."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.table import Table

from raysandbox.cluster.errors import ClusterError
from raysandbox.errors import RaysandboxError

__all__ = ["app", "audit_app", "start_app"]

app = typer.Typer(
    help="A hardened cluster: identities, guard, nodes.", no_args_is_help=True
)
certs = typer.Typer(help="Certificates of the cluster's members.", no_args_is_help=True)
app.add_typer(certs, name="certs")
nodes = typer.Typer(help="Which nodes may join.", no_args_is_help=True)
app.add_typer(nodes, name="nodes")
audit_app = typer.Typer(help="The audit log.", invoke_without_command=True)

Dir = Annotated[
    Path,
    typer.Option("--cluster", envvar="RAYSANDBOX_CLUSTER", help="cluster directory"),
]
Addresses = Annotated[
    list[str], typer.Option("--address", help="IP address; may be given again")
]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]


def _fail(error: RaysandboxError) -> NoReturn:
    Console(stderr=True).print(f"raysandbox: {error}", markup=False, highlight=False)
    raise typer.Exit(1)


def _open(path: Path) -> Any:
    from raysandbox.cluster.settings import ClusterDir

    try:
        return ClusterDir(path)
    except ClusterError as error:
        _fail(error)


def _registry(path: Path) -> Any:
    from raysandbox.cluster.pki import Registry

    try:
        return Registry(_open(path))
    except ClusterError as error:
        _fail(error)


@app.command()
def init(
    directory: Path,
    name: Annotated[str, typer.Option(help="the cluster's name")] = "ray",
    head_address: Annotated[
        str, typer.Option(help="the head's address as nodes reach it")
    ] = "127.0.0.1",
    head_name: Annotated[str, typer.Option(help="the head node's name")] = "head",
    port: Annotated[int, typer.Option(help="the guard's port")] = 6379,
    external_ca: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option(help="use this CA certificate; its key stays where it is"),
    ] = None,
) -> None:
    """Make a cluster directory with a CA, a token and the head's identity."""
    from raysandbox.cluster import pki
    from raysandbox.cluster.settings import ClusterDir, write_file

    try:
        if directory.exists() and any(directory.iterdir()):
            raise ClusterError(where=str(directory), what="exists and is not empty")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(directory, 0o700)
        write_file(
            directory / "cluster.toml",
            f'name = "{name}"\nhead_address = "{head_address}"\nport = {port}\n'
            f"gcs_port = {port + 10000 if port < 55000 else port - 10000}\n",
            0o644,
        )
        cluster = ClusterDir(directory)
        cluster.settings()
        write_file(
            directory / "member.toml",
            f'role = "head"\nname = "{head_name}"\naddresses = ["{head_address}"]\n',
            0o644,
        )
        write_file(
            directory / "inventory.toml",
            f'[nodes."{head_name}"]\naddresses = ["{head_address}"]\nhead = true\n',
            0o644,
        )
        write_file(cluster.token, secrets.token_hex(32))
        registry = pki.Registry(cluster)
        if external_ca is None:
            registry.create()
            registry.issue("head", head_name, [head_address], directory)
        else:
            registry.adopt(pki.load_chain(external_ca)[0])
            print(
                "Now `raysandbox cluster certs csr head "
                f"{head_name} --address {head_address} --out DIR`, have your CA sign, "
                "then `certs import`."
            )
    except ClusterError as error:
        _fail(error)
    print(f"cluster {name!r} made in {directory}; keep {directory}/ca safe")


@app.command()
def up(
    cluster: Dir,
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Argument(help="further arguments of ray start"),
    ] = None,
) -> None:
    """Start this member: the head with its guard, or a node."""
    opened = _open(cluster)
    try:
        member, settings = opened.member(), opened.settings()
    except ClusterError as error:
        _fail(error)
    first = (
        ["--head"]
        if member.role == "head"
        else [f"--address={settings.head_address}:{settings.port}"]
    )
    _start(opened, [*first, *(arguments or [])])


@app.command()
def status(cluster: Dir, as_json: Json = False) -> None:
    """Say what runs here, what is open, and which certificates end soon."""
    from raysandbox.cluster import pki
    from raysandbox.cluster.start import _running

    opened = _open(cluster)
    try:
        member = opened.member()
        found: dict[str, Any] = {
            "member": f"{member.role}/{member.name}",
            "supervisor": _running(opened),
            "warnings": [],
        }
        for component in pki.COMPONENTS[member.role]:
            try:
                found["warnings"] += pki.check_identity(opened, component)
            except ClusterError as error:
                found["warnings"].append(str(error))
    except ClusterError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found))
    else:
        state = f"running, pid {found['supervisor']}" if found["supervisor"] else "down"
        print(f"{found['member']}: helpers {state}")
        for warning in found["warnings"]:
            print(f"warning: {warning}")
    if not found["supervisor"] or found["warnings"]:
        raise typer.Exit(1)


@app.command()
def down(cluster: Dir) -> None:
    """End the guard and the helpers of this member (`ray stop` ends Ray)."""
    from raysandbox.cluster.start import down as end

    print("ended" if end(_open(cluster)) else "nothing was running")


@app.command(context_settings={"ignore_unknown_options": True})
def env(
    cluster: Dir,
    command: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Argument(help="command to run; without one, print export lines"),
    ] = None,
) -> None:
    """Speak as this directory's driver, operator or observer."""
    opened = _open(cluster)
    try:
        from raysandbox.cluster import pki

        member, settings = opened.member(), opened.settings()
        component = pki.COMPONENTS[member.role][-1]
        for warning in pki.check_identity(opened, component):
            print(f"raysandbox: warning: {warning}", file=sys.stderr)
    except ClusterError as error:
        _fail(error)
    if member.role == "driver" and not _raylet_here():
        print(
            "raysandbox: warning: no node of a cluster runs on this machine, and Ray's "
            "drivers work through one: start one here (`raysandbox start`, with "
            "--num-cpus=0 if it is to run no tasks), or submit a job",
            file=sys.stderr,
        )
    wanted = opened.tls_env(component)
    wanted["RAY_ADDRESS"] = f"{settings.head_address}:{settings.port}"
    if command:
        os.execvpe(command[0], command, {**os.environ, **wanted})  # noqa: S606
    for key, value in wanted.items():
        print(f"export {key}='{value}'")


def _raylet_here() -> bool:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "raylet\n":
                return True
        except OSError:
            continue
    return False


@certs.command()
def issue(
    role: str, name: str, out: Annotated[Path, typer.Option(help="directory to make")],
    cluster: Dir, address: Addresses = [],  # noqa: B006 - typer copies it
    days: float = 365,
) -> None:  # fmt: skip
    """Issue a member's identity into a directory of its own."""
    registry = _registry(cluster)
    try:
        for uri in registry.issue(role, name, address, out, days):
            print(uri)
    except ClusterError as error:
        _fail(error)
    if role in ("head", "node"):
        print(f"`raysandbox cluster nodes add {name}` lets it join", file=sys.stderr)


@certs.command("list")
def list_(cluster: Dir, as_json: Json = False) -> None:
    """List issued certificates; exit 1 if one ends within 30 days."""
    from raysandbox.cluster.pki import describe

    records = _registry(cluster).records()
    if as_json:
        print(json.dumps([{**r.as_json(), "state": r.state()} for r in records]))
    else:
        table = Table("identity", "addresses", "until", "state")
        for record in records:
            table.add_row(
                describe(record), " ".join(record.addresses), record.end[:10],
                record.state(),
            )  # fmt: skip
        Console().print(table)
    if any(r.state() in ("expiring", "expired") for r in records):
        raise typer.Exit(1)


@certs.command()
def renew(
    member: Annotated[str, typer.Argument(help="role/name")],
    out: Annotated[Path, typer.Option(help="the member's directory")],
    cluster: Dir,
    days: float = 365,
) -> None:
    """Issue a member's certificates again, in place.

    The guard takes its new one up at once (`cluster reload`), new workers theirs
    by themselves. Ray reads certificates for new connections and servers when
    they are made, so raylet and GCS take theirs up when their node restarts:
    renew one node after the other and restart each before its old one ends.
    """
    from raysandbox.cluster.settings import ClusterDir

    registry = _registry(cluster)
    role, _, name = member.partition("/")
    try:
        mine = [
            r for r in registry.records()
            if r.uri.split("/")[3:5] == [role, name] and not r.revoked
        ]  # fmt: skip
        if not mine:
            raise ClusterError(where=member, what="has no certificate to renew")
        target = ClusterDir(out)
        registry.issue(role, name, list(mine[-1].addresses), target.path, days)
    except ClusterError as error:
        _fail(error)
    _reload(cluster)
    print(f"{member} renewed until {registry.records()[-1].end[:10]}")


@certs.command()
def revoke(
    member: Annotated[str, typer.Argument(help="role/name, or an identity")],
    cluster: Dir,
) -> None:
    """Revoke a member; the guard closes its connections."""
    registry = _registry(cluster)
    try:
        for uri in registry.revoke(member):
            print(f"revoked {uri}")
    except ClusterError as error:
        _fail(error)
    _reload(cluster)


@certs.command()
def csr(
    role: str, name: str, out: Annotated[Path, typer.Option(help="directory to make")],
    cluster: Dir, address: Addresses = [],  # noqa: B006 - typer copies it
) -> None:  # fmt: skip
    """Make keys and signing requests for an external CA."""
    from raysandbox.cluster import pki
    from raysandbox.cluster.settings import write_file

    registry = _registry(cluster)
    try:
        pki.check_member(role, name, address)
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        for component in pki.COMPONENTS[role]:
            uri = f"spiffe://{registry.name}/{role}/{name}/{component}"
            key, request = pki.make_csr(uri, address)
            write_file(out / f"{component}.key", key)
            write_file(out / f"{component}.csr", request, 0o644)
            print(f"{out / component}.csr  {uri}")
    except ClusterError as error:
        _fail(error)


@certs.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="directory with .key and .pem files")],
    cluster: Dir,
) -> None:
    """Install certificates that an external CA signed, after checking each."""
    from raysandbox.cluster import pki
    from raysandbox.cluster.settings import write_file

    opened = _open(cluster)
    try:
        for path in sorted(source.glob("*.pem")):
            component = path.stem
            pki.load_chain(path)
            write_file(opened.cert(component), path.read_bytes(), 0o644)
            write_file(
                opened.key(component), (source / f"{component}.key").read_bytes()
            )
            for warning in pki.check_identity(opened, component):
                print(f"warning: {warning}")
            print(f"{component}: installed")
    except ClusterError as error:
        _fail(error)


def _reload(path: Path) -> None:
    """Tell a running guard that inventory or revocations have changed."""
    import signal

    from raysandbox.cluster.start import _running

    pid = _running(_open(path))
    if pid:
        os.kill(pid, signal.SIGHUP)


@app.command()
def reload(cluster: Dir) -> None:
    """Have the running guard take up inventory, access.toml and revocations."""
    _reload(cluster)


@nodes.command()
def add(
    name: str,
    cluster: Dir,
    address: Addresses = [],  # noqa: B006 - typer copies it
    resource: Annotated[
        list[str], typer.Option(help="ceiling, NAME=AMOUNT; may be given again")
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Let a node join."""
    opened = _open(cluster)
    path = opened.path / "inventory.toml"
    try:
        if name in opened.inventory().nodes:
            raise ClusterError(where=str(path), what=f"has a node {name!r} already")
        quoted = ", ".join(json.dumps(a) for a in address)
        text = f'\n[nodes."{name}"]\naddresses = [{quoted}]\n'
        if resource:
            pairs = [item.partition("=") for item in resource]
            inner = ", ".join(f'"{k}" = {float(v)}' for k, _, v in pairs)
            text += f"resources = {{ {inner} }}\n"
        _append(path, text, opened)
    except ClusterError as error:
        _fail(error)
    _reload(cluster)


def _append(path: Path, text: str, opened: Any) -> None:
    from raysandbox.cluster.settings import write_file

    before = path.read_text() if path.exists() else ""
    write_file(path, before + text, 0o644)
    try:
        opened.inventory()
    except ClusterError:
        write_file(path, before, 0o644)
        raise


@nodes.command()
def quarantine(name: str, cluster: Dir) -> None:
    """Refuse a node's calls, drain it and revoke its certificates."""
    from raysandbox.cluster.settings import write_file

    opened = _open(cluster)
    path = opened.path / "inventory.toml"
    try:
        if name not in opened.inventory().nodes:
            raise ClusterError(where=str(path), what=f"has no node {name!r}")
        text = re.sub(
            rf'(\[nodes\."?{re.escape(name)}"?\]\n)',
            r"\1quarantined = true\n",
            path.read_text(),
        )
        write_file(path, text, 0o644)
        if not opened.inventory().nodes[name].quarantined:
            raise ClusterError(
                where=str(path), what="is written in a way that can't be edited",
                remedy=f"set quarantined = true for {name} yourself",
            )  # fmt: skip
        for uri in _registry(cluster).revoke(f"node/{name}"):
            print(f"revoked {uri}")
    except ClusterError as error:
        _fail(error)
    _reload(cluster)


def _start(opened: Any, arguments: list[str]) -> None:
    from raysandbox.cluster.start import start as run

    try:
        run(opened, arguments)
    except RaysandboxError as error:
        _fail(error)


start_app = typer.Typer()


@start_app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def start(context: typer.Context, cluster: Dir) -> None:
    """Start a hardened node: takes every argument of `ray start`."""
    _start(_open(cluster), context.args)


@audit_app.callback()
def audit(
    context: typer.Context,
    cluster: Dir,
    who: Annotated[str, typer.Option(help="part of the identity or address")] = "",
    what: Annotated[str, typer.Option(help="part of method, object or event")] = "",
    since: Annotated[str, typer.Option(help="like 10min, 2h, 1d")] = "",
    denied: Annotated[bool, typer.Option(help="only what was refused")] = False,
    as_json: Json = False,
) -> None:
    """Show what was asked of the GCS, by whom, and what became of it."""
    if context.invoked_subcommand:
        context.obj = cluster
        return
    from raysandbox.cluster.audit import query

    span = _span(since)
    console = Console(highlight=False)
    path = _open(cluster).audit
    for r in query(path, who=who, what=what, since_s=span, denied=denied):
        if as_json:
            print(json.dumps(r))
            continue
        when = time.strftime("%H:%M:%S", time.localtime(r.get("t", 0)))
        verdict = "ok " if r.get("ok", True) else "NO "
        name = str(r.get("method", r.get("event", ""))).rpartition("/")[2]
        console.print(
            f"{when} {verdict} {r.get('who') or r.get('source', '')} {name} "
            f"{r.get('object', '')} {r.get('why', '')}"
            + (f" x{r['count']}" if "count" in r else ""),
            markup=False,
            soft_wrap=True,
        )  # fmt: skip


@audit_app.command()
def verify(
    context: typer.Context,
    expect: Annotated[str, typer.Option(help="a hash noted earlier")] = "",
) -> None:
    """Check the hash chain of the audit log."""
    from raysandbox.cluster import audit as log

    try:
        count, digest = log.verify(_open(context.obj).audit, expect)
    except ClusterError as error:
        _fail(error)
    print(f"{count} lines, unbroken; last hash {digest}")


def _span(text: str) -> float | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h|d)", text)
    if not match:
        raise typer.BadParameter("must be like 30s, 10min, 2h or 1d")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2]]
