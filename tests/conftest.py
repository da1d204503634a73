"""Order, marks and time limits of all tests, and what they may leave behind.

A directory under tests/ gives its tests their mark, their time limit and their
lane, see `tests.lanes`. Quick ones run first, so that a broken wall shows in seconds.

Nothing may stay when the last lane ends: no process, and on a machine where
nobody else works (``CI`` or ``RAYSANDBOX_TEST_ALONE`` is set) no mount, cgroup
or network namespace either.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import again
from tests.lanes import KINDS, LANE, kind_of, lane_of, open_shared, turn
from tests.require import require

# Ordinary users, one for each lane: a signal to all of one's processes is an attack.
os.environ.setdefault("RAYSANDBOX_TEST_UID", str(54321 + LANE))
# In the environment of every process that the tests start, directly or not.
_TOKEN = f"RSX_TEST_SESSION={os.getpid()}-{time.monotonic_ns()}"
# What is ours by its name, whatever its environment.
_OURS = re.compile(
    r"raysandbox|(^|/)(raylet|gcs_server|envoy|tcpdump|dockerd|containerd)( |$)|"
    r"^ray::|default_worker\.py|qemu-system|import json, sys, types"
)
_MOUNT = re.compile(r"raysandbox|/rsx-|/rsb-|/netns/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by directory, and sort by what a test costs."""
    for item in items:
        kind = KINDS[kind_of(item.nodeid)]
        if kind.mark:
            item.add_marker(kind.mark)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(kind.limit_s))
        again.allow(item)
    # Stable: the order within a directory stays.
    order = list(KINDS)
    items.sort(key=lambda item: order.index(kind_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process one lane."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return lane_of(nodeid)

    return Lanes(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wait for the test's turn; its time limit begins then."""
    with turn(item.config, item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what passed at the second try alone, and what tests measured."""
    again.print_first_tries(terminalreporter)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``root`` where we are not."""
    if item.get_closest_marker("root") is not None:
        require("root")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _processes(everything: bool) -> dict[tuple[int, str], str]:
    """Map (pid, start time) to a description, for what is ours.

    Args:
        everything: What has our names, too, whoever started it.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        after_name = _read(entry / "stat").rpartition(")")[2].split()
        if not after_name or after_name[0] in "ZX":
            continue
        command = _read(entry / "cmdline").replace("\0", " ").strip()
        marked = _TOKEN in _read(entry / "environ").split("\0")
        if marked or (everything and _OURS.search(command)):
            found[int(entry.name), after_name[19]] = command or "?"
    return found


def _alone() -> bool:
    return bool(os.environ.get("CI") or os.environ.get("RAYSANDBOX_TEST_ALONE"))


def _things() -> set[str]:
    """Name the mounts, cgroups and network namespaces that may be ours."""
    found = set()
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        if _MOUNT.search(line.split()[4]):
            found.add(f"mount {line.split()[4]}")
    with contextlib.suppress(OSError):
        found |= {f"network namespace {name}" for name in os.listdir("/run/netns")}
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        found |= {f"cgroup {directory}/{n}" for n in names if _ours_by_name(n)}
    return found


def _ours_by_name(name: str) -> bool:
    return name.startswith(("raysandbox", "rsx-", "rsb-"))


@pytest.fixture(scope="session", autouse=True)
def nothing_stays_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The session leaves the machine as it was.

    Each lane looks for processes of its own, the last one for everything.

    Guards against jails, launchers and groups that outlive their task in a way
    that no single test looks at.
    """
    name, _, value = _TOKEN.partition("=")
    os.environ[name] = value
    lanes = open_shared(request.config, "lanes")
    fcntl.flock(lanes, fcntl.LOCK_SH)
    before, things_before = _processes(_alone()), _things() if _alone() else set()
    yield
    everything = _alone()
    try:
        fcntl.flock(lanes, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        everything = False
    # What was told to end is given a moment to have ended.
    until = time.monotonic() + 10
    while True:
        left = [
            f"process {pid}: {command[:200]}"
            for (pid, start), command in _processes(everything).items()
            if (pid, start) not in before
        ]
        if everything:
            left += sorted(_things() - things_before)
        if not left or time.monotonic() > until:
            break
        time.sleep(0.1)
    os.close(lanes)
    assert not left, f"{again.LEFT_BEHIND}:\n" + "\n".join(left)
