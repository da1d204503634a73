"""What a jail's cgroup costs: create with all limits, open, enter, read, remove.

    python tests/bench/bench_cgroup.py [--json]

Medians of 500 rounds, in milliseconds. "enter" is the jail's own first act.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

from raysandbox.kernel.cgroup import CgroupLimits, Cgroups, discover

ROUNDS = 500
LIMITS = CgroupLimits(
    memory_bytes=1 << 30, swap_bytes=0, cpu_cores=1, cpu_weight=100, pids=64
)


def entering(fds: list[int]) -> float:
    """Fork a child that enters by these files; return its seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        began = time.perf_counter()
        for fd in fds:
            os.write(fd, b"0")
        os.write(write, str(time.perf_counter() - began).encode())
        os._exit(0)
    os.close(write)
    seconds = float(os.read(read, 64))
    os.close(read)
    os.waitpid(pid, 0)
    return seconds


def measure(groups: Cgroups) -> dict[str, float]:
    """Run all rounds; return medians in ms by step."""
    times: dict[str, list[float]] = {}
    for count in range(ROUNDS):
        marks = [time.perf_counter()]
        group = groups.create(f"bench-{count}", LIMITS)
        marks.append(time.perf_counter())
        fds = group.procs_fds()
        marks.append(time.perf_counter())
        # A few are enough: the fork costs more than all the rest.
        if count % 10 == 0:
            times.setdefault("enter", []).append(entering(fds))
        for fd in fds:
            os.close(fd)
        before = time.perf_counter()
        group.usage()
        after = time.perf_counter()
        group.remove()
        removed = time.perf_counter()
        create, opened = marks[1] - marks[0], marks[2] - marks[1]
        for name, seconds in (
            ("create", create),
            ("open", opened),
            ("usage", after - before),
            ("remove", removed - after),
            ("create + open + remove", create + opened + removed - after),
        ):
            times.setdefault(name, []).append(seconds)
    return {name: statistics.median(all_s) * 1e3 for name, all_s in times.items()}


def main() -> None:
    """Measure and print."""
    with discover() as groups:
        versions = groups.versions
        result = measure(groups)
    if "--json" in sys.argv:
        rows = [{"name": n, "unit": "ms", "value": v} for n, v in result.items()]
        print(json.dumps(rows, indent=1))
        return
    print("versions:", ", ".join(f"{k} v{v}" for k, v in sorted(versions.items())))
    for name, value in result.items():
        print(f"{name:24} {value:7.3f} ms")


if __name__ == "__main__":
    main()
