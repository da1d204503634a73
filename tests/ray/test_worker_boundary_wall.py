"""``boundary = "worker"`` behind the node's wall: both hold at once."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray

import raysandbox
from tests.ray.events import events
from tests.ray.test_worker_boundary import errno_of, inside, libc_errno, read

TRUSTED = raysandbox.tag("trusted")


@pytest.fixture(autouse=True)
def helpers_by_value():
    """The helpers of the other module travel with the tasks."""
    module = sys.modules[errno_of.__module__]
    ray.cloudpickle.register_pickle_by_value(module)


def test_walls_add_up():
    """The launcher's namespaces and the profile's limits: the event names both."""
    pid = inside(own_pid)
    event = [e for e in events() if e["event"] == "worker_entered" and e["pid"] == pid]
    protections = event[0]["protections"]
    assert protections["mount namespace"] == "enforced"
    assert protections["root file system"] == "enforced"
    assert protections["limits.memory_bytes"] == "enforced"
    assert protections["pid namespace"].startswith("off: raylet signals")


def own_pid():
    return os.getpid()


def test_all_of_ray_behind_both():
    """An async actor, and a strict task submitted from inside."""

    @ray.remote(resources=raysandbox.tag("strict"))
    def jailed(value):
        return value + 1

    @ray.remote(resources=TRUSTED, num_cpus=0)
    class Actor:
        async def run(self, value):
            await asyncio.sleep(0)
            return await jailed.remote(value)

    assert ray.get(Actor.remote().run.remote(1), timeout=60) == 2


def test_attacks_fail_on_every_thread():
    """Files, signals and namespaces, from a thread that is older than the walls."""
    victim = subprocess.Popen(["sleep", "100"])
    key = Path.home() / ".rsx-key"
    key.write_text("secret")
    pid, path = victim.pid, str(key)

    def attack():
        answer, done = [], threading.Event()

        def everything(_value=None):
            answer.append(
                (
                    errno_of(read, path),
                    errno_of(os.kill, pid, signal.SIGKILL),
                    errno_of(os.kill, os.getppid(), signal.SIGKILL),
                    libc_errno("unshare", 0x10000000),
                    errno_of(open, "/run/raysandbox/secrets/auth_token"),
                )
            )
            done.set()

        ref = ray.put(1)
        ref._on_completed(everything)
        assert done.wait(30)
        everything()
        return answer

    try:
        assert errno_of(read, path) == 0
        gone = (errno.ENOENT, errno.EACCES)
        hidden = (errno.ESRCH, errno.EPERM)
        for file, signal_, raylet, namespace, token in inside(attack):
            assert file in gone
            assert signal_ in hidden
            assert raylet in hidden
            assert namespace == errno.EPERM
            assert token in gone
        assert victim.poll() is None
    finally:
        key.unlink()
        victim.kill()
        victim.wait()


def test_strict_tasks_after_it_have_their_own_worker():
    """No worker that was a boundary runs a jail, nor the other way round."""

    @ray.remote(resources=raysandbox.tag("strict"), max_retries=0)
    def where():
        return ray.get_runtime_context().get_worker_id()

    def own():
        return ray.get_runtime_context().get_worker_id()

    boundary = inside(own)
    jails = {ray.get(where.remote(), timeout=60) for _ in range(3)}
    became = {e["worker"] for e in events() if e["event"] == "worker_entered"}
    assert boundary in became
    assert not became & jails
