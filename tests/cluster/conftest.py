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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster.audit import query
from raysandbox.cluster.settings import ClusterDir
from tests.cluster.lab import Host, Lab, wait_for
from tests.require import require

HERE = Path(__file__).resolve().parent
CLI = (sys.executable, "-m", "raysandbox")
# What is tested here is the cluster around the tasks, which run as on stock Ray: the
# walls around tasks and workers, and their policy, have tests of their own.
_START = (
    "import sys\n"
    "from raysandbox.cluster.settings import ClusterDir\n"
    "from raysandbox.cluster.start import start\n"
    "from raysandbox.errors import RaysandboxError\n"
    "try:\n"
    "    start(ClusterDir(sys.argv[1]), sys.argv[2:])\n"
    "except RaysandboxError as error:\n"
    "    sys.exit(f'raysandbox: {error}')\n"
)
START = (sys.executable, "-c", _START)
SMALL = ("--num-cpus=2", "--object-store-memory=150000000")
HEAD, NODE, ROGUE, STOCK, DRIVERS = (
    "10.77.0.1", "10.77.0.2", "10.77.0.3", "10.77.0.4", ("alice", "mallory"),
)  # fmt: skip
PORT, DASHBOARD = 6379, 8443


class Driver:
    """A driver process on a machine, see driver.py."""

    def __init__(self, host: Host, *prefix: str, init: str = "") -> None:
        self.process = subprocess.Popen(
            host.argv([*prefix, sys.executable, str(HERE / "driver.py")]),
            env=host.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(host.home / "drivers.log").open("ab"), text=True,
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
        raise AssertionError(f"the driver ended with {self.process.wait()}")

    def __call__(self, code: str) -> Any:
        answer = self.ask(code)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Stock:
    """Stock Ray 2.60 with its token, as `ray start` makes it."""

    def __init__(self, lab: Lab) -> None:
        self.host = lab.hosts["stock"]
        self.host.run("ray", "get-auth-token", "--generate")
        self.token = self.host.home / ".ray" / "auth_token"
        self.target = {"address": f"{STOCK}:{PORT}", "token": str(self.token)}
        self.host.run(
            "ray", "start", "--head", f"--port={PORT}", f"--node-ip-address={STOCK}",
            "--include-dashboard=false", *SMALL,
        )  # fmt: skip

    def driver(self, name: str) -> Driver:
        """A driver of the stock cluster; it has no name there."""
        del name
        return Driver(self.host)


class Hardened:
    """A head and a node with everything that raysandbox puts around them."""

    def __init__(self, lab: Lab, *head: str, node: bool = True) -> None:
        self.lab = lab
        self.head, self.rogue = lab.hosts["head"], lab.hosts["rogue"]
        self.path = self.head.home / "c"
        self.head.run(*CLI, "cluster", "init", "c", "--name=lab",
                      f"--head-address={HEAD}", f"--port={PORT}")  # fmt: skip
        if node:
            self.node = lab.hosts["node"]
            self.issue("node", "node", "../node/c", NODE)
            self.cli("nodes", "add", "node", f"--address={NODE}", "--resource=CPU=4",
                     "--resource=*=1e12")  # fmt: skip
        with (self.path / "cluster.toml").open("a") as file:
            file.write(f"dashboard_tls_port = {DASHBOARD}\n")
        self.settings = ClusterDir(self.path).settings()
        for name in DRIVERS:
            # Drivers run on nodes; mallory's laptop has what mallory has.
            self.issue("driver", name, name, HEAD, NODE, ROGUE)
        self.issue("operator", "olga", "olga", HEAD)
        self.issue("observer", "otto", "otto", HEAD)
        # The log has a disk of its own that a test can fill.
        self.head.run("sh", "-c", "mkdir -p c/audit && "
                      "mount -t tmpfs -o size=24m,mode=700 tmpfs c/audit")  # fmt: skip
        self.start_head(*head)
        if node:
            self.start_node()

    def issue(self, role: str, name: str, out: str, *addresses: str) -> Path:
        """Issue a member's directory, below the head's home."""
        given = [f"--address={a}" for a in addresses]
        self.cli("certs", "issue", role, name, f"--out={out}", *given)
        return (self.head.home / out).resolve()

    def cli(self, *arguments: str, check: bool = True) -> Any:
        """Run `raysandbox cluster …` on the head."""
        return self.head.run(
            *CLI, "cluster", *arguments, "--cluster=c", check=check, timeout_s=60
        )

    def start_head(self, *more: str) -> None:
        """Start the head's Ray."""
        self.head.run(*START, "c", "--head", *SMALL, *more, timeout_s=90)

    def start_node(self) -> None:
        """Start the node's Ray."""
        self.node.run(*START, "c", f"--address={HEAD}:{PORT}", *SMALL, timeout_s=90)

    def env(self, name: str) -> list[str]:
        """Return the command line that makes a command speak as a member."""
        return [*CLI, "cluster", "env", f"--cluster={self.head.home / name}", "--"]

    def driver(self, name: str, init: str = "", host: Host | None = None) -> Driver:
        """A driver with a certificate of its own."""
        return Driver(host or self.head, *self.env(name), init=init)

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
        log = Path(f"/proc/{self.head.pid}/root{self.path}/audit")
        found = []
        for record in query(log):
            if record.get("t", 0) >= since and all(
                re.search(pattern, str(record.get(key, "")))
                for key, pattern in wanted.items()
            ):
                found.append(record)
        return found

    def expect_event(self, since: float, **wanted: str) -> dict[str, Any]:
        """Wait for an audit record; return the first."""
        wait_for(f"event {wanted}", lambda: self.events(since, **wanted), 10)
        return self.events(since, **wanted)[0]

    def alive(self) -> int:
        """Return how many nodes the cluster has."""
        code = (
            "import ray; ray.init(address='auto', logging_level='ERROR');"
            "print('ALIVE', sum(n['Alive'] for n in ray.nodes()))"
        )
        out = self.head.run(*self.env("alice"), sys.executable, "-c", code)
        return int(out.stdout.split("ALIVE")[1].split()[0])


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
def hardened(lab: Lab) -> Hardened:
    """The cluster under test, running."""
    return Hardened(lab)


@pytest.fixture(scope="session")
def stock(lab: Lab) -> Stock:
    """What it is compared with, running."""
    return Stock(lab)


@pytest.fixture(scope="session")
def attack(lab: Lab) -> Attack:
    """Run an attack of attack.py from the rogue machine (or another)."""

    def run(
        target: dict[str, str], name: str, *arguments: Any, host: str = "rogue",
        timeout_s: float = 60,
    ) -> dict[str, Any]:  # fmt: skip
        out = lab.hosts[host].run(
            sys.executable, str(HERE / "attack.py"), json.dumps(target), name,
            json.dumps(arguments), timeout_s=timeout_s,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture
def now() -> float:
    """When the test began, as the audit log counts."""
    return time.time()
