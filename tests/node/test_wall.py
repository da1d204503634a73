"""The worker's wall, attacked from a program in the worker's place."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.conftest import USER
from tests.attacks.harness import start_as
from tests.node.nodes import delegate
from tests.node.probe import ATTACKS
from tests.require import require

ROOT = Path(__file__).parents[2]
STAGE = str(Path(__file__).resolve().with_name("stage.py"))

# Another error than outside, where one user is raylet's and all workers'.
_USER_SEES = {"names_of_processes"}


def _actors() -> list[str]:
    return ["root", "user"] if os.geteuid() == 0 else ["user"]


@pytest.fixture(scope="module", params=_actors())
def stage(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Everything that happened on stage, as root and as an ordinary user."""
    uid = os.geteuid()
    # The probe is the worker's program: its directory must be among those it sees.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(STAGE).parent}"}
    given: list[str] = []
    if request.param == "user":
        require("landlock:6")
        if uid == 0:
            uid = USER
            given = delegate(uid)
            environment["RAYSANDBOX_CGROUP"] = ":".join(given)
            environment["HOME"] = "/nonexistent"
    process = start_as(
        uid,
        uid if uid else 0,
        [sys.executable, STAGE],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err.decode()[-4000:]
    found = json.loads(out.splitlines()[-1])
    found["actor"] = request.param
    yield found
    # No keeper is on stage: groups are left to whoever started the workers.
    left = [
        str(path)
        for base in found["groups"]
        for path in Path(base).glob(f"raysandbox-*-w{found['raylet']}")
    ]
    for path in (*left, *given):
        subprocess.run(["find", path, "-depth", "-type", "d", "-delete"])
    for base in found["groups"]:
        with contextlib.suppress(OSError):  # gone with the above, or of use to others
            os.rmdir(base)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attack_of_a_worker_is_denied(stage, name):
    """What works beside raylet fails in a worker, whoever raylet runs as."""
    if stage["control"][name] != "ok":
        # An ordinary user has no such right to begin with.
        assert stage["actor"] == "user"
        assert name in {"bpf", "perf"}, stage["control"][name]
    if stage["actor"] == "user" and name in _USER_SEES:
        assert stage["protections"]["own part of /proc"] == "degraded"
        return
    assert stage["inside"][name] not in ("ok", "254"), name


def test_worker_is_the_process_that_raylet_started(stage):
    """Same pid, as raylet knows it; a worker with another kills raylet."""
    assert stage["inside"]["works"]["pid"] == stage["pid"]


def test_worker_has_what_ray_needs(stage):
    """Its sockets, a port of the range, its token, a /tmp and /dev/shm of its own."""
    works = stage["inside"]["works"]
    assert works["token"] == "secret-token"
    assert works["fds"] == []
    assert works["uid"] == 1000


def test_environment_is_made_from_lists(stage):
    """Neither the loader's variables nor an operator's secrets reach a worker."""
    names = set(stage["inside"]["works"]["variables"])
    assert not names & {
        "LD_PRELOAD",
        "PYTHONSTARTUP",
        "OPERATOR_SECRET",
        "RAY_AUTH_TOKEN",
    }
    assert "RAY_JOB_ID" in names


def test_worker_sees_itself_in_proc(stage):
    """With root's rights a /proc of its own; else the protection says DEGRADED."""
    if stage["actor"] == "root":
        assert stage["inside"]["works"]["processes"] == [stage["pid"]]
        assert stage["protections"]["own part of /proc"] == "enforced"
        assert stage["host_uid"] > 65535
    else:
        assert stage["protections"]["own part of /proc"] == "degraded"


def test_logs_are_the_workers_own(stage):
    """Nobody else reads them but root and raylet's user."""
    assert stage["log_mode"] & 0o007 == 0


def test_jail_is_made_inside_and_sees_no_secret(stage):
    """Wall 2 stands inside of wall 1, and the token has no path there."""
    said = stage["jail"]
    assert "jail exit 7" in said, said
    assert "/run/raysandbox" in said, said
    assert "cannot access '/run/raysandbox'" in said, said


def test_groups_of_the_dead_can_be_removed(stage):
    """What workers leave behind is empty; nobody of them lives on."""
    for base in stage["groups"]:
        for path in Path(base).glob(f"raysandbox-*-w{stage['raylet']}/**/cgroup.procs"):
            assert path.read_text() == "", path
