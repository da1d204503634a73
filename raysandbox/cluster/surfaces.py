"""What listens on this machine, and whether it is open to the network in clear.

The kernel is asked (sock_diag(7)), not the configuration: every listening TCP
socket of the given processes, with the interface that it is bound to and the
filter that is attached to it. A socket on loopback, bound to `lo` or filtered by
`raysandbox.node.loopback` is closed to the network. Any other must refuse
whoever does not speak TLS: it is spoken to in plain HTTP/2 and HTTP/1, and what
answers with anything but a TLS alert or a closed connection is open.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raysandbox.node import loopback

__all__ = [
    "Listener",
    "listeners_of",
    "listening",
    "open_in_clear",
    "processes_of",
]

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_DONE = 1, 0x300, 3
TCP_LISTEN = 10
# The same number on every 64-bit architecture that Ray has wheels for.
SYS_PIDFD_GETFD = 438
# struct inet_diag_msg up to idiag_inode (linux/inet_diag.h).
_MESSAGE = struct.Struct("=4B2s2s16s16sI2I5I")


class Listener:
    """One listening socket: who, where, and behind which interface."""

    def __init__(self, address: str, port: int, interface: str, inode: int) -> None:
        self.address, self.port = address, port
        self.interface, self.inode = interface, inode
        self.pid = 0
        self.command = ""
        self.confined = False

    @property
    def local(self) -> bool:
        """Whether the network can't reach it."""
        ip = ipaddress.ip_address(self.address)
        mapped = getattr(ip, "ipv4_mapped", None)
        return self.interface == "lo" or (mapped or ip).is_loopback or self.confined

    def __str__(self) -> str:
        """Return address, port and process."""
        return f"{self.address}:{self.port} ({self.command or 'pid'} {self.pid})"


def listening() -> list[Listener]:
    """Return every listening TCP socket of this network namespace."""
    found = []
    names = dict(socket.if_nameindex())
    for family in (socket.AF_INET, socket.AF_INET6):
        for raw in _dump(family):
            fields = _MESSAGE.unpack_from(raw)
            port = int.from_bytes(fields[4], "big")
            size = 4 if family == socket.AF_INET else 16
            address = str(ipaddress.ip_address(fields[6][:size]))
            found.append(Listener(address, port, names.get(fields[8], ""), fields[-1]))
    return found


def _dump(family: int) -> list[bytes]:
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 1 << TCP_LISTEN)
    request += bytes(48)
    header = struct.pack(
        "=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP,
        1, 0,
    )  # fmt: skip
    found: list[Any] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(5)
        sock.sendto(header + request, (0, 0))
        while True:
            data = sock.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_DONE:
                    return found
                if kind != SOCK_DIAG_BY_FAMILY:
                    raise OSError("sock_diag answered with an error")
                found.append(data[16:length])
                data = data[(length + 3) & ~3 :]


def processes_of(roots: Iterable[int]) -> set[int]:
    """Return the processes and all that descend from them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = set(roots)
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listeners_of(pids: Iterable[int]) -> list[Listener]:
    """Return what processes listen at."""
    by_inode = {item.inode: item for item in listening()}
    mine = []
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
            command = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:["):
                item = by_inode.pop(int(target[8:-1]), None)
                if item is not None:
                    item.pid, item.command = pid, command
                    item.confined = _is_confined(pid, int(name))
                    mine.append(item)
    return mine


def _is_confined(pid: int, fd: int) -> bool:
    """Ask the kernel for the filter of another process's socket.

    Whatever goes wrong counts as no filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        copy = libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        return False
    with socket.socket(fileno=copy) as sock:
        return loopback.is_confined(sock)


def open_in_clear(roots: Iterable[int]) -> list[str]:
    """Return what the processes leave open to the network without TLS."""
    problems = []
    for item in listeners_of(processes_of(roots)):
        if item.local:
            continue
        spoke = _speaks_clear(item)
        if spoke:
            problems.append(f"{item} answers {spoke}")
    return problems


def _speaks_clear(item: Listener) -> str:
    ip = ipaddress.ip_address(item.address)
    host = item.address
    if ip.is_unspecified:
        host = "127.0.0.1"
    elif getattr(ip, "ipv4_mapped", None):
        host = str(ip.ipv4_mapped)  # type: ignore[union-attr]
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    for name, probe in (
        ("HTTP/2 in clear", settings),
        ("HTTP in clear", b"GET / HTTP/1.0\r\n\r\n"),
    ):
        try:
            with socket.create_connection((host, item.port), timeout=2) as sock:
                sock.sendall(probe)
                answer = sock.recv(16)
        except TimeoutError:
            return "nothing, and does not hang up on a stranger"
        except OSError:
            continue
        # 21 is TLS's alert record: "this is not TLS".
        if answer and answer[0] != 21:
            return name
    return ""
