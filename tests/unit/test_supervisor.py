"""Parts of the guard's surroundings that need no guard: page, rules, throttle."""

from __future__ import annotations

import asyncio
import re
import resource
import signal
import subprocess
import sys
import time
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raysandbox.cli.member import take_up
from raysandbox.cluster import guard, supervisor
from raysandbox.cluster.access import Decision
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.metrics import Metrics
from raysandbox.cluster.settings import ClusterDir, Inventory, Node, Settings
from raysandbox.cluster.supervisor import (
    BUSY,
    DISK,
    AccessServer,
    HeadWorker,
    Held,
    Throttle,
    _let_open,
)
from tests.unit.test_certificates import make_cluster


def test_rules_ask_for_what_the_page_has() -> None:
    """Every metric and label of the example rules is on the page."""
    metrics = Metrics()
    metrics.call("driver", False, 1)
    page = metrics.page().decode()
    text = resources.files("raysandbox.cluster").joinpath("alerts.yml").read_text()
    rules = [r for group in yaml.safe_load(text)["groups"] for r in group["rules"]]
    assert len(rules) >= 6
    for rule in rules:
        names = re.findall(r"\brsb_\w+", rule["expr"])
        assert names
        for name in names:
            assert f"# TYPE {name} " in page, name
        for label in re.findall(r"\{(\w+)", rule["expr"]):
            assert f"{label}=" in page or label in ("alert", "event"), label


def test_rules_name_alerts_that_exist() -> None:
    """An alert that was renamed would never fire."""
    text = resources.files("raysandbox.cluster").joinpath("alerts.yml").read_text()
    source = resources.files("raysandbox.cluster").joinpath("supervisor.py").read_text()
    for names in re.findall(r'alert=~?"([\w|]+)"', text):
        for name in names.split("|"):
            assert f'"{name}"' in source, name


@given(st.text(max_size=30), st.booleans(), st.integers(0, 1 << 40))
def test_labels_are_of_a_fixed_set(role: str, ok: bool, size: int) -> None:
    """A role that a certificate made up is `other`, and breaks no line."""
    metrics = Metrics()
    metrics.call(role, ok, size)
    for line in metrics.page().decode().splitlines():
        assert line.startswith(("#", "rsb_"))


def test_throttle_is_per_key_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many a minute for each key; endless keys share one."""
    now = 0.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    throttle = Throttle(2, keys=3)
    assert [throttle.pass_("a") for _ in range(3)] == [True, True, False]
    assert throttle.pass_("b")
    passed = sum(throttle.pass_(f"new{n}") for n in range(100))
    assert passed <= 4
    now = 61.0
    assert throttle.pass_("a")


class _Transport:
    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed


class _Worker:
    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.waiting: set[object] = set()

    def answer(
        self, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, str, float]:
        self.asked.append((path, headers, body))
        if body == b"bad":
            return 403, "no\r\nset-cookie: x", 0.0
        return 200, "", 0.05 if body == b"hmm" else 0.0

    def may_wait(self, server: object) -> bool:
        self.waiting.add(server)
        return True


@pytest.fixture
def head(tmp_path: Path) -> HeadWorker:
    """What surrounds the guard of a head, before anything is started."""
    cluster = make_cluster(tmp_path / "c")
    cluster.run.mkdir(mode=0o700, exist_ok=True)
    return HeadWorker(cluster)


def _recorded(head: HeadWorker, **entry: Any) -> dict[str, Any]:
    """Return the record of a call that Envoy logs."""
    line = {"t": "1.0", "id": "r1", "method": "/x", "uri": "spiffe://c/driver/a/driver"}
    head._logged({**line, **entry})
    (record,) = [*head._queue, *head._fold.take()]
    return record


ASKED = {"x-request-id": "r1", "x-rsb-uri": "spiffe://c/driver/a/driver"}


@pytest.mark.parametrize(
    ("error", "encoding", "status", "why"),
    [
        (OSError(28, "full"), "identity", 429, DISK),
        (KeyError("bug"), "identity", 403, "internal error of the guard"),
        (None, "gzip", 403, "compressed requests can't be checked"),
    ],
)
def test_refusal_before_a_decision_is_a_refused_record(
    head: HeadWorker, monkeypatch: pytest.MonkeyPatch, error: Exception | None,
    encoding: str, status: int, why: str,
) -> None:  # fmt: skip
    """What the access service refuses without a decision is logged as refused.

    Guards against records that say "ok" of calls that never reached the GCS.
    """

    def fails(**_: Any) -> None:
        assert error is not None
        raise error

    monkeypatch.setattr(head.access, "decide", fails)
    said = head.answer("/x", {**ASKED, "grpc-encoding": encoding}, b"")
    assert said[0] == status
    assert said[1].startswith(why)
    head._queue.clear()
    record = _recorded(head, details="ext_authz_denied", grpc=7)
    assert record["ok"] is False
    assert record["why"].startswith(why)


def test_caller_that_waits_too_often_is_a_refused_record(head: HeadWorker) -> None:
    """Its reason is that, not that the access service did not answer."""
    server, transport = AccessServer(head), _Transport()
    server.connection_made(transport)  # type: ignore[arg-type]
    for _ in range(supervisor.WAITING_EACH):
        other = AccessServer(head)
        other.who = "u"
        head.waiting.add(other)
    head.access.decide = lambda **_: Decision(wait_s=0.5)  # type: ignore[assignment]
    server.data_received(
        ASK.replace(b"\r\n\r\n", b"\r\nx-request-id: r1\r\n\r\n") + b"abc"
    )
    assert transport.written.startswith(b"HTTP/1.1 429 ")
    assert BUSY.encode() in transport.written
    record = _recorded(head, details="ext_authz_denied", grpc=14)
    assert (record["ok"], record["why"]) == (False, BUSY)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"grpc": 16, "http": 200}, "the GCS refused its token"),
        ({"grpc": 7, "http": 200}, "the GCS refused it"),
        ({"http": 401}, "the dashboard refused its token"),
        ({"http": 403}, "the dashboard refused it"),
        ({"details": "ext_authz_denied", "grpc": 7}, "the access service refused it"),
    ],
)
def test_refusal_behind_the_guard_is_a_refused_record(
    head: HeadWorker, entry: dict[str, Any], why: str
) -> None:
    """A wrong token passes the guard, and is no call that went well."""
    sent = {"details": "via_upstream", "to": "127.0.0.1:1"}
    record = _recorded(head, **{**sent, **entry})
    assert record["ok"] is False
    assert record["why"].startswith(why)


def test_observed_node_at_another_address_is_an_alert(head: HeadWorker) -> None:
    """It is let through, which enforcing would not do, and somebody is told."""
    head.settings = head.settings.model_copy(update={"admission": "observe"})
    nodes = {
        "n1": Node(addresses=("10.0.0.1", "10.1.0.0/16")),
        "h": Node(addresses=("10.0.0.9",), head=True),
    }
    head.access.inventory = Inventory(nodes=nodes)

    def alerts(who: str, source: str) -> int:
        line = {"t": "1.0", "method": "/x", "uri": f"spiffe://c/{who}"}
        head._logged({**line, "source": source, "to": "127.0.0.1:1"})
        found = [r for r in head._queue if r.get("event") == "unexpected_address"]
        head._queue.clear()
        return len(found)

    assert alerts("node/n1/raylet", "10.0.0.2:55") == 1
    assert alerts("worker/n1/7", "10.2.0.1:55") == 1
    for who, source in (
        ("node/n1/raylet", "10.0.0.1:55"), ("worker/n1/7", "10.1.2.3:55"),
        ("node/h/raylet", "127.0.0.1:55"), ("driver/n1/driver", "10.0.0.2:55"),
        ("node/unlisted/raylet", "10.0.0.2:55"),
    ):  # fmt: skip
        assert alerts(who, source) == 0, who


def test_guard_may_open_as_many_files_as_the_host_lets_it(
    head: HeadWorker, tmp_path: Path
) -> None:
    """A shell's usual 1024 would be fewer than the connections that are allowed."""
    program, said = tmp_path / "envoy", tmp_path / "said"
    program.write_text(f"#!/bin/sh\nulimit -Sn > {said}; ulimit -Hn >> {said}\n")
    program.chmod(0o700)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def run() -> None:
        await (await head._execute(program, tmp_path / "log")).wait()

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert said.read_text().split() == [str(hard)] * 2


def test_files_are_as_many_as_the_host_lets_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wanted, if that is there or root may raise it; what is there if not."""
    limits = [100, 1000]

    def change(_: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > 5000:
            raise ValueError("not allowed to raise maximum limit")
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", change)
    for wanted, files, then in (
        (500, 500, [100, 1000]), (9000, 1000, [100, 1000]), (3000, 3000, [100, 3000]),
    ):  # fmt: skip
        assert (_let_open(wanted), limits) == (files, then)


@pytest.mark.parametrize(("files", "alerts"), [(10**6, 0), (3000, 1)])
def test_guard_with_too_few_files_is_an_alert(
    head: HeadWorker, monkeypatch: pytest.MonkeyPatch, files: int, alerts: int
) -> None:
    """Some of those addresses could take the connections of others."""
    monkeypatch.setattr(supervisor, "_let_open", lambda _: files)
    (head.dir.path / "inventory.toml").write_text(
        '[nodes.n1]\naddresses = ["10.0.0.1", "10.0.0.2"]\n'
    )
    head.write_listeners("d")
    found = [r for r in head._queue if r.get("event") == "few_files"]
    assert len(found) == alerts
    if found:
        assert "lower limits.connections" in found[0]["why"]


@pytest.mark.parametrize("admission", ["enforce", "observe"])
def test_quarantined_node_is_in_no_rule(admission: Any) -> None:
    """Observing takes in who is not listed, and not who was put out."""
    inventory = Inventory(
        nodes={"bad": Node(addresses=("10.0.0.7",), quarantined=True)}
    )
    made = Settings(name="c", head_address="10.0.0.1", admission=admission)
    policies = guard._rbac(made, inventory)["rules"]["policies"]
    for role in ("node", "worker"):
        if admission == "enforce":
            assert role not in policies
            continue
        (only,) = policies[role]["principals"]
        (rule,) = only["and_ids"]["ids"][1]["or_ids"]["ids"]
        assert rule["and_ids"]["ids"][1] == {
            "not_id": {"or_ids": {"ids": [guard._who(f"spiffe://c/{role}/bad/.+")]}}
        }


def test_held_calls_are_counted_for_each_caller() -> None:
    """One that has as many as it may is full, others are not, and an end makes room.

    Guards against an end that was read before the beginning, and counted for ever.
    """
    held = Held(2)
    for number in range(2):
        held.began("a", f"a{number}")
        held.began("a", f"a{number}")
    assert (held.full("a"), held.full("b")) == (True, False)
    held.ended("a0")
    assert not held.full("a")
    held.ended("early")
    held.began("a", "early")
    assert not held.full("a")
    held.ended("a1")
    held.ended("a1")
    assert (held._of, held._open) == ({}, {})


POLL = "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriberPoll"


@pytest.mark.parametrize(
    ("uri", "other", "shared"),
    [
        ("driver/a/driver", "driver/a/other", True),
        ("worker/n/1", "worker/n/2", False),
        ("driver/a/driver", "driver/b/driver", False),
    ],
)
def test_caller_with_too_many_held_calls_is_told_to_come_back(
    head: HeadWorker, uri: str, other: str, shared: bool
) -> None:
    """It is refused for now, with the setting's name, and so is nobody else."""
    head._held = Held(2)
    head.access.decide = lambda **_: Decision()  # type: ignore[assignment]

    def ask(who: str, number: int) -> tuple[int, str, float]:
        asked = {"x-request-id": f"{who} {number}", "x-rsb-uri": f"spiffe://c/{who}"}
        return head.answer(POLL, asked, b"")

    assert [ask(uri, number)[0] for number in range(3)] == [200, 200, 429]
    assert "limits.held_calls" in ask(uri, 4)[1]
    assert ask(other, 0)[0] == (429 if shared else 200)
    record = _recorded(head, id=f"{uri} 4", details="ext_authz_denied", grpc=14)
    assert "wait for something already" in record["why"]
    head._logged({"t": "1.0", "method": POLL, "id": f"{uri} 0"})
    assert ask(uri, 5)[0] == 200


def test_nodes_hold_as_many_calls_as_they_need(head: HeadWorker) -> None:
    """Positive control: a node's are not counted."""
    head._held = Held(1)
    head.access.decide = lambda **_: Decision()  # type: ignore[assignment]
    for number in range(3):
        asked = {"x-request-id": str(number), "x-rsb-uri": "spiffe://c/node/n/raylet"}
        assert head.answer(POLL, asked, b"")[0] == 200


def test_call_that_failed_is_not_refused(head: HeadWorker) -> None:
    """Positive control: what the GCS did not find, or took too long for, is a call."""
    for grpc in (0, 2, 4, 5, 14):
        sent = {"details": "via_upstream", "to": "127.0.0.1:1"}
        assert _recorded(head, **sent, http=200, grpc=grpc)["ok"]
        head._queue.clear()


@pytest.mark.parametrize(
    ("details", "why"),
    [
        ("http2.remote_reset", "given up by its caller"),
        ("downstream_remote_disconnect(x)", "given up by its caller"),
        ("something_new", "not let through: something_new"),
        ("", "not let through"),
    ],
)
def test_what_was_not_sent_on_was_not_allowed(
    head: HeadWorker, details: str, why: str
) -> None:
    """Whether or not anybody knows why: no record says that a call got through."""
    record = _recorded(head, details=details)
    assert record["ok"] is False
    assert record["why"].startswith(why)


def _serve(*chunks: bytes) -> tuple[_Worker, bytes]:
    worker: Any = _Worker()
    server, transport = AccessServer(worker), _Transport()
    server.connection_made(transport)  # type: ignore[arg-type]
    for chunk in chunks:
        server.data_received(chunk)
    return worker, transport.written


ASK = b"POST /x HTTP/1.1\r\nx-rsb-uri: u\r\ncontent-length: 3\r\n\r\n"


@given(st.lists(st.integers(0, 200), max_size=6))
def test_questions_are_found_however_they_are_cut(cuts: list[int]) -> None:
    """Three requests on one connection, cut anywhere: each is answered once."""
    data = ASK + b"abc" + ASK + b"bad" + ASK + b"\r\n\r"
    edges = sorted({0, *[min(c, len(data)) for c in cuts], len(data)})
    worker, answers = _serve(*(data[a:b] for a, b in pairwise(edges)))
    assert [body for _, _, body in worker.asked] == [b"abc", b"bad", b"\r\n\r"]
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.count(b"HTTP/1.1 403") == 1


def test_answer_that_waits_is_given_later_and_in_order() -> None:
    """The next question on the connection is not answered before it."""

    async def go() -> tuple[bytes, bytes]:
        worker: Any = _Worker()
        server, transport = AccessServer(worker), _Transport()
        server.connection_made(transport)  # type: ignore[arg-type]
        server.data_received(ASK + b"hmm" + ASK + b"bad")
        at_once = transport.written
        await asyncio.sleep(0.3)
        assert not worker.waiting
        return at_once, transport.written

    at_once, later = asyncio.run(go())
    assert at_once == b""
    assert later.index(b" 200 ") < later.index(b" 403 ")


def test_reason_can_not_split_the_answer() -> None:
    """What a caller named is in the reason; it stays within the body."""
    _, answer = _serve(ASK + b"bad")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"set-cookie" not in head
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    assert int(length[1]) == len(body)


@hypothesis_settings(max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_are_no_answer_or_an_error(chunks: list[bytes]) -> None:
    """No bytes make an answer of 200 that nobody decided.

    asyncio closes the connection of a protocol that raises; Envoy then refuses.
    """
    worker: Any = _Worker()
    server, transport = AccessServer(worker), _Transport()
    server.connection_made(transport)  # type: ignore[arg-type]
    try:
        for chunk in chunks:
            server.data_received(chunk)
    except (ValueError, IndexError):
        pass
    assert transport.written.count(b"HTTP/1.1 200") <= len(worker.asked)


def test_page_is_served_on_loopback() -> None:
    """The page is Prometheus' text format."""
    page = Metrics().page().decode()
    assert 'rsb_alerts_total{alert="unexpected_node"} 0.0' in page
    assert "rsb_audit_writable 1.0" in page


def _start(cluster: ClusterDir) -> subprocess.Popen[bytes]:
    """Start helpers that will end, and return when others find them.

    On a busy machine they may be over before anybody looked: others are started.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until:
        process = subprocess.Popen(
            [sys.executable, "-m", "raysandbox.cluster.supervisor", str(cluster.path)],
            stderr=subprocess.PIPE,
        )
        while process.poll() is None:
            if (cluster.run / "supervisor.pid").exists():
                return process
            assert time.monotonic() < until
            time.sleep(0.001)
        said = process.communicate()[1].decode()
        assert process.returncode == 3, said
    raise AssertionError("nobody found them")


def test_helpers_that_can_not_start_end_whoever_signals_them(tmp_path: Path) -> None:
    """No signal finds them half-way: they say why, and leave no pid behind.

    Who tells them of a change meanwhile has an answer, and waits for nobody.
    """
    cluster = make_cluster(tmp_path / "c")
    (cluster.trust / "root.crl").unlink()
    for change in (False, True):
        process = _start(cluster)
        if change:
            try:
                taken, said = take_up(cluster), ""
            except ClusterError as error:
                # Asked before it ended; it says what it will end of.
                taken, said = False, str(error)
            assert not taken
            assert said == "" or "goes on with what it had" in said
        else:
            while process.poll() is None:
                process.send_signal(signal.SIGHUP)
                time.sleep(0.002)
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 3, said
        assert "certs trust CRL" in said
        assert "Traceback" not in said
        assert not (cluster.run / "supervisor.pid").exists()
