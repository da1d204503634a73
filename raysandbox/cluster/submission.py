"""What a supervisor may write of its submitted job: what Ray's head can read back.

Ray's dashboard and the GCS read the state of every submitted job whenever somebody
asks for jobs, and the dashboard asks the address in it for the job's output. A
supervisor runs a user's program beside it, so its word is checked: one that Ray
could not read would end `ray job list` for everybody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["MOST_BYTES", "State", "flaw"]

MOST_BYTES = 1 << 20

# As Ray writes it, and nothing that two readers could read differently.
_ADDRESS = re.compile(r"http://(?:\[([0-9a-f:.]+)\]|([0-9.]+)):[0-9]{1,5}")

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class State(BaseModel):
    """`ray.dashboard.modules.job.common.JobInfo`, as its ``to_json`` writes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    entrypoint: str
    message: str | None = None
    error_type: (
        Literal[
            "RUNTIME_ENV_SETUP_FAILURE",
            "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
            "JOB_SUPERVISOR_ACTOR_START_FAILURE",
            "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
            "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
            "JOB_SUPERVISOR_ACTOR_DIED",
            "JOB_ENTRYPOINT_COMMAND_START_ERROR",
            "JOB_ENTRYPOINT_COMMAND_ERROR",
        ]
        | None
    ) = None
    start_time: _Count | None = None
    end_time: _Count | None = None
    metadata: dict[str, str] | None = None
    runtime_env_json: str | None = None
    entrypoint_num_cpus: _Amount | None = None
    entrypoint_num_gpus: _Amount | None = None
    entrypoint_memory: _Count | None = None
    entrypoint_resources: dict[str, _Amount] | None = None
    driver_agent_http_address: str | None = None
    driver_node_id: Annotated[str, Field(pattern="^[0-9a-f]{56}$")] | None = None
    driver_exit_code: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None


def flaw(value: bytes, is_heads_address: Callable[[str], bool]) -> str:
    """Say what is wrong with a state that is to be written, or ``""``.

    Args:
        value: The state, as JSON.
        is_heads_address: Whether an IP address is one of the head's, where all
            supervisors are. Dashboard and agent are on that machine's loopback; to
            another's address the token would go in clear.
    """
    if len(value) > MOST_BYTES:
        return f"it is larger than {MOST_BYTES} bytes"
    try:
        state = State.model_validate_json(value)
        environment = json.loads(state.runtime_env_json or "{}")
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        return f"{place}: {first['msg']}"
    except (ValueError, RecursionError):
        return "runtime_env_json can't be read"
    if not isinstance(environment, dict):
        return "runtime_env_json is no object"
    if state.driver_agent_http_address is not None:
        address = _ADDRESS.fullmatch(state.driver_agent_http_address)
        if address is None or not is_heads_address(address[1] or address[2]):
            return "driver_agent_http_address is not the head's"
    return ""
