"""From a profile with ``boundary = "worker"`` to the walls around a Ray worker.

Pure, as :mod:`raysandbox.plan` is for jails: decides what every thread of the
worker is restricted to, and says for each protection whether it is enforced. A
process that has threads can't enter namespaces or get a root of its own, so
what these would do is done by Landlock where it can, and is off where not.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.kernel import landlock
from raysandbox.plan import Protection, State, python_paths, system_paths

if TYPE_CHECKING:
    from raysandbox.probe import Host
    from raysandbox.profile import Profile, Syscalls

__all__ = ["Surroundings", "Walls", "plan_walls"]

# What of /etc programs need; nothing in them is secret.
_ETC_FILES = (
    "/etc/group",
    "/etc/host.conf",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl/openssl.cnf",
)
# Its own directory of /proc comes on top: those of others tell their command
# lines, and those of the same user much more.
_PROC_FILES = (
    "/proc/cpuinfo",
    "/proc/filesystems",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/kernel",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/vm",
    "/proc/uptime",
    "/proc/version",
)
_SYS_DIRECTORIES = ("/sys/devices/system/cpu", "/sys/devices/system/node")
# What even a launcher leaves to a worker.
_RAYS_OWN = {
    "pid": "raylet signals its workers by their pids, so they keep its namespace",
    "network": "Ray's own connections start in the worker",
}
# Before, truncate(2) went past it.
_LEAST_ABI = 3
# Sockets of anybody who may be asked by their path, and System V memory by number.
_NAMESPACED_GROUPS = ("local_sockets", "ipc")
# What of those TCP needs. Not listen: it binds a port that Landlock does not see.
_CONNECTED = ("connect", "accept", "accept4")
# What an owner may do to a file that it can't open: where the view is no mount of
# its own, a worker could still close its user's files, or open them to others.
_ATTRIBUTES = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat",
    "utime", "utimes", "utimensat", "futimesat", "inotify_add_watch",
)  # fmt: skip
_OTHERS = ("setpriority", "sched_setaffinity", "sched_setparam", "sched_setscheduler")
# Each thread's rules are a copy of its own in the kernel, 64 bytes each: 40 MB
# for twenty threads with as many as this.
_MOST_PORTS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What of a worker is not the profile's business.

    Attributes:
        python: Module search path of the worker.
        system: What ``@system`` stands for; see `plan.Context`.
        working_dirs: What ``@working_dir`` stands for.
        scratch: Directory that ``@scratch`` stands for.
        own_proc: The worker's own directory of /proc.
        ports: TCP ports that Ray may connect to here.
        loose_ports: Why they are more than Ray's own, or ``""``.
        launched: The worker was started by the node's launcher: it has all
            namespaces but two, a root and a /tmp of its own.
        own_user: It has a host user of its own.
        driver_ports: TCP ports that drivers which it starts may bind; None if it
            starts none.
        log: File that these write to.
    """

    python: Sequence[str]
    scratch: str
    own_proc: str
    system: Sequence[str] = ()
    working_dirs: Sequence[str] = ()
    ports: frozenset[int] = frozenset()
    loose_ports: str = ""
    launched: bool = False
    own_user: bool = False
    driver_ports: frozenset[int] | None = None
    log: str = ""


@dataclass(frozen=True, slots=True)
class Walls:
    """What to do to a worker.

    Attributes:
        rlimits: Resource to its limit, soft and hard.
        governed: What Landlock denies unless a rule allows it.
        paths: Its rules: rights by path.
        ports: TCP ports that may be connected to.
        bind_ports: TCP ports that may be bound; only drivers bind any.
        program: The compiled filter, empty for none.
        protections: What all that amounts to.
    """

    rlimits: Mapping[int, int]
    governed: landlock.Handled
    paths: Mapping[str, int]
    ports: tuple[int, ...]
    program: bytes
    protections: tuple[Protection, ...]
    bind_ports: tuple[int, ...] = ()


@dataclass(slots=True)
class _Report:
    profile: Profile
    protections: list[Protection] = field(default_factory=list)

    def say(self, name: str, state: State, reason: str = "") -> None:
        self.protections.append(Protection(name, state, reason))

    def lacking(
        self, name: str, have: str, remedy: str, *, need: str = "", required: bool
    ) -> None:
        """Refuse if the profile requires it, else record it as off."""
        if required:
            raise UnsupportedError(
                feature=name,
                need=need or f"{name} around a worker that is running already",
                have=have,
                remedy=remedy,
                profile=self.profile.name,
            )
        self.say(name, State.OFF, have)


def plan_walls(profile: Profile, host: Host, around: Surroundings) -> Walls:
    """Decide what restricts a worker that serves ``profile``.

    Raises:
        ProfileError: The profile is for jails, or names a path that is not there.
        UnsupportedError: The host lacks a protection that the profile
            requires, or Landlock, without which there is no wall at all.
    """
    if profile.boundary != "worker":
        raise ProfileError(
            source=profile.name,
            where="boundary",
            value=profile.boundary,
            reason='only boundary = "worker" runs in a worker',
        )
    report = _Report(profile)
    _namespaces(report, around)
    paths = _paths(profile, around)
    governed, ports = _landlock(report, host, around)
    if around.own_user:
        report.say("own host user", State.ENFORCED)
    else:
        report.say("own host user", State.OFF, "the worker has no host user to itself")
    report.say("no new privileges", State.ENFORCED)
    report.say("no capabilities", State.ENFORCED)
    report.say("resource limits", State.ENFORCED)
    program = _seccomp(report, host, around)
    return Walls(
        _rlimits(profile),
        governed,
        paths,
        ports,
        program,
        tuple(report.protections),
        tuple(sorted(around.driver_ports or ())),
    )


def _namespaces(report: _Report, around: Surroundings) -> None:
    wanted, files = report.profile.namespaces, report.profile.filesystem
    why = "a process with threads can't enter one; a launcher around the worker can"
    remedy = "start the node with raysandbox, or say required = false, with why"
    for name in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup"):
        full = f"{name} namespace"
        if not getattr(wanted, name):
            report.say(full, State.OFF, "not in the profile")
        elif around.launched and name in _RAYS_OWN:
            remedy = "say required = false, with why"
            report.lacking(full, _RAYS_OWN[name], remedy, required=wanted.required)
        elif around.launched:
            report.say(full, State.ENFORCED)
        else:
            report.lacking(full, why, remedy, required=wanted.required)
    if around.launched:
        report.say("root file system", State.ENFORCED)
        reason = "the size of the worker's own /tmp, which is not the profile's"
        report.say("scratch quota", State.DEGRADED, reason)
        return
    reason = "paths that are not in the view can be seen, not opened (Landlock)"
    report.say("root file system", State.DEGRADED, reason)
    why = "needs a mount of its own"
    report.lacking("scratch quota", why, remedy, required=files.required)


def _paths(profile: Profile, around: Surroundings) -> dict[str, int]:
    files = profile.filesystem
    rules: dict[str, int] = {}

    def allow(path: str, access: int) -> None:
        if os.path.exists(path):
            # By inode: a link's own name means nothing to Landlock.
            real = os.path.realpath(path)
            rules[real] = rules.get(real, 0) | access

    for path in (*_PROC_FILES, *_SYS_DIRECTORIES, around.own_proc):
        allow(path, landlock.READ)
    # Ray lists it when a worker ends, and aborts if it can't. What it starts has
    # directories of their own there: that of no process is known yet.
    hosts = around.driver_ports is not None
    allow("/proc", landlock.READ if hosts else landlock.READ_DIR)
    if hosts:
        allow(around.log, landlock.READ_FILE)
    for where, entries, access in (
        ("filesystem.read", files.read, landlock.READ),
        ("filesystem.write", files.write, landlock.WRITE),
    ):
        for entry in entries:
            for path in _expand(profile, where, entry, around):
                allow(path, access)
    for name in profile.devices:
        allow(f"/dev/{name}", landlock.READ_FILE | landlock.WRITE_FILE)
    if files.hide:
        # Rules only ever add: what lies below an allowed directory is allowed.
        raise ProfileError(
            source=profile.name,
            where="filesystem.hide",
            value=list(files.hide),
            reason='boundary = "worker" can\'t hide parts of what it shows',
        )
    return rules


def _expand(
    profile: Profile, where: str, entry: str, around: Surroundings
) -> Iterable[str]:
    if entry == "@system":
        return [*(around.system or system_paths()), *_ETC_FILES]
    if entry == "@python":
        return python_paths(around.python)
    if entry == "@working_dir":
        return around.working_dirs
    if entry == "@scratch":
        return [around.scratch]
    if not os.path.exists(entry):
        raise ProfileError(
            source=profile.name,
            where=where,
            value=entry,
            reason="does not exist on this host",
        )
    return [entry]


def _landlock(
    report: _Report, host: Host, around: Surroundings
) -> tuple[landlock.Handled, tuple[int, ...]]:
    profile, abi = report.profile, host.landlock_abi
    least = max(_LEAST_ABI, profile.landlock.min_abi)
    if abi < least or not profile.landlock.enabled:
        raise UnsupportedError(
            feature="landlock",
            need=f'ABI {least} or later: nothing else walls in a boundary = "worker"',
            have="landlock.enabled = false"
            if not profile.landlock.enabled
            else (f"ABI {abi}" if abi else "none"),
            remedy="boot Linux 6.2 or later with landlock in lsm=, and leave it on",
            profile=profile.name,
        )
    governed, missing = landlock.handled(abi), []
    if governed.scoped & landlock.SCOPE_SIGNAL:
        if not landlock.scopes_signals_of_threads():
            governed = governed._replace(
                scoped=governed.scoped & ~landlock.SCOPE_SIGNAL
            )
            missing.append("a signal scope that spares threads (Linux 6.15)")
    else:
        missing.append("signal and abstract socket scopes (ABI 6)")
    if abi < 5:
        missing.append("device ioctls (ABI 5)")
    ports = _ports(report, governed, around)
    if not ports:
        governed = governed._replace(net=0)
    if missing:
        report.say("landlock", State.DEGRADED, f"no {', no '.join(missing)}")
    else:
        report.say("landlock", State.ENFORCED)
    return governed, ports


def _ports(
    report: _Report, governed: landlock.Handled, around: Surroundings
) -> tuple[int, ...]:
    """Return the ports to allow; none if TCP is not governed here."""
    name, required = "network ports", report.profile.network.required
    if not governed.net:
        have = "a kernel without Landlock's TCP rules (ABI 4)"
        report.lacking(name, have, "boot Linux 6.7 or later", required=required)
        return ()
    if not around.ports or len(around.ports) > _MOST_PORTS:
        report.lacking(
            name,
            f"{len(around.ports)} ports that Ray may use ({around.loose_ports})",
            "start Ray with --node-manager-port, --min-worker-port, --max-worker-port",
            need=f"1 to {_MOST_PORTS} ports",
            required=required,
        )
        return ()
    state = State.DEGRADED if around.loose_ports else State.ENFORCED
    report.say(name, state, around.loose_ports)
    return tuple(sorted(around.ports))


def _seccomp(report: _Report, host: Host, around: Surroundings) -> bytes:
    from raysandbox.kernel import seccomp

    syscalls = _narrowed(report.profile.syscalls, around)
    if not host.seccomp:
        remedy = "boot a kernel with seccomp filters"
        report.lacking("seccomp", "none", remedy, required=syscalls.required)
        return b""
    if syscalls.action == "log":
        reason = "syscalls.action = log denies nothing"
        report.say("seccomp", State.DEGRADED, reason)
    else:
        report.say("seccomp", State.ENFORCED)
    return seccomp.compile_policy(syscalls, notify=False).bpf


def _narrowed(syscalls: Syscalls, around: Surroundings) -> Syscalls:
    """Take out what only namespaces would have made harmless.

    An OCI policy stays as it is written.
    """
    groups, deny = list(syscalls.groups), dict(syscalls.deny)
    allow = dict(syscalls.allow)
    if not around.launched:
        groups = [group for group in groups if group not in _NAMESPACED_GROUPS]
        if "tcp" in groups:
            allow |= dict.fromkeys(_CONNECTED, "TCP, without a listener of its own")
        deny |= dict.fromkeys(_ATTRIBUTES, "Landlock does not govern it")
    if not around.own_user:
        deny |= dict.fromkeys(_OTHERS, "reaches every process of the same user")
    allow = {name: why for name, why in allow.items() if name not in deny}
    return syscalls.model_copy(
        update={"groups": tuple(groups), "deny": deny, "allow": allow}
    )


def _rlimits(profile: Profile) -> dict[int, int]:
    limits = profile.limits
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_MEMLOCK: 64 << 10,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if limits.file_size_bytes is not None:
        wanted[resource.RLIMIT_FSIZE] = limits.file_size_bytes
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            wanted[which] = min(value, hard)
    return wanted
