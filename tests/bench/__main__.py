"""The figures to reach, each with both sides interleaved in one run.

    python -m tests.bench [--rounds N] [--only NAME] [--output FILE]

Prints a table and writes the same as JSON: a list of objects with name, sandbox,
stock, unit, ratio, reach, ok. Exit status 0 whether reached or not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raysandbox import launch, plan, profile
from raysandbox.kernel import cgroup
from raysandbox.probe import probe
from raysandbox.run import cgroup_limits
from tests.bench.turns import turns
from tests.node import drive
from tests.peer import Peer

# Where make's build directory is: the working directory of `make bench` is in it.
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "bench.json"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row.

    Attributes:
        name: What was measured.
        sandbox: Median in the sandbox.
        stock: Median of what it is compared with.
        unit: Of both.
        ratio: sandbox / stock, or what `reach` speaks of.
        reach: What is to be reached, in words.
        ok: Whether it was.
    """

    name: str
    sandbox: float
    stock: float
    unit: str
    ratio: float
    reach: str
    ok: bool


class Side(Peer):
    """A process of `tests.bench.side`."""

    def __init__(self, profile_name: str) -> None:
        named = [profile_name] if profile_name else []
        super().__init__([sys.executable, "-m", "tests.bench.side", *named])


@contextlib.contextmanager
def _sides(*profiles: str) -> Iterator[list[Side]]:
    sides = [Side(each) for each in profiles]
    try:
        yield sides
    finally:
        for side in sides:
            side.close()


def _spawn(argv: list[str]) -> float:
    begun = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, {})
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"{argv} ended with {status}")
    return (time.perf_counter() - begun) * 1e3


def launcher(rounds: int) -> list[Figure]:
    """/bin/true behind every wall of `strict`, cgroup included."""
    chosen = profile.load("strict")
    with cgroup.discover() as groups:
        group = groups.create("bench", cgroup_limits(chosen))
        lease = launch.lease_ids()
        compiled = plan.compile(
            chosen,
            probe(),
            plan.Context(
                ids=lease.ids,
                environment={},
                wall_time=True,
                cgroup_dirs=group.paths,
                cgroup_clean=(),
            ),
        )
        fd = os.memfd_create("plan", 0)
        os.write(fd, compiled.encode())
        os.set_inheritable(fd, True)
        argv = [launch.launcher_path(), f"--plan-fd={fd}", "--", "/bin/true"]
        try:
            inside, outside = turns(
                20 * rounds, lambda: _spawn(argv), lambda: _spawn(["/bin/true"])
            )
        finally:
            group.remove()
            lease.close()
            os.close(fd)
    ratio = inside / outside
    return [
        Figure(
            "launch of /bin/true against fork+exec",
            inside,
            outside,
            "ms",
            ratio,
            "at most 4x",
            ratio <= 4,
        )
    ]


def tasks(rounds: int) -> list[Figure]:
    """No-op tasks, 500 in flight, two workers on each side."""
    found = []
    with _sides("", "strict", "fast") as (stock, strict, fast):
        for side in (stock, strict, fast):
            side("noop", 100)
        plain, fresh, reused = (
            value * 2
            for value in turns(
                rounds,
                lambda: stock("noop", 500),
                lambda: strict("noop", 500),
                lambda: fast("noop", 500),
            )
        )
        for name, value, most in (
            ("no-op task in a fresh jail against stock", fresh, 2.0),
            ("no-op task with fast against stock", reused, 1.15),
        ):
            ratio = value / plain
            reach = f"at most {most:g}x"
            found.append(Figure(name, value, plain, "ms", ratio, reach, ratio <= most))
        # The side starts as `raysandbox.init()` does: worker's wall and jail's.
        ratio = plain / reused
        found.append(
            Figure(
                "no-op tasks with fast and both walls against stock",
                1e3 / reused,
                1e3 / plain,
                "/s",
                ratio,
                "at least 0.85x",
                ratio >= 0.85,
            )
        )
        # A new worker process for each task takes seconds: few are enough.
        thrown_away = stock("noop", 8, 1) / 8 * 1e3
        ratio = thrown_away / fresh
        found.insert(
            1,
            Figure(
                "the same against stock with max_calls=1",
                fresh,
                thrown_away,
                "ms",
                fresh / thrown_away,
                "at least 100x faster",
                ratio >= 100,
            ),
        )
    return found


# What a zygote of `strict` is, without the walls around it.
_ZYGOTE = """
import json, os, resource, sys
config = json.loads(sys.argv[1])
sys.path[:0] = config["path"]
from raysandbox.jail import zygote
zygote.warm_up(config["path"], config["preload"], config["ray"])

def used():
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(each)[:2]) for each in both)

for line in sys.stdin:
    begun = used()
    for _ in range(200):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    print((used() - begun) / 200 * 1e3, flush=True)
"""


def fork(rounds: int) -> list[Figure]:
    """What no jail can cost less than: a bare fork of its zygote, and its exit."""
    import ray

    strict = profile.load("strict")
    config = {
        "path": [path for path in sys.path if path] + [os.getcwd()],
        "preload": ["msgpack", "raysandbox.datacodec", *strict.preload],
        "ray": os.path.dirname(ray.__file__),
    }
    python = os.path.realpath(sys.executable)
    process = subprocess.Popen(
        [python, "-I", "-S", "-c", _ZYGOTE, json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    seen = []
    for _ in range(rounds):
        process.stdin.write("go\n")
        process.stdin.flush()
        seen.append(float(process.stdout.readline()))
    process.stdin.close()
    process.wait(60)
    return [
        Figure(
            "CPU of a bare fork and exit of the zygote: no wall, no call",
            statistics.median(seen),
            0.0,
            "ms",
            0.0,
            "a floor of what fresh jails take",
            True,
        )
    ]


def workers(rounds: int) -> list[Figure]:
    """From raylet's start of a worker to its registration."""
    seen: dict[Side, list[float]] = {}
    with _sides("", "strict") as sides:
        for side in sides:
            seen[side] = []
        for number in range(rounds):
            for side in sides if number % 2 else reversed(sides):
                seen[side] = side("worker_starts", 3)
        # The least: what it takes when nothing else runs.
        plain, walled = (min(seen[side]) * 1e3 for side in sides)
    return [
        Figure(
            "start of a worker to its registration against stock",
            walled,
            plain,
            "ms",
            walled / plain,
            f"at most stock + 10 ms ({plain + 10:.0f} ms)",
            walled <= plain + 10,
        )
    ]


def _memcpy_ms(mebibytes: int, rounds: int) -> float:
    import numpy

    source = numpy.ones(mebibytes << 17)
    seen = []
    for _ in range(rounds):
        begun = time.perf_counter()
        source.copy()
        seen.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(seen)


def argument(rounds: int) -> list[Figure]:
    """100 MB of numpy from the store, summed."""
    found = []
    with _sides("", "strict", "fast") as (stock, strict, fast):
        for side in (stock, strict, fast):
            side("sum_array", 100)
        plain, fresh, reused = (
            value * 1e3
            for value in turns(
                rounds,
                lambda: stock("sum_array", 100),
                lambda: strict("sum_array", 100),
                lambda: fast("sum_array", 100),
            )
        )
        copy = _memcpy_ms(100, 5)
        for name, value in (("fresh jail", fresh), ("fast", reused)):
            found.append(
                Figure(
                    f"sum 100 MB of numpy, {name}, against stock",
                    value,
                    plain,
                    "ms",
                    value / plain,
                    f"at most stock + 1.5 memcpy ({plain + 1.5 * copy:.0f} ms)",
                    value <= plain + 1.5 * copy,
                )
            )
    return found


def inside(rounds: int) -> list[Figure]:
    """Tasks and actor calls in a worker that is its own boundary."""
    found = []
    with _sides("", "trusted") as (stock, trusted):
        for what, function, count in (
            ("no-op tasks", "noop", 500),
            ("actor calls", "calls", 2000),
        ):
            for side in (stock, trusted):
                side(function, count)

            def rate(side: Side, function: str = function, count: int = count) -> float:
                return count / float(side(function, count))

            plain, walled = turns(
                2 * rounds, lambda: rate(stock), lambda: rate(trusted)
            )
            ratio = walled / plain
            found.append(
                Figure(
                    f'{what} with boundary = "worker" against stock',
                    walled,
                    plain,
                    "/s",
                    ratio,
                    "at least 0.95x",
                    ratio >= 0.95,
                )
            )
    return found


def memory(rounds: int) -> list[Figure]:
    """What one more waiting jail costs."""
    del rounds
    with _sides("strict") as (strict,):
        sizes = strict("waiting_jails")
    value = statistics.median(sizes) / (1 << 20)
    return [
        Figure(
            "memory of one waiting jail over its parent's",
            value,
            0.0,
            "MiB",
            value / 4,
            "at most 4 MB",
            value <= 4,
        )
    ]


def files(rounds: int) -> list[Figure]:
    """System calls on files, inside against outside."""
    found = []
    with _sides("", "fast") as (stock, fast):
        seen: dict[Side, list[list[float]]] = {stock: [], fast: []}
        for number in range(2 * rounds):
            for side in (stock, fast) if number % 2 else (fast, stock):
                seen[side].append(side("files", 5000))
        for index, name in enumerate(("open, read, close", "stat")):
            outside, inside = (
                statistics.median(row[index] for row in seen[side]) * 1e6
                for side in (stock, fast)
            )
            ratio = inside / outside
            found.append(
                Figure(
                    f"{name} inside against outside",
                    inside,
                    outside,
                    "us",
                    ratio,
                    "at most 1.1x",
                    ratio <= 1.1,
                )
            )
    return found


def store(rounds: int) -> list[Figure]:
    """Put and get in a worker, through the proxy with a quota against stock."""
    found = []
    limits = {"job_bytes": 8 << 30, "worker_bytes": 8 << 30}
    sides = [
        drive.Side("stock", store=600 << 20),
        drive.Side("proxy", store=600 << 20, limits=limits),
    ]
    try:
        for name, size, count in (("1 KB", 1000, 1000), ("100 MB", 100_000_000, 5)):
            for side in sides:
                side("put_get", size, count)
            plain, counted = turns(
                rounds,
                *(functools.partial(side, "put_get", size, count) for side in sides),
            )
            ratio = plain / counted
            found.append(
                Figure(
                    f"put and get of {name} through the quota against stock",
                    counted * 1e6,
                    plain * 1e6,
                    "us",
                    ratio,
                    "at least 0.9 of the speed",
                    ratio >= 0.9,
                )
            )
    finally:
        for side in sides:
            side.close()
    return found


def cluster(rounds: int) -> list[Figure]:
    """A hardened cluster against stock Ray, in peace and under floods."""
    from tests.bench.cluster import rows

    return [Figure(*row) for row in rows(rounds)]


PARTS: dict[str, Callable[[int], list[Figure]]] = {
    "launch": launcher,
    "fork": fork,
    "tasks": tasks,
    "workers": workers,
    "argument": argument,
    "inside": inside,
    "memory": memory,
    "files": files,
    "store": store,
    "cluster": cluster,
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    figures: list[Figure] = []
    console = Console()
    with Console(stderr=True).status("") as status:
        for name, part in PARTS.items():
            if options.only and name not in options.only:
                continue
            status.update(f"measuring: {name}")
            figures += part(options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([asdict(each) for each in figures], indent=1))
    table = Table()
    for heading in ("figure", "sandbox", "stock", "ratio", "reach", "reached"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(
            figure.name,
            f"{figure.sandbox:.3g} {figure.unit}",
            f"{figure.stock:.3g} {figure.unit}" if figure.stock else "",
            f"{figure.ratio:.2f}"
            if figure.ratio > 0.01 or figure.ratio <= 0
            else f"1/{1 / figure.ratio:.0f}",
            figure.reach,
            "yes" if figure.ok else "no",
        )
    console.print(table)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
