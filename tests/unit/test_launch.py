"""Starting the launcher from a process that is full, or short of something."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from raysandbox import launch
from tests.require import require

# A profile that needs no group: these tests run as anybody.
PREAMBLE = """
import os, resource, sys
from raysandbox import launch, plan, profile
from raysandbox.errors import SetupError
from raysandbox.probe import probe

def start():
    lease = launch.lease_ids()
    made = plan.compile(profile.strictest(), probe(), plan.Context(ids=lease.ids))
    try:
        return launch.start(made, ["/bin/true"], lease=lease, linger=True)
    finally:
        lease.close()

def run():
    started = start()
    assert started.ended(30)
    started.release()
    return started.wait(30).exit_code
"""


def python(code: str) -> str:
    """Return what a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_thousands_of_descriptors_are_no_obstacle() -> None:
    """A worker with many connections has numbers that select(2) can't see."""
    require("userns")
    if os.sysconf("SC_OPEN_MAX") < 3000:
        pytest.skip("this process may not have as many descriptors")
    assert (
        python(
            """
        kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(2000)]
        print(max(kept) > 1500, run())
        """
        )
        == "True 0"
    )


def test_no_descriptor_left_is_a_failed_step() -> None:
    """Ours or the launcher's, an error names it, and what was opened is closed."""
    require("userns")
    told = python(
        """
        assert run() == 0
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        lease = launch.lease_ids()
        made = plan.compile(profile.strictest(), probe(), plan.Context(ids=lease.ids))
        used = len(os.listdir("/proc/self/fd")) - 1
        for spare in range(12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
            try:
                launch.start(made, ["/bin/true"], lease=lease).wait(30)
            except SetupError as error:
                print(error.step, error.errno)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert len(os.listdir("/proc/self/fd")) - 1 == used
        """
    ).splitlines()
    assert told[0] == "start_launcher 24"
    assert all(line.endswith(" 24") for line in told)


def test_is_readable_waits_and_gives_up() -> None:
    """True for what is there and for the end, False when the time is up."""
    read_end, write_end = os.pipe()
    assert not launch.is_readable(read_end, 0)
    assert not launch.is_readable(read_end, 0.01)
    os.write(write_end, b"x")
    assert launch.is_readable(read_end, None)
    os.read(read_end, 1)
    os.close(write_end)
    assert launch.is_readable(read_end, None)
    os.close(read_end)
