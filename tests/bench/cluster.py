"""A hardened cluster against stock Ray, on machines of one lab.

Both have one node of two CPUs, and a driver beside it that does the same honest
job (`cluster_side`); the two take turns. For the floods a third machine attacks
with the certificate of another driver, and what is compared is the hardened
cluster with itself in peace.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tests
from tests.bench.turns import turns
from tests.cluster.conftest import HEAD, ROGUE, STOCK, Hardened, Stock, memory_bytes
from tests.cluster.lab import Host, Lab
from tests.peer import Peer

HERE = Path(__file__).resolve().parent
ATTACK = HERE.parent / "cluster" / "attack.py"
# Name, function of cluster_side, its arguments, unit, least ratio.
WORK: list[tuple[str, str, list[int], float]] = [
    ("tasks per second", "tasks", [1000], 0.95),
    ("actor calls per second", "calls", [1000], 0.95),
    ("actor creations per second", "actors", [4], 0.8),
    ("placement groups per second, each used by a task", "groups", [6], 0.8),
    ("empty placement groups per second, one after the other", "bare_groups", [50],
     0.8),
]  # fmt: skip
# Seconds that a flood lasts beside the honest job, and alone; and of peace around it.
WORK_S, FLOOD_S, PEACE_S = 60, 60, 30
FLOODS = (
    ("small calls", "flood_small", 0.8),
    ("large reads that are abandoned", "flood_reads", 0.5),
    ("large writes", "flood_writes", 0.5),
)
MOST_GROWTH_BYTES = 50_000_000


class Side(Peer):
    """The honest job on one machine."""

    def __init__(self, host: Host, *prefix: str) -> None:
        super().__init__(
            host.argv([*prefix, sys.executable, "-m", "tests.bench.cluster_side"]),
            host.env({"PYTHONPATH": str(Path(tests.__file__).absolute().parents[1])}),
        )


Row = tuple[str, float, float, str, float, str, bool]


def rows(rounds: int) -> list[Row]:
    """Measure; return the fields of a `Figure` for each row."""
    with Lab() as lab:
        for name, address in (("head", HEAD), ("rogue", ROGUE), ("stock", STOCK)):
            lab.host(name, address)
            lab.where[name] = "auto"
        stock = Stock(lab)
        hardened = Hardened(lab, "--include-dashboard=false", node=False, walls=False)
        ours = Side(hardened.head, *hardened.env("alice"))
        theirs = Side(stock.host)
        try:
            found = _in_peace(rounds, ours, theirs)
            for name, flood, least in FLOODS:
                found += _flooded(hardened, ours, name, flood, least)
            return found
        finally:
            ours.close()
            theirs.close()


def _in_peace(rounds: int, ours: Side, theirs: Side) -> list[Row]:
    found: list[Row] = []
    for side in (ours, theirs):
        side("connect")
    inside, outside = turns(
        rounds, lambda: ours("connect") * 1e3, lambda: theirs("connect") * 1e3
    )
    more = inside - outside
    found.append(
        ("ray.init to a running cluster", inside, outside, "ms", inside / outside,
         "at most 150 ms more", more <= 150)
    )  # fmt: skip
    for name, function, arguments, least in WORK:
        for side in (ours, theirs):
            side(function, *arguments)
        # What takes half a second is measured more often.
        inside, outside = turns(
            rounds if function == "actors" else 3 * rounds,
            lambda f=function, a=arguments: ours(f, *a),
            lambda f=function, a=arguments: theirs(f, *a),
        )
        ratio = inside / outside
        reach = f"at least {least:g} of stock"
        found.append((name, inside, outside, "1/s", ratio, reach, ratio >= least))
    return found


def _flooded(
    hardened: Hardened, ours: Side, name: str, flood: str, least: float
) -> list[Row]:
    """The honest job in peace and during a flood, and the GCS's growth in it."""
    work = [row for row in WORK if row[1] != "bare_groups"]

    def measure(until: float) -> list[float]:
        seen: list[list[float]] = [[] for _ in work]
        while time.monotonic() < until or not seen[-1]:
            for index, (_, function, arguments, _) in enumerate(work):
                seen[index].append(ours(function, *arguments))
        # All that was done by all the time that it took: no stall goes unseen.
        return [statistics.harmonic_mean(each) for each in seen]

    def attack(who: str, seconds: float) -> subprocess.Popen[str]:
        return hardened.rogue.popen(
            sys.executable, str(ATTACK), json.dumps(hardened.target(who)), flood,
            json.dumps([seconds]),
        )  # fmt: skip

    before = measure(time.monotonic() + PEACE_S)
    rogue = attack("mallory", WORK_S)
    during = measure(time.monotonic() + WORK_S - 3)
    rogue.wait(60)
    after = measure(time.monotonic() + PEACE_S)
    found: list[Row] = []
    for index, (what, _, _, _) in enumerate(work):
        # In peace is before and after: what else the machine does drifts.
        peace = (before[index] + after[index]) / 2
        ratio = during[index] / peace
        found.append(
            (f"{what} under {name}", during[index], peace, "1/s", ratio,
             f"at least {least:g} of peace", ratio >= least)
        )  # fmt: skip
    if flood != "flood_small":
        # Of a client whose budget is whole, without what honest tasks leave behind.
        name_of = f"flooder-{flood.removeprefix('flood_')}"
        hardened.issue("driver", name_of, name_of, ROGUE)
        memory = memory_bytes(hardened.head, "gcs_server")
        attack(name_of, FLOOD_S).wait(FLOOD_S + 60)
        grown = memory_bytes(hardened.head, "gcs_server") - memory
        found.append(
            (f"the GCS's growth in a minute of {name}", grown / 1e6, 0.0, "MB",
             grown / MOST_GROWTH_BYTES, "at most 50 MB", grown <= MOST_GROWTH_BYTES)
        )  # fmt: skip
    return found
