"""The guard when the audit log's disk is full: closed or open, and said loudly.

Real Envoy on a real file system of 300 KiB in the host's own mount namespace; no
Ray behind it, because what is looked at is whether a call is let through to where
the GCS would be.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.guard_only import Guard
from tests.cluster.lab import Host, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

HEAD = "10.77.4.1"


class DiskGuard(Guard):
    """A guard whose audit log is on a small disk."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        host.raysandbox("cluster", "init", str(self.path), "--head-address", HEAD)
        self.cli("certs", "issue", "driver", "alice", "--address", HEAD,
                 "--out", str(host.home / "alice"))  # fmt: skip
        (self.path / "audit").mkdir(mode=0o700)
        host.run("mount", "-t", "tmpfs", "-o", "size=300k,mode=700", "tmpfs",
                 str(self.path / "audit"))  # fmt: skip

    def start_as(self, policy: str, **more: Any) -> None:
        """Start the guard anew under a policy, on an empty disk."""
        self.cli("down")
        self.host.run("sh", "-c", f"rm -rf {self.path}/audit/* {self.path}/run")
        text = (self.path / "cluster.toml").read_text().partition("[audit]")[0]
        for key, value in more.items():
            text = f"{key} = {json.dumps(value)}\n" + text
        text += f'[audit]\nwhen_disk_is_full = "{policy}"\n'
        (self.path / "cluster.toml").write_text(text)
        self.start()

    def passes(self, **how: Any) -> bool:
        """Whether a call is let through to where the GCS would be."""
        verdict = self.verdict(**how)
        assert verdict in ("through", "closed", "denied"), verdict
        return verdict == "through"

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        self.host.run("sh", "-c", f"cat /dev/zero > {self.path}/audit/ballast; true")

    def free(self) -> None:
        """Give the room back."""
        self.host.run("rm", str(self.path / "audit" / "ballast"))


@pytest.fixture(scope="module")
def guard() -> Iterator[DiskGuard]:
    """A head without Ray."""
    with Lab() as lab:
        made = DiskGuard(lab.host("head", HEAD))
        yield made
        made.close()


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

    def back() -> bool:
        try:
            return guard.passes()
        except AssertionError:
            return False

    wait_for("the guard", back)
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
