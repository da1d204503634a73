"""The zygote's side of libraysandbox.so: fork a process that is behind walls.

Runs in the slim zygote: imports nothing that the interpreter does not need
anyway. The C side is ``native/lib.c``; each step that can fail is named there.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from raysandbox.errors import SetupError

__all__ = ["ForkServer", "library_path"]

_MAX_CGROUP_FDS = 16


def library_path() -> str:
    """Return where the wheel put libraysandbox.so (it may not exist)."""
    return os.path.join(os.path.dirname(__file__), "_bin", "libraysandbox.so")


class _Spawn(ctypes.Structure):
    """``struct spawn`` of ``native/lib.c``."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("call_fd", ctypes.c_int32),
        ("stdout_fd", ctypes.c_int32),
        ("stderr_fd", ctypes.c_int32),
        ("cgroup_dir_fd", ctypes.c_int32),
        ("cgroup_count", ctypes.c_int32),
        ("cgroup_fds", ctypes.c_int32 * _MAX_CGROUP_FDS),
        ("before", ctypes.c_void_p),
        ("in_parent", ctypes.c_void_p),
        ("in_child", ctypes.c_void_p),
        ("pid_fd", ctypes.c_int32),
        ("notify_fd", ctypes.c_int32),
        ("report", ctypes.c_char * 1024),
    )


class ForkServer:
    """Forks jails from this process, by one plan.

    The process must have one thread, be pid 1 of its own pid namespace and
    hold all capabilities in its user namespace: what ``raysandbox-launch
    --zygote`` starts.
    """

    def __init__(self, plan: bytes) -> None:
        """Load the plan for the life of this process.

        Raises:
            SetupError: The plan is not one, or /proc is missing.
        """
        # Not CDLL: like os.fork, a clone must not let go of the GIL.
        library = ctypes.PyDLL(library_path())
        code = library.rs_load_plan(plan, len(plan))
        if code != 0:
            raise SetupError(step="load_plan", errno=code)
        self._spawn, api = library.rs_spawn, ctypes.pythonapi
        self._request = _Spawn(
            before=ctypes.cast(api.PyOS_BeforeFork, ctypes.c_void_p),
            in_parent=ctypes.cast(api.PyOS_AfterFork_Parent, ctypes.c_void_p),
            in_child=ctypes.cast(api.PyOS_AfterFork_Child, ctypes.c_void_p),
        )
        self._argument = ctypes.byref(self._request)

    def fork(
        self,
        slot: int,
        cgroup_fds: Sequence[int],
        call_fd: int,
        *,
        stdout_fd: int = 1,
        stderr_fd: int = 2,
        cgroup_dir_fd: int = -1,
    ) -> tuple[int, int, int]:
        """Fork a jail; return only when all its walls are up.

        Args:
            slot: Which of the plan's mapped ids the jail takes, from 1; 0 if
                the plan maps a single one.
            cgroup_fds: ``tasks`` or ``cgroup.procs`` files that the jail joins
                first; at most 16.
            call_fd: The descriptor besides 0, 1, 2 that stays open in it.
            stdout_fd: Becomes descriptor 1 of the jail.
            stderr_fd: Becomes descriptor 2 of the jail.
            cgroup_dir_fd: Directory of the version 2 group that it is born
                in; -1 for the caller's own.

        Returns:
            ``(pid, pid_fd, notify_fd)`` in the parent, notify_fd -1 where the
            plan's filter notifies nobody; ``(0, -1, -1)`` in the jail.

        Raises:
            SetupError: In the parent: the named step failed, and the child
                is gone.
        """
        request = self._request
        request.slot, request.call_fd = slot, call_fd
        request.stdout_fd, request.stderr_fd = stdout_fd, stderr_fd
        request.cgroup_dir_fd = cgroup_dir_fd
        request.cgroup_count = len(cgroup_fds)
        for index, fd in enumerate(cgroup_fds[:_MAX_CGROUP_FDS]):
            request.cgroup_fds[index] = fd
        pid = self._spawn(self._argument)
        if pid == 0:
            return 0, -1, -1
        if pid > 0:
            return pid, request.pid_fd, request.notify_fd
        if pid == -errno.EPROTO:
            raise _setup_error(request.report)
        raise SetupError(step="clone", errno=-pid)


def _setup_error(report: bytes) -> SetupError:
    """Turn the launcher's status line into an error (see ``native/step.h``)."""
    words = report.decode("utf-8", "replace").strip().split(" ", 3)
    if len(words) >= 3 and words[0] == "error" and words[2].isdigit():
        return SetupError(step=words[1], errno=int(words[2]), detail="".join(words[3:]))
    return SetupError(step="fork", detail="the jail died before it reported a step")
