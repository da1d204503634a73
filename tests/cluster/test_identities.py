"""Who may speak to a running cluster: certificates, admission, quarantine, audit.

One head and one node on real Ray, a driver, and a rogue that has whatever the
attack needs. Each refusal has its positive control: the same call with a good
identity.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster import pki
from tests.cluster.conftest import (
    CLI,
    HEAD,
    METRICS_PORT,
    NODE,
    PORTS,
    ROGUE,
    SMALL,
    WEBHOOK_PORT,
    Driver,
    Hardened,
)
from tests.cluster.lab import Host, wait_for

pytestmark = pytest.mark.root

NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
REGISTER = "/ray.rpc.NodeInfoGcsService/RegisterNode"
DRAIN = "/ray.rpc.autoscaler.AutoscalerStateService/DrainNode"
PROBES = Path(__file__).parent / "probes"


class Cluster:
    """The cluster under test, as its operator sees it."""

    def __init__(self, hardened: Hardened) -> None:
        self.hardened, self.lab, self.dir = hardened, hardened.lab, hardened.dir
        self.head, self.node, self.rogue = (
            hardened.head, hardened.node, hardened.rogue
        )  # fmt: skip
        self.path, self.registry = hardened.path, hardened.registry
        self.alice = self.head.home / "alice"
        self._callers: dict[str, subprocess.Popen[str]] = {}
        self.alerts = self.head.home / "alerts"
        self.hook = self.head.popen(
            sys.executable, str(PROBES / "webhook.py"), str(WEBHOOK_PORT),
            str(self.alerts),
        )  # fmt: skip

    def cli(
        self, *args: str, check: bool = True, cluster: bool = True,
        host: Host | None = None,
    ) -> Any:  # fmt: skip
        """Run a command of ours on the head, or for another member on its host."""
        host = host or self.head
        more = ("--cluster", str(host.home / "c")) if cluster else ()
        index = args.index("--") if "--" in args else len(args)
        whole = (*args[:index], *more, *args[index:])
        if "up" in args:
            return host.run(*CLI, *whole, check=check, timeout_s=120)
        return host.raysandbox(*whole, check=check)

    def issue(
        self, role: str, name: str, address: str, out: Path | None = None
    ) -> Path:
        """Issue an identity; returns its directory."""
        out = out or self.lab.path / f"{role}-{name}"
        self.registry.issue(role, name, [address], out)
        return out

    def call(
        self,
        cert: Path | None,
        key: Path | None,
        method: str = NODES,
        kind: str = "GetAllNodeInfoRequest",
        fields: Any = None,
        host: Host | None = None,
    ) -> dict[str, Any]:
        """Call the guard from a host, by default the rogue's."""
        return self.ask(
            host or self.rogue, address=f"{HEAD}:6379", cert=cert, key=key,
            method=method, kind=kind, fields=fields or {},
        )  # fmt: skip

    def ask(self, host: Host, **what: Any) -> dict[str, Any]:
        """Have the probe on a host make one call."""
        if host.name not in self._callers:
            self._callers[host.name] = subprocess.Popen(
                host.argv([sys.executable, str(PROBES / "call.py")]),
                env=host.env({"GRPC_VERBOSITY": "NONE"}), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        probe = self._callers[host.name]
        assert probe.stdin is not None
        assert probe.stdout is not None
        what |= {"ca": self.dir.ca_cert, "token": self.dir.token}
        probe.stdin.write(json.dumps(what, default=str) + "\n")
        probe.stdin.flush()
        return dict(json.loads(probe.stdout.readline()))

    def close(self) -> None:
        """End the probes."""
        for probe in self._callers.values():
            probe.kill()
            probe.wait()
            for pipe in (probe.stdin, probe.stdout):
                if pipe is not None:
                    pipe.close()

    def call_as(self, member: Path, component: str, **how: Any) -> dict[str, Any]:
        """Call with a member's own certificate."""
        identity = member / "identity"
        return self.call(
            identity / f"{component}.pem", identity / f"{component}.key", **how
        )

    def minted(self, leaf: bytes, key: Any, name: str) -> tuple[Path, Path]:
        """Put a chain and a key where a host can read them."""
        paths = self.lab.path / f"{name}.pem", self.lab.path / f"{name}.key"
        paths[0].write_bytes(leaf)
        paths[1].write_bytes(pki.key_pem(key))
        return paths

    def audit(self, *filters: str) -> list[dict[str, Any]]:
        """Return what the audit log says, by the command that users have."""
        out = self.cli("audit", "--json", *filters).stdout
        return [json.loads(line) for line in out.splitlines()]

    def metrics(self) -> str:
        """Return the Prometheus page."""
        return self.head.python(
            "import urllib.request as u;"
            f"print(u.urlopen('http://127.0.0.1:{METRICS_PORT}/').read().decode())"
        ).stdout

    def alerted(self) -> list[dict[str, Any]]:
        """Return what the webhook received."""
        if not self.alerts.exists():
            return []
        return [json.loads(line) for line in self.alerts.read_text().splitlines()]

    def alive(self) -> set[str]:
        """Return the names of the nodes that Ray holds alive."""
        out = self.cli("cluster", "status", "--json", check=False)
        return {node["name"] for node in json.loads(out.stdout)["nodes"]}


@pytest.fixture(scope="module")
def cluster(hardened: Hardened) -> Iterator[Cluster]:
    """The cluster, running; the last tests here end it."""
    hardened.end_drivers()
    made = Cluster(hardened)
    yield made
    made.close()


# -- certificates -------------------------------------------------------------------


def test_driver_of_the_cluster_is_answered(cluster: Cluster) -> None:
    """The positive control of all that follows."""
    said = cluster.call_as(cluster.alice, "driver")
    assert said["code"] == "OK"
    assert said["bytes"] > 200


def _leaf(issuer: pki.Issuer, uri: str, **how: Any) -> tuple[bytes, Any]:
    key = pki.new_key()
    return pki.pem(issuer.leaf(uri, [ROGUE], key.public_key(), **how)), key


DRIVER = "spiffe://lab/driver/alice/driver"


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("another CA of the same name", DRIVER),
        ("expired", DRIVER),
        ("not valid yet", DRIVER),
        ("signed by another driver", DRIVER),
    ],
)
def test_certificate_that_proves_nothing_fails_the_handshake(
    cluster: Cluster, name: str, uri: str
) -> None:
    """It is refused before a call is made, and the log says from where."""
    root = cluster.registry.root()
    alice = cluster.alice / "identity"
    if name.startswith("another"):
        chain, key = _leaf(pki.Issuer.root("lab cluster CA"), uri)
    elif name == "expired":
        chain, key = _leaf(root, uri, days=-0.002)
    elif name == "not valid yet":
        key = pki.new_key()
        builder = pki._builder(
            pki._name("x"), root.cert.subject, key.public_key(), pki._in(5)
        )
        builder._not_valid_before = dt.datetime.now(dt.timezone.utc).replace(
            tzinfo=None
        ) + dt.timedelta(hours=1)
        chain = pki.pem(
            builder.add_extension(pki._sans(uri, [ROGUE]), False).sign(
                root.key, pki.hashes.SHA256()
            )
        )
    else:
        leaf = pki.load_chain(alice / "driver.pem")[0]
        chain, key = _leaf(pki.Issuer(leaf, pki.load_key(alice / "driver.key")), uri)
        chain += pki.pem(leaf)
    before = time.time()
    said = cluster.call(*cluster.minted(chain, key, "bad"))
    assert said["code"] == "UNAVAILABLE", said
    wait_for(
        "the refusal in the log",
        lambda: [
            r for r in cluster.audit("--denied", "--what", "handshake", "--who", ROGUE)
            if r["t"] >= before - 1
        ],
    )  # fmt: skip


def test_no_certificate_fails_the_handshake(cluster: Cluster) -> None:
    """The token alone, which every worker has, opens nothing."""
    assert cluster.call(None, None)["code"] == "UNAVAILABLE"


def test_revoked_certificate_is_refused_at_once(cluster: Cluster) -> None:
    """It works, is revoked, and works no more when the command has returned."""
    bob = cluster.issue("driver", "bob", ROGUE)
    assert cluster.call_as(bob, "driver")["code"] == "OK"
    out = cluster.cli("cluster", "certs", "revoke", "driver/bob")
    assert "in force" in out.stdout
    assert cluster.call_as(bob, "driver")["code"] == "UNAVAILABLE"
    assert cluster.call_as(
        cluster.alice, "driver"
    )["code"] == "OK"  # fmt: skip


def test_revocation_ends_connections_that_are_open(cluster: Cluster) -> None:
    """A driver that is connected is out within seconds of its revocation."""
    eve = cluster.issue("driver", "eve", ROGUE)
    code = f"""
import sys, time
sys.argv = ["call.py"]
sys.path.insert(0, {str(PROBES)!r})
import grpc
from pathlib import Path
from ray.core.generated import gcs_service_pb2 as pb
at = Path({str(eve / "identity")!r})
credentials = grpc.ssl_channel_credentials(
    Path({str(cluster.dir.ca_cert)!r}).read_bytes(),
    (at / "driver.key").read_bytes(), (at / "driver.pem").read_bytes())
token = ("authorization", "Bearer " + Path({str(cluster.dir.token)!r}).read_text())
with grpc.secure_channel("{HEAD}:6379", credentials) as channel:
    call = channel.unary_unary({NODES!r})
    while True:
        try:
            call(pb.GetAllNodeInfoRequest().SerializeToString(), timeout=5,
                 metadata=[token])
            print("ok", flush=True)
        except grpc.RpcError as error:
            print(error.code().name, flush=True)
            break
        time.sleep(0.1)
"""
    process = cluster.rogue.popen(sys.executable, "-c", code, log="eve.log")
    log = cluster.rogue.home / "eve.log"
    wait_for("eve's calls", lambda: log.exists() and log.read_text().count("ok") > 3)
    cluster.cli("cluster", "certs", "revoke", "driver/eve")
    process.wait(timeout=60)
    assert log.read_text().split()[-1] == "UNAVAILABLE"


JOB = """
import pathlib, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote
class Counter:
    def __init__(self):
        self.value = 0
    def add(self):
        self.value += 1
        return self.value

@ray.remote(num_cpus=0.1)
def square(x):
    return x * x

counter = Counter.options(num_cpus=0.1).remote()
print("begun", ray.get(counter.add.remote()), flush=True)
end, done, over = time.time() + 60, 0, pathlib.Path("over")
while time.time() < end and not (over.exists() and done > 5):
    assert ray.get(square.remote(done)) == done * done
    assert ray.get(counter.add.remote()) == done + 2
    done += 1
late = Counter.options(num_cpus=0.1, name="late").remote()
assert ray.get(late.add.remote()) == 1
print("done", done, flush=True)
"""


def test_job_goes_on_while_others_are_revoked(cluster: Cluster) -> None:
    """A revocation cuts every connection once; honest calls don't notice.

    Tasks and an actor's calls before, during and after two revocations, and a new
    actor at the end: none fails.
    """
    honest = cluster.issue("driver", "honest", NODE)
    for name in ("mal", "lory"):
        cluster.issue("driver", name, ROGUE)
    job = cluster.node.popen(
        *CLI, "cluster", "env", "--cluster", str(honest), "--", sys.executable, "-c",
        JOB, log="job.log",
    )  # fmt: skip
    log = cluster.node.home / "job.log"
    wait_for("the job", lambda: log.exists() and "begun 1" in log.read_text(), 60)
    for name in ("mal", "lory"):
        cluster.cli("cluster", "certs", "revoke", f"driver/{name}")
    (cluster.node.home / "over").touch()
    assert job.wait(timeout=60) == 0, log.read_text()[-3000:]
    assert int(log.read_text().split("done ")[1]) > 5


def _node_issuer(cluster: Cluster) -> pki.Issuer:
    path = cluster.node.home / "c" / "workers"
    return pki.Issuer.load(path / "issuer.pem", path / "issuer.key")


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://lab/worker/head/0123456789abcdef-1",
        "spiffe://lab/worker/node2/0123456789abcdef-1",
        DRIVER,
        "spiffe://lab/operator/root/cli",
        "spiffe://lab/head/head/raylet",
        "spiffe://lab/node/node/raylet",
    ],
)
def test_node_can_mint_its_own_workers_alone(cluster: Cluster, uri: str) -> None:
    """The issuer's key of a node is good for its workers, and nothing else.

    On the node itself, with a good chain: any other identity is refused.
    """
    issuer = _node_issuer(cluster)
    for wanted, code in (
        ("spiffe://lab/worker/node/0123456789abcdef-1", "OK"),
        (uri, "PERMISSION_DENIED"),
    ):  # fmt: skip
        chain, key = _leaf(issuer, wanted)
        paths = cluster.minted(chain + pki.pem(issuer.cert), key, "minted")
        said = cluster.call(*paths, host=cluster.node)
        assert said["code"] == code, (wanted, said)


def test_node_can_not_mint_for_another_cluster_of_the_ca(cluster: Cluster) -> None:
    """The issuer's name constraints hold at the handshake."""
    issuer = _node_issuer(cluster)
    chain, key = _leaf(issuer, "spiffe://other/worker/node/0123456789abcdef-1")
    paths = cluster.minted(chain + pki.pem(issuer.cert), key, "other")
    assert cluster.call(*paths, host=cluster.node)["code"] == "UNAVAILABLE"


def test_stolen_node_identity_is_bound_to_its_address(cluster: Cluster) -> None:
    """A node's own certificate and key work there, and not from the rogue's machine."""
    stolen = cluster.node.home / "c"
    assert cluster.call_as(stolen, "raylet", host=cluster.node)["code"] == "OK"
    assert cluster.call_as(stolen, "raylet")["code"] == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("role", "component", "code"),
    [
        ("operator", "cli", "OK"),
        ("observer", "cli", "DENIED"),
        ("driver", "driver", "DENIED"),
    ],
)
def test_role_decides_the_method(
    cluster: Cluster, role: str, component: str, code: str
) -> None:
    """Draining a node is for operators; looking at nodes is for all of them."""
    who = cluster.issue(role, f"{role}-x", ROGUE)
    assert cluster.call_as(who, component)["code"] == "OK"
    # An empty request: to drain no node is all that it asks.
    said = cluster.call_as(who, component, method=DRAIN)
    assert ("DENIED" in said["code"]) == (code == "DENIED"), said


# -- admission ----------------------------------------------------------------------


def _register(node_id: bytes, address: str, **more: Any) -> dict[str, Any]:
    info = {
        "nodeId": base64.b64encode(node_id).decode(), "nodeManagerAddress": address,
        "resourcesTotal": {"CPU": 1.0}, **more,
    }  # fmt: skip
    return {"nodeInfo": info}


def test_unexpected_node_is_refused_logged_counted_and_alerted(
    cluster: Cluster,
) -> None:
    """A node with a valid certificate that is not in the inventory can't join.

    The log, the metrics and the webhook say so.
    """
    stranger = cluster.issue("node", "stranger", ROGUE)
    said = cluster.call_as(
        stranger, "raylet", method=REGISTER, kind="RegisterNodeRequest",
        fields=_register(b"\1" * 28, ROGUE),
    )  # fmt: skip
    assert said["code"] == "PERMISSION_DENIED"
    assert "stranger" not in cluster.alive()
    wait_for(
        "the refusal in the log",
        lambda: cluster.audit("--denied", "--who", "node/stranger"),
    )
    wait_for(
        "the alert at the webhook",
        lambda: [a for a in cluster.alerted() if a["alert"] == "unexpected_node"],
    )
    assert 'rsb_alerts_total{alert="unexpected_node"} 0.0' not in cluster.metrics()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (_register(b"\2" * 28, ROGUE), "claims address"),
        (_register(b"\2" * 28, NODE, isHeadNode=True), "claims to be the head"),
        (_register(b"\2" * 28, NODE, resourcesTotal={"GPU": 8.0}), "claims 8 of GPU"),
        (_register(b"\2" * 28, NODE, labels={"trust": "high"}), "claims label"),
    ],
)
def test_node_that_claims_more_than_its_entry_is_refused(
    cluster: Cluster, fields: dict[str, Any], says: str
) -> None:
    """Its own certificate, from its own address: address, head, ceilings, labels."""
    said = cluster.call_as(
        cluster.node.home / "c", "raylet", method=REGISTER,
        kind="RegisterNodeRequest", fields=fields, host=cluster.node,
    )  # fmt: skip
    assert said["code"] == "PERMISSION_DENIED"
    assert says in said["details"]
    wait_for(
        "the alert",
        lambda: [a for a in cluster.alerted() if says in a.get("why", "")],
    )


def test_node_that_bypassed_the_guard_is_found_and_removed(cluster: Cluster) -> None:
    """A node that got into the GCS without passing the guard is taken out.

    It is put there with the guard's own key, as root on the head could.
    """
    identity = cluster.path / "identity"
    port = cluster.dir.settings().gcs_port
    said = cluster.ask(
        cluster.head, address=f"127.0.0.1:{port}", method=REGISTER,
        cert=identity / "guard-inner.pem", key=identity / "guard-inner.key",
        kind="RegisterNodeRequest",
        fields=_register(b"\3" * 28, ROGUE, nodeName="smuggled", state="ALIVE"),
    )  # fmt: skip
    assert said["code"] == "OK", said
    wait_for(
        "the alert",
        lambda: [
            a for a in cluster.alerted() if a["alert"] == "node_without_admission"
        ],
    )
    wait_for("its end", lambda: "smuggled" not in cluster.alive())
    assert {"head", "node"} <= cluster.alive()


# -- renewal ------------------------------------------------------------------------


def _serial(host: Host, address: str, port: int) -> int:
    """Return the serial number of what a port serves right now."""
    out = host.python(
        "import ssl; "
        "c = ssl._create_unverified_context(); import socket; "
        f"s = socket.create_connection(({address!r}, {port}), 5); "
        "c.set_alpn_protocols(['h2']); w = c.wrap_socket(s); "
        "print(ssl.DER_cert_to_PEM_cert(w.getpeercert(True)))"
    )
    return pki.x509.load_pem_x509_certificate(out.stdout.encode()).serial_number


def _of(path: Path) -> int:
    return pki.load_chain(path)[0].serial_number


def _raylet_port(host: Host) -> int:
    """Return the port of a host's raylet."""
    for line in host.run("ss", "-ltnpH").stdout.splitlines():
        if '"raylet"' in line:
            return int(line.split()[3].rpartition(":")[2])
    raise AssertionError("raylet listens nowhere")


def test_guard_takes_a_new_certificate_without_a_restart(cluster: Cluster) -> None:
    """The guard serves a renewed certificate when the command returns.

    Its process is the same. Ray's processes serve what they read at their start:
    that is what the rolling restart is for.
    """
    alice = cluster.alice
    pid = (cluster.path / "run" / "envoy.pid").read_text()
    before = _serial(cluster.head, HEAD, 6379)
    raylet = _of(cluster.dir.cert("raylet"))
    assert before == _of(cluster.dir.cert("guard"))
    cluster.cli("cluster", "certs", "renew", "head/head", "--out", str(cluster.path))
    assert _of(cluster.dir.cert("guard")) != before
    assert _serial(cluster.head, HEAD, 6379) == _of(cluster.dir.cert("guard"))
    assert (cluster.path / "run" / "envoy.pid").read_text() == pid
    assert _serial(cluster.head, HEAD, _raylet_port(cluster.head)) == raylet
    assert _of(cluster.dir.cert("raylet")) != raylet
    assert cluster.call_as(alice, "driver")["code"] == "OK"
    assert {"head", "node"} <= cluster.alive()


def _shim(cluster: Cluster, host: Host) -> None:
    """Make a `raysandbox` that runs on a host of the lab."""
    shim = cluster.lab.path / f"{host.name}-bin"
    shim.mkdir()
    kept = ("HOME", "PATH", "PYTHONPATH", "RAY_USAGE_STATS_ENABLED")
    env = [f"{k}={v}" for k, v in host.env().items() if k in kept]
    env.append(f"RAYSANDBOX_POLICY={host.policy}")
    # The script's own directory for temporary files is no host's: what two of them
    # share there is each other's raylet socket.
    argv = host.argv(["env", "-u", "TMPDIR", *env, *CLI])
    command, start = shlex.join(argv), [*SMALL, *PORTS]
    (shim / "raysandbox").write_text(
        f'#!/bin/sh\ncase "$2" in up) set -- "$@" -- {shlex.join(start)};; esac\n'
        f'exec {command} "$@"\n'
    )
    (shim / "raysandbox").chmod(0o755)


def _rolling(cluster: Cluster) -> str:
    """Return the script that renews all, with `on` and `copy` for this lab."""
    how = cluster.lab.path / "how"
    if not how.exists():
        # The operator's commands run on the head, what `on` says on the node.
        for host in (cluster.head, cluster.node):
            _shim(cluster, host)
        how.write_text(
            f'on() {{ shift; (PATH={cluster.lab.path}/node-bin:$PATH; eval "$*"); }}\n'
            'copy() { cp -r "$1/." "$3/"; }\n'
        )
    there = cluster.node.home / "c"
    text: str = cluster.cli(
        "cluster", "certs", "rolling", "--within-days", "400", "--member-dir",
        str(there),
    ).stdout  # fmt: skip
    return text


def _run(cluster: Cluster, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=120,
        env={
            "PATH": f"{cluster.lab.path}/head-bin:/usr/bin:/bin",
            "ROLLING_HOW": str(cluster.lab.path / "how"),
            "TMPDIR": str(cluster.lab.path), "DRAIN_S": "60",
        },
    )  # fmt: skip


def _on_the_node(cluster: Cluster) -> Driver:
    """Alice, who has ``on``: what sleeps on the node; and ``slow``, which may there."""
    alice = cluster.hardened.shared("alice")
    alice(
        "from ray.util.scheduling_strategies import "
        "NodeAffinitySchedulingStrategy as On\n"
        "@ray.remote(max_retries=0)\n"
        "def slow(seconds):\n"
        "    time.sleep(seconds); return 'finished'\n"
        "there = next(n for n in ray.nodes()\n"
        "             if n['Alive'] and n['NodeName'] == 'node')\n"
        "on = slow.options(scheduling_strategy=On(there['NodeID'], soft=False))\n"
        "ray.get(on.remote(0), timeout=60)"
    )
    return alice


def test_rolling_script_renews_and_restarts_a_node(cluster: Cluster) -> None:
    """What `certs rolling` prints renews a node and brings it back.

    It is run as it is, with `on` and `copy` for this lab. The raylet serves its old
    certificate until it ends, and the new one afterwards. It is drained first: what
    runs there is finished.
    """
    there = cluster.node.home / "c"
    old = _of(there / "identity" / "raylet.pem")
    assert _serial(cluster.node, NODE, _raylet_port(cluster.node)) == old
    text = _rolling(cluster)
    script = text[: text.index("# The guard takes")]
    for line in ("driver/", "operator/", "observer/", "node/stranger"):
        # Only the one node whose machine is there.
        script = "\n\n".join(
            part for part in script.split("\n\n") if f"echo {line}" not in part
        )
    alice = _on_the_node(cluster)
    alice("waiting = on.remote(4)")
    out = _run(cluster, script)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "node has finished and left" in out.stdout
    assert alice("result = ray.get(waiting, timeout=20)") == "finished"
    new = _of(there / "identity" / "raylet.pem")
    assert new != old
    assert _serial(cluster.node, NODE, _raylet_port(cluster.node)) == new
    wait_for("it in the cluster", lambda: "node" in cluster.alive())


def test_rolling_script_renews_and_restarts_the_head(cluster: Cluster) -> None:
    """The last part of what `certs rolling` prints: guard, GCS, raylet, dashboard.

    All serve new certificates afterwards, and the node is in the cluster again.
    """
    cluster.hardened.end_drivers()
    gcs = cluster.dir.settings().gcs_port
    text = _rolling(cluster)
    start = text.index("# The guard takes")
    out = _run(cluster, text[: text.index("\necho ")] + "\n" + text[start:])
    assert out.returncode == 0, out.stdout + out.stderr
    for component, address, port in (
        ("guard", HEAD, 6379), ("gcs", "127.0.0.1", gcs),
        ("raylet", HEAD, _raylet_port(cluster.head)),
    ):  # fmt: skip
        now = _of(cluster.dir.cert(component))
        assert _serial(cluster.head, address, port) == now, component
    wait_for("both in the cluster", lambda: {"head", "node"} <= cluster.alive())


# -- quarantine, and what is recorded -----------------------------------------------


def test_audit_verifies_and_is_anchored(cluster: Cluster) -> None:
    """The log of all this is unbroken, also against the anchors outside."""
    out = cluster.cli("audit", "--json")
    assert len(out.stdout.splitlines()) > 50
    found = json.loads(
        cluster.head.raysandbox("audit", "--cluster", str(cluster.path), "verify",
                                "--json").stdout
    )  # fmt: skip
    assert found["ok"]
    assert found["checked_against_outside"]
    record = next(
        r for r in cluster.audit("--who", "driver/alice")
        if r["ok"] and r["source"].startswith(ROGUE)
    )  # fmt: skip
    assert {"t", "who", "role", "source", "method", "in", "out", "ms"} <= set(record)
    assert record["who"] == "driver/alice/driver"


def test_doctor_audits_the_running_cluster(cluster: Cluster) -> None:
    """Machine readable, exit 0 when nothing is a problem."""
    out = cluster.head.run(
        *CLI, "doctor", "--cluster", str(cluster.path), "--json", check=False
    )
    found = json.loads(out.stdout)
    rows = {row["check"]: row for row in found["checks"]}
    bad = [row for row in found["checks"] if row["state"] == "problem"]
    assert (out.returncode, bad) == (0, []), out.stderr
    for check in (
        "certificate gcs", "nothing open in clear", "audit log unbroken",
        "nodes are those of the inventory", "revocation lists",
    ):  # fmt: skip
        assert rows[check]["state"] == "ok", rows[check]


def _return(cluster: Cluster) -> None:
    """Release the node and start it again, with the keys that it was given."""
    there, new = cluster.node.home / "c", cluster.lab.path / f"n{time.monotonic_ns()}"
    cluster.cli("cluster", "release", "node", "--out", str(new))
    cluster.cli("cluster", "down", host=cluster.node)
    shutil.rmtree(there)
    shutil.copytree(new, there)
    cluster.hardened.start_node()
    wait_for("it in the cluster", lambda: "node" in cluster.alive())


def test_drained_quarantine_lets_tasks_finish(cluster: Cluster, now: float) -> None:
    """What runs there finishes, and then the node is out and its old keys are dead.

    It does not wait for the deadline, and the other node takes work all the while.
    The control: with those keys the node started, and its calls were answered.
    """
    alice = _on_the_node(cluster)
    assert cluster.call_as(cluster.node.home / "c", "raylet", host=cluster.node)[
        "code"
    ] == "OK"  # fmt: skip
    alice("waiting = on.remote(5); elsewhere = slow.remote(0)")
    began = time.monotonic()
    out = cluster.cli("cluster", "quarantine", "node", "--drain=90")
    assert time.monotonic() - began < 85
    assert "node has finished and left" in out.stdout
    assert alice("result = ray.get([waiting, elsewhere], timeout=20)") == [
        "finished", "finished",
    ]  # fmt: skip
    assert "node" not in cluster.alive()
    # Those that were renewed before, too.
    assert len(set(re.findall("revoked spiffe://lab/.*", out.stdout))) == 4
    cluster.hardened.expect_event(now, event="node_quarantined", object="^node/node$")
    _cannot_return(cluster)
    assert alice("result = ray.get(slow.remote(0), timeout=60)") == "finished"
    _return(cluster)


def _cannot_return(cluster: Cluster) -> None:
    """Its old keys open nothing: no call, no registration, no start of the node."""
    old, since = cluster.node.home / "c", time.time()
    for how in (
        {}, {"method": REGISTER, "kind": "RegisterNodeRequest",
             "fields": _register(b"\2" * 28, NODE)},
    ):  # fmt: skip
        said = cluster.call_as(old, "raylet", host=cluster.node, **how)
        assert said["code"] == "UNAVAILABLE"
    cluster.hardened.expect_event(since, event="handshake_refused", source=f"^{NODE}")
    cluster.cli("cluster", "down", host=cluster.node)
    out = cluster.node.run(
        *CLI, "start", "--cluster=c", f"--address={HEAD}:6379", *SMALL, *PORTS,
        check=False, timeout_s=30,
    )  # fmt: skip
    assert out.returncode != 0
    assert "CERTIFICATE_REVOKED" in out.stderr
    assert "`raysandbox cluster release`" in out.stderr
    assert "node" not in cluster.alive()


def test_drained_quarantine_does_not_wait_forever(cluster: Cluster, now: float) -> None:
    """What outlives the deadline is named; the quarantine is in force all the same."""
    alice = _on_the_node(cluster)
    alice(
        "at = On(there['NodeID'], soft=False)\n"
        "long = slow.options(name='end\x1b[31mless', scheduling_strategy=at)\n"
        "endless = long.remote(600)"
    )
    wait_for(
        "it running",
        lambda: alice(
            "from ray.util.state import list_tasks\n"
            "result = [t.state for t in list_tasks() if 'end' in t.name]"
        ) == ["RUNNING"],
    )  # fmt: skip
    began = time.monotonic()
    out = cluster.cli("cluster", "quarantine", "node", "--drain=4")
    assert 4 <= time.monotonic() - began < 90
    assert "after 4 s still runs task end" in out.stderr
    assert "quarantined nonetheless" in out.stderr
    assert "\x1b" not in out.stderr
    assert "in force" in out.stdout
    cluster.hardened.expect_event(now, event="node_quarantined", object="^node/node$")
    wait_for("its end", lambda: "node" not in cluster.alive(), timeout_s=30)
    assert alice("result = ray.get(slow.remote(0), timeout=60)") == "finished"
    _return(cluster)


def test_quarantine_ends_a_node_and_release_takes_new_keys(cluster: Cluster) -> None:
    """A quarantined node goes out of Ray; it and its workers are refused.

    After release the old keys stay dead and the new ones work.
    """
    old = cluster.node.home / "c"
    assert "node" in cluster.alive()
    assert cluster.call_as(old, "raylet", host=cluster.node)["code"] == "OK"
    out = cluster.cli("cluster", "quarantine", "node")
    assert "in force" in out.stdout
    wait_for("its end", lambda: "node" not in cluster.alive(), timeout_s=30)
    assert cluster.call_as(old, "raylet", host=cluster.node)["code"] == "UNAVAILABLE"
    issuer = _node_issuer(cluster)
    chain, key = _leaf(issuer, "spiffe://lab/worker/node/0123456789abcdef-1")
    paths = cluster.minted(chain + pki.pem(issuer.cert), key, "late")
    assert cluster.call(*paths, host=cluster.node)["code"] == "UNAVAILABLE"
    again = cluster.lab.path / "again"
    cluster.cli("cluster", "release", "node", "--out", str(again))
    assert cluster.call_as(old, "raylet", host=cluster.node)["code"] == "UNAVAILABLE"
    assert cluster.call_as(again, "raylet", host=cluster.node)["code"] == "OK"
    cluster.cli("cluster", "down", host=cluster.node)
    shutil.rmtree(old)
    shutil.copytree(again, old)


def test_status_and_down_say_what_is_so(cluster: Cluster) -> None:
    """Exit 0 while up, 3 when down; `down` leaves no process; twice is no error."""
    out = cluster.cli("cluster", "status", "--json", check=False)
    assert out.returncode == 0, out.stdout
    found = json.loads(out.stdout)
    assert found["running"]
    assert {"gcs_server", "raylet", "helpers"} <= set(found["processes"])
    again = cluster.cli("cluster", "up", check=False)
    assert (again.returncode, "is up already" in again.stderr) == (1, True)
    ended = json.loads(cluster.cli("cluster", "down", "--json").stdout)["ended"]
    assert {"gcs_server", "raylet", "helpers"} <= set(ended)

    def left() -> list[str]:
        lines = cluster.head.run("ps", "-eo", "stat=,args=").stdout.splitlines()
        return [
            line for line in lines
            if "ray" in line and line[0] != "Z" and "probes" not in line
        ]  # fmt: skip

    # The keeper of the node's groups ends by itself, after the last of them.
    wait_for("nothing of ours", lambda: not left(), timeout_s=40)
    out = cluster.cli("cluster", "status", check=False)
    assert out.returncode == 3
    assert "DOWN" in out.stdout
    assert "nothing" in cluster.cli("cluster", "down").stdout
    found = json.loads(
        cluster.head.raysandbox("audit", "--cluster", str(cluster.path), "verify",
                                "--json").stdout
    )  # fmt: skip
    assert found["ok"], found
