"""Clients that write without end: what of it stays on a node's disk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.node.nodes import PLAIN, POLICY, Node

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(240)]

MIB = 1 << 20
LIMIT = 2 * MIB
SMALL = POLICY.replace('profiles = ["standard"]', 'profiles = ["standard", "trusted"]')
SMALL = SMALL.replace("standard = 4", "standard = 4\ntrusted = 2")
SMALL = SMALL.replace("pids = 512", 'pids = 512\nlog = "2MiB"')

# In the driver: any number of tasks may go into one worker's log.
FILL = """
import glob, json, os, sys, time, ray
ray.init(address=ADDRESS, logging_level="ERROR", log_to_driver=True)

@ray.remote(num_cpus=1)
def fill(megabytes):
    line = "x" * 99
    for _ in range(megabytes * 10_000):
        print(line)

@ray.remote(num_cpus=1)
def say(text):
    print(text)

def everywhere(megabytes):
    '''Its streams in the worker itself, line by line and at once; which could be.'''
    allocated = []
    for stream in (1, 2):
        for _ in range(megabytes):
            os.write(stream, (b"y" * 99 + b"\\n") * 10_000)
        try:
            os.posix_fallocate(stream, 0, 40 << 20)
            allocated.append(stream)
        except OSError:
            pass
    return allocated

def sizes():
    found = {}
    for at, _, names in os.walk(LOGS):
        for name in names:
            if name.startswith(("worker-", "python-core-worker-", "raysandbox_",
                                "event_CORE_WORKER", "event_EXPORT_TASK")):
                try:
                    size = os.stat(f"{at}/{name}").st_blocks * 512
                except FileNotFoundError:
                    continue
                found[name] = max(size, found.get(name, 0))
    return found

def most(name):
    return 32 << 20 if "raysandbox" in name else (1 << 20) + 4096

def settled():
    '''Sizes once no file is too large any more, or after a while.'''
    end = time.monotonic() + 15
    while time.monotonic() < end:
        found = sizes()
        if all(size <= most(name) for name, size in found.items()):
            break
        time.sleep(0.2)
    return found

def newest(text, **options):
    ray.get(say.options(**options).remote(text), timeout=60)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        files = glob.glob(LOGS + "/worker-*.out")
        found = [name for name in files if text in open(name, errors="replace").read()]
        if found:
            break
        time.sleep(0.1)
    return found

for _ in range(4):
    ray.get([fill.remote(2) for _ in range(4)], timeout=100)
found = {} if STOCK else {"jails": settled()}
found["newest"] = [newest("newest-a"), newest("newest-b")]
"""
TRUSTED = """
from raysandbox import tag
task = ray.remote(num_cpus=1)(everywhere).options(resources=tag("trusted"))
found["allocated"] = ray.get(task.remote(16), timeout=100)
found["worker"] = settled()
found["newest"].append(newest("newest-c", resources=tag("trusted")))
"""
# On stock Ray nothing settles: what there is at the end is what stays.
END = """
time.sleep(3)
if STOCK:
    found["jails"] = sizes()
print("\\n" + json.dumps(found))
"""


def _drive(node: Node, ours: bool) -> tuple[dict[str, Any], str]:
    """Return what a driver found, and all that was forwarded to it."""
    names = f"ADDRESS = {node.address!r}\nLOGS = {str(node.session / 'logs')!r}\n"
    names += f"STOCK = {not ours}\n"
    done = node.run(names + FILL + TRUSTED * ours + END, 200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(found), done.stdout


@pytest.mark.parametrize("kind", ["stock", "node"])
def test_clients_that_fill_logs_fill_no_disk(kind):
    """Whatever tasks write, each log keeps its newest lines and forwards new ones.

    Control: stock Ray keeps all of it, as did a node whose keeper did not look. A
    task's output is bounded for each task alone, and a worker's own logs by nothing.
    """
    ours = kind == "node"
    with Node(policy=SMALL) if ours else Node(PLAIN) as made:
        found, said = _drive(made, ours)
    most = sum(size for name, size in found["jails"].items() if ".out" in name)
    if not ours:
        assert most >= 32_000_000
        return
    workers = {name.split("-")[1] for name in found["jails"] if name[:7] == "worker-"}
    assert most <= len(workers) * LIMIT
    # Half of it was written since the log began anew, or is beside it.
    assert any(name.endswith(".out.1") for name in found["jails"])
    assert found["allocated"] == [1, 2]
    assert sum(name.endswith(".err.1") for name in found["worker"]) == 1
    for name, size in found["worker"].items():
        assert size <= (32 * MIB if "raysandbox" in name else MIB + 4096), name
    forwarded = [line for line in said.splitlines() if "pid=" in line]
    for text, files in zip("abc", found["newest"], strict=True):
        assert len(files) == 1, text
        assert any(f"newest-{text}" in line for line in forwarded), text
    assert any("raysandbox: the node began this log anew" in line for line in forwarded)
