"""What a supervisor may write of its submitted job."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.dashboard.modules.job.common import JobErrorType, JobInfo, JobStatus

from raysandbox.cluster.submission import MOST_BYTES, State, flaw

NODE = "ab" * 28


def own(address: str) -> bool:
    return address in ("10.0.0.1", "::1")


def state(**changed: Any) -> bytes:
    """Return a state as Ray writes it, with some fields changed."""
    info = JobInfo(
        status=JobStatus.FAILED,
        entrypoint="python x.py",
        message="it said: \N{SNOWMAN}",
        error_type=JobErrorType.JOB_ENTRYPOINT_COMMAND_ERROR,
        start_time=1_795_942_503_829,
        end_time=1_795_942_504_849,
        metadata={"team": "a"},
        runtime_env={"env_vars": {"A": "b"}},
        entrypoint_num_cpus=0.5,
        entrypoint_num_gpus=0,
        entrypoint_memory=1 << 30,
        entrypoint_resources={"x": 1},
        driver_agent_http_address="http://10.0.0.1:52365",
        driver_node_id=NODE,
        driver_exit_code=-9,
    )
    return json.dumps({**info.to_json(), **changed}).encode()


def test_what_ray_writes_is_taken() -> None:
    """With every field, and with few."""
    assert flaw(state(), own) == ""
    few = JobInfo(status=JobStatus.PENDING, entrypoint="").to_json()
    assert flaw(json.dumps(few).encode(), own) == ""
    address = "http://[::1]:52365"
    assert flaw(state(driver_agent_http_address=address), own) == ""


def test_fields_are_those_of_the_ray_that_is_installed() -> None:
    """One that is not known would refuse every submitted job."""
    fields = {field.name for field in dataclasses.fields(JobInfo)}
    assert set(State.model_fields) == fields - {"runtime_env"} | {"runtime_env_json"}
    text = str(State.model_json_schema())
    assert all(repr(each.value) in text for each in (*JobStatus, *JobErrorType))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"status": "DONE"}, "status:"),
        ({"status": None}, "status:"),
        ({"message": 1}, "message:"),
        ({"more": 1}, "more:"),
        ({"start_time": 10**400}, "start_time:"),
        ({"start_time": 1.5}, "start_time:"),
        ({"start_time": True}, "start_time:"),
        ({"entrypoint_num_cpus": float("nan")}, "entrypoint_num_cpus:"),
        ({"entrypoint_num_cpus": float("inf")}, "entrypoint_num_cpus:"),
        ({"metadata": {"a": 1}}, "metadata.a:"),
        ({"runtime_env_json": "["}, "runtime_env_json"),
        ({"runtime_env_json": "[" * 100_000}, "runtime_env_json"),
        ({"runtime_env_json": "[]"}, "runtime_env_json"),
        ({"driver_node_id": "x"}, "driver_node_id:"),
        ({"driver_agent_http_address": "http://10.0.0.2:52365"}, "not the head's"),
        ({"driver_agent_http_address": "https://10.0.0.1:1"}, "not the head's"),
        ({"driver_agent_http_address": "http://10.0.0.1:1/x"}, "not the head's"),
        ({"driver_agent_http_address": "http://10.0.0.1:1?"}, "not the head's"),
        ({"driver_agent_http_address": "http://10.0.0.1#"}, "not the head's"),
        ({"driver_agent_http_address": "http://u@10.0.0.1"}, "not the head's"),
        ({"driver_agent_http_address": "http://10.0.0.1@10.0.0.2"}, "not the head's"),
        ({"driver_agent_http_address": ""}, "not the head's"),
        ({"driver_agent_http_address": "http://[::1"}, "not the head's"),
        ({"message": "x" * MOST_BYTES}, "larger than"),
    ],
)
def test_what_ray_could_not_read_is_named(changed: dict[str, Any], says: str) -> None:
    """Each by its field."""
    assert says in flaw(state(**changed), own)


@given(st.binary(max_size=200))
def test_any_bytes_have_an_answer(value: bytes) -> None:
    """No bytes at all are a state by chance."""
    assert flaw(value, own)
