"""What a worker boundary comes to, by profile, host and surroundings; no kernel."""

from __future__ import annotations

import dataclasses
import os

import pytest

from raysandbox import client, profile, walls
from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.kernel import landlock, seccomp
from raysandbox.plan import State
from raysandbox.probe import Host
from raysandbox.profile.order import explain_order
from tests.require import require

HOST = Host(
    kernel="6.18.0",
    arch="x86_64",
    euid=0,
    landlock_abi=7,
    seccomp=True,
    seccomp_notify=True,
    namespaces_reason="",
    namespaces_remedy="",
)


@pytest.fixture
def around(tmp_path):
    """A worker that the hook alone came to."""
    return walls.Surroundings(
        python=[],
        scratch=str(tmp_path),
        own_proc="/proc/self",
        ports=frozenset({6379, 10002}),
    )


@pytest.fixture
def trusted():
    return profile.load("trusted")


@pytest.fixture(autouse=True)
def threads_are_spared(monkeypatch):
    """The kernel that is planned for, not the one that runs the tests."""
    monkeypatch.setattr(landlock, "scopes_signals_of_threads", lambda: True)


def states(made):
    return {each.name: each.state for each in made.protections}


def changed(chosen, table, **values):
    section = getattr(chosen, table).model_copy(update=values)
    return chosen.model_copy(update={table: section})


def test_ports_are_rays_alone(trusted, around):
    """Exactly those that Ray has; binding is governed and has no rule."""
    made = walls.plan_walls(trusted, HOST, around)
    assert made.ports == (6379, 10002)
    assert made.governed.net == 3
    assert states(made)["network ports"] is State.ENFORCED


def test_ports_that_the_kernel_chooses_are_less(trusted, around):
    """The reason is in the report."""
    loose = dataclasses.replace(around, loose_ports="--node-manager-port is not set")
    made = walls.plan_walls(trusted, HOST, loose)
    assert states(made)["network ports"] is State.DEGRADED


@pytest.mark.parametrize("count", [0, 60000])
def test_ports_that_can_not_be_told_refuse(count, trusted, around):
    """Required unless the profile says otherwise; then the report says off."""
    many = dataclasses.replace(around, ports=frozenset(range(1, 1 + count)))
    with pytest.raises(UnsupportedError, match="network ports"):
        walls.plan_walls(trusted, HOST, many)
    lax = changed(trusted, "network", required=False)
    made = walls.plan_walls(lax, HOST, many)
    assert states(made)["network ports"] is State.OFF
    assert made.governed.net == 0


@pytest.mark.parametrize("abi", [0, 2])
def test_no_landlock_no_worker_boundary(abi, trusted, around):
    """Nothing else would stand there, whatever the profile requires."""
    lax = changed(trusted, "landlock", required=False)
    host = dataclasses.replace(HOST, landlock_abi=abi)
    with pytest.raises(UnsupportedError, match="landlock"):
        walls.plan_walls(lax, host, around)


def test_signal_scope_that_hits_threads_is_left_out(trusted, around, monkeypatch):
    """A process that can't signal itself would not be Ray's worker any more."""
    monkeypatch.setattr(landlock, "scopes_signals_of_threads", lambda: False)
    made = walls.plan_walls(trusted, HOST, around)
    assert made.governed.scoped == 1
    assert states(made)["landlock"] is State.DEGRADED


def test_launcher_gives_what_threads_can_not_have(trusted, around):
    """Namespaces are on behind the node's wall, but for two, which stay off."""
    alone = states(walls.plan_walls(trusted, HOST, around))
    both = states(
        walls.plan_walls(trusted, HOST, dataclasses.replace(around, launched=True))
    )
    for name in ("user", "mount", "ipc", "uts", "cgroup"):
        assert alone[f"{name} namespace"] is State.OFF
        assert both[f"{name} namespace"] is State.ENFORCED
    assert both["pid namespace"] is both["network namespace"] is State.OFF
    assert both["root file system"] is State.ENFORCED


def test_required_namespaces_refuse(trusted, around):
    strict = changed(trusted, "namespaces", required=True)
    for launched in (False, True):
        where = dataclasses.replace(around, launched=launched)
        with pytest.raises(UnsupportedError, match="namespace"):
            walls.plan_walls(strict, HOST, where)


def test_view_has_no_secrets(trusted, around):
    """The view of a fresh installation: neither homes nor /etc nor others' /proc."""
    made = walls.plan_walls(trusted, HOST, around)
    for path in ("/", "/etc", "/home", "/root", "/tmp", "/var", "/sys", "/dev"):
        assert os.path.realpath(path) not in made.paths
    assert made.paths["/proc"] == landlock.READ_DIR
    assert made.paths[around.scratch] == landlock.WRITE
    assert "/etc/shadow" not in made.paths


def test_hidden_paths_are_refused(trusted, around):
    """Landlock's rules only add: hiding part of a view would be a promise."""
    hiding = changed(trusted, "filesystem", hide=("/usr/share",))
    with pytest.raises(ProfileError, match="hide"):
        walls.plan_walls(hiding, HOST, around)


@pytest.mark.parametrize("name", ["strict", "standard", "fast"])
def test_jails_profiles_are_refused(name, around):
    with pytest.raises(ProfileError, match="boundary"):
        walls.plan_walls(profile.load(name), HOST, around)


@pytest.mark.parametrize("name", ["strict", "standard", "fast"])
def test_trusted_is_laxer_than_all_others(name, trusted):
    """No shipped profile exceeds it anywhere."""
    assert explain_order(trusted, profile.load(name))[0] == "laxer"
    assert explain_order(profile.load(name), trusted)[0] == "stricter"


def test_filter_denies_what_landlock_does_not_see(trusted, around):
    """More without a launcher than with one; both differ from the profile's own."""
    require("seccomp")
    own = seccomp.compile_policy(trusted.syscalls, notify=False).bpf
    alone = walls.plan_walls(trusted, HOST, around).program
    launched = dataclasses.replace(around, launched=True, own_user=True)
    assert walls.plan_walls(trusted, HOST, launched).program == own
    assert alone != own


def test_worker_boundary_and_jail_keys_exclude_each_other(tmp_path):
    """A key that nobody would keep is an error on either side."""
    for text in (
        "boundary = 'worker'\nwhy = 'x'\n",
        "[network]\nmode = 'ray'\nwhy = 'x'\n",
        "[limits]\noutput = 'unlimited'\n",
    ):
        file = tmp_path / "mine.toml"
        file.write_text(text)
        (problem,) = profile.check(file)
        assert 'boundary = "worker"' in str(problem)


@pytest.mark.parametrize(
    ("resources", "wanted"),
    [
        (None, ""),
        ({"GPU": 1}, ""),
        ({"sandbox:strict": 1}, ""),
        ({"sandbox:trusted": 0.001}, "trusted"),
        ({"sandbox:trusted_group_0_0123456789abcdef0123": 1}, "trusted"),
        ({"sandbox:of-another-machine": 1}, "of-another-machine"),
        ({"sandbox:trusted": 1, "sandbox:strict": 1}, ""),
    ],
)
def test_tasks_of_worker_boundaries_are_marked(resources, wanted):
    """Others share workers as before; unknown profiles get workers of their own."""
    assert client._wanted(resources) == wanted


def test_marker_is_read_where_it_stands():
    text = '{"env_vars": {"RAYSANDBOX_WORKER_PROFILE": "trusted"}}'
    assert client.marker_of(text) == "trusted"
    assert client.marker_of("{}") == ""
    assert client.marker_of('{"env_vars": {"A": "RAYSANDBOX_WORKER_PROFILE"}}') == ""
