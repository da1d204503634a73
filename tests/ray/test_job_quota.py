"""What all tasks of a job together may hold of the object store, in jails."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray

import raysandbox
from raysandbox.worker import quota

FRUGAL = raysandbox.tag("frugal")
# Above what Ray sends in the reply; three are over the profile's max_job.
SIZE = 700_000


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """References that a test leaves in a cycle would count in the next one."""
    gc.collect()


def refusal(ref):
    """Return the message of the quota's refusal, and keep nothing of it."""
    with pytest.raises(raysandbox.TaskQuotaExceeded) as caught:
        ray.get(ref, timeout=60)
    return str(caught.value)


def block(size=SIZE):
    return np.zeros(size, "u1")


@ray.remote(resources=FRUGAL, max_retries=0)
def make(size=SIZE):
    return np.zeros(size, "u1")


@ray.remote(resources=FRUGAL, max_retries=0)
def take(*_):
    return 1


@ray.remote(resources=FRUGAL, num_cpus=0)
class Taker:
    def take(self, _, seconds):
        time.sleep(seconds)
        return 1


def test_results_of_a_job_stay_within_its_quota():
    """What a job's tasks have stored counts together, and only while it is stored.

    The control: under a profile with more room the same results fit.
    """
    roomy = make.options(resources=raysandbox.tag("standard"))
    control = [roomy.remote() for _ in range(4)]
    assert len(ray.get(control, timeout=60)) == 4
    del control, roomy
    kept = [make.remote() for _ in range(2)]
    ray.get(kept, timeout=60)
    message = refusal(make.remote())
    assert "object_store.max_job allows 2097152 bytes" in message
    assert "1400" in message
    assert "drop references" in message
    # Nothing that was stored is lost, and what is dropped makes room.
    assert [each.nbytes for each in ray.get(kept)] == [SIZE, SIZE]
    kept.pop()
    assert ray.get(make.remote(), timeout=60).nbytes == SIZE


def test_results_of_a_job_count_as_objects():
    """Many small objects are bounded as well."""
    size = 110_000
    kept = [make.remote(size) for _ in range(4)]
    ray.get(kept, timeout=60)
    assert "max_job_objects allows 4" in refusal(make.remote(size))
    assert len(ray.get(kept)) == 4


def test_several_results_of_a_task_count_once():
    """A tuple that is taken apart is its parts, not both."""

    @ray.remote(resources=FRUGAL, num_returns=3, max_retries=0)
    def three():
        return [np.zeros(600_000, "u1") for _ in range(3)]

    refs = three.remote()
    assert sum(each.nbytes for each in ray.get(refs, timeout=60)) == 1_800_000

    @ray.remote(resources=FRUGAL, num_returns=4, max_retries=0)
    def four():
        return list(range(4))

    assert "max_put_objects allows 3" in refusal(four.remote()[0])


def test_arguments_of_a_task_count_together():
    """No single argument is too large; all of them are, or too many."""
    assert "max_arguments allows" in refusal(take.remote(block(), block()))
    assert "max_argument_objects" in refusal(take.remote(1, 2, 3, 4))


def until_it_runs():
    """Wait until a task with arguments runs: its job's file says so."""
    job = ray.get_runtime_context().get_job_id()
    until = time.monotonic() + 30
    while quota.usage_of(str(quota_files()[0] / job)).argument_bytes == 0:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_arguments_of_running_tasks_count_together():
    """Two tasks that run at once share the job's quota; an end gives it back."""
    taker = Taker.remote()
    running = taker.take.remote(block(), 4)
    until_it_runs()
    message = refusal(take.remote(block()))
    assert "object_store.max_job_arguments allows 1048576 bytes" in message
    assert ray.get(running, timeout=60) == 1
    assert ray.get(take.remote(block()), timeout=60) == 1


def test_a_worker_that_dies_leaks_nothing():
    """What a killed worker's task held no longer counts."""
    taker = Taker.remote()
    running = taker.take.remote(block(), 100)
    until_it_runs()
    refusal(take.remote(block()))
    ray.kill(taker)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(running, timeout=60)
    # Ray says so before the process is gone.
    until = time.monotonic() + 30
    while True:
        try:
            assert ray.get(take.remote(block()), timeout=60) == 1
            break
        except raysandbox.TaskQuotaExceeded:
            assert time.monotonic() < until
            time.sleep(0.1)


_OTHER = """
import sys, ray, raysandbox, numpy as np, ray.cloudpickle
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR",
         runtime_env={"worker_process_setup_hook": "raysandbox.worker_hook"})
@ray.remote(resources=raysandbox.tag("frugal"), max_retries=0)
def make(size):
    return np.zeros(size, "u1")
kept = [make.remote(700_000) for _ in range(2)]
ray.get(kept, timeout=60)
try:
    ray.get(make.remote(700_000), timeout=60)
except raysandbox.TaskQuotaExceeded:
    print("refused", flush=True)
"""


def quota_files():
    node = ray._private.worker.global_worker.node
    directory = Path(quota.directory(node.get_session_dir_path()))
    return directory, set(os.listdir(directory))


def test_jobs_do_not_share_a_quota_and_an_end_frees_it():
    """Another job's count is its own, and is forgotten with it."""
    kept = [make.remote() for _ in range(2)]
    ray.get(kept, timeout=60)
    address = ray.get_runtime_context().gcs_address
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _OTHER, address],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "refused\n", done.stderr[-2000:]
    # Each job removes the files of those that have ended.
    assert len(quota_files()[1]) <= 2
    assert [each.nbytes for each in ray.get(kept)] == [SIZE, SIZE]


def test_a_jail_does_not_see_the_count():
    """The file is nowhere in a jail's view; the control reads it from outside."""
    directory, names = quota_files()
    assert names

    @ray.remote(resources=FRUGAL, max_retries=0)
    def look(path):
        return os.listdir(path)

    with pytest.raises(FileNotFoundError):
        ray.get(look.remote(str(directory)), timeout=60)
