"""One side of the demo, in a process of its own, against a Ray of its own.

::

    python -m raysandbox.demo.driver stock attacks read-token poison
    python -m raysandbox.demo.driver sandbox attacks read-token poison
    python -m raysandbox.demo.driver strict honest

Prints one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysandbox.demo import honest
from raysandbox.demo.attacks import ATTACKS, Attack, Lost, Stage

__all__ = ["main"]

PROFILE = "demo"


def _start(profile: str, directory: Path) -> Any:
    """Start a local Ray; with a profile, in the sandbox."""
    import ray

    import raysandbox

    options: dict[str, Any] = {
        "num_cpus": 2,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "object_store_memory": 200 << 20,
        "namespace": "demo",
        "_temp_dir": str(directory / "ray"),
    }
    if profile:
        return raysandbox.init(**options)
    return ray.init(**options)


def _remote(profile: str) -> Callable[[Callable[..., Any]], Any]:
    import ray

    import raysandbox

    options: dict[str, Any] = {"max_retries": 0}
    if profile:
        options["resources"] = raysandbox.tag(profile)

    def remote(function: Callable[..., Any]) -> Any:
        return ray.remote(**options)(function)

    return remote


def _stage(profile: str, directory: Path, token_path: Path) -> Stage:
    import ray
    from ray._private import worker

    node = worker._global_node
    raylet = node.all_processes["raylet"][0].process.pid
    return Stage(
        remote=_remote(profile),
        sandboxed=bool(profile),
        directory=directory,
        token_path=token_path,
        gcs_address=ray.get_runtime_context().gcs_address,
        raylet_pid=raylet,
        raylet_socket=node.raylet_socket_name,
    )


def _verdict(attack: Attack, stage: Stage) -> dict[str, Any]:
    """Run one attack: it got through, a wall stopped it, or neither is clear."""
    begun = time.monotonic()
    verdict: dict[str, Any] = {"name": attack.name, "wall": ""}
    try:
        verdict |= {"outcome": "through", "detail": attack.run(stage)}
    except Lost as lost:
        wall = attack.walls.get(lost.how, "")
        verdict |= {"outcome": "stopped" if wall else "unclear", "wall": wall}
        verdict |= {"detail": str(lost), "error": lost.how}
    except Exception as error:  # noqa: BLE001 - the others still run
        verdict |= {"outcome": "unclear", "detail": f"{type(error).__name__}: {error}"}
    return verdict | {"seconds": round(time.monotonic() - begun, 2)}


def main() -> None:
    """Run what the command line says."""
    side, what, *names = sys.argv[1:]
    profile = {"stock": "", "sandbox": PROFILE}.get(side, side)
    directory = Path(tempfile.mkdtemp(prefix="raysandbox-demo-"))
    token_path = directory / "auth_token"
    token_path.touch(mode=0o600)
    token_path.write_text(os.urandom(32).hex())
    # Ray takes its answers from here, and from no token of the user's.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAYSANDBOX_PROFILE_PATH": str(Path(__file__).parent),
    }
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.pop("RAY_ADDRESS", None)
    # A thread of Ray's prints into sys.stdout, also in the middle of our lines.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr
    import ray

    try:
        _start(profile, directory)
        if what == "honest":
            print(json.dumps(honest.measure(_remote(profile))), file=answers)
            return
        stage = _stage(profile, directory, token_path)
        chosen = [attack for attack in ATTACKS if attack.name in names]
        with contextlib.closing(stage):
            for attack in chosen:
                print(json.dumps(_verdict(attack, stage)), file=answers)
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
