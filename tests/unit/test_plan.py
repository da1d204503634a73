"""The plan: the same bytes for the same profile, and nothing enforced in silence."""

from __future__ import annotations

import dataclasses
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest

from raysandbox import plan
from raysandbox import profile as profiles
from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.plan import Context, IdRange, State
from raysandbox.probe import Host
from raysandbox.profile.schema import Profile
from raysandbox.run import cgroup_limits, limit_protections

#: A host that has everything; each test takes something away.
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
CONTEXT = Context(ids=IdRange(0x70000000, 4))


def profile(**sections: Any) -> Profile:
    """Return ``strict`` with what the test changes."""
    return Profile.model_validate({"name": "mine", **sections})


def compiled(
    wanted: Profile | None = None, host: Host = HOST, **context: Any
) -> plan.Plan:
    """Compile for a host that has everything but what the test takes away."""
    return plan.compile(
        wanted or profile(), host, dataclasses.replace(CONTEXT, **context)
    )


def states(made: plan.Plan) -> dict[str, State]:
    """Return what is recorded for each protection."""
    names = [wall.name for wall in made.protections]
    assert len(names) == len(set(names)), "a protection is recorded twice"
    return {wall.name: wall.state for wall in made.protections}


def records(made: plan.Plan, kind: int) -> list[bytes]:
    """Return the payloads of one kind of record."""
    return [payload for each, payload in made.records if each == kind]


# --- pure ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strict", "standard", "fast"])
def test_the_same_input_makes_the_same_bytes(name: str) -> None:
    """No clock, no chance, no order of a set is in a plan."""
    loaded = profiles.load_file(profiles.shipped_dir() / f"{name}.toml")
    one, other = compiled(loaded), compiled(loaded)
    assert one == other
    assert one.encode() == other.encode()
    assert hash(one) == hash(other)


def test_compiling_changes_nothing(tmp_path: Path) -> None:
    """No file, no descriptor, no limit of ours is touched."""
    (tmp_path / "data").mkdir()
    wanted = profile(
        filesystem={"read": (str(tmp_path / "data"),), "why": "x"},
    )
    before = (
        sorted(os.listdir("/proc/self/fd")),
        sorted(os.listdir(tmp_path)),
        [resource.getrlimit(i) for i in range(16)],
        dict(os.environ),
        os.getcwd(),
    )
    compiled(wanted)
    assert before == (
        sorted(os.listdir("/proc/self/fd")),
        sorted(os.listdir(tmp_path)),
        [resource.getrlimit(i) for i in range(16)],
        dict(os.environ),
        os.getcwd(),
    )


def test_the_encoding_is_what_the_launcher_reads() -> None:
    """Header, lengths and types, as native/plan.h has them."""
    encoded = compiled().encode()
    magic, length, count = struct.unpack_from("<8sII", encoded)
    assert (magic, length) == (b"RSBXPLN1", len(encoded))
    offset, seen = 16, 0
    while offset < length:
        kind, zero, size = struct.unpack_from("<HHI", encoded, offset)
        assert 1 <= kind <= 25
        assert zero == 0
        offset += 8 + size
        seen += 1
    assert (offset, seen) == (length, count)


# --- what is recorded ----------------------------------------------------------


def test_a_full_host_enforces_all() -> None:
    """Every wall of ``strict``, and no other state."""
    made = states(compiled())
    assert set(made.values()) == {State.ENFORCED}
    assert set(made) == {
        *(f"{n} namespace" for n in ("user", "pid", "mount", "network", "ipc", "uts")),
        "cgroup namespace",
        "own host user",
        "root file system",
        "scratch quota",
        "resource limits",
        "landlock",
        "seccomp",
        "no new privileges",
        "no capabilities",
    }


@pytest.mark.parametrize(
    ("lack", "sections", "feature"),
    [
        ({"landlock_abi": 0}, {}, "landlock"),
        ({"landlock_abi": 3}, {"landlock": {"min_abi": 4}}, "landlock"),
        ({"seccomp": False, "seccomp_notify": False}, {}, "seccomp"),
        ({"namespaces_reason": "unshare: no", "namespaces_remedy": "x"}, {}, "namesp"),
    ],
)
def test_a_host_that_lacks_a_required_wall_is_refused(lack, sections, feature) -> None:
    """With what is needed, what is there, and what to do; nothing else is tried."""
    host = dataclasses.replace(HOST, **lack)
    with pytest.raises(UnsupportedError) as caught:
        compiled(profile(**sections), host)
    error = caught.value
    assert error.feature.startswith(feature)
    assert error.profile == "mine"
    assert all((error.need, error.have, error.remedy))
    # The positive control: the same profile on a host that has it.
    assert compiled(profile(**sections), HOST)


@pytest.mark.parametrize(
    ("lack", "section", "name"),
    [
        ({"landlock_abi": 0}, "landlock", "landlock"),
        ({"seccomp": False, "seccomp_notify": False}, "syscalls", "seccomp"),
    ],
)
def test_what_is_not_required_is_recorded_as_off(lack, section, name) -> None:
    """``required = false`` runs without it, and says so with the reason.

    Guards against success without a wall as a silent default.
    """
    lax = profile(**{section: {"required": False, "why": "an old host"}})
    made = compiled(lax, dataclasses.replace(HOST, **lack))
    wall = next(w for w in made.protections if w.name == name)
    assert wall.state is State.OFF
    assert "the profile does not require it" in wall.reason
    rest = {n: s for n, s in states(made).items() if n != name}
    assert set(rest.values()) == {State.ENFORCED}


def test_namespaces_are_never_given_up() -> None:
    """``required = false`` can't mean a jail without a root of its own."""
    lax = profile(namespaces={"required": False, "why": "x"})
    host = dataclasses.replace(HOST, namespaces_reason="no", namespaces_remedy="y")
    with pytest.raises(UnsupportedError):
        compiled(lax, host)


@pytest.mark.parametrize(
    ("abi", "state", "reason"),
    [
        (1, State.DEGRADED, "TCP rules (ABI 4), device ioctls (ABI 5), scopes (ABI 6)"),
        (4, State.DEGRADED, "device ioctls (ABI 5), scopes (ABI 6)"),
        (5, State.DEGRADED, "scopes (ABI 6)"),
        (6, State.ENFORCED, ""),
        (9, State.ENFORCED, ""),
    ],
)
def test_an_older_landlock_is_degraded_by_name(abi, state, reason) -> None:
    """What an ABI does not have is named."""
    made = compiled(host=dataclasses.replace(HOST, landlock_abi=abi))
    wall = next(w for w in made.protections if w.name == "landlock")
    assert (wall.state, reason in wall.reason) == (state, True)


@pytest.mark.parametrize("name", ["network", "ipc", "uts", "cgroup"])
def test_a_namespace_that_the_profile_leaves_out_is_off(name) -> None:
    """And its flag is not in the plan."""
    made = compiled(profile(namespaces={name: False, "why": "x"}))
    assert states(made)[f"{name} namespace"] is State.OFF
    outer, inner = struct.unpack("<II", records(made, 1)[0])
    assert (outer | inner) & plan._NEW[name] == 0
    full_outer, full_inner = struct.unpack("<II", records(compiled(), 1)[0])
    assert (full_outer | full_inner) == sum(plan._NEW.values())


def test_other_degradations_say_why() -> None:
    """An ordinary user, a filter that only logs, no supervisor."""
    made = compiled(ids=IdRange(1000, 1))
    assert states(made)["own host user"] is State.OFF
    made = compiled(profile(syscalls={"action": "log", "why": "x"}))
    assert states(made)["seccomp"] is State.DEGRADED
    host = dataclasses.replace(HOST, seccomp_notify=False)
    assert states(compiled(host=host, notify=True))["seccomp"] is State.DEGRADED
    assert states(compiled(host=host, notify=False))["seccomp"] is State.ENFORCED
    made = compiled(profile(landlock={"enabled": False, "why": "x"}))
    assert states(made)["landlock"] is State.OFF


def test_a_survey_finds_all_that_is_missing() -> None:
    """Doctor names every lack at once, and what would hold beside it."""
    host = dataclasses.replace(
        HOST, landlock_abi=0, seccomp=False, namespaces_reason="no"
    )
    found, missing = plan.survey(profile(), host, CONTEXT)
    assert [each.feature for each in missing] == ["namespaces", "landlock", "seccomp"]
    assert {"root file system", "no capabilities"} <= {wall.name for wall in found}
    assert plan.survey(profile(), HOST, CONTEXT) == (compiled().protections, ())


def test_limits_are_recorded_in_the_profiles_words() -> None:
    """Each limit that control groups enforce, whatever became of it."""
    from raysandbox.kernel.cgroup import Status

    limits = cgroup_limits(profile(limits={"cpu_weight": 50}))
    report = {name: Status("ENFORCED") for name in limits.asked()}
    report["memory_bytes"] = Status("OFF", "no memory controller")
    report["oom_group"] = Status("OFF", "version 1")
    found = {wall.name: wall for wall in limit_protections(report)}
    assert set(found) == {
        "limits.memory", "limits.swap", "limits.cpu", "limits.cpu_weight",
        "limits.pids", "limits.oom_group",
    }  # fmt: skip
    assert found["limits.memory"].state is State.OFF
    assert found["limits.memory"].reason == "no memory controller"
    assert found["limits.oom_group"].state is State.DEGRADED


# --- what is refused -----------------------------------------------------------


@pytest.mark.parametrize("key", ["read", "write"])
def test_a_path_that_is_not_there_is_refused(key) -> None:
    """Leaving it out would run the task with less than the profile says."""
    wanted = profile(filesystem={key: ("/no/such/path",), "why": "x"})
    with pytest.raises(ProfileError) as caught:
        compiled(wanted)
    assert caught.value.where == f"filesystem.{key}"
    assert caught.value.value == "/no/such/path"
    with pytest.raises(ProfileError, match="@working_dir"):
        compiled(working_dirs=["/no/such/path"])


def test_what_a_plan_can_not_carry_is_refused() -> None:
    """A NUL byte would end a string early and hide the rest."""
    with pytest.raises(ProfileError, match="NUL"):
        compiled(extra_environment={"A": "x\0y"})
    with pytest.raises(ProfileError, match="NUL"):
        compiled(chdir="/x\0y")


def test_an_indispensable_namespace_is_refused_here_too() -> None:
    """A model that was made without validation is stopped all the same."""
    wanted = profile()
    broken = wanted.model_copy(
        update={"namespaces": wanted.namespaces.model_copy(update={"pid": False})}
    )
    with pytest.raises(ProfileError, match=r"namespaces\.pid"):
        compiled(broken)


def test_a_device_that_is_none_is_refused() -> None:
    """What is bound as a device is a character device of this host."""
    broken = profile().model_copy(update={"devices": ("shm",)})
    with pytest.raises(ProfileError, match="not a character device"):
        compiled(broken)


# --- what is in it -------------------------------------------------------------


def test_the_environment_is_chosen_by_name() -> None:
    """Nothing passes that the profile does not name; ours win over the task's."""
    made = compiled(
        environment={
            "LANG": "de_DE.UTF-8",
            "LC_ALL": "C",
            "AWS_SECRET_ACCESS_KEY": "s3cret",
            "RAY_AUTH_TOKEN": "t0ken",
            "LD_PRELOAD": "/evil.so",
            "HOME": "/root",
        },
        extra_environment={"GIVEN": "1", "HOME": "/elsewhere"},
    )
    found = {payload.rstrip(b"\0").decode() for payload in records(made, 20)}
    assert {"LANG=de_DE.UTF-8", "LC_ALL=C", "GIVEN=1", "HOME=/scratch/home"} <= found
    text = "\n".join(sorted(found))
    for secret in ("s3cret", "t0ken", "evil", "/root", "/elsewhere"):
        assert secret not in text


def test_binds_are_read_only_but_where_the_profile_says(tmp_path: Path) -> None:
    """A nested path is covered by its outer one, a link by what it points to."""
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    wanted = profile(
        filesystem={
            "read": (f"{tmp_path}/in", f"{tmp_path}/in/deeper", f"{tmp_path}/link"),
            "write": (f"{tmp_path}/out", "@scratch"),
            "why": "x",
        }
    )
    found = {}
    for payload in records(compiled(wanted), 5):
        (flags,) = struct.unpack_from("<I", payload)
        source, target = payload[4:].rstrip(b"\0").decode().split("\0")
        if not target.startswith("/dev/"):
            found[target] = (flags, source)
    assert found == {
        f"{tmp_path}/in": (1, f"{tmp_path}/in"),
        f"{tmp_path}/link": (1, f"{tmp_path}/in"),
        f"{tmp_path}/out": (0, f"{tmp_path}/out"),
    }


def test_limits_reach_the_plan() -> None:
    """The wall time only where the launcher is to enforce it."""
    wanted = profile(limits={"open_files": 77, "wall_time": "1500ms"})
    assert records(compiled(wanted), 23) == []
    made = compiled(wanted, wall_time=True)
    assert struct.unpack("<Q", records(made, 23)[0]) == (1500,)
    limits = {
        struct.unpack("<IQQ", each)[0]: struct.unpack("<IQQ", each)[1:]
        for each in records(made, 13)
    }
    assert limits[resource.RLIMIT_NOFILE] == (77, 77)
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    assert resource.RLIMIT_FSIZE in limits
    lax = profile(limits={"file_size": "unlimited"})
    assert resource.RLIMIT_FSIZE not in {
        struct.unpack_from("<I", each)[0] for each in records(compiled(lax), 13)
    }


def test_the_filter_is_in_the_plan_with_its_flags() -> None:
    """With a supervisor, and only then, the listener is asked for."""
    for notify, flags in ((False, 0), (True, 8)):
        (payload,) = records(compiled(notify=notify), 18)
        assert struct.unpack_from("<I", payload) == (flags,)
        assert len(payload) % 8 == 4


# --- root file systems of images ----------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root with links that would lead outside of it."""
    for name in ("usr/lib", "etc", "srv/data/deep", "home/user", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    for name, target in (
        ("absolute", "/etc/passwd"),
        ("relative", "../../../../etc/passwd"),
        ("deep", "/srv/absolute"),
        ("directory", "/etc"),
        ("circle", "/srv/circle"),
    ):
        (tmp_path / "srv" / name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "/srv/absolute",
        "/srv/relative",
        "/srv/deep",
        "/srv/directory/passwd",
        "/srv/../../../etc/passwd",
        "/etc/./passwd",
    ],
)
def test_no_link_leads_out_of_an_image(image, path):
    """The control: the host's own root has that file, and the kernel would find it."""
    assert os.path.realpath("/etc/passwd") == "/etc/passwd"
    assert plan.inside(str(image), path) == f"{image}/etc/passwd"
    assert not os.path.exists(plan.inside(str(image), path))


def test_a_circle_of_links_is_an_error(image):
    """Not a path with a link left in it."""
    with pytest.raises(ProfileError, match="leads in a circle"):
        plan.inside(str(image), "/srv/circle")


def test_of_an_image_all_is_seen_but_what_is_made_anew(image):
    """And around what goes there instead; its /etc is as the host's is."""
    found = plan.image_paths(str(image), ["/srv/data/deep/session", "/home"])
    own = [path for path in found if not path.startswith("/etc")]
    links = [f"/srv/{n}" for n in ("absolute", "circle", "deep", "directory")]
    assert own == ["/lib", *links, "/srv/relative", "/usr"]
    assert plan.image_paths(str(image))[:4] == ["/home", "/lib", "/srv", "/usr"]
