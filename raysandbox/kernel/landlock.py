"""Landlock through ctypes: rights by ABI, and restricting this process.

The jail's own rules are applied by the launcher from the plan; here are the
table that the plan is made from, the probe, :func:`restrict_self` for a process
of one thread, and :func:`create_ruleset` for whoever applies it otherwise.

Source: ``Documentation/userspace-api/landlock.rst`` and
``include/uapi/linux/landlock.h`` of Linux 6.18.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = [
    "CONNECT_TCP",
    "EXECUTE",
    "FILE_RIGHTS",
    "IOCTL_DEV",
    "READ",
    "READ_DIR",
    "READ_FILE",
    "SCOPE_SIGNAL",
    "WRITE",
    "WRITE_FILE",
    "Handled",
    "abi_version",
    "create_ruleset",
    "handled",
    "restrict_self",
    "scopes_signals_of_threads",
]

_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_CREATE_RULESET_ERRATA = 2
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2
# Erratum 2: signals between threads of one process are not scoped (6.15 and
# the stable kernels that took it).
_ERRATUM_THREADS = 1 << 1
_PR_SET_NO_NEW_PRIVS = 38

# Rights on files and directories, in the kernel's order (bit = position).
_FS_RIGHTS = (
    "EXECUTE",
    "WRITE_FILE",
    "READ_FILE",
    "READ_DIR",
    "REMOVE_DIR",
    "REMOVE_FILE",
    "MAKE_CHAR",
    "MAKE_DIR",
    "MAKE_REG",
    "MAKE_SOCK",
    "MAKE_FIFO",
    "MAKE_BLOCK",
    "MAKE_SYM",
    "REFER",
    "TRUNCATE",
    "IOCTL_DEV",
)
_BIT = {name: 1 << bit for bit, name in enumerate(_FS_RIGHTS)}
EXECUTE = _BIT["EXECUTE"]
WRITE_FILE = _BIT["WRITE_FILE"]
READ_FILE = _BIT["READ_FILE"]
READ_DIR = _BIT["READ_DIR"]
IOCTL_DEV = _BIT["IOCTL_DEV"]
BIND_TCP = 1 << 0
CONNECT_TCP = 1 << 1
SCOPE_SIGNAL = 1 << 1

#: Read and execute below a directory.
READ = EXECUTE | READ_FILE | READ_DIR
#: Everything but device nodes and their ioctls; links and renames included.
WRITE = sum(
    _BIT[name] for name in _FS_RIGHTS if name not in ("MAKE_CHAR", "MAKE_BLOCK")
) & ~(IOCTL_DEV)
#: What makes sense on something that is not a directory.
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | _BIT["TRUNCATE"] | IOCTL_DEV


class Handled(NamedTuple):
    """What a ruleset governs: what it does not then allow is denied.

    Attributes:
        fs: Mask of file-system rights.
        net: Mask of TCP rights (1: bind, 2: connect).
        scoped: Mask of scopes (1: abstract unix sockets, 2: signals).
    """

    fs: int
    net: int
    scoped: int


# What each ABI adds: number of fs rights, net rights, scopes.
# 1: Linux 5.13; 2 (REFER): 5.19; 3 (TRUNCATE): 6.2; 4 (TCP): 6.7;
# 5 (IOCTL_DEV): 6.10; 6 (scopes): 6.12; 7 (audit logging only): 6.15.
_ABI = {
    1: Handled((1 << 13) - 1, 0, 0),
    2: Handled((1 << 14) - 1, 0, 0),
    3: Handled((1 << 15) - 1, 0, 0),
    4: Handled((1 << 15) - 1, 3, 0),
    5: Handled((1 << 16) - 1, 3, 0),
    6: Handled((1 << 16) - 1, 3, 3),
    7: Handled((1 << 16) - 1, 3, 3),
}


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _NetPortAttr(ctypes.Structure):
    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (
        ("allowed_access", ctypes.c_uint64),
        ("parent_fd", ctypes.c_int32),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def abi_version() -> int:
    """Return the running kernel's Landlock ABI, or 0 if it has none.

    Raises:
        OSError: For any errno but ENOSYS (not built in) and EOPNOTSUPP
            (off at boot). Reading those as 0 would hide a broken probe.
    """
    try:
        return _syscall(
            _SYS_CREATE_RULESET,
            None,
            ctypes.c_size_t(0),
            ctypes.c_uint32(_CREATE_RULESET_VERSION),
        )
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def handled(abi: int) -> Handled:
    """Return all that a kernel of this ABI can govern (0: nothing).

    An ABI newer than the table is used as the newest one known.
    """
    if abi <= 0:
        return Handled(0, 0, 0)
    return _ABI[min(abi, max(_ABI))]


def restrict_self(
    paths: Mapping[str, int], *, abi: int | None = None, scoped: bool = True
) -> Handled:
    """Confine the calling thread, and what it starts, to ``paths``.

    The process must have one thread: the rules hold for the calling thread
    alone. Sets no_new_privs. There is no way back.

    Args:
        paths: Allowed rights by path; rights unknown to the ABI are left out.
        abi: Govern what this ABI has; None for what the kernel has.
        scoped: Also forbid signals and abstract sockets to the outside.

    Returns:
        What is governed from now on.

    Raises:
        OSError: A step failed; nothing was restricted.
        RuntimeError: More than one thread, or no Landlock at all.
    """
    abi = abi_version() if abi is None else abi
    governed = handled(abi)
    if not governed.fs:
        raise RuntimeError("this kernel has no Landlock")
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("Landlock would hold for one of several threads only")
    if not scoped:
        governed = governed._replace(scoped=0)
    ruleset = create_ruleset(paths, governed)
    try:
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
        _syscall(_SYS_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return governed


def scopes_signals_of_threads() -> bool:
    """Say whether a signal scope set by each thread leaves the others reachable.

    Without that a process whose threads restrict themselves one by one could
    not signal itself any more.
    """
    try:
        errata = _syscall(
            _SYS_CREATE_RULESET,
            None,
            ctypes.c_size_t(0),
            ctypes.c_uint32(_CREATE_RULESET_ERRATA),
        )
    except OSError:
        return False  # a kernel before errata were told
    return bool(errata & _ERRATUM_THREADS)


def create_ruleset(
    paths: Mapping[str, int],
    governed: Handled,
    connect_ports: Iterable[int] = (),
    bind_ports: Iterable[int] = (),
) -> int:
    """Make a ruleset and return its descriptor; nothing is restricted by it yet.

    Args:
        paths: Allowed rights by path; rights that are not governed are left out.
        governed: What the ruleset denies where no rule allows it.
        connect_ports: TCP ports that may be connected to.
        bind_ports: Those that may be bound.

    Raises:
        OSError: The kernel refused a part of it, or a path is not there.
    """
    attr = _RulesetAttr(*governed)
    ruleset = _syscall(
        _SYS_CREATE_RULESET,
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
        ctypes.c_uint32(0),
    )
    try:
        _add_paths(ruleset, paths.items(), governed.fs)
        _add_ports(ruleset, connect_ports, CONNECT_TCP & governed.net)
        _add_ports(ruleset, bind_ports, BIND_TCP & governed.net)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _add_ports(ruleset: int, ports: Iterable[int], access: int) -> None:
    if not access:
        return
    rule = _NetPortAttr(access, 0)
    # There may be tens of thousands: what does not change is made once.
    arguments = (
        ctypes.c_long(_SYS_ADD_RULE),
        ctypes.c_int(ruleset),
        ctypes.c_int(_RULE_NET_PORT),
        ctypes.byref(rule),
        ctypes.c_uint32(0),
    )
    for port in ports:
        rule.port = port
        if _libc.syscall(*arguments) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _add_paths(ruleset: int, rules: Iterable[tuple[str, int]], governed: int) -> None:
    for path, access in rules:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            allowed = access & governed
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                allowed &= FILE_RIGHTS
            rule = _PathBeneathAttr(allowed, fd)
            _syscall(
                _SYS_ADD_RULE,
                ctypes.c_int(ruleset),
                ctypes.c_int(_RULE_PATH_BENEATH),
                ctypes.byref(rule),
                ctypes.c_uint32(0),
            )
        finally:
            os.close(fd)
