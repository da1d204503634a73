"""Two machines, of which one offers a profile."""

from __future__ import annotations

import time

import pytest

from tests.cluster.lab import POLICY, Lab

pytestmark = [pytest.mark.cluster, pytest.mark.root]
PORT = 6399
# All that workers connect to, on both machines: GCS, raylets, agents, workers.
CONNECT = f"""
[worker]
connect = [{PORT}, 6400, 6401, "20000-20100"]
"""
DRIVER = f"""
import os, sys, ray
ray.init(address="10.9.0.1:{PORT}", logging_level="ERROR", log_to_driver=False)

@ray.remote
def where():
    return os.getpid()

def run(profile):
    task = where.options(resources={{f"sandbox:{{profile}}": 1}})
    return ray.get([task.remote() for _ in range(4)], timeout=60)

assert run("standard") == [1] * 4

@ray.remote(resources={{"sandbox:standard": 1}})
def make():
    return b"x" * 5_000_000

@ray.remote(resources={{"sandbox:strict": 1}})
def use(made):
    return len(made)

# From one machine's store to the other's.
assert ray.get(use.remote(make.remote()), timeout=60) == 5_000_000
print(sorted(
    (n["NodeManagerAddress"], *(f"sandbox:{{p}}" in n["Resources"]
     for p in ("standard", "strict")))
    for n in ray.nodes() if n["Alive"]
))
never = where.options(resources={{"sandbox:fast": 1}}).remote()
ready, _ = ray.wait([never], timeout=5)
print(len(ready))
"""


@pytest.mark.timeout(240)
def test_a_tagged_task_runs_where_its_profile_is_offered():
    """The other node runs nothing of it, and a tag that nobody offers never runs.

    Workers of both connect to Ray's own ports alone.
    """
    with Lab() as lab:
        head, other = lab.host("head", "10.9.0.1"), lab.host("other", "10.9.0.2")
        head.policy.write_text(POLICY.replace("standard = 64\nfast = 64", "") + CONNECT)
        other.policy.write_text(POLICY.replace("fast = 64", "") + CONNECT)
        token = lab.path / "token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        extra = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        start = ["python", "-m", "raysandbox", "start", "--num-cpus=2",
                 "--object-store-memory=100000000", "--min-worker-port=20000",
                 "--max-worker-port=20100", "--node-manager-port=6400",
                 "--dashboard-agent-grpc-port=6401"]  # fmt: skip
        head.popen(
            *start, "--head", "--block", f"--port={PORT}", "--include-dashboard=false",
            "--node-ip-address=10.9.0.1", f"--temp-dir={head.home}/r",
            env=extra, log="start.log",
        )  # fmt: skip
        _await(head)
        other.popen(
            *start, "--block", f"--address=10.9.0.1:{PORT}",
            "--node-ip-address=10.9.0.2", f"--temp-dir={other.home}/r",
            env=extra, log="start.log",
        )  # fmt: skip
        _await(other)
        out = head.python(DRIVER, env=extra).stdout.splitlines()
        assert out[-2:] == [
            "[('10.9.0.1', False, True), ('10.9.0.2', True, True)]",
            "0",
        ]


def _await(host) -> None:
    log = host.home / "start.log"
    end = time.monotonic() + 60
    while not log.exists() or "--block" not in log.read_text():
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)
