"""Which start of a raylet a worker belongs to: a part of the worker's identity.

A worker's certificate outlives the worker, by up to a year, and no list names it:
whoever has read one could speak as that worker long after it. So its identity says on
which machine and in which session it was made: ``worker/NODE/SESSION-RANDOM``. A
session is one start of a raylet: all workers of a former one have ended, and the
access service refuses them (`raysandbox.cluster.access`). Those of the session that
runs end one by one, as their node reports.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from pathlib import Path

from raysandbox.cluster.settings import write_file

__all__ = ["TABLE", "after", "begin", "closed", "current", "of"]

# Eight digits of the machine, eight of when it began: of one machine, what is larger
# is later.
_SESSION = re.compile(r"([0-9a-f]{8})([0-9a-f]{8})\Z")
#: Name of the table of facts: newest session by node and machine.
TABLE = "sessions"


def _file(run: Path) -> Path:
    return run / "session"


def begin(run: Path) -> str:
    """Begin a session; return its name.

    Args:
        run: Of the member's directory. A machine is one such directory: copies of a
            member's on several machines have sessions of their own.

    Raises:
        OSError: It can't be written.
    """
    now = int(time.time())
    try:
        found = _SESSION.match(_file(run).read_text())
    except FileNotFoundError:
        found = None
    machine = found[1] if found else secrets.token_hex(4)
    # Also where the clock was set back.
    began = max(now, int(found[2], 16) + 1) if found else now
    name = f"{machine}{began:08x}"
    write_file(_file(run), name)
    return name


def current(run: Path) -> str:
    """Return the session that runs; begin one where there is none."""
    try:
        text = _file(run).read_text()
    except FileNotFoundError:
        return begin(run)
    return text if _SESSION.match(text) else begin(run)


def of(uri: str) -> tuple[str, str] | None:
    """Return node and machine of a worker, and when its session began.

    None for an identity that names no session.
    """
    _, _, rest = uri.partition("/worker/")
    node, _, component = rest.partition("/")
    session, dash, _ = component.partition("-")
    found = _SESSION.match(session)
    return (f"{node}/{found[1]}", found[2]) if found and dash else None


def after(began: str) -> str:
    """Return the first time at which a session could begin that is later."""
    return f"{int(began, 16) + 1:08x}"


def closed(path: Path) -> list[list[str]]:
    """Return facts that end every session: for a GCS that begins anew.

    Args:
        path: The journal. Lines that are damaged are left out: what else they said
            is forgotten too.
    """
    newest: dict[str, str] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            table, key, began = json.loads(line)
            if table == TABLE:
                newest[str(key)] = after(str(began))
        except (ValueError, TypeError, RecursionError):
            continue
    return [[TABLE, key, began] for key, began in newest.items()]
