"""``raysandbox doctor``: what this host and this user can enforce."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from raysandbox import launch, plan
from raysandbox import profile as profiles
from raysandbox.cli.look import application
from raysandbox.errors import RaysandboxError, SetupError, UnsupportedError
from raysandbox.kernel import cgroup
from raysandbox.probe import Host, probe
from raysandbox.run import cgroup_limits, limit_protections

__all__ = ["app", "examine"]

app = application()

_COLOURS = {
    "enforced": "green",
    "degraded": "yellow",
    "off": "yellow",
    "missing": "red",
}


def examine(name: str) -> dict[str, Any]:
    """Say for one profile what would hold here.

    Returns:
        ``profile``, ``usable``, ``walls`` (each with ``wall``, ``state``,
        ``reason``, ``remedy``) and ``problem``.
    """
    walls: list[dict[str, str]] = []
    try:
        profile = profiles.load(name)
        walls += _limits(profile)
        walls += _plan(profile, probe())
    except UnsupportedError as error:
        walls.append(_missing(error))
    except RaysandboxError as error:
        return {"profile": name, "usable": False, "walls": walls, "problem": str(error)}
    missing = [wall["wall"] for wall in walls if wall["state"] == "missing"]
    return {
        "profile": name,
        "usable": not missing,
        "walls": walls,
        "problem": f"missing: {', '.join(missing)}" if missing else "",
    }


def _missing(error: UnsupportedError) -> dict[str, str]:
    return {
        "wall": error.feature,
        "state": "missing",
        "reason": f"need {error.need}, have {error.have}",
        "remedy": error.remedy,
    }


def _wall(found: plan.Protection, remedy: str = "") -> dict[str, str]:
    return {
        "wall": found.name,
        "state": found.state.value,
        "reason": found.reason,
        "remedy": remedy,
    }


def _plan(profile: profiles.Profile, host: Host) -> list[dict[str, str]]:
    lease = launch.lease_ids()
    try:
        found, missing = plan.survey(
            profile, host, plan.Context(ids=lease.ids, zygote=True, notify=True)
        )
    finally:
        lease.close()
    return [*map(_wall, found), *map(_missing, missing)]


def _limits(profile: profiles.Profile) -> list[dict[str, str]]:
    with cgroup.discover() as groups:
        report = groups.support(cgroup_limits(profile))
    walls = []
    for found, status in zip(limit_protections(report), report.values()):
        wall = _wall(found, status.remedy)
        if found.state is plan.State.OFF and profile.limits.required:
            wall["state"] = "missing"
        walls.append(wall)
    return walls


@app.command()
def doctor(
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile", "-p", metavar="NAME", help="Only this one; repeatable."
        ),
    ] = None,
    cluster: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option(help="Audit this member of a cluster instead: its directory."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say, for each profile, which walls this host and user can raise.

    What is missing comes with the exact remedy. Exit status: 0 if every profile
    that was asked for can be enforced, 1 if not. With --cluster: 0 if no check of
    the member found a problem, 1 if one did.
    """
    if cluster is not None:
        _examine_cluster(cluster, as_json)
        return
    host = probe()
    try:
        launcher = launch.launcher_path()
        problem = ""
    except SetupError as error:
        launcher, problem = "", error.detail
    found = [examine(name) for name in profile or profiles.names()]
    if problem:
        found = [{**each, "usable": False} for each in found]
    fine = all(each["usable"] for each in found) and not problem
    if as_json:
        report = {
            "host": {
                "kernel": host.kernel,
                "arch": host.arch,
                "euid": host.euid,
                "landlock_abi": host.landlock_abi,
                "seccomp": host.seccomp,
                "seccomp_notify": host.seccomp_notify,
                "namespaces": host.namespaces_reason or "available",
            },
            "launcher": launcher,
            "problem": problem,
            "profiles": found,
            "usable": fine,
        }
        print(json.dumps(report, indent=2))
    else:
        _print(host, launcher or problem, found)
    raise typer.Exit(0 if fine else 1)


def _examine_cluster(path: Path, as_json: bool) -> None:
    from raysandbox.cluster.audit import plain
    from raysandbox.cluster.report import cluster_checks
    from raysandbox.cluster.settings import ClusterDir

    try:
        checks = cluster_checks(ClusterDir(path))
    except RaysandboxError as error:
        checks = [{"check": "directory", "state": "problem", "reason": str(error)}]
    fine = all(row["state"] != "problem" for row in checks)
    if as_json:
        print(json.dumps({"ok": fine, "checks": checks}, indent=2))
    else:
        for row in checks:
            reason = f": {plain(row['reason'])}" if row["reason"] else ""
            print(f"{row['state']:8} {row['check']}{reason}")
    raise typer.Exit(0 if fine else 1)


def _print(host: Host, launcher: str, found: Sequence[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    who = "root" if host.is_root else f"uid {host.euid}"
    console.print(
        f"Linux {host.kernel} on {host.arch}, as {who}; Landlock ABI "
        f"{host.landlock_abi}; Python {sys.version.split()[0]}",
    )
    _say(console, f"launcher: {launcher}")
    table = Table("wall", *(each["profile"] for each in found), box=None)
    states: dict[str, dict[str, dict[str, str]]] = {}
    for each in found:
        for wall in each["walls"]:
            states.setdefault(wall["wall"], {})[each["profile"]] = wall
    for name, by_profile in states.items():
        cells = []
        for each in found:
            state = by_profile.get(each["profile"], {}).get("state", "-")
            colour = _COLOURS.get(state, "dim")
            cells.append(f"[{colour}]{state}[/]")
        table.add_row(name, *cells)
    verdicts = (
        "[green]usable[/]" if each["usable"] else "[red]refused[/]" for each in found
    )
    table.add_section()
    table.add_row("[b]profile[/]", *verdicts)
    console.print(table)
    # A remedy is a command to copy: on a line of its own, once, and not wrapped.
    remedies: dict[str, None] = {}
    told = set()
    for each in found:
        if each["problem"] and not each["problem"].startswith("missing: "):
            _say(console, f"{each['profile']}: {each['problem']}")
        for wall in each["walls"]:
            line = f"{wall['wall']}: {wall['state']}: {wall['reason']}"
            if wall["reason"] and line not in told:
                told.add(line)
                _say(console, line)
            if wall["remedy"] and wall["state"] != "enforced":
                remedies[wall["remedy"]] = None
    for remedy in remedies:
        _say(console, f"to fix: {remedy}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
