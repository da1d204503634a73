"""``raysandbox ps``, ``top``, ``events``, ``kill``: what runs, ran and should not."""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysandbox import policy as policies
from raysandbox.cli.look import AsJson, application
from raysandbox.errors import ProfileError
from raysandbox.observe import events as logs
from raysandbox.observe import live, nodes
from raysandbox.observe.text import shown
from raysandbox.profile.units import parse_duration

__all__ = ["events_app", "kill_app", "ps_app", "top_app"]

Job = Annotated[str, typer.Option(help="Only of this job (Ray's id, or its start).")]
Node = Annotated[str, typer.Option(help="Only of this node (Ray's id, or its start).")]
Profile = Annotated[str, typer.Option(help="Only jails of this profile.")]

_NO_RAY = "Ray is not running on this machine"


ps_app, top_app = application(), application()
events_app, kill_app = application(), application()


# --- ps and top --------------------------------------------------------------------


def _chosen(job: str, node: str, profile: str) -> list[live.Row]:
    return [
        row
        for row in live.rows()
        if row.job.startswith(job)
        and row.node.startswith(node)
        and (not profile or row.profile == profile)
    ]


@ps_app.command()
def ps(
    job: Job = "", node: Node = "", profile: Profile = "", as_json: AsJson = False
) -> None:
    r"""List the workers and jails of this machine's nodes.

    A jail is listed from its first call on, below its worker. A worker in state
    "outside" is one of Ray's that is not in the sandbox. Memory is what is used
    now, of the limit. The id in the first column is what `kill` takes.

    Above them is what each job has in the object store of its node, against its
    quota, and how many objects that refused.

    The names of tasks are what their authors chose; what a terminal would act
    on is shown as \x1b and the like.
    """
    rows = _chosen(job, node, profile)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
        return
    if not rows:
        print(_nothing())
        return
    _console().print(_tables(rows, {}))


def _console() -> Console:
    """Print as wide as needed where nobody looks at a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _nothing() -> str:
    return "nothing is running in the sandbox" if nodes.nodes() else _NO_RAY


@top_app.command()
def top(
    job: Job = "",
    node: Node = "",
    profile: Profile = "",
    interval: Annotated[
        float, typer.Option("--interval", "-d", min=0.1, help="Seconds between looks.")
    ] = 1.0,
    count: Annotated[
        int, typer.Option("--count", "-n", min=0, help="Looks; 0: until Ctrl-C.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """As `ps`, again and again, with the CPU used between two looks in percent.

    The busiest come first. With --json one line for each look.
    """
    before: dict[str, tuple[float, float]] = {}
    console = _console()
    screen = None if as_json else Live(console=console, auto_refresh=False)
    looked = 0
    try:
        if screen is not None:
            screen.start()
        while True:
            rows, now = _chosen(job, node, profile), time.monotonic()
            rates = {
                row.id: _rate(row, before[row.id], now)
                for row in rows
                if row.id in before
            }
            before = {row.id: (now, row.cpu_time_s or 0.0) for row in rows}
            rows.sort(key=lambda row: -rates.get(row.id, 0.0))
            if screen is not None:
                screen.update(_tables(rows, rates) if rows else Text(_nothing()))
                screen.refresh()
            else:
                look = [
                    row.as_json() | {"cpu_percent": rates.get(row.id)} for row in rows
                ]
                print(json.dumps({"time": time.time(), "rows": look}), flush=True)
            looked += 1
            if looked == count:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        return
    finally:
        if screen is not None:
            screen.stop()


def _rate(row: live.Row, before: tuple[float, float], now: float) -> float:
    then, used = before
    if row.cpu_time_s is None or now <= then:
        return 0.0
    return max(0.0, (row.cpu_time_s - used) / (now - then) * 100)


def _tables(rows: list[live.Row], rates: dict[str, float]) -> Group:
    jobs = [row for row in rows if row.kind == "job"]
    others = [row for row in rows if row.kind != "job"]
    parts: list[RenderableType] = []
    if jobs:
        parts += [_jobs_table(jobs), Text()]
    if others or not jobs:
        parts.append(_table(others, rates) if others else Text(_nothing()))
    return Group(*parts)


def _jobs_table(rows: list[live.Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(
        ("job", "node", "state", "stored", "of", "objects", "of", "refused")
    ):
        table.add_column(name, justify="left" if index < 3 else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(
                Text(cell)
                for cell in (
                    shown(row.job, 8),
                    shown(row.node[:8], 8),
                    row.state,
                    _size(row.stored_bytes),
                    _size(row.stored_limit_bytes),
                    str(row.stored_objects),
                    str(row.stored_limit_objects or "-"),
                    str(row.refused),
                )
            ),
            style="bold red" if row.refused else "",
        )
    return table


def _table(rows: list[live.Row], rates: dict[str, float]) -> Table:
    head = ["id", "node", "job", "task", "profile", "state"]
    numbers = ["age", "cpu", "memory", "of", "pids", "denied"]
    head += ["cpu%", *numbers] if rates else numbers
    lines = [_cells(row, rates) for row in rows]
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(head):
        # Where there is no room, names are cut, never ids or figures.
        widest = max(len(name), *(len(line[index]) for line in lines))
        table.add_column(
            name,
            justify="left" if index < 6 else "right",
            no_wrap=True,
            min_width=8 if name == "task" else widest,
        )
    for row, line in zip(rows, lines):
        style = "bold red" if row.state == "outside" else ""
        # Text, not str: nothing in a name is markup.
        table.add_row(*(Text(cell) for cell in line), style=style)
    return table


def _cells(row: live.Row, rates: dict[str, float]) -> list[str]:
    indent = "  " if row.kind == "jail" else ""
    rate = f"{rates[row.id]:.0f}" if row.id in rates else "-"
    return [
        indent + row.id,
        shown(row.node[:8], 8),
        shown(row.job, 8) or "-",
        indent + shown(row.name, 40),
        shown(row.profile, 24) or "-",
        row.state,
        *([rate] if rates else []),
        _duration(row.age_s),
        "-" if row.cpu_time_s is None else _duration(row.cpu_time_s),
        _size(row.memory_bytes),
        _size(row.memory_limit_bytes),
        "-" if row.pids is None else str(row.pids),
        str(row.denials),
    ]


def _duration(value_s: float) -> str:
    if value_s < 60:
        return f"{value_s:.1f}s"
    minutes, seconds = divmod(int(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    if size_bytes >= 10 << 30:
        return f"{size_bytes / (1 << 30):.0f}G"
    return f"{size_bytes / (1 << 20):.0f}M"


# --- events ---------------------------------------------------------------------------


@events_app.command()
def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes.")
    ] = False,
    last: Annotated[
        int, typer.Option("--last", "-n", min=0, help="Of what there is; 0: all.")
    ] = 0,
    since: Annotated[
        str, typer.Option(help="Only of this time, such as 10min or 2h.")
    ] = "",
    event: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind: jail_ended, task_refused, quota_refused, worker_entered, "
            "worker_ended, node_started, link_ended, link_refused; repeatable."
        ),
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Of this profile; * and ? match.")
    ] = None,
    job: Annotated[list[str] | None, typer.Option(help="Of this job.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Of tasks with this name.")
    ] = None,
    outcome: Annotated[
        list[str] | None,
        typer.Option(help="ok, exception, TaskOutOfMemory, TaskTimedOut, …"),
    ] = None,
    denied: Annotated[
        bool, typer.Option(help="Only what was denied or refused something.")
    ] = False,
    directory: Annotated[
        list[str] | None,
        typer.Option(help="Where logs are; default: of every node of this machine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what became of jails: from the event logs of this machine's nodes.

    One event a line, oldest first; --json prints the lines as they were written.

    \b
    raysandbox events --follow --denied
    raysandbox events --since 1h --outcome TaskOutOfMemory --json
    """  # noqa: D301 - \b keeps the lines of a paragraph apart
    wanted = logs.Filter(
        events=tuple(event or ()),
        profiles=tuple(profile or ()),
        jobs=tuple(job or ()),
        tasks=tuple(task or ()),
        outcomes=tuple(outcome or ()),
        denied=denied,
        since=time.time() - _seconds(since) if since else 0.0,
    )
    directories = [*directory] if directory else _directories()
    if not directories:
        print(f"{_NO_RAY}: name a log directory with --directory")
        raise typer.Exit(1)
    reader = logs.Reader(directories)
    found = [each for each in reader.read() if wanted.takes(each)]
    for each in found[-last:] if last else found:
        _print_event(each, as_json)
    try:
        for each in reader.follow() if follow else ():
            if wanted.takes(each):
                _print_event(each, as_json)
    except KeyboardInterrupt:
        pass
    if reader.malformed:
        Console(stderr=True, soft_wrap=True).print(
            f"raysandbox: {reader.malformed} lines are no events", highlight=False
        )


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ProfileError(source="--since", value=text, reason=str(error)) from None


def _directories() -> list[str]:
    found = [node.log_dir for node in nodes.nodes()]
    path = policies.find()
    if os.path.lexists(path):
        directory = policies.load(path).audit.directory
        if directory != "session":
            found.append(directory)
    return list(dict.fromkeys(found))


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        # ASCII only: json escapes everything else.
        print(json.dumps(event), flush=True)
        return
    print(_event_line(event), flush=True)


def _event_line(event: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time"]).astimezone()
    names = ", ".join(logs.task_names(event)[:3])
    parts = [
        when.isoformat(timespec="milliseconds"),
        shown(event["event"], 20),
        shown(event.get("job", "-"), 8),
        shown(event.get("profile", "-"), 24),
        shown(names or "-", 60),
        shown(logs.summary(event), 300),
    ]
    return "  ".join(parts)


# --- kill -------------------------------------------------------------------------


@kill_app.command()
def kill(
    ids: Annotated[
        list[str],
        typer.Argument(
            metavar="ID...",
            help="From `ps`, or Ray's id of a task, an actor or a worker (its first "
            "8 digits are enough).",
        ),
    ],
    reason: Annotated[
        str, typer.Option(help="A few words; the task's owner sees them.")
    ] = "",
    wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a worker or jail may take.")
    ] = 3.0,
    as_json: AsJson = False,
) -> None:
    """End jails or workers; nothing else can be ended with this.

    A jail ends with everything in it, and the task's owner gets TaskKilled with
    the reason. Its worker does it; where that does not react, the kernel does.
    A worker ends with its jails, and Ray starts another. What is not a jail or a
    worker of raysandbox, at this very moment, is refused.

    Exit status 0 if all have ended, 1 if not.
    """
    done = [_end(each, reason, wait) for each in ids]
    if as_json:
        print(json.dumps(done, indent=2))
    else:
        for each in done:
            text = (
                each["error"] or f"{each['kind']} {each['id']}: ended by {each['by']}"
            )
            print(shown(text, 400))
    raise typer.Exit(1 if any(each["error"] for each in done) else 0)


def _end(identifier: str, reason: str, wait_s: float) -> dict[str, Any]:
    result: dict[str, Any] = dict.fromkeys(("kind", "id", "by"))
    result |= {"asked": identifier, "error": ""}
    found = live.find(identifier)
    if len(found) != 1:
        what = ", ".join(each.row.id for each in found)
        result["error"] = (
            f"{identifier}: means {what}: say which"
            if found
            else f"{identifier}: no jail or worker of raysandbox on this machine"
        )
        return result
    row = found[0].row
    result |= {"kind": row.kind, "id": row.id}
    who = os.environ.get("SUDO_USER") or getpass.getuser()
    try:
        if row.kind == "jail":
            result["by"] = live.end_jail(
                found[0], f"{who}: {reason}" if reason else who, wait_s
            )
        else:
            result["by"] = live.end_worker(found[0], wait_s)
            _record(found[0], who, reason, str(result["by"]))
    except OSError as error:
        result["error"] = f"{row.kind} {row.id}: {os.strerror(error.errno or 0)}"
        return result
    if not result["by"]:
        result["error"] = f"{row.kind} {row.id}: has not ended"
        if row.kind == "jail":
            result["error"] += f"; end its worker: raysandbox kill {row.pid}"
    return result


def _record(found: live.Found, who: str, reason: str, by: str) -> None:
    """A worker that was killed writes no event: we do."""
    from raysandbox.worker.events import EventLog

    if found.worker is None or not by:
        return
    try:
        log = EventLog(os.path.dirname(found.worker.path))
    except OSError:
        return
    log.write(
        "worker_ended",
        node=found.row.node,
        worker=found.row.worker,
        ended_by=f"{who}: {reason}" if reason else who,
        signal=by,
    )
