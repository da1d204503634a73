"""Actors: ordinary methods, one jail for life, clear refusals of the rest."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ray

import raysandbox

STRICT = raysandbox.tag("strict")


@ray.remote(resources=STRICT)
class Counter:
    """Counts, and keeps what it counted."""

    def __init__(self, start=0, *, step=1):
        self.count, self.step = start, step

    def add(self, times=1):
        self.count += times * self.step
        return self.count

    @ray.method(num_returns=2)
    def both(self):
        return self.count, self.step

    def fail(self):
        raise ValueError("on purpose")

    def leave(self):
        os._exit(1)

    def jail(self):
        Path("/scratch/calls").open("a").write("x")
        return os.getpid(), os.getuid(), Path("/scratch/calls").stat().st_size

    def name(self):
        context = ray.get_runtime_context()
        return context.get_actor_id(), context.get_actor_name()


def test_methods_share_one_jail_and_their_state():
    """State stays between calls; the process is the jail's."""
    counter = Counter.remote(5, step=2)
    assert ray.get([counter.add.remote(), counter.add.remote(times=3)]) == [7, 13]
    assert ray.get(counter.both.remote()) == [13, 2]
    assert ray.get(counter.jail.remote()) == (1, 1000, 1)
    assert ray.get(counter.jail.remote()) == (1, 1000, 2)


def test_an_exception_leaves_the_actor_alive():
    """A method that raises does not end the actor."""
    counter = Counter.remote()
    with pytest.raises(ValueError, match="on purpose"):
        ray.get(counter.fail.remote())
    assert ray.get(counter.add.remote()) == 1


def test_named_actors_and_their_context():
    """A name works, and the jail knows it."""
    counter = Counter.options(name="the-counter").remote()
    again = ray.get_actor("the-counter")
    assert ray.get(again.add.remote()) == 1
    assert ray.get(counter.name.remote()) == (counter._actor_id.hex(), "the-counter")
    ray.kill(counter)


def test_ready_and_call_on_the_actor():
    """Ray's own methods on every actor work."""
    counter = Counter.remote(3)
    assert ray.get(counter.__ray_ready__.remote())
    assert ray.get(counter.__ray_call__.remote(lambda self, n: self.count + n, 4)) == 7


def test_a_jail_that_ends_says_so_in_later_calls():
    """After the jail is gone each call names what happened to it."""
    counter = Counter.remote()
    with pytest.raises(raysandbox.TaskKilled, match="exit status 1"):
        ray.get(counter.leave.remote())
    with pytest.raises(raysandbox.TaskKilled, match="actor's jail has ended"):
        ray.get(counter.add.remote())


def test_constructor_that_raises_fails_the_actor():
    """The constructor's error is the actor's death, with its cause."""

    @ray.remote(resources=STRICT)
    class Broken:
        def __init__(self):
            raise RuntimeError("no start")

        def ping(self):
            return 1

    with pytest.raises(ray.exceptions.RayActorError, match="no start"):
        ray.get(Broken.remote().ping.remote())


@pytest.mark.parametrize("kind", ["async", "threaded"])
def test_async_and_threaded_actors_are_refused(kind):
    """What a jail does not run is refused at creation, by name."""

    @ray.remote(resources=STRICT)
    class Async:
        async def ping(self):
            return 1

    @ray.remote(resources=STRICT, max_concurrency=2)
    class Threaded:
        def ping(self):
            return 1

    actor = (Async if kind == "async" else Threaded).remote()
    words = "async methods" if kind == "async" else "max_concurrency > 1"
    with pytest.raises(ray.exceptions.RayActorError, match=words):
        ray.get(actor.ping.remote())


def test_kill_ends_the_jail():
    """``ray.kill`` leaves no process of the actor's."""
    marker = f"rsx-kill-{os.getpid()}-{time.monotonic_ns()}"

    @ray.remote(resources=STRICT)
    class Sleeper:
        def start(self, marker):
            import subprocess

            subprocess.Popen(["sleep", "1000"], env={"MARKER": marker})
            return 1

    actor = Sleeper.remote()
    assert ray.get(actor.start.remote(marker)) == 1
    assert _with_environment(marker)
    ray.kill(actor)
    until = time.monotonic() + 40
    while _with_environment(marker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _with_environment(marker)


def _with_environment(marker: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if marker.encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found
