"""Two lanes of tests, side by side under ``pytest -n 2``.

One keeps a processor busy, the other mostly waits for nodes to start; a directory
under tests/ is in one of them. A test that measures, or looks at the whole machine,
is marked ``alone``: the other lane waits between two tests of its own meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = [
    "KINDS",
    "LANE",
    "Kind",
    "kind_of",
    "lane_of",
    "open_shared",
    "side_by_side",
    "turn",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a directory's tests have in common.

    Attributes:
        lane: ``busy`` or ``waiting``.
        limit_s: For one test.
        mark: Of pytest's, or none.
    """

    lane: str
    limit_s: int
    mark: str = ""


#: By directory; the order is that of the tests: quick ones first.
KINDS = {
    "unit": Kind("busy", 120),
    "attacks": Kind("busy", 300),
    "ray": Kind("busy", 300, "ray"),
    "node": Kind("waiting", 300, "ray"),
    "cluster": Kind("waiting", 300, "cluster"),
    "image": Kind("waiting", 600, "image"),
    "qemu": Kind("waiting", 1500, "qemu"),
}

# Modules in the other lane than their directory, so that both end together.
_MOVED = (
    "tests/node/test_entrypoints.py",
    "tests/node/test_filling.py",
    "tests/node/test_images.py",
    "tests/node/test_jobs.py",
    "tests/node/test_restart.py",
    "tests/node/test_spilled.py",
)

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
#: Which of the lanes this process runs; 0 where there is one for all.
LANE = int(_WORKER.removeprefix("gw") or 0)


def side_by_side() -> bool:
    """Whether another process has the other lane."""
    return bool(_WORKER)


def kind_of(nodeid: str) -> str:
    """Return the directory, a key of `KINDS`, of a test."""
    parts = nodeid.split("/")
    return parts[1] if len(parts) > 2 and parts[1] in KINDS else "unit"


def lane_of(nodeid: str) -> str:
    """Return the lane of a test."""
    return "busy" if nodeid.startswith(_MOVED) else KINDS[kind_of(nodeid)].lane


def open_shared(config: pytest.Config, name: str) -> int:
    """Open a file that all lanes of this session have in common."""
    directory = Path(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    if side_by_side():
        directory = directory.parent
    return os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def turn(config: pytest.Config, alone: bool) -> Iterator[None]:
    """Run beside the other lane's tests, or wait for its test to end and be alone."""
    turnstile, running = (open_shared(config, name) for name in ("turn", "running"))
    try:
        # Who waits for the others to end keeps them from beginning anew.
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield
    finally:
        os.close(turnstile)
        os.close(running)
