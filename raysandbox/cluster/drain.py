"""Take a node out of Ray gently: no new tasks, and those that run are finished.

Ray's own DrainNode does it, asked for through the guard as the operator (or the
head) that the cluster directory belongs to, so it is in the audit log like any
call. A drained raylet ends by itself once nothing runs on it any more; an actor
runs until it is killed, so there is a time after which one stops waiting.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
from ray.core.generated import (
    autoscaler_pb2,
    autoscaler_pb2_grpc,
    common_pb2,
    gcs_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
)

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir, read_secret

__all__ = ["drain"]

CALL_S = 10.0
LOOK_S = 0.2
# Of what still runs, so many are looked at; clients chose their names.
MOST, NAME_CHARS = 10_000, 80
_scaler: Any = autoscaler_pb2
_service: Any = gcs_service_pb2
_gcs: Any = gcs_pb2
_common: Any = common_pb2


def drain(cluster: ClusterDir, name: str, within_s: float) -> list[str]:
    """Have Ray drain a node, and wait until it has left.

    Args:
        cluster: The head's or an operator's directory.
        name: The node's name in the inventory.
        within_s: How long to wait for what runs there.

    Returns:
        Nothing if it has left. Else it takes no new tasks, and still runs these:
        tasks and actors by their names and ids, as Ray has them.

    Raises:
        ClusterError: Nothing was drained: no such node is in the cluster, or the
            guard or Ray refused.
    """
    settings = cluster.settings()
    credentials = grpc.ssl_channel_credentials(
        cluster.ca_cert.read_bytes(),
        read_secret(cluster.key("cli")),
        cluster.cert("cli").read_bytes(),
    )
    token = read_secret(cluster.token).decode().strip()
    how: Any = {
        "metadata": (("authorization", f"Bearer {token}"),), "timeout": CALL_S
    }  # fmt: skip
    address = f"{settings.head_address}:{settings.port}"
    with grpc.secure_channel(address, credentials) as channel:
        nodes: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        scaler: Any = autoscaler_pb2_grpc.AutoscalerStateServiceStub(channel)

        def alive() -> list[bytes]:
            reply = nodes.GetAllNodeInfo(_service.GetAllNodeInfoRequest(), **how)
            return [
                info.node_id
                for info in reply.node_info_list
                if info.node_name == name and info.state == _gcs.GcsNodeInfo.ALIVE
            ]

        try:
            found = alive()
            if not found:
                raise ClusterError(where=name, what="is no node that is in the cluster")
            for node_id in found:
                reply = scaler.DrainNode(
                    _scaler.DrainNodeRequest(
                        node_id=node_id,
                        # Of the two reasons the one that a busy node accepts.
                        reason=_scaler.DRAIN_NODE_REASON_PREEMPTION,
                        reason_message="drained by its operator",
                        deadline_timestamp_ms=int((time.time() + within_s) * 1000),
                    ),
                    **how,
                )
                if not reply.is_accepted:
                    raise ClusterError(
                        where=name,
                        what=f"is not drained: {reply.rejection_reason_message}",
                    )
            end = time.monotonic() + within_s
            while set(found) & set(alive()):
                if time.monotonic() > end:
                    return _running(channel, how, set(found))
                time.sleep(LOOK_S)
        except grpc.RpcError as error:
            said: Any = error
            raise ClusterError(
                where=f"{name} through {address}",
                what=f"{said.code().name}: {said.details()}",
            ) from None
    return []


def _running(channel: Any, how: Any, nodes: set[bytes]) -> list[str]:
    """Name what runs on these nodes; workers tell of their tasks once a second."""
    tasks: Any = gcs_service_pb2_grpc.TaskInfoGcsServiceStub(channel)
    actors: Any = gcs_service_pb2_grpc.ActorInfoGcsServiceStub(channel)
    asked = _service.GetTaskEventsRequest(limit=MOST)
    asked.filters.exclude_driver = True
    for state in ("FINISHED", "FAILED"):
        asked.filters.state_filters.add(predicate=_service.NOT_EQUAL, state=state)
    found = [
        f"task {event.task_info.name[:NAME_CHARS]} {event.task_id.hex()}"
        for event in tasks.GetTaskEvents(asked, **how).events_by_task
        if event.state_updates.node_id in nodes
        and _common.TaskStatus.RUNNING in event.state_updates.state_ts_ns
    ]
    asked = _service.GetAllActorInfoRequest(limit=MOST)
    asked.filters.state = _gcs.ActorTableData.ALIVE
    found += [
        f"actor {(actor.name or actor.class_name)[:NAME_CHARS]} {actor.actor_id.hex()}"
        for actor in actors.GetAllActorInfo(asked, **how).actor_table_data
        if actor.node_id in nodes
    ]
    return found or ["nothing with a name (objects in its store, perhaps)"]
