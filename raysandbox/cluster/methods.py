"""Which role may call which method of the GCS.

Collected from guarded clusters that ran tasks, actors, placement groups,
runtime environments, the state API, jobs and the autoscaler on Ray 2.60, then
cut: what only the GCS's own host, an operator or a node needs is not a
driver's. A method that is named nowhere here is refused for everybody.
Written as sets that build on each other, so that a difference between two roles
is one line.
"""

from __future__ import annotations

__all__ = [
    "CONTENT",
    "FRONT_LOOK",
    "FRONT_SUBMIT",
    "METHODS",
    "PLAIN",
    "STREAM",
    "methods_of",
]

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
# In no set is RestartActorForLineageReconstruction: the GCS aborts unless the actor
# is in one state of many, which only it knows. Nor are what Ray's debugger calls,
# UpdateWorkerDebuggerPort and UpdateWorkerNumPausedThreads: it crashes when it does
# not have the worker any more.
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
    | _of(
        "WorkerInfoGcsService",
        "AddWorkerInfo",
        "GetWorkerInfo",
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

# Requests that carry no identifier, name nothing of anybody's and leave nothing in
# the GCS. Every other one is parsed by the access service before the GCS sees it.
PLAIN: frozenset[str] = (
    _of("InternalKVGcsService", "GetInternalConfig")
    | _of("JobInfoGcsService", "GetAllJobInfo")
    | _of("NodeInfoGcsService", "GetClusterId")
    | _of(
        "NodeResourceInfoGcsService",
        "GetAllAvailableResources",
        "GetAllResourceUsage",
        "GetAllTotalResources",
        "GetDrainingNodes",
    )
    | _of("PlacementGroupInfoGcsService", "GetAllPlacementGroup")
    | _of("WorkerInfoGcsService", "GetAllWorkerInfo")
    | _of(
        "autoscaler.AutoscalerStateService",
        "GetClusterResourceState",
        "GetClusterStatus",
    )
)
CONTENT: frozenset[str] = frozenset().union(*METHODS.values()) - PLAIN


def methods_of(role: str) -> frozenset[str]:
    """Return the methods of a role; none for a role that is unknown."""
    return METHODS.get(role, frozenset())


#: Paths of the dashboard's that only look, as expressions, for GET. Not among them:
#: what attaches to a worker to look into it, waits on demand, or pins a package.
FRONT_LOOK = (
    "/",
    r"/(static|logos)/.*",
    r"/[a-z_-]+\.(ico|html|json|svg)",
    "/timezone|/cluster_id|/usage_stats_enabled|/events",
    "/nodes|/nodes/[^/]+|/logical/actors|/logical/actors/[^/]+",
    "/api/(version|ray/version|authentication_mode|cluster_status|component_activities)",
    "/api/(profiling_enabled|gcs_healthz|grafana_health|prometheus_health)",
    "/api/prometheus/sd|/api/serve/applications/|/api/data/datasets/[^/]+",
    "/api/train/v2/runs(/v1)?",
    "/api/jobs/|/api/jobs/[^/]+|/api/jobs/[^/]+/logs(/tail)?",
    "/api/v0/(cluster_metadata|cluster_events|platform_events)",
    "/api/v0/(actors|jobs|nodes|placement_groups|workers|tasks|objects)",
    "/api/v0/(runtime_envs|runtime_env_redaction)",
    "/api/v0/(actors|objects|tasks)/summarize|/api/v0/tasks/timeline",
    "/api/v0/logs|/api/v0/logs/(file|stream)",
)
#: What submits jobs and ends one's own there: HTTP method and path, as an expression.
FRONT_SUBMIT = (
    ("GET", "/api/packages/gcs/[^/]+"),
    ("PUT", "/api/packages/gcs/[^/]+"),
    ("POST", "/api/jobs/"),
    ("POST", "/api/jobs/[^/]+/stop"),
    ("DELETE", "/api/jobs/[^/]+"),
)
