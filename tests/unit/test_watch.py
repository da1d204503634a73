"""What nodes have after they joined, against the inventory."""

from __future__ import annotations

import pytest

from raysandbox.cluster.settings import Inventory, Node
from raysandbox.cluster.watch import TOGETHER_S, Ceilings

INVENTORY = Inventory(
    nodes={
        "head": Node(addresses=("10.0.0.1",), head=True),
        "n1": Node(addresses=("10.0.0.2",), resources={"CPU": 4, "memory": 1e9}),
    }
)
GROUP = "0123456789abcdef0123456789abcdef0100"
NODES = {"a": "node/n1", "b": "node/n1", "h": "head/head", "x": "node/gone"}
ALIVE = dict.fromkeys(NODES, "10.0.0.2")
HONEST = {
    "CPU": 4.0, "memory": 1e9, "node:10.0.0.2": 1.0, f"CPU_group_{GROUP}": 3.0,
    f"CPU_group_0_{GROUP}": 3.0, f"bundle_group_{GROUP}": 1000.0,
    f"bundle_group_0_{GROUP}": 1000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"CPU": 64.0}, "claims 64 of CPU"), ({"GPU": 1.0}, "claims 1 of GPU"),
        ({"node:10.0.0.1": 1.0}, "of node:10.0.0.1"),
        ({f"CPU_group_{GROUP}": 5.0}, "claims 5 of CPU"),
        ({f"GPU_group_1_{GROUP}": 1.0}, "claims 1 of GPU"),
        ({"CPU_group_0": 5.0}, "claims 5 of CPU_group_0"),
        ({"CPU": float("nan")}, "claims nan"),
    ],
)  # fmt: skip
def test_node_that_has_grown_since_it_joined_is_found(
    more: dict[str, float], says: str
) -> None:
    """Its stream of reports says what it has, and nobody else looks at that.

    What placement groups set aside of an honest node is nothing more.
    """
    look = Ceilings().look
    assert look(INVENTORY, NODES, ALIVE, {"a": HONEST}, 0.0) == {}
    found = look(INVENTORY, NODES, ALIVE, {"a": {**HONEST, **more}}, 0.0)
    assert list(found) == ["a"]
    assert says in found["a"]


def test_one_identity_has_its_ceilings_once() -> None:
    """Under however many node ids; one that came back is there twice for a while."""
    ceilings = Ceilings()
    both = {"a": HONEST, "b": HONEST}
    for now in (0.0, TOGETHER_S - 1):
        assert ceilings.look(INVENTORY, NODES, ALIVE, both, now) == {}
    found = ceilings.look(INVENTORY, NODES, ALIVE, both, TOGETHER_S)
    assert list(found) == ["b"]
    assert "claims 8 of CPU" in found["b"]
    only = {"b": "10.0.0.2"}
    assert ceilings.look(INVENTORY, NODES, only, both, TOGETHER_S) == {}
    assert ceilings.look(INVENTORY, NODES, ALIVE, both, TOGETHER_S) == {}
    halves = {key: {"CPU": 2.0, "node:10.0.0.2": 1.0} for key in "ab"}
    for now in (0.0, 2 * TOGETHER_S):
        assert ceilings.look(INVENTORY, NODES, ALIVE, halves, now) == {}
