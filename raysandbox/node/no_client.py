"""Stands where Ray Client's server would, and says why there is none.

``python no_client.py ADDRESS GCS_ADDRESS NAME``, the name being one by which
`ray stop` knows it.

The server of ``ray://`` unpickles what its clients send, and runs it, in processes
of the head node that stand behind no wall and have the cluster's token. A node of
ours does not start it. `ray start` takes its processes' ends for failures, and a
client that finds nobody waits half a minute to say "timeout": so this answers each
client's first request with the reason, as nobody, without the token, and reads
nothing else. Where somebody else has the port it waits until that is free, since
its end would be the node's. It ends when the GCS has ended.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["REASON", "main"]

REASON = (
    "raysandbox: Ray Client (ray://) is not served by this node, since its server runs "
    "clients' code outside of every sandbox. Connect as a driver instead: "
    "ray.init(address='HOST:PORT') on a machine of the cluster"
)
_NOBODY = 65534
_MOST_AT_ONCE = 8
_MOST_BYTES = 1 << 20
_LOOK_S, _MISSES = 1.0, 5
_LINGER_S = 3.0


class _Gcs:
    """Tells whether a GCS has ended: nobody has listened there for some looks."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._missed = 0

    def ended(self) -> bool:
        """Wait for a moment, then look."""
        time.sleep(_LOOK_S)
        try:
            socket.create_connection(self._address, 5).close()
            self._missed = 0
        except OSError:
            self._missed += 1
        return self._missed >= _MISSES


def _is_free(address: str) -> bool:
    """Whether one could listen there; gRPC's own attempt would fill the log."""
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
            probe.listen(1)
        except OSError:
            return False
    return True


def _listens(server: Any, address: str) -> bool:
    try:
        return _is_free(address) and server.add_insecure_port(address) != 0
    except RuntimeError:  # somebody was faster
        return False


def main(address: str, gcs: str) -> None:
    """Serve until this process is ended, or the GCS has.

    Args:
        address: Where to listen, as host:port.
        gcs: The GCS's.
    """
    # From the node's packages, not from this file's directory.
    sys.path[0] = __file__.rpartition("/raysandbox/")[0]
    import grpc
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc

    class Refusal(ray_client_pb2_grpc.RayletDriverServicer):  # type: ignore[misc]
        def ClusterInfo(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC
            return messages.ClusterInfoResponse(type=request.type, json="true")

    class Stream(ray_client_pb2_grpc.RayletDataStreamerServicer):  # type: ignore[misc]
        def Datapath(  # noqa: N802 - gRPC's name
            self, requests: Iterable[Any], context: Any
        ) -> Iterator[Any]:
            for request in requests:
                yield messages.DataResponse(
                    req_id=request.req_id,
                    init=messages.InitResponse(ok=False, msg=REASON),
                )
                # A client whose stream ends with the answer may not see the answer.
                until = time.monotonic() + _LINGER_S
                while context.is_active() and time.monotonic() < until:
                    time.sleep(0.05)
                return

    its_gcs = _Gcs(gcs)
    server = grpc.server(
        ThreadPoolExecutor(_MOST_AT_ONCE),
        maximum_concurrent_rpcs=_MOST_AT_ONCE,
        # Nobody shares the port, be it as nobody.
        options=[
            ("grpc.max_receive_message_length", _MOST_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    ray_client_pb2_grpc.add_RayletDriverServicer_to_server(Refusal(), server)
    ray_client_pb2_grpc.add_RayletDataStreamerServicer_to_server(Stream(), server)
    said = False
    while not _listens(server, address):
        if not said:
            sys.stderr.write(
                f"raysandbox: {address}, where clients of ray:// would be told why "
                "they are not served, is another process's. The node goes on; what "
                "answers there is not this node's. Choose a free port with "
                "--ray-client-server-port\n"
            )
            sys.stderr.flush()
            said = True
        if its_gcs.ended():
            return
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    server.start()
    while not its_gcs.ended():
        pass
    server.stop(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
