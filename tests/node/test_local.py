"""Local clusters of `raysandbox.init`: what an operator's policy is worth there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.conftest import USER
from tests.attacks.harness import start_as
from tests.node.nodes import POLICY
from tests.node.test_keeper import is_soon

pytestmark = [pytest.mark.ray, pytest.mark.root]

TOTALS = POLICY.replace('memory = "80%"', 'memory = "3GiB"')

START = """
import json, os, sys, tempfile
import ray, raysandbox
from pathlib import Path

def start(**options):
    temporary = tempfile.mkdtemp(prefix="rsn-", dir="/tmp")
    try:
        raysandbox.init(num_cpus=1, include_dashboard=False, _temp_dir=temporary,
                        logging_level="ERROR", log_to_driver=False,
                        object_store_memory=100 << 20, **options)
        assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7
        node = ray._private.worker._global_node
        raylet = node.all_processes["raylet"][0].process.pid
        variables = Path(f"/proc/{raylet}/environ").read_bytes().split(b"\\0")
        named = [v for v in variables if v.startswith(b"RAYSANDBOX_CGROUP=")]
        groups = named[0].decode().partition("=")[2].split(":") if named else []
        limits = [path.read_text().strip() for group in groups
                  for path in Path(group).glob("memory.*")
                  if path.name in ("memory.max", "memory.limit_in_bytes")]
        events = Path(node.get_logs_dir_path(), "raysandbox_events.jsonl")
        (said,) = [json.loads(line) for line in events.read_text().splitlines()
                   if "node_started" in line]
        return {"groups": groups, "limits": limits,
                "totals": {name: each for name, each in said["protections"].items()
                           if name.startswith("totals")}}
    except raysandbox.RaysandboxError as error:
        return {"refused": type(error).__name__, "said": str(error)}
    finally:
        ray.shutdown()
        import shutil
        shutil.rmtree(temporary, ignore_errors=True)
"""


@pytest.fixture
def policy() -> Iterator[str]:
    """A policy's file, where nobody else can replace it."""
    directory = Path(tempfile.mkdtemp(prefix="rsn-", dir="/srv"))
    directory.chmod(0o755)
    file = directory / "policy.toml"
    file.write_text(TOTALS)
    yield str(file)
    shutil.rmtree(directory)


def _run(code: str, uid: int = 0, **variables: str) -> dict[str, object]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
    process = start_as(
        uid,
        uid,
        [sys.executable, "-c", f"{START}\nprint(json.dumps({code}))"],
        env={**kept, "RAY_USAGE_STATS_ENABLED": "0", "HOME": "/nonexistent"}
        | variables,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def test_totals_of_a_policy_hold_on_a_local_cluster(policy):
    """As on any node; where nobody made a policy that is said.

    Guards against a table of the operator's that is read and left out.
    """
    found, none = _run(f"[start(policy={policy!r}), start()]")
    assert set(found["totals"].values()) == {"enforced"}
    assert set(found["totals"]) >= {"totals.memory_bytes", "totals.pids"}
    assert str(3 << 30) in found["limits"]
    assert is_soon(lambda: not any(os.path.exists(each) for each in found["groups"]))
    assert none["groups"] == []
    assert none["totals"]["totals"].startswith("off: ")


def test_totals_that_a_local_cluster_can_not_have_refuse(policy):
    """An ordinary user without a control group is told what to do about it."""
    found = _run(f"start(policy={policy!r})", USER)
    assert found.get("refused") == "UnsupportedError", found
    assert "the node's totals" in found["said"]


def test_spilling_to_other_than_files_is_refused_at_the_start(tmp_path):
    """With what is needed: else each worker that spills would end, over and over."""
    params = {"directory_path": str(tmp_path)}
    config = json.dumps({"type": "mock_distributed_fs", "params": params})
    found = _run("start()", RAY_object_spilling_config=config)
    assert found.get("refused") == "UnsupportedError", found
    assert '"type": "mock_distributed_fs"' in found["said"]
    assert "--object-spilling-directory" in found["said"]
