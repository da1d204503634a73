"""One client that floods the GCS: T5.1 and T5.4. Figures are in tests/bench."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.cluster.conftest import (
    HERE,
    ROGUE,
    Driver,
    Hardened,
    Stock,
    memory_bytes,
)
from tests.cluster.lab import Lab, wait_for

pytestmark = pytest.mark.root
SECONDS = 8
# What the GCS may grow by in a minute is 50 MB, see tests/bench.
MOST_GROWTH_BYTES = 50_000_000
HONEST = (
    "@ray.remote(num_cpus=0.1)\n"
    "def f():\n"
    "    return 1\n"
    "@ray.remote(num_cpus=0)\n"
    "class Actor:\n"
    "    def ping(self):\n"
    "        return 1\n"
    "def work():\n"
    "    begun = time.monotonic()\n"
    "    a = Actor.remote()\n"
    "    assert ray.get([a.ping.remote(), *[f.remote() for _ in range(100)]],\n"
    "                   timeout=90) == [1] * 101\n"
    "    return time.monotonic() - begun\n"
    "work()\n"
)


@pytest.fixture(scope="module")
def alice(hardened: Hardened) -> Driver:
    driver = hardened.shared("alice")
    driver(HONEST)
    return driver


def _flood(
    lab: Lab, target: dict[str, str], name: str, seconds: float = SECONDS
) -> subprocess.Popen[str]:
    rogue = lab.hosts["rogue"]
    log = rogue.home / "flood.json"
    log.unlink(missing_ok=True)
    process = rogue.popen(
        sys.executable, str(HERE / "attack.py"), json.dumps(target), name,
        json.dumps([seconds]), log=log.name,
    )  # fmt: skip
    wait_for("the flood", lambda: "began" in log.read_text())
    return process


def _seen(lab: Lab) -> Any:
    lines = (lab.hosts["rogue"].home / "flood.json").read_text().splitlines()
    return json.loads(lines[-1])["seen"]


@pytest.mark.parametrize(
    "flood", ["flood_small", "flood_reads", "flood_writes", "flood_held"]
)
def test_honest_job_goes_on_and_memory_is_bounded(
    hardened: Hardened, lab: Lab, alice: Driver, flood: str
) -> None:
    """An honest job runs to its end during a flood, and the GCS does not grow."""
    # One whose budget is whole, at a second try too: what it wrote in another flood
    # counts against it.
    flooder = f"{flood.replace('_', '-')}-{time.time_ns()}"
    hardened.issue("driver", flooder, flooder, ROGUE)
    before = memory_bytes(hardened.head, "gcs_server")
    process = _flood(lab, hardened.target(flooder), flood)
    spent = alice("result = work()")
    process.wait(60)
    grown = memory_bytes(hardened.head, "gcs_server") - before
    seen = _seen(lab)
    assert sum(seen.values()) > 50, "that was no flood"
    assert spent < 30
    assert grown < MOST_GROWTH_BYTES
    if flood != "flood_small":
        return
    # Calls come through at the role's rate, and are slowed down, not refused.
    limit = hardened.settings.limits.roles["driver"]
    most = limit.calls_burst + limit.calls_per_s * (SECONDS + 3)
    assert limit.calls_per_s * SECONDS / 4 < seen["OK"] <= most
    assert seen["OK"] > 0.9 * sum(seen.values())


def test_actors_that_wait_for_room_hold_up_nothing(alice: Driver) -> None:
    """A driver with 400 actors that are not placed goes on with all else.

    Guards against a channel whose calls are all taken by those that wait.
    """
    alice(
        "waiting = [Actor.options(resources={'none': 1}).remote() for _ in range(400)]"
    )
    spent = alice("result = work()")
    alice("for each in waiting: ray.kill(each)\ndel waiting")
    assert spent < 30
    assert alice("result = work()") < 30


def test_stock_gcs_grows_without_bound(stock: Stock, lab: Lab) -> None:
    """Positive control: the same writes make a stock GCS grow by all that is sent."""
    before = memory_bytes(stock.host, "gcs_server")
    process = _flood(lab, stock.target, "flood_writes", 4)
    process.wait(60)
    assert memory_bytes(stock.host, "gcs_server") - before > 5 * MOST_GROWTH_BYTES
