"""From a profile and a host to what the launcher does, as data.

Pure: nothing here changes the machine. :func:`compile` decides everything that
is decidable ahead (paths, rights, limits, the filter) and says for each
protection whether it is enforced; ``native/plan.h`` describes the bytes that
:meth:`Plan.encode` makes, and ``native/launch.c`` and ``native/jail.c`` apply
them in their own order.
"""

from __future__ import annotations

import enum
import os
import resource
import stat
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.kernel import landlock

if TYPE_CHECKING:
    from raysandbox.probe import Host
    from raysandbox.profile import Profile

__all__ = [
    "SCRATCH",
    "TASK_ID",
    "Builder",
    "Context",
    "IdRange",
    "Plan",
    "Protection",
    "Record",
    "State",
    "compile",
    "described",
    "image_paths",
    "inside",
    "is_below",
    "python_paths",
    "survey",
    "system_paths",
    "text",
    "u32",
    "u64",
]

#: Where the scratch is inside, whatever the profile.
SCRATCH = "/scratch"
#: The id that a task sees itself as.
TASK_ID = 1000

_MAGIC = b"RSBXPLN1"

_BIND_READ_ONLY, _BIND_DEVICE = 1, 2

# CLONE_NEW* of linux/sched.h.
_NEW = {
    "user": 0x10000000,
    "pid": 0x20000000,
    "mount": 0x00020000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
# Without these nothing else holds.
_INDISPENSABLE = ("user", "pid", "mount")
# Each jail has these to itself; the others are its zygote's, shared only by
# jails that run one after the other, and hold nothing that could carry over:
# a network namespace has no interface up, and a hostname can't be set.
_PER_JAIL = ("mount", "ipc", "cgroup")

_SECCOMP_NEW_LISTENER = 1 << 3

# What of /etc programs need to work at all; none of it is secret. Files are
# copied, once for all jails of a zygote, to each of which a mount costs a little; a
# command, which starts once, gets the larger ones as mounts.
_ETC_DIRECTORIES = ("/etc/ssl/certs", "/etc/alternatives")
_ETC_FILES = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/openssl.cnf",
)
_ETC_FILE_BYTES = 256 << 10
_CHEAP_COPY_BYTES = 8 << 10
_TOP_LEVEL = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Where an image's own is not seen: made anew for who sees it.
_MADE = ("/dev", "/etc", "/proc", "/run", "/scratch", "/sys", "/tmp", "/var/tmp")
_MOST_LINKS = 40  # as the kernel's
# Parts of /proc that tell of the whole host and that the kernel's own
# permissions leave readable, or that must not be written whoever asks.
_PROC_MASKS = (
    "/proc/acpi",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/interrupts",
    "/proc/iomem",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/key-users",
    "/proc/keys",
    "/proc/locks",
    "/proc/modules",
    "/proc/scsi",
    "/proc/swaps",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
)


class Record(enum.IntEnum):
    """Types of a plan's records: their fields are in ``native/plan.h``."""

    NAMESPACES = 1
    HOSTNAME = 2
    IDMAP = 3
    DIR = 4
    BIND = 5
    SYMLINK = 6
    FILE = 7
    HIDE = 8
    PROC = 9
    MASK = 10
    SCRATCH = 11
    SUBDIR = 12
    RLIMIT = 13
    INNER_ID = 14
    LANDLOCK = 15
    LANDLOCK_PATH = 16
    LANDLOCK_PORT = 17
    SECCOMP = 18
    CHDIR = 19
    ENV = 20
    CGROUP_JOIN = 21
    CGROUP_CLEAN = 22
    WALL_TIME = 23
    TMP = 24
    CARRY = 25
    TMPFS = 26
    COPY = 27
    COPY_ENV = 28
    ENV_PASS = 29
    LANDLOCK_PORTS = 30
    USER = 31
    LOG = 32
    CGROUP_BASE = 33
    CGROUP_LIMIT = 34
    PROGRAM = 35
    PRELUDE = 36
    LOG_LIMIT = 37


class State(str, enum.Enum):
    """How much of a protection really holds."""

    ENFORCED = "enforced"
    DEGRADED = "degraded"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Protection:
    """One wall and what became of it on this host."""

    name: str
    state: State
    reason: str = ""


def described(protections: Sequence[Protection]) -> dict[str, str]:
    """Return each wall's state and reason in words, by its name: for events."""
    return {
        wall.name: wall.state.value
        if not wall.reason
        else f"{wall.state.value}: {wall.reason}"
        for wall in protections
    }


@dataclass(frozen=True, slots=True)
class IdRange:
    """Host ids that a launch maps: ``first`` is its inside root's."""

    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What of a launch is not the profile's business.

    Attributes:
        ids: Host ids to map; ``count == 1`` when they are the caller's own.
        zygote: Plan for a zygote that forks jails, not for one command.
        notify: Denied system calls go to a supervisor.
        working_dirs: What ``@working_dir`` stands for.
        python: What ``@python`` stands for; see :func:`python_paths`.
        root: Where ``@system`` and ``@python`` are taken from: the directory of a root
            file system, or "" for the host's own.
        system: What ``@system`` stands for; see :func:`system_paths`, and
            :func:`image_paths` where there is a root.
        environment: Variables to choose from (``environment.pass``).
        extra_environment: Variables that are set regardless.
        chdir: Where the command starts; None for the scratch.
        cgroup_dirs: Groups that the command joins (not for a zygote).
        cgroup_clean: ``(directory, prefix)`` of groups to remove at the end.
        wall_time: Whether the launcher itself enforces ``limits.wall_time``.
    """

    ids: IdRange
    zygote: bool = False
    notify: bool = False
    working_dirs: Sequence[str] = ()
    python: Sequence[str] = ()
    root: str = ""
    system: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    chdir: str | None = None
    cgroup_dirs: Sequence[str] = ()
    cgroup_clean: Sequence[tuple[str, str]] = ()
    wall_time: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled plan: its records and what they enforce."""

    profile: str
    records: tuple[tuple[int, bytes], ...]
    protections: tuple[Protection, ...]

    def encode(self) -> bytes:
        """Return the bytes that ``native/plan.c`` reads."""
        body = b"".join(
            struct.pack("<HHI", kind, 0, len(payload)) + payload
            for kind, payload in self.records
        )
        return _MAGIC + struct.pack("<II", 16 + len(body), len(self.records)) + body


def text(*values: str) -> bytes:
    """Encode strings for a record."""
    for value in values:
        if "\0" in value:
            raise ProfileError(
                source="<plan>", value=value, reason="must not contain a NUL byte"
            )
    return b"".join(os.fsencode(value) + b"\0" for value in values)


def u32(*values: int) -> bytes:
    """Encode 32-bit numbers for a record."""
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    """Encode 64-bit numbers for a record."""
    return struct.pack(f"<{len(values)}Q", *values)


def system_paths() -> list[str]:
    """Return what ``@system`` stands for: programs and libraries."""
    return ["/usr", *_TOP_LEVEL, *_ETC_DIRECTORIES]


def image_paths(root: str, taken: Iterable[str] = ()) -> list[str]:
    """Return what ``@system`` stands for where a root file system is an image's.

    All that it has, but for what is made for each jail or worker anew; of its /etc
    what programs need.

    Args:
        root: The image's directory.
        taken: Paths where something else goes.
    """
    places = {*_MADE, *(os.path.normpath(path) for path in taken)}
    return [*_around(root, "/", places), *_ETC_DIRECTORIES]


def _around(root: str, directory: str, taken: Iterable[str]) -> list[str]:
    """Return the paths that a directory has and that hold nothing that is taken."""
    found: list[str] = []
    for entry in sorted(os.scandir(root + directory), key=lambda entry: entry.name):
        path = os.path.join(directory, entry.name)
        below = [place for place in taken if is_below(place, path)]
        if not below:
            found.append(path)
        elif path not in below and entry.is_dir(follow_symlinks=False):
            found += _around(root, path, below)
    return found


def inside(root: str, path: str) -> str:
    """Return where a path leads if ``root`` is the root directory; as the host has it.

    Links are followed as the kernel would, and lead nowhere outside.

    Args:
        root: A directory, or "" for the host's own root.
        path: Absolute, as seen from there. What does not exist leads to itself.
    """
    if not root:
        return os.path.realpath(path)
    here: list[str] = []
    todo, links = path.split("/")[::-1], 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del here[-1:]
            continue
        at = "/".join((root, *here, part))
        if not os.path.islink(at):
            here.append(part)
            continue
        if (links := links + 1) > _MOST_LINKS:
            raise ProfileError(source=root, value=path, reason="leads in a circle")
        target = os.readlink(at)
        here = [] if target.startswith("/") else here
        todo += target.split("/")[::-1]
    return "/".join((root, *here))


def _link(root: str, path: str) -> str:
    """Return where a link leads, as it says itself; "" for anything else."""
    directory, _, name = path.rpartition("/")
    at = f"{inside(root, directory or '/').rstrip('/')}/{name}"
    return os.readlink(at) if os.path.islink(at) else ""


def python_paths(search: Iterable[str] = sys.path) -> list[str]:
    """Return what ``@python`` stands for: the interpreter and its modules.

    Args:
        search: Module search path whose existing entries belong to it.
    """
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    binary = os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))
    found = [*prefixes, binary, os.path.join(package, "raysandbox"), *search]
    return _outermost(path for path in found if path and os.path.exists(path))


def compile(  # noqa: A001 - plan.compile, as re.compile
    profile: Profile, host: Host, context: Context
) -> Plan:
    """Decide all that a launch under ``profile`` on ``host`` does.

    Raises:
        ProfileError: The profile names a path that does not exist, or asks
            for something that contradicts itself.
        UnsupportedError: The host lacks a protection that the profile
            requires.
    """
    builder = Builder(profile, host, context)
    builder.build()
    if builder.missing:
        raise builder.missing[0]
    return Plan(profile.name, tuple(builder.records), tuple(builder.protections))


def survey(
    profile: Profile, host: Host, context: Context
) -> tuple[tuple[Protection, ...], tuple[UnsupportedError, ...]]:
    """Say what would hold, and all that is required and missing.

    Raises:
        ProfileError: As :func:`compile`.
    """
    builder = Builder(profile, host, context)
    builder.build()
    return tuple(builder.protections), tuple(builder.missing)


class Builder:
    """Collects records and protections; one method per wall."""

    def __init__(self, profile: Profile, host: Host, context: Context) -> None:
        self.profile, self.host, self.context = profile, host, context
        self.records: list[tuple[int, bytes]] = []
        self.protections: list[Protection] = []
        self.missing: list[UnsupportedError] = []
        self.readable: list[str] = []
        self.writable: list[str] = []

    def build(self) -> None:
        self.namespaces()
        self.root()
        self.limits()
        self.landlock()
        self.seccomp()
        self.surroundings()

    def add(self, kind: int, payload: bytes) -> None:
        self.records.append((kind, payload))

    def protect(self, name: str, state: State, reason: str = "") -> None:
        self.protections.append(Protection(name, state, reason))

    def lacking(
        self, feature: str, need: str, have: str, remedy: str, *, required: bool
    ) -> None:
        """Note what is missing if the profile requires it, else that it is off."""
        if not required:
            why = f"need {need}, have {have}; the profile does not require it"
            self.protect(feature, State.OFF, why)
            return
        self.missing.append(
            UnsupportedError(
                feature=feature,
                need=need,
                have=have,
                remedy=remedy,
                profile=self.profile.name,
            )
        )

    def namespaces(self) -> None:
        wanted = self.profile.namespaces
        for name in _INDISPENSABLE:
            if not getattr(wanted, name):
                raise ProfileError(
                    source=self.profile.name,
                    where=f"namespaces.{name}",
                    value=False,
                    reason="no jail can be built without this namespace",
                )
        if self.host.namespaces_reason:
            self.lacking(
                "namespaces",
                "user, pid and mount namespaces for this user",
                self.host.namespaces_reason,
                self.host.namespaces_remedy,
                required=True,  # whatever the profile says: no jail without them
            )
            return
        outer = inner = 0
        for name, flag in _NEW.items():
            if not getattr(wanted, name):
                self.protect(f"{name} namespace", State.OFF, "not in the profile")
                continue
            # A group must be joined before its namespace is made.
            if name != "cgroup":
                outer |= flag
            if name in _PER_JAIL and (self.context.zygote or name == "cgroup"):
                inner |= flag
            self.protect(f"{name} namespace", State.ENFORCED)
        self.add(Record.NAMESPACES, u32(outer, inner))
        if wanted.uts:
            self.add(Record.HOSTNAME, text(wanted.hostname))
        ids = self.context.ids
        self.add(Record.IDMAP, u32(ids.first, ids.count))
        self.add(Record.INNER_ID, u32(TASK_ID, TASK_ID))
        if ids.count == 1:
            self.protect(
                "own host user",
                State.OFF,
                "an ordinary user can map no id but its own",
            )
        else:
            self.protect("own host user", State.ENFORCED)

    def root(self) -> None:
        files = self.profile.filesystem
        self._bind_all("filesystem.read", files.read, read_only=True)
        self._bind_all(
            "filesystem.write",
            [entry for entry in files.write if entry != "@scratch"],
            read_only=False,
        )
        self._devices()
        self._synthesised()
        self.add(Record.PROC, text("/proc"))
        for path in _PROC_MASKS:
            self.add(Record.MASK, text(path))
        self.add(
            Record.SCRATCH,
            u64(files.scratch_bytes, files.scratch_inodes) + text(SCRATCH),
        )
        self.add(Record.DIR, u32(0o755) + text("/tmp"))
        self.add(Record.TMP, text("/tmp"))
        for path in (*self.readable, *self.writable):
            if path.startswith("/tmp/"):
                self.add(Record.CARRY, text(path))
        for name in ("shm", "home"):
            self.add(Record.SUBDIR, u32(0o700) + text(f"{SCRATCH}/{name}"))
        for target, path in ((f"{SCRATCH}/shm", "/dev/shm"), ("/tmp", "/var/tmp")):
            # Where the profile binds something below, that is all there is.
            if not any(
                bound == path or bound.startswith(f"{path}/")
                for bound in (*self.readable, *self.writable)
            ):
                self.add(Record.SYMLINK, text(target, path))
        for path in files.hide:
            self.add(Record.HIDE, text(path))
        self.protect("root file system", State.ENFORCED)
        self.protect("scratch quota", State.ENFORCED)

    def _bind_all(self, where: str, entries: Iterable[str], *, read_only: bool) -> None:
        paths: dict[str, str] = {}
        symlinks: list[tuple[str, str]] = []
        links = (*_TOP_LEVEL, *self.context.system)
        for entry in entries:
            root = self.context.root if entry in ("@system", "@python") else ""
            for path, required in self._expand(where, entry):
                if path in links and (target := _link(root, path)):
                    symlinks.append((target, path))
                elif os.path.exists(source := inside(root, path)):
                    paths.setdefault(os.path.normpath(path), source)
                elif required:
                    raise ProfileError(
                        source=self.profile.name,
                        where=where,
                        value=path,
                        reason="does not exist on this host"
                        + (f" ({entry})" if entry != path else ""),
                    )
        for path in _outermost(paths):
            flags = _BIND_READ_ONLY if read_only else 0
            self.add(Record.BIND, u32(flags) + text(paths[path], path))
        for target, path in symlinks:
            self.add(Record.SYMLINK, text(target, path))
        (self.readable if read_only else self.writable).extend(_outermost(paths))

    def _expand(self, where: str, entry: str) -> list[tuple[str, bool]]:
        """Resolve an @name; each path with whether it must exist."""
        if not entry.startswith("@"):
            if not entry.startswith("/"):
                raise ProfileError(
                    source=self.profile.name,
                    where=where,
                    value=entry,
                    reason="must be an absolute path or an @name",
                )
            return [(entry, True)]
        if entry == "@system":
            return [(path, False) for path in self.context.system or system_paths()]
        if entry == "@python":
            paths = self.context.python or python_paths()
            return [(path, False) for path in paths]
        if entry == "@working_dir":
            return [(path, True) for path in self.context.working_dirs]
        if entry == "@scratch":
            return []
        raise ProfileError(
            source=self.profile.name,
            where=where,
            value=entry,
            reason="unknown @name; there are @system, @python, @working_dir, @scratch",
        )

    def _devices(self) -> None:
        for name in self.profile.devices:
            path = f"/dev/{name}"
            if not os.path.exists(path) or not stat.S_ISCHR(os.stat(path).st_mode):
                raise ProfileError(
                    source=self.profile.name,
                    where="devices",
                    value=name,
                    reason=f"{path} is not a character device on this host",
                )
            self.add(Record.BIND, u32(_BIND_DEVICE) + text(path, path))
        for target, path in (
            ("/proc/self/fd", "/dev/fd"),
            ("/proc/self/fd/0", "/dev/stdin"),
            ("/proc/self/fd/1", "/dev/stdout"),
            ("/proc/self/fd/2", "/dev/stderr"),
        ):
            self.add(Record.SYMLINK, text(target, path))

    def _synthesised(self) -> None:
        """Files that would tell about the host, or that it may lack."""
        nobody = "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        user = f"task:x:{TASK_ID}:{TASK_ID}:task:{SCRATCH}/home:/bin/sh\n"
        cpus = len(os.sched_getaffinity(0))
        online = f"0-{cpus - 1}\n" if cpus > 1 else "0\n"
        wants_system = "@system" in self.profile.filesystem.read
        for path in _ETC_FILES if wants_system else ():
            source = inside(self.context.root, path)
            copy = _small_file(source)
            if copy is None or self._is_bound(path):
                continue
            if self.context.zygote or len(copy) <= _CHEAP_COPY_BYTES:
                self.add(Record.FILE, u32(0o444) + text(path) + copy)
            else:
                self.add(Record.BIND, u32(_BIND_READ_ONLY) + text(source, path))
        for path, content in (
            ("/etc/passwd", user + nobody),
            ("/etc/group", f"task:x:{TASK_ID}:\nnogroup:x:65534:\n"),
            ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
            ("/etc/hostname", self.profile.namespaces.hostname + "\n"),
            ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
            ("/sys/devices/system/cpu/online", online),
            ("/sys/devices/system/cpu/possible", online),
        ):
            if not self._is_bound(path):
                self.add(Record.FILE, u32(0o444) + text(path) + content.encode())

    def _is_bound(self, path: str) -> bool:
        return any(is_below(path, bound) for bound in self.readable)

    def limits(self) -> None:
        limits = self.profile.limits
        self._rlimit(resource.RLIMIT_CORE, 0)
        self._rlimit(resource.RLIMIT_NOFILE, limits.open_files)
        self._rlimit(resource.RLIMIT_MEMLOCK, 64 << 10)
        self._rlimit(resource.RLIMIT_RTPRIO, 0)
        self._rlimit(resource.RLIMIT_NICE, 0)
        self._rlimit(resource.RLIMIT_MSGQUEUE, 0)
        if limits.file_size_bytes is not None:
            self._rlimit(resource.RLIMIT_FSIZE, limits.file_size_bytes)
        if limits.cpu_time_s is not None:
            # A backstop for each process; the cgroup counts them together.
            # Pid 1 ignores SIGXCPU, so the hard limit is what kills it.
            seconds = max(1, int(limits.cpu_time_s + 0.999))
            self.add(
                Record.RLIMIT, u32(resource.RLIMIT_CPU) + u64(seconds, seconds + 1)
            )
        self.protect("resource limits", State.ENFORCED)
        if self.context.wall_time and limits.wall_time_s is not None:
            self.add(Record.WALL_TIME, u64(max(1, int(limits.wall_time_s * 1000))))

    def _rlimit(self, which: int, value: int) -> None:
        _soft, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        self.add(Record.RLIMIT, u32(which) + u64(value, value))

    def landlock(self) -> None:
        wanted, abi = self.profile.landlock, self.host.landlock_abi
        if not wanted.enabled:
            self.protect("landlock", State.OFF, "not in the profile")
            return
        if abi < max(1, wanted.min_abi):
            self.lacking(
                "landlock",
                f"ABI {max(1, wanted.min_abi)} or later",
                f"ABI {abi}" if abi else "none",
                "boot Linux 5.13 or later with landlock in lsm= "
                "(see /sys/kernel/security/lsm)",
                required=wanted.required,
            )
            return
        governed = landlock.handled(abi)
        self.add(Record.LANDLOCK, u64(*governed))
        rules = {"/": landlock.READ_DIR, "/proc": landlock.READ}
        for path in (*self.readable, "/etc", "/sys"):
            rules[path] = landlock.READ
        for path in (*self.writable, SCRATCH, "/tmp"):
            rules[path] = landlock.WRITE
        for name in self.profile.devices:
            rules[f"/dev/{name}"] = landlock.READ_FILE | landlock.WRITE_FILE
        for path, access in rules.items():
            # What a rule further up allows anyway needs none of its own.
            if any(
                path != above and is_below(path, above) and access & ~allowed == 0
                for above, allowed in rules.items()
            ):
                continue
            self.add(Record.LANDLOCK_PATH, u64(access & governed.fs) + text(path))
        missing = [
            what
            for what, have in (
                ("TCP rules (ABI 4)", governed.net),
                ("device ioctls (ABI 5)", abi >= 5),
                ("scopes (ABI 6)", governed.scoped),
            )
            if not have
        ]
        if missing:
            reason = f"ABI {abi} has no {', '.join(missing)}"
            self.protect("landlock", State.DEGRADED, reason)
        else:
            self.protect("landlock", State.ENFORCED)

    def seccomp(self) -> None:
        from raysandbox.kernel import seccomp

        self.protect("no new privileges", State.ENFORCED)
        self.protect("no capabilities", State.ENFORCED)
        if not self.host.seccomp:
            self.lacking(
                "seccomp",
                "seccomp filters (CONFIG_SECCOMP_FILTER)",
                "none",
                "boot a kernel with seccomp filters",
                required=self.profile.syscalls.required,
            )
            return
        notify = self.context.notify and self.host.seccomp_notify
        program = seccomp.compile_policy(self.profile.syscalls, notify=notify)
        flags = _SECCOMP_NEW_LISTENER if notify else 0
        self.add(Record.SECCOMP, u32(flags) + program.bpf)
        if self.context.notify and not notify:
            self.protect(
                "seccomp",
                State.DEGRADED,
                "no user notification before Linux 5.0: denials are not recorded",
            )
        elif self.profile.syscalls.action == "log":
            self.protect(
                "seccomp", State.DEGRADED, "syscalls.action = log denies nothing"
            )
        else:
            self.protect("seccomp", State.ENFORCED)

    def surroundings(self) -> None:
        context = self.context
        chosen = {
            name: value
            for name, value in context.environment.items()
            if any(fnmatchcase(name, p) for p in self.profile.environment.pass_)
        }
        variables = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            **chosen,
            **self.profile.environment.set,
            **context.extra_environment,
            "HOME": f"{SCRATCH}/home",
            "TMPDIR": "/tmp",
            "USER": "task",
        }
        for name, value in variables.items():
            self.add(Record.ENV, text(f"{name}={value}"))
        self.add(Record.CHDIR, text(context.chdir or SCRATCH))
        for path in context.cgroup_dirs:
            self.add(Record.CGROUP_JOIN, text(path))
        for directory, prefix in context.cgroup_clean:
            self.add(Record.CGROUP_CLEAN, text(directory, prefix))


def _small_file(path: str) -> bytes | None:
    """Return a file's content; None if it is absent or too large to copy."""
    try:
        with open(path, "rb") as file:
            content = file.read(_ETC_FILE_BYTES + 1)
    except OSError:
        return None
    return content if len(content) <= _ETC_FILE_BYTES else None


def is_below(path: str, directory: str) -> bool:
    """Whether a path is a directory's own or leads below it; both as written."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _outermost(paths: Iterable[str]) -> list[str]:
    """Drop duplicates and paths that lie below another one; parents first."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(is_below(path, outer) for outer in kept):
            kept.append(path)
    return kept
