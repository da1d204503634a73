"""Attacks on the namespaces: make new ones, join others, escape the cgroup."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import time

from tests.attacks.probes.base import Blocked, Context, addr, libc, probe, syscall

NEW = {
    "time": 0x00000080,
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
NS_GET_USERNS, NS_GET_PARENT = 0xB701, 0xB702


def _unshare(name: str) -> str:
    syscall("unshare", NEW[name])
    return f"new {name} namespace"


@probe
def unshare_user(context: Context) -> object:
    return _unshare("user")


@probe
def unshare_mount(context: Context) -> object:
    return _unshare("mount")


@probe
def unshare_pid(context: Context) -> object:
    return _unshare("pid")


@probe
def unshare_network(context: Context) -> object:
    return _unshare("network")


@probe
def unshare_ipc(context: Context) -> object:
    return _unshare("ipc")


@probe
def unshare_uts(context: Context) -> object:
    return _unshare("uts")


@probe
def unshare_cgroup(context: Context) -> object:
    return _unshare("cgroup")


@probe
def unshare_time(context: Context) -> object:
    return _unshare("time")


@probe
def unshare_user_and_mount(context: Context) -> object:
    """The first step of most kernel exploits of the last decade."""
    syscall("unshare", NEW["user"] | NEW["mount"] | NEW["network"])
    return "capabilities in a new user namespace"


def _clone(flags: int) -> str:
    child = syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "cloned"


@probe
def clone_new_user(context: Context) -> object:
    return _clone(NEW["user"])


@probe
def clone_new_pid(context: Context) -> object:
    return _clone(NEW["pid"])


@probe
def clone_new_network(context: Context) -> object:
    return _clone(NEW["network"])


@probe
def clone_new_mount_user(context: Context) -> object:
    return _clone(NEW["user"] | NEW["mount"])


@probe
def clone_flags_in_high_half(context: Context) -> object:
    """A filter that compares 64 bits misses flags beside garbage above them."""
    return _clone(NEW["user"] | 1 << 40)


@probe
def clone3_new_user(context: Context) -> object:
    """clone3 hides its flags behind a pointer that no filter can read."""
    arguments = (ctypes.c_uint64 * 8)(NEW["user"], 0, 0, 0, signal.SIGCHLD)
    child = syscall("clone3", addr(arguments), 64)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "cloned"


@probe
def clone3_plain(context: Context) -> object:
    arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, signal.SIGCHLD)
    child = syscall("clone3", addr(arguments), 64)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "cloned"


def _setns(path: str, kind: int) -> str:
    fd = os.open(path, os.O_RDONLY)
    syscall("setns", fd, kind)
    return "joined"


@probe
def setns_init_mount(context: Context) -> object:
    return _setns(f"/proc/{context['init_pid']}/ns/mnt", NEW["mount"])


@probe
def setns_init_network(context: Context) -> object:
    return _setns(f"/proc/{context['init_pid']}/ns/net", NEW["network"])


@probe
def setns_init_user(context: Context) -> object:
    """Reading the link already needs what ptrace needs."""
    os.close(os.open(f"/proc/{context['init_pid']}/ns/user", os.O_RDONLY))
    return "opened"


@probe
def setns_own_uts(context: Context) -> object:
    return _setns("/proc/self/ns/uts", NEW["uts"])


@probe
def setns_by_pidfd(context: Context) -> object:
    pidfd = syscall("pidfd_open", os.getpid(), 0)
    syscall("setns", pidfd, NEW["uts"])
    return "joined"


def _namespace_to_leave(context: Context, name: str, flags: int) -> int:
    """Our own namespace; outside, one below ours, from which up is allowed."""
    if context["side"] != "control":
        return os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        syscall("unshare", flags)
        if os.fork() == 0:
            os.write(done, b"x")
            # Not by a signal: pid 1 of a namespace ignores its own.
            time.sleep(5)
            os._exit(0)
        os.wait()
        os._exit(0)
    os.read(ready, 1)
    return os.open(f"/proc/{child}/ns/{name}", os.O_RDONLY)


@probe
def parent_of_user_namespace(context: Context) -> object:
    fd = _namespace_to_leave(context, "user", NEW["user"])
    return fcntl.ioctl(fd, NS_GET_PARENT)


@probe
def parent_of_pid_namespace(context: Context) -> object:
    kind = "pid_for_children" if context["side"] == "control" else "pid"
    fd = _namespace_to_leave(context, kind, NEW["user"] | NEW["pid"])
    return fcntl.ioctl(fd, NS_GET_PARENT)


@probe
def owner_of_mount_namespace(context: Context) -> object:
    """NS_GET_USERNS leads from a namespace to the one that owns it."""
    fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    return fcntl.ioctl(fd, NS_GET_USERNS)


@probe
def same_namespaces_as_host(context: Context) -> object:
    """Each namespace of the jail must be another one than the host's."""
    shared = [
        name
        for name, inode in context["host_namespaces"].items()
        if os.stat(f"/proc/self/ns/{name}").st_ino == inode
    ]
    if shared:
        return shared
    raise Blocked("none shared")


@probe
def set_hostname(context: Context) -> object:
    name = os.uname().nodename.encode()
    syscall("sethostname", name, len(name))
    return "set"


@probe
def set_domainname(context: Context) -> object:
    syscall("setdomainname", b"raysandbox", 10)
    return "set"


def _cgroup_write(context: Context, name: str, text: str) -> str:
    with open(f"{context['cgroup_dir']}/{name}", "w") as file:
        file.write(text)
    return "written"


@probe
def cgroup_leave(context: Context) -> object:
    """Join another group of the host, and be without limits."""
    return _cgroup_write(context, "cgroup.procs", "0")


@probe
def cgroup_raise_pids(context: Context) -> object:
    return _cgroup_write(context, "pids.max", "max")


@probe
def cgroup_release_agent(context: Context) -> object:
    os.close(os.open(context["release_agent"], os.O_WRONLY))
    return "opened"


@probe
def cgroup_notify_on_release(context: Context) -> object:
    return _cgroup_write(context, "notify_on_release", "0")


@probe
def cgroup_path_of_host(context: Context) -> object:
    """/proc/self/cgroup must be seen from the jail's own cgroup root."""
    with open("/proc/self/cgroup") as file:
        text = file.read()
    paths = {line.split(":", 2)[2] for line in text.splitlines()}
    if paths <= {"/"}:
        raise Blocked("only /")
    return sorted(paths)


@probe
def list_mounts_of_parent(context: Context) -> object:
    """listmount can name another mount namespace; outside: the own root's."""
    request = ctypes.create_string_buffer(
        struct.pack("IIQQQ", 32, 0, 2**64 - 1, 0, context["host_mount_namespace"])
    )
    ids = (ctypes.c_uint64 * 256)()
    return syscall("listmount", addr(request), addr(ids), 256, 0)


@probe
def map_root_in_nested_namespace(context: Context) -> object:
    """uid 0 of a nested namespace, with every capability over what it owns."""
    uid = os.getuid()
    syscall("unshare", NEW["user"])
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {uid} 1")
    libc.setuid(0)
    return os.getuid()


@probe
def set_groups(context: Context) -> object:
    """Dropping a group can win what was denied to that group."""
    os.setgroups([])
    return "set"
