"""Entrypoints of the Jobs API behind a worker's wall, where the policy has that.

What a hostile one tries is tried on stock Ray first, where it works.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from raysandbox import policy as policies
from raysandbox.errors import ProfileError
from tests.node.home import Home
from tests.node.nodes import PLAIN, ROOT, Node, free_port

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
JOBS = """
[jobs]
entrypoint = "trusted"
why = "Those who submit jobs are known."
"""
POLICY = f"""
[offer]
strict = 3
standard = 4
trusted = 3

[[rules]]
name = "everybody"
profiles = ["standard"]

[totals]
cpu = "100%"
memory = "80%"
pids = "90%"

[object_store]
max_job = "64MiB"
{JOBS}
"""
# Of the job to which all entrypoints belong.
AGENTS_JOB = "01000000"


class Jobs:
    """A node, and a client of its Jobs API."""

    def __init__(self, kind: str, package: Path, interpreter: str) -> None:
        dashboard = free_port()
        self.node = Node(
            PLAIN if kind == "stock" else None,
            policy=f'{POLICY}\n[runtime_env]\npy_executable = ["{interpreter}"]\n'
            f'conda = {{made = "{Path(interpreter).parents[1]}"}}\n'
            'why = "It is ours."\n',
            arguments=[
                "--include-dashboard=true",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={free_port()}",
            ],
        )
        try:
            self.package = package
            self.client = self._connect(f"http://127.0.0.1:{dashboard}")
        except BaseException:
            self.node.close()
            raise

    def _connect(self, url: str) -> JobSubmissionClient:
        """The dashboard answers before the node's agent can start a job."""
        until = time.monotonic() + 90
        headers = {"Authorization": f"Bearer {self.node.token.read_text()}"}
        while True:
            try:
                client = JobSubmissionClient(url, headers=headers)
                client.submit_job(entrypoint="true")
            except (RuntimeError, ConnectionError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
                continue
            return client

    def start(self, *words: object, **options: Any) -> str:
        """Submit ``hosted.py`` with these arguments; return the job's id."""
        variables = {
            "RAYLET": f"{self.node.session}/sockets/raylet",
            **options.pop("variables", {}),
        }
        environment = {"working_dir": str(self.package), "env_vars": variables}
        line = " ".join(map(str, (sys.executable, "hosted.py", *words)))
        return self.client.submit_job(
            entrypoint=line, runtime_env=environment, **options
        )

    def wait(self, job: str, limit_s: float = 120) -> str:
        """Wait for a job's end; return its status."""
        until = time.monotonic() + limit_s
        while not (status := self.client.get_job_status(job)).is_terminal():
            assert time.monotonic() < until, self.said(job)
            time.sleep(0.2)
        return str(status.value)

    def said(self, job: str) -> str:
        info = self.client.get_job_info(job)
        return f"{info.status} {info.message}\n{self.client.get_job_logs(job)}"

    def ended(self) -> list[str]:
        """Why the proxy ended connections."""
        (log,) = (self.node.session / "logs").glob("raysandbox_store-*.jsonl")
        events = map(json.loads, log.read_text().splitlines())
        return [each["reason"] for each in events if "reason" in each]

    def run(self, *words: object, **options: Any) -> Any:
        """Run ``hosted.py`` to its end; return what it found, or "killed"."""
        return self.found(self.start(*words, **options))

    def run_all(self, *calls: tuple[object, ...]) -> list[Any]:
        """Run several, side by side as far as the policy has it."""
        return [self.found(job) for job in [self.start(*words) for words in calls]]

    def found(self, job: str) -> Any:
        """Wait for a job's end; return what it found, or "killed"."""
        status = self.wait(job)
        info = self.client.get_job_info(job)
        if info.driver_exit_code == 137:
            assert "it was killed, under profile 'trusted'" in info.message
            return "killed"
        assert status == "SUCCEEDED", self.said(job)
        return json.loads(self.output(job).splitlines()[-1])["found"]

    def output(self, job: str) -> str:
        """Return a job's log without a line of Ray's own.

        Ray writes it when the program has been started, or is over already.
        """
        lines = self.client.get_job_logs(job).splitlines(keepends=True)
        ours = "Running entrypoint for job "
        return "".join(line for line in lines if not line.startswith(ours))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("package")
    for name in ("hosted.py", "hostile.py"):
        shutil.copy(HERE / name, made)
    return made


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "of-root"
    path.write_text("of root alone")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[str]:
    """Of an environment that the operator made: the node's packages, and one more."""
    made = Path(tempfile.mkdtemp(prefix="rsn-", dir="/srv"))
    try:
        made.chmod(0o755)
        venv.create(made / "env", symlinks=True)
        (site,) = (made / "env" / "lib").glob("python*/site-packages")
        packages = Path(ray.__file__).parents[1]
        # With what the wheels there do when Python starts.
        (site / "node.pth").write_text(
            f"import site; site.addsitedir({str(packages)!r})\n{ROOT}\n"
        )
        (site / "only_here.py").write_text("WORD = 'of the environment'\n")
        yield str(made / "env" / "bin" / "python")
    finally:
        shutil.rmtree(made)


@pytest.fixture(scope="module")
def stock(package: Path, interpreter: str) -> Iterator[Jobs]:
    jobs = Jobs("stock", package, interpreter)
    yield jobs
    jobs.node.close()


@pytest.fixture(scope="module")
def ours(package: Path, interpreter: str, stock: Jobs) -> Iterator[Jobs]:
    jobs = Jobs("ours", package, interpreter)
    yield jobs
    jobs.node.close()


# --- honest work -------------------------------------------------------------------


def test_a_driver_works_behind_the_wall(ours):
    """Tasks, actors and objects; its own job; its tasks are in jails as anybody's."""
    found = ours.run("work", variables={"GREETING": "hello"}, metadata={"team": "a"})
    assert found["task"][0] == 2
    assert found["task"][1] < 10  # a jail's pid
    assert found["actor"] == [0, 1, 3, 6]
    assert found["put"] == 5_000_000
    assert found["job"] != AGENTS_JOB
    assert (found["variable"], found["package"]) == ("hello", True)
    assert found["user"] == 1000  # "task", of no privilege
    assert found["cpus"] == 2


def test_a_failure_is_told_with_the_end_of_the_output(ours):
    """Status, exit status and last lines, as on stock Ray."""
    job = ours.client.submit_job(entrypoint="echo before the end; exit 3")
    assert ours.wait(job) == "FAILED"
    info = ours.client.get_job_info(job)
    assert info.driver_exit_code == 3
    assert "failed with exit code 3" in info.message
    assert "before the end\n" in info.message
    assert ours.output(job).endswith("before the end\n")


@pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning")
def test_output_is_followed_and_a_job_is_stopped(ours):
    """`ray job logs --follow` sees lines while it runs; `ray job stop` ends it."""
    job = ours.start("wait", 100)
    until = time.monotonic() + 60
    while "\nhello\n" not in ours.client.get_job_logs(job):
        assert time.monotonic() < until, ours.said(job)
        time.sleep(0.2)
    lines = _follow(ours.client, job)
    ours.client.stop_job(job)
    assert ours.wait(job, 30) == "STOPPED"
    assert "hello\n" in lines.result(30)


def _follow(client: JobSubmissionClient, job: str) -> Any:
    import asyncio

    async def collect() -> str:
        return "".join([lines async for lines in client.tail_job_logs(job)])

    return ThreadPoolExecutor(1).submit(lambda: asyncio.run(collect()))


def test_no_more_run_at_once_than_the_policy_offers(ours):
    """The fourth waits until one of three has ended."""
    part = {"sandbox:trusted": 0.1}  # as if a tenth of a sandbox were enough
    jobs = [ours.start("wait", 3, entrypoint_resources=part) for _ in range(4)]
    until, most = time.monotonic() + 90, 0
    while True:
        states = [ours.client.get_job_status(job).value for job in jobs]
        most = max(most, states.count("RUNNING"))
        if set(states) == {"SUCCEEDED"}:
            break
        assert time.monotonic() < until, states
        time.sleep(0.2)
    assert most == 3


def test_what_it_stores_is_counted(ours):
    """A driver's puts end at the job's quota, with Ray's own error."""
    found = ours.run_all(("store", 100_000_000), ("store", 50_000_000))
    assert found == ["ObjectStoreFullError", 5]


def test_another_profile_can_not_be_asked_for(ours):
    """The policy names the one for entrypoints; a second tag is refused in words."""
    job = ours.start("work", entrypoint_resources={"sandbox:standard": 1})
    assert ours.wait(job) == "FAILED"
    assert "a task takes one sandbox tag" in ours.client.get_job_info(job).message


@pytest.mark.parametrize("by", ["its path", "a name"])
def test_an_interpreter_of_the_policy_runs_worker_and_jail(ours, interpreter, by):
    """A whole environment that the operator made; nothing is installed for a job."""
    asked = {"py_executable": interpreter} if by == "its path" else {"conda": "made"}
    found = ours.node.drive(f"""
import json

@ray.remote
def where():
    import os, only_here
    return only_here.WORD, os.getpid()

@ray.remote
def here():
    import importlib.util
    return importlib.util.find_spec("only_here") is None

chosen = {asked!r}
print(json.dumps([
    ray.get(where.options(runtime_env=chosen).remote()), ray.get(here.remote()),
]))
""")
    (word, pid), absent = json.loads(found)
    assert word == "of the environment"
    assert pid < 10
    assert absent  # for who did not ask for it


def test_it_runs_an_entrypoint_too(ours, interpreter):
    """Its ``python`` is that one."""
    program = "import ray, only_here; ray.init(); print(only_here.WORD)"
    job = ours.client.submit_job(
        entrypoint=f"python -c '{program}'",
        runtime_env={"py_executable": interpreter},
    )
    assert ours.wait(job) == "SUCCEEDED", ours.said(job)
    assert ours.output(job).endswith("of the environment\n")


def test_with_the_hook_alone_its_tasks_are_in_jails(stock):
    """The entrypoint itself is where Ray has it: no worker of ours starts it."""
    program = (
        "import ray; ray.init(log_to_driver=False); "
        'where = ray.remote(lambda: __import__("os").getpid()); '
        "print(ray.get(where.remote()))"
    )
    hook = {"worker_process_setup_hook": "raysandbox.worker_hook"}
    seen = []
    for environment in (hook, {}):
        job = stock.client.submit_job(
            entrypoint=f"{sys.executable} -c '{program}'", runtime_env=environment
        )
        assert stock.wait(job) == "SUCCEEDED", stock.said(job)
        seen.append(int(stock.output(job).split()[-1]))
    assert seen[0] < 10 < seen[1]  # a jail's pid


# --- attacks -----------------------------------------------------------------------


def _attacks(jobs: Jobs, secret: Path) -> dict[str, Any]:
    logs = jobs.node.session / "logs"
    made = secret.parent / f"made-{jobs.node.port}"
    reached, read, log, _ = jobs.run_all(
        ("reach", jobs.node.raylet),
        ("read", secret),
        ("read", logs / "raylet.out"),
        ("write", made),
    )
    return {
        "raylet can be signalled": reached,
        "a file of root's": read,
        "the log of raylet": log,
        "a file on the host": made.exists(),
    }


def test_control_it_has_the_node_on_stock_ray(stock, secret):
    """As root, with every file and every process."""
    found = _attacks(stock, secret)
    assert found["raylet can be signalled"] is True
    assert found["a file of root's"] == "of root alone"
    assert "Error" not in found["the log of raylet"]
    assert found["a file on the host"] is True


def test_it_has_nothing_of_the_node(ours, secret):
    """No process of Ray's, no file but its own, no place to write on the host."""
    found = _attacks(ours, secret)
    assert "PermissionError" in found["raylet can be signalled"]
    assert "Error" in found["a file of root's"]
    assert "Error" in found["the log of raylet"]
    assert found["a file on the host"] is False


def test_control_what_it_leaves_behind_lives_on_stock_ray(stock, home: Home):
    """A process in a session of its own outlives the job."""
    assert stock.run("outlive", home.port)
    until = time.monotonic() + 5
    while "outlived" not in home.heard and time.monotonic() < until:
        time.sleep(0.1)
    assert "outlived" in home.heard


def test_what_it_leaves_behind_ends_with_it(ours, home: Home):
    """All that it started is in its group, which is killed with its worker."""
    before = home.heard.count("outlived")
    assert ours.run("outlive", home.port)
    time.sleep(5)
    assert home.heard.count("outlived") == before


def test_a_driver_registers_as_itself(ours):
    """Its own pid, as a driver, of a job that nobody here has; nothing else."""
    driver, worker = 1, 0
    assert ours.run("register", driver, 0, "77000000") is True, ours.ended()
    before = len(ours.ended())
    found = ours.run_all(
        ("register", driver, 1, "78000000"),
        ("register", worker, 0, "79000000"),
        ("register", driver, 0, AGENTS_JOB),
        ("register", driver, 0, "ffffffff"),
    )
    assert found == ["killed"] * 4
    assert sorted(ours.ended()[before:]) == [
        "register: a driver of somebody's job",
        "register: a driver of somebody's job",
        "register: another's pid",
        "register: as what no driver is",
    ]
    assert ours.run("work")["task"][0] == 2


def test_a_driver_hosts_no_others(ours):
    """Nor does it choose a job: what workers say before they open anything is theirs.

    Guards against a tree of drivers, each with eight more.
    """
    assert ours.run("bind", "77000000") == "not a worker"


def test_one_message_does_not_end_the_node(ours):
    """Control: `test_store_proxy`, where the same ends a stock node."""
    assert ours.run("junk") == "killed"
    assert ours.run("work")["task"][0] == 2


def test_it_starts_a_few_drivers_and_no_crowd(ours):
    """Raylet has work for each: eight of one entrypoint, however it starts them."""
    assert ours.run("connect_often", 12) == 8


def test_the_agent_shows_no_other_file_as_its_output(ours):
    """Who drives the cluster may say which log is a job's, and means a worker's."""
    job = ours.start("wait", 0)
    ours.wait(job)
    code = f"""
import json
gcs = ray._private.worker.global_worker.gcs_client
for name in ("raylet.out 0", "../../../../etc/passwd 0", "worker-x.out 0"):
    gcs.internal_kv_put(b"raysandbox:entrypoint-log:{job}", name.encode(), True,
                        b"raysandbox")
    print(name)
"""
    ours.node.drive(code)
    said = ours.client.get_job_logs(job)
    assert said.splitlines()[-1].endswith("Runtime env is setting up.")


# --- the policy --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[jobs]\nentrypoint = "trusted"\n', 'weakens entrypoint: say why = "…"'),
        (f"{JOBS}\n[offer]\nstrict = 1\n", "is not in [offer]"),
        (
            JOBS.replace("trusted", "standard") + "\n[offer]\nstandard = 1\n",
            'must have boundary = "worker"',
        ),
        (f'{JOBS}\n[offer]\ntrusted = 1\n[ceilings]\nboundary = "task"\n', "ceilings"),
    ],
)
def test_a_policy_that_can_not_be_kept_is_refused(tmp_path, text, says):
    """By key, with what would be right; no node starts with it."""
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(ProfileError, match=re.escape(says)):
        policies.load_node(file)


def test_only_the_agents_job_gets_it(tmp_path):
    """For anybody else a rule decides, as for every profile."""
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    policy = policies.load(file)
    request = policies.Request(tag="trusted", namespace="_ray_internal_dashboard")
    decision = policies.decide(policy, request)
    assert decision.profile == "trusted"
    assert decision.why == "jobs.entrypoint = 'trusted'"
    other = policies.decide(policy, policies.Request(tag="trusted", namespace="x"))
    assert other.profile is None
