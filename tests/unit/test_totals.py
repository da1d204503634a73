"""The group of all workers and jails of a node."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysandbox.kernel import cgroup
from raysandbox.node import totals
from raysandbox.policy import Totals
from tests.require import require


@pytest.fixture
def group() -> Iterator[totals.Group]:
    """A node's group with a quarter of a core, 300 MiB and 64 pids."""
    require("cgroup:cpu", "cgroup:memory", "cgroup:pids")
    made = totals.enforce(
        Totals.model_validate({"cpu": 0.25, "memory": "300MiB", "pids": 64})
    )
    yield made
    until = time.monotonic() + 10
    while not made.remove() and time.monotonic() < until:
        time.sleep(0.05)


@pytest.fixture
def inside(group, monkeypatch) -> cgroup.Cgroups:
    """Where a worker of that node makes its groups."""
    for name, value in group.variables().items():
        monkeypatch.setenv(name, value)
    return cgroup.discover()


def _run(child: cgroup.Cgroup, code: str) -> subprocess.Popen[bytes]:
    fds = child.procs_fds()

    def enter() -> None:
        for fd in fds:
            os.write(fd, b"0")

    try:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            preexec_fn=enter,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    finally:
        for fd in fds:
            os.close(fd)


def test_shares_become_numbers():
    """Percent is of what this process may use; more than there is, is all of it."""
    have = totals.Amounts(8, 16 << 30, 1000)
    found = totals.limits(Totals(), have)
    assert (found.cpu_cores, found.memory_bytes) == (7.2, int(16 * 0.8 * (1 << 30)))
    assert (found.pids, found.cpu_weight) == (500, 50)
    wanted = Totals.model_validate({"cpu": 99, "memory": "1TiB", "pids": 5000})
    found = totals.limits(wanted, have)
    assert (found.cpu_cores, found.memory_bytes, found.pids) == (8, 16 << 30, 1000)


def test_what_there_is_is_within_a_container_s_limits(group, inside):
    """A share of a node in a group with limits is a share of those."""
    have = totals.amounts(inside)
    assert have.cpu_cores == 0.25
    assert have.memory_bytes == 300 << 20
    assert have.pids == 64


def test_a_worker_s_groups_have_every_controller_of_the_node_s(group, inside):
    """The node's group passes on all that its parent has: limits hold below it."""
    with cgroup.discover({}) as outside:
        assert inside.versions == outside.versions
    assert inside.base_paths == group.group.paths
    limits = cgroup.CgroupLimits(memory_bytes=64 << 20, pids=8, cpu_cores=0.1)
    child = inside.create("child", limits, required=True)
    assert child.absent.keys() <= {"oom_group"}
    assert child.remove()


def test_children_together_have_no_more_cpu_than_the_node_leaves(group, inside):
    """Two busy groups without limits of their own share a quarter of a core."""
    children = [inside.create(f"busy{n}", cgroup.CgroupLimits()) for n in range(2)]
    processes = [_run(child, "while True: pass") for child in children]
    try:
        time.sleep(0.5)
        before, began = _cpu_s(children), time.monotonic()
        time.sleep(2)
        rate = (_cpu_s(children) - before) / (time.monotonic() - began)
    finally:
        for child in children:
            child.remove()
        for process in processes:
            process.wait()
            process.stdout.close()
    assert rate < 0.35


def _cpu_s(children: list[cgroup.Cgroup]) -> float:
    return sum(child.usage().cpu_time_s or 0 for child in children)


def test_one_that_takes_all_memory_is_not_the_end_of_the_others(group, inside):
    """Out of the node's memory: one group loses, the others live on.

    Guards against memory.oom.group on the parent, which would end all workers.
    """
    idle = inside.create("idle", cgroup.CgroupLimits())
    hungry = inside.create("hungry", cgroup.CgroupLimits())
    waiting = _run(idle, "import time; print('up', flush=True); time.sleep(300)")
    try:
        assert waiting.stdout.readline() == b"up\n"
        eater = _run(hungry, "b = bytearray(600 << 20); print(len(b))")
        assert eater.wait(200) != 0  # emulated, each page takes its time
        eater.stdout.close()
        assert waiting.poll() is None
    finally:
        hungry.remove()
        idle.remove()
        waiting.wait()
        waiting.stdout.close()


def test_groups_of_nodes_that_are_gone_are_swept(group):
    """The next start removes what a killed node left; a living node's stays."""
    code = (
        "from raysandbox.node import totals; from raysandbox.policy import Totals;"
        "print(':'.join(totals.enforce(Totals()).group.paths))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    left = done.stdout.strip().split(":")
    assert all(Path(path).is_dir() for path in left)
    totals.sweep(cgroup.discover())
    assert not any(Path(path).exists() for path in left)
    assert all(Path(path).is_dir() for path in group.group.paths)


def test_a_node_in_a_container_leaves_the_hosts_groups_alone(group):
    """Who lives outside of its pid namespace can't be seen from there.

    Guards against a start in a container, which shares the host's groups, that takes
    the node of the host for dead and ends its workers.
    """
    require("program:unshare")
    code = (
        "import os; from raysandbox.kernel import cgroup;"
        "from raysandbox.node import totals;"
        "print(os.getpid(), totals.sweep(cgroup.discover()))"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1 []\n"
    assert all(Path(path).is_dir() for path in group.group.paths)
