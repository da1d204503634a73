"""Jobs that are submitted to a hardened cluster, and what a hostile one tries.

A submitted job's entrypoint is a driver with the certificate of the worker that
hosts it, so the guard tells submitted jobs apart by that. ``probes/submitted.py`` is
what runs there: it has everything that its supervisor has.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import HEAD, NODE, TRUSTED, Driver, Hardened
from tests.cluster.lab import wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
PROBE, ATTACK = HERE / "probes" / "submitted.py", HERE / "attack.py"
CLIENT = """
from ray.job_submission import JobSubmissionClient
jobs = JobSubmissionClient('http://127.0.0.1:8265')
def submit(words, name, environment=dict(working_dir='submitted')):
    return jobs.submit_job(
        entrypoint='python run.py ' + words, submission_id=name or None,
        runtime_env=environment)
def said(name):
    info = jobs.get_job_info(name)
    return f'{info.status}: {info.message}\\n{jobs.get_job_logs(name)}'
"""


class Jobs:
    """The Jobs API, as alice uses it on the head."""

    def __init__(self, hardened: Hardened) -> None:
        self.hardened, package = hardened, hardened.head.home / "submitted"
        package.mkdir(exist_ok=True)
        shutil.copy(PROBE, package / "run.py")
        shutil.copy(ATTACK, package)
        self.driver = hardened.shared("alice")
        self.driver(CLIENT)

    def ask(self, code: str) -> Any:
        """Evaluate an expression where ``jobs`` is the client."""
        return self.driver(f"result = {code}")

    def submit(self, *words: str, name: str = "") -> str:
        """Submit the probe with these arguments; return the job's name."""
        return str(self.ask(f"submit({' '.join(words)!r}, {name!r})"))

    def said(self, name: str) -> str:
        """Return a job's state and output."""
        return str(self.ask(f"said({name!r})"))

    def wait(self, name: str) -> str:
        """Wait for a job's end; return its state and output."""
        status = f"str(jobs.get_job_status({name!r}))"
        ends = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for(f"the end of {name}", lambda: self.ask(status) in ends, 120)
        return self.said(name)

    def found(self, *words: str, name: str = "") -> Any:
        """Submit the probe; return what it found."""
        said = self.wait(self.submit(*words, name=name))
        lines = [line for line in said.splitlines() if line.startswith("FOUND ")]
        assert lines, said
        return json.loads(lines[-1][6:])


@pytest.fixture(scope="module")
def begun() -> float:
    return time.time()


@pytest.fixture(scope="module")
def jobs(begun: float, hardened: Hardened) -> Jobs:
    return Jobs(hardened)


# -- honest ------------------------------------------------------------------------


def test_a_submitted_job_works(jobs: Jobs) -> None:
    """Tasks, named actors, placement groups and its own state; nothing is refused."""
    found = jobs.found("work", name="honest")
    assert found["total"] == 90
    assert found["actor"] == found["named"] == 1
    assert found["group"]
    assert found["status"] == "RUNNING"
    assert found["nodes"] == 2
    assert "honest" in jobs.ask("[j.submission_id for j in jobs.list_jobs()]")


def test_a_name_can_be_used_again(jobs: Jobs) -> None:
    """Once the job that had it was deleted."""
    name = f"again-{secrets.token_hex(4)}"
    for _ in range(2):
        assert "SUCCEEDED" in jobs.wait(jobs.submit("nothing", name=name))
        # Ray looks after each job once a second. For one that is deleted before it
        # has seen the end it writes a new state, of a failure: stock Ray, too.
        time.sleep(5)
        assert jobs.ask(f"jobs.delete_job({name!r})")


def test_it_is_stopped(jobs: Jobs) -> None:
    """`ray job stop` ends the program, and the state says so."""
    jobs.submit("wait", name="endless")
    wait_for("it", lambda: "waiting" in jobs.said("endless"), 60)
    assert jobs.ask("jobs.stop_job('endless')")
    assert "STOPPED" in jobs.wait("endless")


def test_nothing_of_it_was_refused(jobs: Jobs, begun: float) -> None:
    """Neither to supervisors, their drivers and workers, nor to the head."""
    refused = jobs.hardened.events(begun, ok="False", who="^(head|node|worker)")
    assert refused == []


# -- hostile -----------------------------------------------------------------------


def test_one_job_is_kept_from_anothers(jobs: Jobs, begun: float) -> None:
    """State, log, functions, keys and supervisor of another job are closed to it.

    Control: the same calls for what is its own are allowed.
    """
    jobs.submit("wait", name="victim")
    wait_for("it", lambda: "waiting" in jobs.said("victim"), 60)
    heads = jobs.driver(
        "from ray.util.state import list_actors\n"
        "result = list_actors(filters=[('class_name', '=', 'JobSupervisor')])[0].job_id"
    )
    found = jobs.found("attack", "victim", heads, name="hostile")
    own, others = found["own"], found["others"]
    assert set(own.values()) == {"OK"}, own
    assert set(others.values()) == {"PERMISSION_DENIED"}, others
    said = jobs.said("victim")
    assert said.startswith("RUNNING")
    assert "waiting" in said
    jobs.ask("jobs.stop_job('victim')")
    for word in ("supervises", "functions are its own", "malformed state"):
        jobs.hardened.expect_event(begun, who="^worker/", why=word)


def test_none_runs_on_another_node(jobs: Jobs) -> None:
    """There the dashboard would ask for its output in clear, with the token.

    Control: what asks for the head in the same way runs.
    """
    ask = (
        "jobs.submit_job(entrypoint='echo it runs', "
        "entrypoint_resources={{'node:{}': 0.01}})"
    )
    assert "it runs" in jobs.wait(jobs.ask(ask.format(HEAD)))
    said = jobs.wait(jobs.ask(ask.format(NODE)))
    assert said.startswith("FAILED")
    assert "could not be scheduled" in said


def test_a_list_of_jobs_survives_a_hostile_state(jobs: Jobs) -> None:
    """What Ray's dashboard could not read is refused, so that the list goes on."""
    codes = jobs.found("malform", name="malformed")
    assert len(codes) > 5
    assert set(codes.values()) == {"PERMISSION_DENIED"}, codes
    assert "malformed" in jobs.ask("[j.submission_id for j in jobs.list_jobs()]")


def test_keys_of_a_job_that_ended_are_removed(jobs: Jobs) -> None:
    """Nobody could own them any more; they would count for ever."""
    jobs.found("store", name="storing")
    facts = jobs.hardened.path / "state" / "facts.jsonl"
    name = b"left-behind".hex()

    def known() -> set[str]:
        lines = [json.loads(line) for line in facts.read_text().splitlines()]
        kept = set()
        for table, _, key, *_ in lines:
            if key == name:
                kept = {key} if table == "keys" else set()
        return kept

    assert known()
    wait_for("the key's end", lambda: not known(), 60)


LOCAL = """
import sys; sys.path.insert(0, {directory!r})
import claims
task = ray.remote(claims.claim).options({tag}, num_cpus=0.1)
result = ray.get(task.remote({job!r}), timeout=60)
"""


def test_code_from_a_working_directory_is_bound_before_it_runs(
    hardened: Hardened,
) -> None:
    """A worker's first call decides whose it is: that may not be its code's choice.

    With code_search_path Ray imports a function from files, without a look into the
    function table, which is where the guard sees whose worker it is.
    """
    alice: Driver = hardened.shared("alice")
    job = alice("result = ray.get_runtime_context().get_job_id()")
    directory = hardened.head.home / "local"
    directory.mkdir(exist_ok=True)
    shutil.copy(PROBE, directory / "claims.py")
    mallory = hardened.driver(
        "mallory",
        init="runtime_env={'working_dir': 'local'}, "
        "job_config=ray.job_config.JobConfig(code_search_path=['.'])",
    )
    try:
        own, foreign = mallory(
            LOCAL.format(directory=str(directory), job=job, tag=TRUSTED)
        )
    finally:
        mallory.close()
    assert own == "OK"
    assert foreign == "PERMISSION_DENIED"
