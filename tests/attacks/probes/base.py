"""What every probe stands on: raw system calls and the registry.

The modules of this package travel into the jail as text on stdin (see
:mod:`tests.attacks.harness`), so that no path of this repository has to be
visible in there.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

__all__ = [
    "ARCH",
    "PROBES",
    "Blocked",
    "Context",
    "NotHere",
    "addr",
    "check",
    "libc",
    "probe",
    "syscall",
]

Context = dict[str, Any]
Probe = Callable[[Context], object]

PROBES: dict[str, Probe] = {}
ARCH = platform.machine()

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Blocked(Exception):  # noqa: N818 - an outcome, not an error
    """The attack ran to its end and won nothing; the text says what it saw."""


class NotHere(Exception):  # noqa: N818 - the same
    """This host lacks what is being attacked; the text says what."""


# Numbers from the kernel's tables: x86-64, then the generic table of arm64
# (None: the call does not exist there).  From 424 on both agree.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "arch_prctl": (158, None),
    "bpf": (321, 280),
    "capset": (126, 91),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "get_robust_list": (274, 100),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "listmount": (458, 458),
    "lookup_dcookie": (212, 18),
    "lsm_list_modules": (461, 461),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "mincore": (27, 232),
    "modify_ldt": (154, None),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "remap_file_pages": (216, 234),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setattr": (314, 274),
    "seccomp": (317, 277),
    "setdomainname": (171, 162),
    "setfsuid": (122, 151),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmat": (30, 196),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "splice": (275, 76),
    "statmount": (457, 457),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "sysfs": (139, None),
    "tgkill": (234, 131),
    "timer_create": (222, 107),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
    "vmsplice": (278, 75),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(ARCH, 0)


def addr(value: Any) -> int:
    """Return the address of a ctypes object, for raw system calls."""
    return ctypes.addressof(value)


def check(result: int) -> int:
    """Return a C function's result, or raise its errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(name: str, *arguments: int | bytes | None) -> int:
    """Make a system call by name and return its result.

    Raises:
        OSError: With the kernel's errno.
        NotHere: If this architecture has no such call.
    """
    number = _NUMBERS[name][_COLUMN]
    if number is None:
        raise NotHere(f"no {name} on {ARCH}")
    full: list[Any] = []
    for argument in arguments:
        if isinstance(argument, bytes):
            full.append(ctypes.c_char_p(argument))
        else:
            full.append(ctypes.c_void_p((argument or 0) & (2**64 - 1)))
    full += [ctypes.c_void_p(0)] * (6 - len(full))
    ctypes.set_errno(0)
    return check(int(libc.syscall(ctypes.c_long(number), *full)))


def probe(function: Probe) -> Probe:
    """Register a probe under ``surface.name`` (its module and function)."""
    surface = function.__module__.rpartition(".")[2]
    PROBES[f"{surface}.{function.__name__}"] = function
    return function
