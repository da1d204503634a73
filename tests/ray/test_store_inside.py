"""``boundary = "worker"`` on a node of ours: code of a user beside Ray's sockets."""

from __future__ import annotations

import pytest
import ray

import raysandbox
from tests.node import hostile

pytestmark = pytest.mark.root

TIGHT = raysandbox.tag("tight")
MB = 1_000_000


@pytest.fixture(autouse=True, scope="module")
def hostile_by_value():
    """Workers don't see the tests' files."""
    ray.cloudpickle.register_pickle_by_value(hostile)
    yield
    ray.cloudpickle.unregister_pickle_by_value(hostile)


def run(function, *arguments, **options):
    task = ray.remote(resources=TIGHT, max_retries=0, **options)(function)
    return ray.get(task.remote(*arguments), timeout=120)


def test_a_put_bomb_ends_at_the_quota_of_its_profile():
    """The worker's puts stay within the profile's max_put; the control is 2 of 30."""
    assert run(hostile.bomb, 2, 10 * MB) == (2, "")
    assert run(hostile.bomb, 30, 10 * MB) == (2, "ObjectStoreFullError")


@pytest.mark.parametrize("name", ["junk to raylet", "actor done", "short id"])
def test_a_message_that_kills_a_stock_node_ends_its_worker(name):
    """What `tests.node` shows on a stock node; here the next task runs."""
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        run(hostile.attack, name)
    assert run(hostile.bomb, 1, MB) == (1, "")


def test_an_actor_may_put_and_get():
    """An actor's worker is bound as one: its creation is told to raylet."""

    class Keeper:
        def keep(self, size):
            self.ref = ray.put(bytes(size))
            return len(ray.get(self.ref))

    keeper = ray.remote(resources=TIGHT)(Keeper).remote()
    assert ray.get(keeper.keep.remote(10 * MB), timeout=120) == 10 * MB
    ray.kill(keeper)


def test_the_proxy_is_all_that_a_worker_can_reach():
    """A child of the worker gets no connection of its own to the store."""
    node = ray._private.worker.global_worker.node
    assert run(hostile.child_connects, node.plasma_store_socket_name) == ""
