"""What works on stock Ray 2.60, with its token, and not here: T1, T3, T4."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster import pki
from raysandbox.cluster.methods import METHODS, PLAIN
from tests.cluster.conftest import (
    DASHBOARD,
    HEAD,
    NODE,
    PORT,
    ROGUE,
    SMALL,
    STOCK,
    TRUSTED,
    Attack,
    Driver,
    Hardened,
    Stock,
    memory_bytes,
)
from tests.cluster.lab import Lab, wait_for

pytestmark = pytest.mark.root
MARKER = b"TOP-SECRET-" + b"9d3f1c" * 8
DENIED = "PERMISSION_DENIED"
HONEST = (
    "@ray.remote(num_cpus=0.1)\n"
    "def f():\n"
    "    return 'honest'\n"
    "@ray.remote(num_cpus=0)\n"
    "class Actor:\n"
    "    def ping(self):\n"
    "        return 'pong'\n"
    "assert ray.get(f.remote(), timeout=60) == 'honest'\n"
    "a = Actor.options(name='vault', lifetime='detached').remote()\n"
    "assert ray.get(a.ping.remote(), timeout=60) == 'pong'\n"
    "g = ray._private.worker.global_worker.gcs_client\n"
    "g.internal_kv_put(b'secret', b'of alice', True, b'alice')\n"
    "result = [ray.get_runtime_context().get_job_id(), a._actor_id.hex()]"
)


class Victim:
    """Alice at work: a function, a named actor and a key."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.job, self.actor = driver(HONEST)

    def calls_again(self) -> str:
        """Call the function in a worker that has not met it yet."""
        env = f"{{'env_vars': {{'FRESH': '{time.monotonic_ns()}'}}}}"
        answer: str = self.driver(
            f"result = ray.get(f.options(runtime_env={env}).remote(), timeout=60)"
        )
        return answer

    def lives(self) -> bool:
        """Whether the actor still answers."""
        answer = self.driver.ask("result = ray.get(a.ping.remote(), timeout=20)")
        return answer.get("result") == "pong"


@pytest.fixture(scope="module")
def victim(hardened: Hardened) -> Victim:
    return Victim(hardened.shared("alice"))


@pytest.fixture(scope="module")
def mallory(hardened: Hardened) -> Driver:
    return hardened.shared("mallory")


@pytest.fixture(scope="module")
def stock_victim(stock: Stock) -> Iterator[Victim]:
    driver = Driver(stock.host, init="namespace='of-alice'")
    yield Victim(driver)
    driver.close()


@pytest.fixture(scope="module")
def evil_function(stock: Stock) -> str:
    """The bytes that a job's function is replaced with, as hex."""
    code = (
        "import sys, ray.cloudpickle as cp\n"
        "def f(): return 'evil'\n"
        "sys.stdout.write(cp.dumps(f).hex())"
    )
    return stock.host.python(code).stdout


# -- T1: nodes that must not join -----------------------------------------------------


def test_rogue_node_joins_stock_and_not_here(
    hardened: Hardened, stock: Stock, stock_victim: Victim, now: float
) -> None:
    """A raylet with the shared token joins stock Ray, gets tasks and reads arguments.

    Here it has the token too, and a driver's certificate, and is refused.
    """
    rogue = hardened.rogue
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(stock.token)}
    rogue.run("ray", "start", f"--address={STOCK}:{PORT}", "--resources={\"loot\": 1}",
              *SMALL, env=token)  # fmt: skip
    assert stock_victim.driver(
        "@ray.remote(resources={'loot': 1})\n"
        "def loot(secret):\n"
        "    return os.uname().nodename, secret\n"
        "result = ray.get(loot.remote('s3cret'), timeout=60)"
    ) == ["rogue", "s3cret"]  # fmt: skip
    rogue.reboot()
    before = hardened.alive()
    target = hardened.target("mallory")
    stolen = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": target["token"],
        "RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": target["ca"],
        "RAY_TLS_SERVER_CERT": target["cert"], "RAY_TLS_SERVER_KEY": target["key"],
    }  # fmt: skip
    rogue.popen("ray", "start", f"--address={HEAD}:{PORT}", *SMALL, env=stolen)
    wait_for("a refusal", lambda: hardened.events(now, method="RegisterNode"), 40)
    hardened.expect_event(now, who="driver/mallory", method="RegisterNode", ok="False")
    assert hardened.alive() == before
    rogue.reboot()


@pytest.mark.parametrize("name", ["mallory", "olga", "otto"])
def test_other_roles_register_no_node(
    hardened: Hardened, stock: Stock, attack: Attack, now: float, name: str
) -> None:
    """RegisterNode is for nodes; on stock Ray it is for whoever has the token."""
    node = {"address": ROGUE}
    assert attack(stock.target, "register_node", node)["listed"]
    component = "driver" if name == "mallory" else "cli"
    assert attack(hardened.target(name, component), "register_node", node)["code"] == (
        DENIED
    )
    hardened.expect_event(now, who=name, method="RegisterNode", ok="False")


def test_workers_certificate_registers_no_node(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """A worker's certificate, taken where user code runs, makes no node."""
    run = hardened.node.home / "c" / "run"
    stolen = next(iter([*run.glob("workers-used/*.pem"), *run.glob("workers/*.pem")]))
    target = {**hardened.target("node", "raylet"), "cert": str(stolen),
              "key": str(stolen)}  # fmt: skip
    answer = attack(target, "register_node", {"address": NODE}, host="node")
    assert answer["code"] == DENIED
    hardened.expect_event(now, who="worker/node", method="RegisterNode", ok="False")


def test_stolen_node_identity_is_bound_to_its_address(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """A node's certificate and key, used from another machine, are worth nothing."""
    target = hardened.target("node", "raylet")
    assert attack(target, "register_node", {"address": NODE, "name": "node"})[
        "code"
    ] == (DENIED)
    event = hardened.expect_event(now, who="node/node", method="RegisterNode")
    assert event["source"].startswith(ROGUE)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ({"address": ROGUE}, "claims address"),
        ({"address": NODE, "head": True}, "claims to be the head"),
        ({"address": NODE, "resources": {"CPU": 64.0}}, "claims 64 of CPU"),
        ({"address": NODE, "labels": {"zone": "vault"}}, "claims label"),
    ],
)
def test_node_joins_only_as_the_inventory_says(
    hardened: Hardened, attack: Attack, now: float, claim: dict[str, Any], why: str
) -> None:
    """A real node that claims more than its entry is refused, and somebody is told."""
    target = hardened.target("node", "raylet")
    answer = attack(target, "register_node", claim, host="node")
    assert answer["code"] == DENIED
    assert why in answer["details"]
    assert hardened.expect_event(now, event="unexpected_node")["alert"]


def test_node_ends_no_other_node(
    hardened: Hardened, stock: Stock, attack: Attack, now: float
) -> None:
    """On stock Ray whoever has the token ends nodes; here not even a node does."""
    made = attack(stock.target, "register_node", {"address": ROGUE})
    assert attack(stock.target, "unregister_node", made["node_id"])["code"] == "OK"
    head = re.search(
        r"node ([0-9a-f]{56})", str(hardened.events(who="head/head/raylet"))
    )
    assert head
    answer = attack(
        hardened.target("node", "raylet"), "unregister_node", head[1], host="node"
    )
    assert answer["code"] == DENIED
    hardened.expect_event(now, who="node/node", method="UnregisterNode", ok="False")


# -- T4: who speaks, and in what ------------------------------------------------------


def test_plaintext_is_refused(
    hardened: Hardened, stock: Stock, attack: Attack, now: float
) -> None:
    """Stock Ray talks to whoever connects; the guard hangs up without TLS."""
    clear = {"address": f"{HEAD}:{PORT}", "token": hardened.target("mallory")["token"]}
    assert attack(stock.target, "list_keys", "fun", "")["code"] == "OK"
    assert attack(clear, "list_keys", "fun", "")["code"] == "UNAVAILABLE"
    hardened.expect_event(now, event="handshake_refused", source=ROGUE)


def test_other_cas_certificate_is_refused(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """The same identity, signed by a CA of the attacker's own, opens nothing."""
    rogue = hardened.rogue
    rogue.raysandbox("cluster", "init", "own", "--name=lab")
    rogue.raysandbox("cluster", "certs", "issue", "driver", "alice", "--cluster=own",
                     f"--address={ROGUE}", "--out=forged")  # fmt: skip
    forged = rogue.home / "forged" / "identity"
    target = {**hardened.target("alice"), "cert": str(forged / "driver.pem"),
              "key": str(forged / "driver.key")}  # fmt: skip
    assert attack(target, "read", "alice", "secret")["code"] == "UNAVAILABLE"
    event = hardened.expect_event(now, event="handshake_refused", source=ROGUE)
    assert "CERTIFICATE_VERIFY_FAILED" in event["why"]


def test_expired_certificate_is_refused(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """A certificate of the cluster's own CA opens nothing once it has expired."""
    hardened.cli("certs", "issue", "driver", "late", "--out=late",
                 f"--address={ROGUE}", "--days=0.00002")  # fmt: skip
    target = hardened.target("late")
    leaf = pki.load_chain(Path(target["cert"]))[0]
    time.sleep(max(0, leaf.not_valid_after_utc.timestamp() - time.time()))
    assert attack(target, "read", "x", "y")["code"] == "UNAVAILABLE"
    hardened.expect_event(now, event="handshake_refused", source=ROGUE)
    out = hardened.head.run(*hardened.env("late"), "true", check=False)
    assert out.returncode == 1
    assert "expired on" in out.stderr


def test_revoked_certificate_is_refused(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """A revocation takes hold without a restart."""
    hardened.issue("driver", "gone", "gone", ROGUE)
    target = hardened.target("gone")
    assert attack(target, "overwrite", "gone", "k", "v")["code"] == "OK"
    hardened.cli("certs", "revoke", "driver/gone")
    assert attack(target, "read", "gone", "k")["code"] == "UNAVAILABLE"
    hardened.expect_event(now, event="handshake_refused", source=ROGUE)


def test_marker_on_the_wire(
    hardened: Hardened, stock: Stock, attack: Attack, lab: Lab, tmp_path: Path,
    mallory: Driver,
) -> None:  # fmt: skip
    """A sniffer on the bridge reads stock Ray's payloads, and none of ours.

    Keys, arguments and objects between nodes carry a marker.
    """
    text = MARKER.decode()

    def seen(work: Any) -> bool:
        file = tmp_path / f"{time.monotonic_ns()}.pcap"
        tcpdump = lab.sniff(file)
        try:
            work()
            wait_for("packets", lambda: file.stat().st_size > 10_000, 5)
        finally:
            tcpdump.terminate()
            tcpdump.wait(10)
        data = file.read_bytes()
        assert len(data) > 10_000, "the sniffer saw nothing at all"
        return MARKER in data

    def here() -> None:
        assert attack(hardened.target("mallory"), "overwrite", "wire", "k", text)[
            "code"
        ] == "OK"  # fmt: skip
        assert (
            mallory(
                "import numpy\n"
                "from ray.util.scheduling_strategies import "
                "NodeAffinitySchedulingStrategy as On\n"
                f"m = {MARKER!r}\n"
                "@ray.remote(num_cpus=0.1)\n"
                "def f(big, small):\n"
                "    return len(bytes(big)), small == m\n"
                "big = ray.put(numpy.frombuffer(m * 40000, dtype='u1'))\n"
                "nodes = [n['NodeID'] for n in ray.nodes() if n['Alive']]\n"
                "result = ray.get([\n"
                "    f.options(scheduling_strategy=On(n, soft=False)).remote(big, m)\n"
                "    for n in nodes], timeout=60)"
            )
            == [[len(MARKER) * 40000, True]] * 2
        )

    assert seen(lambda: attack(stock.target, "overwrite", "wire", "k" * 9000, text))
    assert not seen(here)


# -- T3.1: nothing but the guard reaches the GCS, nor any plain port ------------------


def test_real_gcs_is_reached_by_the_guard_alone(
    hardened: Hardened, attack: Attack
) -> None:
    """The GCS's own port is closed to the network, and to the head's own processes.

    Even the head's raylet, with its certificate, can't go around the guard.
    """
    port = PORT + 10000
    for host in ("rogue", "node"):
        answer = attack({"address": f"{HEAD}:{port}"}, "plain_ports", [port], host=host)
        assert answer["answers"] == {str(port): "ConnectionRefusedError"}
    there = {"address": f"127.0.0.1:{port}"}
    for name, component in (("mallory", "driver"), ("c", "raylet"), ("c", "guard")):
        target = {**hardened.target(name, component), **there}
        answer = attack(target, "list_keys", "fun", "", host="head")
        assert answer["code"] == "UNAVAILABLE", (name, component)
    inner = {**hardened.target("c", "guard-inner"), **there}
    assert attack(inner, "list_keys", "session", "", host="head")["code"] == "OK"


def _listening(host: Any) -> set[int]:
    code = (
        "from raysandbox.cluster.surfaces import listening\n"
        "print(*{item.port for item in listening()})"
    )
    return {int(port) for port in host.python(code).stdout.split()}


def test_no_port_answers_in_clear(
    hardened: Hardened, stock: Stock, attack: Attack
) -> None:
    """Agents and metrics of stock Ray answer HTTP from the network; ours do not."""

    def answers(host: Any) -> dict[str, str]:
        target = {"address": f"{host.address}:0"}
        found = attack(target, "plain_ports", sorted(_listening(host)))["answers"]
        assert len(found) > 3
        return {k: v for k, v in found.items() if v.startswith("HTTP/1")}

    assert answers(stock.host)
    assert answers(hardened.head) == {}
    assert answers(hardened.node) == {}


# -- T3.2: who may do what ------------------------------------------------------------


def test_function_of_another_job_is_replaced_on_stock_only(
    hardened: Hardened, stock: Stock, attack: Attack, now: float, victim: Victim,
    stock_victim: Victim, evil_function: str,
) -> None:  # fmt: skip
    """One job writes over another's function in the KV: its next worker runs it."""
    answer = attack(stock.target, "replace_function", stock_victim.job, evil_function)
    assert answer["replaced"] >= 1
    assert stock_victim.calls_again() == "evil"
    answer = attack(
        hardened.target("mallory"), "replace_function", victim.job, evil_function
    )
    assert answer["code"] == DENIED
    assert victim.calls_again() == "honest"
    hardened.expect_event(now, who="mallory", object="fun:", ok="False")


def test_function_keys_are_written_by_their_job_alone(
    hardened: Hardened, attack: Attack, victim: Victim
) -> None:
    """Knowing the key's name, and not asking for a list first, does not help."""
    mallory = hardened.target("mallory")
    calls = [
        [verb, "fun", key, *(["x"] if verb == "overwrite" else [])]
        for key in (f"RemoteFunction:{victim.job}:x", f"ActorClass:{victim.job}:x", "x")
        for verb in ("overwrite", "read", "delete")
    ]
    assert attack(mallory, "batch", calls)["codes"] == [DENIED] * 9


def test_second_name_of_a_key_is_no_way_to_it(
    hardened: Hardened, stock: Stock, attack: Attack, victim: Victim
) -> None:
    """The GCS joins namespace and key: a part of one may stand in the other.

    And a prefix without a namespace reaches into all of them, to list and to delete.
    """
    answer = attack(stock.target, "alias", "7f7f7f7f")
    assert (answer["code"], answer["value"]) == ("OK", "evil")
    answer = attack(stock.target, "list_keys", "", "@namespace")
    assert "RemoteFunction:7f7f7f7f:alias" in answer["keys"]
    mallory = hardened.target("mallory")
    for tried in (
        ["write_alias", victim.job], ["wipe", ""], ["wipe", "@namespace"],
        ["list_keys", "", ""], ["list_keys", "", "@namespace"],
    ):  # fmt: skip
        assert attack(mallory, *tried)["code"] == DENIED, tried
    assert victim.calls_again() == "honest"


def test_deleted_key_is_its_owners_until_the_gcs_says_so(
    hardened: Hardened, attack: Attack
) -> None:
    """And then anybody's: the end of the call is seen in the guard's log."""
    alice, mallory = hardened.target("alice"), hardened.target("mallory")
    tried = ("overwrite", "of-both", "k", "v")
    assert attack(mallory, *tried)["code"] == "OK"
    assert attack(alice, *tried)["code"] == DENIED
    assert attack(mallory, "delete", "of-both", "k")["deleted"] == 1
    wait_for("the key", lambda: attack(alice, *tried)["code"] == "OK", 10)
    assert attack(mallory, *tried)["code"] == DENIED


def test_named_actor_of_another_is_killed_on_stock_only(
    hardened: Hardened, stock: Stock, attack: Attack, now: float, victim: Victim,
    stock_victim: Victim,
) -> None:  # fmt: skip
    """An actor's id, which every lister sees, is enough on stock Ray to kill it."""
    found = attack(stock.target, "find_actor", "of-alice", "vault")
    assert found["actor_id"] == stock_victim.actor
    assert attack(stock.target, "kill_actor", stock_victim.actor)["code"] == "OK"
    wait_for("the actor's end", lambda: not stock_victim.lives())
    mallory = hardened.target("mallory")
    assert attack(mallory, "kill_actor", victim.actor)["code"] == DENIED
    assert attack(mallory, "find_actor", "of-alice", "vault")["code"] == DENIED
    assert victim.lives()
    hardened.expect_event(now, who="mallory", method="KillActor", object=victim.actor)


MORTAL = (
    "@ray.remote(num_cpus=0)\n"
    "class Mortal:\n"
    "    def ping(self):\n"
    "        return 1\n"
    "m = Mortal.remote()\n"
    "ray.get(m.ping.remote(), timeout=60)\n"
    "result = [ray.get_runtime_context().get_worker_id(), m._actor_id.hex()]"
)
# What alice is told in the end of an actor that has ended.
TOLD = (
    "ray.kill(m)\n"
    "end = time.time() + 8\n"
    "while time.time() < end:\n"
    "    try:\n"
    "        ray.get(m.ping.remote(), timeout=20)\n"
    "    except Exception as error:\n"
    "        result = type(error).__name__\n"
    "        if result == 'ActorDiedError':\n"
    "            break\n"
    "    time.sleep(0.1)"
)


# Actors that start: whether they have is told to whoever waits under the driver's id.
# Whoever is told in its place leaves the driver waiting.
STARTED = (
    "made = [Mortal.remote() for _ in range(4)]\n"
    "ready = [m.ping.remote() for m in made]\n"
    "done, _ = ray.wait(ready, num_returns=len(ready), timeout=15)\n"
    "[ray.kill(m) for m in made]\n"
    "result = len(done)"
)


def test_news_of_another_are_cancelled_on_stock_only(
    hardened: Hardened, stock: Stock, attack: Attack, now: float, victim: Victim,
    stock_victim: Victim,
) -> None:  # fmt: skip
    """A driver's id, which anybody can guess, is enough to keep its news from it.

    On stock Ray it never hears that its actor has died, and somebody else hears where
    its next ones are.
    """
    worker, actor = stock_victim.driver(MORTAL)
    assert worker == stock_victim.job + "ff" * 24
    assert attack(stock.target, "cancel_news", worker, actor)["code"] == "OK"
    assert stock_victim.driver(TOLD) == "ActorUnavailableError"
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(attack, stock.target, "take_news", worker, 15)
        stock_victim.driver(STARTED)
        assert taken.result()["told"]
    worker, actor = victim.driver(MORTAL)
    mallory = hardened.target("mallory")
    for what in (["cancel_news", worker, actor], ["take_news", worker, 5]):
        answer = attack(mallory, *what)
        assert answer["code"] == DENIED
        assert "is another's" in answer["details"]
    assert victim.driver(TOLD) == "ActorDiedError"
    hardened.expect_event(now, who="mallory", method="GcsSubscriberPoll", ok="False")


RAYLET = (
    "[node] = [n for n in ray.nodes() if n['NodeManagerAddress'] == '{}']\n"
    "result = f\"{{node['NodeManagerAddress']}}:{{node['NodeManagerPort']}}\""
)
STATS = "/ray.rpc.NodeManagerService/GetNodeStats"
LIST_NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


def test_raylets_take_no_observers(
    hardened: Hardened, stock: Stock, attack: Attack, victim: Victim,
    stock_victim: Victim,
) -> None:  # fmt: skip
    """Who may only look is nobody to raylets and workers, who let all do anything.

    Positive controls: anybody on stock Ray, and a driver here, as Ray needs it.
    """
    raylet = stock_victim.driver(RAYLET.format(STOCK))
    assert attack({**stock.target, "address": raylet}, "call", STATS)["code"] == "OK"
    raylet = victim.driver(RAYLET.format(HEAD))
    for name, component, code in (
        ("alice", "driver", "OK"), ("otto", "cli", "UNAVAILABLE"),
        ("olga", "cli", "UNAVAILABLE"),
    ):  # fmt: skip
        target = hardened.target(name, component)
        assert attack(target, "call", LIST_NODES)["code"] == "OK"
        answer = attack({**target, "address": raylet}, "call", STATS)
        assert answer["code"] == code, (name, answer)


def test_stolen_node_is_nobody_at_the_dashboard(
    hardened: Hardened, attack: Attack
) -> None:
    """What signs a node's workers signs no operator, who could submit jobs there."""
    front = {**hardened.target("olga", "cli"), "address": f"{HEAD}:{DASHBOARD}"}
    assert attack(front, "https", "GET", "/api/version")["status"] == 200
    stolen = hardened.node.home / "c" / "workers"
    issuer = pki.Issuer.load(stolen / "issuer.pem", stolen / "issuer.key")
    home = hardened.rogue.home
    for who in ("operator/olga/cli", "driver/alice/driver", "observer/otto/cli"):
        key = pki.new_key()
        uri = f"spiffe://{hardened.registry.name}/{who}"
        leaf = issuer.leaf(uri, [ROGUE], key.public_key())
        (home / "minted.pem").write_bytes(pki.pem(leaf) + pki.pem(issuer.cert))
        (home / "minted.key").write_bytes(pki.key_pem(key))
        front |= {"cert": str(home / "minted.pem"), "key": str(home / "minted.key")}
        answer = attack(front, "https", "GET", "/api/version")
        assert answer["status"] == 403, who


def _front(hardened: Hardened, attack: Attack, who: str) -> Any:
    """Return what sends requests to the dashboard's front as somebody."""
    target = hardened.target(who, "cli" if who in ("olga", "otto") else "driver")
    target["address"] = f"{HEAD}:{DASHBOARD}"

    def send(method: str, path: str, body: Any = "") -> tuple[int, str]:
        text = body if isinstance(body, str) else json.dumps(body)
        answer = attack(target, "https", method, path, text)
        return answer["status"], answer["text"]

    return send


def test_dashboard_only_shows_observers_things(
    hardened: Hardened, attack: Attack
) -> None:
    """What attaches to a worker, waits or pins is a GET there as well.

    Positive control: an operator, who is let through.
    """
    otto, olga = (_front(hardened, attack, who) for who in ("otto", "olga"))
    for path in (
        "/", "/nodes?view=summary", "/api/jobs/", "/api/v0/nodes",
        "/api/v0/tasks?limit=1",
        "/api/cluster_status",
    ):  # fmt: skip
        assert otto("GET", path)[0] == 200, path
    for path in (
        "/api/v0/delay/0", "/worker/traceback?pid=1&ip=127.0.0.1", "/test/dump",
        "/api/packages/gcs/_ray_pkg_1.zip", "//worker/traceback", "/%77orker/traceback",
        "/nodes/../worker/traceback", "/api/v0/nodes%2f..%2fdelay%2f0",
    ):  # fmt: skip
        assert otto("GET", path)[0] in (400, 403), path
    assert otto("POST", "/api/jobs/", {"entrypoint": "true"})[0] == 403
    assert olga("GET", "/api/v0/delay/0")[0] == 200


def test_submitted_job_is_ended_by_who_submitted_it(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """By way of the dashboard, which does for whoever asks all that a head may.

    Positive controls: the submitter, and an operator.
    """
    alice, mallory, olga = (
        _front(hardened, attack, who) for who in ("alice", "mallory", "olga")
    )
    for ends in (alice, olga):
        status, text = alice("POST", "/api/jobs/", {"entrypoint": "sleep 60"})
        assert status == 200, text
        name = re.findall(r"raysubmit_\w+", text)[0]
        for method, path in (
            ("POST", f"/api/jobs/{name}/stop"), ("DELETE", f"/api/jobs/{name}"),
            ("POST", f"/api/jobs/{name}%2fstop"), ("POST", "/api/jobs/x/../x/stop"),
        ):  # fmt: skip
            status, text = mallory(method, path)
            assert status in (400, 403), (path, text)
        assert ends("POST", f"/api/jobs/{name}/stop")[0] == 200
    hardened.expect_event(now, who="mallory", why="by who submitted it", ok="False")


def test_package_is_not_replaced_by_way_of_the_dashboard(
    hardened: Hardened, attack: Attack
) -> None:
    """A job's code is what its driver sent; the dashboard would write over it."""
    alice, mallory = (_front(hardened, attack, who) for who in ("alice", "mallory"))
    path = "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip"
    assert alice("PUT", path, "good")[0] == 200
    status, text = mallory("PUT", path, "evil")
    assert (status, "has another content" in text) == (500, True), text
    assert mallory("PUT", path, "good")[0] == 200


def test_names_to_wait_under_are_few(
    hardened: Hardened, stock: Stock, attack: Attack, now: float
) -> None:
    """Each costs the GCS memory for minutes after its call has been given up."""
    before = memory_bytes(stock.host, "gcs_server")
    seen = attack(stock.target, "many_subscribers", 2560)["seen"]
    assert seen == {"DEADLINE_EXCEEDED": 2560}
    assert memory_bytes(stock.host, "gcs_server") - before > 20_000_000

    # A refusal can come after the call was given up: the log says what was let through.
    def polls(ok: str, why: str = "") -> int:
        found = hardened.events(
            now, who="mallory", source=ROGUE, method="GcsSubscriberPoll", ok=ok, why=why
        )
        return sum(record.get("count", 1) for record in found)

    def refused() -> bool:
        return polls("False", "subscribers of this identity") > 500

    before = memory_bytes(hardened.head, "gcs_server")
    # A busy machine gives many up before anybody has decided.
    for _ in range(6):
        attack(hardened.target("mallory"), "many_subscribers", 2560)
        if refused():
            break
    assert memory_bytes(hardened.head, "gcs_server") - before < 50_000_000
    wait_for("the refusals in the log", refused)
    assert 0 < polls("True") <= 1536


def test_named_actor_is_not_reached_by_rays_own_way(
    hardened: Hardened, victim: Victim, mallory: Driver, now: float
) -> None:
    """`ray.get_actor` in another's namespace is refused, in a task too."""
    find = "ray.get_actor('vault', namespace='of-alice')"
    assert "Failed to look up actor" in mallory.ask(find)["error"]
    answer = mallory.ask(
        f"@ray.remote(num_cpus=0.1, {TRUSTED})\n"
        "def steal():\n"
        f"    ray.kill({find})\n"
        "ray.get(steal.remote(), timeout=60)"
    )
    assert "Failed to look up actor" in answer["error"]
    assert victim.lives()
    for who in ("driver/mallory", "worker/"):
        event = hardened.expect_event(now, who=who, method="GetNamedActorInfo")
        assert "is another driver's" in event["why"]


def test_keys_of_another_are_read_on_stock_only(
    hardened: Hardened, stock: Stock, attack: Attack, now: float, victim: Victim,
    stock_victim: Victim,
) -> None:  # fmt: skip
    """Keys that alice wrote are read, written over and deleted by alice alone."""
    assert attack(stock.target, "read", "alice", "secret")["value"] == "of alice"
    assert attack(stock.target, "overwrite", "alice", "secret", "x")["code"] == "OK"
    mallory = hardened.target("mallory")
    calls = [
        ["read", "alice", "secret"], ["overwrite", "alice", "secret", "x"],
        ["delete", "alice", "secret"], ["list_keys", "alice", ""],
        ["overwrite", "session", "session_name", "x"],
        ["overwrite", "cluster", "CLUSTER_METADATA", "x"],
        ["overwrite", "", "webui:url", "x"], ["overwrite", "dashboard", "new", "x"],
        ["overwrite", "", "__autoscaling_status", "x"],
    ]  # fmt: skip
    assert attack(mallory, "batch", calls)["codes"] == [DENIED] * 9
    value = victim.driver("result = g.internal_kv_get(b'secret', b'alice').decode()")
    assert value == "of alice"
    hardened.expect_event(now, who="mallory", object="alice:secret", ok="False")


def test_methods_of_other_roles_are_refused(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """Every method that a role does not have is refused before the GCS sees it."""
    every = frozenset().union(*METHODS.values())
    for name, component, role in (
        ("mallory", "driver", "driver"), ("otto", "cli", "observer"),
        ("olga", "cli", "operator"), ("node", "raylet", "node"),
    ):  # fmt: skip
        others = sorted(every - METHODS[role] - {"/ray.rpc.syncer.RaySyncer/StartSync"})
        answer = attack(
            hardened.target(name, component), "call_all", others,
            host="node" if role == "node" else "rogue",
        )  # fmt: skip
        assert len(others) > 3
        assert answer["codes"] == dict.fromkeys(others, DENIED)
    hardened.expect_event(now, who="mallory", method="DrainNode", ok="False")


def test_another_token_is_refused(
    hardened: Hardened, attack: Attack, now: float
) -> None:
    """The certificate does not replace the token, nor two tokens one.

    It is the GCS that refuses a wrong token, and an event nonetheless.
    """
    mallory = hardened.target("mallory")
    wrong = hardened.rogue.home / "wrong"
    wrong.write_text("0" * 64)
    answer = attack({**mallory, "token": str(wrong)}, "read", "x", "y")
    assert answer["code"] == "UNAUTHENTICATED"
    event = hardened.expect_event(
        now, who="driver/mallory", method="InternalKVGet", ok="False"
    )
    assert event["why"] == "the GCS refused its token: UNAUTHENTICATED"
    assert attack(mallory, "two_tokens")["code"] == DENIED


# -- What ends a stock GCS ------------------------------------------------------------

GCS = (
    "import os, ray, subprocess, sys\n"
    "os.makedirs('/tmp/g', exist_ok=True)\n"
    "path = os.path.dirname(ray.__file__) + '/core/src/ray/gcs/gcs_server'\n"
    "sys.exit(subprocess.run([path, '--log_dir=/tmp/g', '--config_list=e30=',\n"
    "    '--gcs_server_port=7000', f'--node-ip-address={sys.argv[1]}',\n"
    "    '--session-name=s', '--session-dir=/tmp/g', '--node-id=' + 'aa' * 28,\n"
    "    '--metrics-agent-port=0']).returncode)\n"
)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("sync_without_node", []), ("kill_actor", ["00"]), ("short_ids", [])],
)
def test_gcs_is_ended_by_one_call_on_stock_only(
    hardened: Hardened, attack: Attack, lab: Lab, now: float, name: str,
    arguments: list[Any],
) -> None:  # fmt: skip
    """One small call aborts a stock GCS; the guard refuses it."""
    process = lab.hosts["stock"].popen(sys.executable, "-c", GCS, STOCK)
    bare = {"address": f"{STOCK}:7000"}
    try:
        wait_for("a GCS", lambda: attack(bare, "list_keys", "x", "")["code"] == "OK")
        attack(bare, name, *arguments)
        assert process.wait(20) != 0
    finally:
        process.kill()
    assert attack(hardened.target("mallory"), name, *arguments)["code"] == DENIED
    hardened.expect_event(now, who="mallory", ok="False")
    assert attack(hardened.target("mallory"), "read", "x", "y")["code"] == "OK"


def test_malformed_grpc(hardened: Hardened, attack: Attack, now: float) -> None:
    """Bytes that are no message, frame or method end the call, and nothing else."""
    gcs = _pid(hardened, "gcs_server")
    guard = _pid(hardened, "envoy")
    seen = attack(hardened.target("mallory"), "malformed")["seen"]
    assert set(seen.values()) == {DENIED}
    answer = attack(hardened.target("mallory"), "junk")
    assert answer == {"code": "OK", "closed": 6}
    hardened.expect_event(now, who="mallory", why="malformed")
    assert (gcs, guard) == (_pid(hardened, "gcs_server"), _pid(hardened, "envoy"))


def _pid(hardened: Hardened, name: str) -> str:
    return hardened.head.run("pgrep", "-x", name).stdout.split()[0]


def test_worker_of_a_job_is_no_driver_of_another(
    hardened: Hardened, attack: Attack, victim: Victim, mallory: Driver, now: float
) -> None:
    """Who has a worker's certificate has its job's rights, and no other's.

    It is taken from mallory's worker as root of the node could, and used there for
    raw calls on alice's actor and function.
    """
    host, pid = mallory(
        "from ray.util.state import get_actor\n"
        "@ray.remote(num_cpus=0)\n"
        "class Held:\n"
        "    def ping(self):\n"
        "        return 1\n"
        "held = Held.remote()\n"
        "ray.get(held.ping.remote(), timeout=60)\n"
        "found = get_actor(held._actor_id.hex())\n"
        "where = {n['NodeID']: n['NodeManagerHostname'] for n in ray.nodes()}\n"
        "result = [where[found.node_id], found.pid]"
    )
    used = hardened.lab.hosts[host].home / "c" / "run" / "workers-used"
    stolen = str(used / f"{pid}.pem")
    target = {**hardened.target("node"), "cert": stolen, "key": stolen}
    answer = attack(
        target, "batch",
        [["kill_actor", victim.actor],
         ["overwrite", "fun", f"RemoteFunction:{victim.job}:x", "x"],
         ["read", "alice", "secret"], ["overwrite", "mine", "k", "v"]],
        host=host,
    )  # fmt: skip
    assert answer["codes"] == [DENIED, DENIED, DENIED, "OK"]
    hardened.expect_event(now, who="worker/", method="KillActor", ok="False")
    assert victim.lives()
    # It has no rights at all when the worker has ended.
    copy = hardened.head.home / "copy.pem"
    copy.write_bytes(Path(stolen).read_bytes())
    target.update(cert=str(copy), key=str(copy))
    again = ["overwrite", "mine", "k", "v"]
    assert attack(target, *again, host=host)["code"] == "OK"
    mallory("ray.kill(held)")
    wait_for(
        "its end", lambda: attack(target, *again, host=host)["code"] == DENIED
    )  # fmt: skip
    hardened.expect_event(now, who="worker/", why="the worker has ended", ok="False")


def test_task_has_neither_certificate_nor_token_nor_a_way_to_the_guard(
    mallory: Driver, stock_victim: Victim
) -> None:
    """What a task would need for calls of its own is not there in its jail."""
    look = (
        "@ray.remote(num_cpus=0.1)\n"
        "def look(address):\n"
        "    import os, socket\n"
        "    def tries(function, *args):\n"
        "        try:\n"
        "            return bool(function(*args))\n"
        "        except OSError:\n"
        "            return False\n"
        "    names = [v for k, v in os.environ.items()\n"
        "             if k.startswith('RAY_TLS') or k == 'RAY_AUTH_TOKEN_PATH']\n"
        "    token = os.path.expanduser('~/.ray/auth_token')\n"
        "    return [any(tries(open, name) for name in [*names, token]),\n"
        "            tries(socket.create_connection, address, 5)]\n"
    )
    ask = look + "result = ray.get(look.remote(({!r}, {})), timeout=60)"
    assert stock_victim.driver(ask.format(STOCK, PORT)) == [True, True]
    assert mallory(ask.format(HEAD, PORT)) == [False, False]


def test_gcs_survives_whatever_the_guard_lets_through(lab: Lab) -> None:
    """Random requests of every method, by every role that user code can have.

    Those that the guard does not look into come as they are.

    Positive control: the tests above, where one such request ends a stock GCS.
    """
    script = str(Path(__file__).with_name("fuzz.py"))
    out = lab.hosts["rogue"].run(sys.executable, script, "1", "10", timeout_s=120)
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["aborts"] == {}
    assert found["passed"] > 200
    assert len(found["methods"]) > 30
    plain = {m for role in ("driver", "worker", "observer", "node")
             for m in METHODS[role] & PLAIN}  # fmt: skip
    assert plain <= set(found["methods"])
