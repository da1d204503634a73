"""What runs now: every worker's own word, checked and completed by the kernel's.

From a worker's file come names and ids. Which process it is, whether it lives,
what it and its jails use comes from the file's lock, from /proc and from the
control groups, whose names must be those that this very process can have made.
"""

from __future__ import annotations

import math
import os
import re
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from raysandbox.kernel import cgroup
from raysandbox.kernel.cgroup_find import (
    Base,
    Mount,
    parse_mounts,
    read,
    read_or_none,
)
from raysandbox.observe import nodes, state, stores

__all__ = ["Found", "Row", "end_jail", "end_worker", "find", "rows"]

# Of a jail, and of a worker that is its profile's boundary itself.
_GROUP = re.compile(r"raysandbox-\d+-(\d+)-(\d+)-(?:p\d+-\d+|worker)")
_LIMITS = {
    1: ("memory.limit_in_bytes", "pids.max"),
    2: ("memory.max", "pids.max"),
}
# Above it is version 1's way to say that there is none.
_NO_LIMIT = 1 << 60
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One jail, worker or job.

    Attributes:
        kind: ``"jail"``, ``"worker"``, or ``"job"``: what a job has in the node's
            object store.
        id: ``PID.NUMBER`` of a jail, the pid of a worker, Ray's id of a job.
        node, worker, job, task, actor: Ray's ids, hexadecimal, or ``""``.
        name: Of the task; of a worker what Ray calls it. Not to be trusted.
        profile: The jail's; ``""`` for a worker.
        state: ``running``, ``idle``; for a worker also ``outside``: it is not
            in the sandbox.
        age_s: Since its first call, or its start.
        cpu_time_s: Used by all its processes.
        memory_bytes: Used now.
        memory_limit_bytes: Of how much; None is no limit, or not known.
        pids: Processes and threads now.
        denials: System calls denied so far.
        calls: How many calls it has had; of a worker, of the jails it has now.
        pid: The worker's process.
        stored_bytes, stored_objects: What a job, or a worker of a node that
            raysandbox started, made and has in the store; None: not known.
        stored_limit_bytes, stored_limit_objects: Of how much; None is no limit.
        refused: Objects that a quota refused.
    """

    kind: str
    id: str
    node: str = ""
    worker: str = ""
    job: str = ""
    task: str = ""
    actor: str = ""
    name: str = ""
    profile: str = ""
    state: str = ""
    age_s: float = 0.0
    cpu_time_s: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    pids: int | None = None
    denials: int = 0
    calls: int = 0
    pid: int = 0
    stored_bytes: int | None = None
    stored_objects: int | None = None
    stored_limit_bytes: int | None = None
    stored_limit_objects: int | None = None
    refused: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Found:
    """A row with what it was made from."""

    row: Row
    worker: state.WorkerState | None = None
    jail: state.JailState | None = None


def rows() -> list[Row]:
    """Return every worker of this machine's nodes, each before its jails.

    Those of a node come after its jobs.
    """
    return [found.row for found in _look()]


def _look() -> list[Found]:
    found: list[Found] = []
    now = time.time()
    for node in nodes.nodes():
        known = {each.pid: each for each in state.read(node.log_dir)}
        store = stores.look(node)
        for job, held in sorted(store.jobs.items()):
            row = Row(kind="job", id=job, node=node.node, job=job)
            row = replace(row, state="running" if held.workers else "idle")
            found.append(Found(_with_store(row, held)))
        for process in nodes.workers(node):
            worker = known.get(process.pid)
            row = _worker_row(node, process, worker, now)
            row = _with_store(row, store.workers.get(process.pid))
            found.append(Found(row, worker))
            if worker is None:
                continue
            groups = _groups(worker)
            for jail in sorted(worker.jails, key=lambda jail: jail.number):
                jail_row = _jail_row(node, worker, jail, groups, now)
                found.append(Found(jail_row, worker, jail))
    return found


def _age(now: float, started: float) -> float:
    return max(0.0, now - started) if math.isfinite(started) else 0.0


def _worker_row(
    node: nodes.RayNode,
    process: nodes.RayWorker,
    worker: state.WorkerState | None,
    now: float,
) -> Row:
    row = Row(
        kind="worker",
        id=str(process.pid),
        node=node.node,
        name=process.title,
        state="outside",
        age_s=_age(now, process.started),
        cpu_time_s=process.cpu_time_s,
        memory_bytes=process.memory_bytes,
        pids=process.threads,
        pid=process.pid,
    )
    if worker is None:
        return row
    busy = any(jail.state == "running" for jail in worker.jails)
    jobs = {jail.job for jail in worker.jails}
    return replace(
        row,
        worker=worker.worker,
        job=jobs.pop() if len(jobs) == 1 else "",
        state="running" if busy else "idle",
        denials=sum(jail.denials for jail in worker.jails),
        calls=sum(jail.calls for jail in worker.jails),
    )


def _with_store(row: Row, held: stores.Held | None) -> Row:
    if held is None:
        return row
    return replace(
        row,
        stored_bytes=held.bytes,
        stored_objects=held.objects,
        stored_limit_bytes=held.most_bytes,
        stored_limit_objects=held.most_objects,
        refused=held.refused,
    )


def _jail_row(
    node: nodes.RayNode,
    worker: state.WorkerState,
    jail: state.JailState,
    groups: cgroup.Cgroups | None,
    now: float,
) -> Row:
    group = _group(worker, jail, groups)
    usage = group.usage() if group is not None else cgroup.Usage()
    cpu = usage.cpu_time_s
    if cpu is not None and math.isfinite(jail.before[0]):
        cpu = max(0.0, cpu - jail.before[0])
    return Row(
        kind="jail",
        id=jail.jail_id,
        node=node.node,
        worker=worker.worker,
        job=jail.job,
        task=jail.task,
        actor=jail.actor,
        name=jail.name,
        profile=jail.profile,
        state=jail.state,
        age_s=_age(now, jail.started),
        cpu_time_s=cpu,
        memory_bytes=usage.memory_bytes,
        memory_limit_bytes=_memory_limit(group),
        pids=usage.pids,
        denials=jail.denials,
        calls=jail.calls,
        pid=worker.pid,
    )


# --- control groups -----------------------------------------------------------------


def _groups(worker: state.WorkerState) -> cgroup.Cgroups | None:
    """Return where a worker makes groups, as directories that we see.

    It may have a cgroup namespace and mounts of its own: its mountinfo says
    which directory of the hierarchy stands where.
    """
    try:
        theirs = parse_mounts(read(f"/proc/{worker.pid}/mountinfo"))
        ours = parse_mounts(read("/proc/self/mountinfo"))
    except OSError:
        return None
    bases = []
    for version, path, controllers in worker.bases:
        directory = _here(version, path, controllers, theirs, ours)
        if directory is not None:
            bases.append(Base(version, directory, frozenset(controllers), False))
    return cgroup.Cgroups(bases, []) if bases else None


def _here(
    version: int,
    path: str,
    controllers: list[str],
    theirs: Sequence[Mount],
    ours: Sequence[Mount],
) -> str | None:
    if ".." in path.split("/"):
        return None
    inside = [m for m in theirs if m.version == version and _covers(m.path, path)]
    if not inside:
        return None
    mount = max(inside, key=lambda m: len(m.path))
    for mine in ours:
        if mine.version != version or not _same_hierarchy(mine, mount):
            continue
        if _covers(mine.root, mount.root):
            below = os.path.relpath(mount.root, mine.root)
            rest = os.path.relpath(path, mount.path)
            return os.path.normpath(os.path.join(mine.path, below, rest))
    return None


def _covers(root: str, path: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _same_hierarchy(one: Mount, other: Mount) -> bool:
    return one.version == 2 or bool(one.controllers & other.controllers)


def _group(
    worker: state.WorkerState, jail: state.JailState, groups: cgroup.Cgroups | None
) -> cgroup.Cgroup | None:
    """Return a jail's group if it is one that its worker can have made."""
    match = _GROUP.fullmatch(jail.group)
    if groups is None or match is None:
        return None
    if (int(match[1]), int(match[2])) != (worker.pid, worker.start_time):
        return None
    return groups.attach(jail.group)


def _memory_limit(group: cgroup.Cgroup | None) -> int | None:
    for base, path in group.dirs if group is not None else ():
        text = read_or_none(f"{path}/{_LIMITS[base.version][0]}")
        if text is not None and text.strip().isdigit():
            limit = int(text)
            return limit if limit < _NO_LIMIT else None
    return None


# --- ending --------------------------------------------------------------------------


def find(identifier: str) -> list[Found]:
    """Return the jails and workers that an id means.

    A jail's id (``PID.NUMBER``); Ray's id of a task, an actor or a worker, or
    its first 8 digits or more; or a worker's pid.
    """
    wanted = identifier.lower()
    there = [each for each in _look() if each.worker is not None]
    exact = [each for each in there if each.row.id == wanted]
    if exact or len(wanted) < 8 or re.fullmatch(r"[0-9a-f]+", wanted) is None:
        return exact
    jails = [each for each in there if each.jail is not None]
    by_task = [
        each
        for each in jails
        if each.row.task.startswith(wanted) or each.row.actor.startswith(wanted)
    ]
    workers = [
        each
        for each in there
        if each.jail is None and each.row.worker.startswith(wanted)
    ]
    return by_task or workers


def end_jail(found: Found, who: str, wait_s: float) -> str:
    """End a jail: its worker does it, or, if that does not react, the kernel.

    Args:
        found: From `find`.
        who: Who asks, and why; the task's owner sees it.
        wait_s: How long the worker may take.

    Returns:
        How it ended: ``"worker"``, ``"kernel"``, or ``""`` if it did not.

    Raises:
        OSError: The worker's file is not ours to write.
    """
    worker, jail = found.worker, found.jail
    if worker is None or jail is None:
        return ""
    state.ask_to_end(worker, jail, who)
    if _gone_within(worker, jail, wait_s):
        return "worker"
    group = _group(worker, jail, _groups(worker))
    if group is None or not group.kill():
        return ""
    return "kernel"


def _gone_within(
    worker: state.WorkerState, jail: state.JailState, wait_s: float
) -> bool:
    until = time.monotonic() + wait_s
    directory = os.path.dirname(worker.path)
    while True:
        now = {each.pid: each for each in state.read(directory)}.get(worker.pid)
        if now is None or all(each.number != jail.number for each in now.jails):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)


def end_worker(found: Found, wait_s: float) -> str:
    """End a worker, and with it its jails: SIGTERM first, then SIGKILL.

    The signal goes to the process that holds the worker's file, by a pidfd that
    was opened before that was looked at: a pid that was given to somebody else
    meanwhile is not hit.

    Returns:
        ``"SIGTERM"``, ``"SIGKILL"``, or ``""`` if it is no worker of ours (any
        more).

    Raises:
        OSError: It is not ours to signal.
    """
    worker = found.worker
    if worker is None:
        return ""
    try:
        fd = os.pidfd_open(worker.pid)
    except ProcessLookupError:
        return ""
    try:
        again = state.read(os.path.dirname(worker.path))
        if not any(
            (each.pid, each.start_time, each.path)
            == (worker.pid, worker.start_time, worker.path)
            for each in again
        ):
            return ""
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(fd, number)
            if select.select([fd], [], [], wait_s)[0]:
                return number.name
        return ""
    finally:
        os.close(fd)
