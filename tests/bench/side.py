"""One side of a comparison: a Ray of its own that runs what it is told.

Is told by a `tests.peer.Peer`. Two of these live side by side, and the caller lets
them take turns.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy
import psutil
import ray

import raysandbox
from tests import peer

PROFILE = sys.argv[1] if len(sys.argv) > 1 else ""


def nothing() -> None:
    """Do nothing."""


def total(array: Any) -> float:
    """Sum an array."""
    return float(array.sum())


def touch_files(rounds: int) -> list[float]:
    """Return seconds per open+read+close and per stat of a small file."""
    path = json.__file__
    begun = time.perf_counter()
    for _ in range(rounds):
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)
    middle = time.perf_counter()
    for _ in range(rounds):
        os.stat(path)
    return [(middle - begun) / rounds, (time.perf_counter() - middle) / rounds]


def _task(function: Callable[..., Any], **options: Any) -> Any:
    if PROFILE:
        options["resources"] = raysandbox.tag(PROFILE)
    return ray.remote(max_retries=0, **options)(function)


def noop(count: int, max_calls: int = 0) -> float:
    """Return seconds for so many no-op tasks, all in flight at once."""
    options = {"max_calls": max_calls} if max_calls else {}
    task = _task(nothing, **options)
    begun = time.perf_counter()
    ray.get([task.remote() for _ in range(count)])
    return time.perf_counter() - begun


class Idle:
    """An actor that does nothing."""

    def nothing(self) -> None:
        """Do nothing."""


_actors: list[Any] = []


def calls(count: int) -> float:
    """Return seconds for so many calls of an actor, all in flight at once."""
    if not _actors:
        options = {"resources": raysandbox.tag(PROFILE)} if PROFILE else {}
        _actors.append(ray.remote(num_cpus=0, **options)(Idle).remote())
        ray.get(_actors[0].nothing.remote())
    begun = time.perf_counter()
    ray.get([_actors[0].nothing.remote() for _ in range(count)])
    return time.perf_counter() - begun


_refs: list[Any] = []


def sum_array(mebibytes: int) -> float:
    """Return seconds to sum an array that is in the store."""
    if not _refs:
        _refs.append(ray.put(numpy.ones(mebibytes << 17)))
    task = _task(total)
    begun = time.perf_counter()
    ray.get(task.remote(_refs[0]))
    return time.perf_counter() - begun


def files(rounds: int) -> list[float]:
    """As `touch_files`, in a task."""
    found: list[float] = ray.get(_task(touch_files).remote(rounds))
    return found


def _stamp(line: str) -> float:
    return datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f").timestamp()  # noqa: DTZ007


class _Nobody:
    """An actor that does nothing."""


def worker_starts(count: int) -> list[float]:
    """Start so many workers; return seconds from raylet's start to registration.

    By raylet's log and each worker's own: it names its address once it has
    registered. One after the other, with nothing else going on.
    """
    for _ in range(count):
        options = {"resources": raysandbox.tag(PROFILE)} if PROFILE else {}
        actor = ray.remote(num_cpus=0, **options)(_Nobody).remote()
        ray.get(actor.__ray_ready__.remote())
        ray.kill(actor)
        time.sleep(1)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    started: dict[str, float] = {}
    with open(logs / "raylet.out") as file:
        for line in file:
            if match := re.search(r"Started worker process with pid (\d+)", line):
                started[match[1]] = _stamp(line)
    found = []
    for path in logs.glob("python-core-worker-*_*.log"):
        pid = path.stem.rpartition("_")[2]
        for line in path.read_text().splitlines():
            if "Initializing worker at address" in line and pid in started:
                found.append(_stamp(line) - started[pid])
    return found


def waiting_jails() -> list[int]:
    """Return the memory of each jail that waits for a task, in bytes.

    Pages that its parent has too are the parent's; what is left, private and
    proportional, is what one more jail costs.
    """
    noop(4)
    time.sleep(1)
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if "raysandbox.jail.zygote" not in " ".join(process.info["cmdline"] or ()):
            continue
        below = process.children()
        if "raysandbox-launch" in process.info["cmdline"][0] or not below:
            continue
        found += [child.memory_full_info().uss for child in below]
    return found


def main() -> None:
    """Serve until stdin ends."""
    temporary = tempfile.TemporaryDirectory(prefix="rsx-bench-", dir="/tmp")
    options: dict[str, Any] = {
        "num_cpus": 2,
        "include_dashboard": False,
        "logging_level": "ERROR",
        "log_to_driver": False,
        "object_store_memory": 512 << 20,
        "_temp_dir": temporary.name,
    }
    (raysandbox.init if PROFILE else ray.init)(**options)
    try:
        peer.serve(globals())
    finally:
        ray.shutdown()
        temporary.cleanup()


if __name__ == "__main__":
    main()
