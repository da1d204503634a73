"""The zygote's side of libraysandbox.so: fork a process that is behind walls.

Runs in the slim zygote: imports nothing that the interpreter does not need
anyway. The C side is ``native/lib.c``; each step that can fail is named there.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket

from raysandbox.errors import SetupError

__all__ = ["ForkServer", "library_path"]

_READY = b"ready\n"
_REPORT_BYTES = 1024


def library_path() -> str:
    """Return where the wheel put libraysandbox.so (it may not exist)."""
    return os.path.join(os.path.dirname(__file__), "_bin", "libraysandbox.so")


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
        self._library = ctypes.CDLL(library_path())
        _check("load_plan", self._library.rs_load_plan(plan, len(plan)))
        # Like os.fork, the clone must not let go of the GIL.
        self._clone = ctypes.PyDLL(library_path()).rs_clone

    def fork(
        self,
        slot: int,
        cgroup_fds: list[int],
        keep_fds: list[int],
        *,
        stdout_fd: int = 1,
        stderr_fd: int = 2,
        cgroup_dir_fd: int = -1,
    ) -> tuple[int, int]:
        """Fork a jail; return only when all its walls are up.

        Args:
            slot: Which of the plan's mapped ids the jail takes, from 1; 0 if
                the plan maps a single one.
            cgroup_fds: ``tasks`` or ``cgroup.procs`` files that the jail joins
                first.
            keep_fds: Descriptors besides 0, 1, 2 that stay open in it.
            stdout_fd: Becomes descriptor 1 of the jail.
            stderr_fd: Becomes descriptor 2 of the jail.
            cgroup_dir_fd: Directory of the version 2 group that it is born
                in; -1 for the caller's own.

        Returns:
            ``(pid, notify_fd)`` in the parent, notify_fd -1 where the plan's
            filter notifies nobody; ``(0, -1)`` in the jail.

        Raises:
            SetupError: In the parent: the named step failed, and the child
                is gone.
        """
        parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = self._fork(cgroup_dir_fd)
        if pid == 0:
            os.dup2(stdout_fd, 1)
            os.dup2(stderr_fd, 2)
            # Never returns on failure: the child ends with its step reported.
            self._library.rs_enter_jail(
                slot,
                (ctypes.c_int * len(cgroup_fds))(*cgroup_fds),
                len(cgroup_fds),
                (ctypes.c_int * len(keep_fds))(*keep_fds),
                len(keep_fds),
                child.fileno(),
            )
            # Their numbers are closed already and may be somebody else's soon.
            child.detach()
            parent.detach()
            return 0, -1
        child.close()
        with parent:
            fds = array.array("i")
            report, ancillary, _flags, _address = parent.recvmsg(
                _REPORT_BYTES, socket.CMSG_SPACE(fds.itemsize)
            )
        if report == _READY:
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[: fds.itemsize])
            return pid, fds[0] if fds else -1
        os.waitpid(pid, 0)
        raise _setup_error(report)

    def _fork(self, cgroup_dir_fd: int) -> int:
        """os.fork, but with the namespace and the group of the jail."""
        api = ctypes.pythonapi
        api.PyOS_BeforeFork()
        pid = int(self._clone(cgroup_dir_fd))
        if pid == 0:
            api.PyOS_AfterFork_Child()
            return 0
        api.PyOS_AfterFork_Parent()
        if pid < 0:
            raise SetupError(step="clone", errno=-pid)
        return pid


def _check(step: str, code: int) -> None:
    if code != 0:
        raise SetupError(step=step, errno=code)


def _setup_error(report: bytes) -> SetupError:
    """Turn the launcher's status line into an error (see ``native/step.h``)."""
    words = report.decode("utf-8", "replace").strip().split(" ", 3)
    if len(words) >= 3 and words[0] == "error" and words[2].isdigit():
        return SetupError(step=words[1], errno=int(words[2]), detail="".join(words[3:]))
    return SetupError(step="fork", detail="the jail died before it reported a step")
