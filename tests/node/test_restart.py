"""A node that was ended as its operator ends it, and the next one in its place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysandbox import launch
from tests.attacks.conftest import USER
from tests.node.nodes import Node, free_port, policy

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(240)]

# Detached: alive, with their jails, when the node is told to end.
WORK = """
import json
from raysandbox import tag

@ray.remote(num_cpus=0)
class Stays:
    def look(self, data):
        return os.getpid(), len(data)

data = ray.put(bytes(20 << 20))
for name, profile in (("jailed", "strict"), ("inside", "trusted")):
    try:
        ray.get_actor(name, namespace="n")
        raise SystemExit(f"{name} is still known")
    except ValueError:
        pass
    options = {"name": name, "namespace": "n", "lifetime": "detached"}
    there = Stays.options(resources=tag(profile), **options).remote()
    pid, size = ray.get(there.look.remote(data), timeout=60)
    assert size == 20 << 20
    assert (pid < 10) == (name == "jailed")
print(json.dumps({name: amount for name, amount in ray.cluster_resources().items()
                  if name.startswith("sandbox:")}))
"""


@pytest.fixture(params=["SIGTERM", "ray stop"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """Of root's, whose start blocks; then of a user's, whose start returns."""
    blocks = request.param == "SIGTERM"
    with Node(
        policy=policy(strict=3, trusted=3),
        arguments=[f"--node-manager-port={free_port()}"],
        uid=0 if blocks else USER,
        block=blocks,
        # What is detached would not end by itself in the half minute that Ray waits.
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="1",
    ) as made:
        yield made


def _members(groups: list[str]) -> set[int]:
    return {
        int(pid)
        for group in groups
        for procs in Path(group).rglob("cgroup.procs")
        for pid in procs.read_text().split()
    }


def _files(uid: int) -> set[str]:
    """Name what this user's node, or root's workers, have where all may write."""
    ids = range(uid, uid + 1)
    if not uid:
        workers = launch.worker_ids()[0]
        ids = range(workers.first, workers.first + workers.count)
    found = set()
    for directory in ("/tmp", "/dev/shm", "/var/tmp"):
        for each in os.scandir(directory):
            try:
                if each.stat(follow_symlinks=False).st_uid in ids:
                    found.add(each.path)
            except FileNotFoundError:
                continue
    return found


def _nothing(look: Callable[[], object], limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while left := look():
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.1)


def _stop(node: Node, own_files: set[str]) -> None:
    """End the node, and look for what it leaves behind."""
    raylet, group = node.raylet, f"raysandbox-node-{node.process.pid}-*"
    groups = node.groups(raylet)
    living = {*node.processes(), *_members(groups)}
    assert len(groups) >= 2
    assert len(living) >= 6
    node.stop()
    _nothing(node.processes)
    _nothing(lambda: [pid for pid in living if os.path.exists(f"/proc/{pid}")])
    _nothing(lambda: node.groups(raylet))
    _nothing(lambda: list(Path("/sys/fs/cgroup").rglob(group)))
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    assert not [line for line in mounts if str(node.temporary) in line]
    assert list((node.session / "logs").glob("raysandbox_state-*.bin")) == []
    _nothing(lambda: _files(node.uid) - own_files)


def test_the_next_node_finds_nothing_of_the_one_before(node):
    """No process, group, mount or file; and it serves at the same ports.

    Guards against what only a kill of everything would have cleared away.
    """
    files = _files(node.uid) | {str(node.temporary)}
    offered = [json.loads(node.drive(WORK).splitlines()[-1])]
    _stop(node, files)
    node.start()
    offered.append(json.loads(node.drive(WORK).splitlines()[-1]))
    _stop(node, files)
    assert offered == [{"sandbox:strict": 3.0, "sandbox:trusted": 3.0}] * 2
