"""``raysandbox`` as a user calls it: output, exit status, and what goes wrong."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import raysandbox
from raysandbox import launch
from raysandbox import profile as profiles
from raysandbox.profile.load import tomllib
from tests.attacks.harness import start_as
from tests.require import require

ROOT = os.geteuid() == 0
USER = int(os.environ.get("RAYSANDBOX_TEST_UID", "54321"))
SHIPPED = ["fast", "standard", "strict", "trusted"]


class Cli:
    """Runs the command line with profiles of its own.

    Attributes:
        site: The directory of the site's profiles; only its owner can write it.
    """

    def __init__(self, site: Path) -> None:
        self.site = site
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(site),
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
            "PYTHONPATH": os.getcwd(),
            "RAYSANDBOX_PROFILE_PATH": str(site),
        }
        for name in ("RAYSANDBOX_UID_RANGE", "RAYSANDBOX_CGROUP"):
            if name in os.environ:
                self.environment[name] = os.environ[name]

    def write(self, name: str, text: str) -> Path:
        """Make a profile of the site's."""
        path = self.site / f"{name}.toml"
        path.write_text(text)
        return path

    def start(
        self, *arguments: str, user: bool = False, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start ``raysandbox`` as we are, or as an ordinary user."""
        options.setdefault("env", self.environment | options.pop("extra", {}))
        command = [sys.executable, "-m", "raysandbox", *arguments]
        if user and ROOT:
            return start_as(USER, USER, command, **options)
        return subprocess.Popen(command, **options)

    def __call__(
        self, *arguments: str, stdin: bytes = b"", **options: Any
    ) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr."""
        process = self.start(
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        out, err = process.communicate(stdin, timeout=60)
        assert b"Traceback" not in err, err.decode()
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line; profiles and their way are open to every reader."""
    place = Path(tempfile.mkdtemp(prefix="rsx-cli-", dir="/var/tmp"))
    place.chmod(0o755)
    site = place / "site"
    site.mkdir(mode=0o755)
    yield Cli(site)
    shutil.rmtree(place)


def python(code: str) -> list[str]:
    """Return a command that runs code without a site directory."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", code]


# --- help -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["doctor"], ["profiles"], ["profiles", "check"], ["demo"]],
    ids=" ".join,
)
def test_help(command, cli) -> None:
    """Every command says what it does, without marks of the library's."""
    code, out, err = cli(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")
    assert "\\b" not in out


def test_version(cli) -> None:
    """The package's own."""
    assert cli("--version") == (0, f"raysandbox {raysandbox.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["run"], ["run", "--nothing"], ["profiles", "show"]]
)
def test_usage_errors_are_exit_2(arguments, cli) -> None:
    """As every program has it, and on stderr."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


# --- profiles --------------------------------------------------------------------


def test_list(cli) -> None:
    """Each with its boundary, what it is for, and its file."""
    path = cli.write("mine", 'description = "ours"\n')
    code, out, _ = cli("profiles", "list")
    assert code == 0
    line = next(line for line in out.splitlines() if "mine" in line)
    assert line.split() == ["mine", "task", "ours", str(path)]
    code, out, _ = cli("profiles", "list", "--json")
    rows = json.loads(out)
    assert (code, [row["name"] for row in rows]) == (0, sorted([*SHIPPED, "mine"]))
    assert {tuple(row) for row in rows} == {("name", "file", "boundary", "description")}


def test_list_shows_what_is_broken(cli) -> None:
    """And does not stop there; the exit status says so."""
    cli.write("bad", "[limits]\npids = 1\n")
    code, out, _ = cli("profiles", "list")
    assert code == 1
    assert "limits.pids = 1: must be at least 8" in out
    assert "strict" in out
    code, out, _ = cli("profiles", "list", "--json")
    errors = {row["name"]: row.get("error") for row in json.loads(out)}
    assert code == 1
    assert "limits.pids" in errors["bad"]
    assert errors["strict"] is None


def test_show_prints_a_profile_that_loads(cli, tmp_path) -> None:
    """Everything inherited, every default, as a file and as data."""
    cli.write("mine", 'extends = "standard"\n[limits]\npids = 99\n')
    code, out, err = cli("profiles", "show", "mine")
    assert (code, err) == (0, "")
    assert out.startswith(f"# {cli.site}/mine.toml\n")
    copy = tmp_path / "mine.toml"
    copy.write_text(out)
    assert profiles.load_file(copy).limits.pids == 99
    assert profiles.load_file(copy).limits.memory_bytes == 8 << 30
    code, data, _ = cli("profiles", "show", "mine", "--json")
    assert json.loads(data) == tomllib.loads(out)
    jsonschema.validate(json.loads(data), profiles.json_schema())
    assert cli("profiles", "show", str(copy))[0] == 0


def test_show_of_nothing(cli) -> None:
    """An unknown name is told with those that there are; nothing on stdout."""
    code, out, err = cli("profiles", "show", "strickt")
    assert (code, out) == (125, "")
    assert err == (
        'raysandbox: profile name = "strickt": no such profile; did you mean '
        "'strict'?\n"
    )


def test_check(cli) -> None:
    """Names and files; all that is wrong, one line each."""
    good = cli.write("good", "")
    bad = cli.write("bad", "[limits]\npids = 1\nopen_files = 1\n")
    assert cli("profiles", "check", "strict", str(good)) == (
        0,
        f"strict: fine\n{good}: fine\n",
        "",
    )
    code, out, _ = cli("profiles", "check", "good", str(bad), "nothing")
    assert (code, len(out.splitlines())) == (1, 4)
    assert out.splitlines()[1] == f"{bad}: limits.pids = 1: must be at least 8"
    code, out, _ = cli("profiles", "check", "--json", "good", "bad")
    assert code == 1
    good_row, bad_row = json.loads(out)
    assert good_row == {"name": "good", "problems": []}
    cli.write("nan", "[limits]\ncpu = nan\n")
    (nan_row,) = json.loads(cli("profiles", "check", "--json", "nan")[1])
    assert nan_row["problems"][0]["value"] == "NaN"
    assert bad_row["problems"][0] == {
        "file": str(bad),
        "key": "limits.pids",
        "value": 1,
        "rule": "must be at least 8",
    }


def test_schema(cli) -> None:
    """A JSON Schema, the same each time."""
    code, out, _ = cli("profiles", "schema")
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(out))
    assert cli("profiles", "schema")[1] == out


def test_a_bad_search_path_is_told(cli) -> None:
    """By name, and not taken for an empty one."""
    extra = {"RAYSANDBOX_PROFILE_PATH": "/no/such/directory"}
    code, _, err = cli("run", "--", "true", extra=extra)
    assert code == 125
    assert err == (
        'raysandbox: RAYSANDBOX_PROFILE_PATH = "/no/such/directory": can\'t be used: '
        "No such file or directory\n"
    )


# --- doctor ----------------------------------------------------------------------


@pytest.mark.root
def test_doctor_as_root(cli) -> None:
    """This host can enforce every shipped profile."""
    require("cgroup:memory", "cgroup:pids", "cgroup:cpu", "landlock", "seccomp")
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    assert "missing" not in out
    code, out, _ = cli("doctor", "--json")
    report = json.loads(out)
    assert (code, report["usable"], report["problem"]) == (0, True, "")
    assert [each["profile"] for each in report["profiles"]] == SHIPPED
    assert set(report["host"]) == {
        "kernel", "arch", "euid", "landlock_abi", "seccomp", "seccomp_notify",
        "namespaces",
    }  # fmt: skip
    for each in report["profiles"]:
        assert set(each) == {"profile", "usable", "walls", "problem"}
        for wall in each["walls"]:
            assert set(wall) == {"wall", "state", "reason", "remedy"}
            assert wall["state"] in ("enforced", "degraded", "off", "missing")
            assert wall["state"] == "enforced" or wall["reason"]


def test_doctor_as_a_user_without_groups(cli) -> None:
    """What is missing is named with the command that helps, once."""
    require("userns")
    if not ROOT and not cli("doctor", user=True)[0]:
        pytest.skip("this user has been given groups")
    code, out, err = cli("doctor", "-p", "strict", user=True)
    assert (code, err) == (1, "")
    assert "limits.memory: missing: " in out
    remedies = [line for line in out.splitlines() if line.startswith("to fix: ")]
    assert len(remedies) == 1
    assert f"chown {USER if ROOT else os.geteuid()}" in remedies[0]
    code, out, _ = cli("doctor", "--json", "-p", "strict", user=True)
    (strict,) = json.loads(out)["profiles"]
    assert (code, strict["usable"]) == (1, False)
    missing = {
        w["wall"]: w["remedy"] for w in strict["walls"] if w["state"] == "missing"
    }
    assert {"limits.memory", "limits.pids", "limits.cpu"} <= set(missing)
    assert all(missing.values())


def test_doctor_says_what_is_off(cli) -> None:
    """A profile that does not require its limits is usable, and tells."""
    require("userns")
    cli.write("lax", '[limits]\nrequired = false\nwhy = "no groups here"\n')
    code, out, _ = cli("doctor", "--json", "-p", "lax", user=True)
    (lax,) = json.loads(out)["profiles"]
    assert (code, lax["usable"]) == (0, True)
    states = {wall["wall"]: wall["state"] for wall in lax["walls"]}
    if ROOT:
        assert states["limits.memory"] == "off"
    assert states["own host user"] == "off"


def test_doctor_names_every_lack(cli) -> None:
    """A kernel that no one has yet, and a profile that is none."""
    cli.write("future", "[landlock]\nmin_abi = 99\n")
    cli.write("bad", "[limits]\npids = 1\n")
    cli.write("nowhere", '[filesystem]\nread = ["/no/such"]\nwhy = "x"\n')
    names = ("future", "bad", "nothing", "nowhere")
    code, out, _ = cli("doctor", *(word for name in names for word in ("-p", name)))
    assert code == 1
    assert 'nowhere: filesystem.read = "/no/such": does not exist on this host' in out
    assert "landlock: missing: need ABI 99 or later, have ABI" in out
    assert "to fix: boot Linux" in out
    assert "limits.pids = 1: must be at least 8" in out
    assert 'profile name = "nothing": no such profile' in out


@pytest.mark.root
def test_doctor_in_a_user_namespace(cli) -> None:
    """Root of a namespace without ids for jails is told so ahead of time."""
    require("program:unshare")
    done = subprocess.run(
        ["unshare", "-r", sys.executable, "-m", "raysandbox", "doctor", "-p", "strict"],
        env=cli.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "own host user: missing: need ids" in done.stdout
    assert "RAYSANDBOX_UID_RANGE" in done.stdout


# --- run -------------------------------------------------------------------------


@pytest.fixture(params=["root", "user"] if ROOT else ["user"])
def run(request: pytest.FixtureRequest, cli: Cli) -> Iterator[Any]:
    """``raysandbox run`` under a profile that each actor can have."""
    require("userns")
    user = request.param == "user"
    cli.write("lax", '[limits]\nrequired = false\nwhy = "no groups here"\n')

    def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
        return cli("run", "-p", "lax", *arguments, user=user, **options)

    run.start = lambda *a, **o: cli.start("run", "-p", "lax", *a, user=user, **o)  # type: ignore[attr-defined]
    run.cli = cli  # type: ignore[attr-defined]
    run.user = user  # type: ignore[attr-defined]
    return run


def test_streams_pass_through(run) -> None:
    """Every byte of stdin, stdout and stderr, in both directions."""
    data = bytes(range(256)) * 400
    code = (
        "import sys; data = sys.stdin.buffer.read(); sys.stdout.write(str(len(data))); "
        "sys.stderr.write('err')"
    )
    assert run("--", *python(code), stdin=data) == (0, str(len(data)), "err")
    process = run.start("--", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.communicate(data, timeout=60)[0] == data


@pytest.mark.parametrize("status", [7, 125])
def test_the_commands_exit_status_is_ours(status, run) -> None:
    """Also where it is a number that we use ourselves: stderr tells them apart."""
    assert run("--", "sh", "-c", f"exit {status}") == (status, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_commands_signal_is_128_and_its_number(number, run) -> None:
    """As a shell reports it."""
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    assert run("--", *python(code))[0] == 128 + number


NOT_RUN = [
    (["--", "/no/such/program"], "step 'exec': No such file or directory"),
    (["--chdir", "/nowhere", "--", "true"], "step 'chdir': No such file"),
    (["-e", "NOTHING", "--", "true"], '--env = "NOTHING": must be NAME=VALUE'),
    (["-d", "/no/such", "--", "true"], '"/no/such": does not exist on this host'),
    (["-p", "nothing", "--", "true"], '"nothing": no such profile'),
]


def test_what_can_not_be_run_is_125_and_says_why(run) -> None:
    """Nothing was started, and the reason is one line."""
    for arguments, words in NOT_RUN if run.user else NOT_RUN[:1]:
        code, out, err = run(*arguments)
        assert (code, out) == (125, "")
        assert err.startswith("raysandbox: ")
        assert words in err
        assert len(err.splitlines()) == 1


def test_a_profile_that_does_not_validate_runs_nothing(run) -> None:
    """Each of its problems is a line."""
    run.cli.write("bad", "[limits]\npids = 1\nopen_files = 1\n")
    code, out, err = run("-p", "bad", "--", "echo", "ran")
    assert (code, out, len(err.splitlines())) == (125, "", 2)


def test_variables_and_directories(run) -> None:
    """What is asked for is there; what is not is absent."""
    given = run.cli.site / "given"
    given.mkdir()
    (given / "file").write_text("content")
    given.chmod(0o755)
    code, out, err = run(
        "-e", "A=b=c", "-e", "B=", "-d", str(given), "--chdir", str(given),
        "--", "sh", "-c", 'echo "$A|$B|$HOME|$PYTHONPATH"; pwd; cat file; touch new',
    )  # fmt: skip
    assert out == f"b=c||/scratch/home|\n{given}\ncontent"
    assert "Read-only" in err
    assert code == 1


def test_options_behind_the_command_are_its_own(run) -> None:
    """With and without the two dashes."""
    assert run("--", "echo", "-p", "--help") == (0, "-p --help\n", "")
    assert run("echo", "--help", "--", "x") == (0, "--help -- x\n", "")


def test_wall_time_ends_it_with_124(run) -> None:
    """And says which limit of which profile it was."""
    run.cli.write(
        "hasty",
        '[limits]\nwall_time = "300ms"\nrequired = false\nwhy = "no groups"\n',
    )
    begun = time.monotonic()
    code, _, err = run("-p", "hasty", "--", "sleep", "30")
    assert code == 124
    assert err == (
        "raysandbox: sleep was ended under profile 'hasty': limits.wall_time allows "
        "0.3 s\n"
    )
    assert time.monotonic() - begun < 20


def _of(mark: str) -> list[int]:
    """Return the processes with a mark in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 128 + signal.SIGINT),
        (signal.SIGHUP, -signal.SIGHUP),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_signal_to_us_ends_all_of_it(number, status, run) -> None:
    """Whatever ends the command line ends what it started, grandchildren too."""
    mark = f"mark-{uuid.uuid4().hex}"
    code = (
        "import os, time; os.fork(); os.fork(); print('up', flush=True); time.sleep(60)"
    )
    process = run.start("--", *python(code), mark, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    assert len(_of(mark)) >= 4
    process.send_signal(number)
    assert process.wait(timeout=30) == status
    until = time.monotonic() + 10
    while _of(mark) and time.monotonic() < until:
        time.sleep(0.02)
    assert _of(mark) == []
    process.stdout.close()


def test_a_closed_pipe_ends_the_command(run) -> None:
    """As in ``raysandbox run -- yes | head -1``."""
    process = run.start("--", "yes", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE


def test_a_terminal_passes_through(cli) -> None:
    """An interactive program sees one, and an interrupt from it ends the command."""
    require("userns", "root")
    master, slave = pty.openpty()
    process = cli.start(
        "run", "--", *python("print(input().upper()); input()"),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"hello\n")
    seen = b""
    while b"HELLO" not in seen:
        seen += os.read(master, 1024)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 128 + signal.SIGINT
    os.close(master)


def test_verbose_reports_walls_and_usage(run) -> None:
    """On stderr, so that the command's output stays its own."""
    code, out, err = run("-v", "--", "echo", "x")
    assert (code, out) == (0, "x\n")
    lines = err.splitlines()
    assert "seccomp: enforced" in lines
    expected = "limits.memory: off (" if run.user and ROOT else "limits.memory: "
    assert any(line.startswith(expected) for line in lines)
    assert lines[-1].startswith("peak memory ")


def test_an_ordinary_user_without_groups_is_refused_with_the_remedy(cli) -> None:
    """Under a profile that requires limits nothing runs without them."""
    require("userns", "root")
    code, out, err = cli("run", "--", "echo", "ran", user=True)
    assert (code, out) == (125, "")
    assert "profile 'strict' requires cgroup limit memory_bytes" in err
    assert "Nothing was started. To fix: as root: mkdir -p" in err


@pytest.mark.root
@pytest.mark.parametrize(
    "value",
    [
        "70000",
        "0:65536",
        "1000:100",
        "70000:3",
        "a:b",
        "99999:4294967295",
        "²:4",
        "-1:9",
    ],
)
def test_a_bad_range_of_host_ids_is_refused(value, monkeypatch) -> None:
    """Never an id of a person's or of the system's."""
    monkeypatch.setenv("RAYSANDBOX_UID_RANGE", value)
    with pytest.raises(raysandbox.ProfileError, match=r"must be FIRST:COUNT") as caught:
        launch.lease_ids()
    assert str(caught.value).startswith(f'RAYSANDBOX_UID_RANGE = "{value}": ')


@pytest.mark.root
def test_a_range_that_is_in_use_is_told(cli) -> None:
    """A quarter is for workers.

    The second jail of a range for one waits for nobody and says what to set.
    """
    extra = {"RAYSANDBOX_UID_RANGE": "1500000000:8"}
    holder = cli.start(
        "run", "--", "sh", "-c", "echo up; cat", extra=extra,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"up\n"
    code, _, err = cli("run", "--", "true", extra=extra)
    assert code == 125
    assert "all 6 host ids from 1500000000 are in use" in err
    assert "RAYSANDBOX_UID_RANGE" in err
    holder.communicate(timeout=30)
    assert cli("run", "--", "true", extra=extra)[0] == 0


def test_a_missing_launcher_is_told(cli, tmp_path) -> None:
    """With the command that makes it; in doctor too, and in its exit status."""
    require("root")
    package = tmp_path / "tree" / "raysandbox"
    package.parent.mkdir()
    original = os.path.dirname(raysandbox.__file__)
    package.mkdir()
    for entry in os.listdir(original):
        # The loader looks at real paths: the package's own files are copies.
        source = os.path.join(original, entry)
        if entry.endswith(".py"):
            (package / entry).write_bytes(Path(source).read_bytes())
        elif entry not in ("_bin", "__pycache__"):
            (package / entry).symlink_to(source)
    (package.parent / "profiles").symlink_to(profiles.shipped_dir())
    extra = {"PYTHONPATH": str(package.parent)}
    options = {"extra": extra, "cwd": tmp_path}
    code, _, err = cli("run", "--", "true", **options)
    assert code == 125
    assert "step 'launcher'" in err
    assert "is missing: install the raysandbox wheel, or run `make native`" in err
    code, out, _ = cli("doctor", "-p", "strict", **options)
    assert code == 1
    assert "is missing: install the raysandbox wheel" in out
    assert "usable" not in out
    code, out, _ = cli("doctor", "-p", "strict", "--json", **options)
    report = json.loads(out)
    assert (code, report["usable"], report["launcher"]) == (1, False, "")
    assert "is missing" in report["problem"]
