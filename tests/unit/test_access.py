"""Decisions on the content of GCS calls, and the methods of roles.

Each attack comes with its control: the same call by whoever may make it.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.core.generated import autoscaler_pb2, common_pb2, gcs_service_pb2

from raysandbox.cluster import access, sessions
from raysandbox.cluster.access import SUPERVISORS, Access, Decision, grpc_message
from raysandbox.cluster.methods import CONTENT, METHODS, PLAIN, STREAM, methods_of
from raysandbox.cluster.settings import (
    ROLES,
    DriverAccess,
    Inventory,
    Limits,
    Node,
    RoleLimit,
    Settings,
)
from raysandbox.cluster.settings import (
    Access as Grants,
)
from raysandbox.worker.entrypoint import LOG_KEY, LOG_NAMESPACE

pb: Any = gcs_service_pb2
SEEN = json.loads(
    (Path(__file__).parent / "data" / "gcs_methods_by_role.json").read_text()
)

KV = "/ray.rpc.InternalKVGcsService/InternalKV"
ACTOR = "/ray.rpc.ActorInfoGcsService/"
GROUP = "/ray.rpc.PlacementGroupInfoGcsService/"
NODE = "/ray.rpc.NodeInfoGcsService/"
JOB = "/ray.rpc.JobInfoGcsService/"
WORKER_INFO = "/ray.rpc.WorkerInfoGcsService/"
ALICE, BOB = "spiffe://prod/driver/alice/driver", "spiffe://prod/driver/bob/driver"
HEAD, N1 = "spiffe://prod/head/head/raylet", "spiffe://prod/node/n1/raylet"
OPERATOR, OBSERVER = "spiffe://prod/operator/o/cli", "spiffe://prod/observer/v/cli"
WORKER = "spiffe://prod/worker/n1/5e55105e00000001-w1"
ALICES, BOBS = 1, 2
NODE_ID = b"\x11" * 28


def frame(message: Message) -> bytes:
    """Return a message as the body of a unary gRPC call."""
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def job_id(number: int) -> bytes:
    """Return a job's id as Ray writes it."""
    return number.to_bytes(4, "little")


class World:
    """A cluster with a node, two drivers and a job of each."""

    def __init__(self, **how: Any) -> None:
        self.now, self.calls = 1000.0, 0
        self.journal: list[list[Any]] = []
        self.settings = Settings(name="prod", head_address="10.0.0.1", **how)
        self.inventory = Inventory(
            nodes={
                "head": Node(addresses=("10.0.0.1",), head=True),
                "n1": Node(
                    addresses=("10.0.0.2", "10.1.0.0/16"),
                    resources={"CPU": 4, "memory": 1e9, "*": 0},
                    labels={"zone": "a"},
                ),
                "bad": Node(addresses=("10.0.0.3",), quarantined=True),
            }
        )
        self.access = self.new()
        self.ok(N1, NODE + "RegisterNode", register())
        for uri, number in ((ALICE, ALICES), (BOB, BOBS)):
            self.begin(uri, number)

    def new(self) -> Access:
        """Return the decisions of a process that knows nothing yet."""
        return Access(
            self.settings, self.inventory,
            Grants(drivers={"bob": DriverAccess(namespaces=("shared-*",))}),
            self.journal.append, lambda: self.now,
        )  # fmt: skip

    def begin(self, uri: str, number: int) -> None:
        """Have an identity begin a job, as the GCS and the node see it."""
        self.access.learn_job(uri, number)
        message = pb.AddJobRequest()
        message.data.job_id = job_id(number)
        message.data.driver_address.node_id = NODE_ID
        message.data.driver_address.worker_id = b"\x33" * 28
        message.data.config.ray_namespace = f"ns{number}"
        self.ok(N1, JOB + "AddJob", message, request_id=f"add{number}")
        self.access.learn_added(f"add{number}")

    def ask(self, uri: str, method: str, message: Message, **how: Any) -> Decision:
        """Decide one call."""
        if hasattr(message, "task_spec"):
            # Whoever asks is the worker that the request says it is.
            owner = message.task_spec.caller_address.worker_id.hex()
            self.access.workers[owner] = uri
        if "request_id" in how or not method.startswith(KV):
            return self.access.decide(
                uri=uri, method=method, body=frame(message), **how
            )
        # Nobody's place in flight, and done when it is let through.
        self.calls += 1
        identifier = how["request_id"] = f"call {self.calls}"
        said = self.access.decide(uri=uri, method=method, body=frame(message), **how)
        self.access.call_ended(identifier, done=said.allowed)
        return said

    def ok(self, uri: str, method: str, message: Message, **how: Any) -> Decision:
        """Decide one call that must be allowed."""
        said = self.ask(uri, method, message, **how)
        assert said.allowed, said.why
        return said

    def no(self, uri: str, method: str, message: Message, **how: Any) -> Decision:
        """Decide one call that must be refused for good."""
        said = self.ask(uri, method, message, **how)
        assert not said.allowed
        assert not said.retry, said.why
        return said


@pytest.fixture
def world() -> World:
    """Return a cluster at work."""
    return World()


def register(**more: Any) -> Any:
    """Return the request of a node that joins."""
    message = pb.RegisterNodeRequest()
    info = message.node_info
    info.node_id = more.pop("node_id", NODE_ID)
    info.node_manager_address = more.pop("address", "10.0.0.2")
    info.is_head_node = more.pop("head", False)
    info.resources_total.update(more.pop("resources", {"CPU": 4.0}))
    info.labels.update(more.pop("labels", {}))
    assert not more
    return message


def put(
    key: bytes, value: bytes = b"v", namespace: bytes = b"mine", overwrite: bool = True
) -> Any:
    """Return the request that writes a key."""
    return pb.InternalKVPutRequest(
        namespace=namespace, key=key, value=value, overwrite=overwrite
    )


def get(key: bytes, namespace: bytes = b"mine") -> Any:
    """Return the request that reads a key."""
    return pb.InternalKVGetRequest(namespace=namespace, key=key)


def delete(key: bytes, namespace: bytes = b"mine", prefix: bool = False) -> Any:
    """Return the request that deletes a key."""
    return pb.InternalKVDelRequest(namespace=namespace, key=key, del_by_prefix=prefix)


def fun(number: int) -> bytes:
    """Return a key of a job's function table."""
    return b"RemoteFunction:%s:%s" % (job_id(number).hex().encode(), b"f" * 28)


# -- methods ------------------------------------------------------------------------


@pytest.mark.parametrize("role", sorted(SEEN))
def test_role_has_every_method_it_was_seen_to_need(role: str) -> None:
    """Collected on Ray 2.60: tasks, actors, jobs, state API, autoscaler.

    But those that end the GCS when what they name is not in the one state for it.
    """
    refused = {
        ACTOR + "RestartActorForLineageReconstruction",
        "/ray.rpc.WorkerInfoGcsService/UpdateWorkerDebuggerPort",
        "/ray.rpc.WorkerInfoGcsService/UpdateWorkerNumPausedThreads",
    }
    assert set(SEEN[role]) - refused <= methods_of(role)


def test_methods_are_of_the_ray_that_is_installed() -> None:
    """A method that Ray does not have would be a hole with no request to check."""
    from raysandbox.cluster.shapes import request_types

    named = frozenset().union(*METHODS.values())
    assert named - set(request_types(named)) == {STREAM}


def test_every_method_is_parsed_or_plain() -> None:
    """Nothing that names an object goes to the GCS unparsed."""
    named = frozenset().union(*METHODS.values())
    assert named == CONTENT | PLAIN
    assert not CONTENT & PLAIN


POWER = {
    "RegisterNode", "UnregisterNode", "AddJob", "MarkJobFinished", "DrainNode",
    "StartSync", "ReportWorkerFailure", "ReportAutoscalingState",
    "ReportClusterConfig", "ResizeRayletResourceInstances",
}  # fmt: skip
WRITES = {
    "InternalKVPut", "InternalKVDel", "CreateActor", "RegisterActor",
    "KillActorViaGcs", "CreatePlacementGroup", "RemovePlacementGroup", "GetNextJobID",
}  # fmt: skip


@pytest.mark.parametrize("role", ["worker", "driver", "client", "observer"])
def test_users_have_no_method_of_nodes_or_operators(role: str) -> None:
    """Joining, draining, ending workers and jobs, resizing are others'."""
    assert not {m.rpartition("/")[2] for m in methods_of(role)} & POWER


def test_lookers_write_nothing() -> None:
    """An observer reads; an operator reads and drains; a client does neither."""
    names = {
        role: {m.rpartition("/")[2] for m in methods_of(role)}
        for role in ("observer", "operator", "client")
    }
    assert not names["observer"] & (WRITES | POWER)
    assert names["operator"] & (WRITES | POWER) == {"DrainNode"}
    assert names["client"] == set()


@given(st.text(max_size=20))
def test_unknown_role_has_no_method(role: str) -> None:
    """Whatever a certificate says that is no role."""
    if role not in ROLES:
        assert methods_of(role) == frozenset()


# -- foreign bytes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0\0", b"\1\0\0\0\0", b"\0\0\0\0\1", b"\0\0\0\0\0x",
     b"\0\xff\xff\xff\xff", frame(get(b"k")) * 2],
)  # fmt: skip
def test_body_that_is_not_one_plain_message_is_refused(
    world: World, body: bytes
) -> None:
    """Short, compressed, with another length, or with a second message behind."""
    with pytest.raises(ValueError, match=r"frame|compressed|length"):
        grpc_message(body)
    said = world.access.decide(uri=ALICE, method=KV + "Get", body=body)
    assert "malformed" in said.why


@given(st.binary(max_size=200))
def test_frame_is_its_message(data: bytes) -> None:
    """What was framed comes out, byte for byte."""
    assert grpc_message(b"\0" + len(data).to_bytes(4, "big") + data) == data


METHOD = st.sampled_from(sorted(CONTENT))
URI = st.sampled_from([ALICE, BOB, HEAD, N1, OPERATOR, OBSERVER, WORKER])


@settings(max_examples=400, deadline=None)
@given(URI | st.text(max_size=40), METHOD, st.binary(max_size=120))
@example("", KV + "Get", b"")
@example("spiffe://prod/root/x/y", KV + "Put", frame(put(b"k")))
def test_no_bytes_make_a_decision_fail(uri: str, method: str, body: bytes) -> None:
    """Any body, framed or not, of any method, from anybody: decided, never raised.

    An identity without a role of ours is refused whatever it asks.
    """
    world = _SHARED
    framed = b"\0" + len(body).to_bytes(4, "big") + body
    for each in (body, framed):
        said = world.access.decide(uri=uri, method=method, body=each, node_id="x")
        assert isinstance(said.why, str)
        said.object.encode("utf-8", "strict")
        if uri not in (ALICE, BOB, HEAD, N1, OPERATOR, OBSERVER, WORKER):
            assert not said.allowed


_SHARED = World()


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_damaged_requests_are_decided(rng: random.Random) -> None:
    """Honest requests with bytes flipped, cut out and put in."""
    messages = [
        (NODE + "RegisterNode", register()), (KV + "Put", put(fun(ALICES))),
        (ACTOR + "RegisterActor", actor(ALICES, "a")), (GROUP + "CreatePlacementGroup",
                                                        group(ALICES)),
    ]  # fmt: skip
    for method, message in messages:
        body = bytearray(frame(message))
        for _ in range(rng.randint(1, 6)):
            index = rng.randrange(5, len(body) + 1)
            body[index : index + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        body[1:5] = (len(body) - 5).to_bytes(4, "big")
        for uri in (ALICE, N1, WORKER):
            _SHARED.access.decide(uri=uri, method=method, body=bytes(body))


def test_method_that_nobody_knows_is_refused(world: World) -> None:
    """The guard does not send such a call on; should it, it ends here."""
    assert "not one that the guard knows" in world.no(ALICE, "/x/y", get(b"k")).why


# -- keys ---------------------------------------------------------------------------


def test_function_table_is_its_jobs_alone(world: World) -> None:
    """One job can't read or replace another job's function.

    On stock Ray with the token it can: the next task of that job runs it.
    """
    for method, message in (
        (KV + "Put", put(fun(ALICES), namespace=b"fun")),
        (KV + "Get", get(fun(ALICES), b"fun")),
        (KV + "Del", delete(fun(ALICES), b"fun")),
    ):
        world.ok(ALICE, method, message)
        world.no(BOB, method, message)


def test_worker_belongs_to_the_first_job_it_fetches_for(world: World) -> None:
    """Bound before user code runs; another job's functions are refused from then."""
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    world.no(WORKER, KV + "Get", get(fun(BOBS), b"fun"))
    world.no(WORKER, KV + "Put", put(fun(BOBS), namespace=b"fun"))
    other = "spiffe://prod/worker/n1/5e55105e00000001-w2"
    world.ok(other, KV + "Get", get(fun(BOBS), b"fun"))


@pytest.mark.parametrize(
    "key",
    [b"", b"RemoteFunction", b"RemoteFunction:", b"a:b:c", b"a:01000000", b"::",
     b"RemoteFunction:0100000:x", b"RemoteFunction:\xff\xff\xff\xff\xff\xff\xff\xff:x",
     b"RemoteFunction:02000000:01000000:x"],
)  # fmt: skip
def test_key_that_names_no_job_of_mine_is_refused(world: World, key: bytes) -> None:
    """No way of writing the key gets around the job in it."""
    world.no(ALICE, KV + "Put", put(key, namespace=b"fun"))


def test_key_belongs_to_whom_wrote_it_first(world: World) -> None:
    """Others neither write it over, nor delete, nor read it."""
    world.ok(ALICE, KV + "Put", put(b"k"))
    world.ok(ALICE, KV + "Put", put(b"k"))
    for method, message in (
        (KV + "Put", put(b"k")), (KV + "Put", put(b"k", overwrite=False)),
        (KV + "Del", delete(b"k")), (KV + "Get", get(b"k")),
        (KV + "Del", delete(b"", prefix=True)),
        (KV + "Keys", pb.InternalKVKeysRequest(namespace=b"mine", prefix=b"")),
        (KV + "MultiGet", pb.InternalKVMultiGetRequest(namespace=b"mine",
                                                       keys=[b"z", b"k"])),
    ):  # fmt: skip
        world.no(BOB, method, message)
        world.no(OBSERVER, method, message)
    world.ok(ALICE, KV + "Del", delete(b"k"))
    world.ok(BOB, KV + "Put", put(b"k"))


@pytest.mark.parametrize("uri", [BOB, N1, OBSERVER, WORKER, HEAD])
def test_no_second_way_to_write_a_name(world: World, uri: str) -> None:
    """The GCS joins namespace and key with ":", so ``fun:a`` ``b`` is ``fun`` ``a:b``.

    And without a namespace, a prefix reaches into all of them.
    """
    kind, _, rest = fun(ALICES).partition(b":")
    alias = b"fun:" + kind
    stored = b"@namespace_fun:" + fun(ALICES)
    for method, message in (
        (KV + "Put", put(rest, b"evil", alias)), (KV + "Get", get(rest, alias)),
        (KV + "Del", delete(rest, alias)), (KV + "Put", put(stored, b"evil", b"")),
        (KV + "MultiGet", pb.InternalKVMultiGetRequest(namespace=b"",
                                                       keys=[b"z", stored])),
        *((KV + "Del", delete(key, b"", prefix=True))
          for key in (b"", b"@", b"@namespace_", stored)),
        *((KV + "Keys", pb.InternalKVKeysRequest(namespace=b"", prefix=key))
          for key in (b"", b"@name", stored)),
    ):  # fmt: skip
        assert world.no(uri, method, message).why, method
    mine = pb.InternalKVKeysRequest(namespace=b"", prefix=b"mine")
    world.ok(HEAD, KV + "Keys", mine)
    world.ok(ALICE, KV + "Put", put(b"mine:with:colons", namespace=b""))
    world.ok(ALICE, KV + "Keys", mine)
    world.ok(ALICE, KV + "Del", delete(b"mine", b"", prefix=True))


@pytest.mark.parametrize(
    "message",
    [put(b"k" * 4097), put(b"k", namespace=b"n" * 4097), get(b"k" * 4097),
     delete(b"k" * 4097), pb.InternalKVKeysRequest(prefix=b"k" * 4097),
     pb.InternalKVMultiGetRequest(namespace=b"mine", keys=[b"a", b"k" * 4097])],
)  # fmt: skip
def test_name_of_any_length_is_refused(world: World, message: Any) -> None:
    """A list of keys would answer with megabytes that nobody was charged for."""
    method = KV + type(message).__name__.removeprefix("InternalKV")[: -len("Request")]
    assert "at most 4096 bytes" in world.no(ALICE, method, message).why
    world.ok(ALICE, KV + "Put", put(b"k" * 4096))


def test_package_under_a_name_stays_what_it_was(world: World) -> None:
    """A package is shared by its content's name: a second content is refused."""
    first = put(b"gcs://_ray_pkg_1.zip", b"good", b"")
    world.ok(ALICE, KV + "Put", first)
    world.ok(BOB, KV + "Put", first)
    world.no(BOB, KV + "Put", put(b"gcs://_ray_pkg_1.zip", b"evil", b""))
    world.no(ALICE, KV + "Del", delete(b"gcs://_ray_pkg_1.zip", b""))


def test_package_stays_what_it_was_by_way_of_the_dashboard(world: World) -> None:
    """What anybody sends the dashboard, the head writes: it may not either.

    When Ray has deleted it, a new one may have that name.
    """
    name = b"gcs://_ray_pkg_1.zip"
    for first in (ALICE, HEAD):
        world.ok(first, KV + "Put", put(name, b"good", b""))
        world.ok(HEAD, KV + "Put", put(name, b"good", b""))
        for uri in (HEAD, BOB):
            said = world.no(uri, KV + "Put", put(name, b"evil", b""))
            assert said.why == "a package of that name has another content"
        world.ok(HEAD, KV + "Del", delete(name, b""))


def test_submitted_job_is_ended_by_its_submitter(world: World) -> None:
    """By way of the dashboard's front; also after a restart, and until it is gone."""
    name, key = "raysubmit_1", b"_ray_internal_job_info_raysubmit_1"
    assert not world.access.may_end(ALICE, name)
    world.ok(HEAD, KV + "Put", put(key, b"{}", b"job"))
    world.access.learn_submitted(ALICE, name)
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    for each in (world.access, again):
        assert each.may_end(ALICE, name)
        assert not each.may_end(BOB, name)
        assert not each.may_end(ALICE, "raysubmit_2")
    world.now += access.PAST_S
    world.access.let_past_go({NODE_ID.hex()})
    world.ok(HEAD, KV + "Del", delete(key, b"job"))
    for _ in range(2):
        assert world.access.may_end(ALICE, name)
        world.now += access.PAST_S
        world.access.let_past_go({NODE_ID.hex()})
    assert not world.access.may_end(ALICE, name)


def test_default_namespace_is_read_by_its_writers(world: World) -> None:
    """A package holds a job's code; what others keep there is theirs as elsewhere.

    Nodes fetch packages, and drivers ask whether one is there.
    """
    package = b"gcs://_ray_pkg_1.zip"
    world.ok(ALICE, KV + "Put", put(package, b"code", b""))
    world.ok(HEAD, KV + "Put", put(b"gcs://_ray_pkg_2.zip", b"code", b""))
    world.ok(ALICE, KV + "Put", put(b"notes", b"hers", b""))
    mine = "spiffe://prod/worker/n1/5e55105e00000001-w2"
    world.ok(mine, KV + "Get", get(fun(ALICES), b"fun"))
    for key in (package, b"gcs://_ray_pkg_2.zip", b"notes"):
        for uri in (BOB, WORKER, OBSERVER):
            world.no(uri, KV + "Get", get(key, b""))
            many = pb.InternalKVMultiGetRequest(namespace=b"", keys=[b"z", key])
            world.no(uri, KV + "MultiGet", many)
        for uri in (N1, HEAD, OPERATOR):
            world.ok(uri, KV + "Get", get(key, b""))
    for uri in (ALICE, mine):
        world.ok(uri, KV + "Get", get(package, b""))
    ask = pb.InternalKVExistsRequest(namespace=b"", key=package)
    world.ok(BOB, KV + "Exists", ask)
    world.no(BOB, KV + "Exists", pb.InternalKVExistsRequest(key=b"notes"))
    for uri in (BOB, WORKER, OBSERVER):
        world.ok(uri, KV + "Get", get(b"gcs_pid", b""))
        world.ok(uri, KV + "Get", get(b"__autoscaling_status", b""))


@pytest.mark.parametrize(
    ("namespace", "key"),
    [(b"session", b"session_name"), (b"cluster", b"x"), (b"", b"__autoscaling_error"),
     (b"", b"webui:url"), (b"dashboard", b"dashboard"), (b"", b"CLUSTER_METADATA"),
     (b"__autoscaler", b"x")],
)  # fmt: skip
def test_rays_own_keys_are_the_heads(
    world: World, namespace: bytes, key: bytes
) -> None:
    """Everybody who starts reads them, so nobody else may write them."""
    world.no(ALICE, KV + "Put", put(key, namespace=namespace))
    world.ok(HEAD, KV + "Put", put(key, namespace=namespace))
    world.no(ALICE, KV + "Put", put(key, namespace=namespace))
    world.ok(ALICE, KV + "Get", get(key, namespace))


def test_node_writes_its_agents_address_alone(world: World) -> None:
    """And not another node's; anything else it writes is worth an alert."""
    mine = put(b"DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:11", namespace=b"dashboard")
    world.ok(N1, KV + "Put", mine)
    world.no("spiffe://prod/node/n2/agent", KV + "Put", mine)
    assert world.no(N1, KV + "Put", put(fun(ALICES), namespace=b"x")).alert


# -- actors, groups, namespaces -----------------------------------------------------


def actor(number: int, name: str, namespace: str = "", count: int = 1) -> Any:
    """Return the request that makes an actor of a job."""
    message = pb.RegisterActorRequest()
    spec = message.task_spec
    spec.job_id = job_id(number)
    spec.type = common_pb2.ACTOR_CREATION_TASK  # type: ignore[attr-defined]
    spec.caller_address.worker_id = b"\x22" * 28
    spec.caller_address.node_id = NODE_ID
    made = spec.actor_creation_task_spec
    made.actor_id = count.to_bytes(12, "little") + job_id(number)
    made.name, made.ray_namespace = name, namespace or f"ns{number}"
    return message


def kill(number: int, count: int = 1) -> Any:
    """Return the request that kills an actor of a job."""
    message = pb.KillActorViaGcsRequest()
    message.actor_id = count.to_bytes(12, "little") + job_id(number)
    return message


def group(number: int, other: int = 0) -> Any:
    """Return the request that makes a placement group of a job."""
    message = pb.CreatePlacementGroupRequest()
    spec = message.placement_group_spec
    spec.placement_group_id = bytes(14) + job_id(other or number)
    spec.creator_job_id = job_id(number)
    spec.bundles.add().unit_resources["CPU"] = 1
    for bundle in spec.bundles:
        bundle.bundle_id.placement_group_id = spec.placement_group_id
    return message


def test_actor_is_made_and_killed_by_its_job_alone(world: World) -> None:
    """On stock Ray anybody with the token kills anybody's named actor."""
    world.ok(ALICE, ACTOR + "RegisterActor", actor(ALICES, "counter"))
    world.no(BOB, ACTOR + "KillActorViaGcs", kill(ALICES))
    world.ok(ALICE, ACTOR + "KillActorViaGcs", kill(ALICES))
    world.no(BOB, ACTOR + "RegisterActor", actor(ALICES, "mine"))


def test_actor_id_can_not_name_another_job(world: World) -> None:
    """Its job is read from its id later, so both must agree."""
    message = actor(BOBS, "x")
    message.task_spec.actor_creation_task_spec.actor_id = bytes(12) + job_id(ALICES)
    world.no(BOB, ACTOR + "RegisterActor", message)


def test_namespace_is_its_first_users(world: World) -> None:
    """Named actors are found, made and listed in one's own namespaces alone.

    And in those that access.toml grants.
    """
    named = pb.GetNamedActorInfoRequest(name="counter", ray_namespace="ns1")
    world.ok(ALICE, ACTOR + "GetNamedActorInfo", named)
    world.no(BOB, ACTOR + "GetNamedActorInfo", named)
    world.no(BOB, ACTOR + "RegisterActor", actor(BOBS, "spy", "ns1"))
    listed = pb.ListNamedActorsRequest(all_namespaces=True)
    world.no(ALICE, ACTOR + "ListNamedActors", listed)
    world.ok(OPERATOR, ACTOR + "ListNamedActors", listed)
    shared = pb.GetNamedActorInfoRequest(name="x", ray_namespace="shared-data")
    world.ok(BOB, ACTOR + "GetNamedActorInfo", shared)


def test_namespace_that_another_was_granted_is_not_taken_first(world: World) -> None:
    """Neither by looking into it, nor by an actor, nor as that of a job."""
    ask = pb.GetNamedActorInfoRequest(name="x", ray_namespace="shared-data")
    world.no(ALICE, ACTOR + "GetNamedActorInfo", ask)
    world.no(ALICE, ACTOR + "RegisterActor", actor(ALICES, "x", "shared-data"))
    world.access.learn_job(ALICE, 3)
    message = pb.AddJobRequest()
    message.data.job_id = job_id(3)
    message.data.driver_address.node_id = NODE_ID
    message.data.driver_address.worker_id = b"\x33" * 28
    message.data.config.ray_namespace = "shared-data"
    world.ok(N1, JOB + "AddJob", message)
    world.no(ALICE, ACTOR + "GetNamedActorInfo", ask)
    world.ok(BOB, ACTOR + "RegisterActor", actor(BOBS, "x", "shared-data"))
    world.ok(BOB, ACTOR + "GetNamedActorInfo", ask)
    # Who may look everywhere has not everything for itself.
    world.access.grants = Grants(drivers={"bob": DriverAccess(namespaces=("*",))})
    world.ok(ALICE, ACTOR + "GetNamedActorInfo", ask)
    world.ok(BOB, ACTOR + "GetNamedActorInfo",
             pb.GetNamedActorInfoRequest(name="x", ray_namespace="ns1"))  # fmt: skip


def test_namespace_that_is_named_is_nobodys_yet() -> None:
    """A question makes no fact: it would fill the disk, and keep others out."""
    world = limited(calls_per_s=1000, calls_burst=1000)
    known = len(world.journal)
    for index in range(50):
        ask = pb.GetNamedActorInfoRequest(name="x", ray_namespace=f"free-{index}")
        world.ok(ALICE, ACTOR + "GetNamedActorInfo", ask)
    assert len(world.journal) == known
    world.ok(BOB, ACTOR + "RegisterActor", actor(BOBS, "x", "free-1"))
    world.no(ALICE, ACTOR + "RegisterActor", actor(ALICES, "x", "free-1"))


def test_job_of_no_driver_is_refused(world: World) -> None:
    """The GCS aborts when anybody asks for all jobs: it looks for the driver."""
    world.access.learn_job(ALICE, 3)
    message = pb.AddJobRequest()
    message.data.job_id = job_id(3)
    message.data.driver_address.node_id = NODE_ID
    assert "without a driver" in world.no(N1, JOB + "AddJob", message).why
    message.data.driver_address.worker_id = b"\x33" * 28
    world.ok(N1, JOB + "AddJob", message)


def test_names_of_any_length_are_refused() -> None:
    """What is kept has a length, and what is sent costs its bytes."""
    world = limited(read_burst_bytes=300_000)
    for name, namespace in (("x" * 4097, "ns1"), ("x", "n" * 4097)):
        said = world.no(ALICE, ACTOR + "RegisterActor", actor(ALICES, name, namespace))
        assert "at most 4096" in said.why
    ask = pb.GetNamedActorInfoRequest(name="x" * 250_000, ray_namespace="ns1")
    world.ok(ALICE, ACTOR + "GetNamedActorInfo", ask)
    assert world.ask(ALICE, ACTOR + "GetNamedActorInfo", ask).retry
    message = pb.AddJobRequest()
    message.data.job_id = job_id(ALICES)
    message.data.driver_address.node_id = NODE_ID
    message.data.driver_address.worker_id = b"\x33" * 28
    message.data.config.ray_namespace = "n" * 4097
    assert "at most 4096" in world.no(N1, JOB + "AddJob", message).why


def test_one_identity_holds_so_many_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ended jobs the oldest goes; what is in use does not."""
    monkeypatch.setattr(access, "MOST_NAMESPACES", 3)
    world = World()
    for number in (11, 12):
        world.begin(ALICE, number)
    said = world.no(ALICE, ACTOR + "RegisterActor", actor(ALICES, "x", "more"))
    assert "has 3 namespaces in use" in said.why
    lasting = actor(11, "lasts")
    lasting.task_spec.actor_creation_task_spec.is_detached = True
    world.ok(ALICE, ACTOR + "RegisterActor", lasting)
    for number in (11, 12):
        end = pb.MarkJobFinishedRequest(job_id=job_id(number))
        world.ok(N1, JOB + "MarkJobFinished", end)
    world.ok(ALICE, ACTOR + "RegisterActor", actor(ALICES, "x", "more"))
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    for each in (world.access, again):
        assert [n for n, holder in each.namespaces.items() if "alice" in holder] == [
            "ns1", "ns11", "more"
        ]  # fmt: skip
    world.ok(BOB, ACTOR + "RegisterActor", actor(BOBS, "x", "other"))


def test_where_an_actor_is_its_own_jobs_know(world: World) -> None:
    """Its address is what its methods are called by. Asked, listed or subscribed to."""
    bound = "spiffe://prod/worker/n1/5e55105e00000001-w2"
    world.ok(bound, KV + "Get", get(fun(BOBS), b"fun"))
    identifier = kill(ALICES).actor_id
    listed = pb.GetAllActorInfoRequest()
    listed.filters.actor_id = identifier
    told = pb.GcsSubscriberCommandBatchRequest()
    told.commands.add(channel_type="GCS_ACTOR_CHANNEL", key_id=identifier)
    told.commands[0].subscribe_message.SetInParent()
    asked = pb.GetActorInfoRequest(actor_id=identifier)
    of_job = pb.GetAllActorInfoRequest()
    of_job.filters.job_id = job_id(ALICES)
    pubsub = "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriberCommandBatch"
    for method, message, others in (
        (ACTOR + "GetActorInfo", asked, (BOB, bound)),
        (pubsub, told, (BOB, bound)),
        (ACTOR + "GetAllActorInfo", listed, (BOB,)),
        (ACTOR + "GetAllActorInfo", of_job, (BOB,)),
    ):
        for uri in (ALICE, HEAD, *others):
            told.subscriber_id = hashlib.sha224(uri.encode()).digest()
            if uri in others:
                world.no(uri, method, message)
            else:
                world.ok(uri, method, message)
    world.no(ALICE, ACTOR + "GetAllActorInfo", pb.GetAllActorInfoRequest())
    world.ok(OPERATOR, ACTOR + "GetAllActorInfo", pb.GetAllActorInfoRequest())
    # Which job a worker has is known once it has fetched what it is to run.
    assert world.ask(WORKER, ACTOR + "GetActorInfo", asked).retry
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    world.ok(WORKER, ACTOR + "GetActorInfo", asked)


def test_actor_of_a_shared_namespace_is_found_by_who_shares_it(world: World) -> None:
    """Its name is looked up first, and its address then."""
    world.access.grants = Grants(drivers={"bob": DriverAccess(namespaces=("ns1",))})
    asked = pb.GetActorInfoRequest(actor_id=kill(ALICES).actor_id)
    world.no(BOB, ACTOR + "GetActorInfo", asked)
    world.ok(ALICE, ACTOR + "RegisterActor", actor(ALICES, "counter"))
    world.ok(BOB, ACTOR + "GetActorInfo", asked)


def test_placement_group_is_its_jobs(world: World) -> None:
    """Made and removed by the owner; its id names the same job."""
    world.ok(ALICE, GROUP + "CreatePlacementGroup", group(ALICES))
    world.no(BOB, GROUP + "CreatePlacementGroup", group(ALICES))
    world.no(BOB, GROUP + "CreatePlacementGroup", group(BOBS, ALICES))
    remove = pb.RemovePlacementGroupRequest(
        placement_group_id=bytes(14) + job_id(ALICES)
    )
    world.no(BOB, GROUP + "RemovePlacementGroup", remove)
    world.ok(ALICE, GROUP + "RemovePlacementGroup", remove)


# -- what is kept for everybody -----------------------------------------------------

PIN = "/ray.rpc.RuntimeEnvGcsService/PinRuntimeEnvURI"
AUTOSCALER = "/ray.rpc.autoscaler.AutoscalerStateService/"
CONSTRAIN = AUTOSCALER + "RequestClusterResourceConstraint"


def test_package_is_kept_for_a_while(world: World) -> None:
    """Nobody has the GCS keep anything, or for ever."""
    for uri, seconds in (
        ("gcs://_ray_pkg_1.zip", 2**31 - 1), ("gcs://_ray_pkg_1.zip", 0),
        ("gcs://_ray_pkg_1.zip", -1), ("gcs://" + "x" * 5000, 600),
        ("https://example.org/x.zip", 600), ("", 600),
    ):  # fmt: skip
        ask = pb.PinRuntimeEnvURIRequest(uri=uri, expiration_s=seconds)
        world.no(ALICE, PIN, ask)
    for seconds in (1, 600, 3600):
        ask = pb.PinRuntimeEnvURIRequest(
            uri="gcs://_ray_pkg_1.zip", expiration_s=seconds
        )
        world.ok(ALICE, PIN, ask)


def constraint(**amounts: float) -> Any:
    """Return a request for resources of the whole cluster."""
    message = autoscaler_pb2.RequestClusterResourceConstraintRequest()  # type: ignore[attr-defined]
    for name, amount in amounts.items():
        each = message.cluster_resource_constraint.resource_requests.add(count=1)
        each.request.resources_bundle[name] = amount
    return message


def test_request_for_the_whole_cluster_is_its_makers(world: World) -> None:
    """Another driver's would take its place; ended jobs ask for nothing."""
    world.ok(ALICE, CONSTRAIN, constraint(CPU=4))
    said = world.no(BOB, CONSTRAIN, constraint(CPU=1))
    assert "driver/alice has asked the autoscaler" in said.why
    world.no(BOB, CONSTRAIN, constraint())
    world.ok(ALICE, CONSTRAIN, constraint(CPU=8))
    world.ok(ALICE, CONSTRAIN, constraint())
    world.ok(BOB, CONSTRAIN, constraint(CPU=1))
    world.no(ALICE, CONSTRAIN, constraint(CPU=4))
    world.ok(
        N1, JOB + "MarkJobFinished", pb.MarkJobFinishedRequest(job_id=job_id(BOBS))
    )
    world.ok(ALICE, CONSTRAIN, constraint(CPU=4))
    for amount in (float("nan"), -1.0, float("inf")):
        world.no(ALICE, CONSTRAIN, constraint(CPU=amount))
    many = constraint(CPU=1)
    many.cluster_resource_constraint.resource_requests[0].count = 1_000_001
    world.no(ALICE, CONSTRAIN, many)


# -- submitted jobs -----------------------------------------------------------------

HEADS_JOB = 9
HEAD_NODE = b"\x22" * 28
FIRST, SECOND = (
    "spiffe://prod/worker/head/5e55105e00000001-s1",
    "spiffe://prod/worker/head/5e55105e00000001-s2",
)
STATE = json.dumps({"status": "RUNNING", "entrypoint": "true"}).encode()


def supervised() -> World:
    """Return a cluster with submitted jobs "a" and "b", and who supervises them."""
    world = World()
    info = world.access
    node = register(node_id=HEAD_NODE, address="10.0.0.1", head=True, resources={})
    world.ok(HEAD, NODE + "RegisterNode", node)
    info.learn_job("spiffe://prod/head/head/agent", HEADS_JOB)
    message = pb.AddJobRequest()
    message.data.job_id = job_id(HEADS_JOB)
    message.data.driver_address.node_id = HEAD_NODE
    message.data.driver_address.worker_id = b"\x33" * 28
    message.data.config.ray_namespace = SUPERVISORS
    world.ok(HEAD, JOB + "AddJob", message)
    info.learn_added("")
    for name, uri in (("a", FIRST), ("b", SECOND)):
        world.ok(HEAD, KV + "Put", put(state_of(name), STATE, b"job"))
        world.ok(uri, KV + "Get", get(fun(HEADS_JOB), b"fun"))
        world.ok(uri, KV + "Get", get(state_of(name), b"job"))
        world.ok(uri, WORKER_INFO + "AddWorkerInfo", worker_info(uri))
    return world


def state_of(name: str) -> bytes:
    """Return the key of a submitted job's state."""
    return b"_ray_internal_job_info_" + name.encode()


def worker_id(uri: str) -> bytes:
    """Return an id for the worker with an identity."""
    return hashlib.sha224(uri.encode()).digest()


def worker_info(uri: str) -> Any:
    """Return the request by which a worker makes itself known."""
    message = pb.AddWorkerInfoRequest()
    message.worker_data.worker_address.worker_id = worker_id(uri)
    message.worker_data.worker_address.node_id = HEAD_NODE
    return message


def worker_end(uri: str) -> Any:
    """Return the request by which a node reports a worker's end."""
    message = pb.ReportWorkerFailureRequest()
    message.worker_failure.worker_address.worker_id = worker_id(uri)
    message.worker_failure.worker_address.node_id = HEAD_NODE
    return message


def test_submitted_jobs_state_is_its_supervisors() -> None:
    """Another's, a driver's and a worker's of a driver is refused, as is deletion."""
    world = supervised()
    world.ok(FIRST, KV + "Put", put(state_of("a"), STATE, b"job"))
    for uri in (SECOND, ALICE, WORKER):
        world.no(uri, KV + "Put", put(state_of("a"), STATE, b"job"))
    world.no(FIRST, KV + "Put", put(state_of("b"), STATE, b"job"))
    world.no(FIRST, KV + "Put", put(state_of("new"), STATE, b"job"))
    world.no(FIRST, KV + "Del", delete(state_of("a"), b"job"))
    world.no(FIRST, KV + "Put", put(state_of("a"), b"{}", b"job"))
    world.ok(HEAD, KV + "Del", delete(state_of("a"), b"job"))


def test_submitted_jobs_name_is_used_again() -> None:
    """When the head has deleted the job that had it; not before."""
    world, third = supervised(), "spiffe://prod/worker/head/5e55105e00000001-s3"
    world.ok(third, KV + "Get", get(fun(HEADS_JOB), b"fun"))
    world.ok(HEAD, KV + "Put", put(state_of("a"), STATE, b"job"))
    world.no(third, KV + "Get", get(state_of("a"), b"job"))
    world.ok(HEAD, KV + "Del", delete(state_of("a"), b"job"))
    world.ok(HEAD, KV + "Put", put(state_of("a"), STATE, b"job"))
    # Of the one that had it, what may live on is not the first to ask.
    world.no(FIRST, KV + "Get", get(state_of("a"), b"job"))
    world.ok(third, KV + "Get", get(state_of("a"), b"job"))
    world.no(FIRST, KV + "Put", put(state_of("a"), STATE, b"job"))


def test_the_heads_job_is_used_and_not_changed_by_supervisors() -> None:
    """What they run comes from its function table: the next one's too."""
    world = supervised()
    world.ok(FIRST, KV + "Get", get(fun(HEADS_JOB), b"fun"))
    world.no(FIRST, KV + "Put", put(fun(HEADS_JOB), namespace=b"fun"))
    world.no(FIRST, KV + "Del", delete(fun(HEADS_JOB), b"fun"))
    world.no(FIRST, ACTOR + "RegisterActor", actor(HEADS_JOB, ""))
    world.ok(HEAD, KV + "Put", put(fun(HEADS_JOB), namespace=b"fun"))


def test_the_supervisors_namespace_is_the_heads() -> None:
    """Even for who would have been the first to use it."""
    for world in (World(), supervised()):
        world.no(ALICE, ACTOR + "RegisterActor", actor(ALICES, "x", SUPERVISORS))
        ask = pb.GetNamedActorInfoRequest(ray_namespace=SUPERVISORS, name="x")
        world.no(ALICE, ACTOR + "GetNamedActorInfo", ask)
        world.ok(HEAD, ACTOR + "GetNamedActorInfo", ask)
    world.no(FIRST, ACTOR + "GetNamedActorInfo", ask)


def test_submitted_jobs_log_is_its_supervisors_own() -> None:
    """The head reads it out to who asks for the job's output."""
    world = supervised()
    key = LOG_KEY.format(submission="a").encode()

    def log(uri: str) -> bytes:
        return b"worker-%s-09000000-12.out 0" % worker_id(uri).hex().encode()

    world.ok(FIRST, KV + "Put", put(key, log(FIRST), LOG_NAMESPACE))
    world.no(FIRST, KV + "Put", put(key, log(SECOND), LOG_NAMESPACE))
    world.no(FIRST, KV + "Put", put(key, b"", LOG_NAMESPACE))
    world.no(SECOND, KV + "Put", put(key, log(SECOND), LOG_NAMESPACE))
    world.no(FIRST, KV + "Put", put(b"else", log(FIRST), LOG_NAMESPACE))
    for uri in (ALICE, WORKER):
        world.no(uri, KV + "Put", put(key, log(FIRST), LOG_NAMESPACE))
        world.no(uri, KV + "Put", put(b"else", b"x", LOG_NAMESPACE))


def test_supervisors_share_no_keys() -> None:
    """Though all are workers of the head's one job."""
    world = supervised()
    world.ok(FIRST, KV + "Put", put(b"k"))
    world.ok(FIRST, KV + "Get", get(b"k"))
    world.no(SECOND, KV + "Get", get(b"k"))
    world.no(SECOND, KV + "Put", put(b"k"))


def test_keys_of_a_submitted_job_go_when_its_supervisor_has_ended() -> None:
    """But for what detached actors of the job may still need."""
    world = supervised()
    for uri, number in ((FIRST, 10), (SECOND, 11)):
        world.access.learn_job(uri, number)
        world.ok(uri, KV + "Put", put(b"of %d" % number))
        world.ok(uri, KV + "Put", put(fun(number), namespace=b"fun"))
        package = put(b"gcs://_ray_pkg_%d.zip" % number, namespace=b"")
        world.ok(uri, KV + "Put", package)
        world.access.added[job_id(number).hex()] = "head/head"
    lasting = actor(11, "")
    lasting.task_spec.actor_creation_task_spec.is_detached = True
    world.ok(SECOND, ACTOR + "RegisterActor", lasting)
    # Whom `ask` has made known as the owner ends as well.
    owner = lasting.task_spec.caller_address.worker_id.hex()
    world.access.workers.pop(owner)
    assert world.access.orphans() == []
    for uri in (FIRST, SECOND):
        foreign = worker_end(uri)
        world.no(N1, WORKER_INFO + "ReportWorkerFailure", foreign)
        foreign.worker_failure.worker_address.node_id = NODE_ID
        world.no(N1, WORKER_INFO + "ReportWorkerFailure", foreign)
    assert world.access.orphans() == []
    for uri in (FIRST, SECOND):
        world.ok(HEAD, WORKER_INFO + "ReportWorkerFailure", worker_end(uri))
    wanted = [(b"mine", b"of 10"), (b"fun", fun(10)), (b"mine", b"of 11")]
    assert sorted(world.access.orphans()) == sorted(wanted)
    again = world.new()
    again.replay(world.journal)
    assert sorted(again.orphans()) == sorted(wanted)


# -- keys that the GCS removes -----------------------------------------------------


def test_key_that_the_gcs_removed_is_not_counted_any_more() -> None:
    """Ray removes a job's functions and packages; they would fill its owner's quota."""
    world = limited(stored_bytes=500_000, write_bytes_per_s=1 << 30)
    for _ in range(5):
        world.ok(ALICE, KV + "Put", put(fun(ALICES), bytes(400_000), b"fun"))
        world.no(ALICE, KV + "Put", put(b"more", bytes(200_000)))
        absent = world.access.forget({b"fun": set()}, {})
        assert list(absent) == [(b"fun", fun(ALICES))]
        assert world.access.forget({b"fun": set()}, absent) == {}
    world.ok(ALICE, KV + "Put", put(b"more", bytes(200_000)))


def test_key_that_is_there_or_was_written_again_stays_counted() -> None:
    """A look into the GCS may be older than the call that was just let through."""
    world = limited(stored_bytes=500_000, write_bytes_per_s=1 << 30)
    write = put(fun(ALICES), bytes(400_000), b"fun", overwrite=False)
    world.ok(ALICE, KV + "Put", write)
    absent = world.access.forget({b"fun": set(), b"other": {b"x"}}, {})
    assert world.access.forget({b"fun": {fun(ALICES)}}, absent) == {}
    world.ok(ALICE, KV + "Put", write)
    assert list(world.access.forget({b"fun": set()}, absent)) == [(b"fun", fun(ALICES))]
    world.no(ALICE, KV + "Put", put(b"more", bytes(200_000)))


def test_key_that_was_removed_is_not_written_anew_uncounted() -> None:
    """``overwrite=False`` writes where the GCS has nothing any more."""
    world = limited(stored_bytes=500_000, write_bytes_per_s=1 << 30)
    world.ok(ALICE, KV + "Put", put(fun(ALICES), b"small", b"fun", overwrite=False))
    large = put(fun(ALICES), bytes(400_000), b"fun", overwrite=False)
    world.ok(ALICE, KV + "Put", large)
    world.no(ALICE, KV + "Put", put(b"more", bytes(200_000)))


# -- nodes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "claim", "says"),
    [
        ("spiffe://prod/node/ghost/raylet", {}, "is not in the inventory"),
        ("spiffe://prod/node/bad/raylet", {"address": "10.0.0.3"}, "is quarantined"),
        (N1, {"address": "10.0.0.9"}, "claims address"),
        (N1, {"address": ""}, "claims address"),
        (N1, {"address": "10.0.0.2 "}, "claims address"),
        (N1, {"head": True}, "claims to be the head"),
        (N1, {"resources": {"CPU": 5.0}}, "claims 5 of CPU"),
        (N1, {"resources": {"GPU": 1.0}}, "claims 1 of GPU"),
        (N1, {"resources": {"CPU": float("nan")}}, "claims nan of CPU"),
        (N1, {"resources": {"CPU": float("inf")}}, "claims inf of CPU"),
        (N1, {"resources": {"CPU": -1.0}}, "claims -1 of CPU"),
        (N1, {"resources": {"sandbox:off": 1.0}}, "of sandbox:off"),
        (N1, {"resources": {"node:10.0.0.1": 1.0}}, "of node:10.0.0.1"),
        (N1, {"resources": {"node:__internal_head__": 1.0}}, "__internal_head__"),
        (N1, {"resources": {"node:10.0.0.2": 9.0}}, "of node:10.0.0.2"),
        (N1, {"labels": {"zone": "b"}}, "claims label zone=b"),
        (N1, {"labels": {"trusted": "yes"}}, "claims label"),
    ],
)
def test_node_joins_as_its_entry_says_or_not_at_all(
    uri: str, claim: dict[str, Any], says: str
) -> None:
    """Each refusal is an alert; the same node with an honest claim joins."""
    world = World()
    said = world.no(uri, NODE + "RegisterNode", register(node_id=b"\5" * 28, **claim))
    assert says in said.why
    assert said.alert
    honest = register(
        node_id=b"\6" * 28, address="10.1.77.3", labels={"zone": "a", "ray.io/x": "y"},
        resources={"CPU": 4.0, "node:10.1.77.3": 1.0, "memory": 1e9},
    )  # fmt: skip
    world.ok(N1, NODE + "RegisterNode", honest)


def test_observing_lets_an_unlisted_node_in_and_alerts() -> None:
    """`observe` records and alerts; a quarantined node is refused nonetheless."""
    world = World(admission="observe")
    ghost = "spiffe://prod/node/ghost/raylet"
    said = world.ok(ghost, NODE + "RegisterNode", register(node_id=b"\5" * 28))
    assert said.alert
    assert "is not in the inventory" in said.note
    bad = "spiffe://prod/node/bad/raylet"
    said = world.no(
        bad, NODE + "RegisterNode", register(node_id=b"\6" * 28, address="10.0.0.3")
    )
    assert "is quarantined" in said.why
    honest = world.ok(N1, NODE + "RegisterNode", register())
    assert not honest.alert


def test_node_speaks_for_itself_alone(world: World) -> None:
    """Not for another's node id: to join with, to leave with, to sync with."""
    n2 = "spiffe://prod/node/n2/raylet"
    leave = pb.UnregisterNodeRequest(node_id=NODE_ID)
    assert world.no(n2, NODE + "UnregisterNode", leave).alert
    said = world.access.decide(uri=n2, method=STREAM, body=b"", node_id=NODE_ID.hex())
    assert not said.allowed
    said = world.access.decide(uri=N1, method=STREAM, body=b"", node_id=NODE_ID.hex())
    assert said.allowed
    world.ok(N1, NODE + "UnregisterNode", leave)


def test_job_is_added_by_its_drivers_node_once(world: World) -> None:
    """A node can't register a job that nobody was given, nor another node's."""
    message = pb.AddJobRequest()
    message.data.job_id = job_id(77)
    message.data.driver_address.node_id = NODE_ID
    message.data.driver_address.worker_id = b"\x33" * 28
    assert world.no(N1, JOB + "AddJob", message).alert
    message.data.job_id = job_id(ALICES)
    world.no(HEAD, JOB + "AddJob", message)
    world.ok(N1, JOB + "AddJob", message, request_id="again")
    end = pb.MarkJobFinishedRequest(job_id=job_id(ALICES))
    world.no(HEAD, JOB + "MarkJobFinished", end)
    world.ok(N1, JOB + "MarkJobFinished", end)


# -- limits -------------------------------------------------------------------------


def limited(**how: int) -> World:
    """Return a world whose drivers have small limits."""
    limit = {
        "calls_per_s": 10, "calls_burst": 10, "read_bytes_per_s": 100_000,
        "read_burst_bytes": 1_000_000, "write_bytes_per_s": 100_000,
        "write_burst_bytes": 1_000_000, "in_flight": 2, "stored_bytes": 1_000_000,
        **how,
    }  # fmt: skip
    return World(limits=Limits(roles={"driver": RoleLimit(**limit)}))


def test_written_bytes_are_charged_and_refill() -> None:
    """A burst, then the rate; refused for now, so that clients come back."""
    world = limited(write_burst_bytes=300_000, in_flight=99)
    big = put(b"k", bytes(250_000))
    world.ok(ALICE, KV + "Put", big)
    said = world.ask(ALICE, KV + "Put", big)
    assert (said.allowed, said.retry) == (False, True)
    world.ok(BOB, KV + "Put", put(b"b", bytes(250_000)))
    world.now += 2.1
    world.ok(ALICE, KV + "Put", big)


def test_call_over_its_rate_waits_and_is_then_refused() -> None:
    """Up to a second, which Ray's clients take as a slow answer; then come back."""
    world = limited(calls_per_s=10, calls_burst=10)
    waits = []
    for _ in range(40):
        said = world.ask(ALICE, KV + "Get", get(b"k"))
        waits.append(said.wait_s)
        if not said.allowed:
            break
    assert said.retry
    assert waits[5] == 0
    assert 0 < max(waits[:-1]) <= 1
    assert len(waits) < 25
    assert world.ok(BOB, KV + "Get", get(b"k")).wait_s == 0
    world.now += 5
    assert world.ok(ALICE, KV + "Get", get(b"k")).wait_s == 0


def test_refusals_are_held_back_and_counted() -> None:
    """A loop of calls that are refused for good is slowed down, and runs out."""
    world = limited(calls_per_s=10, calls_burst=10)
    said = world.no(BOB, ACTOR + "KillActorViaGcs", kill(ALICES))
    assert said.wait_s > 0
    for _ in range(40):
        said = world.ask(BOB, ACTOR + "KillActorViaGcs", kill(ALICES))
    assert said.retry


def test_more_workers_do_not_mean_more_of_the_gcs() -> None:
    """All workers of one driver share one account; another driver's do not."""
    world = World(
        limits=Limits(
            roles={
                "worker": RoleLimit(
                    calls_per_s=10, calls_burst=20, read_bytes_per_s=1 << 20,
                    read_burst_bytes=1 << 20, write_bytes_per_s=1 << 20,
                    write_burst_bytes=1 << 20, in_flight=9, stored_bytes=1 << 20,
                )
            }
        )
    )  # fmt: skip
    for index in range(60):
        worker = f"spiffe://prod/worker/n1/5e55105e00000001-w{index}"
        said = world.ask(worker, KV + "Get", get(fun(ALICES), b"fun"))
        said = world.ask(worker, KV + "Get", get(fun(ALICES), b"fun"))
    assert said.retry
    other = "spiffe://prod/worker/n1/5e55105e00000001-other"
    world.ok(other, KV + "Get", get(fun(BOBS), b"fun"))
    assert world.ok(other, KV + "Get", get(fun(BOBS), b"fun")).wait_s == 0


def test_request_over_the_burst_is_refused_for_good() -> None:
    """No wait would help; the message names the limit."""
    world = limited(write_burst_bytes=300_000)
    said = world.no(ALICE, KV + "Put", put(b"k", bytes(300_001)))
    assert "write_burst_bytes = 300000" in said.why


def test_reads_cost_what_the_key_holds() -> None:
    """Also when the caller gives up: it was charged before the GCS was asked."""
    world = limited(read_burst_bytes=600_000, in_flight=99)
    world.ok(ALICE, KV + "Put", put(b"k", bytes(400_000)))
    world.ok(ALICE, KV + "Get", get(b"k"))
    said = world.ask(ALICE, KV + "Get", get(b"k"))
    assert said.retry


def test_list_of_keys_costs_its_names() -> None:
    """And takes a place in flight, as a value of that size does."""
    world = limited(
        read_burst_bytes=600_000, calls_per_s=1000, calls_burst=1000, in_flight=1
    )
    for index in range(100):
        world.ok(ALICE, KV + "Put", put(b"%04d" % index + bytes(4000)))
    every = pb.InternalKVKeysRequest(namespace=b"mine", prefix=b"")
    world.ok(ALICE, KV + "Keys", every, request_id="a")
    world.now += 4
    assert "in flight" in world.ask(ALICE, KV + "Keys", every, request_id="b").why
    world.access.call_ended("a")
    world.ok(ALICE, KV + "Keys", every, request_id="c")
    world.access.call_ended("c")
    assert world.ask(ALICE, KV + "Keys", every, request_id="d").retry
    few = pb.InternalKVKeysRequest(namespace=b"mine", prefix=b"000")
    world.ok(ALICE, KV + "Keys", few, request_id="d")


def test_large_calls_in_flight_are_counted_until_they_end() -> None:
    """The place is free when the log says so, or after two minutes unheard."""
    world = limited(read_burst_bytes=1 << 30, read_bytes_per_s=1 << 30, in_flight=2)
    world.ok(ALICE, KV + "Put", put(b"k", bytes(400_000)), request_id="w")
    world.access.call_ended("w")
    world.ok(ALICE, KV + "Get", get(b"k"), request_id="a")
    world.ok(ALICE, KV + "Get", get(b"k"), request_id="b")
    assert world.ask(ALICE, KV + "Get", get(b"k"), request_id="c").retry
    world.access.call_ended("a")
    world.ok(ALICE, KV + "Get", get(b"k"), request_id="c")
    assert world.ask(ALICE, KV + "Get", get(b"k"), request_id="d").retry
    world.now += 121
    world.ok(ALICE, KV + "Get", get(b"k"), request_id="d")


def test_events_of_tasks_are_charged_as_what_is_kept() -> None:
    """From a bucket of their own: neither reads nor writes pay for them."""
    world = limited(
        write_bytes_per_s=10_000, write_burst_bytes=300_000, read_burst_bytes=1 << 20
    )
    events = pb.AddTaskEventDataRequest()
    events.data.events_by_task.add().task_id = b"t" * 24
    events.data.events_by_task[0].task_info.name = "x" * 200_000
    world.ok(ALICE, EVENTS, events)
    assert world.ask(ALICE, EVENTS, events).retry
    world.ok(ALICE, KV + "Put", put(b"k", bytes(250_000)))
    world.now += 2
    world.ok(ALICE, EVENTS, events)
    events.data.events_by_task[0].task_info.name = "x" * 300_000
    assert "write_burst_bytes" in world.no(ALICE, EVENTS, events).why


EVENTS = "/ray.rpc.TaskInfoGcsService/AddTaskEventData"


def test_request_of_many_parts_is_not_looked_through(world: World) -> None:
    """Two million empty ones have room in 4 MB, and held everybody up for seconds."""
    events = pb.AddTaskEventDataRequest()
    for _ in range(3000):
        events.data.events_by_task.add()
    assert "too many parts" in world.no(ALICE, EVENTS, events).why
    for each in events.data.events_by_task:
        each.task_id = b"t" * 24
    world.ok(ALICE, EVENTS, events)
    many = pb.InternalKVMultiGetRequest(namespace=b"mine", keys=[b""] * 10_001)
    assert "at most 10000" in world.no(ALICE, KV + "MultiGet", many).why
    many = pb.InternalKVMultiGetRequest(namespace=b"mine", keys=[b"k" * 4000] * 300)
    assert "at most 1048576" in world.no(ALICE, KV + "MultiGet", many).why
    few = pb.InternalKVMultiGetRequest(namespace=b"mine", keys=[b"k"] * 10_000)
    world.ok(ALICE, KV + "MultiGet", few)


def test_honest_batch_of_events_is_let_through(world: World) -> None:
    """Ray's largest: ten thousand, with what a task can have of each kind."""
    events = pb.AddTaskEventDataRequest()
    for _ in range(10_000):
        each = events.data.events_by_task.add()
        each.task_id, each.job_id = b"t" * 24, job_id(ALICES)
        each.task_info.task_id, each.state_updates.node_id = b"t" * 24, NODE_ID
        each.profile_events.component_id = b"x"
    world.ok(ALICE, EVENTS, events)


def test_request_that_is_refused_has_cost_its_bytes() -> None:
    """Whatever is wrong with it; and before it is looked into."""
    world = limited(write_burst_bytes=300_000, write_bytes_per_s=10_000)
    events = pb.AddTaskEventDataRequest()
    events.data.events_by_task.add().task_info.name = "x" * 200_000
    assert "malformed" in world.no(ALICE, EVENTS, events).why
    said = world.ask(ALICE, EVENTS, events)
    assert said.retry
    assert "refused calls" in said.why
    world.now += 3
    # What goes on is not charged for this too.
    events.data.events_by_task[0].task_id = b"t" * 24
    world.ok(ALICE, EVENTS, events)
    left = [a.refused.left for a in world.access._accounts.values()]
    assert 300_000 in left


def test_stored_bytes_have_a_ceiling_that_deleting_frees() -> None:
    """What stays in the GCS's memory is counted for who put it there."""
    world = limited(stored_bytes=500_000, write_bytes_per_s=1 << 30)
    world.ok(ALICE, KV + "Put", put(b"a", bytes(300_000)))
    world.now += 10
    said = world.no(ALICE, KV + "Put", put(b"b", bytes(300_000)))
    assert "stored_bytes" in said.why
    world.ok(ALICE, KV + "Put", put(b"a", bytes(400_000)))
    world.ok(ALICE, KV + "Del", delete(b"a"))
    world.ok(ALICE, KV + "Put", put(b"b", bytes(300_000)))


LARGE = 400_000


@pytest.mark.parametrize("message", [put(b"k", b"v"), delete(b"k")])
def test_write_that_was_given_up_has_not_happened(message: Any) -> None:
    """A key holds what it held until the GCS has answered: for reads and for quotas.

    Else a write of one byte that is cancelled while it is held back makes the next
    reads of megabytes free, and a deletion the megabytes nobody's.
    """
    method = KV + ("Put" if hasattr(message, "value") else "Del")
    world = limited(read_burst_bytes=600_000, stored_bytes=500_000)
    world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)))
    world.ok(ALICE, method, message, request_id="w")
    world.access.call_ended("w")
    world.no(ALICE, KV + "Put", put(b"more", bytes(200_000)))
    world.no(BOB, KV + "Put", put(b"k"))
    world.ok(ALICE, KV + "Get", get(b"k"))
    assert world.ask(ALICE, KV + "Get", get(b"k")).retry
    # It may be at work for some time; then one that is done is believed.
    for wait_s, size in ((0.0, LARGE + 1), (11.0, 2 if method.endswith("Put") else 0)):
        world.now += wait_s
        world.ok(ALICE, method, message)
        assert world.access._stored["driver/alice"] == size


def test_of_two_writes_at_a_time_the_larger_counts() -> None:
    """Which one was last, only the GCS knows."""
    world = limited(stored_bytes=900_000, write_bytes_per_s=1 << 30, in_flight=9)
    stored = world.access._stored
    for order in ("ab", "ba"):
        world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)), request_id="a")
        world.ok(ALICE, KV + "Put", put(b"k"), request_id="b")
        for call in order:
            world.access.call_ended(call, done=True)
        assert stored["driver/alice"] == LARGE + 1
        world.ok(ALICE, KV + "Put", put(b"k"))
        assert stored["driver/alice"] == 2
    # A deletion beside a write leaves what the write may have put there.
    world.ok(ALICE, KV + "Del", delete(b"k"), request_id="a")
    world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)), request_id="b")
    world.access.call_ended("a", done=True)
    world.access.call_ended("b", done=True)
    assert stored["driver/alice"] == LARGE + 1


def test_key_that_is_being_deleted_is_free_later() -> None:
    """Whoever writes it, or into the room that it takes, comes back for it."""
    world = limited(stored_bytes=500_000, write_bytes_per_s=1 << 30)
    world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)))
    world.ok(ALICE, KV + "Del", delete(b"k"), request_id="d")
    assert world.ask(BOB, KV + "Put", put(b"k")).retry
    assert world.ask(ALICE, KV + "Put", put(b"more", bytes(200_000))).retry
    world.access.call_ended("d", done=True)
    world.ok(BOB, KV + "Put", put(b"k"))
    world.ok(ALICE, KV + "Put", put(b"more", bytes(200_000)))


def test_end_that_is_never_heard_of_leaves_a_key_uncertain_for_minutes() -> None:
    """And no longer: the guard may have been started again."""
    world = limited(stored_bytes=900_000, write_bytes_per_s=1 << 30, in_flight=9)
    world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)), request_id="lost")
    world.ok(ALICE, KV + "Put", put(b"k"))
    assert world.access._stored["driver/alice"] == LARGE + 1
    world.now += 121
    world.ok(ALICE, KV + "Put", put(b"k"))
    assert world.access._stored["driver/alice"] == 2
    world.ok(ALICE, KV + "Put", put(b"k", bytes(LARGE)), request_id="open")
    world.access.call_ended("lost", done=True)
    world.ok(ALICE, KV + "Put", put(b"k"))
    assert world.access._stored["driver/alice"] == LARGE + 1


def test_name_of_a_job_that_is_being_deleted_is_a_new_ones() -> None:
    """The head's next call may come before the end of its last is known."""
    world, third = supervised(), "spiffe://prod/worker/head/5e55105e00000001-s3"
    world.ok(third, KV + "Get", get(fun(HEADS_JOB), b"fun"))
    world.ok(HEAD, KV + "Del", delete(state_of("a"), b"job"), request_id="d")
    world.ok(HEAD, KV + "Put", put(state_of("a"), STATE, b"job"))
    world.access.call_ended("d", done=True)
    world.no(FIRST, KV + "Get", get(state_of("a"), b"job"))
    world.ok(third, KV + "Get", get(state_of("a"), b"job"))


def test_refused_write_leaves_nothing_behind() -> None:
    """A write that was over a limit owns no key and stores no byte."""
    world = limited(write_burst_bytes=300_000)
    world.no(ALICE, KV + "Put", put(b"k", bytes(300_001)))
    world.ok(BOB, KV + "Put", put(b"k"))


# -- what has ended -----------------------------------------------------------------


def test_what_ended_is_forgotten_after_an_hour() -> None:
    """Of jobs, nodes and submitted jobs there would be ever more.

    What something may still be of stays, and nobody comes into its place.
    """
    world = supervised()
    info, alive = world.access, {NODE_ID.hex(), HEAD_NODE.hex()}
    tables = ("jobs", "job_namespace", "job_node", "added", "finished", "actors")

    def known(number: int) -> set[str]:
        job = job_id(number).hex()
        return {t for t in tables if any(k.endswith(job) for k in getattr(info, t))}

    def hours(count: float) -> None:
        for _ in range(round(count * 60)):
            world.now += 60
            info.let_past_go(alive)

    world.ok(N1, NODE + "RegisterNode", register(node_id=b"\x77" * 28))
    for number in (20, 21, 22):
        world.begin(ALICE, number)
        lasting = actor(number, "a")
        lasting.task_spec.actor_creation_task_spec.is_detached = number == 21
        world.ok(ALICE, ACTOR + "RegisterActor", lasting)
    world.ok(ALICE, KV + "Put", put(fun(22), namespace=b"fun"))
    info.learn_job(ALICE, 23)
    mine = "spiffe://prod/worker/n1/5e55105e00000001-w20"
    world.ok(mine, KV + "Get", get(fun(20), b"fun"))
    for number in (20, 21, 22):
        end = pb.MarkJobFinishedRequest(job_id=job_id(number))
        world.ok(N1, JOB + "MarkJobFinished", end)
    world.ok(HEAD, WORKER_INFO + "ReportWorkerFailure", worker_end(FIRST))
    world.ok(HEAD, KV + "Del", delete(state_of("a"), b"job"))
    hours(0.9)
    assert known(20) == {*tables}
    hours(0.2)
    assert known(20) == known(23) == set()
    assert known(21) == known(22) == {*tables}
    assert known(ALICES) == {"jobs", "job_namespace", "job_node", "added"}
    assert info.nodes.keys() == alive
    assert state_of("a").hex() not in info.submissions
    assert state_of("b").hex() in info.submissions
    # The job is nobody's now, its worker no other job's, its namespace alice's.
    world.no(ALICE, ACTOR + "KillActorViaGcs", kill(20))
    world.no(BOB, ACTOR + "KillActorViaGcs", kill(20))
    world.no(mine, KV + "Get", get(fun(BOBS), b"fun"))
    ask = pb.GetNamedActorInfoRequest(name="a", ray_namespace="ns20")
    world.no(BOB, ACTOR + "GetNamedActorInfo", ask)
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    for table in (*tables, "nodes", "submissions"):
        assert getattr(again, table) == getattr(info, table), table


def test_one_identity_has_so_many_numbers_of_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is written down when it is given, whatever becomes of it."""
    monkeypatch.setattr(access, "MOST_NUMBERS", 3)
    world = World()
    for number in (30, 31, 32):
        world.ok(ALICE, JOB + "GetNextJobID", pb.GetNextJobIDRequest())
        world.access.learn_job(ALICE, number)
    said = world.no(ALICE, JOB + "GetNextJobID", pb.GetNextJobIDRequest())
    assert "have not begun" in said.why
    world.ok(BOB, JOB + "GetNextJobID", pb.GetNextJobIDRequest())
    world.begin(ALICE, 30)
    world.ok(ALICE, JOB + "GetNextJobID", pb.GetNextJobIDRequest())


def test_number_that_is_given_anew_is_a_new_job(world: World) -> None:
    """The GCS may begin to count again."""
    end = pb.MarkJobFinishedRequest(job_id=job_id(ALICES))
    world.ok(N1, JOB + "MarkJobFinished", end)
    world.access.learn_job(BOB, ALICES)
    for _ in range(180):
        world.now += 60
        world.access.let_past_go({NODE_ID.hex()})
    assert world.access.jobs[job_id(ALICES).hex()] == "driver/bob"


# -- restart ------------------------------------------------------------------------


def test_restarted_service_knows_what_it_knew(world: World) -> None:
    """Owners of jobs, keys, namespaces, actors and nodes come back from the journal."""
    world.ok(ALICE, KV + "Put", put(b"k"))
    world.ok(ALICE, KV + "Put", put(b"gone"))
    world.ok(ALICE, KV + "Del", delete(b"gone"))
    world.ok(ALICE, ACTOR + "RegisterActor", actor(ALICES, "counter"))
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    facts = json.loads(json.dumps(world.journal))
    world.access = world.new()
    world.access.replay(facts)
    world.no(BOB, KV + "Put", put(b"k"))
    world.ok(BOB, KV + "Put", put(b"gone"))
    world.no(BOB, ACTOR + "KillActorViaGcs", kill(ALICES))
    world.ok(ALICE, ACTOR + "KillActorViaGcs", kill(ALICES))
    world.no(WORKER, KV + "Get", get(fun(BOBS), b"fun"))
    leave = pb.UnregisterNodeRequest(node_id=NODE_ID)
    world.ok(N1, NODE + "UnregisterNode", leave)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_object_in_the_log_is_text(name: str) -> None:
    """Hostile names of actors and keys are kept as text of bounded length."""
    world = _SHARED
    said = world.ask(ALICE, KV + "Get", get(name.encode("utf-8", "replace") * 3))
    assert len(said.object) < 500
    said.object.encode()


def test_audit_log_names_what_a_call_is_about(world: World) -> None:
    """Nodes, workers, groups and each key of a few: who asks later has only that."""
    node, worker = "11" * 28, worker_id(FIRST).hex()
    name = (
        f"placement group {group(ALICES).placement_group_spec.placement_group_id.hex()}"
    )
    made = group(ALICES)
    made.placement_group_spec.name = "g"
    identifier = made.placement_group_spec.placement_group_id
    drain = autoscaler_pb2.DrainNodeRequest(node_id=NODE_ID)  # type: ignore[attr-defined]
    keys = pb.InternalKVMultiGetRequest(
        namespace=b"mine", keys=[b"a", b"b", b"c", b"d", b"e", b"f"]
    )
    for uri, method, message, said in (
        (OPERATOR, AUTOSCALER + "DrainNode", drain, f"node {node}"),
        (N1, NODE + "UnregisterNode", pb.UnregisterNodeRequest(node_id=NODE_ID),
         f"node {node}"),
        (ALICE, GROUP + "CreatePlacementGroup", made, f"{name} g"),
        (ALICE, GROUP + "RemovePlacementGroup",
         pb.RemovePlacementGroupRequest(placement_group_id=identifier), name),
        (FIRST, WORKER_INFO + "AddWorkerInfo", worker_info(FIRST), f"worker {worker}"),
        (N1, WORKER_INFO + "ReportWorkerFailure", worker_end(FIRST),
         f"worker {worker}"),
        (ALICE, WORKER_INFO + "GetWorkerInfo",
         pb.GetWorkerInfoRequest(worker_id=worker_id(FIRST)), f"worker {worker}"),
        (ALICE, KV + "MultiGet", keys, "mine:a b c d and 2 more"),
        (ALICE, KV + "Del", delete(b"a", prefix=True), "mine:a*"),
        (ALICE, PIN, pb.PinRuntimeEnvURIRequest(uri="gcs://x", expiration_s=1),
         "gcs://x"),
    ):  # fmt: skip
        assert world.ask(uri, method, message).object == said


def test_actor_is_owned_by_who_asks(world: World) -> None:
    """A forged owner would have the GCS end the actor, or itself, for another."""
    forged = actor(ALICES, "x")
    forged.task_spec.caller_address.worker_id = b"\x33" * 28
    world.access.workers["33" * 28] = BOB
    body = frame(forged)
    said = world.access.decide(uri=ALICE, method=ACTOR + "RegisterActor", body=body)
    assert "owner is not the caller" in said.why


POLL = "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriberPoll"
NEWS = "/ray.rpc.ObservabilityPubSubService/GcsSubscriberCommandBatch"


def poll(identifier: bytes) -> Any:
    """Return the request by which a client waits for news."""
    return pb.GcsSubscriberPollRequest(subscriber_id=identifier)


def driver_id(number: int) -> bytes:
    """Return the worker id of a job's driver, as Ray makes it."""
    return job_id(number) + b"\xff" * 24


def on_n1(identifier: bytes, kind: str = "AddWorkerInfo") -> Any:
    """Return the request by which a worker of n1 begins, or its node ends it."""
    message = getattr(pb, f"{kind}Request")()
    part = "worker_data" if kind == "AddWorkerInfo" else "worker_failure"
    address = getattr(message, part).worker_address
    address.worker_id, address.node_id = identifier, NODE_ID
    return message


def test_news_are_for_who_asked_for_them(world: World) -> None:
    """By the id of a driver, a worker, a node, and one that somebody made up."""
    world.ok(WORKER, WORKER_INFO + "AddWorkerInfo", on_n1(b"\x44" * 28))
    cancel = pb.GcsSubscriberCommandBatchRequest()
    cancel.commands.add(channel_type="GCS_NODE_INFO_CHANNEL")
    cancel.commands[0].unsubscribe_message.SetInParent()
    for identifier, mine, others in (
        (driver_id(ALICES), ALICE, (BOB, WORKER, N1)),
        (b"\x44" * 28, WORKER, (ALICE, N1)),
        (NODE_ID, N1, (ALICE, BOB, WORKER)),
        (b"\x55" * 28, BOB, (ALICE, WORKER, N1)),
    ):
        world.ok(mine, POLL, poll(identifier))
        cancel.subscriber_id = identifier
        for uri in others:
            said = world.no(uri, POLL, poll(identifier))
            assert "is another's" in said.why
            world.no(uri, NEWS, cancel)
        world.ok(mine, NEWS, cancel)
    assert "without an id" in world.no(ALICE, POLL, poll(b"")).why


def test_one_identity_has_so_many_names(world: World) -> None:
    """The GCS keeps memory for each, for minutes; its own worker's id is no other."""
    most = world.settings.limits.held_calls
    for number in range(most):
        if not number % 100:
            world.now += 1
        world.ok(ALICE, POLL, poll(number.to_bytes(28, "big")))
    said = world.ask(ALICE, POLL, poll(b"\x55" * 28))
    assert not said.allowed
    assert said.retry
    assert "limits.held_calls" in said.why
    world.ok(ALICE, POLL, poll((1).to_bytes(28, "big")))
    world.ok(ALICE, POLL, poll(driver_id(ALICES)))
    world.ok(BOB, POLL, poll(b"\x55" * 28))
    # Forgotten, but for the one that was used again.
    world.now += 890
    world.ok(ALICE, POLL, poll(b"\x56" * 28))
    world.now += 100
    world.ok(BOB, POLL, poll((2).to_bytes(28, "big")))


def test_worker_that_has_ended_speaks_no_more(world: World) -> None:
    """Its certificate may have been read, and lasts for a year."""
    program, made_up = b"\x45" * 28, b"\x46" * 28
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    for identifier in (b"\x44" * 28, program, made_up):
        world.ok(WORKER, WORKER_INFO + "AddWorkerInfo", on_n1(identifier))
    ended = WORKER_INFO + "ReportWorkerFailure"
    # A program that it started is not the worker.
    world.ok(N1, ended, on_n1(program, "ReportWorkerFailure"))
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    world.ok(N1, ended, on_n1(b"\x44" * 28, "ReportWorkerFailure"))
    # What it has sent before is let in, for its own job.
    world.now += 9
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    world.no(WORKER, KV + "Get", get(fun(BOBS), b"fun"))
    for identifier in (b"\x44" * 28, b"\x47" * 28):
        world.no(WORKER, WORKER_INFO + "AddWorkerInfo", on_n1(identifier))
    world.now += 2
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    compacted = world.new()
    compacted.replay(json.loads(json.dumps(list(again.facts()))))
    for number in (ALICES, BOBS):
        for each in (world.access, again, compacted):
            world.access = each
            said = world.no(WORKER, KV + "Get", get(fun(number), b"fun"))
            assert said.why == "the worker has ended"
    assert not [w for w, uri in world.access.workers.items() if uri == WORKER]
    assert WORKER not in world.access.bound


def test_workers_of_an_earlier_session_speak_no_more(world: World) -> None:
    """Also those of which nobody said that they ended; other machines' are others."""
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    world.ok(WORKER, WORKER_INFO + "AddWorkerInfo", on_n1(b"\x44" * 28))
    other = "spiffe://prod/worker/n1/0000111100000009-w1"
    namesake = "spiffe://prod/worker/head/5e55105e00000001-w1"
    for uri in (other, namesake):
        world.ok(uri, KV + "Get", get(fun(ALICES), b"fun"))
    later = WORKER.replace("5e55105e00000001", "5e55105e00000002")
    world.ok(later, KV + "Get", get(fun(BOBS), b"fun"))
    said = world.no(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    assert said.why == "the worker has ended"
    for uri in (other, namesake):
        world.ok(uri, KV + "Get", get(fun(ALICES), b"fun"))
    # What is known of them is not kept, here or by who takes the journal up.
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    for each in (world.access, again):
        assert WORKER not in each.bound
        assert WORKER not in each.workers.values()
    assert sorted(map(str, again.facts())) == sorted(map(str, world.access.facts()))
    nameless = "spiffe://prod/worker/n1/w1"
    assert "no session" in world.no(nameless, KV + "Get", get(fun(BOBS), b"fun")).why


def test_head_that_begins_anew_takes_no_worker_of_before(
    world: World, tmp_path: Path
) -> None:
    """It has forgotten what they were bound to: they would be free for any job."""
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(fact) for fact in world.journal]
    path.write_text("\n".join([*lines, '["sessions", "n1/5e']) + "\n")
    world.access = world.new()
    world.access.replay(sessions.closed(path))
    for uri, number in ((ALICE, ALICES), (BOB, BOBS)):
        world.access.learn_job(uri, number)
    said = world.no(WORKER, KV + "Get", get(fun(BOBS), b"fun"))
    assert said.why == "the worker has ended"
    later = WORKER.replace("5e55105e00000001", "5e55105e00000002")
    world.ok(later, KV + "Get", get(fun(BOBS), b"fun"))
    assert sessions.closed(tmp_path / "none") == []


def test_sessions_of_a_machine_follow_each_other(tmp_path: Path) -> None:
    """Also where the clock was set back; another machine's are its own."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, other = sessions.begin(tmp_path / "a"), sessions.begin(tmp_path / "b")
    assert first[:8] != other[:8]
    assert sessions.current(tmp_path / "a") == first
    second = sessions.begin(tmp_path / "a")
    assert second[:8] == first[:8]
    assert second[8:] > first[8:]
    file = tmp_path / "a" / "session"
    host = file.read_text().split(" ")[1]
    file.write_text(f"{first[:8]}f0000000 {host}")
    assert sessions.begin(tmp_path / "a") == first[:8] + "f0000001"
    for other in ("damaged", f"{first} another-host", first):
        file.write_text(other)
        assert sessions.begin(tmp_path / "a")[:8] != first[:8]
    # Who was given another name meanwhile goes on with what it has begun.
    file.write_text(f"{first} another-host")
    assert sessions.current(tmp_path / "a") == first


def test_worker_ids_are_few_and_ones_own(world: World) -> None:
    """Of a job's driver, nobody else's; what one registers evicts nobody else's."""
    info = WORKER_INFO + "AddWorkerInfo"
    world.no(BOB, info, on_n1(driver_id(ALICES)))
    world.no(WORKER, info, on_n1(driver_id(ALICES)))
    world.ok(ALICE, info, on_n1(driver_id(ALICES)))
    world.ok(
        N1, JOB + "MarkJobFinished", pb.MarkJobFinishedRequest(job_id=job_id(BOBS))
    )
    world.no(BOB, info, on_n1(driver_id(BOBS)))
    for number in range(16):
        world.ok(WORKER, info, on_n1(number.to_bytes(28, "big")))
    said = world.no(WORKER, info, on_n1(b"\x44" * 28))
    assert "16 worker ids" in said.why
    # Nor a node's, or one that somebody waits for news under.
    world.ok(BOB, POLL, poll(b"\x55" * 28))
    for identifier in (NODE_ID, b"\x55" * 28):
        said = world.no(ALICE, info, on_n1(identifier))
        assert said.why == "the worker id is another's"
    for identifier in ((3).to_bytes(28, "big"), driver_id(ALICES)):
        message = register(node_id=identifier)
        said = world.no(N1, NODE + "RegisterNode", message)
        assert said.why == "the node id is a worker's"
    world.ok(WORKER, info, on_n1((3).to_bytes(28, "big")))


def test_actors_of_who_has_ended_are_nobodys(world: World) -> None:
    """The GCS aborts when one of them is said to be out of scope."""
    world.ok(ALICE, WORKER_INFO + "AddWorkerInfo", on_n1(driver_id(ALICES)))
    mine = actor(ALICES, "")
    mine.task_spec.caller_address.worker_id = driver_id(ALICES)
    world.ok(ALICE, ACTOR + "RegisterActor", mine)
    ask = pb.ReportActorOutOfScopeRequest(
        actor_id=mine.task_spec.actor_creation_task_spec.actor_id
    )
    end = ACTOR + "ReportActorOutOfScope"
    world.ok(ALICE, end, ask)
    again = world.new()
    again.replay(json.loads(json.dumps(world.journal)))
    for each in (world.access, again):
        world.access = each
        world.ok(ALICE, end, ask)
    gone = on_n1(driver_id(ALICES), "ReportWorkerFailure")
    world.ok(N1, WORKER_INFO + "ReportWorkerFailure", gone)
    world.no(ALICE, end, ask)
    assert world.access.actor_owner == {}


def test_one_worker_s_actors_push_out_its_own_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of too many the oldest is nobody's any more: unknown is refused."""
    monkeypatch.setattr(access, "MOST_ACTORS", 2)

    def made(owner: str, job: int, number: int) -> pb.ReportActorOutOfScopeRequest:
        ask = actor(job, "", count=number)
        ask.task_spec.caller_address.worker_id = driver_id(job)
        world.ok(owner, ACTOR + "RegisterActor", ask)
        made = ask.task_spec.actor_creation_task_spec
        return pb.ReportActorOutOfScopeRequest(actor_id=made.actor_id)

    for owner, job in ((ALICE, ALICES), (BOB, BOBS)):
        world.ok(owner, WORKER_INFO + "AddWorkerInfo", on_n1(driver_id(job)))
    bobs = made(BOB, BOBS, 1)
    first, *others = (made(ALICE, ALICES, number) for number in range(3))
    end = ACTOR + "ReportActorOutOfScope"
    said = world.no(ALICE, end, first)
    assert said.why == "the actor's owner is not the caller, or has ended"
    for ask in others:
        world.ok(ALICE, end, ask)
    world.ok(BOB, end, bobs)
