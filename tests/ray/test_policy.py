"""The node's policy against those who would rather have another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.ray.policed import Policed

POLICY = """
[offer]
strict = 8
standard = 8
small = 8
trusted = 8
[[rules]]
name = "team a"
namespaces = ["team-a*"]
metadata = { stage = "prod" }
profiles = ["standard", "small"]
untagged = "standard"
[[rules]]
name = "team b"
namespaces = ["team-b"]
profiles = ["small"]
[[rules]]
name = "team c"
namespaces = ["team-c"]
profiles = ["trusted"]
[[rules]]
name = "signed"
signers = ["*"]
profiles = ["fast"]
[ceilings]
memory = "256MiB"
scratch = "128MiB"
"""

PROFILES = {"small": 'extends = "strict"\n[limits]\npids = 16\n'}

# Every tag is there, also one that the policy does not offer: a node started by
# somebody who does not care.
TAGS = dict.fromkeys(
    (f"sandbox:{name}" for name in ("strict", "standard", "small", "fast", "trusted")),
    8.0,
)

EVERYTHING = """
result = {str(tag): ask(tag) for tag in (None, "strict", "small", "standard", "fast")}
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Policed]:
    """A node whose policy tells teams apart."""
    made = Policed(POLICY, TAGS, PROFILES)
    yield made
    made.close()


def _refused(answers: dict[str, object]) -> set[str]:
    return {
        tag
        for tag, answer in answers.items()
        if isinstance(answer, dict) and answer["error"] == "TaskRefused"
    }


def test_each_team_gets_what_its_rule_says(node):
    """The job's namespace and metadata decide, for tagged and untagged tasks."""
    found = node.drive(
        EVERYTHING, namespace="team-a-1", metadata={"stage": "prod", "more": "x"}
    )
    assert found["None"] == "standard"
    assert (found["small"], found["standard"]) == ("small", "standard")
    assert _refused(found) == {"fast"}
    assert "policy rule 'team a'" in found["fast"]["text"]
    assert "add 'fast' to the rule's profiles" in found["fast"]["text"]
    found = node.drive(EVERYTHING, namespace="team-b")
    assert (found["None"], found["small"]) == ("strict", "small")
    assert _refused(found) == {"standard", "fast"}


def test_who_no_rule_is_for_has_strict_alone(node):
    """Half of a rule's conditions is not enough, and nothing of a refused task runs."""
    found = node.drive(EVERYTHING, namespace="team-a-1", metadata={"stage": "dev"})
    assert (found["None"], found["strict"]) == ("strict", "strict")
    assert _refused(found) == {"small", "standard", "fast"}
    assert "no rule is for this job" in found["fast"]["text"]
    lines = node.command(
        "events", "--json", "--event", "task_refused", "--directory",
        str(node.session / "logs"),
    ).stdout.splitlines()  # fmt: skip
    refused = [json.loads(line) for line in lines]
    assert {event["task"] for event in refused} == {"where"}
    assert all("jail" not in event for event in refused)


def test_no_form_of_asking_gets_around_a_rule(node):
    """Actors, detached ones, placement groups and fractions meet the same rule."""
    found = node.drive(
        """
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        class Where:
            def profile(self):
                from raysandbox.jail.ray_facade import context
                return context["profile"]

        def actor(tag, **options):
            made = ray.remote(
                resources={f"sandbox:{tag}": 1}, max_restarts=0, num_cpus=0
            )(Where)
            def run():
                held = made.options(**options).remote()
                return ray.get(held.profile.remote(), timeout=60)
            return told(run)

        def grouped(tag):
            group = placement_group([{"CPU": 0.1, f"sandbox:{tag}": 1}])
            assert group.wait(60)
            strategy = PlacementGroupSchedulingStrategy(group)
            found = ask(tag, num_cpus=0.1, scheduling_strategy=strategy)
            remove_placement_group(group)
            return found

        def fraction(tag):
            task = where.options(resources={f"sandbox:{tag}": 0.001})
            return told(lambda: ray.get(task.remote(), timeout=60))

        result = {}
        for tag in ("small", "fast"):
            result[tag] = [
                actor(tag), actor(tag, name=tag, lifetime="detached"),
                grouped(tag),
            ]
        result["part"] = fraction("small")
        """,
        namespace="team-b",
    )
    assert found["small"] == ["small"] * 3
    # As many as somebody likes would run at once.
    assert found["part"]["error"] == "TaskRefused"
    assert "it takes 0.001 of the tag" in found["part"]["text"]
    assert "take a whole one: raysandbox.tag('small')" in found["part"]["text"]
    for answer in found["fast"]:
        assert (
            "rule 'team b' is for this job and allows strict, small" in answer["text"]
        )


def test_a_task_s_own_tasks_meet_the_rule_of_their_job(node):
    """What runs with all of Ray's API can ask for no more than its driver can.

    Guards against a profile that, once it is had, gives all the others.
    """
    found = node.drive(
        """
        @ray.remote(resources={"sandbox:trusted": 1}, max_retries=0, num_cpus=0.1)
        def outer():
            def inner():
                from raysandbox.jail.ray_facade import context
                return context["profile"]
            def ask(tag):
                task = ray.remote(num_cpus=0.1, resources={f"sandbox:{tag}": 1})(inner)
                try:
                    return ray.get(task.remote(), timeout=60)
                except ray.exceptions.RayTaskError as error:
                    return {"error": type(error.cause).__name__, "text": str(error)}
            return [ask("strict"), ask("fast"), ask("standard")]
        result = told(lambda: ray.get(outer.remote()))
        """,
        namespace="team-c",
    )
    strict, fast, standard = found
    assert strict == "strict"
    for answer in (fast, standard):
        assert answer["error"] == "TaskRefused"
        assert "rule 'team c' is for this job" in answer["text"]


@pytest.fixture
def lax(node: Policed) -> Iterator[dict[str, str]]:
    """A policy and profiles of an attacker's, as the environment would name them."""
    home = node.home / "lax"
    home.mkdir()
    (home / "policy.toml").write_text(
        '[offer]\nfast = 1\n[[rules]]\nname = "all"\nprofiles = ["fast", "standard"]\n'
    )
    (home / "small.toml").write_text('extends = "standard"\n[limits]\npids = 77\n')
    yield {
        "RAYSANDBOX_POLICY": str(home / "policy.toml"),
        "RAYSANDBOX_PROFILE_PATH": str(home),
        "RAYSANDBOX_CGROUP": "/sys/fs/cgroup",
        "RAYSANDBOX_UID_RANGE": "65536:1024",
    }
    for each in home.iterdir():
        each.unlink()
    home.rmdir()


def test_a_client_s_environment_names_no_policy(node, lax):
    """env_vars of a job or a task choose neither policy nor profiles nor groups.

    Ray puts them into the worker's environment before any line of ours runs (the
    control: a stock worker has them).
    """
    seen = node.drive(
        """
        @ray.remote
        def variables():
            return {k: v for k, v in os.environ.items() if k.startswith("RAYSANDBOX_")}
        result = ray.get(variables.remote())
        """,
        runtime_env={"env_vars": lax},
        hook=False,
    )
    assert lax.items() <= seen.items()

    body = f"""
    LAX = {lax!r}
    @ray.remote(resources={{"sandbox:small": 1}}, max_retries=0)
    def limits():
        import os, resource
        pids = open("/proc/self/limits").read()
        mine = {{k: v for k, v in os.environ.items() if k.startswith("RAYSANDBOX_")}}
        return [mine, resource.getrlimit(resource.RLIMIT_NPROC)]
    again = {{"runtime_env": {{"env_vars": LAX}}}}
    result = {{
        "job": [ask("fast"), ask("standard"), ask(None), ask("small")],
        "task": [ask("fast", **again), ask("small", **again)],
        "inside": told(lambda: ray.get(limits.remote())),
    }}
    """
    found = node.drive(body, namespace="team-b", runtime_env={"env_vars": lax})
    for answer in (*found["job"][:2], found["task"][0]):
        assert answer["error"] == "TaskRefused"
        assert "rule 'team b'" in answer["text"]
    assert found["job"][2:] == ["strict", "small"]
    assert found["task"][1] == "small"
    assert found["inside"][0] == {}


def test_another_interpreter_is_refused_by_name(node):
    """A runtime_env that replaces the worker's command is refused with its key."""
    found = node.drive(
        f"""
        result = ask("strict", runtime_env={{"py_executable": {sys.executable!r}}})
        """,
        namespace="team-b",
    )
    assert found["error"] == "TaskRefused"
    assert "runtime_env.py_executable = [PATH] would allow one" in found["text"]


def test_ceilings_hold_whatever_the_profile_says(node):
    """standard has 8 GiB; with a ceiling of 256 MiB a task has 256 MiB."""
    found = node.drive(
        """
        @ray.remote(resources={"sandbox:standard": 1}, max_retries=0)
        def fill(mebibytes):
            return len(bytearray(mebibytes << 20))
        result = [
            told(lambda: ray.get(fill.remote(100))),
            told(lambda: ray.get(fill.remote(400))),
        ]
        """,
        namespace="team-a",
        metadata={"stage": "prod"},
    )
    assert found[0] == 100 << 20
    assert found[1]["error"] == "TaskOutOfMemory"
    assert "limits.memory allows 256 MiB" in found[1]["text"]


@pytest.mark.parametrize("how", ["broken", "writable", "gone"])
def test_a_policy_that_can_t_be_used_lets_nothing_run(node, how):
    """A worker that can't read the node's policy refuses every task, and says why.

    Guards against a policy that, once it is damaged, is none.
    """
    good = node.policy.read_text()
    try:
        if how == "broken":
            node.policy.write_text("untaged = 1\n" + good)
        elif how == "writable":
            node.policy.chmod(0o666)
        else:
            node.policy.unlink()
        found = node.drive('result = [ask("strict"), ask()]', namespace="team-b")
    finally:
        node.policy.write_text(good)
        node.policy.chmod(0o644)
    expected = {"broken": "unknown key", "writable": "chmod go-w", "gone": "no policy"}
    for answer in found:
        assert answer["error"] == "ProfileError"
        assert expected[how] in answer["text"]


def test_explain_says_what_the_worker_decided(node):
    """explain asks the cluster who a task belongs to, and decides as its worker."""
    found = node.drive(
        """
        tasks = [where.options(resources={f"sandbox:{tag}": 1}).remote()
                 for tag in ("small", "fast")]
        got = [told(lambda: ray.get(task)) for task in tasks]
        actor = ray.remote(resources={"sandbox:small": 1})(type("A", (), {})).remote()
        time.sleep(2)  # Ray hands on task events once a second
        job = ray.get_runtime_context().get_job_id()
        result = [got, [t.task_id().hex() for t in tasks], actor._actor_id.hex(), job]
        """,
        namespace="team-b",
    )
    got, tasks, actor, job = found

    def explain(identifier: str) -> dict[str, object]:
        done = node.command("policy", "explain", identifier, "--json")
        answer: dict[str, object] = json.loads(done.stdout)
        assert done.returncode == (0 if answer["allowed"] else 1)
        return answer

    allowed, refused = map(explain, tasks)
    assert (allowed["profile"], allowed["rule"], allowed["job"]) == (
        got[0], "team b", job,
    )  # fmt: skip
    assert refused["profile"] is None
    assert str(refused["why"]) in got[1]["text"]
    assert explain(actor)["tag"] == "small"
    assert explain(job)["profile"] == "strict"
