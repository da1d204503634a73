"""Which rule of the profile stood in a task's way: a sentence for its error."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence

from raysandbox.errors import SetupError
from raysandbox.kernel import cgroup
from raysandbox.node import store_proxy
from raysandbox.plan import SCRATCH
from raysandbox.policy import Policy
from raysandbox.profile import Profile
from raysandbox.worker.gate import SEALED

__all__ = ["FullStore", "explain"]

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


class FullStore:
    """Tells a quota that is full from a store that is: Ray has one error for both."""

    _UNITS = (
        # As the proxy has it, in what, the profile's key, and the policy's.
        ("job_bytes", "bytes", "max_job", "max_job"),
        ("job_objects", "objects", "max_job_objects", "max_job_objects"),
        ("worker_bytes", "bytes", "max_put", "max_task"),
        ("worker_objects", "objects", "max_put_objects", "max_task_objects"),
    )

    def __init__(self) -> None:
        self._refused = 0

    def explain(self, profile: Profile | None, policy: Policy | None) -> str:
        """Return the hint, or ``""`` if no quota is to blame.

        Args:
            profile: What runs in this process; None where tasks run in jails.
            policy: The node's.
        """
        if not os.path.lexists(store_proxy.BIND):
            return ""
        try:
            used = store_proxy.used_by_job(store_proxy.BIND)
        except SetupError:
            # The profile's filter may have no sockets for that.
            return (
                "hint: this job's quota in the object store may be full: "
                "`raysandbox ps` on the node says what it has"
            )
        refused, self._refused = self._refused, int(used["refused"])
        if self._refused == refused:
            return ""  # the store's own word
        parts = []
        for key, unit, own, node in self._UNITS:
            have, allowed = used[key]
            if allowed < 0:
                continue
            whose = f"job {used['job']}" if key.startswith("job") else "this worker"
            by = _who_says(own, node, allowed, profile, policy)
            parts.append(f"{whose} has {have} of {allowed} {unit} ({by})")
        return (
            "hint: a quota is full, not the node's memory: "
            f"{'; '.join(parts)}; drop references to objects that are no longer needed"
        )


def _who_says(
    own: str, node: str, allowed: int, profile: Profile | None, policy: Policy | None
) -> str:
    """Return the key that a limit comes from.

    Args:
        own: The profile's key for it.
        node: The policy's.
        allowed: The limit.
        profile: Which may have set it.
        policy: The same.
    """
    if profile is not None and _limit(profile.object_store, own) == allowed:
        return f"object_store.{own} of profile {profile.name!r}"
    if policy is not None and _limit(policy.object_store, node) == allowed:
        return f"object_store.{node} of the node's policy"
    return f"object_store.{own}"


def _limit(section: object, key: str) -> int | None:
    name = key if key.endswith("_objects") else f"{key}_bytes"
    value: int | None = getattr(section, name)
    return value
