"""Two thousand tasks of mixed outcome leave everything as it was."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import ray

import raysandbox


def fine(number: int) -> int:
    return number + 1


def rests(number: int) -> int:
    time.sleep(0.2)
    return number


def fails() -> None:
    raise ValueError("on purpose")


def exits() -> None:
    os._exit(3)


def crashes() -> None:
    ctypes.string_at(0)


def leaves_a_daemon() -> str:
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
    return "left"


def leaves_files() -> int:
    for number in range(50):
        Path(f"/tmp/{number}").write_bytes(bytes(4096))
    return 50


def sums(array: Any) -> float:
    return float(array.sum())


def no_data() -> Any:
    return object()


def memory_bomb() -> int:
    return len(bytearray(512 << 20))


def flood() -> None:
    sys.stdout.write(f"{'x' * 99}\n" * 700)


def descriptor_bomb() -> int:
    return len([os.dup(0) for _ in range(1000)])


def takes(blob: bytes) -> int:
    return len(blob)


def for_ever() -> None:
    while True:
        time.sleep(1)


# Profile, how many, function, arguments, and what ray.get must raise (None: nothing).
Row = tuple[str, int, Callable[..., Any], tuple[Any, ...], type[BaseException] | None]


def _mix() -> list[Row]:
    array = ray.put(numpy.ones(1 << 19))
    large = ray.put(bytes(2 << 20))
    return [
        ("standard", 800, fine, (1,), None),
        ("standard", 200, fails, (), ValueError),
        ("standard", 60, exits, (), raysandbox.TaskKilled),
        ("standard", 60, crashes, (), raysandbox.TaskKilled),
        ("standard", 40, leaves_a_daemon, (), None),
        ("standard", 40, sums, (array,), None),
        ("strict", 610, fine, (2,), None),
        ("strict", 60, no_data, (), raysandbox.TaskUnsupported),
        ("strict", 40, leaves_files, (), None),
        ("thrifty", 20, memory_bomb, (), raysandbox.TaskOutOfMemory),
        ("thrifty", 20, flood, (), raysandbox.TaskQuotaExceeded),
        ("thrifty", 20, descriptor_bomb, (), OSError),
        ("thrifty", 20, takes, (large,), raysandbox.TaskQuotaExceeded),
        ("hasty", 10, for_ever, (), raysandbox.TaskTimedOut),
    ]


def _outcome(ref: ray.ObjectRef) -> str:
    try:
        ray.get(ref, timeout=120)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        cause = getattr(error, "cause", None)
        kinds += [kind.__name__ for kind in type(cause).__mro__]
        return " ".join(kinds)
    return ""


def _run(scale: int = 1) -> int:
    """Run the mix; every task must end as its row says."""
    done = 0
    for profile, count, function, arguments, expected in _mix():
        task = ray.remote(max_retries=0, resources=raysandbox.tag(profile))(function)
        count = max(2, count // scale)
        refs = [task.remote(*arguments) for _ in range(count)]
        for ref in refs:
            outcome = _outcome(ref)
            wanted = expected.__name__ if expected else ""
            assert (wanted in outcome.split()) if wanted else not outcome, (
                f"{function.__name__} under {profile}: {outcome!r}, not {wanted!r}"
            )
        done += count
        del refs
    task = ray.remote(max_retries=0, resources=raysandbox.tag("strict"))(for_ever)
    refs = [task.remote() for _ in range(4)]
    # Two run, two wait. Of one that is just about to run Ray forgets that it was
    # cancelled (2.60: it is in `running_tasks_`, and not the main thread's yet).
    until = time.monotonic() + 60
    while sum(_name(each) == "ray::for_ever" for each in _workers()) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    for ref in refs:
        ray.cancel(ref, force=True)
    for ref in refs:
        outcome = _outcome(ref).split()
        assert outcome
        assert "GetTimeoutError" not in outcome
    return done


@dataclass
class Snapshot:
    """What there is, of all that tasks could leave.

    Attributes:
        below: Processes below each worker, by name.
        descriptors: What each worker has open, by kind.
        memory: Bytes of memory that each worker has to itself.
        things: Mounts, groups and files, by kind.
    """

    below: dict[int, Counter[str]]
    descriptors: dict[int, Counter[str]]
    memory: dict[int, int]
    things: dict[str, set[str]]


def _workers() -> list[psutil.Process]:
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    found = []
    for each in psutil.Process(raylet).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            words = each.cmdline()
            if any("default_worker.py" in w or w.startswith("ray::") for w in words):
                found.append(each)
    return found


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return str(process.cmdline()[0])
    return ""


def _descriptors(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[re.sub(r"\d+", "N", os.readlink(entry))] += 1
    return found


def _snapshot() -> Snapshot:
    below, descriptors, memory = {}, {}, {}
    for worker in _workers():
        children = worker.children(recursive=True)
        below[worker.pid] = Counter(child.name() for child in children)
        descriptors[worker.pid] = _descriptors(worker.pid)
        memory[worker.pid] = worker.memory_full_info().uss
    groups = {
        f"{directory}/{name}"
        for directory, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if name.startswith("raysandbox-")
    }
    # How many there are, not which: those of the last tasks have other numbers.
    files = {
        str(path)
        for place in ("/tmp", "/dev/shm", "/run/raysandbox", "/var/tmp")
        for path in Path(place).glob("*")
        if "plasma" not in path.name
    }
    mounts = set(Path("/proc/self/mountinfo").read_text().splitlines())
    return Snapshot(
        below,
        descriptors,
        memory,
        {"groups": groups, "files": files, "mounts": mounts},
    )


def _settle() -> Snapshot:
    """End with the same tasks each time, and wait until nothing moves.

    They take long enough for each worker to get some: it keeps a parent of jails
    for the profiles that it served last.
    """
    for profile in ("standard", "strict"):
        task = ray.remote(resources=raysandbox.tag(profile))(rests)
        ray.get([task.remote(1) for _ in range(12)])
    gc.collect()
    last = _snapshot()
    until = time.monotonic() + 40
    while time.monotonic() < until:
        time.sleep(1)
        now = _snapshot()
        if (now.below, now.descriptors) == (last.below, last.descriptors):
            return now
        last = now
    return last


@pytest.mark.alone
@pytest.mark.timeout(420)
def test_two_thousand_tasks_leave_nothing() -> None:
    """Processes, descriptors, mounts, groups, memory and files are as before."""
    _run(scale=20)
    before = _settle()
    assert _run() == 2000
    after = _settle()

    stayed = set(before.descriptors) & set(after.descriptors)
    assert stayed, "no worker lived through it: their jails' ends must not end them"
    for pid in stayed:
        opened = after.descriptors[pid] - before.descriptors[pid]
        # A jail that waits more than before; the rarest kind of task came ten times.
        assert sum(opened.values()) <= 8, opened
        assert after.memory[pid] <= before.memory[pid] + (24 << 20)
        more = after.below[pid] - before.below[pid]
        assert sum(more.values()) <= 2, more
    assert len(after.below) <= len(before.below) + 1
    assert after.things["mounts"] == before.things["mounts"]
    assert after.things["files"] == before.things["files"]
    jails = sum(sum(names.values()) for names in after.below.values())
    assert jails <= 14 * len(after.below)
    assert len(after.things["groups"]) <= len(before.things["groups"])
