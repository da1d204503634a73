"""The worker's wall, attacked from a program in the worker's place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox import policy
from raysandbox.errors import UnsupportedError
from raysandbox.node import wall
from raysandbox.plan import Record, described
from tests.attacks.conftest import USER
from tests.attacks.harness import start_as
from tests.node.nodes import delegated, remove_group
from tests.node.probe import ATTACKS
from tests.require import require
from tests.unit.test_plan import HOST

ROOT = Path(__file__).parents[2]
STAGE = str(Path(__file__).resolve().with_name("stage.py"))

# The ABI that denies it: on older kernels the wall says what it lacks.
_BY_LANDLOCK = {
    "connect_to_a_foreign_port": 4,
    "connect_to_a_foreign_port_by_ipv6": 4,
    "listen_outside_the_range": 4,
    "abstract_socket": 6,
}
# Another error than outside, where one user is raylet's and all workers'.
_USER_SEES = {"names_of_processes", "names_of_workers"}


def _actors() -> list[str]:
    return ["root", "named", "user"] if os.geteuid() == 0 else ["user"]


@pytest.fixture(scope="module", params=_actors())
def stage(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Everything that happened on stage, as root and as an ordinary user.

    As root also with a policy that names one user for all workers.
    """
    uid = os.geteuid()
    # The probe is the worker's program: its directory must be among those it sees.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(STAGE).parent}"}
    with contextlib.ExitStack() as given:
        if request.param != "root":
            require("landlock:6")
            if uid == 0 and request.param == "user":
                uid = USER
                environment |= given.enter_context(delegated(uid))
                environment["HOME"] = "/nonexistent"
        process = start_as(
            uid,
            uid if uid else 0,
            [sys.executable, STAGE, str(USER) if request.param == "named" else "auto"],
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=500)  # an emulated one is slow
        assert process.returncode == 0, err.decode()[-4000:]
        found = json.loads(out.splitlines()[-1])
        found["actor"] = request.param
        yield found
        # No keeper is on stage: groups are left to whoever started the workers.
        for base in found["groups"]:
            for path in Path(base).glob(f"raysandbox-*-w{found['raylet']}"):
                remove_group(path)
    for base in found["groups"]:
        with contextlib.suppress(OSError):  # gone with the above, or of use to others
            os.rmdir(base)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attack_of_a_worker_is_denied(stage, name):
    """What works beside raylet fails in a worker, whoever raylet runs as."""
    control = stage["control"][name]
    needed = _BY_LANDLOCK.get(name, 0)
    if stage["landlock_abi"] < needed:
        assert stage["protections"]["ports and signals"] in ("degraded", "off")
        require(f"landlock:{needed}")
    if name.endswith("multipath") and control in ("EPROTONOSUPPORT", "ENOPROTOOPT"):
        control = "ok"  # this kernel has none, or it is turned off
    if control != "ok":
        # An ordinary user has no such right to begin with.
        assert stage["actor"] == "user"
        assert name in {"bpf", "perf"}, control
    if stage["actor"] == "user" and name in _USER_SEES:
        assert stage["protections"]["own part of /proc"] == "degraded"
        return
    assert stage["inside"][name] not in ("ok", "254"), name


def test_ports_are_governed_where_the_policy_names_them(stage):
    """Without ``worker.connect`` a worker connects to any port, and that is said.

    Whatever gets around rules on ports is denied by the filter, with the key or not.
    """
    require("landlock:4")
    here, any_port = stage["inside"], stage["open"]
    plain = ("connect_to_a_foreign_port", "connect_to_a_foreign_port_by_ipv6")
    assert {here[name] for name in plain} == {"EACCES"}
    assert {any_port[name] for name in plain} == {"ok"}
    around = {name for name in any_port if name.startswith("connect_")} - {*plain}
    assert len(around) == 3
    assert {at[name] for at in (here, any_port) for name in around} == {"EPERM"}
    assert here["listen_outside_the_range_by_multipath"] == "EPERM"
    assert stage["protections"]["ports and signals"] == "enforced"
    said = stage["open_protections"]["ports and signals"]
    assert said.startswith("degraded: not governed: connecting to any port")
    assert "worker.connect" in said


def _ports(connect, host=None, **of_node):
    """Return the TCP ports of a worker's plan, by right, and what is said of them."""
    node = policy.resolve(policy.Policy(worker=policy.Worker(connect=connect)))
    session = wall.Session(**{f.name: "/x" for f in dataclasses.fields(wall.Session)})
    given = {"bind_ports": (20100, 20109), "own_ports": {"--port": 6379}} | of_node
    builder = wall._WorkerBuilder(
        wall.Wall(node=node, **given), session, host or HOST, None
    )
    builder.landlock()
    found: dict[int, list[tuple[int, int]]] = {}
    for kind, payload in builder.records:
        if kind == Record.LANDLOCK_PORTS:
            right, first, last = struct.unpack("<QII", payload)
            found.setdefault(right, []).append((first, last))
    return found, described(builder.protections)["ports and signals"]


def test_ports_are_those_of_the_policy_and_of_this_node():
    """No more: the list is exact, and where it is left out nothing is governed."""
    found, said = _ports((7001, "20000-20200"))
    assert found[1] == [(20100, 20109)]
    assert sorted(found[2]) == [
        (6379, 6379),
        (7001, 7001),
        (20000, 20200),
        (20100, 20109),
    ]
    assert said.startswith("enforced")
    found, said = _ports(())
    assert sorted(found[2]) == [(6379, 6379), (20100, 20109)]
    found, said = _ports(None)
    assert 2 not in found
    assert "connecting to any port (worker.connect says which)" in said


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"bind_ports": None}, "--min-worker-port, --max-worker-port"),
        ({"own_ports": {"--node-manager-port": 0}}, "--node-manager-port"),
        ({"host": dataclasses.replace(HOST, landlock_abi=3)}, "Linux 6.7"),
    ],
)
def test_ports_that_can_not_be_governed_refuse(lacking, message):
    """The key is named; without it the same node starts, and says what it lacks."""
    with pytest.raises(UnsupportedError, match=message) as caught:
        _ports((7001,), **lacking)
    assert "take worker.connect out of the policy" in str(caught.value)
    _, said = _ports(None, **lacking)
    assert said.startswith(("degraded: ", "off: "))


@pytest.mark.root
def test_workers_with_one_user_can_signal_each_other():
    """Control of the next: user namespaces of their own do not keep them apart."""
    inside = ["unshare", "--user", "--map-root-user"]
    with start_as(USER, USER, [*inside, "sleep", "60"], cwd="/") as victim:
        kill = [*inside, "sh", "-c", f"kill -0 {victim.pid}"]
        assert start_as(USER, USER, kill, cwd="/").wait(10) == 0
        victim.kill()


def _compiled(worker, **of_host):
    """Return the walls of a worker's domain on a host that has this."""
    node = policy.resolve(policy.Policy(worker=worker))
    session = wall.Session(**{f.name: "/x" for f in dataclasses.fields(wall.Session)})
    host = dataclasses.replace(HOST, euid=0, **of_host)
    builder = wall._WorkerBuilder(wall.Wall(node=node), session, host, None)
    builder.landlock()
    return described(builder.protections)


def test_workers_with_one_user_need_a_domain_for_signals():
    """A policy's own user is refused where nothing else keeps its workers apart.

    Guards against asking only who raylet runs as: with root and a user of all
    workers' one of them ended any other.
    """
    named = policy.Worker(user=str(USER))
    assert _compiled(named, landlock_abi=6)
    assert _compiled(policy.Worker(), landlock_abi=5)
    with pytest.raises(UnsupportedError, match=r"worker\.user") as caught:
        _compiled(named, landlock_abi=5)
    assert 'worker.user = "auto"' in str(caught.value)


# In a pid namespace of the test's own: what stands for raylet, a stranger, and a
# worker that is the second process of a namespace of its own.
CONFUSED = """
import os, signal, subprocess, sys
stranger = subprocess.Popen(["sleep", "60"])
worker = subprocess.Popen(
    ["unshare", "--fork", "--pid", "sh", "-c", "sh -c 'echo $$; exec sleep 60' & wait"],
    stdout=subprocess.PIPE, text=True)
said = int(worker.stdout.readline())
os.kill(said, signal.SIGKILL)  # as raylet does with what a worker says it is
print(os.getpid(), stranger.pid, said, stranger.wait(10), worker.poll(), flush=True)
"""


@pytest.mark.root
def test_worker_with_other_pids_has_a_stranger_killed():
    """Control of the next: raylet signals the pid that a worker says it has."""
    command = ["unshare", "--fork", "--pid", "--kill-child", sys.executable, "-c"]
    done = subprocess.run([*command, CONFUSED], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "2", "2", "-9", "None"], done.stderr


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
    if stage["actor"] != "user":
        # Also where others have its user: their user namespaces are not its own.
        assert stage["inside"]["works"]["processes"] == [stage["pid"]]
        assert stage["protections"]["own part of /proc"] == "enforced"
    if stage["actor"] == "root":
        assert stage["host_uid"] > 65535
    elif stage["actor"] == "named":
        assert stage["host_uid"] == USER
        assert stage["protections"]["own host user"] == "degraded"
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
            # Others' workers remove those of the dead, too.
            with contextlib.suppress(FileNotFoundError):
                assert path.read_text() == "", path
