"""What the guard decides by itself, with no Ray behind it: floods, holds, refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.guard_only import Guard
from tests.cluster.lab import Host, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

HEAD, ROGUE = "10.77.5.1", "10.77.5.3"
ATTACK = Path(__file__).resolve().parent / "attack.py"
Attack = Callable[..., dict[str, Any]]


class SmallGuard(Guard):
    """A guard with limits that a test reaches, and another machine beside it."""

    def __init__(self, host: Host, rogue: Host) -> None:
        super().__init__(host)
        self.rogue = rogue
        host.raysandbox("cluster", "init", str(self.path), "--head-address", HEAD)
        for name in ("alice", "mallory"):
            self.cli("certs", "issue", "driver", name, "--address", HEAD,
                     "--out", str(host.home / name))  # fmt: skip
        (self.path / "cluster.toml").write_text(
            (self.path / "cluster.toml").read_text() + LIMITS
        )
        self.start()

    def target(self, name: str) -> dict[str, str]:
        """Return what an attacker needs who has a member's directory."""
        base = self.host.home / name / "identity" / "driver"
        return {
            "address": f"{HEAD}:6379", "token": f"{self.path}/token",
            "ca": f"{self.path}/ca.pem", "cert": f"{base}.pem", "key": f"{base}.key",
        }  # fmt: skip

    def attack(self, name: str, what: str, *arguments: Any) -> dict[str, Any]:
        """Run an attack of attack.py as somebody, from the other machine."""
        out = self.rogue.servant(str(ATTACK))(
            "attack:main", "attack.py", json.dumps(self.target(name)), what,
            json.dumps(arguments),
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return answer

    def expect_refused(self, since: float, who: str, why: str) -> dict[str, Any]:
        """Wait for a refused record of somebody's since a time, with a reason."""

        def found() -> list[dict[str, Any]]:
            lines = self.audit("--json", "--denied", "--who", who).splitlines()
            return [
                record
                for record in map(json.loads, lines)
                if record["t"] >= since and why in record.get("why", "")
            ]

        wait_for(f"a refusal: {why}", found)
        return found()[0]


LIMITS = """
[limits.roles.driver]
calls_per_s = 20
calls_burst = 100
read_bytes_per_s = 1048576
read_burst_bytes = 16777216
write_bytes_per_s = 131072
write_burst_bytes = 16777216
in_flight = 8
stored_bytes = 67108864
"""


@pytest.fixture(scope="module")
def guard() -> Iterator[SmallGuard]:
    """A head without Ray."""
    with Lab() as lab:
        made = SmallGuard(lab.host("head", HEAD), lab.host("rogue", ROGUE))
        yield made
        made.close()


def test_compressed_request_is_refused_with_its_reason(guard: SmallGuard) -> None:
    """What can't be looked into is no call that went well."""
    now = time.time()
    answer = guard.attack("mallory", "compressed")
    assert answer["code"] == "PERMISSION_DENIED"
    assert "switch the compression off" in answer["details"]
    guard.expect_refused(now, "driver/mallory", "compressed requests can't be checked")


def test_caller_over_its_budget_reads_why(guard: SmallGuard) -> None:
    """It is told to come back, which Ray's clients do, and what for it has to wait.

    Guards against an answer whose text the guard's program drops.
    """
    now = time.time()
    seen = guard.attack("mallory", "drain_budget")["seen"]
    whys = [said for said in seen if said.startswith("UNAVAILABLE: raysandbox: ")]
    assert any("bytes per second of this identity" in said for said in whys), seen
    guard.expect_refused(now, "driver/mallory", "bytes per second of this identity")
