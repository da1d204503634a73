"""The Ray nodes of this machine, found by their raylets, and their workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

__all__ = ["RayNode", "RayWorker", "nodes", "workers"]

# What else raylet starts, by the titles that Ray gives them.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_ARGUMENTS = ("session_dir", "log_dir", "node_id", "gcs-address", "gcs_address")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """One raylet of this machine.

    Attributes:
        pid: Its process.
        node: Ray's id of the node, hexadecimal.
        session_dir: Where its session is, as we see it.
        log_dir: Where that one's logs are.
        address: Of its GCS.
    """

    pid: int
    node: str
    session_dir: str
    log_dir: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RayWorker:
    """One process that raylet started for tasks.

    Attributes:
        pid: Its process.
        title: What it says it is (``ray::IDLE``): its own word.
        started: Unix time.
        cpu_time_s: User and system time.
        memory_bytes: Resident memory.
        threads: How many it has.
    """

    pid: int
    title: str
    started: float
    cpu_time_s: float
    memory_bytes: int
    threads: int


def nodes() -> list[RayNode]:
    """Return the nodes of this machine, of every user that we can see."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet" or not process.info["cmdline"]:
            continue
        given = dict(_arguments(process.info["cmdline"]))
        session = given.get("session_dir", "")
        log_dir = given.get("log_dir") or os.path.join(session, "logs")
        if not os.path.isabs(log_dir):
            continue
        found.append(
            RayNode(
                pid=process.pid,
                node=given.get("node_id", ""),
                session_dir=_seen(process.pid, session or os.path.dirname(log_dir)),
                log_dir=_seen(process.pid, log_dir),
                address=given.get("gcs-address") or given.get("gcs_address", ""),
            )
        )
    return sorted(found, key=lambda node: node.pid)


def _seen(pid: int, path: str) -> str:
    """Return another process's path as ours: it may have mounts of its own."""
    try:
        same = os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")
    except OSError:
        return path  # not ours to see: the path is the best there is
    return path if same else f"/proc/{pid}/root{path}"


def _arguments(command: list[str]) -> Iterator[tuple[str, str]]:
    for argument in command:
        name, equals, value = argument.lstrip("-").partition("=")
        if equals and name in _ARGUMENTS:
            yield name, value


def workers(node: RayNode) -> list[RayWorker]:
    """Return the workers of a node, in the sandbox or not."""
    found = []
    try:
        children = psutil.Process(node.pid).children()
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            with child.oneshot():
                command = child.cmdline()
                if not _is_worker(command):
                    continue
                times = child.cpu_times()
                found.append(
                    RayWorker(
                        pid=child.pid,
                        title=command[0],
                        started=child.create_time(),
                        cpu_time_s=times.user + times.system,
                        memory_bytes=child.memory_info().rss,
                        threads=child.num_threads(),
                    )
                )
        except psutil.Error:
            continue  # gone, or not ours to see
    return found


def _is_worker(command: list[str]) -> bool:
    if not command or command[0] in _AGENTS:
        return False
    # Ray renames a worker once it has started.
    return command[0].startswith("ray::") or any(
        argument.endswith("default_worker.py") for argument in command
    )
