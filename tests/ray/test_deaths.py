"""Whatever dies, and however: its jails and all that they started go with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

import raysandbox

STRICT = raysandbox.tag("strict")


def hold(marker: str) -> None:
    """Start what would outlive its task: a daemon in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        os.execve("/bin/sleep", ["sleep", "1000"], {"MARKER": marker})
    time.sleep(1000)


def marked(marker: str) -> list[int]:
    """Pids of what carries the marker in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def groups_of(pid: int) -> list[str]:
    """Control groups in which a process is, below one of raysandbox's."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    paths = {line.split(":", 2)[2] for line in lines}
    return sorted(path for path in paths if "raysandbox" in path)


def still_there(groups: list[str]) -> list[str]:
    """Those of the groups that exist in any hierarchy."""
    roots = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]
    return [g for g in groups if any((root / g.lstrip("/")).is_dir() for root in roots)]


def until(condition: object, seconds: float) -> bool:
    """Whether a callable becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def marker() -> Iterator[str]:
    name = f"rsx-death-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    for pid in marked(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def started(marker: str) -> tuple[list[int], list[str]]:
    """Wait for the daemon; return its pids and groups: the positive control."""
    assert until(lambda: marked(marker), 60), "the task did not start"
    pids = marked(marker)
    return pids, groups_of(pids[0])


def gone(marker: str, groups: list[str]) -> None:
    assert groups, "the daemon was in no group of ours"
    assert until(lambda: not marked(marker), 30), marked(marker)
    assert until(lambda: not still_there(groups), 30), still_there(groups)


def test_a_killed_worker_takes_its_jail_along(marker: str) -> None:
    """SIGKILL of the worker process: nothing of the jail is left, Ray goes on."""
    task = ray.remote(resources=STRICT, max_retries=0)(hold)
    ref = task.options(name="rsx-held").remote(marker)
    _, groups = started(marker)
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith("ray::rsx-held")
    ]
    assert len(workers) == 1
    workers[0].kill()
    gone(marker, groups)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(ref, timeout=60)


_DRIVER = """
import os, sys
import ray, raysandbox
from tests.ray import test_deaths as this
ray.cloudpickle.register_pickle_by_value(this)
raysandbox.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1],
                logging_level="ERROR", object_store_memory=100 << 20)
ray.remote(resources=this.STRICT)(this.hold).remote(sys.argv[2])
node = ray._private.worker._global_node
print(*[p.process.pid for n in ("raylet", "gcs_server")
        for p in node.all_processes[n]], flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_a_killed_driver_or_raylet_takes_all_jails_along(
    marker: str, victim: str
) -> None:
    """SIGKILL of a driver with its own Ray, or of that raylet, leaves no jail."""
    temporary = tempfile.mkdtemp(prefix="rsx-d-", dir="/tmp")
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, temporary, marker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    ours: list[psutil.Process] = []
    try:
        assert driver.stdout is not None
        raylet = int(driver.stdout.readline().split()[0])
        pids, groups = started(marker)
        ours = [psutil.Process(driver.pid)]
        ours += ours[0].children(recursive=True)
        ours = [each for each in ours if each.pid not in pids]
        os.kill(driver.pid if victim == "driver" else raylet, signal.SIGKILL)
        gone(marker, groups)
    finally:
        # Ray itself ends in its own time; what is left of this one's is killed.
        for each in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        driver.kill()
        driver.wait()
        shutil.rmtree(temporary, ignore_errors=True)
