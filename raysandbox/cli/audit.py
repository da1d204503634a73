"""`raysandbox audit`: what was asked of the GCS, by whom, and what became of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from raysandbox.cli.look import AsJson, application
from raysandbox.cli.member import Dir, fail, opened
from raysandbox.cluster.errors import ClusterError
from raysandbox.profile.units import parse_duration

__all__ = ["app"]

app = application("The audit log.", invoke_without_command=True)


@app.callback()
def audit(
    context: typer.Context,
    cluster: Dir,
    who: Annotated[str, typer.Option(help="Part of the identity or address.")] = "",
    what: Annotated[str, typer.Option(help="Part of method, object or event.")] = "",
    since: Annotated[str, typer.Option(help="Like 10min, 2h, 1d.")] = "",
    denied: Annotated[bool, typer.Option(help="Only what was refused.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what was asked of the GCS, by whom, and what became of it."""
    if context.invoked_subcommand:
        context.obj = cluster
        return
    from raysandbox.cluster.audit import query

    path = opened(cluster).audit
    span = _span(since)
    if not path.is_dir():
        fail(
            ClusterError(
                where=str(path),
                what="there is no audit log",
                remedy="run this on the head, where the guard writes it",
            )
        )
    try:
        for record in query(path, who=who, what=what, since_s=span, denied=denied):
            print(json.dumps(record) if as_json else _line(record))
    except BrokenPipeError:
        # `raysandbox audit | head` has seen enough.
        raise typer.Exit(0) from None


def _line(record: dict[str, Any]) -> str:
    """Return one line that a terminal can only print."""
    from raysandbox.cluster.audit import plain

    when = record.get("t", 0)
    day = time.strftime(
        "%m-%d %H:%M:%S", time.localtime(when if isinstance(when, (int, float)) else 0)
    )
    name = str(record.get("method") or record.get("event", "")).rpartition("/")[2]
    parts = [
        day,
        "ok" if record.get("ok", True) else "NO",
        record.get("who") or record.get("source", ""),
        name,
        record.get("object", ""),
        record.get("why", ""),
        f"x{record['count']}" if "count" in record else "",
    ]
    return " ".join(plain(part) for part in parts if part not in ("", None))


def _span(text: str) -> float | None:
    try:
        return parse_duration(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"--since: {error}") from None


@app.command()
def verify(
    context: typer.Context,
    expect: Annotated[str, typer.Option(help="A hash noted earlier.")] = "",
    anchors: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option(help="A copy of the anchor file; default: audit.anchor_file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the hash chain of the audit log; exit 1 if it is broken."""
    from raysandbox.cluster import audit as log

    cluster = opened(context.obj)
    try:
        anchors = anchors or cluster.settings().audit.anchor_file
        found = log.verify(cluster.audit, expect, anchors)
    except ClusterError as error:
        if as_json:
            print(json.dumps({"ok": False, "where": error.where, "what": error.what}))
            raise typer.Exit(1) from None
        fail(error)
    outside = bool(expect or anchors)
    if as_json:
        told = {
            "ok": True, "lines": found.lines, "first": found.first,
            "last": found.last, "hash": found.hash, "anchors": found.anchors,
            "checked_against_outside": outside, "notes": found.notes,
        }  # fmt: skip
        print(json.dumps(told))
        return
    print(f"{found.lines} lines, unbroken; last hash {found.hash or '(none)'}")
    for note in found.notes:
        print(f"note: {log.plain(note)}")
    if not outside:
        print(
            "note: whoever may write to the directory could have written all of it "
            "anew; note the last hash elsewhere for --expect, or set audit.anchor_file"
        )
