"""The proxy in front of raylet's and the object store's sockets, on a real Ray."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.node.drive import Side

pytestmark = [pytest.mark.ray, pytest.mark.root]

MB = 1_000_000
ROOT = Path(__file__).resolve().parents[2]

# What a worker can send to kill its node, or others in it.
FATAL = (
    "junk to raylet",
    "actor done",
    "unknown type to the store",
    "seal of what it lacks",
)
REFUSED = (
    *FATAL,
    "wrong cookie",
    "unknown type",
    "negative length",
    "offset past the end",
    "register again",
    "empty table",
    "junk to the store",
    "release of what it lacks",
    "short id",
    "abort of what it lacks",
    "create again",
    "delete",
    "object of another job",
    "double release",
    "half a message",
)


@pytest.fixture(scope="module")
def stocks(start) -> dict[str, Side]:
    """A stock Ray for each of these messages, of which none lives long."""
    return {name: start("stock") for name in FATAL}


@pytest.fixture(scope="module")
def bombed(stocks) -> Future[list]:
    """What a put bomb does to one of them, before its message."""
    done: Future[list] = Future()
    try:
        stock = stocks[FATAL[-1]]
        stock("keep", 50 * MB)
        puts = stock("call", "bomb", 30, 10 * MB)
        done.set_result([puts, stock("kept_is_there")])
    except Exception as error:
        done.set_exception(error)
    return done


@pytest.fixture(scope="module")
def lives(stocks, bombed) -> dict[str, bool]:
    """Whether a stock node lives through each of these: one each, all at once."""

    def attack(name: str) -> bool:
        assert stocks[name]("raylet_lives")
        lives: bool = stocks[name]("attack", name)[1]
        stocks[name].leave()
        return lives

    with ThreadPoolExecutor(len(stocks)) as pool:
        return dict(zip(stocks, pool.map(attack, stocks)))


@pytest.mark.parametrize("name", FATAL)
def test_control_one_message_kills_a_stock_node(lives, name):
    """One message of a task ends raylet, and all that runs on the node."""
    assert not lives[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_message_that_breaks_a_rule_ends_its_worker_alone(proxied, name):
    """The worker is killed; raylet lives, and the next task finds all in order."""
    before = proxied("stats")["ended"]
    seen, lives = proxied("attack", name)
    assert lives
    assert seen == "WorkerCrashedError"
    assert proxied("honest") == 1 << 18
    assert name == "half a message" or proxied("stats")["ended"] > before


def test_an_honest_job_goes_through(proxied):
    """Tasks and actors put, get, wait and pass objects on as without it."""
    assert proxied("honest") == 1 << 18
    assert proxied("actor") == 1 << 17


def test_the_real_sockets_are_out_of_reach(proxied):
    """Both real names lead to the proxy."""
    found, (proxy, raylet) = proxied("peers")
    assert found == [proxy, proxy]
    assert raylet != proxy


@pytest.mark.parametrize(
    "limits",
    [
        {"fetch_bytes": 5 * MB},
        {"fetch_objects": 2},
        {"fetch_each": MB},
        {"job_fetch_bytes": 5 * MB},
        {"job_fetch_objects": 2},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_what_a_worker_gets_at_once_is_limited(proxied, limits):
    """It ends; what was let go of counts no more, and other workers' not at all."""
    assert proxied("fetch", 3, 2 * MB, "keep", {}) == 3  # the control
    assert proxied("fetch", 3, 2 * MB, "keep", limits) == "WorkerCrashedError"
    reasons = [each["reason"] for each in proxied("events") if "reason" in each]
    assert "got more at once than max_argument" in reasons[-1]
    if "fetch_each" not in limits:
        assert proxied("fetch", 6, 2 * MB, "drop", limits) == 6


def test_a_child_of_a_worker_has_no_connection_of_its_own(proxied):
    """A process that raylet did not start is refused: it would be counted anew."""
    assert proxied("child_connects") == ""
    reasons = [each["reason"] for each in proxied("events") if "reason" in each]
    assert "not a process that raylet started" in reasons


def test_control_a_put_bomb_fills_a_stock_store(bombed):
    """Nothing stops a task from storing more than fits: others' objects are spilled."""
    (done, error), is_there = bombed.result()
    assert (done, error) == (30, "")
    assert not is_there


def test_a_put_bomb_ends_at_the_quota(proxied):
    """Ray's own "store is full" error for the task; nobody else loses anything."""
    proxied("keep", 50 * MB)
    done, error = proxied("call", "bomb", 30, 10 * MB)
    assert (done, error) == (5, "ObjectStoreFullError")
    assert proxied("kept_is_there")
    refused = [e for e in proxied("events") if e["event"] == "quota_refused"]
    used, allowed = refused[-1]["job_bytes"]
    assert allowed == 60 * MB
    assert 50 * MB < used <= allowed


def test_what_is_freed_no_longer_counts(proxied):
    """A job at its quota that lets its objects go may put again."""
    first, error, again, no_error = proxied("call", "bomb_then_free", 30, 10 * MB)
    assert (first, error) == (5, "ObjectStoreFullError")
    assert (again, no_error) == (1, "")


def test_a_put_bomb_past_rays_client_ends_at_the_quota(proxied):
    """Creations sent over the worker's own descriptor are counted as any other."""
    before = len(proxied("events"))
    assert proxied("call", "raw_bomb", 40, 10 * MB) == "WorkerCrashedError"
    fresh = proxied("events")[before:]
    refused = [each["job_bytes"] for each in fresh if each["event"] == "quota_refused"]
    assert refused
    assert all(50 * MB < used <= allowed for used, allowed in refused)
    assert proxied("honest") == 1 << 18


def test_answers_that_nobody_reads_hold_up_nobody(proxied):
    """The store answers others while a worker asks, reads nothing, and leaves.

    Guards against a proxy that waits for one of its clients: the store spins on a
    descriptor that it can't send.
    """
    slowest, objects = proxied("slowest_put_during", "unread", 3)
    assert objects > 1000
    assert slowest < 2
    assert proxied("honest") == 1 << 18


def test_more_than_fits_is_spilled_and_restored(start):
    """Spill and restore workers go through the proxy as well."""
    side = start("proxy", store=100 << 20)
    assert side("spill", 12, 15 * MB)
    kinds = {each["kind"] for each in side("stats")["workers"]}
    side.leave()
    assert kinds == {"worker", "io"}


def test_a_worker_is_bound_once(start):
    """Without a job a worker stores nothing; its first word is its last."""
    side = start("proxy", bind=False, limits={"job_bytes": 60 * MB})
    ok, again = side("bind", "", "63000000")
    assert ok == "ok"
    assert "bound already" in again
    assert side("attack", "short id") == ["WorkerCrashedError", True]
    # Bound to another job, its own objects are not its own.
    assert side("bind", "63000000", "63000000") == ["WorkerCrashedError"]
    # Bound to none, there are none.
    assert side("call", "bomb", 1, 1000) == "WorkerCrashedError"
    side.leave()


def test_a_proxy_that_dies_takes_its_workers_along(start):
    """There is no way around a dead proxy: connections end, and workers with them."""
    side = start("proxy")
    assert side("honest") == 1 << 18
    assert side("end_proxy")
    assert side("raylet_lives")
    side.leave()


def test_hostile_messages_under_sanitizers(tmp_path):
    """Random and mutated messages: no bad read, and what is counted is stored."""
    built = subprocess.run(
        ["make", "-C", str(ROOT / "native"), "fuzz", f"OUT={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    frames = Path(__file__).with_name("frames.txt")
    seed = str(time.time_ns() % 1_000_000)
    done = subprocess.run(
        [str(tmp_path / "fuzz-proxy"), str(frames), "6", seed],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "abort_on_error=1"},
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
