"""Which processes of Ray this member started, and how to end them.

``run/processes.json`` names them with their start times, because a pid alone may
be somebody else's by now. `ray stop` would end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from raysandbox.cluster.settings import ClusterDir, write_file
from raysandbox.cluster.surfaces import processes_of

__all__ = ["alive", "exists", "known", "remember", "stop"]

WAIT_S = 15.0
# For what our processes started, from the moment that we asked them to end.
GRACE_S = 5.0


def _started(pid: int) -> int:
    """Return a process's start time in clock ticks, 0 when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended; only its parent has not looked yet.
    return 0 if fields[0] == "Z" else int(fields[19])


def exists(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    return _started(pid) != 0


def remember(cluster: ClusterDir, processes: Iterable[tuple[str, int]]) -> None:
    """Note the processes that were started, as (kind, pid)."""
    rows = [
        {"kind": kind, "pid": pid, "start": _started(pid)} for kind, pid in processes
    ]
    write_file(cluster.run / "processes.json", json.dumps(rows), durable=False)


def alive(cluster: ClusterDir) -> list[tuple[str, int]]:
    """Return (kind, pid) of those that run, in the order they were started."""
    return [row[:2] for row in _rows(cluster) if _started(row[1]) == row[2] != 0]


def known(cluster: ClusterDir) -> list[tuple[str, int]]:
    """Return (kind, pid) of all that were started, whether they run or not."""
    return [row[:2] for row in _rows(cluster)]


def _rows(cluster: ClusterDir) -> list[tuple[str, int, int]]:
    try:
        rows = json.loads((cluster.run / "processes.json").read_text())
        return [(str(r["kind"]), int(r["pid"]), int(r["start"])) for r in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def stop(cluster: ClusterDir, wait_s: float = WAIT_S) -> list[str]:
    """End this member's processes of Ray; returns the kinds that ran.

    The raylet first: it ends its workers and tells the GCS that the node leaves.
    What is still there after `wait_s` seconds is killed.
    """
    order = {"raylet": 0, "gcs_server": 2}
    # The dashboard leaves its own processes behind when it is told to end.
    family = {
        pid: _started(pid) for pid in processes_of(pid for _, pid in alive(cluster))
    }
    running = sorted(alive(cluster), key=lambda item: order.get(item[0], 1))
    end = time.monotonic() + wait_s
    for kind, pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while (kind, pid) in alive(cluster):
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    while left := [pid for pid, start in family.items() if _started(pid) == start != 0]:
        if time.monotonic() > end - wait_s + GRACE_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    (cluster.run / "processes.json").unlink(missing_ok=True)
    return [kind for kind, _ in running]
