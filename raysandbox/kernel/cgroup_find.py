"""Where this process may make control groups, and what is missing where not.

Part of `raysandbox.kernel.cgroup`, which is the interface: this module reads the
mounts and our own place in them, picks a base directory for each hierarchy and
makes it. See cgroups(7), "Delegation" in cgroup-v2.rst, and proc(5).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from raysandbox.errors import UnsupportedError

ENV = "RAYSANDBOX_CGROUP"
PREFIX = "raysandbox"
V2_CONTROLLERS = ("memory", "pids", "cpu", "io")
V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "blkio", "freezer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A controller in which this process can't make groups.

    Attributes:
        controller: ``"memory"``, ``"pids"``, ``"cpu"`` or ``"io"``.
        have: What was found instead.
        remedy: The exact command that changes it.
    """

    controller: str
    have: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Base:
    """The directory of one hierarchy in which groups are made."""

    version: int
    path: str
    controllers: frozenset[str]
    owned: bool  # made by us (named raysandbox), so ours to remove


# --- small file helpers -----------------------------------------------------


def write(path: str, value: bytes) -> None:
    """Put a value into a control file, by a single system call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def read(path: str) -> str:
    """Read a control file whole."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
    finally:
        os.close(fd)
    return b"".join(chunks).decode("ascii", "replace")


def read_or_none(path: str) -> str | None:
    """Read a control file; None if it can't be read."""
    try:
        return read(path)
    except OSError:
        return None


def writable(path: str) -> bool:
    """Say whether our effective ids may write to a path."""
    return os.access(path, os.W_OK, effective_ids=True)


# --- discovery --------------------------------------------------------------


class Mount(NamedTuple):
    """One mounted hierarchy: where, from which root, which controllers."""

    version: int
    path: str
    root: str
    controllers: frozenset[str]


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Parse the cgroup mounts out of ``/proc/self/mountinfo`` (proc(5))."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) < 6 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
            continue
        path, root = _unescape(before[4]), _unescape(before[3])
        if after[0] == "cgroup2":
            names = (read_or_none(f"{path}/cgroup.controllers") or "").split()
            found.append(Mount(2, path, root, frozenset(names)))
        else:
            names = [o for o in after[2].split(",") if o in V1_CONTROLLERS]
            found.append(Mount(1, path, root, frozenset(names)))
    return found


def own_paths(proc_cgroup: str) -> dict[str, str]:
    """Map controller to own path; version 2 stands under ``""``."""
    own = {}
    for line in proc_cgroup.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            own[name] = path
    return own


def own_dir(mount: Mount, own: Mapping[str, str]) -> str:
    """Return the directory of our own group as this mount shows it."""
    key = next(iter(mount.controllers), "") if mount.version == 1 else ""
    path = own.get(key, "/")
    if mount.root != "/":
        # A bind of a subtree (a container without cgroup namespace).
        inside = path == mount.root or path.startswith(mount.root + "/")
        path = path[len(mount.root) :] if inside else "/"
    full = mount.path + path.rstrip("/")
    return full if os.path.isdir(full) else mount.path


def _user() -> str:
    return str(os.geteuid())


def _remedy_v1(directory: str, parents: Collection[str]) -> str:
    targets = " ".join(f"{p}/{PREFIX}" for p in sorted(parents) or [directory])
    return (
        f"as root: mkdir -p {targets} && chown {_user()} {targets} "
        f"(or elsewhere, and name the directories in {ENV}, separated by ':')"
    )


def _remedy_v2(mount: str) -> str:
    wanted = " ".join(f"+{name}" for name in V2_CONTROLLERS)
    inner = (
        f"g={mount}$(sed -n s/^0:://p /proc/self/cgroup); mkdir $g/ray && "
        'echo $$ > $g/ray/cgroup.procs && exec "$@"'
    )
    if os.path.isdir("/run/systemd/system"):
        return (
            "start Ray in a delegated scope: systemd-run --user --scope "
            f"-p Delegate=yes -- sh -c '{inner}' sh ray start … "
            "(a system service: Delegate=yes and DelegateSubgroup=ray)"
        )
    base = f"{mount}/{PREFIX}-{_user()}"
    return (
        f"as root: echo '{wanted}' > {mount}/cgroup.subtree_control && "
        f"mkdir -p {base}/ray && chown -R {_user()} {base} && "
        f"echo PID > {base}/ray/cgroup.procs, PID being the shell that starts Ray"
    )


class Finder:
    """Chooses the base directories; collects what is missing on the way."""

    def __init__(self, explicit: str | None) -> None:
        self.explicit = [p.rstrip("/") for p in (explicit or "").split(":") if p]
        self.own = own_paths(read("/proc/self/cgroup"))
        mounts = parse_mounts(read("/proc/self/mountinfo"))
        self.v2 = next((m for m in mounts if m.version == 2), None)
        self.v1 = [m for m in mounts if m.version == 1 and m.controllers]
        self.root = os.geteuid() == 0
        self.bases: list[Base] = []
        self.missing: list[Missing] = []

    def run(self) -> None:
        self._check_explicit()
        in_v2 = (self.v2.controllers if self.v2 else frozenset()) & set(V2_CONTROLLERS)
        if self.v2 is not None and in_v2:
            self._find_v2(self.v2, in_v2)
        seen: set[str] = set(in_v2) | ({"blkio"} if "io" in in_v2 else set())
        refused: dict[str, str] = {}
        for mount in self.v1:
            wanted = mount.controllers - seen
            if not wanted or (wanted == {"cpuacct"} and "cpu" in in_v2):
                continue
            base, have = self._find_v1(mount)
            if base is None:
                parent = own_dir(mount, self.own)
                refused.update(dict.fromkeys(wanted, f"{have}|{parent}"))
            else:
                self.bases.append(base)
            seen |= wanted
        parents = {v.partition("|")[2] for v in refused.values()}
        for controller in sorted(refused):
            have, _, parent = refused[controller].partition("|")
            name = "io" if controller == "blkio" else controller
            if name in V2_CONTROLLERS:
                self.missing.append(
                    Missing(
                        controller=name,
                        have=f"{have} (cgroup version 1)",
                        remedy=_remedy_v1(parent, parents),
                    )
                )
        for name in V2_CONTROLLERS:
            if name not in seen and not (name == "io" and "blkio" in seen):
                self.missing.append(
                    Missing(
                        controller=name,
                        have="no mounted hierarchy has this controller",
                        remedy="mount -t cgroup2 none /sys/fs/cgroup, or boot with "
                        f"the {name} controller enabled",
                    )
                )

    def _check_explicit(self) -> None:
        """Refuse a path that the operator named and that is no cgroup."""
        roots = [m.path for m in self.v1] + ([self.v2.path] if self.v2 else [])
        for path in self.explicit:
            real = os.path.realpath(path)
            under = any(real == r or real.startswith(r + "/") for r in roots)
            if not under or not os.path.isdir(path):
                raise UnsupportedError(
                    feature="cgroup",
                    need=f"{ENV} to name directories of mounted cgroup hierarchies",
                    have=f"{path!r}: "
                    + ("no such directory" if under else "not below a cgroup mount"),
                    remedy=f"mkdir {path}, or correct {ENV}",
                )

    def _named(self, mount: Mount) -> str | None:
        for path in self.explicit:
            real = os.path.realpath(path)
            if real == mount.path or real.startswith(mount.path + "/"):
                return real
        return None

    def _find_v1(self, mount: Mount) -> tuple[Base | None, str]:
        """Return the base of one version 1 hierarchy, or what stands there."""
        named = self._named(mount)
        if named is not None:
            if writable(named):
                return Base(1, named, mount.controllers, False), ""
            return None, f"{named}: not writable by uid {_user()}"
        if self.explicit:
            return None, f"{ENV} names no directory below {mount.path}"
        parent = own_dir(mount, self.own)
        path = f"{parent}/{PREFIX}"
        problem = make_v1_base(path)
        if problem:
            return None, problem
        if not writable(path):
            return None, f"{path}: not writable by uid {_user()}"
        return Base(1, path, mount.controllers, True), ""

    def _find_v2(self, mount: Mount, wanted: frozenset[str]) -> None:
        candidates: list[tuple[str, bool]] = []
        named = self._named(mount)
        own = own_dir(mount, self.own)
        if named is not None:
            candidates.append((named, False))
        elif self.explicit:
            pass
        elif self.root:
            candidates.append((f"{mount.path}/{PREFIX}", True))
        else:
            # From our own group upwards: a process may be moved only by who may
            # write the common ancestor's cgroup.procs, and the nearest one
            # keeps the jails under every limit that we are under.
            at = own
            while at == mount.path or at.startswith(mount.path + "/"):
                files = ("", "/cgroup.procs", "/cgroup.subtree_control")
                if all(writable(at + f) for f in files):
                    candidates.append((f"{at}/{PREFIX}", True))
                at = os.path.dirname(at)
        best: tuple[str, bool, frozenset[str]] | None = None
        have = "no delegated group: none from our own upwards is writable"
        if self.explicit and named is None:
            have = f"{ENV} names no directory below {mount.path}"
        for path, owned in candidates:
            if not self.root and not _common_writable(mount.path, own, path):
                have = (
                    f"{path}: uid {_user()} may not move processes there from {own} "
                    "(cgroup.procs of their common ancestor is not writable)"
                )
                continue
            got, problem = make_v2_base(path, wanted, owned)
            have = problem or have
            if got and (best is None or len(got) > len(best[2])):
                if best is not None and best[1]:
                    rmdir_quietly(best[0])
                best = (path, owned, got)
                if got == wanted:
                    break
            elif owned:
                rmdir_quietly(path)
        if best is not None:
            self.bases.append(Base(2, best[0], best[2], best[1]))
        for name in sorted(wanted - (best[2] if best else frozenset())):
            self.missing.append(
                Missing(
                    controller=name,
                    have=f"{have} (cgroup version 2)",
                    remedy=_remedy_v2(mount.path),
                )
            )


def _common_writable(mount: str, own: str, path: str) -> bool:
    common = os.path.commonpath([own, path])
    return common.startswith(mount) and writable(common + "/cgroup.procs")


def rmdir_quietly(path: str) -> None:
    """Remove a group if nothing is in it."""
    try:
        os.rmdir(path)
    except OSError:
        pass  # in use by another worker, or gone already: both are fine


def make_v1_base(path: str) -> str:
    """Make a version 1 base; return what went wrong, or ``""``."""
    from cgroupspy.nodes import Node

    try:
        Node(os.path.dirname(path)).create_cgroup(os.path.basename(path))
    except OSError as error:
        return f"{path}: {os.strerror(error.errno or 0)}"
    return ""


def make_v2_base(
    path: str, wanted: frozenset[str], owned: bool
) -> tuple[frozenset[str], str]:
    """Make a version 2 base and enable controllers for its children.

    Returns:
        The controllers that groups made in ``path`` will have, and what went
        wrong with the others.
    """
    problem = ""
    if owned:
        problem = _enable(os.path.dirname(path), wanted)
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            pass
        except OSError as error:
            return frozenset(), f"{path}: {os.strerror(error.errno or 0)}"
    problem = _enable(path, wanted) or problem
    have = (read_or_none(f"{path}/cgroup.subtree_control") or "").split()
    got = wanted & frozenset(have)
    if got and not writable(path):
        return frozenset(), f"{path}: not writable by uid {_user()}"
    return got, "" if got == wanted else problem


def _enable(group: str, wanted: Collection[str]) -> str:
    """Enable controllers for the children of a version 2 group."""
    control = f"{group}/cgroup.subtree_control"
    have = (read_or_none(control) or "").split()
    offered = (read_or_none(f"{group}/cgroup.controllers") or "").split()
    problem = ""
    for name in sorted(set(wanted) - set(have)):
        if name not in offered:
            problem = f"{group}: its parent does not pass on {name}"
            continue
        try:
            # One by one: a list is refused as a whole.
            write(control, b"+" + name.encode())
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno == errno.EBUSY:
                why = "it holds processes itself, so it can't have controlled children"
            problem = f"{group}: {why}"
    return problem
