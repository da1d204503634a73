"""Honest work on a hardened cluster is as it was."""

from __future__ import annotations

import sys
import time

import pytest

from tests.cluster.conftest import (
    DASHBOARD,
    HEAD,
    JOB,
    SUBMIT,
    Attack,
    Driver,
    Hardened,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def begun() -> float:
    """When the first of these tests began, as the audit log counts."""
    return time.time()


@pytest.fixture(scope="module")
def alice(begun: float, hardened: Hardened) -> Driver:
    del begun
    return hardened.shared("alice")


def test_tasks_run_on_both_nodes(alice: Driver) -> None:
    """Tasks run on each node, with objects that cross the network."""
    assert (
        alice(
            "import numpy\n"
            "from ray.util.scheduling_strategies import "
            "NodeAffinitySchedulingStrategy as On\n"
            "@ray.remote\n"
            "def total(a):\n"
            "    return int(a.sum())\n"
            "ref = ray.put(numpy.ones(1 << 18))\n"
            "nodes = [n['NodeID'] for n in ray.nodes() if n['Alive']]\n"
            "result = ray.get([\n"
            "    total.options(scheduling_strategy=On(n, soft=False)).remote(ref)\n"
            "    for n in nodes], timeout=60)"
        )
        == [1 << 18] * 2
    )


def test_actors_named_and_detached(alice: Driver) -> None:
    """Actors keep their state, are found by name and killed by their owner."""
    assert alice(
        "@ray.remote(num_cpus=0)\n"
        "class Counter:\n"
        "    n = 0\n"
        "    def up(self):\n"
        "        self.n += 1; return self.n\n"
        "a = Counter.options(name='c', lifetime='detached').remote()\n"
        "ray.get(a.up.remote(), timeout=60)\n"
        "result = ray.get(ray.get_actor('c').up.remote(), timeout=60)\n"
        "ray.kill(ray.get_actor('c'))"
    ) == 2  # fmt: skip


def test_placement_groups(alice: Driver) -> None:
    """Bundles are reserved, used by tasks, and given back."""
    assert alice(
        "from ray.util.placement_group import placement_group as pg\n"
        "from ray.util.placement_group import remove_placement_group\n"
        "from ray.util.scheduling_strategies import "
        "PlacementGroupSchedulingStrategy as S\n"
        "g = pg([{'CPU': 1}, {'CPU': 1}], strategy='STRICT_SPREAD', name='g')\n"
        "ray.get(g.ready(), timeout=60)\n"
        "f = total.options(scheduling_strategy=S(g, 1))\n"
        "result = ray.get(f.remote(ref), timeout=60)\n"
        "remove_placement_group(g)"
    ) == 1 << 18  # fmt: skip


def test_runtime_env(hardened: Hardened) -> None:
    """A working directory and variables reach the workers."""
    (hardened.head.home / "wd").mkdir(exist_ok=True)
    (hardened.head.home / "wd" / "carried.py").write_text("VALUE = 42\n")
    driver = hardened.driver("alice", init="runtime_env={'working_dir': 'wd'}")
    try:
        assert driver(
            "@ray.remote(runtime_env={'env_vars': {'X': 'y'}})\n"
            "def f():\n"
            "    import carried; return carried.VALUE, os.environ['X']\n"
            "result = ray.get(f.remote(), timeout=100)"
        ) == [42, "y"]  # fmt: skip
    finally:
        driver.close()


def test_state_api_and_status(hardened: Hardened, alice: Driver) -> None:
    """`ray status`, `ray list nodes` and the state API answer."""
    assert alice(
        "from ray.util.state import list_nodes, list_actors\n"
        "result = [len(list_nodes()), list_actors()[0].class_name]"
    )[0] == 2  # fmt: skip
    out = hardened.head.run(*hardened.env("alice"), "ray", "status")
    assert "Active:" in out.stdout
    out = hardened.head.run(*hardened.env("alice"), "ray", "list", "nodes")
    assert "ALIVE" in out.stdout


def test_observer_sees_and_does_nothing(hardened: Hardened) -> None:
    """An observer's certificate is enough for `ray status`, not for a job."""
    out = hardened.head.run(*hardened.env("otto"), "ray", "status")
    assert "Active:" in out.stdout
    code = "import ray; ray.init(address='auto')"
    out = hardened.head.run(
        *hardened.env("otto"), sys.executable, "-c", code, check=False, timeout_s=90
    )
    assert out.returncode != 0


def test_jobs(hardened: Hardened) -> None:
    """A program runs as a driver with a certificate, and as a submitted job."""
    (hardened.head.home / "job").mkdir(exist_ok=True)
    (hardened.head.home / "job" / "run.py").write_text(JOB)
    out = hardened.head.run(*hardened.env("alice"), sys.executable, "job/run.py")
    assert "TOTAL 90" in out.stdout
    out = hardened.head.run(*hardened.env("alice"), *SUBMIT, timeout_s=100)
    assert "TOTAL 90" in out.stdout
    assert "succeeded" in out.stdout


def test_dashboard_is_behind_tls_and_roles(hardened: Hardened, attack: Attack) -> None:
    """The dashboard is reached from elsewhere with a certificate, by role.

    Positive control: an operator's request; an observer reads and changes nothing.
    """
    for name, component, method, status in (
        ("olga", "cli", "GET", 200),
        ("alice", "driver", "GET", 200),
        ("otto", "cli", "GET", 200),
        ("otto", "cli", "POST", 403),
        ("node", "raylet", "GET", 403),
    ):
        target = hardened.target(name, component)
        target["address"] = f"{HEAD}:{DASHBOARD}"
        answer = attack(target, "https", method, "/api/version")
        assert answer["status"] == status, (name, method)
    clear = {"address": f"{HEAD}:0"}
    found = attack(clear, "plain_ports", [DASHBOARD, 8265])["answers"]
    assert not any(answer.startswith("HTTP/1") for answer in found.values())


def test_honest_work_was_not_refused(hardened: Hardened, begun: float) -> None:
    """Nothing that the tests above did was refused to alice, node or worker."""
    refused = hardened.events(begun, ok="False", who="^(head|node|driver/alice|worker)")
    assert [r for r in refused if r.get("method") != "/api/version"] == []


def test_env_without_a_node_says_so(hardened: Hardened) -> None:
    """A driver needs a node of the cluster on its machine, and is told."""
    mine = f"--cluster={hardened.head.home / 'alice'}"
    out = hardened.rogue.raysandbox("cluster", "env", mine, "--", "true")
    assert "no node of a cluster runs on this machine" in out.stderr
