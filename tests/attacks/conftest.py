"""Actors and verdicts, made once: many probes share a jail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest

from raysandbox.profile.schema import Syscalls
from tests.attacks.catalogue import ATTACKS, Attack, choose
from tests.attacks.harness import Actor, Verdict
from tests.attacks.world import World

USER = int(os.environ.get("RAYSANDBOX_TEST_UID", "54321"))


def _actors() -> list[str]:
    return ["root", "user"] if os.geteuid() == 0 else ["user"]


@pytest.fixture(scope="session", params=_actors())
def actor(request: pytest.FixtureRequest) -> Iterator[Actor]:
    """Who starts the jails: root, and an ordinary user."""
    uid = gid = 0
    if request.param == "user":
        uid = os.geteuid() or USER
        gid = os.getegid() or USER
    world = World(uid, gid)
    try:
        made = Actor(
            request.param,
            uid,
            gid,
            world,
            profile_dir=world.profiles,
            cgroup_dirs=world.delegated,
            facts={"user": uid != 0},
        )
        filesystem = f"""
            [filesystem]
            why = "victims that the profile lets in"
            read = ["@system", "@python", "@working_dir", "{world.readonly}"]
            hide = ["{world.readonly}/hidden", "{world.readonly}/hidden-file"]
            """
        made.write_profile(
            "attack",
            f"""
            {filesystem}
            [limits]
            file_size = "1MiB"
            """,
        )
        groups = (*Syscalls().groups, "local_sockets")
        made.write_profile(
            "sockets",
            f"""
            {filesystem}
            [syscalls]
            groups = {json.dumps(groups)}
            why = "what standard has, to see the walls behind the filter"
            """,
        )
        yield made
    finally:
        world.close()


@pytest.fixture(scope="session")
def controls(actor: Actor) -> dict[str, Verdict]:
    """What every probe does outside."""
    shared = [(a.id, a.control) for a in ATTACKS if a.control != "own"]
    return actor.controls(shared)


@pytest.fixture(scope="session")
def attacks(actor: Actor, controls: dict[str, Verdict]) -> dict[str, Verdict]:
    """What every probe does inside; the controls have run before."""
    return actor.attacks([a.id for a in ATTACKS if a.control != "own"])


@pytest.fixture
def withstand(
    actor: Actor, request: pytest.FixtureRequest, controls: dict[str, Verdict]
) -> Callable[[Attack], None]:
    """Return the check of one shared attack: control first, then the jail."""

    def check(attack: Attack) -> None:
        control = controls[attack.id]
        if control.outcome in ("absent", *attack.lacks):
            why = f"this host has no such target: {control.outcome} {control.detail}"
            mandatory = os.environ.get("RAYSANDBOX_TEST_REQUIRE", "").split()
            if f"attack:{attack.id}" in mandatory:
                pytest.fail(why)
            pytest.skip(why)
        assert control.outcome == "ok", (
            f"the positive control of {attack.id} does not work, so a denial "
            f"inside would prove nothing: {control.outcome} {control.detail}"
        )
        inside = request.getfixturevalue("attacks")[attack.id]
        expected = choose(attack.jail, actor.facts)
        assert inside.outcome == expected, (
            f"{attack.id}: {attack.rule} Expected {expected} by {attack.wall}, "
            f"got {inside.outcome}: {inside.detail}"
        )

    return check
