"""Random requests to a GCS of its own, through the decisions of the access service.

    python fuzz.py SEED SECONDS

Whatever the access service lets a driver, worker, observer or node say, the GCS
must survive; and whatever a method is asked that the guard does not look into.
Answers with one JSON object: how many calls were let through, of which methods,
and those after which the GCS was gone.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.core.generated import gcs_service_pb2 as pb

from raysandbox.cluster.access import Access
from raysandbox.cluster.methods import METHODS, PLAIN, STREAM
from raysandbox.cluster.settings import Access as Grants
from raysandbox.cluster.settings import Inventory, Settings
from raysandbox.cluster.shapes import ID_BYTES, request_types

PORT = 17771
JOB = b"\1\0\0\0"
ROLES = ("driver", "worker", "observer", "node")
NODE_ID = b"a" * 28


class Gcs:
    """A stock GCS with one job in it, and what the access service knows of that."""

    def __init__(self) -> None:
        binary = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs"
        scratch = tempfile.mkdtemp(dir="/tmp")
        self.log = Path(scratch) / "said"
        self.process = subprocess.Popen(
            [str(binary / "gcs_server"), f"--log_dir={scratch}", "--config_list=e30=",
             f"--gcs_server_port={PORT}", "--node-ip-address=127.0.0.1",
             "--session-name=s", f"--session-dir={scratch}", f"--node-id={'aa' * 28}",
             "--metrics-agent-port=0"],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", PORT), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{PORT}", [("grpc.use_local_subchannel_pool", 1)]
        )
        ask = pb.AddJobRequest()
        ask.data.job_id = JOB
        ask.data.driver_address.worker_id = b"w" * 28
        self.call("/ray.rpc.JobInfoGcsService/AddJob", ask.SerializeToString(), 10)
        self.access = Access(
            Settings(name="lab", head_address="127.0.0.1"), Inventory(), Grants()
        )
        self.access.jobs[JOB.hex()] = "driver/x"
        self.access.added[JOB.hex()] = self.access.job_node[JOB.hex()] = "node/x"
        self.access.nodes[NODE_ID.hex()] = "node/x"
        self.access.workers[(b"w" * 28).hex()] = "spiffe://lab/driver/x/y"

    def why(self) -> str:
        """Return what it said when it ended."""
        lines = self.log.read_text(errors="replace").splitlines()
        fatal = [line for line in lines if "Check failed" in line or " C " in line]
        return "; ".join(fatal)[-600:] or "; ".join(lines[-30:])[-1500:]

    def call(self, method: str, body: bytes, timeout_s: float) -> None:
        """Call and don't care."""
        stub = self.channel.unary_unary(method, lambda raw: raw, lambda raw: raw)
        try:
            stub(body, timeout=timeout_s)
        except grpc.RpcError:
            pass


class Maker:
    """Makes random messages, most of whose identifiers are plausible."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def bytes_of(self, name: str) -> bytes:
        """Return bytes for a field."""
        roll = self.random.random()
        if roll < 0.1:
            return b""
        if roll < 0.12:
            return b"x"
        if name.endswith("job_id"):
            return JOB
        size = ID_BYTES.get(name)
        if size is None:
            return self.random.choice([b"k", b"fun", b"y" * 28])
        tail = JOB if name in ("actor_id", "placement_group_id") else b""
        return b"a" * (size - len(tail)) + tail

    def fill(self, message: Any, depth: int = 0) -> None:
        """Set about two thirds of the fields."""
        for field in message.DESCRIPTOR.fields:
            if self.random.random() < 0.35 or depth > 4:
                continue
            many = field.is_repeated
            if field.type == field.TYPE_MESSAGE:
                if field.message_type.GetOptions().map_entry:
                    self.map_of(message, field)
                    continue
                inner = getattr(message, field.name)
                self.fill(inner.add() if many else inner, depth + 1)
                if not many:
                    inner.SetInParent()
                continue
            value = self.scalar(field)
            if value is None:
                continue
            if many:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)

    def map_of(self, message: Any, field: Any) -> None:
        """Put one pair into a map of numbers by name, such as resources."""
        value = field.message_type.fields_by_name["value"]
        if value.type == value.TYPE_DOUBLE:
            amount = self.random.choice([1.0, 0.0, -1.0, float("nan"), 1e300])
            getattr(message, field.name)["CPU"] = amount

    def scalar(self, field: Any) -> Any:
        """Return a value for a plain field, None for one that is left alone."""
        if field.type == field.TYPE_BYTES:
            return self.bytes_of(field.name)
        if field.type == field.TYPE_ENUM:
            return self.random.choice(field.enum_type.values).number
        if field.type == field.TYPE_STRING:
            return self.random.choice(["x", "", "127.0.0.1", "gcs://p.zip"])
        if field.type == field.TYPE_BOOL:
            return self.random.random() < 0.5
        if field.type in (field.TYPE_INT32, field.TYPE_INT64):
            return self.random.choice([0, 1, -1, 2**31 - 1, -(2**31)])
        if field.type in (field.TYPE_UINT32, field.TYPE_UINT64):
            return self.random.choice([0, 1, 2**31 - 1])
        return None

    def make(self, kind: Any) -> Any:
        """Return a message; one of an actor is often what an actor's must be."""
        message = kind()
        self.fill(message)
        if hasattr(message, "task_spec") and self.random.random() < 0.8:
            spec = message.task_spec
            spec.type, spec.job_id = 1, JOB
            spec.actor_creation_task_spec.actor_id = b"a" * 12 + JOB
            spec.actor_creation_task_spec.ray_namespace = "n"
            spec.caller_address.worker_id = b"w" * 28
            spec.caller_address.node_id = NODE_ID
        return message


def main() -> None:
    """Fuzz until the time is over."""
    maker, end = Maker(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    kinds = request_types(frozenset().union(*(METHODS[r] for r in ROLES)) - {STREAM})
    gcs, asked, passed = Gcs(), 0, 0
    methods: set[str] = set()
    recent: list[str] = []
    aborts: dict[str, str] = {}
    while time.monotonic() < end:
        role = maker.random.choice(ROLES)
        method = maker.random.choice(sorted(METHODS[role] - {STREAM}))
        message = maker.make(kinds[method])
        body = message.SerializeToString()
        asked += 1
        if method not in PLAIN:
            decision = gcs.access.decide(
                uri=f"spiffe://lab/{role}/x/y", method=method, request_id=str(asked),
                body=b"\0" + len(body).to_bytes(4, "big") + body,
            )  # fmt: skip
            # What it costs is tested elsewhere.
            gcs.access._accounts.clear()
            if not decision.allowed:
                continue
        passed += 1
        methods.add(method)
        recent = [*recent[-8:], method.rpartition("/")[2]]
        gcs.call(method, body, 0.1)
        gcs.access.call_ended(str(asked), done=True)
        if gcs.process.poll() is not None:
            aborts[gcs.why()] = f"{recent}\n{message}"[:4000]
            gcs = Gcs()
    time.sleep(0.5)
    if gcs.process.poll() is not None:
        aborts[gcs.why()] = str(recent)
    gcs.process.kill()
    print(json.dumps({"asked": asked, "passed": passed, "methods": sorted(methods),
                      "aborts": aborts}))  # fmt: skip
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
