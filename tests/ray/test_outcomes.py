"""What the task's owner sees when a limit is hit, and that the worker goes on."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import time

import numpy as np
import pytest
import ray

import raysandbox
from tests.ray.events import ended

THRIFTY = raysandbox.tag("thrifty")


@ray.remote(resources=THRIFTY)
def fine():
    return 1


@pytest.fixture(autouse=True)
def worker_goes_on():
    """After each of these the next task of the same kind works."""
    yield
    assert ray.get(fine.remote(), timeout=60) == 1


def outcome(function, error, *args, profile="thrifty"):
    """Run ``function`` as a task that must end in ``error``; return that."""
    task = ray.remote(resources=raysandbox.tag(profile))(function)
    with pytest.raises(error) as caught:
        ray.get(task.remote(*args), timeout=60)
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    again = pickle.loads(pickle.dumps(caught.value.cause))
    assert str(again) == str(caught.value.cause)
    message = str(caught.value)
    assert function.__name__ in message
    assert profile in message
    return message


def hog():
    kept = []
    while True:
        kept.append(bytearray(1 << 22))


def test_out_of_memory():
    """Names the limit, the peak and the remedy; the event says so too."""
    message = outcome(hog, raysandbox.TaskOutOfMemory)
    assert "limits.memory allows 128 MiB" in message
    assert "peak of 12" in message
    event = ended("hog")[-1]
    assert event["outcome"] == "TaskOutOfMemory"
    assert event["memory_peak_bytes"] > 100 << 20
    assert event["protections"]["seccomp"] == "enforced"


def hog_child():
    if os.fork() == 0:
        hog()
    os.wait()
    time.sleep(30)


def test_out_of_memory_in_a_child():
    """The memory of everything a task started counts, and ends the task."""
    outcome(hog_child, raysandbox.TaskOutOfMemory)


def sleep_long():
    time.sleep(100)


def test_wall_time():
    """A task that sleeps past limits.wall_time is ended."""
    start = time.monotonic()
    message = outcome(sleep_long, raysandbox.TaskTimedOut, profile="quick")
    assert re.search(r"limits\.wall_time allows 3 s; seen: [3-9]\.", message)
    assert time.monotonic() - start < 30


def spin_children():
    for _ in range(2):
        if os.fork() == 0:
            while True:
                pass
    while True:
        pass


def test_cpu_time_of_all_processes_counts():
    """CPU seconds of children are the task's."""
    message = outcome(spin_children, raysandbox.TaskTimedOut)
    assert re.search(r"limits\.cpu_time allows 2 s; seen: [2-9]\.", message)
    assert "s of CPU; to fix: make it faster" in message


def big_result():
    return np.zeros(1 << 21, dtype="u1")


def test_result_quota():
    """A result over object_store.max_result is refused with both numbers."""
    message = outcome(big_result, raysandbox.TaskQuotaExceeded)
    assert "object_store.max_result allows 1048576 bytes" in message
    assert "209" in message


def take(_):
    return 1


def test_argument_quota():
    """An argument over object_store.max_argument never reaches a jail."""
    message = outcome(take, raysandbox.TaskQuotaExceeded, np.zeros(1 << 21, "u1"))
    assert "object_store.max_argument" in message
    assert "number 1" in message


def test_put_quota_counts_all_returns():
    """Several results together stay within object_store.max_put."""

    @ray.remote(resources=THRIFTY, num_returns=3)
    def three():
        return [np.zeros(900_000, "u1") for _ in range(3)]

    with pytest.raises(raysandbox.TaskQuotaExceeded, match="max_"):
        ray.get(three.remote())


def noise():
    while True:
        os.write(1, b"noise\n" * 1000)


def test_output_quota():
    """A flood of output ends the task and not the log."""
    message = outcome(noise, raysandbox.TaskQuotaExceeded)
    assert "limits.output allows 65536 bytes" in message


def leave():
    os._exit(7)


def test_exit_without_an_answer():
    """The exit status is in the error."""
    assert "exit status 7" in outcome(leave, raysandbox.TaskKilled)


def crash():
    import ctypes

    ctypes.string_at(0)


def test_crash():
    """A native crash is the task's own."""
    assert "SIGSEGV" in outcome(crash, raysandbox.TaskKilled)


def give_up():
    sys.exit(3)


def test_sys_exit():
    """sys.exit in a task is an error that says so."""
    assert "sys.exit(3)" in outcome(give_up, raysandbox.TaskKilled)


def forbidden():
    import ctypes

    ctypes.CDLL(None).unshare(0x10000000)
    time.sleep(5)
    return "let through"


def test_denied_call_kills_under_such_a_profile():
    """``action = "kill"``: the call and the rule are in the error."""
    message = outcome(forbidden, raysandbox.TaskDenied, profile="lethal")
    assert "unshare" in message


def network():
    import socket

    socket.create_connection(("127.0.0.1", 80))


def test_denied_socket_carries_a_hint():
    """PermissionError of a denied call says which call and which rule."""

    @ray.remote(resources=raysandbox.tag("strict"))
    def connect():
        network()

    with pytest.raises(PermissionError) as caught:
        ray.get(connect.remote())
    message = str(caught.value)
    assert "socket(AF_INET" in message
    assert "network.mode" in message
    assert "strict" in message


def read_shadow():
    return open("/etc/shadow").read()


def test_absent_file_carries_a_hint():
    """A host file that no rule names: the error says which rule would."""

    @ray.remote(resources=raysandbox.tag("strict"))
    def look():
        return read_shadow()

    with pytest.raises(FileNotFoundError, match=r"filesystem\.read"):
        ray.get(look.remote())


@pytest.mark.parametrize(
    ("hint", "attempt"),
    [
        ("filesystem.scratch", lambda: _fill("/scratch/file", 64)),
        ("limits.file_size", lambda: _fill("/scratch/file", 8)),
        ("limits.open_files", lambda: [open("/dev/null") for _ in range(100)]),
        ("limits.pids", lambda: _fork(64)),
        ("filesystem.write", lambda: open("/usr/x", "w")),
    ],
)
def test_exhausted_limits_carry_a_hint(hint, attempt):
    """Each limit that an OSError comes from is named."""

    @ray.remote(resources=THRIFTY)
    def run():
        attempt()

    with pytest.raises(OSError, match=hint.replace(".", r"\.")):
        ray.get(run.remote())


def _fill(path, mebibytes):
    for number in range(mebibytes // 2):
        name = path if mebibytes < 16 else f"{path}{number}"
        with open(name, "ab") as file:
            file.write(bytes(2 << 20))


def _fork(count):
    for _ in range(count):
        if os.fork() == 0:
            signal.pause()


def test_a_profile_that_cant_be_used_is_not_offered(offered):
    """A node says which file, key and value it leaves out, and offers no tag for it."""
    warned, resources = offered
    for word in ("broken.toml", "limits.memory", "5 apples"):
        assert word in warned
    assert "sandbox:broken" not in resources
    assert "sandbox:strict" in resources


def test_tag_of_no_possible_profile_is_refused_at_once():
    """tag() refuses names that can't be a profile's."""
    with pytest.raises(raysandbox.ProfileError):
        raysandbox.tag("../etc")
    with pytest.raises(raysandbox.ProfileError):
        raysandbox.tag("strict", 0)
