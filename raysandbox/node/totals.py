"""What all workers and jails of a node may take together, kept by one group.

Raylet and the GCS stay outside of it, so however many tasks are busy, they
have what the policy leaves them. The start command makes the group (`enforce`)
before raylet, and hands its directories to raylet as ``RAYSANDBOX_CGROUP``;
every worker then makes its groups inside. A group whose raylet is gone is
removed by the next start, or by whoever watches raylet (`Group.remove`).
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from raysandbox.errors import UnsupportedError
from raysandbox.kernel import cgroup
from raysandbox.kernel.cgroup_find import ENV, PREFIX, read_or_none
from raysandbox.policy import Percent, Totals

__all__ = ["Amounts", "Group", "amounts", "enforce", "limits", "sweep"]

# Its maker: pid namespace, pid, and a word that nobody had before.
_LEAF = re.compile(rf"{PREFIX}-node-(\d+)-(\d+)-([0-9a-f]{{8}})")


@dataclass(frozen=True, slots=True)
class Amounts:
    """What the machine has, as far as this process may use it.

    Attributes:
        cpu_cores: CPU seconds per second.
        memory_bytes: Memory.
        pids: Processes and threads.
    """

    cpu_cores: float
    memory_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class Group:
    """The group of all workers and jails of a node.

    Attributes:
        group: Its directories and what became of its limits.
        limits: What they are.
    """

    group: cgroup.Cgroup
    limits: cgroup.CgroupLimits

    def variables(self) -> dict[str, str]:
        """Return what raylet, and so each worker, must have in its environment."""
        return {ENV: ":".join(self.group.paths)}

    def remove(self) -> bool:
        """Kill what is inside and remove it; False while something lingers."""
        return self.group.remove()


def enforce(totals: Totals) -> Group:
    """Make the group with the policy's totals; nobody is in it yet.

    Raises:
        UnsupportedError: The host can't enforce one of them, and
            ``totals.required`` is not false. Nothing is left behind.
        SetupError: The kernel refused a value.
    """
    groups = cgroup.discover()
    sweep(groups)
    wanted = limits(totals, amounts(groups))
    if not groups.base_paths:
        missing = groups.missing[0]
        raise UnsupportedError(
            feature="the node's totals",
            need="a control group for all workers",
            have=missing.have,
            remedy=missing.remedy,
        )
    maker = f"{cgroup.pid_namespace()}-{os.getpid()}"
    leaf = f"{PREFIX}-node-{maker}-{secrets.token_hex(4)}"
    made = groups.create_parent(leaf, wanted, required=totals.required)
    return Group(made, wanted)


def limits(totals: Totals, have: Amounts) -> cgroup.CgroupLimits:
    """Return the policy's totals in numbers for a machine that has ``have``."""

    def number(value: Percent | float, whole: float) -> float:
        return value.of(whole) if isinstance(value, Percent) else min(value, whole)

    return cgroup.CgroupLimits(
        cpu_cores=max(0.1, round(number(totals.cpu_cores, have.cpu_cores), 3)),
        cpu_weight=totals.cpu_weight,
        memory_bytes=int(number(totals.memory_bytes, have.memory_bytes)),
        pids=max(64, int(number(totals.pids, have.pids))),
    )


def amounts(groups: cgroup.Cgroups) -> Amounts:
    """Return what this process may use: the machine's, or its container's."""
    cores: float = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = [
        int(text)
        for name in ("pid_max", "threads-max")
        if (text := (read_or_none(f"/proc/sys/kernel/{name}") or "").strip()).isdigit()
    ]
    pids = min(most, default=32768)
    for path in groups.base_paths:
        for at in _upwards(path):
            memory = min(memory, _number(f"{at}/memory.max"))
            memory = min(memory, _number(f"{at}/memory.limit_in_bytes"))
            pids = min(pids, _number(f"{at}/pids.max"))
            cores = min(cores, _quota(at))
    return Amounts(cores, int(memory), int(pids))


def _upwards(path: str) -> Iterator[str]:
    while path.startswith("/sys/") or os.path.exists(f"{path}/cgroup.procs"):
        yield path
        path = os.path.dirname(path)


def _number(path: str) -> int:
    """Return a limit's value; "max" and files that are not there are no limit."""
    text = (read_or_none(path) or "").strip()
    return int(text) if text.isdigit() else 1 << 62


def _quota(group: str) -> float:
    quota, _, period = (read_or_none(f"{group}/cpu.max") or "max").partition(" ")
    if not quota.isdigit():
        quota = (read_or_none(f"{group}/cpu.cfs_quota_us") or "").strip()
        period = read_or_none(f"{group}/cpu.cfs_period_us") or ""
    if quota.isdigit() and period.strip().isdigit() and int(period):
        return int(quota) / int(period)
    return math.inf


def sweep(groups: cgroup.Cgroups) -> list[str]:
    """Remove the groups of nodes that are gone, with what is left inside.

    A node's group is in use while its maker lives (it may be about to start
    raylet) or a raylet has it in its environment. Those made in another pid
    namespace are left alone: neither can be seen from here.

    Returns:
        The names of those that were removed.
    """
    here = cgroup.pid_namespace()
    leaves = {
        name: int(match[2])
        for base in groups.base_paths
        for name in _names(base)
        if (match := _LEAF.fullmatch(name)) and int(match[1]) == here
    }
    if not leaves:
        return []
    used = _named_by_raylets()
    gone: list[str] = []
    if used is None:
        return gone
    for leaf, maker in leaves.items():
        group = groups.attach(leaf)
        if group is None or os.path.exists(f"/proc/{maker}"):
            continue
        if any(path in used for path in group.paths):
            continue
        if group.remove():
            gone.append(leaf)
    return gone


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _named_by_raylets() -> set[str] | None:
    """Return every directory that some raylet of this machine was given.

    None if one of them keeps it from us.
    """
    found: set[str] = set()
    prefix = f"{ENV}=".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if (read_or_none(f"/proc/{name}/comm") or "").strip() != "raylet":
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                pairs = file.read().split(b"\0")
        except PermissionError:
            return None
        except OSError:
            continue  # gone
        for pair in pairs:
            if pair.startswith(prefix):
                found |= set(os.fsdecode(pair[len(prefix) :]).split(":"))
    return found
