"""A node whose raylet is an ordinary user's: jails, boundary workers, the proxy."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox.node import store_proxy
from tests.attacks.conftest import USER
from tests.node import rootfs
from tests.node.nodes import Node, policy

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(240)]

MORE = """
[object_store]
max_job = "60MiB"

[runtime_env]
image_uri = {"docker.example/x" = {root = "ROOT", python = "PYTHON"}}
why = "It is ours."
"""


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A root file system that is root's."""
    made = Path(tempfile.mkdtemp(prefix="rsn-", dir="/srv"))
    made.chmod(0o755)
    try:
        rootfs.make(made / "root", "of the image")
        yield made / "root"
    finally:
        shutil.rmtree(made)


@pytest.fixture(scope="module")
def node(image: Path) -> Iterator[Node]:
    """A node of a user with delegated control groups."""
    more = MORE.replace("ROOT", str(image)).replace("PYTHON", rootfs.PYTHON)
    with Node(policy=policy(more, strict=3, trusted=3), uid=USER) as made:
        yield made


LOOK = """
import ctypes, json

def errno_of(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return 0

def attack(raylet, victim, files):
    libc = ctypes.CDLL(None, use_errno=True)
    unshared = libc.unshare(0x10000000)
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "raylet": errno_of(os.kill, raylet, 0),
        "victim": errno_of(os.kill, victim, 0),
        "environment": errno_of(lambda: open(f"/proc/{raylet}/environ", "rb").read()),
        "memory": errno_of(open, f"/proc/{raylet}/mem", "rb"),
        "files": [errno_of(open, path) for path in files],
        "namespace": unshared and ctypes.get_errno(),
        "nested": None,
    }

def nested(*arguments):
    found = attack(*arguments)
    found["nested"] = ray.get(ray.remote(lambda: os.getpid()).options(
        resources={"sandbox:strict": 1}, num_cpus=0).remote(), timeout=60)
    return found

def fill():
    kept = []
    try:
        for _ in range(8):
            kept.append(ray.put(bytes(10 << 20)))
    except Exception as error:
        return len(kept), type(error).__name__
    return len(kept), ""

def ask(profile, function, *arguments):
    return ray.get(ray.remote(max_retries=2)(function).options(
        resources={"sandbox:" + profile: 1}).remote(*arguments), timeout=60)

import raysandbox
print(json.dumps({
    "control": attack(RAYLET, VICTIM, FILES),
    "strict": ask("strict", attack, RAYLET, VICTIM, FILES),
    "trusted": ask("trusted", nested, RAYLET, VICTIM, FILES),
    "fill": ask("trusted", fill),
}))
"""


@pytest.fixture(scope="module")
def found(node: Node) -> Iterator[dict[str, Any]]:
    """What a driver of that user may do, and what a jail and a worker may."""
    victim = node._start(["sleep", "200"])
    values = {
        "RAYLET": node.raylet,
        "VICTIM": victim.pid,
        "FILES": [str(node.token), str(node.session / "logs" / "raylet.out")],
    }
    names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    try:
        answer = json.loads(node.drive(names + LOOK).splitlines()[-1])
        # A job that has ended is forgotten after a while.
        stats = store_proxy.stats_of(f"{node.session}/raysandbox/sockets")
        yield {**answer, "jobs": stats["jobs"]}
    finally:
        victim.kill()
        victim.wait()


def test_control_the_user_may_all_of_it(found):
    """Outside: raylet, other processes, the token, and a user namespace."""
    control = found["control"]
    assert (control["raylet"], control["victim"], control["environment"]) == (0, 0, 0)
    assert control["files"] == [0, 0]


def test_a_jail_is_a_jail(found):
    """As where raylet is root's."""
    inside = found["strict"]
    assert inside["pid"] == 1
    assert inside["raylet"]
    assert inside["victim"]
    assert all(inside["files"])


def test_a_boundary_worker_is_walled_by_landlock(found):
    """One user for raylet and all workers: no signal, no file, no memory of others."""
    inside = found["trusted"]
    assert inside["pid"] > 1
    assert inside["raylet"] in (errno.EPERM, errno.ESRCH)
    assert inside["victim"] in (errno.EPERM, errno.ESRCH)
    assert inside["environment"]
    assert inside["memory"]
    assert all(inside["files"])
    assert inside["namespace"] == errno.EPERM
    assert inside["nested"] == 1


def test_its_objects_go_through_the_proxy(found):
    """60 MiB for the job: the sixth put of ten is refused, and the proxy lives."""
    count, error = found["fill"]
    assert count <= 6
    assert error
    assert any(job["refused"] for job in found["jobs"])


def test_workers_see_an_image_of_the_policy_s(node):
    """No right of root's is needed for it."""
    out = node.drive(
        """
        import json
        from raysandbox import tag

        def look():
            import only_there
            return only_there.WORDS, sorted(os.listdir("/usr/bin"))

        found = [
            ray.get(ray.remote(resources=tag(name), runtime_env=environment)(look)
                .remote(), timeout=60)
            for name in ("strict", "trusted")
            for environment in [{"image_uri": "docker.example/x"}]
        ]
        print(json.dumps(found))
        """
    )
    assert json.loads(out.splitlines()[-1]) == [["of the image", ["sh"]]] * 2
