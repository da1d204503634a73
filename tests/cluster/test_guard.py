"""What the guard decides by itself, with no Ray behind it: floods, holds, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster.guard import LIMITED, LIMITED_S, LIMITED_WHY, MOST_WAITING
from tests.cluster.guard_only import NODES, Guard
from tests.cluster.lab import Host, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

HEAD, ROGUE, LAPTOP = "10.77.5.1", "10.77.5.3", "10.77.5.4"
DESK, NODE_1, NODE_2 = "10.77.5.5", "10.77.5.6", "10.77.5.7"
PORT, DASHBOARD = 6379, 8443
ATTACK = Path(__file__).resolve().parent / "attack.py"
Attack = Callable[..., dict[str, Any]]
# A script that Envoy takes and that ends with an error on each request.
FAILS = "function envoy_on_request(handle) handle:nothing() end"


class SmallGuard(Guard):
    """A guard with limits that a test reaches, and other machines beside it."""

    def __init__(self, lab: Lab) -> None:
        host = lab.host("head", HEAD)
        super().__init__(host)
        self.rogue, self.laptop = lab.host("rogue", ROGUE), lab.host("laptop", LAPTOP)
        self.desk = lab.host("desk", DESK)
        self.node_1, self.node_2 = lab.host("n1", NODE_1), lab.host("n2", NODE_2)
        host.raysandbox("cluster", "init", str(self.path), "--head-address", HEAD)
        for role, name, address in (
            ("driver", "alice", LAPTOP), ("driver", "mallory", LAPTOP),
            ("driver", "bob", DESK), ("node", "n1", NODE_1), ("node", "n2", NODE_2),
            ("node", "n3", NODE_2),
        ):  # fmt: skip
            self.cli("certs", "issue", role, name, "--address", address,
                     "--out", str(host.home / name))  # fmt: skip
        for name, address in (("n1", NODE_1), ("n2", NODE_2)):
            self.cli("nodes", "add", name, "--address", address)
        (self.path / "cluster.toml").write_text(
            (self.path / "cluster.toml").read_text() + SETTINGS
        )
        self.start()

    def target(self, name: str, port: int = PORT) -> dict[str, str]:
        """Return what an attacker needs who has a member's directory."""
        component = "raylet" if name in ("n1", "n2", "n3") else "driver"
        base = self.host.home / name / "identity" / component
        return {
            "address": f"{HEAD}:{port}", "token": f"{self.path}/token",
            "ca": f"{self.path}/ca.pem", "cert": f"{base}.pem", "key": f"{base}.key",
        }  # fmt: skip

    def attack(
        self, name: str, what: str, *arguments: Any, host: Host | None = None
    ) -> dict[str, Any]:
        """Run an attack of attack.py as somebody, from the rogue's machine."""
        out = (host or self.rogue).servant(str(ATTACK))(
            "attack:main", "attack.py", json.dumps(self.target(name)), what,
            json.dumps(arguments),
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return answer

    def through(self, name: str, host: Host) -> bool:
        """Whether a member's call from its machine is let through."""
        return "upstream" in self.attack(name, "call", NODES, host=host)["details"]

    @contextmanager
    def many_connections(
        self, count: int, name: str = "", host: Host | None = None, port: int = PORT
    ) -> Iterator[Callable[[], int]]:
        """Open connections; yields what says how many are still open.

        Args:
            count: How many are tried.
            name: Whose certificate they are opened with; nobody's: without TLS.
            host: From which machine, unless from the rogue's.
            port: Of the head.
        """
        target = self.target(name, port)
        if not name:
            target = {"address": target["address"]}
        command = [sys.executable, str(ATTACK), json.dumps(target), "hold",
                   json.dumps([count])]  # fmt: skip
        on = host or self.rogue
        process = subprocess.Popen(
            on.argv(command), env=on.env(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        def still_open() -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        try:
            still_open()
            yield still_open
        finally:
            process.kill()
            process.communicate()

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


SETTINGS = f"""
dashboard_tls_port = {DASHBOARD}
[limits]
request_s = 10
connections = 40
other_connections = 20
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


AS_HEAD = {"who": "c/identity/raylet"}


@pytest.fixture(scope="module")
def guard() -> Iterator[SmallGuard]:
    """A head without Ray."""
    with Lab() as lab:
        made = SmallGuard(lab)
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


def test_flood_of_forbidden_calls_has_a_limit(guard: SmallGuard) -> None:
    """Being refused is counted as being served is.

    The first ones read why; the rest are told to come back, more of them than may wait
    to hear it.
    """
    now = time.time()
    seen = guard.attack("mallory", "forbidden", 800)["seen"]
    refused = sum(n for said, n in seen.items() if said.startswith("PERMISSION_DENIED"))
    later = sum(n for said, n in seen.items() if said.startswith("UNAVAILABLE"))
    assert refused + later == 800, seen
    # Twice the role's burst and rate, see `guard`, for some seconds.
    assert 0 < refused < 500, seen
    assert any("not a method of this role" in said for said in seen), seen
    assert any(LIMITED_WHY in said for said in seen), seen
    assert later > MOST_WAITING
    guard.expect_refused(now, "driver/mallory", LIMITED_WHY)


def test_caller_over_its_limits_waits_to_hear_so(guard: SmallGuard) -> None:
    """Who calls again as soon as it is answered calls less often.

    Positive control: a call that is refused for another reason does not wait.
    """
    now = time.time()
    # Fewer over the limits than may wait at once.
    seen = guard.attack("bob", "forbidden", 300, host=guard.desk)["seen"]
    assert any(LIMITED_WHY in said for said in seen), seen
    told = guard.expect_refused(now, "driver/bob", LIMITED_WHY)
    assert told["ms"] >= 950 * LIMITED_S
    lines = guard.audit("--json", "--denied", "--who", "driver/bob").splitlines()
    others = [
        record["ms"]
        for record in map(json.loads, lines)
        if record["t"] >= now and "ms" in record and LIMITED_WHY not in record["why"]
    ]
    assert min(others) < 950 * LIMITED_S


KV_PUT = "/ray.rpc.InternalKVGcsService/InternalKVPut"
JOBS = "/ray.rpc.JobInfoGcsService/GetAllJobInfo"


@pytest.mark.parametrize(("path", "mebibytes"), [(KV_PUT, 20), (JOBS, 6)])
def test_request_that_is_too_large_is_not_kept(
    guard: SmallGuard, path: str, mebibytes: int
) -> None:
    """What is larger than its caller may send is refused before it is whole.

    Also of a method that nobody looks into. Guards against a guard that holds
    128 MiB for each of a driver's calls.
    """
    now = time.time()
    answer = guard.attack("alice", "oversized", path, mebibytes, 8)
    assert "larger than its role may send" in answer["details"]
    guard.expect_refused(now, "driver/alice", "larger than its role may send")


def test_request_that_is_never_whole_is_ended(guard: SmallGuard) -> None:
    """A caller may not keep the guard waiting for the rest of what it sends."""
    now = time.time()
    answer = guard.attack("alice", "oversized", KV_PUT, 1, 30)
    assert "did not come in whole in time" in answer["details"]
    assert time.time() - now < 20
    guard.expect_refused(now, "driver/alice", "did not come in whole in time")


def test_strangers_take_no_connections_of_nodes(guard: SmallGuard) -> None:
    """Whoever holds all that it can, without a certificate, is alone with that.

    Machines of the inventory are served, and those that certificates name; what
    was closed is an event.
    """

    def laptop() -> str:
        return str(guard.attack("alice", "call", NODES, host=guard.laptop)["details"])

    assert guard.verdict(**AS_HEAD) == "through"
    assert "upstream" in laptop()
    now = time.time()
    with guard.many_connections(100) as count:
        wait_for("the rest to be closed", lambda: count() <= 20)
        assert guard.verdict(**AS_HEAD) == "through"
        assert "upstream" in laptop()
        stranger = guard.attack("alice", "call", NODES)["details"]
        assert "upstream" not in stranger
        record = guard.expect_refused(now, ROGUE, "too many connections")
    assert record["event"] == "connection_refused"


@pytest.mark.parametrize(
    ("name", "most"), [("alice", 20), ("n1", 40)], ids=["driver", "stolen node"]
)
def test_member_takes_no_connections_of_others(
    guard: SmallGuard, name: str, most: int
) -> None:
    """A member's machine that holds all that it can has shut out itself alone.

    Guards against a limit of all members' connections together, or of all nodes':
    one driver, or one node that was stolen, kept every other one from connecting.
    """
    attacker = guard.laptop if name == "alice" else guard.node_1
    others = [("bob", guard.desk), ("n2", guard.node_2)]
    assert guard.through(name, attacker)
    for other, host in others:
        assert guard.through(other, host), other
    now = time.time()
    with guard.many_connections(100, name, attacker) as count:
        wait_for("all that it may have", lambda: most - 5 <= count() <= most)
        assert not guard.through(name, attacker)
        for other, host in others:
            assert guard.through(other, host), other
        assert guard.verdict(**AS_HEAD) == "through"
        record = guard.expect_refused(now, attacker.address, "too many connections")
        assert count() >= most - 5
    assert record["event"] == "connection_refused"


def test_dashboard_is_there_for_others_too(guard: SmallGuard) -> None:
    """Whoever holds all connections that it can of the dashboard's port is alone."""
    with guard.many_connections(100, "alice", guard.laptop, DASHBOARD) as mine:
        wait_for("all that it may have", lambda: 15 <= mine() <= 20)
        for name, host in (("bob", guard.desk), ("n2", guard.node_2)):
            with guard.many_connections(3, name, host, DASHBOARD) as others:
                assert others() == 3, name


def test_flood_from_many_addresses_has_one_limit(guard: SmallGuard) -> None:
    """The limits of an identity are its own, wherever its calls come from.

    Guards against a set of them for each address, as there is of connections.
    """
    begun, refused = time.time(), 0
    for host in (guard.laptop, guard.desk, guard.rogue):
        seen = guard.attack("mallory", "forbidden", 800, host=host)["seen"]
        assert sum(seen.values()) == 800
        refused += sum(
            n for said, n in seen.items() if said.startswith("PERMISSION_DENIED")
        )
    # Twice the role's burst and rate, see `SETTINGS`; the rest was told to come back.
    assert 0 < refused <= 200 + 40 * (time.time() - begun)


def test_change_of_the_inventory_alone_is_in_force(guard: SmallGuard) -> None:
    """A node is let in when `nodes add` returns, and refused after `nodes remove`.

    Guards against a wait for lists of revoked certificates that have not changed: the
    guard's program never reported them anew, and the change was given up.
    """
    assert not guard.through("n3", guard.node_2)
    out = guard.cli("nodes", "add", "n3", "--address", NODE_2)
    assert "in force" in out.stdout
    assert guard.through("n3", guard.node_2)
    out = guard.cli("nodes", "remove", "n3")
    assert "in force" in out.stdout
    assert not guard.through("n3", guard.node_2)
    assert guard.through("n2", guard.node_2)


def test_guard_listens_where_it_was_told(guard: SmallGuard) -> None:
    """At the head's address and on loopback, and not wherever else it is reached."""
    listening = guard.host.run("ss", "-ltnH", "sport", "=", "6379").stdout
    found = {line.split()[3] for line in listening.splitlines()}
    assert found == {f"{HEAD}:6379", "127.0.0.1:6379"}


def test_nobody_gets_through_a_script_that_fails(guard: SmallGuard) -> None:
    """Envoy goes on with the request, and with who its caller says to be."""
    marks = {
        "x-rsb-uri": "spiffe://c/head/head/gcs", "x-rsb-role": "head",
        "x-rsb-who": "head/head", "x-rsb-to": "gcs-trusted",
    }  # fmt: skip
    place = guard.there / "run" / "lds.json"
    whole = place.read_text()

    def said() -> str:
        answer = guard.attack("mallory", "call_as", NODES, marks, host=guard.laptop)
        return str(answer["details"])

    def put(version: str, rules: bool) -> None:
        changed = json.loads(whole)
        changed["version_info"] = version
        for listener in changed["resources"]:
            listener["metadata"]["filter_metadata"]["rsb"]["version"] = version
            for chain in (*listener["filter_chains"], listener["default_filter_chain"]):
                for each in chain["filters"][-1]["typed_config"]["http_filters"]:
                    made = each["typed_config"]
                    if each["name"].endswith("lua"):
                        made["default_source_code"]["inline_string"] = FAILS
                    elif each["name"].endswith("rbac") and not rules:
                        for policy in made["rules"]["policies"].values():
                            del policy["principals"][0]["and_ids"]["ids"][0]
        new = place.with_suffix(".new")
        new.write_text(json.dumps(changed))
        new.rename(place)

    try:
        put("fails", rules=True)
        wait_for("a refusal", lambda: "not a method of this role" in said())
        put("without", rules=False)
        wait_for("the GCS's address", lambda: "upstream" in said())
    finally:
        put("again", rules=True)
        place.with_suffix(".new").write_text(whole)
        place.with_suffix(".new").rename(place)
    wait_for("the whole script", lambda: guard.through("mallory", guard.laptop))
    # What a caller says of itself is nothing then.
    marks[LIMITED] = "yes"
    assert "upstream" in said()


def test_program_that_can_not_be_executed_is_said(guard: SmallGuard) -> None:
    """The start ends at once, with what to do, and without a traceback."""
    import envoy

    place = str(Path(envoy.__file__).parent / "_bin")
    guard.cli("down")
    guard.host.run("mount", "-t", "tmpfs", "none", place)
    try:
        guard.host.run("sh", "-c", f"echo x > {place}/envoy; chmod 644 {place}/envoy")
        begun = time.monotonic()
        with pytest.raises(
            AssertionError, match="can't be executed: Permission denied"
        ):
            guard.start()
        assert time.monotonic() - begun < 20
        assert "Traceback" not in guard.said()
    finally:
        guard.host.run("umount", place)
    guard.start()
    assert guard.verdict(**AS_HEAD) == "through"
