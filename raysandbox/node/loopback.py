"""Run one of Ray's Python processes with its HTTP ports closed to the network.

``python -m raysandbox.node.loopback SCRIPT ARGS…``

Ray's agents, dashboard and monitor open plain HTTP ports (agent, metrics,
runtime environments) on the node's address or on every interface, and raylet
insists on the node's address for one of them. A socket filter keeps the address
and closes the port: it takes packets that came in over the loopback interface,
which is where a host's packets to its own address go, and drops all others
(socket(7), SO_ATTACH_FILTER). SO_BINDTODEVICE would not do: for a packet to the
host's own address the kernel counts the interface that has the address.

The filter is locked and is inherited by accepted connections. The gRPC ports of
the same processes are the gRPC library's own sockets, which speak mutual TLS,
and are left alone.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys

from raysandbox.node.become import become

__all__ = ["confine", "confine_listeners", "is_confined", "main"]

_INET = (socket.AF_INET, socket.AF_INET6)
# asm-generic/socket.h; Python names neither. Getting the attached filter back has
# the same number as attaching one.
SO_ATTACH_FILTER = SO_GET_FILTER = 26
SO_LOCK_FILTER = 44
# linux/bpf_common.h and linux/filter.h
_LD_W_ABS, _JEQ, _RET = 0x20, 0x15, 0x06
_SKF_AD_IFINDEX = 0x100000000 - 0x1000 + 8
_KEEP_ALL = 0xFFFFFFFF
_INSTRUCTION = struct.Struct("=HBBI")


def _program() -> bytes:
    """Return the filter: from `lo` all of the packet, from elsewhere nothing."""
    lo = socket.if_nametoindex("lo")
    return b"".join(
        _INSTRUCTION.pack(*instruction)
        for instruction in (
            (_LD_W_ABS, 0, 0, _SKF_AD_IFINDEX),
            (_JEQ, 0, 1, lo),
            (_RET, 0, 0, _KEEP_ALL),
            (_RET, 0, 0, 0),
        )
    )


def confine(sock: socket.socket) -> None:
    """Let a socket take nothing but what came in over loopback, for good."""
    program = _program()
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: count, padding, pointer.
    count = len(program) // _INSTRUCTION.size
    header = struct.pack("@HP", count, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, header)
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def is_confined(sock: socket.socket) -> bool:
    """Whether `confine` was done to a socket, as the kernel says."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = ctypes.create_string_buffer(4096 * _INSTRUCTION.size)
    # Counted in instructions, not in bytes, and so nothing for getsockopt of
    # Python's socket.
    count = ctypes.c_uint(4096)
    code = libc.getsockopt(
        sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, found, ctypes.byref(count)
    )
    program = _program()
    return code == 0 and found.raw[: count.value * _INSTRUCTION.size] == program


def confine_listeners() -> None:
    """Make every Python socket of this process listen on loopback alone."""
    original = socket.socket.listen

    def listen(self: socket.socket, *args: int) -> None:
        if self.family in _INET and not is_confined(self):
            confine(self)
        original(self, *args)

    # asyncio, aiohttp, http.server and wsgiref all listen through this class.
    socket.socket.listen = listen  # type: ignore[assignment,method-assign]


def main() -> None:
    """Confine, then become the script."""
    confine_listeners()
    # What the starter's directory holds is nothing of Ray's.
    del sys.path[0]
    become(sys.argv[1:])


if __name__ == "__main__":
    main()
