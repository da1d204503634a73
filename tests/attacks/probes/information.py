"""Attacks that only look: what a jail may know about node and neighbours."""

from __future__ import annotations

import os
import struct

from tests.attacks.probes.base import Blocked, Context, probe


def _text(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()


@probe
def environment(context: Context) -> object:
    """The variables of whoever started the jail, tokens among them."""
    found = [name for name in os.environ if name in context["secret_variables"]]
    if found:
        return found
    raise Blocked("none")


@probe
def environment_values(context: Context) -> object:
    text = _text("/proc/self/environ")
    if context["secret_value"] in text:
        return "found"
    raise Blocked("not found")


@probe
def hostname(context: Context) -> object:
    if os.uname().nodename == context["hostname"]:
        return context["hostname"]
    raise Blocked("another name")


@probe
def proc_sys_hostname(context: Context) -> object:
    if _text("/proc/sys/kernel/hostname").strip() == context["hostname"]:
        return context["hostname"]
    raise Blocked("another name")


@probe
def mounts_of_host(context: Context) -> object:
    """Each mount point must be one that the jail was given."""
    points = [line.split()[1] for line in _text("/proc/mounts").splitlines()]
    foreign = [point for point in points if point in context["host_only_mounts"]]
    if foreign:
        return foreign
    raise Blocked("none")


@probe
def kernel_command_line(context: Context) -> object:
    return len(_text("/proc/cmdline"))


@probe
def kallsyms_addresses(context: Context) -> object:
    addresses = {line.split()[0] for line in _text("/proc/kallsyms").splitlines()[:50]}
    if any(int(address, 16) for address in addresses):
        return "real addresses"
    raise Blocked("only zeros")


@probe
def proc_keys(context: Context) -> object:
    return len(_text("/proc/keys"))


@probe
def proc_key_users(context: Context) -> object:
    return len(_text("/proc/key-users"))


@probe
def proc_modules(context: Context) -> object:
    return len(_text("/proc/modules"))


@probe
def proc_config(context: Context) -> object:
    with open("/proc/config.gz", "rb") as file:
        return len(file.read())


@probe
def proc_interrupts(context: Context) -> object:
    """Counts per device time the keystrokes of others."""
    text = _text("/proc/interrupts")
    if not text:
        raise Blocked("empty")
    return len(text)


@probe
def proc_diskstats(context: Context) -> object:
    text = _text("/proc/diskstats")
    if not text:
        raise Blocked("empty")
    return len(text)


@probe
def proc_swaps(context: Context) -> object:
    text = _text("/proc/swaps")
    if not text:
        raise Blocked("empty")
    return len(text)


@probe
def proc_iomem(context: Context) -> object:
    return len(_text("/proc/iomem"))


@probe
def proc_scsi(context: Context) -> object:
    return len(os.listdir("/proc/scsi"))


@probe
def proc_acpi(context: Context) -> object:
    return len(os.listdir("/proc/acpi"))


@probe
def proc_slabinfo(context: Context) -> object:
    return len(_text("/proc/slabinfo"))


@probe
def proc_locks(context: Context) -> object:
    """Names inode and pid of every lock of the node."""
    text = _text("/proc/locks")
    if not text:
        raise Blocked("empty")
    return len(text)


@probe
def proc_vmallocinfo(context: Context) -> object:
    return len(_text("/proc/vmallocinfo"))


@probe
def proc_pagemap_frames(context: Context) -> object:
    """Physical frame numbers are what Rowhammer needs."""
    # The pages of a buffer of our own are present for sure.
    buffer = bytearray(8192)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek((id(buffer) // 4096) * 8)
        entry = struct.unpack("Q", file.read(8))[0]
    if entry & ((1 << 55) - 1):
        return "frame number"
    raise Blocked("frame number is zero")


@probe
def sys_devices(context: Context) -> object:
    # "system" with the numbers of the CPUs is what programs ask for.
    found = sorted(set(os.listdir("/sys/devices")) - {"system"})
    if not found:
        raise Blocked("nothing but system")
    return found


@probe
def sys_firmware(context: Context) -> object:
    return len(os.listdir("/sys/firmware"))


@probe
def sys_net(context: Context) -> object:
    return os.listdir("/sys/class/net")


@probe
def sys_debug(context: Context) -> object:
    return len(os.listdir("/sys/kernel/debug"))


@probe
def sys_security(context: Context) -> object:
    return len(os.listdir("/sys/kernel/security"))


@probe
def identity_maps(context: Context) -> object:
    """The whole range mapped would make each host id one's own."""
    fields = _text("/proc/self/uid_map").split()
    if len(fields) == 3 and fields[2] == "1":
        raise Blocked("one id")
    return fields


@probe
def parent_directory_names(context: Context) -> object:
    """Directories on the way to a bind must show the bind alone."""
    names = os.listdir(os.path.dirname(context["readonly"]))
    if names == [os.path.basename(context["readonly"])]:
        raise Blocked("only the bind")
    return names


@probe
def passwd_of_host(context: Context) -> object:
    """User names of the node; a jail gets a passwd of its own, or none."""
    text = _text("/etc/passwd")
    if context["passwd_line"] in text:
        return "host's accounts"
    raise Blocked("own file")


@probe
def login_records(context: Context) -> object:
    return os.stat("/var/log/wtmp").st_size


@probe
def boot_identity(context: Context) -> object:
    """boot_id ties jails of one node together; so does its machine id."""
    text = _text("/proc/sys/kernel/random/boot_id").strip()
    if text == context["boot_id"]:
        return text
    raise Blocked("another")


@probe
def parent_is_outside(context: Context) -> object:
    """getppid of the first process: 0 or a pid of the jail, never the host's."""
    chain = []
    pid = os.getppid()
    while pid > 1:
        chain.append(pid)
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    if context["launcher_pid"] in chain:
        return chain
    raise Blocked("ends in the jail")
