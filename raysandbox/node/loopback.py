"""Run one of Ray's Python processes with its HTTP ports closed to the network.

``python -m raysandbox.node.loopback SCRIPT ARGS…``

Ray's agents, dashboard and monitor open plain HTTP ports (agent, metrics,
runtime environments) on the node's address or on every interface, and raylet
insists on the node's address for one of them. SO_BINDTODEVICE on ``lo`` keeps
the address and closes the port: the kernel hands the socket only what came in
over loopback, which is where a host's packets to its own address go. The gRPC
ports of the same processes are the gRPC library's own sockets, which speak
mutual TLS, and are left alone.
"""

from __future__ import annotations

import runpy
import socket
import sys

__all__ = ["confine_listeners", "main"]

_INET = (socket.AF_INET, socket.AF_INET6)


def confine_listeners() -> None:
    """Make every Python socket of this process listen on loopback alone."""
    original = socket.socket.listen

    def listen(self: socket.socket, *args: int) -> None:
        if self.family in _INET:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        original(self, *args)

    # asyncio, aiohttp, http.server and wsgiref all listen through this class.
    socket.socket.listen = listen  # type: ignore[assignment,method-assign]


def main() -> None:
    """Confine, then become the script."""
    confine_listeners()
    sys.argv = sys.argv[1:]
    script = sys.argv[0]
    # As `python SCRIPT` does: the agents import their siblings.
    sys.path[0] = script.rpartition("/")[0]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
