"""Two Rays on machines of one lab: a hardened cluster, and a stock one.

Both have the same machines around them: a rogue with every file that was ever
stolen (tokens, certificates, keys), and drivers called alice and mallory. What
mallory does to stock Ray must succeed, or the test has shown nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster.audit import query
from raysandbox.cluster.registry import Registry
from raysandbox.cluster.settings import ClusterDir
from tests.cluster.lab import POLICY, Host, Lab, wait_for
from tests.require import require

HERE = Path(__file__).resolve().parent
CLI = (sys.executable, "-m", "raysandbox")
# A node without power is counted as dead in a quarter of Ray's own time.
QUICK_TO_SEE_A_LOSS = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
}  # fmt: skip
# For figures that are to tell what the guard alone costs.
WITHOUT_WALLS = (
    "import sys\n"
    "from raysandbox.cluster.settings import ClusterDir\n"
    "from raysandbox.cluster.start import start\n"
    "start(ClusterDir(sys.argv[2].partition('=')[2]), sys.argv[3:])\n"
)
SMALL = ("--num-cpus=2", "--object-store-memory=150000000")
# The profile with Ray's API lets its tasks reach these, and no others.
PORTS = ("--node-manager-port=7001", "--object-manager-port=7002",
         "--min-worker-port=20000", "--max-worker-port=20200")  # fmt: skip
HEAD, NODE, ROGUE, STOCK, DRIVERS = (
    "10.77.0.1", "10.77.0.2", "10.77.0.3", "10.77.0.4", ("alice", "mallory"),
)  # fmt: skip
PORT, DASHBOARD = 6379, 8443
# On the head's loopback: where alerts are posted to, and the Prometheus page.
WEBHOOK_PORT, METRICS_PORT = 18123, 18124
# A program of somebody's, in job/run.py, and how it is submitted as a job.
JOB = (
    "import ray; ray.init()\n"
    "f = ray.remote(lambda x: x * 2)\n"
    "print('TOTAL', sum(ray.get([f.remote(i) for i in range(10)])))\n"
)
SUBMIT = ("ray", "job", "submit", "--address=http://127.0.0.1:8265",
          "--working-dir=job", "--", sys.executable, "run.py")  # fmt: skip
# The walls around tasks are those of any node: untagged tasks run in a strict jail,
# and some ask for the profile that has Ray's API.
NODE_POLICY = (
    POLICY.replace("fast = 64", "fast = 64\ntrusted = 64")
    .replace('"fast"]', '"fast", "trusted"]')
    + '[jobs]\nentrypoint = "trusted"\nwhy = "Those who reach the Jobs API may."\n'
)  # fmt: skip
TRUSTED = "resources={'sandbox:trusted': 1}"


class Driver:
    """A driver process on a machine, see driver.py."""

    def __init__(self, host: Host, *prefix: str, init: str = "") -> None:
        self._log = host.home / "drivers.log"
        self.process = subprocess.Popen(
            host.argv([*prefix, sys.executable, str(HERE / "driver.py")]),
            env=host.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log.open("ab"), text=True,
        )  # fmt: skip
        options = f"address='{host.lab.where[host.name]}', log_to_driver=False"
        options += ", logging_level='ERROR'"
        self(f"import ray, os, time\nray.init({options}{', ' * bool(init)}{init})")

    def ask(self, code: str) -> dict[str, Any]:
        """Run code; return its result or error as they are."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(code) + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith(">"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        said = self._log.read_text(errors="replace")[-3000:]
        raise AssertionError(f"the driver ended with {self.process.wait()}: {said}")

    def __call__(self, code: str) -> Any:
        answer = self.ask(code)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Stock:
    """Stock Ray 2.60 with its token, as `ray start` makes it."""

    def __init__(
        self, lab: Lab, name: str = "stock", env: Mapping[str, str] | None = None
    ) -> None:
        self.host = lab.hosts[name]
        self.host.run("ray", "get-auth-token", "--generate")
        self.token = self.host.home / ".ray" / "auth_token"
        address = self.host.address
        self.target = {"address": f"{address}:{PORT}", "token": str(self.token)}
        self.host.run(
            "ray", "start", "--head", f"--port={PORT}", f"--node-ip-address={address}",
            "--include-dashboard=false", *SMALL, env=env,
        )  # fmt: skip

    def driver(self, name: str) -> Driver:
        """A driver of the stock cluster; it has no name there."""
        del name
        return Driver(self.host)


class Hardened:
    """A head and a node with everything that raysandbox has: guard, walls, policy."""

    def __init__(
        self, lab: Lab, *head: str, node: bool = True, walls: bool = True
    ) -> None:
        self.lab, self.walls = lab, walls
        self.head, self.rogue = lab.hosts["head"], lab.hosts["rogue"]
        self.path = self.head.home / "c"
        self._drivers: dict[str, Driver] = {}
        self.head.policy.write_text(NODE_POLICY)
        self.head.raysandbox("cluster", "init", "c", "--name=lab",
                             f"--head-address={HEAD}", f"--port={PORT}")  # fmt: skip
        with (self.path / "cluster.toml").open("a") as file:
            file.write(
                f"dashboard_tls_port = {DASHBOARD}\n"
                f'[audit]\nwebhook = "http://127.0.0.1:{WEBHOOK_PORT}/x"\n'
                f"metrics_port = {METRICS_PORT}\n"
                f'anchor_file = "{self.head.home}/anchors"\n'
            )
        self.dir = ClusterDir(self.path)
        self.settings, self.registry = self.dir.settings(), Registry(self.dir)
        if node:
            self.node = lab.hosts["node"]
            self.node.policy.write_text(NODE_POLICY)
            self.issue("node", "node", "../node/c", NODE)
            self.cli("nodes", "add", "node", f"--address={NODE}", "--resource=CPU=4",
                     "--resource=GPU=0", "--resource=*=1e12")  # fmt: skip
        for name in DRIVERS:
            # Drivers run on nodes; mallory's laptop has what mallory has.
            self.issue("driver", name, name, HEAD, NODE, ROGUE)
        self.issue("operator", "olga", "olga", HEAD)
        self.issue("observer", "otto", "otto", HEAD)
        self.start_head(*head)
        if node:
            self.start_node()

    def issue(self, role: str, name: str, out: str, *addresses: str) -> Path:
        """Issue a member's directory, below the head's home."""
        path = (self.head.home / out).resolve()
        self.registry.issue(role, name, list(addresses), path)  # type: ignore[arg-type]
        return path

    def cli(self, *arguments: str, check: bool = True) -> Any:
        """Run `raysandbox cluster …` on the head."""
        return self.head.raysandbox("cluster", *arguments, "--cluster=c", check=check)

    def start_head(self, *more: str) -> None:
        """Start the head's Ray, as its operator would."""
        start = CLI if self.walls else (sys.executable, "-c", WITHOUT_WALLS)
        self.head.run(*start, "start", "--cluster=c", "--head", *SMALL, *PORTS, *more,
                      env=QUICK_TO_SEE_A_LOSS, timeout_s=90)  # fmt: skip

    def start_node(self) -> None:
        """Start the node's Ray."""
        self.node.run(*CLI, "start", "--cluster=c", f"--address={HEAD}:{PORT}", *SMALL,
                      *PORTS, timeout_s=90)  # fmt: skip

    def env(self, name: str) -> list[str]:
        """Return the command line that makes a command speak as a member."""
        return [*CLI, "cluster", "env", f"--cluster={self.head.home / name}", "--"]

    def driver(self, name: str, init: str = "", host: Host | None = None) -> Driver:
        """A driver with a certificate of its own."""
        return Driver(host or self.head, *self.env(name), init=init)

    def shared(self, name: str) -> Driver:
        """The driver of that name which all tests share, on the head.

        Its namespace is ``of-<name>``. What a test defines in it, another finds.
        """
        driver = self._drivers.get(name)
        if driver is None or not driver.lives:
            driver = self.driver(name, init=f"namespace='of-{name}'")
            self._drivers[name] = driver
        return driver

    def end_drivers(self) -> None:
        """End the drivers that tests shared."""
        while self._drivers:
            self._drivers.popitem()[1].close()

    def target(self, name: str, component: str = "driver") -> dict[str, str]:
        """Return what an attacker needs who has a member's directory."""
        base = self.head.home / name if name != "node" else self.node.home / "c"
        return {
            "address": f"{HEAD}:{PORT}",
            "token": str(self.path / "token"),
            "ca": str(self.path / "ca.pem"),
            "cert": str(base / "identity" / f"{component}.pem"),
            "key": str(base / "identity" / f"{component}.key"),
        }

    def events(self, since: float = 0.0, **wanted: str) -> list[dict[str, Any]]:
        """Return the audit records whose fields match the given patterns."""
        found = []
        for record in query(self.path / "audit"):
            if record.get("t", 0) >= since and all(
                re.search(pattern, str(record.get(key, "")))
                for key, pattern in wanted.items()
            ):
                found.append(record)
        return found

    def expect_event(self, since: float, **wanted: str) -> dict[str, Any]:
        """Wait for an audit record; return the first."""
        wait_for(f"event {wanted}", lambda: self.events(since, **wanted), 30)
        return self.events(since, **wanted)[0]

    def alive(self) -> int:
        """Return how many nodes the cluster has."""
        alive = "result = sum(n['Alive'] for n in ray.nodes())"
        return int(self.shared("alice")(alive))


def memory_bytes(host: Host, comm: str) -> int:
    """Return the resident memory of a host's process of that name."""
    out = host.run("ps", "-C", comm, "-o", "rss=").stdout
    return int(out.split()[0]) << 10


Attack = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Machines on one switch."""
    require("root", "program:ip", "program:nsenter", "program:tcpdump",
            "module:envoy", "module:cryptography")  # fmt: skip
    with Lab() as lab:
        for name, address in (
            ("head", HEAD), ("node", NODE), ("rogue", ROGUE), ("stock", STOCK),
        ):  # fmt: skip
            lab.host(name, address)
            lab.where[name] = "auto"
        yield lab


@pytest.fixture(scope="session")
def hardened(lab: Lab) -> Iterator[Hardened]:
    """The cluster under test, running."""
    made = Hardened(lab)
    yield made
    made.end_drivers()


@pytest.fixture(scope="session")
def stock(lab: Lab) -> Stock:
    """What it is compared with, running."""
    return Stock(lab)


@pytest.fixture(scope="session")
def attack(lab: Lab) -> Attack:
    """Run an attack of attack.py from the rogue machine (or another)."""

    def run(
        target: dict[str, str], name: str, *arguments: Any, host: str = "rogue"
    ) -> dict[str, Any]:
        out = lab.hosts[host].servant(str(HERE / "attack.py"))(
            "attack:main", "attack.py", json.dumps(target), name, json.dumps(arguments)
        )
        assert out.returncode == 0, out.stderr
        answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture
def now() -> float:
    """When the test began, as the audit log counts."""
    return time.time()
