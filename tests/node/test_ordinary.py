"""A node whose raylet is an ordinary user's: jails, workers as boundaries, the proxy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.attacks.conftest import USER
from tests.node.nodes import Node, delegate
from tests.require import require

pytestmark = [pytest.mark.ray, pytest.mark.root]

POLICY = """
[offer]
strict = 3
trusted = 3

[[rules]]
name = "everybody"
profiles = ["trusted"]

[totals]
cpu = "100%"
memory = "80%"
pids = "90%"

[object_store]
max_job = "60MB"
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A node of a user with delegated control groups."""
    require("landlock:6")
    given = delegate(USER)
    try:
        made = Node(policy=POLICY, uid=USER, RAYSANDBOX_CGROUP=":".join(given))
        yield made
        made.close()
    finally:
        for path in given:
            subprocess.run(["find", path, "-depth", "-type", "d", "-delete"])


def test_x(node):
    print(node.log.read_text())
    print(
        node.drive("""
    def f():
        return os.getpid(), os.getuid()
    print(ray.get(ray.remote(f).remote(), timeout=60))
    print(ray.get(ray.remote(f).options(resources={"sandbox:trusted":1}).remote(), timeout=60))
    """)
    )
    raise AssertionError
