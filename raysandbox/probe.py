"""What this host and this user can give; asked of the kernel, not guessed."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from functools import cache

from raysandbox.errors import SetupError
from raysandbox.kernel import landlock

__all__ = ["Host", "probe"]

_SECCOMP_GET_ACTION_AVAIL = 2
_SECCOMP_RET_USER_NOTIF = 0x7FC00000
# What says nothing about the host: it may work a moment later.
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the running kernel offers to the calling user.

    Attributes:
        kernel: Release, as in ``uname -r``.
        arch: Machine, as in ``uname -m``.
        euid: Effective user id of the caller.
        landlock_abi: 0 if there is none.
        seccomp: Filters can be installed.
        seccomp_notify: Denied calls can go to a supervisor (Linux 5.0).
        namespaces_reason: Why a jail's namespaces can't be made; "" if they
            can.
        namespaces_remedy: What would change that.
    """

    kernel: str
    arch: str
    euid: int
    landlock_abi: int
    seccomp: bool
    seccomp_notify: bool
    namespaces_reason: str
    namespaces_remedy: str

    @property
    def is_root(self) -> bool:
        """Whether the caller may map ids other than its own."""
        return self.euid == 0


@cache
def probe() -> Host:
    """Ask the kernel once per process.

    Raises:
        SetupError: There was no process or descriptor to ask with; another
            time there may be.
    """
    arch = platform.machine()
    filters, notify = _seccomp(arch)
    reason, remedy = _namespaces()
    return Host(
        kernel=platform.release(),
        arch=arch,
        euid=os.geteuid(),
        landlock_abi=landlock.abi_version(),
        seccomp=filters,
        seccomp_notify=notify,
        namespaces_reason=reason,
        namespaces_remedy=remedy,
    )


def _seccomp(arch: str) -> tuple[bool, bool]:
    number = _SYS_SECCOMP.get(arch)
    if number is None:
        return False, False
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(_SECCOMP_RET_USER_NOTIF)
    result = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_uint(_SECCOMP_GET_ACTION_AVAIL),
        ctypes.c_uint(0),
        ctypes.byref(action),
    )
    if result == 0:
        return True, True
    return ctypes.get_errno() == errno.EOPNOTSUPP, False


def _namespaces() -> tuple[str, str]:
    """Make all namespaces in a child, write its map, mount a /proc: as a jail does."""
    flags = 0x10000000 | 0x20000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000
    uid, gid = os.geteuid(), os.getegid()
    try:
        read_end, write_end = os.pipe()
    except OSError as error:
        raise SetupError(step="probe", errno=error.errno or 0) from error
    try:
        pid = os.fork()
    except OSError as error:
        os.close(read_end)
        os.close(write_end)
        raise SetupError(step="probe", errno=error.errno or 0) from error
    if pid == 0:
        step, code = b"unshare", 0
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(flags) != 0:
                code = ctypes.get_errno()
            else:
                step = b"uid_map"
                for name, text in (
                    ("setgroups", "deny"),
                    ("uid_map", f"0 {uid} 1"),
                    ("gid_map", f"0 {gid} 1"),
                ):
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
                step = b"mount_proc"
                grandchild = os.fork()
                if grandchild == 0:
                    result = libc.mount(b"proc", b"/proc", b"proc", 14, None)
                    os._exit(ctypes.get_errno() if result != 0 else 0)
                _, status = os.waitpid(grandchild, 0)
                code = os.waitstatus_to_exitcode(status)
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            # The parent reads the end of the pipe if even this fails.
            os.write(write_end, struct.pack("<i", code) + step)
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    if len(answer) < 4:
        return "the probe died", "look at the kernel log"
    (code,) = struct.unpack("<i", answer[:4])
    if code == 0:
        return "", ""
    failed = answer[4:].decode()
    if code in _PASSING:
        raise SetupError(step="probe", errno=code, detail=failed)
    return f"{failed}: {os.strerror(code)}", _remedy(failed, code)


def _remedy(step: str, code: int) -> str:
    if step == "mount_proc":
        return (
            "give the container an unmasked /proc "
            "(docker: --security-opt systempaths=unconfined)"
        )
    if code == errno.ENOSPC:
        return "raise /proc/sys/user/max_user_namespaces and its siblings"
    return (
        "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 and "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp "
        "profile that lets unshare and mount through"
    )
