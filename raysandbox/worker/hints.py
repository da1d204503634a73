"""Which rule of the profile stood in a task's way: a sentence for its error."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence

from raysandbox.kernel import cgroup
from raysandbox.plan import SCRATCH
from raysandbox.profile import Profile
from raysandbox.worker.gate import SEALED

__all__ = ["explain"]

_SHOWN = 3
_DENIED = re.compile(r"Operation not permitted|Permission denied")


def explain(
    profile: Profile,
    *,
    name: str,
    number: int,
    message: str,
    path: str,
    denials: Sequence[str],
    usage: cgroup.Usage | None,
    hidden: Sequence[str] = (),
) -> str:
    """Return the hint, or ``""`` if the profile is not to blame.

    Args:
        profile: What the task ran under.
        name: Type of its exception.
        number: The exception's errno, or 0.
        message: Its text.
        path: The file that it names, or ``""``.
        denials: System calls that the filter denied meanwhile, described.
        usage: What the jail used, if it has a group.
        hidden: Directories of the driver's module path that jails don't see.
    """
    found = _by_errno(profile, number, path, usage)
    if not found and name in ("builtins.ModuleNotFoundError", "builtins.ImportError"):
        found = _module(message, hidden)
    if (
        not found
        and denials
        and (number in (errno.EPERM, errno.EACCES) or _DENIED.search(message))
    ):
        found = f"the filter denied {'; '.join(denials[:_SHOWN])}"
    return f"hint: {found} (profile {profile.name!r})" if found else ""


def _by_errno(
    profile: Profile, number: int, path: str, usage: cgroup.Usage | None
) -> str:
    limits, files = profile.limits, profile.filesystem
    if number == errno.ENOENT and path.startswith("/"):
        if os.path.lexists(path):
            return f"{path} is not in the jail: no entry of filesystem.read covers it"
        if os.path.lexists(SEALED) and not path.startswith((f"{SCRATCH}/", "/tmp/")):
            # Behind the node's wall the worker doesn't see more than its jails.
            return f"if the host has {path}, no entry of filesystem.read covers it"
    if number == errno.EACCES and path and (mode := _private_mode(path)):
        return (
            f"{path} has mode {mode:04o}: a jail runs as a user of its own, so what "
            "it is to read must be readable by others (chmod o+rX)"
        )
    if number in (errno.EROFS, errno.EACCES) and path:
        return (
            f"{path} is not writable or not readable in the jail: filesystem.write "
            f"is {list(files.write)}, and {SCRATCH} and /tmp are the task's own"
        )
    if number == errno.ENOSPC:
        return (
            f"the scratch is full: filesystem.scratch allows {files.scratch_bytes} "
            f"bytes, filesystem.scratch_inodes {files.scratch_inodes} files"
        )
    if number == errno.EFBIG:
        return f"limits.file_size allows {limits.file_size_bytes} bytes"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"limits.open_files allows {limits.open_files} descriptors"
    if number == errno.EAGAIN and usage is not None and usage.pids_denied:
        return f"limits.pids allows {limits.pids} processes and threads"
    if number in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f'network.mode = "{profile.network.mode}"'
    return ""


def _private_mode(path: str) -> int:
    """Return a file's mode if others may not read it, else 0."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return 0
    return 0 if mode & stat.S_IROTH else mode


def _module(message: str, hidden: Sequence[str]) -> str:
    match = re.search(r"No module named '([A-Za-z0-9_]+)", message)
    if match is None:
        return ""
    for directory in hidden:
        if any(
            os.path.exists(os.path.join(directory, match[1] + suffix))
            for suffix in (".py", "")
        ):
            return (
                f"{match[1]} is in {directory}, which jails don't see: pass it by "
                'runtime_env={"working_dir": …} or {"py_modules": […]}'
            )
    return ""
