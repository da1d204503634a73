"""Attacks on privilege itself: keep a capability, or win one back."""

from __future__ import annotations

import ctypes
import os
import struct

from tests.attacks.probes.base import (
    Blocked,
    Context,
    addr,
    check,
    libc,
    probe,
    syscall,
)

PR_CAPBSET_READ, PR_CAP_AMBIENT, PR_SET_SECUREBITS = 23, 47, 28


def _status(name: str) -> str:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return line.split()[1]
    raise Blocked(f"no {name}")


def _caps(name: str) -> str:
    value = _status(name)
    if int(value, 16) == 0:
        raise Blocked(value)
    return value


@probe
def effective(context: Context) -> object:
    return _caps("CapEff")


@probe
def permitted(context: Context) -> object:
    return _caps("CapPrm")


@probe
def inheritable(context: Context) -> object:
    """Outside: a process may always put what it has into this set."""
    if context["side"] == "control":
        header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
        all_caps = int(_status("CapEff"), 16) & 0xFFFFFFFF
        data = ctypes.create_string_buffer(
            struct.pack("6I", all_caps, all_caps, all_caps, 0, 0, 0)
        )
        syscall("capset", addr(header), addr(data))
    return _caps("CapInh")


@probe
def bounding(context: Context) -> object:
    return _caps("CapBnd")


@probe
def ambient(context: Context) -> object:
    if context["side"] == "control":
        inheritable(context)
        check(libc.prctl(PR_CAP_AMBIENT, 2, 0, 0, 0))
    return _caps("CapAmb")


@probe
def bounding_by_prctl(context: Context) -> object:
    """Asks the kernel for each capability, past the last one it has."""
    kept = []
    for number in range(64):
        answer = int(libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0))
        if answer == 1:
            kept.append(number)
    if not kept:
        raise Blocked("none")
    return kept


@probe
def capset_raise(context: Context) -> object:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    one = 1 << 21
    data = ctypes.create_string_buffer(struct.pack("6I", one, one, 0, 0, 0, 0))
    syscall("capset", addr(header), addr(data))
    return "CAP_SYS_ADMIN"


@probe
def ambient_raise(context: Context) -> object:
    if context["side"] == "control":
        inheritable(context)
    check(libc.prctl(PR_CAP_AMBIENT, 2, 21, 0, 0))
    return "CAP_SYS_ADMIN"


@probe
def securebits(context: Context) -> object:
    check(libc.prctl(PR_SET_SECUREBITS, 0, 0, 0, 0))
    return "cleared"


@probe
def new_privileges(context: Context) -> object:
    """no_new_privs must be 1; without it exec could win privilege."""
    if _status("NoNewPrivs") == "1":
        raise Blocked("1")
    return _status("NoNewPrivs")


@probe
def clear_no_new_privs(context: Context) -> object:
    """There is no way back from 1; the kernel answers EINVAL to any try."""
    libc.prctl(38, 0, 0, 0, 0)
    if _status("NoNewPrivs") == "1":
        raise Blocked("1")
    return _status("NoNewPrivs")


@probe
def setuid_root(context: Context) -> object:
    os.setuid(0)
    return os.getuid()


@probe
def setresuid_other(context: Context) -> object:
    os.setresuid(1, 1, 1)
    return os.getuid()


@probe
def setuid_to_neighbour(context: Context) -> object:
    """Another jail's host uid is one number away."""
    neighbour = os.getuid() + 1
    if context["side"] == "control":
        neighbour = 12345
    os.setresuid(neighbour, neighbour, neighbour)
    return os.getuid()


@probe
def setgid_root(context: Context) -> object:
    os.setresgid(0, 0, 0)
    return os.getgid()


@probe
def setfsuid_root(context: Context) -> object:
    """setfsuid answers with the old id and no error; the second call tells."""
    wanted = 12345 if context["side"] == "control" else 0
    syscall("setfsuid", wanted)
    if syscall("setfsuid", -1) != wanted:
        raise Blocked("unchanged")
    return wanted


@probe
def chown_to_root(context: Context) -> object:
    path = f"{context['scratch']}/chown-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.chown(path, 0, 0)
    return "chowned"


@probe
def dac_override(context: Context) -> object:
    """A file of mode 0000 in the scratch opens only with a capability."""
    path = f"{context['scratch']}/closed-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0))
    os.close(os.open(path, os.O_RDONLY))
    return "opened"


@probe
def supplementary_groups(context: Context) -> object:
    """A group that the worker had (docker, disk) must not come along."""
    if context["side"] == "control":
        os.setgroups([44444])
    groups = [group for group in os.getgroups() if group != os.getgid()]
    if not groups:
        raise Blocked("none")
    return groups


@probe
def is_host_root(context: Context) -> object:
    """Outside: uid 0; inside neither uid may be 0."""
    ids = {*os.getresuid(), *os.getresgid()}
    if 0 in ids:
        return sorted(ids)
    raise Blocked("no id is 0")
