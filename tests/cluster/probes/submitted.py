"""What a submitted job's program does: honest work, and what a hostile one tries.

``python run.py NAME ARGUMENTS…`` prints ``FOUND`` and JSON. Travels as a job's
working directory, beside ``attack.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SPACE, STATE = "job", "_ray_internal_job_info_"
LOG = "raysandbox:entrypoint-log:"
SUPERVISORS = "SUPERVISOR_ACTOR_RAY_NAMESPACE"


def _gcs() -> Any:
    """A client with all that the supervisor has."""
    import attack

    token = Path(os.environ["TMPDIR"], "token")
    token.write_text(os.environ["RAY_AUTH_TOKEN"])
    target = {
        "address": os.environ["RAY_ADDRESS"],
        "token": str(token),
        "ca": os.environ["RAY_TLS_CA_CERT"],
        "cert": os.environ["RAY_TLS_SERVER_CERT"],
        "key": os.environ["RAY_TLS_SERVER_KEY"],
    }
    return attack.Gcs(target)


def _try(name: str, *arguments: Any) -> str:
    import attack

    gcs = _gcs()
    return str(attack.outcome(getattr(attack, name), gcs, *arguments)["code"])


def _name() -> str:
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    config = ray._private.worker.global_worker.core_worker.get_job_config()
    return str(config.metadata["job_submission_id"])


def _state(name: str) -> dict[str, Any]:
    """Return a submitted job's state, as Ray keeps it."""
    value = _gcs().kv("Get", namespace=SPACE.encode(), key=(STATE + name).encode())
    found: dict[str, Any] = json.loads(value.value)
    return found


def nothing() -> None:
    """End at once."""


def wait() -> None:
    """Go on until somebody ends it."""
    print("waiting", flush=True)
    time.sleep(1000)


def work() -> dict[str, Any]:
    """What honest jobs do."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    ray.init()
    double = ray.remote(lambda x: x * 2)

    @ray.remote(num_cpus=0)
    class Counter:
        def one(self) -> int:
            return 1

    actor = Counter.options(name="counter").remote()
    found = {
        "total": sum(ray.get([double.remote(i) for i in range(10)], timeout=100)),
        "actor": ray.get(actor.one.remote(), timeout=100),
        "named": ray.get(ray.get_actor("counter").one.remote(), timeout=100),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "status": _state(_name())["status"],
    }
    group = placement_group([{"CPU": 0.1}])
    found["group"] = group.wait(60)
    remove_placement_group(group)
    return found


def attack(victim: str, job: str) -> dict[str, dict[str, str]]:
    """Write over what is another's, what is the head's job's and, first, its own."""
    import ray

    name = _name()
    me = ray.get_runtime_context()
    mine = _state(name)
    log = _gcs().kv("Get", namespace=b"raysandbox", key=(LOG + name).encode()).value
    heads = f"RemoteFunction:{job}:x", f"ActorClass:{job}:x"
    lost = {**mine, "driver_agent_http_address": "http://10.77.0.3:80"}
    foreign = log.replace(log.split(b"-")[1], b"0" * 56)
    return {
        "own": {
            "state": _try("overwrite", SPACE, STATE + name, json.dumps(mine)),
            "log": _try("overwrite", "raysandbox", LOG + name, log.decode()),
            "function": _try(
                "overwrite", "fun", f"RemoteFunction:{me.get_job_id()}:x", "x"
            ),
            "the head's functions are read": _try("read", "fun", heads[0]),
        },
        "others": {
            "state is read": _try("read", SPACE, STATE + victim),
            "state": _try("overwrite", SPACE, STATE + victim, json.dumps(mine)),
            "state is deleted": _try("delete", SPACE, STATE + victim),
            "its own state is deleted": _try("delete", SPACE, STATE + name),
            "where output is asked for": _try(
                "overwrite", SPACE, STATE + name, json.dumps(lost)
            ),
            "log": _try("overwrite", "raysandbox", LOG + victim, log.decode()),
            "another's log": _try(
                "overwrite", "raysandbox", LOG + name, foreign.decode()
            ),
            "raysandbox's keys": _try("overwrite", "raysandbox", "x", "x"),
            "the head's function": _try("overwrite", "fun", heads[0], "x"),
            "the supervisors' class": _try("overwrite", "fun", heads[1], "x"),
            "it is deleted": _try("delete", "fun", heads[1]),
            "supervisors are found": _try(
                "find_actor", SUPERVISORS, f"_ray_internal_job_actor_{victim}"
            ),
        },
    }


def malform() -> dict[str, str]:
    """Write states that Ray's dashboard could not read."""
    name = _name()
    mine = _state(name)
    values = {
        "no JSON": "{",
        "no object": "[]",
        "deep": '{"status":' + "[" * 100_000,
        "status": json.dumps({**mine, "status": "DONE"}),
        "type": json.dumps({**mine, "message": 1}),
        "unknown": json.dumps({**mine, "more": 1}),
        "number": json.dumps({**mine, "start_time": 10**400}),
        "not a number": json.dumps({**mine, "entrypoint_num_cpus": float("nan")}),
        "environment": json.dumps({**mine, "runtime_env_json": "["}),
        "no environment": json.dumps({**mine, "runtime_env_json": "1"}),
        "address": json.dumps({**mine, "driver_agent_http_address": "http://[::1"}),
        "path": json.dumps(
            {**mine, "driver_agent_http_address": "http://10.77.0.1:1/x?"}
        ),
        "large": json.dumps({**mine, "message": "x" * (1 << 20)}),
    }
    return {
        what: _try("overwrite", SPACE, STATE + name, value)
        for what, value in values.items()
    }


def store() -> str:
    """Leave a key behind."""
    _name()
    return _try("overwrite", "of-a-job", "left-behind", "x")


def claim(job: str) -> list[str]:
    """Speak as this worker, first of all, for another job; then for its own."""
    import ray

    gcs = ray._private.worker.global_worker.gcs_client

    def put(of: str) -> str:
        key = f"RemoteFunction:{of}:claimed".encode()
        try:
            gcs.internal_kv_put(key, b"x", True, b"fun")
        except ray.exceptions.RpcError as error:
            return "PERMISSION_DENIED" if "not this worker's" in str(error) else "?"
        return "OK"

    foreign = put(job)
    return [put(ray.get_runtime_context().get_job_id()), foreign]


if __name__ == "__main__":
    found = globals()[sys.argv[1]](*sys.argv[2:])
    print("FOUND", json.dumps(found), flush=True)
