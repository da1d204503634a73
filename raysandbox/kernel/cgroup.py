"""Control groups, version 1 and version 2, behind one interface.

Theory of operation::

    discover()          where may this process make groups, per controller?
    Cgroups.create()    one directory per hierarchy, limits written
    Cgroup.procs_fds()  the jail's first act is to write b"0" to each of these
    Cgroup.usage()      what it used; oom kills; refused forks
    Cgroup.kill()       everything inside is gone when it returns True
    Cgroup.remove()     the directories too
    Cgroups.sweep()     groups whose owner died without removing them
    Cgroups.close()     the base directory itself, if nobody else uses it

Every controller is taken from version 2 where the host has it there, else from
version 1. Nothing outside directories that are named ``raysandbox…`` is ever
written, except ``cgroup.subtree_control`` of the parent in version 2, without
which no child has a controller.

Two kernel facts shape the hot path:

* Writing to ``cgroup.procs`` takes ``cgroup_threadgroup_rwsem`` for writing and
  with it waits for an RCU grace period: 10 to 19 ms measured on 6.18. A single
  thread that moves *itself* ("0" into version 1's ``tasks``) skips that lock:
  0.02 ms. So version 1 hands out ``tasks``, which is right only for a
  process that has one thread (a jail right after fork has). Version 2 has no
  such way between domain groups; there, clone straight into ``Cgroup.dir_fd()``
  (``CLONE_INTO_CGROUP``).
* The kernel goes on emptying a group for a moment after its last process died;
  rmdir says EBUSY until then.

Version 1's reading side (usage) goes through cgroupspy. What that can't do, and
is done by hand here: pids and freezer controllers (it has none), controllers
mounted together (``cpu,cpuacct``: it takes the directory's name for the
controller's), ``blkio.throttle.write_*`` (its file name ends in a blank), and
anything of version 2. Its write path costs about three times a plain write.

See cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from raysandbox.errors import SetupError, UnsupportedError
from raysandbox.kernel.cgroup_find import (
    ENV,
    PREFIX,
    Base,
    Finder,
    Missing,
    make_v1_base,
    make_v2_base,
    parse_mounts,
    read,
    read_or_none,
    rmdir_quietly,
    write,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Cgroup",
    "CgroupLimits",
    "Cgroups",
    "Missing",
    "Status",
    "Usage",
    "discover",
    "pid_namespace",
]

CPU_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1000
# Tries to make a group while others remove what they share with it.
_BASE_ATTEMPTS = 100

# Which controller a limit needs, by version.
_CONTROLLER = {
    "memory_bytes": ("memory", "memory"),
    "swap_bytes": ("memory", "memory"),
    "cpu_cores": ("cpu", "cpu"),
    "cpu_weight": ("cpu", "cpu"),
    "pids": ("pids", "pids"),
    "io_read_bytes_per_s": ("blkio", "io"),
    "io_write_bytes_per_s": ("blkio", "io"),
}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_GROUP = re.compile(r"raysandbox-(\d+)-(\d+)-(\d+)-([A-Za-z0-9_][A-Za-z0-9_.-]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What one group may use; None is no limit.

    Attributes:
        memory_bytes: Hard ceiling (``memory.max``).
        swap_bytes: Swap on top of memory (``memory.swap.max``). Version 1
            limits memory and swap together, so it needs ``memory_bytes``.
        cpu_cores: CPU seconds per second, over periods of 100 ms; at least
            0.01, which is the kernel's smallest quota.
        cpu_weight: Share under contention, 1 to 10000, 100 is the default.
        pids: Processes and threads at once.
        io_read_bytes_per_s: For each disk of the host.
        io_write_bytes_per_s: For each disk of the host.
    """

    memory_bytes: int | None = None
    swap_bytes: int | None = None
    cpu_cores: float | None = None
    cpu_weight: int | None = None
    pids: int | None = None
    io_read_bytes_per_s: int | None = None
    io_write_bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        lowest = {
            "memory_bytes": 4096,
            "swap_bytes": 0,
            "cpu_cores": 0.01,
            "cpu_weight": 1,
            "pids": 1,
            "io_read_bytes_per_s": 1,
            "io_write_bytes_per_s": 1,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} = {value!r}: must be at least {least}")
        if self.cpu_weight is not None and self.cpu_weight > 10_000:
            raise ValueError(f"cpu_weight = {self.cpu_weight!r}: must be at most 10000")

    def asked(self) -> tuple[str, ...]:
        """Return the names of the limits that are set."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)


class Status(NamedTuple):
    """What became of one limit.

    Attributes:
        state: ``"ENFORCED"``, ``"DEGRADED"`` (in force, but weaker than its
            name says) or ``"OFF"``.
        reason: Why it is not plainly enforced, or ``""``.
        remedy: What would change that, or ``""``.
    """

    state: Literal["ENFORCED", "DEGRADED", "OFF"]
    reason: str = ""
    remedy: str = ""


_ENFORCED = Status("ENFORCED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a group used; None where the host has no file that says it.

    Attributes:
        memory_peak_bytes: Highest memory of the group's life.
        memory_bytes: Memory now.
        cpu_time_s: User and system time of every process it ever had.
        oom_kills: Processes killed for memory.
        pids_denied: Forks refused by the limit.
        pids: Processes and threads now.
    """

    memory_peak_bytes: int | None = None
    memory_bytes: int | None = None
    cpu_time_s: float | None = None
    oom_kills: int | None = None
    pids_denied: int | None = None
    pids: int | None = None


@dataclass(slots=True)
class _Write:
    """One value to write into a new group."""

    base: Base
    file: str
    value: bytes
    limit: str


@dataclass(slots=True)
class _Plan:
    """What creating a group with given limits comes to."""

    bases: list[Base]
    writes: list[_Write]
    report: dict[str, Status]


def _int_or_none(path: str) -> int | None:
    text = read_or_none(path)
    if text is None or not text.strip().isdigit():
        return None
    return int(text)


def _flat_or_none(path: str, key: str) -> int | None:
    """Read one key of a flat keyed file (``memory.events``)."""
    for line in (read_or_none(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return None


# --- who made a group -------------------------------------------------------


def _start_time(pid: int) -> int | None:
    """Return field 22 of ``/proc/PID/stat`` (clock ticks since boot).

    With it a pid that was given to another process is not taken for its owner.
    """
    text = read_or_none(f"/proc/{pid}/stat")
    if text is None:
        return None
    # The command name (field 2) may hold blanks and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def pid_namespace() -> int:
    """Return the inode of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def discover(environ: Mapping[str, str] | None = None) -> Cgroups:
    """Find, and make, the directories in which groups can be made.

    In this order: the directories that ``RAYSANDBOX_CGROUP`` names (one per
    hierarchy, separated by ``:``); as root ``<mount>/raysandbox`` in version 2
    and ``<own group>/raysandbox`` in version 1; as another user the nearest
    writable group from our own upwards in version 2, and ``<own
    group>/raysandbox`` in version 1 if it is or can be made ours.

    Args:
        environ: Read instead of ``os.environ``.

    Returns:
        What was found; ``.missing`` says which controllers are not there and
        how to get them. Nothing is raised for those: whether they are needed
        is the profile's business (see `Cgroups.require`).

    Raises:
        UnsupportedError: ``RAYSANDBOX_CGROUP`` names something that is no
            directory of a mounted cgroup hierarchy.
    """
    finder = Finder((os.environ if environ is None else environ).get(ENV))
    finder.run()
    return Cgroups(finder.bases, finder.missing)


# --- what groups there are --------------------------------------------------


def _disks() -> list[str]:
    """Return ``major:minor`` of every disk that I/O can be throttled on."""
    found = []
    try:
        names = sorted(os.listdir("/sys/block"))
    except OSError:
        return []
    for name in names:
        if name.startswith(("loop", "ram", "zram", "fd", "sr")):
            continue
        if _int_or_none(f"/sys/block/{name}/size"):
            dev = read_or_none(f"/sys/block/{name}/dev")
            if dev is not None:
                found.append(dev.strip())
    return found


class Cgroups:
    """The places in which this process makes groups.

    Attributes:
        missing: Controllers that are out of reach, each with its remedy.
    """

    def __init__(self, bases: list[Base], missing: list[Missing]) -> None:
        self._bases = bases
        self.missing = tuple(missing)
        self._plans: dict[CgroupLimits, _Plan] = {}
        self._by_controller: dict[str, Base] = {}
        for base in bases:
            for controller in base.controllers:
                self._by_controller.setdefault(controller, base)
        pid = os.getpid()
        self._owner = f"{pid_namespace()}-{pid}-{_start_time(pid)}"
        self._leftover: list[Cgroup] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def base_paths(self) -> tuple[str, ...]:
        """The directories that hold the groups, one per hierarchy."""
        return tuple(b.path for b in self._bases)

    def described(self) -> list[list[Any]]:
        """Return version, directory and controllers of each base, for JSON."""
        return [[b.version, b.path, sorted(b.controllers)] for b in self._bases]

    @property
    def owned(self) -> tuple[tuple[str, str], ...]:
        """Directory and name prefix of every group that this process makes.

        For a monitor that outlives us and removes what we could not.
        """
        return tuple((b.path, f"{PREFIX}-{self._owner}-") for b in self._bases)

    @property
    def versions(self) -> dict[str, int]:
        """Controller (version 2's names) to the version that provides it."""
        return {
            "io" if c == "blkio" else c: b.version
            for c, b in self._by_controller.items()
            if c not in ("cpuacct", "freezer")
        }

    def places(self) -> list[tuple[int, str, str]]:
        """Return version, base and mount point of each hierarchy in use.

        For a launcher that makes a group itself, and shows it to what it
        starts as the root of the hierarchy.
        """
        mounts = [m.path for m in parse_mounts(read("/proc/self/mountinfo"))]
        return [
            (
                base.version,
                base.path,
                max((m for m in mounts if base.path.startswith(f"{m}/")), key=len),
            )
            for base in self._bases
        ]

    def writes(
        self, limits: CgroupLimits
    ) -> tuple[dict[str, list[tuple[str, bytes]]], dict[str, str]]:
        """Return what to write into the files of a new group, by base.

        Also, by limit, what is left out and why: version 1 refuses a CPU quota
        above that of a group around the new one, whose lower one then holds.
        """
        found: dict[str, list[tuple[str, bytes]]] = {}
        lower: dict[str, str] = {}
        for step in self._plan(limits).writes:
            if step.file == "cpu.cfs_quota_us":
                why = _lower_parent_quota(step.base.path, int(step.value))
                if why is not None:
                    lower[step.limit] = why
                    continue
            found.setdefault(step.base.path, []).append((step.file, step.value))
        return found, lower

    def _base_for(self, limit: str) -> Base | None:
        v1, v2 = _CONTROLLER[limit]
        base = self._by_controller.get(v2)
        if base is not None and (base.version == 2 or v1 == v2):
            return base
        return self._by_controller.get(v1)

    def describe(self, group: Cgroup) -> dict[str, Any]:
        """Return plain data from which `adopt` makes the group again elsewhere."""
        return {
            "name": group.name,
            "bases": [
                [base.version, base.path, sorted(base.controllers), base.owned]
                for base in self._bases
            ],
            "dirs": [[self._bases.index(base), path] for base, path in group.dirs],
        }

    @classmethod
    def adopt(cls, description: Mapping[str, Any]) -> Cgroup:
        """Take over a group that another process made, to end and remove it."""
        bases = [
            Base(version, path, frozenset(controllers), owned)
            for version, path, controllers, owned in description["bases"]
        ]
        dirs = [(bases[index], path) for index, path in description["dirs"]]
        return Cgroup(cls(bases, []), description["name"], dirs, {})

    def support(self, limits: CgroupLimits) -> dict[str, Status]:
        """Say what would become of each limit, without making a group.

        What only the attempt can show (a file that this kernel lacks) is in
        `Cgroup.report`.
        """
        return dict(self._plan(limits).report)

    def require(self, limits: CgroupLimits, *, profile: str = "") -> None:
        """Refuse if a limit that is set can't be enforced at all.

        Raises:
            UnsupportedError: Names the first such limit and the remedy.
        """
        _refuse(limits, self._plan(limits).report, profile)

    def _plan(self, limits: CgroupLimits) -> _Plan:
        plan = self._plans.get(limits)
        if plan is None:
            if len(self._plans) > 256:
                self._plans.clear()
            plan = self._plans[limits] = self._make_plan(limits)
        return plan

    def _off(self, limit: str) -> Status:
        name = _CONTROLLER[limit][1]
        for missing in self.missing:
            if missing.controller == name:
                return Status("OFF", missing.have, missing.remedy)
        return Status("OFF", f"the host has no {name} controller")

    def _make_plan(self, limits: CgroupLimits) -> _Plan:
        report: dict[str, Status] = {}
        writes: list[_Write] = []
        bases: list[Base] = []
        base: Base | None

        def use(base: Base) -> None:
            if base not in bases:
                bases.append(base)

        # For their counters, limits or not; and for what a base that was named to us
        # may limit itself.
        for controller in ("memory", "pids", "cpuacct", "cpu"):
            named = self._by_controller.get(controller)
            if named is not None and (controller != "cpu" or not named.owned):
                use(named)
        for base in self._bases:
            if base.version == 2:
                use(base)
        for limit in limits.asked():
            base = self._base_for(limit)
            if base is None:
                report[limit] = self._off(limit)
                continue
            made, status = _writes(limit, limits, base)
            report[limit] = status
            if made:
                use(base)
                writes += made
        if limits.memory_bytes is not None:
            base = self._base_for("memory_bytes")
            if base is not None and base.version == 2:
                writes.append(_Write(base, "memory.oom.group", b"1", "oom_group"))
                report["oom_group"] = _ENFORCED
            elif base is not None:
                report["oom_group"] = Status(
                    "OFF",
                    "cgroup version 1 kills one process, not the group; whoever owns "
                    "the jail must end it when oom_kills rises",
                )
        frozen = self._by_controller.get("freezer")
        if frozen is not None and "pids" not in self._by_controller:
            # Without pids.max = 0, freezing is what stops a fork race in kill().
            use(frozen)
        return _Plan(bases, writes, report)

    def create(
        self, name: str, limits: CgroupLimits, *, required: bool = False
    ) -> Cgroup:
        """Make a group with these limits in every hierarchy that it needs.

        Args:
            name: Letters, digits, ``_``, ``.`` and ``-``, at most 64; unique
                among the groups of this process.
            limits: What it may use.
            required: Refuse if a limit that is set turns out not to be there.

        Raises:
            UnsupportedError: Only with ``required``; nothing is left behind.
            SetupError: The kernel refused a directory or a value
                (``cgroup_create``, ``cgroup_limit``); nothing is left behind.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"cgroup name {name!r}: not of the form {_NAME.pattern}")
        plan = self._plan(limits)
        if required:
            _refuse(limits, plan.report, "")
        return self._create(
            f"{PREFIX}-{self._owner}-{name}", name, limits, plan, required
        )

    def create_parent(
        self, leaf: str, limits: CgroupLimits, *, required: bool = False
    ) -> Cgroup:
        """Make a group in which other processes make theirs.

        They find it by ``RAYSANDBOX_CGROUP``, set to its ``paths`` with ``:``
        between. It is in every hierarchy, and `sweep` leaves it alone: it
        outlives its maker until somebody removes it.

        Args:
            leaf: Its directories' name.
            limits: What all groups in it may use together.
            required: As in `create`.

        Raises:
            UnsupportedError: As in `create`, or a controller can't be passed on
                to the groups in it; nothing is left behind.
            SetupError: As in `create`.
        """
        if not _NAME.fullmatch(leaf):
            raise ValueError(f"cgroup name {leaf!r}: not of the form {_NAME.pattern}")
        plan = self._plan(limits)
        if required:
            _refuse(limits, plan.report, "")
        # The kernel would kill all of them when they run out of memory together.
        writes = [step for step in plan.writes if step.limit != "oom_group"]
        report = {k: v for k, v in plan.report.items() if k != "oom_group"}
        whole = _Plan(self._bases, writes, report)
        group = self._create(leaf, leaf, limits, whole, required)
        for base, path in group.dirs:
            if base.version == 2:
                got, problem = make_v2_base(path, base.controllers, False)
                if got != base.controllers:
                    group.remove()
                    raise UnsupportedError(
                        feature="cgroup",
                        need=f"{', '.join(sorted(base.controllers))} in {path}",
                        have=problem,
                        remedy=f"leave no process in {base.path} itself",
                    )
        return group

    def attach(self, leaf: str) -> Cgroup | None:
        """Return a group that somebody else made in these bases; None if gone."""
        if not _NAME.fullmatch(leaf):
            return None
        dirs = [(base, f"{base.path}/{leaf}") for base in self._bases]
        there = [(base, path) for base, path in dirs if os.path.isdir(path)]
        return Cgroup(self, leaf, there, {}) if there else None

    def _create(
        self,
        leaf: str,
        name: str,
        limits: CgroupLimits,
        plan: _Plan,
        required: bool,
    ) -> Cgroup:
        made: list[tuple[Base, str]] = []
        report = dict(plan.report)
        try:
            for base in plan.bases:
                path = f"{base.path}/{leaf}"
                self._mkdir(base, path)
                made.append((base, path))
            for step in plan.writes:
                self._apply(step, f"{step.base.path}/{leaf}", report)
            if required:
                _refuse(limits, report, "")
        except BaseException:
            for _, path in made:
                rmdir_quietly(path)
            raise
        return Cgroup(self, name, made, report)

    def _mkdir(self, base: Base, path: str) -> None:
        for attempt in range(_BASE_ATTEMPTS):
            try:
                os.mkdir(path, 0o755)
                return
            except OSError as error:
                # Others close at the same time, and take an empty shared base away.
                gone = base.owned and error.errno == errno.ENOENT
                if not gone or attempt == _BASE_ATTEMPTS - 1:
                    raise _setup_error("cgroup_create", error, path) from None
            if base.version == 2:
                make_v2_base(base.path, base.controllers, True)
            else:
                make_v1_base(base.path)

    def _apply(self, step: _Write, path: str, report: dict[str, Status]) -> None:
        try:
            write(f"{path}/{step.file}", step.value)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
                report[step.limit] = _absent(step)
            elif step.file == "cpu.cfs_quota_us" and error.errno == errno.EINVAL:
                # A child's share may not exceed its parent's; then the parent's
                # lower limit is what holds.
                # Behind a node's wall that parent is out of sight, and there is no
                # other reason: a quota of 1 ms and more is valid.
                lower = _lower_parent_quota(step.base.path, int(step.value))
                if lower is None and int(step.value) < _LEAST_QUOTA_US:
                    raise _setup_error(
                        "cgroup_limit", error, f"{path}/{step.file} = {step.value!r}"
                    ) from None
                report[step.limit] = Status(
                    "DEGRADED",
                    lower or "a group around this one allows less, and that holds",
                )
            else:
                raise _setup_error(
                    "cgroup_limit", error, f"{path}/{step.file} = {step.value!r}"
                ) from None

    def sweep(self) -> list[str]:
        """Remove the groups of owners that are gone.

        A group's name says who made it: pid namespace, pid, and that pid's
        start time. Processes found in such a group are killed: their owner is
        not there to do it. Groups made in another pid namespace are left
        alone, because whether that owner lives can't be seen from here.

        Returns:
            The paths of the groups that were removed.
        """
        here = pid_namespace()
        alive: dict[tuple[int, int], bool] = {}
        stale: dict[str, list[tuple[Base, str]]] = {}
        for base in self._bases:
            try:
                names = os.listdir(base.path)
            except OSError:
                continue
            for entry in names:
                match = _GROUP.fullmatch(entry)
                if match is None or int(match[1]) != here:
                    continue
                owner = (int(match[2]), int(match[3]))
                if owner not in alive:
                    alive[owner] = _start_time(owner[0]) == owner[1]
                if not alive[owner]:
                    stale.setdefault(entry, []).append((base, f"{base.path}/{entry}"))
        gone = []
        for entry, dirs in stale.items():
            group = Cgroup(self, entry, dirs, {})
            if group.remove():
                gone += [path for _, path in dirs]
        leftover, self._leftover = self._leftover, []
        for group in leftover:
            if group.remove(timeout_s=0.0):
                gone += [path for _, path in group.dirs]
        return gone

    def close(self) -> None:
        """Remove the base directories that are ours and empty by now."""
        for base in self._bases:
            if base.owned:
                rmdir_quietly(base.path)


def _refuse(limits: CgroupLimits, report: Mapping[str, Status], profile: str) -> None:
    for limit in limits.asked():
        status = report[limit]
        if status.state == "OFF":
            raise UnsupportedError(
                feature=f"cgroup limit {limit}",
                need=f"{limit} = {getattr(limits, limit)}",
                have=status.reason,
                remedy=status.remedy or f"leave {limit} out of the profile",
                profile=profile,
            )


def _setup_error(step: str, error: OSError, detail: str) -> SetupError:
    return SetupError(step=step, errno=error.errno or 0, detail=detail)


def _absent(step: _Write) -> Status:
    if step.limit == "swap_bytes":
        swaps = (read_or_none("/proc/swaps") or "").splitlines()[1:]
        remedy = "boot with swapaccount=1, or switch swap off"
        if not swaps:
            return Status(
                "DEGRADED", "no swap accounting; the host has no swap now", remedy
            )
        return Status("OFF", f"the kernel has no {step.file}", remedy)
    return Status("OFF", f"the kernel has no {step.file}")


def _lower_parent_quota(base: str, quota_us: int) -> str | None:
    """Find an ancestor whose own CPU quota is lower than the one asked for."""
    at = base
    while os.path.exists(f"{at}/cpu.cfs_quota_us"):
        quota = _int_or_none(f"{at}/cpu.cfs_quota_us")  # "-1" reads as None
        period = _int_or_none(f"{at}/cpu.cfs_period_us")
        if quota and period and quota / period < quota_us / CPU_PERIOD_US:
            return f"{at} allows only {quota / period:g} cores, and that holds"
        at = os.path.dirname(at)
    return None


def _writes(
    limit: str, limits: CgroupLimits, base: Base
) -> tuple[list[_Write], Status]:
    """Return what to write for one limit, and what it then amounts to."""
    value = getattr(limits, limit)
    v2 = base.version == 2

    def one(file: str, text: object) -> list[_Write]:
        return [_Write(base, file, str(text).encode(), limit)]

    if limit == "memory_bytes":
        return one("memory.max" if v2 else "memory.limit_in_bytes", value), _ENFORCED
    if limit == "swap_bytes":
        if v2:
            return one("memory.swap.max", value), _ENFORCED
        if limits.memory_bytes is None:
            return [], Status(
                "OFF",
                "cgroup version 1 limits memory and swap only together",
                "set limits.memory too",
            )
        # Always after memory.limit_in_bytes: it may never be below that.
        total = limits.memory_bytes + value
        return one("memory.memsw.limit_in_bytes", total), _ENFORCED
    if limit == "cpu_cores":
        quota = round(value * CPU_PERIOD_US)
        if v2:
            return one("cpu.max", f"{quota} {CPU_PERIOD_US}"), _ENFORCED
        # The period of a new group is 100 ms already.
        return one("cpu.cfs_quota_us", quota), _ENFORCED
    if limit == "cpu_weight":
        if v2:
            return one("cpu.weight", value), _ENFORCED
        # Weight 100 and shares 1024 are the defaults: the same share.
        return one("cpu.shares", max(2, value * 1024 // 100)), _ENFORCED
    if limit == "pids":
        return one("pids.max", value), _ENFORCED
    disks = _disks()
    if not disks:
        return [], Status("OFF", "the host has no disk that can be throttled")
    reading = limit == "io_read_bytes_per_s"
    made = []
    for disk in disks:
        if v2:
            made += one("io.max", f"{disk} {'rbps' if reading else 'wbps'}={value}")
        else:
            file = f"blkio.throttle.{'read' if reading else 'write'}_bps_device"
            made += one(file, f"{disk} {value}")
    if not v2 and not reading:
        return made, Status(
            "DEGRADED", "cgroup version 1 does not throttle buffered writes"
        )
    return made, _ENFORCED


# --- one group --------------------------------------------------------------


@dataclass(slots=True)
class Cgroup:
    """One group: a directory in each hierarchy that its limits need.

    Attributes:
        name: The name it was made under.
        dirs: Base and directory, per hierarchy.
        report: Limit to what became of it. Besides the limits that were asked
            for it may hold ``oom_group``: whether the kernel kills the whole
            group, not one process, when memory runs out.
    """

    owner: Cgroups
    name: str
    dirs: list[tuple[Base, str]]
    report: dict[str, Status]
    _nodes: dict[str, Any] = field(default_factory=dict)
    _before: Usage = field(default_factory=Usage)
    # As the files said last, nothing taken off.
    _read: Usage = field(default_factory=Usage)

    @property
    def leaf(self) -> str:
        """The name of its directories."""
        return os.path.basename(self.dirs[0][1]) if self.dirs else ""

    @property
    def before(self) -> Usage:
        """What had been used before the last `reset`, where counters go on."""
        return self._before

    @property
    def paths(self) -> tuple[str, ...]:
        """The group's directories."""
        return tuple(path for _, path in self.dirs)

    @property
    def supported(self) -> tuple[str, ...]:
        """Names of the limits that hold as asked."""
        return self._in("ENFORCED")

    @property
    def degraded(self) -> dict[str, str]:
        """Limits in force but weaker than asked, with the reason."""
        return {n: self.report[n].reason for n in self._in("DEGRADED")}

    @property
    def absent(self) -> dict[str, str]:
        """Limits that do not hold at all, with the reason."""
        return {n: self.report[n].reason for n in self._in("OFF")}

    def _in(self, state: str) -> tuple[str, ...]:
        return tuple(n for n, s in self.report.items() if s.state == state)

    def procs_fds(self, *, born_inside: bool = False) -> list[int]:
        """Open the files through which a process enters; the caller closes them.

        Whoever writes ``b"0"`` to each is in the group with all its limits.
        Version 1: moves the *calling thread only* (see the module's docstring),
        so write from a process with one thread, before it starts more.

        Args:
            born_inside: The process is cloned into `dir_fd`: leave version 2
                out, where entering again would only cost its lock.

        Raises:
            SetupError: The group is gone or not ours (``cgroup_open``).
        """
        fds: list[int] = []
        try:
            for base, path in self.dirs:
                if born_inside and base.version == 2:
                    continue
                file = "tasks" if base.version == 1 else "cgroup.procs"
                fds.append(os.open(f"{path}/{file}", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise _setup_error("cgroup_open", error, path) from None
        return fds

    def move(self, pid: int) -> None:
        """Bring a running process in with all its threads, at 10 to 20 ms each.

        What it has allocated before stays charged to where it was.

        Raises:
            SetupError: The kernel refused (``cgroup_move``); it may be in some
                hierarchies and not in others then.
        """
        for _, path in self.dirs:
            try:
                write(f"{path}/cgroup.procs", str(pid).encode())
            except OSError as error:
                raise _setup_error("cgroup_move", error, path) from None

    def dir_fd(self) -> int | None:
        """Open the version 2 directory for ``CLONE_INTO_CGROUP``.

        None where the group has none. A child cloned into it needs no entry by
        ``procs_fds`` in that hierarchy, but does in any version 1 hierarchy.
        """
        for base, path in self.dirs:
            if base.version == 2:
                try:
                    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise _setup_error("cgroup_open", error, path) from None
        return None

    def _path(self, controller: str) -> tuple[int, str]:
        for base, path in self.dirs:
            if controller in base.controllers:
                return base.version, path
        return 0, ""

    def _v1(self, controller: str, path: str) -> Any:
        """Return cgroupspy's controller for one of our version 1 directories."""
        if controller not in self._nodes:
            from cgroupspy import controllers
            from cgroupspy.nodes import Node

            kind = {
                "memory": controllers.MemoryController,
                "cpuacct": controllers.CpuAcctController,
            }[controller]
            # Built by hand: a Node takes its controller from the directory's
            # name, which is wrong for controllers that are mounted together.
            self._nodes[controller] = kind(Node(path))
        return self._nodes[controller]

    def reset(self) -> bool:
        """Start counting anew, for another task; False if the host can't.

        The group must be empty. Only version 1 can do it: what can't be set to
        zero there only grows, and is taken off by `usage`.
        """
        if any(base.version != 1 for base, _ in self.dirs):
            return False
        version, path = self._path("memory")
        if version and not _try_write(f"{path}/memory.max_usage_in_bytes", b"0"):
            return False
        version, path = self._path("pids")
        if version and self._read.pids == 0:
            # Read since the last task left: all is counted, and once is enough.
            self._before, self._read = self._read, Usage()
            return _int_or_none(f"{path}/pids.current") == 0
        self.usage()
        self._before, self._read = self._read, Usage()
        return not self._before.pids

    def usage(self) -> Usage:
        """Read what the group has used so far, or since `reset`."""
        peak = now = kills = denied = pids = None
        cpu_time_s = None
        version, path = self._path("memory")
        if version == 2:
            peak = _int_or_none(f"{path}/memory.peak")  # since 5.19
            now = _int_or_none(f"{path}/memory.current")
            kills = _flat_or_none(f"{path}/memory.events", "oom_kill")
        elif version == 1:
            memory = self._v1("memory", path)
            peak = _value(lambda: memory.max_usage_in_bytes)
            now = _value(lambda: memory.usage_in_bytes)
            kills = _value(lambda: memory.oom_control["oom_kill"])  # since 4.13
        version, path = self._path("pids")
        if version:
            denied = _flat_or_none(f"{path}/pids.events", "max")
            pids = _int_or_none(f"{path}/pids.current")
        version, path = self._path("cpuacct")
        if version == 1:
            cpuacct = self._v1("cpuacct", path)
            usage_ns = _value(lambda: cpuacct.usage)
            cpu_time_s = None if usage_ns is None else usage_ns / 1e9
        else:
            for base, at in self.dirs:
                if base.version == 2:
                    # cpu.stat is there in every group, cpu controller or not.
                    usage_us = _flat_or_none(f"{at}/cpu.stat", "usage_usec")
                    cpu_time_s = None if usage_us is None else usage_us / 1e6
        before, self._read = (
            self._before,
            Usage(
                memory_peak_bytes=peak,
                memory_bytes=now,
                cpu_time_s=cpu_time_s,
                oom_kills=kills,
                pids_denied=denied,
                pids=pids,
            ),
        )
        return replace(
            self._read,
            cpu_time_s=_less(cpu_time_s, before.cpu_time_s),
            oom_kills=_less(kills, before.oom_kills),
            pids_denied=_less(denied, before.pids_denied),
        )

    def pids(self) -> set[int]:
        """Return the processes in the group, as our pid namespace numbers them."""
        found: set[int] = set()
        for _, path in self.dirs:
            for at in _tree(path):
                text = read_or_none(f"{at}/cgroup.procs") or ""
                found.update(int(n) for n in text.split())
        return found

    def kill(self, timeout_s: float = 5.0) -> bool:
        """Kill everything inside and wait until it is gone.

        Version 2 has ``cgroup.kill`` (since 5.14). Elsewhere new forks are
        stopped first (``pids.max`` = 0, else the freezer), then every process
        is signalled through a pidfd that was checked to belong to the group,
        so that a reused pid hits nobody.

        Returns:
            True when the group is empty; False when the time ran out (a
            process in uninterruptible sleep, or one that is not visible from
            our pid namespace).
        """
        deadline = time.monotonic() + timeout_s
        if not self.pids():
            return True
        frozen = None
        by_kernel = False
        for base, path in self.dirs:
            if base.version == 2:
                by_kernel |= _try_write(f"{path}/cgroup.kill", b"1")
            if "pids" in base.controllers and not by_kernel:
                for at in _tree(path):
                    _try_write(f"{at}/pids.max", b"0")
            if (
                base.version == 1
                and "freezer" in base.controllers
                and _try_write(f"{path}/freezer.state", b"FROZEN")
            ):
                frozen = f"{path}/freezer.state"
        while True:
            handles = self._signal_all()
            if frozen is not None:
                # Frozen processes die only once they may run again.
                _try_write(frozen, b"THAWED")
            _wait_exits(handles, deadline)
            if not self.pids():
                return True
            if time.monotonic() >= deadline:
                return False
            if not handles:
                time.sleep(0.0005)

    def _signal_all(self) -> list[int]:
        """SIGKILL every process inside; return pidfds to wait on."""
        handles: dict[int, int] = {}
        for pid in self.pids():
            try:
                # 0 stands for a process that our pid namespace does not show.
                if pid > 0:
                    handles[pid] = os.pidfd_open(pid)
            except OSError:
                pass  # gone since
        still = self.pids()
        for pid, fd in handles.items():
            # Listed again after the pidfd was opened: the pidfd is either that
            # process or one that has died, never a stranger with its number.
            if pid in still:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                except OSError:
                    pass
        return list(handles.values())

    def remove(self, timeout_s: float = 1.0) -> bool:
        """Kill what is left and remove the group's directories.

        Tries again, for at most ``timeout_s``, while the kernel is still
        emptying the group. Calling it again is harmless.

        Returns:
            True when every directory is gone. False when one is still busy;
            `Cgroups.sweep` will try again.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0001
        left = [path for _, path in self.dirs]
        while True:
            left = [path for path in left if not _rmdir(path)]
            if not left:
                return True
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                self.owner._leftover.append(self)
                return False
            self.kill(timeout_s=remaining_s)
            for path in left:
                for at in reversed(list(_tree(path))[1:]):
                    _rmdir(at)
            time.sleep(min(pause_s, remaining_s))
            pause_s = min(pause_s * 2, 0.02)


_Number = TypeVar("_Number", int, float)


def _less(now: _Number | None, before: _Number | None) -> _Number | None:
    return now if now is None or before is None else now - before


def _value(read: Callable[[], Any]) -> int | None:
    try:
        value = read()
    except (OSError, KeyError, ValueError):
        return None
    return None if value is None else int(value)


def _try_write(path: str, value: bytes) -> bool:
    try:
        write(path, value)
    except OSError:
        return False
    return True


def _rmdir(path: str) -> bool:
    """Remove one group; False while it is busy."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _tree(path: str) -> Iterator[str]:
    """Yield a group and every group below it, parents first."""
    yield path
    try:
        with os.scandir(path) as entries:
            below = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for child in below:
        yield from _tree(child)


def _wait_exits(handles: list[int], deadline: float) -> None:
    """Wait until every process behind these pidfds has exited; close them."""
    waiting = set(handles)
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0:
            break
        for fd, _ in poll.poll(left_ms):
            poll.unregister(fd)
            waiting.discard(fd)
    for fd in handles:
        os.close(fd)
