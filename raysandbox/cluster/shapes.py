"""Whether a request to the GCS has the shape that the GCS takes for granted.

The GCS of Ray 2.60 aborts on an identifier of the wrong length, in any of some
thirty methods, and on a few messages whose parts do not belong together: one
call of 30 bytes ends the cluster. So every request that can carry an identifier
is parsed in front of it, and every field is looked at, at any depth. Lengths are
those of ``ray/common/id.h``; an empty identifier is a nil one, which the GCS
allows wherever it does not look the thing up.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ID_BYTES", "flaw", "request_types"]

ID_BYTES = {
    "actor_id": 16, "job_id": 4, "node_id": 28, "placement_group_id": 18,
    "worker_id": 28, "task_id": 24, "object_id": 28, "cluster_id": 28,
    "creator_actor_id": 16, "root_detached_actor_id": 16, "creator_job_id": 4,
    "driver_node_id": 28, "soft_target_node_id": 28, "spilled_node_id": 28,
    "parent_task_id": 24, "submitter_task_id": 24, "caller_id": 24,
    "intended_worker_id": 28, "subscriber_worker_id": 28, "sender_id": 28,
    "publisher_id": 28, "subscriber_id": 28, "contained_in_id": 28,
    "node_ids": 28, "dynamic_return_ids": 28, "contained_in_borrowed_ids": 28,
    "contains": 28, "actor_creation_dummy_object_id": 28,
}  # fmt: skip
# Bytes that name nothing, or whose length means nothing to the GCS.
FREE = {
    "component_id", "data", "debugger_breakpoint", "event_id", "key", "key_id", "keys",
    "metadata", "namespace", "prefix", "serialized_actor_handle",
    "serialized_exception", "serialized_py_logging_config",
    "serialized_retry_exception_allowlist", "value",
}  # fmt: skip
# owner_id and parent_id are a worker's or a task's, by message: either length.
EITHER = {"owner_id": (16, 24, 28), "parent_id": (16, 24, 28)}
DEEPEST = 32


def request_types(methods: frozenset[str]) -> dict[str, Any]:
    """Return the class of each method's request, as the installed Ray has them.

    Methods of services that this Ray does not have are left out.
    """
    # Importing the modules registers what they describe.
    from google.protobuf import descriptor_pool, message_factory
    from ray.core.generated import autoscaler_pb2, gcs_service_pb2

    del autoscaler_pb2, gcs_service_pb2
    pool = descriptor_pool.Default()
    found = {}
    for method in methods:
        service, _, name = method[1:].rpartition("/")
        try:
            kind = pool.FindServiceByName(service).FindMethodByName(name).input_type
        except KeyError:
            continue
        found[method] = message_factory.GetMessageClass(kind)
    return found


def flaw(message: Any, depth: int = 0) -> str:
    """Say what is wrong with the identifiers of a message, or ``""``."""
    if depth > DEEPEST:
        return "the message is nested too deep"
    for field, value in message.ListFields():
        kind = field.type
        if kind == field.TYPE_BYTES:
            name = field.name
            many = (value,) if isinstance(value, bytes) else value
            for each in many:
                if not _fits(name, len(each)):
                    return f"{name} has {len(each)} bytes"
        elif kind == field.TYPE_MESSAGE:
            if field.message_type.GetOptions().map_entry:
                # Maps of Ray's have plain numbers and strings in them, or
                # messages without identifiers.
                continue
            for each in value if _repeated(field) else (value,):
                if problem := flaw(each, depth + 1):
                    return problem
    return ""


def _repeated(field: Any) -> bool:
    try:
        return bool(field.is_repeated)
    except AttributeError:  # protobuf before 6
        return bool(field.label == field.LABEL_REPEATED)


def _fits(name: str, size: int) -> bool:
    if size == 0 or name in EITHER:
        return size == 0 or size in EITHER[name]
    wanted = ID_BYTES.get(name)
    if wanted is None:
        # A name that nobody has looked at is not let through.
        return name in FREE
    return size == wanted
