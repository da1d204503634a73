"""64 busy workers and one that forks: raylet, the GCS and `ray status` go on.

The machine is small on purpose: tasks ask for 64 CPUs of a node that has two. Ray
starts workers with a nice value of 15; as root any task undoes that.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.node.nodes import PLAIN, Node

pytestmark = [pytest.mark.ray, pytest.mark.root]

WORKERS, CPUS = 64, len(os.sched_getaffinity(0))
POLICY = """
[offer]
strict = 128

[totals]
cpu = "90%"
memory = "80%"
pids = "50%"
"""

# In the driver: asks raylet, the GCS and the command line, and says how long they take.
MEASURE = """
import json, statistics, subprocess, threading
import ray._private.worker
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2 as messages
from ray.core.generated import node_manager_pb2_grpc

def took(call, *arguments):
    begun = time.monotonic()
    call(*arguments)
    return time.monotonic() - begun

node = ray.nodes()[0]
channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
gcs = ray._private.worker.global_worker.gcs_client

def ask_raylet():
    raylet.GetSystemConfig(messages.GetSystemConfigRequest(), timeout=60)

def status(limit_s):
    command = [sys.executable, "-m", "ray.scripts.scripts", "status",
               "--address", node["NodeManagerAddress"] + ":" + ADDRESS.split(":")[1]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return
    assert done.returncode == 0 and "CPU" in done.stdout, done.stdout + done.stderr

@ray.remote(num_cpus=0, resources={"honest": 1})
def honest():
    return 7

def measure(limit_s=30):
    found = {}
    raylets = [took(ask_raylet) for _ in range(20)]
    tables = [took(gcs.internal_kv_keys, b"x", None, 60) for _ in range(20)]
    for name, times in (("raylet", raylets), ("gcs", tables)):
        found[name], found[name + "_most"] = statistics.median(times), max(times)
    found["honest"] = took(lambda: ray.get(honest.remote(), timeout=60))
    found["status"] = took(status, limit_s)
    return found

ray.get(honest.remote(), timeout=60)
before = measure()
"""
SPIN = """
def spin(until):
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError:
        pass
    while time.monotonic() < until:
        pass
    return time.process_time()
"""
# One worker each, all idle until the last is there.
MANY = """
@ray.remote(num_cpus=1)
class Spinner:
    def ready(self):
        return os.getpid()
    def spin(self, until):
        return spin(until)

spinners = [Spinner.remote() for _ in range(WORKERS)]
begun = time.monotonic()
ray.get([each.ready.remote() for each in spinners], timeout=110)
started = time.monotonic() - begun
until = time.monotonic() + SECONDS
running = [each.spin.remote(until) for each in spinners]
time.sleep(1)
busy = measure()
used = ray.get(running, timeout=100)
print(json.dumps({"before": before, "busy": busy, "used": used, "started": started}))
"""
# The same load from a single task: nothing on stock Ray keeps it from that.
FORKED = """
@ray.remote(num_cpus=1)
def fork_and_spin(seconds):
    until = time.monotonic() + seconds
    for _ in range(WORKERS - 1):
        if os.fork() == 0:
            spin(until)
            os._exit(0)
    return spin(until)

running = fork_and_spin.remote(SECONDS)
time.sleep(2)
busy = measure(SECONDS)
used = [ray.get(running, timeout=100)]
print(json.dumps({"before": before, "busy": busy, "used": used}))
"""


def _measure(node: Node, load: str, seconds: float) -> dict[str, Any]:
    names = f"ADDRESS, WORKERS, SECONDS = {node.address!r}, {WORKERS}, {seconds}\n"
    out = node.drive(names + MEASURE + SPIN + load)
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """On a node with the default totals: 64 workers, busy at once."""
    node = Node(
        policy=POLICY,
        arguments=[f"--num-cpus={WORKERS}", '--resources={"honest": 1}'],
        RAY_worker_register_timeout_seconds="120",
    )
    try:
        return _measure(node, MANY, 15)
    finally:
        node.close()


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """On stock Ray: one task, 64 busy processes."""
    node = Node(PLAIN, arguments=['--resources={"honest": 1}'])
    try:
        return _measure(node, FORKED, 12)
    finally:
        node.close()
