"""Which role may call which method of the GCS.

Collected from guarded clusters that ran tasks, actors, placement groups,
runtime environments, the state API, jobs and the autoscaler on Ray 2.60, then
cut: what only the GCS's own host, an operator or a node needs is not a
driver's. A method that is named nowhere here is refused for everybody.
Written as sets that build on each other, so that a difference between two roles
is one line.
"""

from __future__ import annotations

__all__ = ["CONTENT", "METHODS", "STREAM", "methods_of"]

STREAM = "/ray.rpc.syncer.RaySyncer/StartSync"


def _of(service: str, *names: str) -> frozenset[str]:
    return frozenset(f"/ray.rpc.{service}/{name}" for name in names)


_SUBSCRIBE = _of(
    "ControlPlanePubSubGcsService", "GcsSubscriberCommandBatch", "GcsSubscriberPoll"
) | _of("ObservabilityPubSubService", "GcsSubscriberCommandBatch", "GcsSubscriberPoll")
_LOOK = _of(
    "NodeInfoGcsService",
    "GetAllNodeAddressAndLiveness",
    "GetAllNodeInfo",
    "GetClusterId",
) | _of("JobInfoGcsService", "GetAllJobInfo")
_STATE = (
    _LOOK
    | _of(
        "NodeResourceInfoGcsService",
        "GetAllAvailableResources",
        "GetAllResourceUsage",
        "GetAllTotalResources",
        "GetDrainingNodes",
    )
    | _of("autoscaler.AutoscalerStateService", "GetClusterStatus")
    | _of("ActorInfoGcsService", "GetAllActorInfo", "GetActorInfo")
    | _of("PlacementGroupInfoGcsService", "GetAllPlacementGroup", "GetPlacementGroup")
    | _of("TaskInfoGcsService", "GetTaskEvents")
    | _of("WorkerInfoGcsService", "GetAllWorkerInfo", "GetWorkerInfo")
    | _of("NodeInfoGcsService", "CheckAlive")
    | _of("InternalKVGcsService", "GetInternalConfig")
)
_KV_READ = _of(
    "InternalKVGcsService",
    "InternalKVExists",
    "InternalKVGet",
    "InternalKVKeys",
    "InternalKVMultiGet",
)
_KV = _KV_READ | _of("InternalKVGcsService", "InternalKVDel", "InternalKVPut")
_WORK = (
    _SUBSCRIBE
    | _LOOK
    | _KV
    | _of(
        "ActorInfoGcsService",
        "CreateActor",
        "GetActorInfo",
        "GetNamedActorInfo",
        "KillActorViaGcs",
        "ListNamedActors",
        "RegisterActor",
        "ReportActorOutOfScope",
        "RestartActorForLineageReconstruction",
    )
    | _of(
        "PlacementGroupInfoGcsService",
        "CreatePlacementGroup",
        "GetAllPlacementGroup",
        "GetNamedPlacementGroup",
        "GetPlacementGroup",
        "RemovePlacementGroup",
        "WaitPlacementGroupUntilReady",
    )
    | _of(
        "NodeResourceInfoGcsService",
        "GetAllAvailableResources",
        "GetAllResourceUsage",
        "GetAllTotalResources",
        "GetDrainingNodes",
    )
    | _of("InternalKVGcsService", "GetInternalConfig")
    | _of("JobInfoGcsService", "GetNextJobID")
    | _of("NodeInfoGcsService", "CheckAlive")
    | _of("ObservabilityPubSubService", "GcsPublish", "ReportJobError")
    | _of("RuntimeEnvGcsService", "PinRuntimeEnvURI")
    | _of("TaskInfoGcsService", "AddTaskEventData", "GetTaskEvents")
    | _of("RayEventExportGcsService", "AddEvents")
    | _of(
        "WorkerInfoGcsService",
        "AddWorkerInfo",
        "GetWorkerInfo",
        "UpdateWorkerDebuggerPort",
        "UpdateWorkerNumPausedThreads",
    )
    | _of(
        "autoscaler.AutoscalerStateService",
        "GetClusterStatus",
        "RequestClusterResourceConstraint",
    )
)
_NODE = (
    _SUBSCRIBE
    | _LOOK
    | _KV_READ
    | _of("InternalKVGcsService", "GetInternalConfig", "InternalKVPut", "InternalKVDel")
    | _of("JobInfoGcsService", "AddJob", "MarkJobFinished")
    | _of("NodeInfoGcsService", "CheckAlive", "RegisterNode", "UnregisterNode")
    | _of("ObservabilityPubSubService", "GcsPublish", "ReportJobError")
    | _of("WorkerInfoGcsService", "ReportWorkerFailure")
    | _of("TaskInfoGcsService", "AddTaskEventData")
    | _of("RayEventExportGcsService", "AddEvents")
    | frozenset({STREAM})
)
_HEAD = (
    _NODE
    | _WORK
    | _STATE
    | _of(
        "autoscaler.AutoscalerStateService",
        "DrainNode",
        "GetClusterResourceState",
        "ReportAutoscalingState",
        "ReportClusterConfig",
        "ResizeRayletResourceInstances",
    )
    | _of("WorkerInfoGcsService", "GetAllWorkerInfo")
)

METHODS: dict[str, frozenset[str]] = {
    "head": _HEAD,
    "node": _NODE,
    "worker": _WORK,
    "driver": _WORK | _STATE,
    # Clients of the Ray Client server never speak to the GCS themselves.
    "client": frozenset(),
    "operator": _STATE
    | _SUBSCRIBE
    | _KV_READ
    | _of("ActorInfoGcsService", "ListNamedActors", "GetNamedActorInfo")
    | _of("autoscaler.AutoscalerStateService", "DrainNode", "GetClusterResourceState"),
    "observer": _STATE | _KV_READ,
}

# Decided on their content too, by the access service.
CONTENT: frozenset[str] = (
    _KV
    | _of(
        "ActorInfoGcsService",
        "CreateActor",
        "GetNamedActorInfo",
        "KillActorViaGcs",
        "ListNamedActors",
        "RegisterActor",
        "ReportActorOutOfScope",
        "RestartActorForLineageReconstruction",
    )
    | _of("JobInfoGcsService", "AddJob", "GetNextJobID", "MarkJobFinished")
    | _of("NodeInfoGcsService", "RegisterNode", "UnregisterNode")
    | _of(
        "PlacementGroupInfoGcsService",
        "CreatePlacementGroup",
        "GetNamedPlacementGroup",
        "RemovePlacementGroup",
    )
    | _of("WorkerInfoGcsService", "AddWorkerInfo", "ReportWorkerFailure")
    | frozenset({STREAM})
)


def methods_of(role: str) -> frozenset[str]:
    """Return the methods of a role; none for a role that is unknown."""
    return METHODS.get(role, frozenset())
