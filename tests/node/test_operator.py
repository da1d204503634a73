"""What a node's operator wrote holds, is said, and is seen: one node for all of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import wheel
from tests.node.nodes import ROOT, Node, free_port

pytestmark = [pytest.mark.ray, pytest.mark.root]

AGENT = "dashboard-agent-grpc"
# CPU limits of the profiles and of the worker are above the totals on purpose.
POLICY = """
untagged = "trusted"

[offer]
strict = 3
standard = 3
trusted = 6

[[rules]]
name = "everybody"
profiles = ["standard", "trusted"]

[runtime_env]
pip = "allow"
uv = "allow"
why = "The operator's own users."

[worker]
pids = 1024
cpu = 64
connect = []

[totals]
cpu = "60%"
memory = "80%"
pids = "90%"

[object_store]
max_job = "60MiB"

[audit]
directory = "AUDIT"
"""


@pytest.fixture(scope="module")
def audit() -> Iterator[Path]:
    """The operator's directory for events."""
    with tempfile.TemporaryDirectory(prefix="rsn-", dir=Path.home()) as directory:
        yield Path(directory) / "audit"


@pytest.fixture(scope="module")
def node(audit: Path) -> Iterator[Node]:
    ports = (f"--{name}-port={free_port()}" for name in ("node-manager", AGENT))
    made = Node(
        policy=POLICY.replace("AUDIT", str(audit)),
        arguments=[*ports],
        RAY_metrics_report_interval_ms="1000",
    )
    try:
        yield made
    finally:
        made.close()


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Return every event in a directory."""
    return [
        json.loads(line)
        for path in directory.glob("raysandbox_*.jsonl")
        for line in path.read_text().splitlines()
    ]


def command(*words: str) -> str:
    """Return what one of our commands prints."""
    done = subprocess.run(
        [sys.executable, "-m", "raysandbox", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_untagged_tasks_run_in_the_worker_where_the_policy_says_so(node, audit):
    """A limit above the node's totals is in force as the totals have it, and said.

    Guards against EINVAL, with which version 1 answers a quota above its parent's.
    """
    out = node.drive(
        """
        import json
        def look():
            return [os.getpid(), len(os.sched_getaffinity(0))]
        print(json.dumps(ray.get(ray.remote(look).remote(), timeout=60)))
        """
    )
    pid, _ = json.loads(out.splitlines()[-1])
    events = read_events(audit)
    (entered,) = [e for e in events if e["event"] == "worker_entered"]
    assert (entered["pid"], entered["profile"]) == (pid, "trusted")
    (started,) = [e for e in events if e["event"] == "node_started"]
    if os.path.exists("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        said = entered["protections"]["limits.cpu_cores"]
        assert said.startswith("degraded: "), started["protections"]
        said = started["protections"]["worker's control group"]
        assert said.startswith("degraded: worker.cpu: ")
        assert "and that holds" in said
    for limit in ("cpu_cores", "memory_bytes", "pids"):
        assert started["protections"][f"totals.{limit}"] == "enforced"
    assert started["protections"]["ports and signals"].startswith("enforced: for TCP")


def test_honest_work_goes_on_where_ports_are_governed(node):
    """Tasks, nested ones, objects, and calls between actors, with and without a jail.

    The runtime_env agent's port is the control: the profile lets Ray's connect to it,
    raylet alone does, and the worker's wall has no rule for it.
    """
    out = node.drive(
        """
        import json, socket
        import numpy as np
        from raysandbox import tag

        @ray.remote(num_cpus=0)
        class Counter:
            def __init__(self):
                self.count = 0
            def add(self, array):
                self.count += int(array.sum())
                return os.getpid(), self.count

        @ray.remote(num_cpus=0)
        class Caller:
            def call(self, other, array):
                return os.getpid(), *ray.get(other.add.remote(array), timeout=60)

        @ray.remote(num_cpus=0)
        def nested(depth):
            reference = ray.put(np.ones(1_000_000))
            below = ray.get(nested.remote(depth - 1), timeout=60) if depth else 0
            return below + int(ray.get(reference).sum())

        @ray.remote(num_cpus=0)
        def connect(port):
            try:
                socket.create_connection((ray.util.get_node_ip_address(), port), 5)
            except OSError as error:
                return error.errno

        counter, caller = Counter.remote(), Caller.remote()
        stored = ray.put(np.ones(1_000_000))
        pids = {ray.get(caller.call.remote(counter, stored), timeout=60)[:2]
                for _ in range(3)}
        jailed = ray.remote(resources=tag("strict"))(lambda array: int(array.sum()))
        (here,) = ray._private.state.state.node_table()
        agent = here["RuntimeEnvAgentPort"]
        found = {
            "actors": [len(set(pair)) for pair in pids],
            "nested": ray.get(nested.remote(2), timeout=90),
            "jailed": ray.get(jailed.remote(stored), timeout=60),
            "agent": ray.get(connect.remote(agent), timeout=60),
            "raylet": ray.get(connect.remote(here["NodeManagerPort"]), timeout=60),
        }
        socket.create_connection((ray.util.get_node_ip_address(), agent), 5)
        print(json.dumps(found))
        """
    )
    assert json.loads(out.splitlines()[-1]) == {
        "actors": [2],
        "nested": 3_000_000,
        "jailed": 1_000_000,
        "agent": errno.EACCES,
        "raylet": None,
    }


def test_events_of_walled_workers_arrive_where_the_policy_says(node, audit):
    """Jails' and workers' own, in the operator's directory and in no other."""
    node.drive(
        """
        from raysandbox import tag
        jailed = ray.remote(resources=tag("strict"))(lambda: os.getpid())
        assert ray.get(jailed.remote(), timeout=60) == 1
        """
    )
    end = time.monotonic() + 30
    wanted = {"node_started", "worker_entered", "worker_ended", "jail_ended"}
    while not wanted <= {e["event"] for e in read_events(audit)}:
        assert time.monotonic() < end, {e["event"] for e in read_events(audit)}
        time.sleep(0.2)
    assert read_events(node.session / "logs") == []
    # Each worker has a file of its own, which nobody else may read.
    for path in audit.glob("raysandbox_events-*.jsonl"):
        assert path.stat().st_mode & 0o007 == 0
    shown = command("events", "--directory", str(audit), "--event", "jail_ended")
    assert "strict" in shown


FULL = """
import json, subprocess
from raysandbox import tag

@ray.remote(resources=tag("trusted"), num_cpus=0)
class Holder:
    def fill(self):
        self.kept = []
        for _ in range(10):
            try:
                self.kept.append(ray.put(bytes(10 << 20)))
            except Exception as error:
                return [len(self.kept), type(error).__name__, str(error)]

    def result(self):
        return bytes(20 << 20)

holder = Holder.remote()
found = {"put": ray.get(holder.fill.remote(), timeout=60)}
try:
    ray.get(holder.result.remote(), timeout=60)
except Exception as error:
    found["result"] = [type(error).__name__, str(error)]
for name in ("ps", "metrics"):
    words = [sys.executable, "-m", "raysandbox", name] + ["--json"] * (name == "ps")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found[name] = done.stdout
words[-1:] = ["ps"]
found["text"] = subprocess.run(words, capture_output=True, text=True).stdout
found["job"] = ray.get_runtime_context().get_job_id()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def full(node: Node) -> dict[str, Any]:
    """What a job at its quota is told, and what its operator sees meanwhile."""
    return json.loads(node.drive(FULL).splitlines()[-1])  # type: ignore[no-any-return]


def test_a_full_quota_is_named_in_the_tasks_error(full, audit):
    """Ray's own error, with what is full, how full, and the key that says so."""
    count, name, text = full["put"]
    assert (count, name) == (5, "ObjectStoreFullError")
    assert "hint: a quota is full, not the node's memory" in text
    assert f"job {full['job']} has " in text
    assert f"of {60 << 20} bytes (object_store.max_job of the node's policy)" in text
    refusals = command("events", "--directory", str(audit), "--event", "quota_refused")
    assert full["job"] in refusals
    assert f"of {60 << 20}" in refusals
    name, text = full["result"]
    assert "ObjectStoreFullError" in text
    assert "object_store.max_job of the node's policy" in text


def test_a_jobs_share_of_the_store_is_seen(node, full):
    """In ``ps``, by job and by worker, and on the page for Prometheus."""
    rows = json.loads(full["ps"])
    (job,) = [r for r in rows if r["kind"] == "job" and r["id"] == full["job"]]
    assert 50 << 20 <= job["stored_bytes"] <= 60 << 20
    assert job["stored_limit_bytes"] == 60 << 20
    assert job["stored_objects"] >= 5
    assert job["refused"] >= 2
    workers = [r for r in rows if r["kind"] == "worker" and r["stored_bytes"]]
    assert [r["refused"] >= 2 for r in workers] == [True]
    labels = f'job="{full["job"]}",node="{job["node"]}"'
    page = full["metrics"].replace(f'node="{job["node"]}",job="{full["job"]}"', labels)
    assert f"raysandbox_job_store_limit_bytes{{{labels}}} 6.291456e+07" in page
    (refusals,) = [
        line
        for line in page.splitlines()
        if line.startswith(f"raysandbox_job_store_refusals_total{{{labels}}}")
    ]
    assert float(refusals.split()[-1]) >= 2
    line = next(each for each in full["text"].splitlines() if full["job"] in each)
    assert "60M" in line


SEEN = """
import json, subprocess, urllib.request
from raysandbox import tag
from raysandbox.observe import live

def command(*words):
    done = subprocess.run([sys.executable, "-m", "raysandbox", *words],
                          capture_output=True, text=True)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

here = ray.get_runtime_context()
node, job = here.get_node_id(), here.get_job_id()

def rows():
    return [row for row in live.rows() if row.node == node and row.kind != "job"]

def until(check, limit_s=60):
    end = time.monotonic() + limit_s
    while not (found := check()):
        assert time.monotonic() < end, rows()
        time.sleep(0.1)
    return found

def told(reference):
    try:
        return ray.get(reference, timeout=60)
    except ray.exceptions.RayTaskError as error:
        return [type(error.cause).__name__, str(error.cause)]
    except Exception as error:
        return [type(error).__name__, str(error)]

@ray.remote(max_retries=0, num_cpus=0)
def busy():
    import socket
    try:
        socket.socket()
    except OSError:
        pass
    block = bytearray(48 << 20)
    while block:
        pass

begun = time.time()
profiles = {"one": "strict", "two": "standard", "inside": "trusted"}
tasks = {name: busy.options(resources=tag(profile), name=name).remote()
         for name, profile in profiles.items()}
ids = {name: each.task_id().hex() for name, each in tasks.items()}

def jails():
    found = {row.task: row for row in rows() if row.kind == "jail"}
    if all(task in found and found[task].memory_bytes > 48 << 20
           and found[task].denials == (task != ids["inside"])
           for task in ids.values()):
        return {name: found[task] for name, task in ids.items()}

seen = until(jails)
found = {"node": node, "job": job, "ids": ids, "took": time.time() - begun,
         "ps": command("ps", "--json", "--node", node, "--job", job),
         "text": command("ps", "--node", node),
         "top": command("top", "--json", "-n", "2", "-d", "0.5", "--node", node)}
found["kill"] = command("kill", ids["one"], "--reason", "too hungry")
found["killed"] = told(tasks["one"])
found["kill worker"] = command("kill", str(seen["two"].pid), "--json")
found["crashed"] = told(tasks["two"])
found["kill inside"] = command("kill", ids["inside"], "--wait", "0.5")
found["ended"] = told(tasks["inside"])
until(lambda: not {seen["two"].pid, seen["inside"].pid} & {row.pid for row in rows()})
found["left"] = [row.id for row in rows() if row.kind == "jail" and row.job == job]
(table,) = ray.nodes()
url = f"http://{table['NodeManagerAddress']}:{table['MetricsExportPort']}/metrics"

def metrics():
    # Each worker hands on its own, when its turn comes.
    lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
    lines = [each for each in lines if each.startswith("ray_raysandbox_jails_")]
    if any('profile="strict"' in line and 'outcome="TaskKilled"' in line
           for line in lines):
        return lines

found["metrics"] = until(metrics)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def seen(node: Node) -> dict[str, Any]:
    """Three tasks at work, as their operator sees them, and then ends them."""
    return json.loads(node.drive(SEEN).splitlines()[-1])  # type: ignore[no-any-return]


def test_ps_and_top_show_what_runs_behind_the_wall(seen):
    """Whose it is, from the worker's file; what it uses, from its control group."""
    rows = {row["task"]: row for row in json.loads(seen["ps"]["out"])}
    profiles = {"one": "strict", "two": "standard", "inside": "trusted"}
    for name, profile in profiles.items():
        row = rows[seen["ids"][name]]
        assert (row["kind"], row["state"], row["name"]) == ("jail", "running", name)
        assert (row["node"], row["job"]) == (seen["node"], seen["job"])
        assert row["profile"] == profile
        assert 0 < row["age_s"] < seen["took"] + 60
        assert row["cpu_time_s"] > 0
        assert 48 << 20 < row["memory_bytes"] < row["memory_limit_bytes"]
        assert row["pids"] >= 1
        # What the kernel denies to a worker itself nobody counts.
        assert row["denials"] == (name != "inside")
        line = next(e for e in seen["text"]["out"].splitlines() if row["id"] in e)
        assert profile in line
    looks = [json.loads(line)["rows"] for line in seen["top"]["out"].splitlines()]
    busy = {row["task"]: row["cpu_percent"] for row in looks[-1] if row["task"]}
    assert all(busy[task] > 0 for task in seen["ids"].values())


def test_kill_ends_a_jail_behind_the_wall(seen):
    """Alone, and its task's owner reads by whom and why."""
    assert seen["kill"]["code"] == 0, seen["kill"]
    assert "ended by worker" in seen["kill"]["out"]
    name, text = seen["killed"]
    assert name == "TaskKilled"
    assert "ended by the operator (root: too hungry)" in text


def test_kill_ends_a_worker_behind_the_wall(seen):
    """With its jail; one that is its own boundary by the kernel."""
    assert json.loads(seen["kill worker"]["out"])[0]["by"] in ("SIGTERM", "SIGKILL")
    assert seen["crashed"][0] == "WorkerCrashedError"
    assert "ended by kernel" in seen["kill inside"]["out"]
    assert seen["ended"][0] == "WorkerCrashedError"
    assert seen["left"] == []


def test_jails_are_counted_behind_the_wall(seen):
    """At Ray's own metrics port: what started, and what it came to."""
    started = [each for each in seen["metrics"] if "jails_started_total" in each]
    assert any('profile="strict"' in each for each in started)
    (killed,) = [
        each
        for each in seen["metrics"]
        if "jails_ended_total" in each
        and 'outcome="TaskKilled"' in each
        and 'profile="strict"' in each
    ]
    assert float(killed.split()[-1]) == 1


OFFLINE = ["--no-index", "--no-deps"]


@pytest.mark.parametrize(
    ("installer", "options"),
    [
        ("pip", {"pip_install_options": OFFLINE}),
        # Where it is installed; without it Ray would ask an index for it.
        ("uv", {"uv_pip_install_options": [*OFFLINE, "--no-cache"]}),
    ],
)
def test_packages_that_the_policy_allows_reach_the_jails(
    node, tmp_path, installer, options
):
    """What was installed is there in the jail, and in no job without it."""
    pytest.importorskip(installer)
    asked = {installer: {"packages": [str(wheel.build(tmp_path))], **options}}
    out = node.drive(
        f"""
        import json
        from raysandbox import tag

        def look():
            try:
                import rsx_extra
            except ImportError:
                return None
            return rsx_extra.NAME, os.getpid()

        task = ray.remote(resources=tag("strict"))(look)
        there = task.options(runtime_env={asked!r})
        found = [ray.get(each.remote(), timeout=90) for each in (there, task)]
        image = {{"image_uri": "docker.example/x"}}
        try:
            ray.get(task.options(runtime_env=image).remote(), timeout=60)
        except Exception as error:
            found.append(str(error))
        print(json.dumps(found))
        """
    )
    there, without, refused = json.loads(out.splitlines()[-1])
    assert there == ["installed by pip", 1]
    assert without is None
    assert "runtime_env.image_uri = {URI = DIRECTORY} would allow one" in refused


KEEPS = """
import json
look = ray.remote(resources={"sandbox:trusted": 1})(lambda: os.getpid())
pids = [ray.get(look.remote(), timeout=60) for _ in range(3)]
print(json.dumps([pids, "raysandbox" in sys.modules]))
"""


def test_a_driver_that_never_heard_of_us_keeps_its_workers(node):
    """``RAYSANDBOX=1`` is enough where tasks are submitted.

    Without it a worker of ``boundary = "worker"`` leaves after its task.
    """
    pids, imported = json.loads(node.drive(KEEPS).splitlines()[-1])
    assert len(set(pids)) == 3
    assert not imported
    pids, _ = json.loads(node.drive(KEEPS, RAYSANDBOX="1").splitlines()[-1])
    assert len(set(pids)) == 1


JAILS_FIRST = """
import json
options = {"num_cpus": 0, "max_retries": 0}
jail = ray.remote(resources={"sandbox:strict": 1}, **options)(
    lambda: (time.sleep(1), os.getpid())[1])
inside = ray.remote(resources={"sandbox:trusted": 1}, **options)(lambda: os.getpid())
jails = ray.get([jail.remote() for _ in range(3)], timeout=60)
pids = [ray.get(inside.remote(), timeout=60) for _ in range(6)]
again = ray.get([jail.remote() for _ in range(3)], timeout=60)
print(json.dumps([jails, pids, again, "raysandbox" in sys.modules]))
"""


def test_a_worker_that_had_jails_serves_a_task_inside_without_a_retry(node):
    """Raylet sends it there, of a driver that never heard of us: it can't know."""
    jails, pids, again, imported = json.loads(node.drive(JAILS_FIRST).splitlines()[-1])
    assert not imported
    assert all(pid < 10 for pid in (*jails, *again))
    assert len({*pids}) == 6
    assert all(pid > 10 for pid in pids)


def test_nothing_is_left_of_a_node_that_was_killed(node):
    """Its keeper ends with its last worker's group, not at the end of its patience."""
    raylet = node.raylet
    plan = str(node.session / "raysandbox" / "worker.plan")
    assert raylet
    assert keepers(plan)
    os.kill(raylet, signal.SIGKILL)
    end = time.monotonic() + 40
    while keepers(plan):
        assert time.monotonic() < end, "the keeper lingers"
        time.sleep(0.1)
    assert node.groups(raylet) == []
    assert list((node.session / "logs").glob("raysandbox_state-*.bin")) == []


def keepers(plan: str) -> list[int]:
    """Return the processes that wait for the end of this plan's raylet."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.path.basename(words[0]) == b"raysandbox-node" and plan.encode() in words:
            found.append(int(entry))
    return found
