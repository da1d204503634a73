"""The honest job of one side of the cluster's comparison.

Runs on a machine of a lab, beside a node of a running cluster, and is told by a
`tests.peer.Peer`.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests import peer


class Counter:
    """An actor that counts."""

    def __init__(self) -> None:
        self.number = 0

    def increment(self) -> int:
        """Count one."""
        self.number += 1
        return self.number


def _nothing() -> None:
    pass


_held: dict[str, Any] = {}


def connect() -> float:
    """Return seconds that it takes to connect to the cluster."""
    _held.clear()
    if ray.is_initialized():
        ray.shutdown()
    begun = time.perf_counter()
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    return time.perf_counter() - begun


def tasks(count: int) -> float:
    """Return no-op tasks per second, all in flight at once."""
    if "task" not in _held:
        _held["task"] = ray.remote(_nothing)
    begun = time.perf_counter()
    ray.get([_held["task"].remote() for _ in range(count)])
    return count / (time.perf_counter() - begun)


def calls(count: int) -> float:
    """Return calls of one actor's method per second, all in flight at once."""
    if "actor" not in _held:
        _held["actor"] = ray.remote(num_cpus=0)(Counter).remote()
        ray.get(_held["actor"].increment.remote())
    begun = time.perf_counter()
    ray.get([_held["actor"].increment.remote() for _ in range(count)])
    return count / (time.perf_counter() - begun)


def actors(count: int) -> float:
    """Return actors per second, each made, called once and killed."""
    if "class" not in _held:
        _held["class"] = ray.remote(num_cpus=0)(Counter)
    begun = time.perf_counter()
    made = [_held["class"].remote() for _ in range(count)]
    ray.get([actor.increment.remote() for actor in made])
    spent = time.perf_counter() - begun
    for actor in made:
        ray.kill(actor)
    return count / spent


def bare_groups(count: int) -> float:
    """Return placement groups per second, each made, waited for and removed."""
    begun = time.perf_counter()
    for _ in range(count):
        group = placement_group([{"CPU": 0.01}])
        if not group.wait(60):
            raise TimeoutError("a placement group was not ready in 60 s")
        remove_placement_group(group)
    return count / (time.perf_counter() - begun)


def groups(count: int) -> float:
    """Return placement groups per second, each made, used by a task, and removed."""
    if "task" not in _held:
        _held["task"] = ray.remote(_nothing)
    begun = time.perf_counter()
    for _ in range(count):
        group = placement_group([{"CPU": 1}])
        strategy = PlacementGroupSchedulingStrategy(group)
        ray.get(_held["task"].options(scheduling_strategy=strategy).remote())
        remove_placement_group(group)
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Serve until stdin ends."""
    peer.serve(globals())
    ray.shutdown()


if __name__ == "__main__":
    main()
