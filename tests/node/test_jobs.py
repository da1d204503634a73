"""Attacks through the Jobs API, Ray Client, and what the runtime_env agent runs.

The same on stock Ray and on a node of ours; whoever can call home ran outside of
every jail.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from raysandbox.node import no_client
from raysandbox.node.no_client import REASON
from tests.node.home import CALL, SAFE, Home
from tests.node.nodes import PLAIN, Node, free_port

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(400)]

ATTACKS = """
import json, threading
from ray.job_submission import JobSubmissionClient

found = {}

started = []

def attempt(name, start):
    # All at once: each waits for processes of its own.
    started.append(threading.Thread(target=run, args=(name, start)))
    started[-1].start()

def run(name, start):
    try:
        found[name] = start()
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:2000]

client = JobSubmissionClient(f"http://127.0.0.1:{DASHBOARD}")

def wait_for_agent(limit_s=120):
    # The dashboard answers before the node's agent can start a job.
    until = time.monotonic() + limit_s
    while True:
        try:
            first = client.submit_job(entrypoint="true")
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
            continue
        while not client.get_job_status(first).is_terminal():
            assert time.monotonic() < until, client.get_job_info(first)
            time.sleep(0.2)
        return

wait_for_agent()

def shell(name):
    return (f"echo {name} $(id -u) $(cat $RAY_AUTH_TOKEN_PATH) > "
            f"/dev/tcp/127.0.0.1/{HOME}")

def job(name, limit_s=80, **options):
    def start():
        made = client.submit_job(entrypoint=f"bash -c '{shell(name)}'", **options)
        if not limit_s:
            return made
        until = time.monotonic() + limit_s
        while not (status := client.get_job_status(made)).is_terminal():
            if time.monotonic() > until:
                client.stop_job(made)
                return ["HUNG", str(client.get_job_info(made).message), ""]
            time.sleep(0.2)
        return [status.value, str(client.get_job_info(made).message)[:3000],
                client.get_job_logs(made)[-1000:]]
    return start

def task(**options):
    made = ray.remote(lambda: os.getpid()).options(**options)
    return lambda: ray.get(made.remote(), timeout=60)

pip = {"packages": [PACKAGE],
       "pip_install_options": ["--no-index", "--no-deps", "--no-build-isolation"]}
attempt("entrypoint", job("entrypoint"))
attempt("entrypoint_tagged", job("entrypoint_tagged", entrypoint_resources=TAG))
attempt("job_variables", job("job_variables", runtime_env={"env_vars": {
    "LD_PRELOAD": "/nonexistent/evil.so", "PYTHONPATH": "/tmp"}}))
attempt("job_pip", job("job_pip", runtime_env={"pip": pip}))
# On stock Ray that interpreter makes its call, and serves no job: it never ends.
attempt("job_py_executable", job("job_py_executable", 0 if STOCK else 80, runtime_env={
    "py_executable": "bash -c '" + shell("job_py_executable") + "' "}))
if not STOCK:
    # There a job's is enough.
    attempt("task_pip", task(runtime_env={"pip": pip}))
    attempt("task_uv", task(runtime_env={"uv": {"packages": [PACKAGE]}}))
for each in started:
    each.join()
print(json.dumps(found))
"""
CLIENT = """
class Evil:
    def __reduce__(self):
        return (safe_call, ("client",))

evil = Evil()
ray.init(f"ray://{HOST}:{CLIENT}")
try:
    print(ray.get(ray.remote(lambda: evil and 7).remote(), timeout=60))
except ray.exceptions.RayError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def package(home: Home, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A source package whose setup.py calls home, and then fails."""
    at = tmp_path_factory.mktemp("package")
    setup = at / "setup.py"
    call = (CALL + SAFE).format(port=home.port)
    setup.write_text(f"{call}safe_call('setup.py')\nraise SystemExit(1)\n")
    archive = at / "evil-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(setup, "evil-1.0/setup.py")
    return str(archive)


def _refusers(server: str) -> list[tuple[int, str]]:
    """Who stands in for that Ray Client server: uid and environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if b"no_client.py\0" + server.encode() in (entry / "cmdline").read_bytes():
                variables = (entry / "environ").read_text()
                found.append((entry.stat().st_uid, variables))
        except OSError:
            continue
    return found


def _last_line(said: str) -> Any:
    return json.loads(said.splitlines()[-1])


class Outcome:
    """What the attacks came to on one node.

    Attributes:
        found: Attack to what its owner saw.
        heard: Who called home.
        client: What the client of ``ray://`` saw.
    """

    def __init__(self, home: Home, package: str, kind: str) -> None:
        ports = {"DASHBOARD": free_port(), "CLIENT": free_port(), "HOME": home.port}
        node = Node(
            PLAIN if kind == "stock" else None,
            arguments=[
                "--include-dashboard=true",
                f"--dashboard-port={ports['DASHBOARD']}",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--ray-client-server-port={ports['CLIENT']}",
            ],
            RUNTIME_ENV_RETRY_TIMES="1",
            # Stock Ray forks a client's server with threads around: some are
            # stillborn, and it waits for half a minute until it says so.
            RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S="10",
        )
        before = len(home.heard)
        try:
            values: dict[str, Any] = {
                **ports, "PACKAGE": package, "STOCK": kind == "stock",
                "TAG": {} if kind == "stock" else {"sandbox:standard": 1},
                "HOST": node.host,
            }  # fmt: skip
            names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
            self.found = _last_line(node.drive(names + ATTACKS, limit_s=220))
            until = time.monotonic() + 15
            while kind == "stock" and time.monotonic() < until:
                if any("job_py_executable" in word for word in home.heard[before:]):
                    break
                time.sleep(0.1)
            code = (CALL + SAFE).format(port=home.port)
            until = time.monotonic() + (90 if kind == "stock" else 0)
            while True:
                self.client = node.run(f"import ray\n{names}{code}{CLIENT}")
                if self.client.returncode == 0 or time.monotonic() > until:
                    break
            self.heard = {word.split()[0] for word in home.heard[before:]}
            self.words = home.heard[before:]
            server = f"{node.host}:{ports['CLIENT']}"
            self.refusers = _refusers(server)
        finally:
            node.close()
        until = time.monotonic() + 20
        while _refusers(server) and time.monotonic() < until:
            time.sleep(0.2)
        self.left = _refusers(server)


@pytest.fixture(scope="module")
def stock(home: Home, package: str) -> Outcome:
    """Stock Ray."""
    return Outcome(home, package, "stock")


@pytest.fixture(scope="module")
def ours(home: Home, package: str, stock: Outcome) -> Outcome:
    """A node of ours, after the control."""
    return Outcome(home, package, "ours")


JOBS = ["entrypoint", "entrypoint_tagged", "job_variables"]
REFUSED = {
    "job_pip": "pip",
    "job_py_executable": "py_executable",
    "task_pip": "pip",
    "task_uv": "uv",
}


def test_control_all_of_it_works_on_stock_ray(stock):
    """Entrypoints as root, with the token; setup.py, an interpreter, a client."""
    everything = {*JOBS, "job_py_executable", "setup.py", "client"}
    assert stock.heard == everything, f"{stock.found}\n{stock.client.stderr}"
    assert any("0 0123456789abcdef" in word for word in stock.words)


def test_nothing_of_it_runs_outside_of_a_jail(ours):
    """No entrypoint, no installer, no interpreter, no client's pickle is executed."""
    assert ours.heard == set()


@pytest.mark.parametrize("name", JOBS)
def test_an_entrypoint_is_refused_in_words(ours, name):
    """The job fails at once; its status names the Jobs API and what to do instead."""
    status, message, _ = ours.found[name]
    assert status == "FAILED"
    assert "an entrypoint of the Jobs API" in message
    assert "start the driver yourself, with ray.init" in message


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_agent_would_run_is_refused_before_it_does(ours, name):
    """The error names the runtime_env's key, and the policy's if one would allow it."""
    found, key = ours.found[name], REFUSED[name]
    said = found if isinstance(found, str) else found[1]
    assert f"runtime_env key '{key}': refused by this node's policy" in said
    allowing = "[PATH]" if key == "py_executable" else '"allow"'
    assert f"runtime_env.{key} = {allowing}" in said


def test_ray_client_is_refused_in_words(ours):
    """At once, and not as a timeout; nothing that the client sent was opened."""
    assert ours.client.returncode != 0
    assert REASON in ours.client.stderr


def test_who_refuses_clients_has_nothing(ours):
    """Nobody's process, without token or keys; it ends with the node."""
    ((uid, variables),) = ours.refusers
    assert uid == 65534
    assert "RAY" not in variables
    assert ours.left == []


def _ask(port: int) -> str:
    """What the Ray Client server at that port answers to a client's first request."""
    import grpc
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = ray_client_pb2_grpc.RayletDataStreamerStub(channel)
        first = iter([messages.DataRequest(req_id=1, init=messages.InitRequest())])
        answers = stub.Datapath(
            first, metadata=[("client_id", "1")], wait_for_ready=True, timeout=30
        )
        return str(next(answers).init.msg)


def test_who_has_its_port_does_not_end_the_node(tmp_path):
    """Whoever may listen there could; `ray start` ends with the first of its own.

    Seen where a node followed on one that was killed, whose refuser still listened.
    """
    said = tmp_path / "err"
    with (
        socket.create_server(("127.0.0.1", 0)) as gcs,
        socket.create_server(("127.0.0.1", 0)) as other,
        said.open("wb") as err,
    ):
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (other, gcs)]
        process = subprocess.Popen(
            [sys.executable, no_client.__file__, *addresses], stderr=err
        )
        try:
            until = time.monotonic() + 30
            while "is another process's" not in said.read_text():
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            time.sleep(1.5)
            assert process.poll() is None
            port = other.getsockname()[1]
            other.close()
            assert _ask(port) == REASON
            gcs.close()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
    assert said.read_text().count("\n") == 1
