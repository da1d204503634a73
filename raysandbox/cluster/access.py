"""What an identity may do to what: decisions on the content of GCS calls.

The guard has already checked who speaks, from where, and whether the method is
one of its role's. Here the request is parsed, and decided by what it names:

* A job belongs to whom the GCS gave its number (`learn_job`). A worker belongs
  to the first job whose function table it touches, for life: Ray never gives a
  worker to a second job, and a worker fetches its first function before it runs
  a line of it, so the binding is made before user code can choose. When its node
  says that it has ended, or a later session of its machine begins (`sessions`), its
  certificate is nobody's any more.
* Keys of the function table belong to the job in their name. Packages are
  named by their content: the first bytes under a name stay. Any other key
  belongs to the job or identity that wrote it first.
* Actors and placement groups carry their job in their id. A named actor may be
  found and killed from its Ray namespace too; a namespace belongs to those that
  access.toml names, else to the driver identity that made something in it first.
* A node speaks for its own node ids, workers and drivers alone. Who waits for news
  does so under its own name (`subscribers`).
* What a call costs is charged before it is made: bytes sent, bytes that the
  key is known to hold, one place in flight, bytes that stay stored. So a call
  that is abandoned at its deadline has cost its caller what it cost the GCS. What
  is sent is charged as written where the GCS keeps it, else as read. A
  key counts as the larger of what it held and what is written, and as there, until
  the GCS has answered (`writes`).
  Over its limits a caller waits before it is refused (`budget`).

Pure but for the clock: `Access` holds what is known and does no I/O.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from fnmatch import fnmatchcase
from typing import Any

from google.protobuf.message import DecodeError
from ray.core.generated import common_pb2, pubsub_pb2

from raysandbox.cluster import sessions, submission
from raysandbox.cluster.budget import PENALTY_S, Account, OverBudgetError
from raysandbox.cluster.methods import CONTENT, STREAM
from raysandbox.cluster.settings import (
    Access as Grants,
)
from raysandbox.cluster.settings import (
    Inventory,
    Node,
    Settings,
)
from raysandbox.cluster.shapes import flaw, request_types
from raysandbox.cluster.subscribers import Subscribers
from raysandbox.cluster.writes import Write, Writes
from raysandbox.worker.entrypoint import LOG_KEY, LOG_NAMESPACE

__all__ = ["Access", "Decision", "grpc_message", "over_ceiling"]

# Generated modules make their names when they are imported.
_pubsub: Any = pubsub_pb2
_common: Any = common_pb2

FUN, PACKAGE, JOB, USAGE = b"fun", b"gcs://", b"job", b"usage_stats"
# Of submitted jobs: the head's own namespace for what supervises them, and Ray's key
# of a job's state. See `raysandbox.worker.entrypoint` for the key of its log.
SUPERVISORS, STATE = "SUPERVISOR_ACTOR_RAY_NAMESPACE", b"_ray_internal_job_info_"
# Written by Ray's own head and read by everybody who starts.
SHARED = {
    b"", b"session", b"cluster", b"tracing", b"dashboard", b"healthcheck",
    b"__autoscaler",
}  # fmt: skip
JOB_BYTES = 4
# The GCS keeps a key of namespace n as this, n, ":" and the key, and one without a
# namespace as it is (gcs/store_client_kv.cc): one name can be written in two ways.
STORED, STORED_SEPARATOR = b"@namespace_", b":"
# Of a key, a prefix, a namespace, an actor: Ray's own have at most some hundred bytes.
MOST_NAME_BYTES = 4096
# Of a request that asks and carries nothing, and of one that asks for many keys: while
# it is looked into, nobody else is answered.
MOST_ASKED_BYTES, MOST_KEYS = 1 << 20, 10_000
# From here on what is refused costs its bytes: it has been looked into too. But for a
# value, which has nothing in it to look at.
MOST_FREE_BYTES = 4096
# Namespaces of one identity: a job that is given none by its driver has its own.
MOST_NAMESPACES = 1000
# Jobs of one identity that have a number and have not begun.
MOST_NUMBERS = 1000
# What is known by name, and survives a restart.
TABLES = (
    "jobs", "bound", "namespaces", "job_namespace", "job_node", "nodes", "actors",
    "submissions", "added", "workers", "detached", "ended", "finished",
    "constraint", "actor_owner", "over", "submitters", sessions.TABLE,
)  # fmt: skip
# How long a package may be kept for a job that has not begun: Ray's own is 10 minutes.
MOST_PIN_S = 3600
# What a cluster is asked to grow to: bundles of resources, and of each how many.
MOST_BUNDLES, MOST_COUNT = 10_000, 1_000_000
CLUSTER = "cluster"
# Resources that Ray can count: ten thousandths (ray/common/constants.h).
LEAST, MOST = 0.0001, 1e12
# How long what has ended is still known, and how often it is looked for.
PAST_S, LOOK_S = 3600.0, 60.0
MOST_ACCOUNTS = 100_000
# Workers that have ended and whose ids could come again: those of drivers are told
# from their jobs.
MOST_DEAD = 100_000
# Ids of one identity: of a worker, whose programs use its own; of a driver, all of
# whose programs do.
MOST_IDS = {"worker": 16}
MOST_IDS_ELSE = 10_000
# Actors that one worker or driver has made and that may live.
MOST_ACTORS = 10_000
# A worker's last events of tasks come in after its node has said that it has ended.
GRACE_S = 10.0
# How a driver's worker id goes on after its job's (ray/common/id.cc).
DRIVER_ID = b"\xff" * 24
# Keys of one call that the audit log names.
SHOWN = 4
ACTOR_CREATION = _common.ACTOR_CREATION_TASK
SYSTEM = "head/"


#: Namespace and key; owner, bytes and, of a package, digest.
Name = tuple[bytes, bytes]
Entry = tuple[str, int, bytes]


class Decision:
    """Allowed or not, and what the call was about.

    Attributes:
        why: Empty when allowed; else the rule, in words.
        object: What the call names, for the audit log.
        retry: Refused for now: the client should come back.
        alert: Worth waking somebody: a node that must not be here.
        note: What is wrong with a call that is let through and alerted.
        wait_s: How long the answer is to be held back.
    """

    __slots__ = ("alert", "note", "object", "retry", "wait_s", "why")

    def __init__(
        self,
        why: str = "",
        *,
        object: str = "",  # noqa: A002 - the audit log's word
        retry: bool = False,
        alert: bool = False,
        note: str = "",
        wait_s: float = 0.0,
    ) -> None:
        self.why, self.object, self.retry, self.alert = why, object, retry, alert
        self.note, self.wait_s = note, wait_s

    @property
    def allowed(self) -> bool:
        """Whether the call may go on to the GCS."""
        return not self.why


class _RefusedError(Exception):
    def __init__(self, why: str, *, retry: bool = False, alert: bool = False) -> None:
        super().__init__(why)
        self.why, self.retry, self.alert = why, retry, alert


def grpc_message(body: bytes) -> bytes:
    """Return the one message of a unary gRPC request.

    Raises:
        ValueError: It is not exactly one uncompressed message.
    """
    if len(body) < 5:
        raise ValueError("the body is shorter than a gRPC frame")
    if body[0] != 0:
        raise ValueError("a compressed message can't be checked")
    if int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise ValueError("the frame's length is not the body's")
    return body[5:]


def _text(raw: bytes, limit: int = 96) -> str:
    return raw[:limit].decode("utf-8", "backslashreplace")


class Access:
    """Everything known about jobs, nodes, keys and actors, and the decisions.

    Args:
        journal: Called with a plain record for every fact that must survive a
            restart; `replay` takes them back.
    """

    def __init__(
        self,
        settings: Settings,
        inventory: Inventory,
        grants: Grants,
        journal: Callable[[list[Any]], None] = lambda fact: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.inventory, self.grants = settings, inventory, grants
        self._journal, self._clock = journal, clock
        self.jobs: dict[str, str] = {}
        self.bound: dict[str, str] = {}
        self.namespaces: dict[str, str] = {}
        self.job_namespace: dict[str, str] = {}
        self.job_node: dict[str, str] = {}
        self.nodes: dict[str, str] = {}
        self.actors: dict[str, str] = {}
        self.keys: dict[Name, Entry] = {}
        self.submissions: dict[str, str] = {}
        self.submitters: dict[str, str] = {}
        self.workers: dict[str, str] = {}
        self.actor_owner: dict[str, str] = {}
        self.over: dict[str, str] = {}
        self.sessions: dict[str, str] = {}
        self.detached: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        self.finished: dict[str, str] = {}
        self.dead: dict[str, None] = {}
        self.constraint: dict[str, str] = {}
        self.added: dict[str, str] = {}
        self._adding: dict[str, tuple[str, str]] = {}
        self._accounts: dict[str, Account] = {}
        self._open: dict[str, str] = {}
        # What is known by name, the other way round: first come, first in it.
        self._ids: dict[str, dict[str, None]] = {}
        self._owned: dict[str, dict[str, None]] = {}
        # Workers that have just ended, and until when they may still speak.
        self._leaving: dict[str, float] = {}
        self._subscribers = Subscribers(settings.limits.held_calls)
        self._stored: Counter[str] = Counter()
        self._writes: Writes[Name, Entry] = Writes()
        self._ends: dict[tuple[str, str], float] = {}
        self._looked = clock()
        self._kinds = request_types(CONTENT)
        self._rules: dict[str, Callable[[_Call], None]] = _rules(self)

    # -- what becomes known ---------------------------------------------------

    def learn_job(self, uri: str, number: int) -> None:
        """A job's number was given to an identity."""
        job = number.to_bytes(JOB_BYTES, "little").hex()
        self._let_go("finished", job)
        self._fact("jobs", job, _job_owner(uri))

    def learn_added(self, request_id: str) -> None:
        """The GCS has answered an AddJob: it has the job now."""
        if known := self._adding.pop(request_id, None):
            self._fact("added", *known)

    def learn_submitted(self, uri: str, name: str) -> None:
        """A job was submitted by somebody, by way of the dashboard's front."""
        self._fact("submitters", name, _who(uri))

    def may_end(self, uri: str, name: str) -> bool:
        """Whether a submitted job is a driver's to end."""
        return self.submitters.get(name) == _who(uri)

    def replay(self, facts: Iterable[list[Any]]) -> None:
        """Take back what a former process wrote to the journal."""
        for table, *rest in facts:
            if table not in (*TABLES, "keys", "gone", "past"):
                raise ValueError(f"no table {table!r}")
            if table == "keys":
                namespace, key, owner, size, digest = rest
                self._set_key(
                    bytes.fromhex(namespace), bytes.fromhex(key), owner, size,
                    bytes.fromhex(digest),
                )  # fmt: skip
            elif table == "gone":
                self._drop_key(bytes.fromhex(rest[0]), bytes.fromhex(rest[1]))
            elif table == "past":
                if rest[0] not in TABLES:
                    raise ValueError(f"no table {rest[0]!r}")
                getattr(self, rest[0]).pop(rest[1], None)
            else:
                getattr(self, table)[rest[0]] = rest[1]
        for uri in self.over:
            self.bound.pop(uri, None)
        for worker, uri in self.workers.items():
            self._ids.setdefault(uri, {})[worker] = None
        for actor, owner in self.actor_owner.items():
            self._owned.setdefault(owner.partition(":")[0], {})[actor] = None
        self._forget_former()

    def facts(self) -> Iterator[list[Any]]:
        """Yield what `replay` needs to bring this state back."""
        for table in TABLES:
            for key, value in getattr(self, table).items():
                yield [table, key, value]
        for (namespace, key), (owner, size, digest) in self.keys.items():
            yield ["keys", namespace.hex(), key.hex(), owner, size, digest.hex()]

    def call_ended(self, request_id: str, *, done: bool = False) -> None:
        """A call has ended, in whatever way: its place in flight is free.

        Args:
            request_id: Which call.
            done: Whether the GCS has answered that it was done.

        Raises:
            OSError: What became certain could not be written down; it stays as it
                was counted.
        """
        account = self._accounts.get(self._open.pop(request_id, ""))
        if account is not None:
            account.ended(request_id)
        write, certain = self._writes.end(request_id, self._clock(), done=done)
        if write is None:
            return
        for name in certain:
            # What was forgotten or written anew in between is another entry.
            if self.keys.get(name) is not write.before[name]:
                continue
            if write.made is None:
                self._forget(name)
            elif write.made != write.before[name]:
                self._know(name, write.made)

    def _fact(self, table: str, key: str, value: str) -> None:
        known: dict[str, str] = getattr(self, table)
        if known.get(key) != value:
            # In this order: what could not be written down is not known either.
            self._journal([table, key, value])
            known[key] = value

    def _let_go(self, table: str, key: str) -> None:
        known: dict[str, str] = getattr(self, table)
        if key in known:
            self._journal(["past", table, key])
            del known[key]

    def _set_key(
        self, namespace: bytes, key: bytes, owner: str, size: int, digest: bytes
    ) -> None:
        self._drop_key(namespace, key)
        self.keys[namespace, key] = (owner, size, digest)
        self._stored[self._payer(owner)] += size

    def _know(self, name: Name, entry: Entry) -> Entry:
        owner, size, digest = entry
        self._journal(["keys", name[0].hex(), name[1].hex(), owner, size, digest.hex()])
        self._set_key(*name, owner, size, digest)
        return self.keys[name]

    def _drop_key(self, namespace: bytes, key: bytes) -> None:
        known = self.keys.pop((namespace, key), None)
        if known:
            self._stored[self._payer(known[0])] -= known[1]

    def forget(
        self, present: Mapping[bytes, Set[bytes]], absent: Mapping[Name, Entry]
    ) -> dict[Name, Entry]:
        """Forget keys that the GCS has removed by itself, with the job that had them.

        A key that was written in between is another entry, and stays.

        Args:
            present: Namespace to the keys that the GCS has in it.
            absent: What this returned a while ago.

        Returns:
            What is not there: to be forgotten if it still isn't next time.
        """
        missing = {
            name: entry
            for name, entry in self.keys.items()
            if name[0] in present and name[1] not in present[name[0]]
        }
        gone = [name for name, entry in missing.items() if absent.get(name) is entry]
        for name in gone:
            self._forget(name)
            del missing[name]
        return missing

    def let_past_go(self, alive: Set[str]) -> None:
        """Forget jobs, nodes and submissions that ended `PAST_S` seconds ago.

        Not those that something may still be of: keys, detached actors. Of a job
        that is forgotten, nobody has anything any more; nor of a node. That a worker
        has ended stays known while its session runs.

        Args:
            alive: Ids of the nodes that the GCS holds alive.

        Raises:
            OSError: It could not be written down; what is left goes next time.
        """
        now = self._clock()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        self._let_leave()
        owners = {owner for owner, _, _ in self.keys.values()}
        past = {
            ("jobs", job)
            for job in self.jobs
            # A number that was given to somebody who never began is none either.
            if (job in self.finished or job not in self.job_node)
            and job not in self.detached
            and job not in owners
        }
        past |= {("nodes", node_id) for node_id in self.nodes.keys() - alive}
        past |= {
            ("submissions", name)
            for name, uri in self.submissions.items()
            if uri in self.ended and (JOB, bytes.fromhex(name)) not in self.keys
        }
        past |= {
            ("submitters", name)
            for name in self.submitters
            if (JOB, STATE + name.encode()) not in self.keys
        }
        self._ends = {each: self._ends.get(each, now) for each in past}
        gone = [each for each, since in self._ends.items() if now - since >= PAST_S]
        jobs = {key for table, key in gone if table == "jobs"}
        for actor in [a for a in self.actors if a[-2 * JOB_BYTES :] in jobs]:
            self._let_go("actors", actor)
        for actor in [a for a in self.actor_owner if a[-2 * JOB_BYTES :] in jobs]:
            self._disown(actor)
        for table, key in gone:
            if table == "jobs":
                for other in ("job_namespace", "job_node", "added", "finished"):
                    self._let_go(other, key)
            self._let_go(table, key)
            del self._ends[table, key]

    def orphans(self) -> list[Name]:
        """Return keys that nobody can own any more.

        Those of a submitted job belong to its supervisor, whose identity ended with
        it. What the job's detached actors may still need stays, and packages, which
        others may use by the same name: Ray counts these itself.
        """
        return [
            name
            for name, (owner, _, digest) in self.keys.items()
            if self.jobs.get(owner, owner) in self.ended
            and not (owner in self.jobs and owner in self.detached)
            and not digest
        ]

    def _forget(self, name: Name) -> None:
        self._journal(["gone", name[0].hex(), name[1].hex()])
        self._drop_key(*name)

    def _payer(self, owner: str) -> str:
        """Return the identity that pays for what a job or identity stores."""
        owner = self.jobs.get(owner, owner)
        return _who(owner) if owner.startswith("spiffe://") else owner

    # -- decisions ------------------------------------------------------------

    def decide(
        self,
        *,
        uri: str,
        method: str,
        body: bytes,
        request_id: str = "",
        node_id: str = "",
        source: str = "",
    ) -> Decision:
        """Decide one call; never raises for anything that a caller can send."""
        call = _Call(uri, method, body, request_id, node_id, source)
        about, wait_s = "", 0.0
        try:
            now = self._clock()
            if call.role not in self.settings.limits.roles:
                raise _RefusedError("the caller has no role")
            # A refused call counts too.
            account = self._account(call)
            wait_s = account.count(now)
            if call.role == "worker":
                self._check_lives(call)
            if method != STREAM:
                if len(body) > MOST_ASKED_BYTES and method not in BULKY:
                    raise _RefusedError(
                        f"a request of {len(body)} bytes; one of "
                        f"{method.rpartition('/')[2]} has at most {MOST_ASKED_BYTES}"
                    )
                if len(body) >= MOST_FREE_BYTES and method != _KV + "Put":
                    call.holds = account
                    account.hold(now, len(body))
                kind = self._kinds.get(method)
                if kind is None:
                    raise _RefusedError(f"{method} is not one that the guard knows")
                try:
                    call.ask = kind.FromString(grpc_message(body))
                except (ValueError, DecodeError) as error:
                    raise _RefusedError(f"malformed request: {error}") from None
                if problem := flaw(call.ask, len(body)):
                    raise _RefusedError(f"malformed request: {problem}")
            about = call.about()
            self._rules.get(method, self.shape_only)(call)
            self._charge(call)
        except (_RefusedError, OverBudgetError) as refused:
            return Decision(
                refused.why, object=about, retry=refused.retry,
                alert=getattr(refused, "alert", False), wait_s=max(wait_s, PENALTY_S),
            )  # fmt: skip
        return Decision(
            object=about, alert=bool(call.note), note=call.note,
            wait_s=max(wait_s, call.wait_s),
        )  # fmt: skip

    def _check_lives(self, call: _Call) -> None:
        """Refuse a worker that has ended: somebody else has its certificate."""
        session = sessions.of(call.uri)
        if session is None:
            raise _RefusedError("the worker's identity names no session", alert=True)
        machine, began = session
        newest = self.sessions.get(machine, "")
        self._let_leave()
        if (call.uri in self.over and call.uri not in self._leaving) or began < newest:
            raise _RefusedError("the worker has ended")
        if began > newest:
            self._fact(sessions.TABLE, machine, began)
            self._forget_former()

    def _forget_former(self) -> None:
        """Forget workers of former sessions: that a new one began says it for all."""
        for uri in {*self.bound, *self.over, *self._ids}:
            machine, began = sessions.of(uri) or ("", "")
            if began >= self.sessions.get(machine, ""):
                continue
            for worker in self._ids.pop(uri, ()):
                for actor in self._owned.pop(worker, ()):
                    del self.actor_owner[actor]
                del self.workers[worker]
            for table in (self.bound, self.over, self._leaving):
                table.pop(uri, None)

    def _let_leave(self) -> None:
        """Forget what those were bound to who have had their time."""
        while self._leaving:
            uri, until = next(iter(self._leaving.items()))
            if self._clock() < until:
                return
            self._let_go("bound", uri)
            del self._leaving[uri]

    def _account(self, call: _Call) -> Account:
        """Return who pays: a worker's calls are its job's owner's.

        All workers of one owner have one account, beside the driver's own: a job
        does not get more of the GCS by having more workers.
        """
        name = call.who
        if call.role == "worker":
            owner = self._owner(call) or call.uri
            name = f"workers of {owner}"
        found = self._accounts.get(name)
        if found is None:
            if len(self._accounts) >= MOST_ACCOUNTS:
                self._accounts.clear()
            limit = self.settings.limits.roles[call.role]  # type: ignore[index]
            found = self._accounts[name] = Account(limit, self._clock())
        call.account = name
        return found

    def _charge(self, call: _Call) -> None:
        """Charge for a call's bytes, once."""
        if not call.charge:
            return
        call.charge = False
        account = self._account(call)
        if call.holds:
            call.holds.give_back()
        call.wait_s = account.charge(
            self._clock(), call.reads, call.writes, call.request_id, call.events
        )
        if call.request_id in account.flight:
            self._open[call.request_id] = call.account

    # -- rules ----------------------------------------------------------------

    def _owner(self, call: _Call) -> str:
        """Return whom the caller acts for: a driver, or its job's owner.

        The head's own job is that of the supervisors of submitted jobs. Each of
        them runs a user's program beside it, so it acts for itself alone.
        """
        if call.role != "worker":
            return call.who
        if self._supervises(call):
            return call.uri
        return self.jobs.get(self.bound.get(call.uri, ""), "")

    def _supervises(self, call: _Call) -> bool:
        """Whether the caller is a worker of the head's own job."""
        return call.role == "worker" and self._is_supervisor(call.uri)

    def _is_supervisor(self, uri: str) -> bool:
        return self.jobs.get(self.bound.get(uri, ""), "").startswith(SYSTEM)

    def _bind(self, call: _Call, job: str) -> None:
        """Refuse a job that is not the caller's; bind a worker that has none."""
        if call.role == "head":
            return
        owner = self.jobs.get(job)
        if call.role == "worker":
            if owner == call.uri:
                return
            bound = self.bound.get(call.uri)
            if bound is None and owner is not None:
                self._fact("bound", call.uri, job)
                return
            if bound == job:
                return
            raise _RefusedError(
                f"job {job} is not this worker's job {bound or '(none)'}"
            )
        if owner != call.who:
            raise _RefusedError(f"job {job} is not a job of {call.who}")

    def _is_of_head(self, call: _Call, job: str) -> bool:
        """Whether a job is the head's, and the caller isn't."""
        return call.role != "head" and self.jobs.get(job, "").startswith(SYSTEM)

    def _same_owner(self, call: _Call, job: str) -> bool:
        if call.role == "head":
            return True
        owner = self.jobs.get(job)
        if owner is None:
            return False
        return owner in (self._owner(call), call.uri)

    def _may_use(self, call: _Call, namespace: str) -> bool:
        if call.role in ("head", "operator"):
            return True
        if namespace == SUPERVISORS:
            return False
        owner = self._owner(call)
        holder = self.namespaces.get(namespace)
        if holder is not None and holder in (owner, call.uri):
            return True
        granted = self._granted(namespace)
        if owner in granted:
            return True
        # Nobody has made anything in it, and nobody else is to.
        return holder is None and bool(owner) and not any(granted.values())

    def _granted(self, namespace: str) -> dict[str, bool]:
        """Return those that access.toml grants it to, and whether to them alone.

        Who is granted every namespace has none reserved.
        """
        found: dict[str, bool] = {}
        for name, grant in self.grants.drivers.items():
            globs = [g for g in grant.namespaces if fnmatchcase(namespace, g)]
            if globs:
                found[f"driver/{name}"] = any(set(glob) - {"*"} for glob in globs)
        return found

    def _hold(self, namespace: str, owner: str) -> None:
        """Something is made in a namespace: from now on it is its maker's.

        Those that access.toml grants share theirs.
        """
        if namespace in self.namespaces or any(self._granted(namespace).values()):
            return
        mine = [name for name, holder in self.namespaces.items() if holder == owner]
        if len(mine) >= MOST_NAMESPACES:
            idle = set(mine) - self._in_use()
            if not idle:
                raise _RefusedError(
                    f"{owner} has {MOST_NAMESPACES} namespaces in use; end jobs or "
                    "detached actors in some of them"
                )
            self._let_go("namespaces", next(name for name in mine if name in idle))
        self._fact("namespaces", namespace, owner)

    def _in_use(self) -> set[str]:
        """Return the namespaces in which something may live."""

        def lives(job: str) -> bool:
            return job not in self.finished or job in self.detached

        jobs = {name for job, name in self.job_namespace.items() if lives(job)}
        actors = {
            name for actor, name in self.actors.items()
            if lives(actor[-2 * JOB_BYTES :])
        }  # fmt: skip
        return jobs | actors

    def _own_node(self, call: _Call, node_id: str) -> None:
        if self.nodes.get(node_id) != call.who:
            raise _RefusedError(f"node {node_id[:16]} is not {call.who}", alert=True)

    def kv(self, call: _Call) -> None:
        """Keys: reads, lists, writes and deletions."""
        ask: Any = call.ask
        namespace = bytes(ask.namespace)
        write = call.method.endswith(("Put", "Del"))
        if call.method.endswith("Keys"):
            _check_name(namespace, ask.prefix, prefix=True)
            self._list_keys(call, namespace, bytes(ask.prefix))
            return
        many = call.method.endswith("MultiGet")
        if many and len(ask.keys) > MOST_KEYS:
            raise _RefusedError(
                f"{len(ask.keys)} keys at once; at most {MOST_KEYS} can be asked for"
            )
        for key in ask.keys if many else [ask.key]:
            _check_name(namespace, key, prefix=getattr(ask, "del_by_prefix", False))
            if namespace == FUN:
                self._bind(call, _job_of_key(key))
                # The next supervisor would run what this one put there.
                if write and self._is_of_head(call, _job_of_key(key)):
                    raise _RefusedError("the head's functions are its own")
            elif write:
                self._write_key(call, namespace, key)
            else:
                self._read_key(call, namespace, key)
            if not write and not call.method.endswith("Exists"):
                call.reads += self.keys.get((namespace, key), ("", 0, b""))[1]
        if write:
            self._keep(call, namespace, ask)

    def _list_keys(self, call: _Call, namespace: bytes, prefix: bytes) -> None:
        # What the answer holds, which nobody's values are in.
        call.reads += sum(
            len(key)
            for space, key in self.keys
            if space == namespace and key.startswith(prefix)
        )
        if call.role in ("head", "operator") or namespace in SHARED - {b""}:
            return
        if namespace == FUN:
            self._bind(call, _job_of_key(prefix))
            return
        for (space, key), (owner, _, _) in self.keys.items():
            if space != namespace or not key.startswith(prefix):
                continue
            if not self._owns(call, owner):
                raise _RefusedError(f"keys of another owner under {_text(prefix)!r}")

    def _owns(self, call: _Call, owner: str) -> bool:
        if owner in (call.who, call.uri):
            return True
        if owner == self.bound.get(call.uri):
            return not self._supervises(call)
        return owner in self.jobs and self._same_owner(call, owner)

    def _read_key(self, call: _Call, namespace: bytes, key: bytes) -> None:
        if call.role in ("head", "node", "operator") or namespace in SHARED - {b""}:
            return
        if namespace == b"":
            self._read_default(call, key)
            return
        if call.role == "observer":
            raise _RefusedError(f"namespace {_text(namespace)!r} is not for observers")
        if namespace == JOB and call.role == "worker":
            self._submission(call, key)
            return
        known = self.keys.get((namespace, key))
        if known and not self._owns(call, known[0]):
            raise _RefusedError(f"the key belongs to {known[0]}")

    def _read_default(self, call: _Call, key: bytes) -> None:
        """Without a namespace: what Ray's head and nodes keep there, and one's own.

        A driver asks whether a package is there before it uploads it. What is in
        it, nodes read for the jobs that they run.
        """
        known = self.keys.get((b"", key))
        if known is None or known[0] == self._owner(call):
            return
        if self._owns(call, known[0]):
            return
        if key.startswith(PACKAGE):
            if call.method.endswith("Exists"):
                return
        elif known[0].startswith((SYSTEM, "node/")):
            return
        raise _RefusedError(f"the key belongs to {known[0]}")

    def _write_key(self, call: _Call, namespace: bytes, key: bytes) -> None:
        known = self.keys.get((namespace, key))
        if namespace == b"" and key.startswith(PACKAGE):
            # Of whomever: what the dashboard is sent, the head writes.
            value = getattr(call.ask, "value", None)
            if value is None and call.role != "head":
                raise _RefusedError("packages are deleted by the head alone")
            if value is not None and self._is_other(known, value):
                raise _RefusedError("a package of that name has another content")
            return
        if call.role == "head":
            name = JOB, key
            gone = name not in self.keys or self._writes.is_deleted(name)
            if namespace == JOB and gone:
                # A job under a name that another had, whose supervisor may live on.
                if before := self.submissions.get(key.hex()):
                    self._fact("ended", before, call.who)
                self._fact("submissions", key.hex(), "")
            return
        if call.role == "node":
            if namespace == b"dashboard" or key.startswith(b"DASHBOARD_AGENT"):
                if known and known[0] != call.who:
                    raise _RefusedError(f"the key belongs to {known[0]}")
                return
            if namespace == USAGE or key.startswith(b"extra_usage_tag"):
                return
            raise _RefusedError("a node writes its agent's address alone", alert=True)
        if namespace == JOB:
            self._submission(call, key)
            if (value := getattr(call.ask, "value", None)) is None:
                raise _RefusedError("a submitted job is deleted by the head alone")
            if problem := submission.flaw(value, self._is_heads_address):
                raise _RefusedError(f"malformed state of a submitted job: {problem}")
            return
        if namespace == LOG_NAMESPACE:
            self._log_of(call, key)
            return
        if namespace == USAGE and not getattr(call.ask, "value", b"-"):
            # Sets of names, an empty value each: nothing to write over.
            return
        if namespace in SHARED and (known is None or known[0].startswith(SYSTEM)):
            if namespace != b"" or known is not None or _reserved(key):
                raise _RefusedError("the key is Ray's own")
            return
        if known and not self._owns(call, known[0]):
            raise _RefusedError(
                f"the key belongs to {known[0]}",
                retry=self._writes.is_deleted((namespace, key)),
            )

    @staticmethod
    def _is_other(known: Entry | None, package: bytes) -> bool:
        return known is not None and known[2] != hashlib.sha256(package).digest()

    def _submission(self, call: _Call, key: bytes) -> None:
        """A submitted job's state: for the one worker that supervises it."""
        name = key.hex()
        if not self._supervises(call):
            raise _RefusedError("a submitted job's state is Ray's own")
        if call.uri in self.ended:
            raise _RefusedError("the submitted job has ended")
        holder = self.submissions.get(name)
        mine = [key for key, uri in self.submissions.items() if uri == call.uri]
        if holder not in (None, "", call.uri) or mine not in ([], [name]):
            raise _RefusedError("another worker supervises that job")
        self._fact("submissions", name, call.uri)

    def _log_of(self, call: _Call, key: bytes) -> None:
        """Where a submitted job's output is: in the log of its own supervisor."""
        prefix, _, job = key.rpartition(b":")
        if prefix + b":" != LOG_KEY.partition("{")[0].encode():
            raise _RefusedError("the namespace is raysandbox's own")
        self._submission(call, STATE + job)
        log = bytes(getattr(call.ask, "value", b"")).split(b"-")
        worker = log[1].decode("ascii", "replace") if len(log) > 2 else ""
        if self.workers.get(worker) != call.uri:
            raise _RefusedError("the log is not the supervisor's")

    def _is_heads_address(self, address: str) -> bool:
        return any(
            n.head and n.has_address(address) for n in self.inventory.nodes.values()
        )

    def _keep(self, call: _Call, namespace: bytes, ask: Any) -> None:
        """Remember who wrote what, and charge for it."""
        key = bytes(ask.key)
        if call.method.endswith("Del"):
            names = [(namespace, key)]
            if ask.del_by_prefix:
                names = [
                    n for n in self.keys if n[0] == namespace and n[1].startswith(key)
                ]
                for name in names:
                    if call.role != "head" and not self._owns(call, self.keys[name][0]):
                        raise _RefusedError(
                            f"keys of another owner under {_text(key)!r}"
                        )
            before = {name: self.keys[name] for name in names if name in self.keys}
            self._charge(call)
            self._begin(call, before, None)
            return
        size = len(ask.key) + len(ask.value)
        call.reads, call.writes = 0, size
        known = self.keys.get((namespace, key))
        # Which of the two it will be, the GCS knows.
        most = max(size, known[1] if known else 0)
        owner = known[0] if known else self._new_owner(call, namespace, key)
        payer = self._payer(owner)
        limit = self.settings.limits.roles[call.role]  # type: ignore[index]
        grows = most - (known[1] if known else 0)
        if self._stored[payer] + grows > limit.stored_bytes:
            raise _RefusedError(
                f"keys of {payer} would hold more than {limit.stored_bytes} bytes "
                f"(limits.roles.{call.role}.stored_bytes)",
                retry=self._writes.deletes(payer),
            )
        self._charge(call)
        digest = hashlib.sha256(ask.value).digest() if key.startswith(PACKAGE) else b""
        entry = self._know((namespace, key), (owner, most, digest))
        # A write that may have left the old value says nothing of the size.
        made = (owner, size if ask.overwrite else most, digest)
        self._begin(call, {(namespace, key): entry}, made)

    def _begin(
        self, call: _Call, before: dict[Name, Entry], made: Entry | None
    ) -> None:
        """A write is on its way: what it makes of the keys is not certain yet."""
        who = next((self._payer(owner) for owner, _, _ in before.values()), "")
        write = Write(who, before, made)
        self._writes.begin(call.request_id, self._clock(), write)

    def _new_owner(self, call: _Call, namespace: bytes, key: bytes) -> str:
        if namespace == FUN:
            return _job_of_key(key)
        if call.role == "worker" and not self._supervises(call):
            return self.bound.get(call.uri, call.uri)
        return call.uri if call.role == "worker" else call.who

    def named_actor(self, call: _Call) -> None:
        """Named actors are found in the caller's own namespaces."""
        ask: Any = call.ask
        if getattr(ask, "all_namespaces", False):
            if call.role not in ("head", "operator"):
                raise _RefusedError("named actors of all namespaces are for operators")
            return
        self._check_namespace(call, ask.ray_namespace)

    def _check_namespace(self, call: _Call, namespace: str, name: str = "") -> None:
        _check_length(namespace)
        _check_length(name)
        if not self._may_use(call, namespace):
            raise _RefusedError(f"namespace {namespace!r} is another driver's")

    def actor_by_id(self, call: _Call) -> None:
        """Kill, restart, end of scope: by the actor's job, or its namespace."""
        actor = call.ask.actor_id.hex()
        job = actor[-2 * JOB_BYTES :]
        if self._same_owner(call, job):
            return
        namespace = self.actors.get(actor)
        if (
            call.method.endswith("KillActorViaGcs")
            and namespace is not None
            and self._may_use(call, namespace)
        ):
            return
        raise _RefusedError(f"actor {actor[:16]} belongs to job {job}")

    def look_at_actor(self, call: _Call) -> None:
        """Where an actor is: for those of its job's owner, or of its namespace."""
        if call.ask.actor_id:
            self._check_seen(call, call.ask.actor_id)

    def list_actors(self, call: _Call) -> None:
        """Drivers list their own actors, by job or one by one."""
        wanted = call.ask.filters
        if call.role != "driver":
            return
        if wanted.actor_id:
            self._check_seen(call, wanted.actor_id)
        elif not self._same_owner(call, wanted.job_id.hex()):
            raise _RefusedError("a driver lists the actors of one of its own jobs")

    def poll(self, call: _Call) -> None:
        """News are for who asked for them, under its own name."""
        identifier, now = bytes(call.ask.subscriber_id), self._clock()
        if not identifier:
            raise _RefusedError("malformed request: a subscriber without an id")
        name = identifier.hex()
        known = True
        if name in self.workers:
            mine = self.workers[name] == call.uri
        elif name in self.nodes:
            mine = self.nodes[name] == call.who
        elif identifier.endswith(DRIVER_ID):
            mine = self._same_owner(call, identifier[:JOB_BYTES].hex())
        else:
            known = False
            mine = self._subscribers.whose(name, now) in ("", call.uri)
        if not mine:
            raise _RefusedError(f"subscriber {name[:16]} is another's")
        # What is known is counted where it is known.
        if not known and (
            why := self._subscribers.use(call.account, call.uri, name, now)
        ):
            raise _RefusedError(why, retry=True)

    def subscribe(self, call: _Call) -> None:
        """What is told of an actor is where it is."""
        self.poll(call)
        for command in call.ask.commands:
            if command.channel_type == ACTOR_CHANNEL and not command.HasField(
                "unsubscribe_message"
            ):
                self._check_seen(call, command.key_id)

    def _check_seen(self, call: _Call, actor_id: bytes) -> None:
        if call.role not in ("driver", "worker"):
            return
        actor = actor_id.hex()
        job = actor[-2 * JOB_BYTES :]
        namespace = self.actors.get(actor)
        if self._same_owner(call, job) or (
            namespace is not None and self._may_use(call, namespace)
        ):
            return
        # A worker that has no job yet has it in a moment.
        raise _RefusedError(
            f"actor {actor[:16]} belongs to job {job}",
            retry=call.role == "worker" and call.uri not in self.bound,
        )

    def out_of_scope(self, call: _Call) -> None:
        """Its owner alone ends an actor so, and while it lives: the GCS aborts else."""
        self.actor_by_id(call)
        owner = self.actor_owner.get(call.ask.actor_id.hex(), "")
        worker, _, node = owner.partition(":")
        if self.workers.get(worker) != call.uri or node in self.dead:
            raise _RefusedError("the actor's owner is not the caller, or has ended")

    def new_actor(self, call: _Call) -> None:
        """An actor is made for the caller's own job, in its own namespace."""
        spec = call.ask.task_spec
        call.stores()
        job = spec.job_id.hex()
        if call.role == "worker":
            self._bind(call, job)
        elif not self._same_owner(call, job):
            raise _RefusedError(f"job {job} is not a job of {call.who}")
        if self._is_of_head(call, job):
            raise _RefusedError("actors of the head's job are made by the head")
        # The GCS aborts on a task of another kind, on an owner without an id, without
        # a namespace, and on a job that it does not have yet.
        if spec.type != ACTOR_CREATION:
            raise _RefusedError("the task is not one that makes an actor")
        owner = spec.caller_address
        if call.role != "head" and self.workers.get(owner.worker_id.hex()) != call.uri:
            raise _RefusedError("the actor's owner is not the caller")
        if not (owner.worker_id and owner.node_id):
            raise _RefusedError("the actor has no owner")
        self._added(job)
        made = spec.actor_creation_task_spec
        if not made.ray_namespace:
            raise _RefusedError("the actor has no namespace")
        if made.actor_id.hex()[-2 * JOB_BYTES :] != job:
            raise _RefusedError("the actor's id names another job")
        if made.name:
            self._check_namespace(call, made.ray_namespace, made.name)
        # What follows is kept, by the GCS and here.
        self._charge(call)
        if made.name and call.role != "head":
            self._hold(made.ray_namespace, self._owner(call))
        if made.is_detached:
            self._fact("detached", job, made.actor_id.hex())
        self._own(made.actor_id.hex(), owner.worker_id.hex(), owner.node_id.hex())
        if made.name:
            self._fact("actors", made.actor_id.hex(), made.ray_namespace)

    def _own(self, actor: str, worker: str, node: str) -> None:
        """An actor is somebody's; the oldest of too many is let go.

        That one stays until its job ends: nobody may say that it is out of scope.
        """
        self._fact("actor_owner", actor, f"{worker}:{node}")
        mine = self._owned.setdefault(worker, {})
        mine[actor] = None
        if len(mine) > MOST_ACTORS:
            self._disown(next(iter(mine)))

    def _disown(self, actor: str) -> None:
        worker = self.actor_owner.get(actor, "").partition(":")[0]
        self._let_go("actor_owner", actor)
        mine = self._owned.get(worker, {})
        mine.pop(actor, None)
        if not mine:
            self._owned.pop(worker, None)

    def _added(self, job: str) -> None:
        if job not in self.added:
            raise _RefusedError(f"job {job} has not begun", retry=True)

    def _check_bundles(self, spec: Any) -> None:
        """Refuse a group that the GCS could not place and would abort on."""
        if not spec.bundles:
            raise _RefusedError("the placement group has no bundles")
        for index, bundle in enumerate(spec.bundles):
            amounts = list(bundle.unit_resources.values())
            if not amounts or not all(LEAST <= a <= MOST for a in amounts):
                raise _RefusedError("a bundle asks for nothing, or for no amount")
            if bundle.node_id or bundle.bundle_id.bundle_index != index:
                raise _RefusedError("a new bundle has a place already")
            if bundle.bundle_id.placement_group_id != spec.placement_group_id:
                raise _RefusedError("a bundle is of another group")

    def placement_group(self, call: _Call) -> None:
        """Placement groups are made and removed by their job's owner."""
        ask: Any = call.ask
        if call.method.endswith("GetNamedPlacementGroup"):
            self._check_namespace(call, ask.ray_namespace)
            return
        if call.method.endswith("CreatePlacementGroup"):
            spec = ask.placement_group_spec
            if spec.creator_job_id != spec.placement_group_id[-JOB_BYTES:]:
                raise _RefusedError("the placement group's id names another job")
            job = spec.creator_job_id.hex()
            call.stores()
            self._added(job)
            self._check_bundles(spec)
        else:
            job = ask.placement_group_id[-JOB_BYTES:].hex()
        if not self._same_owner(call, job):
            raise _RefusedError(f"the placement group belongs to job {job}")

    def shape_only(self, call: _Call) -> None:
        """What is well-formed may be asked, and stores nothing for long."""

    def task_events(self, call: _Call) -> None:
        """Events of tasks that are named: the GCS aborts on one that is not."""
        data = call.ask.data
        for item in (*data.events_by_task, *data.dropped_task_attempts):
            if not item.task_id:
                raise _RefusedError("malformed request: an event of no task")
        # The GCS keeps the last hundred thousand of them, however large.
        call.reads, call.events = 0, call.body_bytes

    def publish(self, call: _Call) -> None:
        """Errors and, from nodes, logs and usage: the GCS crashes on others."""
        ask: Any = call.ask
        for message in ask.pub_messages:
            if message.sequence_id:
                raise _RefusedError("malformed request: sequence_id is the GCS's")
            inner = message.WhichOneof("inner_message")
            channel = message.channel_type
            if (channel, inner) == (ERROR_CHANNEL, "error_info_message"):
                continue
            if (channel, inner) in NODE_CHANNELS and call.role in ("head", "node"):
                continue
            raise _RefusedError(f"{call.role} may not publish {inner} on {channel}")

    def pin(self, call: _Call) -> None:
        """A package is kept for a while, for a job that is about to begin."""
        ask: Any = call.ask
        _check_length(ask.uri)
        if not 0 < ask.expiration_s <= MOST_PIN_S:
            raise _RefusedError(
                f"a package is kept for 1 to {MOST_PIN_S} seconds, not for "
                f"{ask.expiration_s}: see RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_"
                "EXPIRATION_S"
            )
        # By a name that only a package has: the GCS keeps whatever else is named.
        if not ask.uri.encode().startswith(PACKAGE):
            raise _RefusedError(f"{ask.uri[:96]!r} is no package in the GCS")
        call.stores()

    def constrain(self, call: _Call) -> None:
        """What the autoscaler is to make room for: one request for the whole cluster.

        Ray takes the last one. So it is whose it was until that one has no jobs any
        more, or asks for nothing.
        """
        asked = call.ask.cluster_resource_constraint.resource_requests
        if len(asked) > MOST_BUNDLES or any(
            not 0 <= each.count <= MOST_COUNT
            or not all(0 <= a <= MOST for a in each.request.resources_bundle.values())
            for each in asked
        ):
            raise _RefusedError(
                f"more than {MOST_BUNDLES} kinds of bundles, {MOST_COUNT} of one, or "
                "an amount that is none"
            )
        owner = self._owner(call) or call.uri
        holder = self.constraint.get(CLUSTER, "")
        if call.role != "head" and holder not in ("", owner) and self._works(holder):
            raise _RefusedError(
                f"{holder} has asked the autoscaler for resources; there is one "
                "request for the whole cluster: ask again when its jobs have ended"
            )
        call.stores()
        self._charge(call)
        self._fact("constraint", CLUSTER, owner if len(asked) else "")

    def _works(self, owner: str) -> bool:
        """Whether an identity has a job that has not ended."""
        return any(
            self.jobs.get(job) == owner
            for job in self.added
            if job not in self.finished
        )

    def stored(self, call: _Call) -> None:
        """What the GCS keeps, by those who are trusted with it."""
        call.stores()

    def next_job(self, call: _Call) -> None:
        """A number is remembered, and so is that it was not used."""
        owner = _job_owner(call.uri)
        waiting = sum(
            who == owner and job not in self.job_node for job, who in self.jobs.items()
        )
        if waiting >= MOST_NUMBERS:
            raise _RefusedError(
                f"{owner} has {waiting} numbers of jobs that have not begun; they are "
                f"forgotten {PAST_S / 60:g} minutes after they were given"
            )

    def add_job(self, call: _Call) -> None:
        """A node registers the jobs of the drivers that run on it."""
        data = call.ask.data
        job = data.job_id.hex()
        owner = self.jobs.get(job)
        if owner is None:
            raise _RefusedError(f"job {job} was not given to anybody", alert=True)
        self._own_node(call, data.driver_address.node_id.hex())
        # The GCS asks each job's driver when somebody asks for all jobs, and aborts.
        if not data.driver_address.worker_id:
            raise _RefusedError("malformed request: a job without a driver", alert=True)
        if self.job_node.get(job, call.who) != call.who:
            raise _RefusedError(f"job {job} was added by {self.job_node[job]}")
        namespace = data.config.ray_namespace
        _check_length(namespace)
        call.stores()
        self._charge(call)
        self._adding[call.request_id] = job, call.who
        self._fact("job_node", job, call.who)
        self._fact("job_namespace", job, namespace)
        self._let_go("finished", job)
        if namespace and namespace != SUPERVISORS:
            self._hold(namespace, owner)

    def finish_job(self, call: _Call) -> None:
        """A node ends the jobs that it added."""
        job = call.ask.job_id.hex()
        if self.job_node.get(job) != call.who:
            raise _RefusedError(f"job {job} was not added by {call.who}")
        self._fact("finished", job, call.who)

    def worker_info(self, call: _Call) -> None:
        """Workers report themselves, nodes their own workers' ends."""
        ask: Any = call.ask
        if call.method.endswith("ReportWorkerFailure"):
            data = ask.worker_failure
        else:
            data = ask.worker_data
            # It stays in the GCS, and here.
            call.stores()
            worker = data.worker_address.worker_id.hex()
            if not worker:
                raise _RefusedError("malformed request: a worker without an id")
            self._check_id(call, bytes(data.worker_address.worker_id))
            self._charge(call)
            self._fact("workers", worker, call.uri)
            self._ids.setdefault(call.uri, {})[worker] = None
            self._subscribers.drop(worker)
            if call.role == "driver":
                return
        node = self.nodes.get(data.worker_address.node_id.hex(), "")
        if node.partition("/")[2] != call.who.partition("/")[2]:
            raise _RefusedError("the worker is not of this node")
        if call.method.endswith("ReportWorkerFailure"):
            self._worker_ended(call, data.worker_address.worker_id)

    def _check_id(self, call: _Call, identifier: bytes) -> None:
        """Refuse a worker id that is not the caller's to have."""
        worker = identifier.hex()
        if worker in self.dead or call.uri in self.over:
            raise _RefusedError("the worker has ended")
        if self.workers.get(worker, call.uri) != call.uri:
            raise _RefusedError("the worker id is another worker's")
        # As long as a node's, and whose it is may hear what is told to it.
        whose = self._subscribers.whose(worker, self._clock())
        if worker in self.nodes or whose not in ("", call.uri):
            raise _RefusedError("the worker id is another's")
        if identifier.endswith(DRIVER_ID):
            job = identifier[:JOB_BYTES].hex()
            if not self._same_owner(call, job) or job in self.finished:
                raise _RefusedError(f"job {job} is not the caller's, or has ended")
        mine = self._ids.get(call.uri, {})
        most = MOST_IDS.get(call.role, MOST_IDS_ELSE)
        if worker not in mine and len(mine) >= most:
            raise _RefusedError(f"{most} worker ids of this identity have not ended")

    def _worker_ended(self, call: _Call, identifier: bytes) -> None:
        """A worker's end, by its node: its identity ends with its first id.

        Programs that it started, and ids that never were anybody's, come after that.
        """
        worker = identifier.hex()
        uri = self.workers.get(worker, "")
        role, _, name = _who(uri).partition("/")
        if role == "worker" and name != call.who.partition("/")[2]:
            raise _RefusedError("the worker is another node's")
        self._is_dead(identifier)
        self._subscribers.drop(worker)
        if role != "worker":
            self._end_id(uri, worker)
        elif worker == next(iter(self._ids.get(uri, ())), worker):
            if self._is_supervisor(uri):
                self._fact("ended", uri, call.who)
            self._fact("over", uri, "")
            self._end_ids(uri)
            self._leaving[uri] = self._clock() + GRACE_S

    def _end_ids(self, uri: str) -> None:
        for worker in list(self._ids.get(uri, ())):
            self._end_id(uri, worker)

    def _end_id(self, uri: str, worker: str) -> None:
        for actor in list(self._owned.get(worker, ())):
            self._disown(actor)
        self._let_go("workers", worker)
        mine = self._ids.get(uri, {})
        mine.pop(worker, None)
        if not mine:
            self._ids.pop(uri, None)

    def register_node(self, call: _Call) -> None:
        """A node joins as its inventory entry says, or not at all."""
        info = call.ask.node_info
        node_id = info.node_id.hex()
        problem = self._unfit(call, info)
        entry = self.inventory.nodes.get(call.who.partition("/")[2])
        quarantined = entry is not None and entry.quarantined
        if problem and (quarantined or self.settings.admission == "enforce"):
            raise _RefusedError(problem, alert=True)
        call.note = problem
        if self.nodes.get(node_id, call.who) != call.who:
            raise _RefusedError("the node id is another node's", alert=True)
        if node_id in self.workers or info.node_id.endswith(DRIVER_ID):
            raise _RefusedError("the node id is a worker's", alert=True)
        self._fact("nodes", node_id, call.who)
        self._subscribers.drop(node_id)

    def _unfit(self, call: _Call, info: Any) -> str:
        name = call.who.partition("/")[2]
        entry = self.inventory.nodes.get(name)
        if entry is None:
            return f"node {name!r} is not in the inventory"
        if entry.quarantined:
            return f"node {name!r} is quarantined"
        if not entry.has_address(info.node_manager_address):
            return (
                f"node {name!r} claims address {info.node_manager_address}, the "
                f"inventory says {', '.join(entry.addresses)}"
            )
        if info.is_head_node and not (entry.head and call.role == "head"):
            return f"node {name!r} claims to be the head"
        address = info.node_manager_address
        if problem := over_ceiling(name, entry, address, info.resources_total):
            return problem
        for label, value in info.labels.items():
            if not label.startswith("ray.io/") and entry.labels.get(label) != value:
                return f"node {name!r} claims label {label}={value}"
        return ""

    def unregister_node(self, call: _Call) -> None:
        """A node leaves for itself."""
        self._own_node(call, call.ask.node_id.hex())
        self._is_dead(call.ask.node_id)

    def _is_dead(self, identifier: bytes) -> None:
        if len(self.dead) >= MOST_DEAD:
            del self.dead[next(iter(self.dead))]
        self.dead[identifier.hex()] = None

    def sync(self, call: _Call) -> None:
        """The sync stream of a node that registered."""
        call.charge = False
        self._own_node(call, call.node_id)


class _Call:
    """One call, and what it will cost."""

    __slots__ = (
        "account", "ask", "body_bytes", "charge", "events", "holds", "method",
        "node_id", "note", "reads", "request_id", "role", "source", "uri", "wait_s",
        "who", "writes",
    )  # fmt: skip

    def __init__(
        self, uri: str, method: str, body: bytes, request_id: str, node_id: str,
        source: str,
    ) -> None:  # fmt: skip
        self.uri, self.method, self.request_id = uri, method, request_id
        self.node_id, self.source, self.body_bytes = node_id, source, len(body)
        self.who = _who(uri)
        self.role = self.who.partition("/")[0]
        self.ask: Any = None
        self.reads, self.writes, self.events = self.body_bytes, 0, 0
        self.wait_s = 0.0
        self.account = ""
        self.charge = True
        self.holds: Account | None = None
        self.note = ""

    def stores(self) -> None:
        """What was sent is kept by the GCS."""
        self.reads, self.writes = 0, self.body_bytes

    def about(self) -> str:
        """Name the object for the audit log."""
        ask: Any = self.ask
        if ask is None:
            return self.node_id
        name = self.method.rpartition("/")[2]
        if name.startswith("InternalKV"):
            space = _text(bytes(ask.namespace), 32)
            if name == "InternalKVKeys":
                return f"{space}:{_text(bytes(ask.prefix))}*"
            if name == "InternalKVMultiGet":
                shown = " ".join(_text(key, 48) for key in ask.keys[:SHOWN])
                more = len(ask.keys) - SHOWN
                return f"{space}:{shown}" + (f" and {more} more" if more > 0 else "")
            many = "*" if getattr(ask, "del_by_prefix", False) else ""
            return f"{space}:{_text(bytes(ask.key))}{many}"
        if hasattr(ask, "actor_id"):
            return f"actor {ask.actor_id.hex()}"
        if hasattr(ask, "ray_namespace"):
            return f"{_short(ask.ray_namespace)}/{_short(getattr(ask, 'name', '*'))}"
        if hasattr(ask, "task_spec"):
            made = ask.task_spec.actor_creation_task_spec
            return f"actor {made.actor_id.hex()} {_short(made.name)}".rstrip()
        if hasattr(ask, "placement_group_id"):
            return f"placement group {ask.placement_group_id.hex()}"
        if hasattr(ask, "placement_group_spec"):
            spec = ask.placement_group_spec
            text = f"placement group {spec.placement_group_id.hex()}"
            return f"{text} {_short(spec.name)}".rstrip()
        if hasattr(ask, "worker_id"):
            return f"worker {ask.worker_id.hex()}"
        for field in ("worker_failure", "worker_data"):
            if hasattr(ask, field):
                address = getattr(ask, field).worker_address
                return f"worker {address.worker_id.hex()}"
        if hasattr(ask, "node_id"):
            return f"node {ask.node_id.hex()}"
        if hasattr(ask, "uri"):
            return _short(ask.uri)
        if name == "AddTaskEventData":
            return f"{len(ask.data.events_by_task)} events"
        if hasattr(ask, "node_info"):
            info = ask.node_info
            return f"node {info.node_id.hex()} {_short(info.node_manager_address)}"
        if hasattr(ask, "data"):
            return f"job {ask.data.job_id.hex()}"
        if hasattr(ask, "job_id"):
            return f"job {ask.job_id.hex()}"
        return ""


def over_ceiling(
    name: str, entry: Node, address: str, amounts: Mapping[str, float]
) -> str:
    """Say which resources are more than a node may have, or ``""``.

    Args:
        name: The node's.
        entry: Of the inventory.
        address: Of the node, as it says.
        amounts: What it says that it has.
    """
    rest = entry.resources.get("*", 0.0)
    # Ray gives each node a resource of 1 in the name of its address, and the
    # head one that draws what must run there.
    own = {f"node:{address}"}
    if entry.head:
        own.add("node:__internal_head__")
    for resource, amount in amounts.items():
        if resource in own and 0 <= amount <= 1:
            continue
        if resource.startswith("node:") or not amount >= 0:
            return f"node {name!r} claims {amount:g} of {resource}"
        ceiling = entry.resources.get(resource, rest)
        if amount > ceiling:
            return (
                f"node {name!r} claims {amount:g} of {resource}, the inventory "
                f"allows {ceiling:g}"
            )
    return ""


def _who(uri: str) -> str:
    """Return role/name of an identity's URI."""
    parts = uri.removeprefix("spiffe://").split("/")
    return "/".join(parts[1:3])


def _check_length(name: str) -> None:
    if len(name) > MOST_NAME_BYTES:
        raise _RefusedError(f"a name of {len(name)} letters; at most {MOST_NAME_BYTES}")


def _check_name(namespace: bytes, key: bytes, *, prefix: bool) -> None:
    """Refuse a name that the GCS keeps as another's, or that is no name any more."""
    if len(namespace) > MOST_NAME_BYTES or len(key) > MOST_NAME_BYTES:
        raise _RefusedError(
            f"a key of {len(key)} bytes in a namespace of {len(namespace)}: names have "
            f"at most {MOST_NAME_BYTES} bytes; what is long belongs into the value"
        )
    if STORED_SEPARATOR in namespace:
        raise _RefusedError(
            f"namespace {_text(namespace)!r} has a ':' in it: the GCS would take part "
            "of it for a key of another namespace"
        )
    if not namespace and (
        key.startswith(STORED) or (prefix and STORED.startswith(key))
    ):
        raise _RefusedError(
            f"{_text(key)!r} without a namespace would be keys of every namespace"
        )


def _short(name: str) -> str:
    return name[:96]


def _job_owner(uri: str) -> str:
    """Return whose a job is that was given to an identity."""
    return uri if "/worker/" in uri else _who(uri)


def _job_of_key(key: bytes) -> str:
    parts = bytes(key).split(b":", 2)
    if len(parts) < 3 or len(parts[1]) != 2 * JOB_BYTES:
        raise _RefusedError(f"{_text(key)!r} is no key of one job's function table")
    return parts[1].decode("ascii", "replace")


def _reserved(key: bytes) -> bool:
    return key.startswith(
        (b"__", b"webui", b"DASHBOARD", b"Autoscaler", b"Dashboard", b"CLUSTER")
    )


_KV = "/ray.rpc.InternalKVGcsService/InternalKV"
_ACTOR = "/ray.rpc.ActorInfoGcsService/"
_GROUP = "/ray.rpc.PlacementGroupInfoGcsService/"
_PUBSUB = "/ray.rpc.ObservabilityPubSubService/"
_CONTROL = "/ray.rpc.ControlPlanePubSubGcsService/"
_WORKER = "/ray.rpc.WorkerInfoGcsService/"
_AUTOSCALER = "/ray.rpc.autoscaler.AutoscalerStateService/"
ACTOR_CHANNEL = _pubsub.GCS_ACTOR_CHANNEL
ERROR_CHANNEL = _pubsub.RAY_ERROR_INFO_CHANNEL
NODE_CHANNELS = {
    (_pubsub.RAY_LOG_CHANNEL, "log_batch_message"),
    (_pubsub.RAY_NODE_RESOURCE_USAGE_CHANNEL, "node_resource_usage_message"),
}


# What carries something: a value, an actor's arguments, a batch of events.
BULKY = {
    _KV + "Put", _ACTOR + "CreateActor", _ACTOR + "RegisterActor",
    _GROUP + "CreatePlacementGroup", _PUBSUB + "GcsPublish", _PUBSUB + "ReportJobError",
    "/ray.rpc.JobInfoGcsService/AddJob",
    "/ray.rpc.TaskInfoGcsService/AddTaskEventData",
    _AUTOSCALER + "ReportAutoscalingState", _AUTOSCALER + "ReportClusterConfig",
    _AUTOSCALER + "RequestClusterResourceConstraint",
}  # fmt: skip


def _rules(access: Access) -> dict[str, Callable[[_Call], None]]:
    return {
        **{m: access.kv for m in CONTENT if m.startswith(_KV)},
        _ACTOR + "CreateActor": access.new_actor,
        _ACTOR + "RegisterActor": access.new_actor,
        _ACTOR + "GetActorInfo": access.look_at_actor,
        _ACTOR + "GetAllActorInfo": access.list_actors,
        _ACTOR + "GetNamedActorInfo": access.named_actor,
        _ACTOR + "ListNamedActors": access.named_actor,
        _ACTOR + "KillActorViaGcs": access.actor_by_id,
        _ACTOR + "ReportActorOutOfScope": access.out_of_scope,
        _GROUP + "CreatePlacementGroup": access.placement_group,
        _GROUP + "GetNamedPlacementGroup": access.placement_group,
        _GROUP + "RemovePlacementGroup": access.placement_group,
        "/ray.rpc.JobInfoGcsService/AddJob": access.add_job,
        "/ray.rpc.JobInfoGcsService/GetNextJobID": access.next_job,
        "/ray.rpc.JobInfoGcsService/MarkJobFinished": access.finish_job,
        "/ray.rpc.NodeInfoGcsService/RegisterNode": access.register_node,
        "/ray.rpc.NodeInfoGcsService/UnregisterNode": access.unregister_node,
        "/ray.rpc.TaskInfoGcsService/AddTaskEventData": access.task_events,
        _CONTROL + "GcsSubscriberCommandBatch": access.subscribe,
        _CONTROL + "GcsSubscriberPoll": access.poll,
        _PUBSUB + "GcsPublish": access.publish,
        _PUBSUB + "GcsSubscriberCommandBatch": access.subscribe,
        _PUBSUB + "GcsSubscriberPoll": access.poll,
        "/ray.rpc.RuntimeEnvGcsService/PinRuntimeEnvURI": access.pin,
        _AUTOSCALER + "ReportAutoscalingState": access.stored,
        _AUTOSCALER + "ReportClusterConfig": access.stored,
        _AUTOSCALER + "RequestClusterResourceConstraint": access.constrain,
        _WORKER + "AddWorkerInfo": access.worker_info,
        _WORKER + "ReportWorkerFailure": access.worker_info,
        STREAM: access.sync,
    }
