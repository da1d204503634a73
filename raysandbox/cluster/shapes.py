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
# Messages and identifiers in one request: a batch of ten thousand events of tasks,
# which is Ray's largest, has some fifty thousand, of 25 bytes. One of four megabytes
# can have two million empty ones, and while they are looked at nobody is answered.
MOST_PARTS, FEW_PARTS, PART_BYTES = 150_000, 1000, 12


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


class _Looks:
    """What there is to look at in messages of one kind, worked out once.

    An event of a task can have a hundred fields, and a busy driver sends thousands
    of them a second.
    """

    __slots__ = ("bytes", "messages", "several", "several_bytes", "several_messages")

    def __init__(self, kind: Any) -> None:
        self.bytes: list[tuple[str, tuple[int, ...]]] = []
        self.several_bytes: list[tuple[str, tuple[int, ...]]] = []
        self.messages: list[str] = []
        self.several_messages: list[str] = []
        for field in kind.fields:
            several = _repeated(field)
            if field.type == field.TYPE_BYTES:
                if field.name not in FREE:
                    known = self.several_bytes if several else self.bytes
                    known.append((field.name, _sizes(field.name)))
            # Maps of Ray's have plain numbers and strings in them, or messages
            # without identifiers.
            elif (
                field.type == field.TYPE_MESSAGE
                and not field.message_type.GetOptions().map_entry
                and _has_bytes(field.message_type, set())
            ):
                (self.several_messages if several else self.messages).append(field.name)
        self.several = [*(name for name, _ in self.several_bytes)]
        self.several += self.several_messages


_looks: dict[Any, _Looks] = {}


def flaw(message: Any, size_bytes: int = MOST_PARTS * PART_BYTES) -> str:
    """Say what is wrong with the identifiers of a message, or ``""``.

    Args:
        message: Any request.
        size_bytes: Of it: parts of next to nothing are none of Ray's.
    """
    most = min(MOST_PARTS, FEW_PARTS + size_bytes // PART_BYTES)
    return _flaw(message, 0, [most])


def _flaw(message: Any, depth: int, left: list[int]) -> str:
    if depth > DEEPEST:
        return "the message is nested too deep"
    left[0] -= 1
    looks = _looks.get(message.DESCRIPTOR)
    if looks is None:
        looks = _looks[message.DESCRIPTOR] = _Looks(message.DESCRIPTOR)
    for name, sizes in looks.bytes:
        size = len(getattr(message, name))
        if size and size not in sizes:
            return f"{name} has {size} bytes"
    for name in looks.several:
        left[0] -= len(getattr(message, name))
    if left[0] < 0:
        return "the message has too many parts"
    for name, sizes in looks.several_bytes:
        for each in getattr(message, name):
            if each and len(each) not in sizes:
                return f"{name} has {len(each)} bytes"
    for name in looks.messages:
        if message.HasField(name) and (
            problem := _flaw(getattr(message, name), depth + 1, left)
        ):
            return problem
    for name in looks.several_messages:
        for each in getattr(message, name):
            if problem := _flaw(each, depth + 1, left):
                return problem
    return ""


def _repeated(field: Any) -> bool:
    try:
        return bool(field.is_repeated)
    except AttributeError:  # protobuf before 6
        return bool(field.label == field.LABEL_REPEATED)


def _sizes(name: str) -> tuple[int, ...]:
    """Return the lengths that an identifier of this name can have, but for none.

    A name that nobody has looked at is not let through.
    """
    if name in EITHER:
        return EITHER[name]
    return (ID_BYTES[name],) if name in ID_BYTES else ()


def _has_bytes(kind: Any, seen: set[str]) -> bool:
    """Whether messages of a kind can have bytes in them, at any depth."""
    if kind.full_name in seen:
        return False
    seen.add(kind.full_name)
    return any(
        field.type == field.TYPE_BYTES
        or (field.type == field.TYPE_MESSAGE and _has_bytes(field.message_type, seen))
        for field in kind.fields
    )
