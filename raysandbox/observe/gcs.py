"""What a running cluster's GCS knows of a job, an actor or a task.

Read from outside, as no driver: looking registers no job. The identifiers are
Ray's: 8 hex digits for a job, 32 for an actor, 48 for a task; the last 8 of the
longer ones are the job's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raysandbox.errors import ProfileError

__all__ = ["Subject", "connect", "find_address", "look_up"]

_LENGTHS = {8: "job", 32: "actor", 48: "task"}
_SUBMISSION = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Somebody who asks for a profile.

    Attributes:
        kind: ``"job"``, ``"actor"`` or ``"task"``.
        name: The actor's class or task's name, or ``""``.
        job: The job's id.
        namespace: From the job table.
        metadata: From the job table.
        resources: What the actor or task asks for; None for a job.
    """

    kind: str
    name: str = ""
    job: str
    namespace: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] | None = None


def find_address(address: str = "") -> str:
    """Return the address of the GCS: what was given, or the local node's.

    Raises:
        ProfileError: Ray is not running here, and no address was given.
    """
    from ray._private import services

    chosen = address or os.environ.get("RAY_ADDRESS", "")
    found = services.canonicalize_bootstrap_address(chosen or "auto")
    if not found:
        raise ProfileError(
            source="--address",
            reason="Ray is not running on this machine: start it, or give the "
            "address of a cluster (HOST:PORT of its GCS)",
        )
    return str(found)


def connect(address: str) -> Any:
    """Return Ray's accessor to the GCS at this address.

    Raises:
        ProfileError: It does not answer.
    """
    import ray
    from ray.exceptions import RayError

    raylet: Any = ray._raylet
    try:
        options = raylet.GcsClientOptions.create(
            address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True
        )
        accessor = raylet.GlobalStateAccessor(options)
        connected = accessor.connect()
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(address, str(error)) from error
    if not connected:
        raise _unreachable(address, "no answer")
    return accessor


def _unreachable(address: str, why: str) -> ProfileError:
    return ProfileError(
        source="--address", value=address, reason=f"the GCS can't be asked: {why}"
    )


def look_up(accessor: Any, identifier: str) -> Subject:
    """Return what the GCS knows of a job, actor or task.

    Raises:
        ProfileError: It is no identifier of Ray's, or the GCS does not know it.
    """
    kind = _LENGTHS.get(len(identifier), "")
    if not kind or re.fullmatch(r"[0-9a-f]+", identifier) is None:
        if _SUBMISSION.fullmatch(identifier):
            return _job(accessor, identifier, "")
        raise ProfileError(
            source="<id>",
            value=identifier,
            reason="is the id of no job (8 hex digits, or a submission id), actor (32) "
            "or task (48)",
        )
    job = _job(accessor, identifier, identifier[-8:])
    if kind == "actor":
        return _actor(accessor, identifier, job)
    return _task(accessor, identifier, job) if kind == "task" else job


def _job(accessor: Any, identifier: str, job_id: str) -> Subject:
    from ray.core.generated import gcs_pb2

    for row in accessor.get_job_table(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    ):
        data = gcs_pb2.JobTableData.FromString(row)
        metadata = dict(data.config.metadata)
        named = metadata.get("job_submission_id")
        if data.job_id.hex() == job_id or (not job_id and named == identifier):
            return Subject(
                kind="job",
                job=data.job_id.hex(),
                namespace=data.config.ray_namespace,
                metadata=metadata,
            )
    raise _unknown(identifier, "job")


def _actor(accessor: Any, identifier: str, job: Subject) -> Subject:
    import ray
    from ray.core.generated import gcs_pb2

    found = accessor.get_actor_info(ray.ActorID(bytes.fromhex(identifier)))
    if found is None:
        raise _unknown(identifier, "actor")
    data = gcs_pb2.ActorTableData.FromString(found)
    return Subject(
        kind="actor",
        name=data.class_name,
        job=job.job,
        namespace=job.namespace,
        metadata=job.metadata,
        resources=dict(data.required_resources),
    )


def _task(accessor: Any, identifier: str, job: Subject) -> Subject:
    from ray.core.generated import gcs_pb2

    wanted = bytes.fromhex(identifier)
    for row in accessor.get_task_events():
        events = gcs_pb2.TaskEvents.FromString(row)
        if events.task_id == wanted and events.HasField("task_info"):
            return Subject(
                kind="task",
                name=events.task_info.name,
                job=job.job,
                namespace=job.namespace,
                metadata=job.metadata,
                resources=dict(events.task_info.required_resources),
            )
    raise _unknown(identifier, "task")


def _unknown(identifier: str, kind: str) -> ProfileError:
    more = "; tasks are known a second after they start" if kind == "task" else ""
    return ProfileError(
        source="<id>", value=identifier, reason=f"the GCS knows no such {kind}{more}"
    )
