"""The guard when the audit log's disk is full: closed or open, and said loudly.

Real Envoy on a real file system of some KiB in the host's own mount namespace; no
Ray behind it, because what is looked at is whether a call is let through to where
the GCS would be.
"""

from __future__ import annotations

import base64
import json
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.guard_only import Guard
from tests.cluster.lab import Host, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

HEAD = "10.77.4.1"
ATTACK = Path(__file__).resolve().parent / "attack.py"


class DiskGuard(Guard):
    """A guard whose audit log, or whole directory, is on a small disk."""

    def __init__(self, host: Host, *, whole: bool = False) -> None:
        super().__init__(host)
        self.disk, size = self.path / "audit", "300k"
        if whole:
            self.disk, size = host.home / "disk", "2m"
            self.path = self.disk / "c"
            self._mount(size)
        host.raysandbox("cluster", "init", str(self.path), "--head-address", HEAD)
        self.cli("certs", "issue", "driver", "alice", "--address", HEAD,
                 "--out", str(host.home / "alice"))  # fmt: skip
        self.text = (self.there / "cluster.toml").read_text()
        if not whole:
            self._mount(size)

    def _mount(self, size: str) -> None:
        self.host.run("mkdir", "-m", "700", str(self.disk))
        self.host.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs",
                      str(self.disk))  # fmt: skip

    def start_as(self, policy: str, **more: Any) -> None:
        """Start the guard anew under a policy, on an empty disk."""
        self.cli("down")
        self.host.run("sh", "-c", f"rm -rf {self.path}/audit/* {self.path}/run")
        text = self.text
        for key, value in more.items():
            text = f"{key} = {json.dumps(value)}\n" + text
        text += f'[audit]\nwhen_disk_is_full = "{policy}"\n'
        (self.there / "cluster.toml").write_text(text)
        self.start()

    def passes(self, **how: Any) -> bool:
        """Whether a call is let through to where the GCS would be."""
        verdict = self.verdict(**how)
        assert verdict in ("through", "closed", "denied"), verdict
        return verdict == "through"

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        self.host.run("sh", "-c", f"cat /dev/zero > {self.disk}/ballast; true")

    def free(self) -> None:
        """Give the room back."""
        self.host.run("rm", str(self.disk / "ballast"))

    def pids(self) -> list[str]:
        """Return the processes of guard and helpers, by name and number."""
        out = self.host.run("ps", "-eo", "pid,args").stdout.splitlines()
        return [
            line for line in out
            if ("cluster.supervisor" in line or "_bin/envoy" in line)
            and "ps -eo" not in line
        ]  # fmt: skip

    def dashboard(self) -> int:
        """Return the status that the TLS front of the dashboard answers."""
        identity = self.host.home / "alice" / "identity"
        target = {
            "address": f"{HEAD}:8443", "ca": str(self.path / "ca.pem"),
            "cert": str(identity / "driver.pem"), "key": str(identity / "driver.key"),
        }  # fmt: skip
        out = self.host.servant(str(ATTACK))(
            "attack:main", "attack.py", json.dumps(target), "https",
            json.dumps(["GET", "/"]),
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        return int(json.loads(out.stdout.splitlines()[-1])["status"])


@pytest.fixture(scope="module")
def guard() -> Iterator[DiskGuard]:
    """A head without Ray."""
    with Lab() as lab:
        made = DiskGuard(lab.host("head", HEAD))
        yield made
        made.close()


@pytest.fixture(scope="module")
def whole() -> Iterator[DiskGuard]:
    """A head without Ray, all of whose directory is on the small disk."""
    with Lab() as lab:
        made = DiskGuard(lab.host("head", HEAD), whole=True)
        # Where the dashboard would be.
        web = (
            "-m",
            "http.server",
            "8265",
            "--bind",
            "127.0.0.1",
            "--directory",
            "/tmp",
        )
        made.host.popen(sys.executable, *web)
        wait_for("it", lambda: ":8265" in made.host.run("ss", "-ltnH").stdout)
        yield made
        made.close()


def _worker_id(number: int) -> bytes:
    return number.to_bytes(28, "big")


def _add_worker(number: int) -> dict[str, Any]:
    """A call that its caller is to be remembered of."""
    worker_id = base64.b64encode(_worker_id(number)).decode()
    return {
        "method": "/ray.rpc.WorkerInfoGcsService/AddWorkerInfo",
        "kind": "AddWorkerInfoRequest",
        "fields": {"workerData": {"workerAddress": {"workerId": worker_id}}},
    }


@pytest.mark.parametrize("policy", ["closed", "open"])
def test_full_disk_of_everything_ends_nothing(whole: DiskGuard, policy: str) -> None:
    """Guard and helpers go on, by policy, also where their own files have no room.

    Closed, the dashboard's front refuses as well. Open, also what its caller is
    to be remembered of passes, and is remembered once there is room.
    """
    whole.start_as(policy, dashboard_tls_port=8443)
    assert whole.passes()
    assert whole.passes(**_add_worker(1))
    assert whole.dashboard() == 200
    before = whole.pids()
    assert len(before) == 3, before
    whole.fill()
    # Its place in the stock has to be filled again.
    stock = whole.there / "run" / "workers"
    next(iter(stock.glob("*.pem"))).rename(stock.parent / "workers-used" / "1.pem")
    if policy == "closed":
        wait_for("the first refusal", lambda: not whole.passes())
        assert whole.dashboard() == 503
    else:
        # More than what is left of the file's last page.
        for number in range(2, 82):
            assert whole.passes(**_add_worker(number))
        assert whole.dashboard() == 200
    wait_for("another try", lambda: len(list(stock.glob("*"))) == 15)
    time.sleep(2)
    assert whole.pids() == before
    if policy == "open":
        whole.host.run("pkill", "-9", "-x", "envoy")
        wait_for("another guard", lambda: _answers(whole))
    whole.free()
    wait_for("the stock", lambda: len(list(stock.glob("*.pem"))) == 16)
    wait_for("calls to go on", lambda: _answers(whole))
    assert whole.dashboard() == 200
    wait_for(
        "the gap in the log", lambda: "audit_writable_again" in whole.audit("--json")
    )
    assert json.loads(whole.audit("verify", "--json"))["ok"]
    facts = whole.there / "state" / "facts.jsonl"
    if policy == "open":
        wait_for("the owners", lambda: _worker_id(81).hex() in facts.read_text())
        told = whole.audit("--json", "--what", "facts_not_written")
        assert json.loads(told.splitlines()[0])["alert"]
    assert "Traceback" not in whole.said()


def _answers(guard: DiskGuard) -> bool:
    try:
        return guard.passes()
    except AssertionError:
        return False


def test_closed_refuses_every_call_until_there_is_room(guard: DiskGuard) -> None:
    """Nothing goes to the GCS that can't be recorded.

    With room again calls go on, the gap is in the log, and the chain is whole.
    """
    guard.start_as("closed")
    assert guard.passes()
    guard.fill()
    wait_for("the first refusal", lambda: not guard.passes())
    assert "every call is refused until it can be written" in guard.said()
    assert not guard.passes()
    guard.free()
    wait_for("calls to go on", guard.passes)
    wait_for(
        "the gap in the log", lambda: "audit_writable_again" in guard.audit("--json")
    )
    assert json.loads(guard.audit("verify", "--json"))["ok"]
    # Refusals are folded for a second.
    wait_for(
        "the refusals in the log",
        lambda: "the audit log can't be written" in guard.audit("--denied", "--json"),
    )


def test_open_lets_calls_through_and_says_so(guard: DiskGuard) -> None:
    """Every call passes, UNRECORDED, and the alert says that."""
    guard.start_as("open")
    assert guard.passes()
    guard.fill()

    def told() -> bool:
        assert guard.passes()
        return "UNRECORDED" in guard.said()

    wait_for("the alert", told)
    for _ in range(5):
        assert guard.passes()
    guard.free()
    wait_for(
        "the gap in the log", lambda: "audit_writable_again" in guard.audit("--json")
    )
    assert json.loads(guard.audit("verify", "--json"))["ok"]


def test_killed_supervisor_leaves_a_log_that_goes_on(guard: DiskGuard) -> None:
    """After SIGKILL the guard is back and the log verifies.

    It says that there was a restart.
    """
    for _ in range(20):
        guard.passes()
    script = (
        f"pid=$(cat {guard.path}/run/supervisor.pid); "
        "kill -9 $(cat /proc/$pid/task/$pid/children)"
    )
    before = guard.audit("--json", "--what", "supervisor_started").count("\n")
    guard.host.run("sh", "-c", script)
    wait_for(
        "the restart in the log",
        lambda: (
            guard.audit("--json", "--what", "supervisor_started").count("\n") > before
        ),
    )

    wait_for("the guard", lambda: _answers(guard))
    assert json.loads(guard.audit("verify", "--json"))["ok"]


def test_tampered_log_is_an_alert_at_the_next_start(guard: DiskGuard) -> None:
    """Whoever changed it while the guard was down is found without being asked."""
    guard.cli("down")
    guard.host.run(
        "sed",
        "-i",
        "3s/supervisor\\|driver\\|GetAll/XXXX/",
        f"{guard.path}/audit/audit.jsonl",
    )
    out = guard.host.raysandbox(
        "audit", "--cluster", str(guard.path), "verify", check=False
    )
    assert (out.returncode, "does not match its hash" in out.stderr) == (1, True)
    guard.start()
    wait_for("the alert", lambda: '"alert": "audit_broken"' in guard.said())


def test_observing_lets_a_stranger_through_with_an_alert(guard: DiskGuard) -> None:
    """Observing, an unlisted node's join goes on to the GCS and is alerted.

    The same join is refused with admission = "enforce".
    """
    ghost = f"ghost-{secrets.token_hex(4)}"
    guard.cli("certs", "issue", "node", ghost, "--address", HEAD,
              "--out", str(guard.host.home / ghost))  # fmt: skip
    join = {
        "who": f"{ghost}/identity/raylet",
        "method": "/ray.rpc.NodeInfoGcsService/RegisterNode",
        "kind": "RegisterNodeRequest",
        "fields": {
            "nodeInfo": {
                "nodeId": base64.b64encode(b"\7" * 28).decode(),
                "nodeManagerAddress": HEAD,
            }
        },
    }
    guard.cli("reload")
    assert not guard.passes(**join)
    guard.start_as("closed", admission="observe")
    assert guard.passes(**join)
    wait_for("the alert", lambda: '"alert": "unexpected_node"' in guard.said())
    wait_for("it in the log", lambda: guard.audit("--what", "unexpected_node"))
    alerts = guard.audit("--json", "--what", "unexpected_node").splitlines()
    assert json.loads(alerts[0])["refused"] is False
