"""What the GCS would abort on, told from the installed Ray's own descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ray.core.generated.gcs_service_pb2")

from ray.core.generated import gcs_service_pb2 as pb

from raysandbox.cluster.methods import CONTENT, METHODS, PLAIN, STREAM
from raysandbox.cluster.shapes import EITHER, FREE, ID_BYTES, flaw, request_types

EVERY = frozenset().union(*METHODS.values())


def _bytes_fields(kind: Any, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    for field in kind.fields:
        if field.type == field.TYPE_BYTES:
            yield field.name
        elif field.type == field.TYPE_MESSAGE:
            name = field.message_type.full_name
            if name not in seen:
                yield from _bytes_fields(field.message_type, seen | {name})


def test_every_method_exists() -> None:
    """A method that Ray renamed would be refused to all without a word here."""
    assert set(request_types(EVERY)) == EVERY - {STREAM}


def test_plain_methods_carry_no_identifier() -> None:
    """What goes past the access service has nothing that it would look at."""
    for method, kind in request_types(PLAIN).items():
        assert list(_bytes_fields(kind.DESCRIPTOR)) == [], method
    assert not PLAIN & CONTENT


def test_plain_methods_only_look() -> None:
    """Whatever leaves something in the GCS is charged, and so is looked into."""
    assert [m for m in PLAIN if not m.rpartition("/")[2].startswith("Get")] == []


def test_every_field_of_bytes_is_known() -> None:
    """A field that a later Ray adds is refused when set, and named by this test."""
    known = set(ID_BYTES) | set(FREE) | set(EITHER)
    for method, kind in request_types(CONTENT).items():
        unknown = set(_bytes_fields(kind.DESCRIPTOR)) - known
        assert unknown == set(), method


@pytest.mark.parametrize("size", [1, 15, 17, 255])
def test_identifier_of_wrong_length(size: int) -> None:
    """At the top and deep inside; the right length and none at all pass."""
    assert "actor_id" in flaw(pb.GetActorInfoRequest(actor_id=b"x" * size))
    ask = pb.RegisterActorRequest()
    ask.task_spec.caller_address.worker_id = b"x" * size
    assert "worker_id" in flaw(ask)
    ask.task_spec.caller_address.worker_id = b"x" * 28
    assert flaw(ask) == ""
    assert flaw(pb.GetActorInfoRequest(actor_id=b"x" * 16)) == ""
    assert flaw(pb.GetActorInfoRequest()) == ""
