"""The shorter way of a task that is what the last one was, where jails are kept.

Nothing differs but the time it takes: what a call has of its own is its own, and
every limit holds. Who is called by the shorter way sees it in its caller's name.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import ray

import raysandbox
from raysandbox import errors

# As many processors as there are: one worker has all of these tasks.
ALONE = {"num_cpus": 2, "max_retries": 0}
FAST, BRISK = raysandbox.tag("fast"), raysandbox.tag("brisk")
ROUNDS = 6


@pytest.fixture(autouse=True)
def fresh_jail(cluster: str) -> None:
    """A worker has one jail of a job: a task of another profile ends it."""
    del cluster
    spare = raysandbox.tag("spare")
    ray.get(ray.remote(resources=spare, **ALONE)(_count).remote())


def _way() -> bool:
    """Whether the task that asks was called by the shorter way."""
    return sys._getframe(2).f_code.co_name == "_serve"


def _count() -> int:
    """Return how often this jail was asked before."""
    counter = sys.modules.setdefault("counter", type(sys)("counter"))
    counter.n = getattr(counter, "n", -1) + 1
    return int(counter.n)


def test_it_is_taken_for_the_same_task_without_arguments() -> None:
    """Control: with arguments, in a jail of one task, or for an actor it is not."""

    def way(*_: Any) -> tuple[bool, int]:
        return _way(), _count()

    fast = ray.remote(resources=FAST, **ALONE)(way)
    found = [ray.get(fast.remote()) for _ in range(ROUNDS)]
    assert found == [(number >= 2, number) for number in range(ROUNDS)]
    assert ray.get(fast.remote(1)) == (False, ROUNDS)
    standard = ray.remote(resources=raysandbox.tag("standard"), **ALONE)(way)
    assert {ray.get(standard.remote())[0] for _ in range(ROUNDS)} == {False}


def test_each_has_its_own_context() -> None:
    """Id, attempt and name are those of the call, whatever the last one had."""

    def context() -> tuple[bool, str, str]:
        own = ray.get_runtime_context()
        return _way(), own.get_task_id(), own.get_task_name()

    task = ray.remote(resources=FAST, **ALONE)(context)
    ways = []
    for name in ["a"] * 4 + ["b", "c", "b", "b", "a"]:
        reference = task.options(name=name).remote()
        way, task_id, seen = ray.get(reference)
        assert (task_id, seen) == (reference.task_id().hex(), name)
        ways.append(way)
    assert ways == [False, False, True, True, False, False, False, True, False]


def test_another_function_or_profile_in_between_gets_its_own() -> None:
    """A call goes where its tag says, and runs what it names."""

    def one() -> tuple[int, int]:
        return 1, _count()

    def two() -> tuple[int, int]:
        return 2, _count()

    first, second = (ray.remote(resources=FAST, **ALONE)(each) for each in (one, two))
    other = ray.remote(resources=BRISK, **ALONE)(one)
    for _ in range(ROUNDS):
        ray.get(first.remote())
    seen = [ray.get(task.remote()) for task in (first, second, first, other, second)]
    assert [value for value, _ in seen] == [1, 2, 1, 1, 2]
    # A jail of another profile counts for itself, and this one's ends with it.
    assert seen[3][1] == 0


@pytest.mark.parametrize("profile", ["fast", "spare"])
def test_a_call_with_arguments_in_between_is_not_what_comes_again(profile: str) -> None:
    """Not its function, nor its name: the last task is the very last one.

    Guards against a worker that remembers another task than its jail does.
    """

    def plain() -> tuple[str, str]:
        return "plain", ray.get_runtime_context().get_task_name()

    def other(word: str = "none") -> tuple[str, str]:
        return f"other {word}", ray.get_runtime_context().get_task_name()

    tag = raysandbox.tag(profile)
    first, second = (ray.remote(resources=tag, **ALONE)(f) for f in (plain, other))
    for _ in range(ROUNDS):
        assert ray.get(first.remote()) == ("plain", "plain")
    for arguments in (("given",), ()):
        word = arguments[0] if arguments else "none"
        assert ray.get(second.remote(*arguments)) == (f"other {word}", "other")
        assert ray.get(first.remote()) == ("plain", "plain")
        assert ray.get(first.remote()) == ("plain", "plain")


VALUES = [
    None, 1, -(2**80), 1.5, True, "text ü", "", b"raw", b"", [1, [2]], {"a": (1, 2)},
    "y" * 70_000, b"z" * 70_000, "y" * 200_000, np.arange(10), np.zeros(100_000), None,
]  # fmt: skip


def test_whatever_is_returned_arrives() -> None:
    """Small and large, plain and pickled, with buffers and without."""
    values = VALUES

    def value() -> Any:
        count = _count()
        return [count, _way(), values[count]] if count % 2 else values[count]

    task = ray.remote(resources=FAST, **ALONE)(value)
    for index, expected in enumerate(VALUES):
        found = ray.get(task.remote())
        if index % 2:
            assert found[:2] == [index, index >= 2]
            found = found[2]
        assert type(found) is type(expected)
        np.testing.assert_equal(found, expected)


def test_several_returns_and_wrong_numbers_of_them() -> None:
    """The answer is taken apart in the jail, each time."""

    def pair() -> Any:
        count = _count()
        return {4: count, 5: None}.get(count, (count, _way()))

    task = ray.remote(resources=FAST, num_returns=2, **ALONE)(pair)
    for count in range(8):
        if count in (4, 5):
            with pytest.raises(Exception, match="where several belong"):
                ray.get(task.remote())
        else:
            found = ray.get(task.remote())
            assert found[0] == count
            assert found[1] is (count >= 2)


def test_exceptions_and_retries_are_as_ever() -> None:
    """An error is its own call's; retry lists are looked at in the jail."""

    def flaky() -> tuple[int, bool]:
        count = _count()
        if count in (3, 4, 7):
            raise (KeyError if count < 7 else OSError)(f"number {count}")
        return count, _way()

    options: dict[str, Any] = {**ALONE, "max_retries": 2}
    task = ray.remote(resources=FAST, retry_exceptions=[KeyError], **options)(flaky)
    assert [ray.get(task.remote()) for _ in range(4)] == [
        (0, False), (1, False), (2, True), (5, False),
    ]  # fmt: skip
    assert ray.get(task.remote()) == (6, True)
    with pytest.raises(OSError, match="number 7"):
        ray.get(task.remote())
    assert ray.get(task.remote())[0] == 8


@pytest.mark.parametrize(
    ("misdeed", "error", "words"),
    [
        (lambda: "x" * (40 << 10), errors.TaskQuotaExceeded, "object_store.max_result"),
        (lambda: b"x" * (40 << 10), errors.TaskQuotaExceeded, "max_result"),
        (lambda: print("x" * 80_000), errors.TaskQuotaExceeded, "limits.output"),
        (lambda: time.sleep(9), errors.TaskTimedOut, "limits.wall_time"),
        (lambda: os._exit(3), errors.TaskKilled, "exit status 3"),
        (lambda: os.kill(os.getpid(), 9) or os.abort(), errors.TaskKilled, "signal"),
    ],
)  # fmt: skip
def test_every_limit_holds(misdeed: Any, error: type[Exception], words: str) -> None:
    """And the next call runs again, in another jail where it must be."""

    def task() -> int:
        count = _count()
        if count == 4 and _way():
            return misdeed()  # type: ignore[no-any-return]
        return count

    remote = ray.remote(resources=BRISK, **ALONE)(task)
    assert [ray.get(remote.remote()) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(error, match=words):
        ray.get(remote.remote())
    assert ray.get(remote.remote()) in (0, 5)


def test_a_jail_that_ended_meanwhile_costs_no_task() -> None:
    """What was not run is run in another one."""

    def leaves_early() -> int:
        count = _count()
        if count == 4:
            threading.Timer(0.05, os._exit, (0,)).start()
        return count

    for pause_s in (1.0, 0.06):
        task = ray.remote(resources=FAST, **ALONE)(leaves_early)
        assert [ray.get(task.remote()) for _ in range(5)] == [0, 1, 2, 3, 4]
        time.sleep(pause_s)
        assert ray.get(task.remote()) == 0
        ray.get(ray.remote(resources=BRISK, **ALONE)(_count).remote())


def test_output_comes_before_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Each line of each call, once."""

    def speak() -> None:
        print(f"number {_count()} by {_way()}")

    task = ray.remote(resources=FAST, **ALONE)(speak)
    for _ in range(ROUNDS):
        ray.get(task.remote())
    seen, until = "", time.monotonic() + 20
    while time.monotonic() < until and seen.count("number") < ROUNDS:
        time.sleep(0.1)
        seen += "".join(capfd.readouterr())
    for number in range(ROUNDS):
        assert seen.count(f"number {number} by {number >= 2}") == 1
