"""Stands where Ray Client's server would, and says why there is none.

``python no_client.py ADDRESS``

The server of ``ray://`` unpickles what its clients send, and runs it, in processes
of the head node that stand behind no wall and have the cluster's token. A node of
ours does not start it. `ray start` takes its processes' ends for failures, and a
client that finds nobody waits half a minute to say "timeout": so this answers each
client's first request with the reason, as nobody, without the token, and reads
nothing else.
"""

from __future__ import annotations

import os
import sys
import threading
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


def main(address: str) -> None:
    """Serve until the process that started this one ends it."""
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
                return

    server = grpc.server(
        ThreadPoolExecutor(_MOST_AT_ONCE),
        maximum_concurrent_rpcs=_MOST_AT_ONCE,
        options=[("grpc.max_receive_message_length", _MOST_BYTES)],
    )
    ray_client_pb2_grpc.add_RayletDriverServicer_to_server(Refusal(), server)
    ray_client_pb2_grpc.add_RayletDataStreamerServicer_to_server(Stream(), server)
    if server.add_insecure_port(address) == 0:
        raise SystemExit(f"raysandbox: can't listen on {address}")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    server.start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
