"""Attacks through descriptors: what was left open, and what it can become."""

from __future__ import annotations

import fcntl
import os
import socket
import stat

from tests.attacks.probes.base import Blocked, Context, probe


def _open_fds() -> list[int]:
    """Descriptors that are open right now, without the one that lists them."""
    found = []
    for fd in range(4096):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue
        found.append(fd)
    return found


@probe
def leaked_file(context: Context) -> object:
    """The parent left a secret file open without close-on-exec."""
    os.lseek(context["leaked_fd"], 0, os.SEEK_SET)
    return os.read(context["leaked_fd"], 16).decode()


@probe
def leaked_high_number(context: Context) -> object:
    """Closing up to some number, or up to RLIMIT_NOFILE, misses this one."""
    return os.pread(context["leaked_high_fd"], 16, 0).decode()


@probe
def leaked_directory(context: Context) -> object:
    """A directory descriptor of the host is a way around the new root."""
    fd = os.open("secret", os.O_RDONLY, dir_fd=context["leaked_dir_fd"])
    return os.read(fd, 16).decode()


@probe
def leaked_socket(context: Context) -> object:
    with socket.socket(fileno=os.dup(context["leaked_socket_fd"])) as sock:
        return sock.send(b"x")


@probe
def leaked_namespace(context: Context) -> object:
    """An open /proc/self/ns/mnt of the host is the way back."""
    return os.fstat(context["leaked_ns_fd"]).st_ino


@probe
def more_than_standard(context: Context) -> object:
    """Exactly 0, 1 and 2, and the pipe that this probe answers through."""
    extra = [fd for fd in _open_fds() if fd > 2]
    pipes = [fd for fd in extra if stat.S_ISFIFO(os.fstat(fd).st_mode)]
    if extra == pipes and len(extra) <= 1:
        raise Blocked("0, 1, 2")
    return extra


@probe
def listing_matches(context: Context) -> object:
    """/proc/self/fd shows what is open; nothing may hide from the scan."""
    listed = [os.readlink(f"/proc/self/fd/{fd}") for fd in _open_fds() if fd > 2]
    foreign = [name for name in listed if not name.startswith("pipe:")]
    if foreign:
        return foreign
    raise Blocked("only the answer's pipe")


@probe
def reopen_stdin_for_writing(context: Context) -> object:
    """stdin was opened read-only; /proc/self/fd/0 opens the inode anew."""
    fd = os.open("/proc/self/fd/0", os.O_RDWR)
    os.pwrite(fd, b"changed", 0)
    return "rewrote the input"


@probe
def truncate_stdin(context: Context) -> object:
    os.truncate("/proc/self/fd/0", 0)
    return "emptied the input"


@probe
def chmod_stdin(context: Context) -> object:
    os.fchmod(0, 0o604)
    return "changed its mode"


@probe
def chown_stdin(context: Context) -> object:
    os.fchown(0, os.getuid(), os.getgid())
    return "changed its owner"


@probe
def xattr_stdin(context: Context) -> object:
    os.setxattr(0, b"user.raysandbox", b"1")
    return "set an attribute"


@probe
def utime_stdin(context: Context) -> object:
    os.utime(0, (1, 1))
    return "changed its times"


@probe
def link_stdin(context: Context) -> object:
    """Give the input a name in the scratch: a way to keep it."""
    target = f"{context['scratch']}/kept-{os.getpid()}"
    os.link("/proc/self/fd/0", target, follow_symlinks=True)
    return target


@probe
def directory_of_stdin(context: Context) -> object:
    """The magic link's parent would be a directory of the host."""
    path = os.readlink("/proc/self/fd/0")
    return os.listdir(os.path.dirname(path))


@probe
def stdin_name_tells_host_path(context: Context) -> object:
    """readlink of a descriptor whose file lies outside the root."""
    name = os.readlink("/proc/self/fd/0")
    if context["stdin_path"] == name:
        return name
    raise Blocked(f"another name: {name}")


@probe
def terminal(context: Context) -> object:
    """/dev/tty opens the controlling terminal, whatever 0, 1, 2 are."""
    os.close(os.open("/dev/tty", os.O_RDWR))
    return "opened"
