"""`raysandbox cluster nodes …` and `quarantine`: which nodes may join."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raysandbox.cli.look import AsJson, application
from raysandbox.cli.member import Addresses, Dir, fail, opened, take_up
from raysandbox.cluster.audit import plain
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir

__all__ = ["app", "quarantine", "release"]

# What a Ray node claims whatever it is started with, in bytes.
ALWAYS = ("memory", "object_store_memory")
# Of what keeps a node from leaving, so many are named.
NAMED = 10

app = application("Which nodes may join.")


@app.command()
def add(
    name: str,
    cluster: Dir,
    address: Addresses = [],  # noqa: B006 - typer copies it
    resource: Annotated[
        list[str],
        typer.Option(
            help="Ceiling, NAME=AMOUNT; repeatable. What is not named may not be "
            "claimed, * is any other; without any there is no ceiling."
        ),
    ] = [],  # noqa: B006 - typer copies it
    label: Annotated[
        list[str], typer.Option(help="Label it may claim, NAME=VALUE; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Let a node join."""
    from raysandbox.cluster import inventory

    directory = opened(cluster)
    resources = {}
    for key, value in map(_pair, resource):
        try:
            resources[key] = float(value)
        except ValueError:
            raise typer.BadParameter(f"{key}={value}: is no number") from None
    try:
        inventory.add(directory, name, address, resources, dict(map(_pair, label)))
        print(f"{name} may join from {', '.join(address)}")
        unnamed = [r for r in ALWAYS if r not in resources]
        if resources and "*" not in resources and unnamed:
            typer.echo(
                f"warning: every Ray node claims {' and '.join(unnamed)}; without a "
                f"ceiling for it (--resource {unnamed[0]}=BYTES) {name} is refused",
                err=True,
            )
        take_up(directory)
    except ClusterError as error:
        fail(error)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
    return key, value


@app.command()
def remove(name: str, cluster: Dir) -> None:
    """Let a node join no more; one that runs is refused and removed from Ray."""
    from raysandbox.cluster import inventory

    directory = opened(cluster)
    try:
        inventory.remove(directory, name)
        print(f"{name} may not join any more")
        take_up(directory)
    except ClusterError as error:
        fail(error)


@app.command("list")
def list_(cluster: Dir, as_json: AsJson = False) -> None:
    """List the nodes that may join."""
    directory = opened(cluster)
    try:
        nodes, mode = directory.inventory().nodes, directory.settings().admission
    except ClusterError as error:
        fail(error)
    if as_json:
        rows = {
            name: {
                **node.model_dump(mode="json"),
                # JSON has no infinity; null is "no ceiling".
                "resources": {
                    k: None if math.isinf(v) else v for k, v in node.resources.items()
                },
            }
            for name, node in nodes.items()
        }
        print(json.dumps({"admission": mode, "nodes": rows}))
        return
    table = Table("node", "addresses", "ceilings", "labels", "state")
    for name, node in nodes.items():
        ceilings = " ".join(f"{k}={v:g}" for k, v in node.resources.items())
        table.add_row(
            name + (" (head)" if node.head else ""),
            " ".join(node.addresses),
            "none" if ceilings == "*=inf" else ceilings,
            " ".join(f"{k}={v}" for k, v in node.labels.items()),
            "quarantined" if node.quarantined else "admitted",
        )
    Console().print(table)
    print(
        "others are refused"
        if mode == "enforce"
        else 'admission = "observe": OTHERS JOIN TOO, with an alert'
    )


@app.command()
def drain(
    name: str,
    cluster: Dir,
    within: Annotated[
        float, typer.Option(help="seconds to wait for what runs there", min=0)
    ] = 300.0,
) -> None:
    """Let a node finish its tasks, take no more, and leave.

    Exit status: 0 it has left, 1 it still runs something (an actor, perhaps).
    """
    try:
        _drain(opened(cluster), name, within)
    except ClusterError as error:
        fail(error)


def _drain(directory: ClusterDir, name: str, within_s: float) -> None:
    from raysandbox.cluster.drain import drain as ask

    print(f"draining {name} …", file=sys.stderr, flush=True)
    if still := ask(directory, name, within_s):
        more = f" and {len(still) - NAMED} more" if len(still) > NAMED else ""
        raise ClusterError(
            where=name,
            what=f"takes no new tasks, and after {within_s:g} s still runs "
            f"{', '.join(still[:NAMED])}{more}",
            remedy="wait again, kill its actors, or end it: `raysandbox cluster down` "
            "there",
        )
    print(f"{name} has finished and left")


def quarantine(
    name: str,
    cluster: Dir,
    drain: Annotated[
        float,
        typer.Option(
            help="seconds that its running tasks are given first; 0: none, as for a "
            "node that is not to be trusted any more",
            min=0,
        ),
    ] = 0.0,
) -> None:
    """Refuse a node's calls, take it out of Ray and revoke its certificates."""
    from raysandbox.cluster import inventory
    from raysandbox.cluster.registry import Registry

    directory = opened(cluster)
    try:
        if directory.inventory().nodes.get(name, None) and (
            directory.inventory().nodes[name].head
        ):
            raise ClusterError(
                where=name,
                what="is the head; without it there is no cluster",
                remedy="`raysandbox cluster down` there",
            )
        if drain:
            try:
                _drain(directory, name, drain)
            except ClusterError as error:
                said = plain(f"{error.where}: {error.what}")
                print(f"raysandbox: {said}; quarantined nonetheless", file=sys.stderr)
        inventory.quarantine(directory, name, True)
        print(f"{name} is quarantined")
        problem = None
        try:
            for uri in Registry(directory).revoke(f"node/{name}"):
                print(f"revoked {uri}")
        except ClusterError as error:
            problem = error
        # Whatever became of the certificates: the guard refuses it by its name.
        take_up(directory)
        if problem is not None:
            fail(problem)
    except ClusterError as error:
        fail(error)


def release(
    name: str,
    cluster: Dir,
    out: Annotated[
        Path, typer.Option(help="Directory for its new certificates; a new one.")
    ],
) -> None:
    """Take a node out of quarantine and issue it new certificates."""
    from raysandbox.cluster import inventory
    from raysandbox.cluster.registry import Registry

    directory = opened(cluster)
    try:
        node = directory.inventory().nodes.get(name)
        if node is not None and not node.quarantined:
            raise ClusterError(where=name, what="is not quarantined")
        if node is not None:
            # The old keys were in the node's hands: they don't come back.
            registry = Registry(directory)
            hosts = [a for a in node.addresses if "/" not in a] or [
                a for a in registry.last_addresses("node", name) if node.has_address(a)
            ]
            if not hosts:
                raise ClusterError(
                    where=name,
                    what="has only networks in inventory.toml, and no certificate "
                    "that names an address in them",
                    remedy="write its own address into its entry there",
                )
            for uri in registry.issue("node", name, hosts, out):
                print(uri)
        inventory.quarantine(directory, name, False)
        print(f"{name} is admitted again, with the certificates in {out} alone")
        take_up(directory)
    except ClusterError as error:
        fail(error)
