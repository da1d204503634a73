"""Cleans up after a worker that is its own boundary: outside its walls.

Started by the worker before the walls are up, and not its child. Waits for the
worker's end, then ends what it left running, removes its group and files,
and writes the event of its end, which the worker itself could have forged.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from raysandbox.errors import SetupError
from raysandbox.kernel import cgroup
from raysandbox.worker.events import EventLog

__all__ = ["main", "start"]

_CODE = (
    "import sys; sys.path[:0] = sys.argv[2:]; "
    "from raysandbox.worker.janitor import main; main(sys.argv[1])"
)
_START_S = 30.0


def start(
    *,
    directory: str,
    group: dict[str, Any] | None,
    log_dir: str,
    event: dict[str, Any],
    python_path: Sequence[str],
) -> None:
    """Start one for this process.

    Args:
        directory: Removed, with all that is in it.
        group: From ``Cgroups.describe``; None if there is none.
        log_dir: Where the event goes.
        event: What the event of the end says besides usage.
        python_path: Module search path; nothing of a user's.

    Raises:
        SetupError: It did not come up.
    """
    package = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    order = {
        "pid": os.getpid(),
        "directory": directory,
        "group": group,
        "log_dir": log_dir,
        "event": event,
    }
    command = [sys.executable, "-I", "-S", "-c", _CODE, json.dumps(order)]
    command += [package, *python_path]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"PATH": os.defpath},
        cwd="/",
        start_new_session=True,
        timeout=_START_S,
    )
    if done.returncode != 0:
        detail = done.stderr.decode("utf-8", "replace").strip()[-400:]
        raise SetupError(step="janitor", detail=detail)


def main(text: str) -> None:
    """Detach, wait, clean up."""
    order = json.loads(text)
    watched = os.pidfd_open(order["pid"])
    log = EventLog(order["log_dir"])
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    group = None
    if order["group"] is not None:
        group = cgroup.Cgroups.adopt(order["group"])
        group.kill()
    shutil.rmtree(order["directory"], ignore_errors=True)
    try:
        usage = group.usage() if group is not None else cgroup.Usage()
    finally:
        if group is not None:
            group.remove()
            group.owner.close()
    log.write(
        "worker_ended",
        **order["event"],
        memory_peak_bytes=usage.memory_peak_bytes,
        cpu_time_s=usage.cpu_time_s,
        oom_kills=usage.oom_kills,
        forks_refused=usage.pids_denied,
    )
