"""64 busy processes of tasks: raylet, the GCS, `ray status` and others' tasks go on.

On two cores 64, sixteen to a jail in four workers: as many workers are the same to
the scheduler, and take minutes to start (RAYSANDBOX_TEST_BUSY_WORKERS=64 has them).
Ray starts workers with a nice value of 15; as root any task undoes that. What was
measured is printed at the end of all tests.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.node.nodes import PLAIN, Node

pytestmark = [
    pytest.mark.alone, pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(900)
]  # fmt: skip

# Thirty-two for each of two cores, and so on up to what strict lets a jail have.
WORKERS = int(os.environ.get("RAYSANDBOX_TEST_BUSY_WORKERS", "4"))
EACH = max(1, min(48, 8 * len(os.sched_getaffinity(0))) * 4 // WORKERS)
SECONDS = 12
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
        return False
    assert done.returncode == 0, done.stdout + done.stderr
    return "CPU" in done.stdout

@ray.remote(num_cpus=0, resources={"honest": 1})
def honest():
    return 7

def measure(limit_s=30):
    found = {}
    raylets = [took(ask_raylet) for _ in range(20)]
    tables = [took(gcs.internal_kv_keys, b"x", None, 60) for _ in range(20)]
    for name, times in (("raylet", raylets), ("gcs", tables)):
        found[name], found[name + "_most"] = statistics.median(times), max(times)
    found["status"] = took(status, limit_s)
    found["honest"] = took(lambda: ray.get(honest.remote(), timeout=60))
    return found

ray.get(honest.remote(), timeout=60)
while not status(60):
    time.sleep(1)  # it takes the GCS some seconds to have one
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

def spin_all(until, count):
    children = []
    for _ in range(count - 1):
        pid = os.fork()
        if pid == 0:
            spin(until)
            os._exit(0)
        children.append(pid)
    spin(until)
    for pid in children:
        os.waitpid(pid, 0)
    used = os.times()
    return count, os.getpriority(os.PRIO_PROCESS, 0), sum(used[:4])
"""
# All idle until the last is there.
MANY = """
@ray.remote(num_cpus=1)
class Spinner:
    def ready(self):
        return os.getpid()
    def spin(self, until):
        return spin_all(until, EACH)

spinners = [Spinner.remote() for _ in range(WORKERS)]
ray.get([each.ready.remote() for each in spinners], timeout=60 + 8 * WORKERS)
until = time.monotonic() + SECONDS
running = [each.spin.remote(until) for each in spinners]
time.sleep(1)
busy = measure()
print(json.dumps({"before": before, "busy": busy,
                  "used": ray.get(running, timeout=60)}))
"""
# The same load from a single task: nothing on stock Ray keeps it from that.
ONE = """
task = ray.remote(num_cpus=1)(spin_all)
ray.get(task.remote(0, 1), timeout=60)
until = time.monotonic() + SECONDS
running = task.remote(until, WORKERS * EACH)
time.sleep(1)
busy = measure()
print(json.dumps({"before": before, "busy": busy,
                  "used": [ray.get(running, timeout=60)]}))
"""


def _measure(node: Node, load: str) -> dict[str, Any]:
    values = (node.address, WORKERS, EACH, SECONDS)
    names = f"ADDRESS, WORKERS, EACH, SECONDS = {values!r}\n"
    out = node.drive(names + MEASURE + SPIN + load, limit_s=110 + 10 * WORKERS)
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """A node with the default totals."""
    node = Node(
        policy=POLICY,
        # Room for a worker that stays: one that has to start would be measured.
        arguments=[f"--num-cpus={WORKERS + 4}", '--resources={"honest": 1}'],
    )
    try:
        return _measure(node, MANY)
    finally:
        node.close()


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """Stock Ray."""
    node = Node(PLAIN, arguments=["--num-cpus=5", '--resources={"honest": 1}'])
    try:
        return _measure(node, ONE)
    finally:
        node.close()


def _told(found: dict[str, Any]) -> str:
    """Say what was measured, before and beside the load."""
    names = ("raylet", "raylet_most", "gcs", "gcs_most", "honest", "status")
    times = (
        f"{name} {found['before'][name] * 1e3:.1f} to {found['busy'][name] * 1e3:.1f}"
        for name in names
    )
    return f"ms before and beside the load: {', '.join(times)}"


def test_what_was_measured_is_said(ours, stock, record_property):
    """For whoever reads the tests' end, whatever is held against it."""
    load = f"{WORKERS} workers with {EACH} busy processes each"
    record_property(load, _told(ours))
    record_property(f"stock Ray, one task with {WORKERS * EACH}", _told(stock))


def test_control_on_stock_ray_the_command_line_starves(stock):
    """One task takes back its nice value, forks, and `ray status` waits for its end."""
    assert [priority for _, priority, _ in stock["used"]] == [0]
    least = min(3 * stock["before"]["status"], 0.8 * SECONDS)
    assert stock["busy"]["status"] > least


def test_all_of_them_were_busy(ours):
    """Each jail had its processes and its share; none could raise itself."""
    assert len(ours["used"]) == WORKERS
    given = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 15)
    for count, priority, used_s in ours["used"]:
        assert (count, priority) == (EACH, given)
        assert used_s > 0.1


def test_raylet_and_gcs_answer_as_before(ours):
    """Median within milliseconds, the slowest of twenty within a second."""
    for name in ("raylet", "gcs"):
        assert ours["busy"][name] < 0.01 + 3 * ours["before"][name]
        assert ours["busy"][f"{name}_most"] < 1


def test_ray_status_answers(ours, stock):
    """In at most three times what it takes on an idle node; stock takes longer."""
    assert ours["busy"]["status"] < 1 + 3 * ours["before"]["status"]
    assert stock["busy"]["status"] > 1.5 * ours["busy"]["status"]


def test_an_honest_task_runs(ours):
    """On resources of its own, in its own worker, before the others are done."""
    assert ours["busy"]["honest"] < 4
