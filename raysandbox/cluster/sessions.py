"""Which start of a raylet a worker belongs to: a part of the worker's identity.

A worker's certificate outlives the worker, by up to a year, and no list names it:
whoever has read one could speak as that worker long after it. So its identity says on
which machine and in which session it was made: ``worker/NODE/SESSION-RANDOM``. A
session is one start of a raylet: all workers of a former one have ended, and the
access service refuses them (`raysandbox.cluster.access`). Those of the session that
runs end one by one, as their node reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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


def _host() -> str:
    """Return what tells this host from one that was made of a copy of its disk."""
    told = [os.uname().nodename]
    with contextlib.suppress(OSError):
        told.append(Path("/etc/machine-id").read_text())
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def begin(run: Path) -> str:
    """Begin a session; return its name.

    Args:
        run: Of the member's directory. A machine is one such directory on one host:
            copies of a member's on several hosts have sessions of their own.

    Raises:
        OSError: It can't be written.
    """
    now = int(time.time())
    machine, began, host = _read(run) or ("", "0", "")
    if host != _host():
        machine, began = secrets.token_hex(4), "0"
    # Also where the clock was set back.
    name = f"{machine}{max(now, int(began, 16) + 1):08x}"
    write_file(_file(run), f"{name} {_host()}")
    return name


def current(run: Path) -> str:
    """Return the session that runs; begin one where there is none."""
    known = _read(run)
    return known[0] + known[1] if known else begin(run)


def _read(run: Path) -> tuple[str, str, str] | None:
    try:
        name, _, host = _file(run).read_text(errors="replace").partition(" ")
    except FileNotFoundError:
        return None
    found = _SESSION.match(name)
    return (found[1], found[2], host) if found else None


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
