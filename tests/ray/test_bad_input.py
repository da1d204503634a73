"""What is missing or broken: the task's owner is told, and the worker carries on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raysandbox
from raysandbox.profile import shipped_dir
from tests.attacks.harness import start_as
from tests.require import require

USER = int(os.environ.get("RAYSANDBOX_TEST_UID", "54321"))
DRIVER = Path(__file__).resolve().with_name("bad_input_driver.py")
PROFILES = {
    "future": '[landlock]\nmin_abi = 99\n[limits]\nrequired = false\nwhy = "x"\n',
    "nowhere": '[filesystem]\nread = ["/no/such/path"]\nwhy = "not there"\n',
    "lax": '[limits]\nrequired = false\nwhy = "no groups here"\n',
    **dict.fromkeys(("one", "two", "three", "four"), ""),
}

Case = dict[str, Any]


def _reports(
    start: Callable[..., subprocess.Popen[bytes]], uid: int
) -> dict[str, Case]:
    """Run the driver with a copy of the package, and return its lines by case."""
    # Not a link to it: jails see the copy alone. Not below a sticky directory
    # that the profiles would lie in directly.
    here = Path(tempfile.mkdtemp(prefix="rsx-bad-", dir="/var/tmp"))
    try:
        tree, site = here / "tree", here / "site"
        shutil.copytree(
            os.path.dirname(raysandbox.__file__),
            tree / "raysandbox",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        if not (tree / "raysandbox" / "_profiles").exists():
            shutil.copytree(shipped_dir(), tree / "profiles")
        site.mkdir()
        for name, text in PROFILES.items():
            (site / f"{name}.toml").write_text(f'extends = "strict"\n{text}')
        for path in (here, *here.rglob("*")):
            os.chown(path, uid, uid)
            path.chmod(0o755 if path.is_dir() or "_bin" in path.parts else 0o644)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(here),
            "PYTHONPATH": str(tree),
            "RAYSANDBOX_PROFILE_PATH": str(site),
            "RAYSANDBOX_UID_RANGE": "1600000000:80",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            **{k: v for k, v in os.environ.items() if k.startswith("RSX_TEST_")},
        }
        process = start(
            [sys.executable, str(DRIVER), str(here)],
            env=environment,
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err.decode(errors="replace")[-4000:]
        lines = [line for line in out.splitlines() if line.startswith(b'{"case"')]
        return {case["case"]: case for case in map(json.loads, lines)}
    finally:
        shutil.rmtree(here, ignore_errors=True)


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    """What root's cluster reported; its tmpfs goes with its mount namespace."""
    require("root", "program:unshare", "cgroup:pids", "cgroup1")

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", *command], **options
        )

    return _reports(start, 0)


@pytest.fixture(scope="module")
def users_cases() -> dict[str, Case]:
    """What an ordinary user's cluster reported."""
    require("userns")
    uid = USER if os.geteuid() == 0 else os.geteuid()
    return _reports(lambda command, **o: start_as(uid, uid, command, **o), uid)


def told(case: Case, error: str, *words: str) -> None:
    """The owner caught a Ray task error of ours, soon, with these words."""
    assert case.get("error") == error, case
    assert case["ray"], case
    for word in words:
        assert word in case["message"], case
    assert case["seconds"] < 30, case


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("unknown tag", "ProfileError", ['"ghost": no such profile', "strict"]),
        ("impossible tag", "ProfileError", ['"Not A Name": must be of a-z']),
        ("two tags", "ProfileError", ["standard, strict", "takes one sandbox tag"]),
        (
            "missing path",
            "ProfileError",
            ['filesystem.read = "/no/such/path"'],
        ),
        (
            "missing wall",
            "UnsupportedError",
            ["profile 'future' requires landlock", "need ABI 99", "To fix: boot Linux"],
        ),
        ("no launcher", "SetupError", ["raysandbox-launch is missing", "install the"]),
        ("no ids", "SetupError", ["all 60 host ids", "RAYSANDBOX_UID_RANGE"]),
        (
            "no pids",
            "SetupError",
            ["Resource temporarily unavailable", "never started"],
        ),
    ],
)
def test_what_can_not_be_had_is_told(name, error, words, cases) -> None:
    """File, key and value, or need, have and remedy; no line of the task ran."""
    told(cases[name], error, *words)


@pytest.mark.parametrize("name", ["launcher again", "ids again", "pids again"])
def test_what_comes_back_is_used(name, cases) -> None:
    """The same task under the same profile runs once the host has it again."""
    assert "value" in cases[name], cases[name]


@pytest.mark.parametrize("name", ["no space", "no space, next", "no space, event"])
def test_a_full_disk_fails_no_task(name, cases) -> None:
    """What a task prints and what we log is lost; its result is not."""
    assert "value" in cases[name], cases[name]


def test_events_go_on_after_a_full_disk(cases) -> None:
    """Later ones are there, each on a line of its own; one may have been cut."""
    assert "value" in cases["space again"], cases["space again"]
    before, after, cut = cases["events"]["value"]
    assert after > before
    assert cut <= 1


@pytest.mark.parametrize(
    ("name", "met"),
    [
        # Usually nobody notices; a task that is quicker than the news may.
        ("jail before killed", {"", "TaskKilled"}),
        ("jail after killed", {"", "TaskKilled"}),
        ("zygote killed", {"", "TaskKilled", "SetupError"}),
        ("monitor killed", {"", "TaskKilled", "SetupError"}),
    ],
)
def test_what_dies_while_nothing_runs_is_replaced(name, met, cases) -> None:
    """At most the next task fails, with an error of ours, and the one after it runs."""
    first, _, then = cases[name].get("value", "").partition(" then ")
    assert then == "ran", cases[name]
    assert first in met, cases[name]


def test_the_workers_are_still_the_same(cases) -> None:
    """Nothing of all this ended a worker."""
    assert set(cases["last"]["value"]) == set(cases["workers"]["value"])


def test_a_user_without_groups_is_told_the_remedy(users_cases) -> None:
    """A profile that requires limits runs nothing without them."""
    told(
        users_cases["required limits"],
        "UnsupportedError",
        "profile 'strict' requires cgroup limit memory_bytes",
        "Nothing was started. To fix: as root: mkdir -p",
    )
    told(users_cases["missing wall"], "UnsupportedError", "need ABI 99")


def test_a_user_without_groups_runs_what_does_not_require_them(users_cases) -> None:
    """Values, exceptions and walls are as root's."""
    assert users_cases["lax"]["value"] == 1 << 20
    assert users_cases["lax error"]["error"] == "KeyError"
    assert users_cases["lax denied"]["error"] == "FileNotFoundError"
    assert users_cases["lax again"]["value"] == 1000


def test_what_was_off_is_recorded(users_cases) -> None:
    """The event of the jail's end says which limits it ran without, and why."""
    walls = users_cases["walls"]["value"]
    for limit in ("limits.memory", "limits.pids", "limits.cpu"):
        assert walls[limit].startswith("off: "), walls
    assert walls["seccomp"] == "enforced"
    assert walls["own host user"].startswith("off: ")
