"""The launcher and the plans that it is handed: refused as a whole, never half read.

The parser runs under AddressSanitizer and UBSan, by itself for thousands of
plans and inside the launcher for some; a reader of our own, written from
native/plan.h alone, says what should have come out.
"""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox import plan
from raysandbox.plan import Context, IdRange
from raysandbox.probe import probe
from raysandbox.profile import strictest
from tests.require import require

SOURCE = Path(__file__).resolve().parents[2]
SANITIZED = SOURCE / "build" / "sanitize"
# Leaks are looked for by a tracer, which a jail's walls forbid; every crash and
# overrun still ends the process with a report.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=77",
}

# native/plan.h: fixed bytes, strings, and whether bytes may follow.
SHAPES = {
    1: (8, 0, 0), 2: (0, 1, 0), 3: (8, 0, 0), 4: (4, 1, 0), 5: (4, 2, 0),
    6: (0, 2, 0), 7: (4, 1, 1), 8: (0, 1, 0), 9: (0, 1, 0), 10: (0, 1, 0),
    11: (16, 1, 0), 12: (4, 1, 0), 13: (20, 0, 0), 14: (8, 0, 0), 15: (24, 0, 0),
    16: (8, 1, 0), 17: (16, 0, 0), 18: (4, 0, 1), 19: (0, 1, 0), 20: (0, 1, 0),
    21: (0, 1, 0), 22: (0, 2, 0), 23: (8, 0, 0), 24: (0, 1, 0), 25: (0, 1, 0),
}  # fmt: skip


def reference(data: bytes) -> int | None:
    """Return a plan's number of records, None if it is to be refused."""
    if len(data) < 16 or data[:8] != b"RSBXPLN1":
        return None
    length, count = struct.unpack_from("<II", data, 8)
    if length != len(data) or count > 4096:
        return None
    offset = 16
    for _ in range(count):
        if len(data) - offset < 8:
            return None
        kind, zero, size = struct.unpack_from("<HHI", data, offset)
        offset += 8
        payload = data[offset : offset + size]
        if zero or kind not in SHAPES or len(payload) != size:
            return None
        fixed, strings, rest = SHAPES[kind]
        if size < fixed:
            return None
        left = payload[fixed:]
        for _ in range(strings):
            if b"\0" not in left:
                return None
            left = left[left.index(b"\0") + 1 :]
        if left and not rest:
            return None
        offset += size
    return count if offset == len(data) else None


@pytest.fixture(scope="module")
def valid() -> bytes:
    """The plan of ``strict`` on this host, with less time; no group is in it."""
    count = 4 if os.geteuid() == 0 else 1
    ids = IdRange(0x70000000 if count == 4 else os.geteuid(), count)
    profile = strictest()
    limits = profile.limits.model_copy(update={"wall_time_s": 10.0})
    profile = profile.model_copy(update={"limits": limits})
    return plan.compile(profile, probe(), Context(ids=ids, wall_time=True)).encode()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parser alone, under sanitizers."""
    require("program:cc")
    program = tmp_path_factory.mktemp("reader") / "plan_reader"
    subprocess.run(
        ["cc", "-std=c11", "-O1", "-g",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         str(Path(__file__).resolve().with_name("plan_reader.c")), "-o", str(program)],
        check=True,
    )  # fmt: skip
    return program


def read_all(reader: Path, plans: Sequence[bytes]) -> list[int | None]:
    """Return what the parser makes of each plan."""
    stream = b"".join(struct.pack("=I", len(each)) + each for each in plans)
    done = subprocess.run(
        [reader], input=stream, capture_output=True, env=OPTIONS, timeout=60
    )
    answers = done.stdout.decode().splitlines()
    at = plans[len(answers)].hex() if len(answers) < len(plans) else ""
    assert done.returncode == 0, f"{done.stderr.decode()[-3000:]}\nplan: {at}"
    return [None if a == "refused" else int(a.split()[1]) for a in answers]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Change a plan as an attacker, or a failing disk, would."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(7):
            case 0:  # a bit
                if at < len(made):
                    made[at] ^= 1 << chance.randrange(8)
            case 1:  # a number
                number = chance.choice((0, 1, 7, 255, 1 << 31, (1 << 32) - 1))
                made[at : at + 4] = struct.pack("<I", number)
            case 2:  # cut short
                del made[at:]
            case 3:  # take out
                del made[at : at + chance.randrange(1, 40)]
            case 4:  # put in
                made[at:at] = chance.randbytes(chance.randrange(1, 20))
            case 5:  # a NUL less, or one more
                made[at : at + 1] = chance.choice((b"", b"\0", b"x"))
            case _:  # what a careful attacker repairs
                made[8:12] = struct.pack("<I", len(made))
    if chance.random() < 0.6:
        made[8:12] = struct.pack("<I", len(made))
    return bytes(made)


def test_the_shipped_plan_is_taken(reader: Path, valid: bytes) -> None:
    """The positive control, and that both readers agree on it."""
    count = reference(valid)
    assert count is not None
    assert read_all(reader, [valid]) == [count]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_mutated_plans_are_read_as_described(seed, reader, valid) -> None:
    """Hundreds of mutations of a real plan: no overrun, and the same verdict."""
    chance = random.Random(seed)
    plans = [mutate(valid, chance) for _ in range(200)]
    for each, answer in zip(plans, read_all(reader, plans)):
        assert answer == reference(each), each.hex()


RECORDS = st.lists(
    st.tuples(
        st.integers(0, 30) | st.sampled_from([255, 65535]),
        st.sampled_from([0, 0, 0, 1]),
        st.binary(max_size=40) | st.just(bytes(8)) | st.just(b"\0\0\0\0/a\0"),
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(plans=st.lists(RECORDS, min_size=1, max_size=20), extra=st.binary(max_size=3))
def test_made_up_plans_are_read_as_described(plans, extra, reader) -> None:
    """Any records of any shape, with and without bytes behind the last one."""
    encoded = []
    for each in plans:
        body = b"".join(struct.pack("<HHI", k, z, len(p)) + p for k, z, p in each)
        body += extra
        encoded.append(
            b"RSBXPLN1" + struct.pack("<II", 16 + len(body), len(each)) + body
        )
    assert read_all(reader, encoded) == [reference(each) for each in encoded]


def test_numbers_at_the_edge(reader: Path) -> None:
    """Counts and lengths that wrap around are lengths that don't fit."""
    head = b"RSBXPLN1"
    plans = [
        b"",
        head,
        head + struct.pack("<II", 16, 0),
        head + struct.pack("<II", 16, 1),
        head + struct.pack("<II", 16, 4097),
        head + struct.pack("<II", 16, 0xFFFFFFFF),
        head + struct.pack("<II", 0, 0),
        head + struct.pack("<IIHHI", 24, 1, 2, 0, 0xFFFFFFFF),
        head + struct.pack("<IIHHI", 24, 1, 2, 0, 0xFFFFFFF8),
        head + struct.pack("<IIHHI", 24, 1, 0, 0, 0),
        head + struct.pack("<IIHHI", 24, 1, 26, 0, 0),
        head + struct.pack("<IIHHI", 24, 1, 2, 1, 0),
        head + struct.pack("<IIHHI", 24, 1, 2, 0, 0),
    ]
    expected = [reference(each) for each in plans]
    assert read_all(reader, plans) == expected
    assert [each for each in expected if each is not None] == [0]


# --- the launcher itself --------------------------------------------------------------


@pytest.fixture(scope="module")
def launcher() -> str:
    """The launcher under sanitizers; ``make test`` builds it before the tests."""
    require("program:cc")
    program = SANITIZED / "raysandbox-launch"
    sources = max(path.stat().st_mtime for path in (SOURCE / "native").iterdir())
    if not program.exists() or program.stat().st_mtime < sources:
        subprocess.run(
            ["make", "-C", str(SOURCE / "native"), "sanitize"],
            check=True,
            capture_output=True,
        )
    return str(program)


def launch(
    launcher: str, data: bytes, *arguments: str, command: Sequence[str] = ("/bin/true",)
) -> tuple[int, list[str], str]:
    """Return exit status, status lines and stderr of one launch.

    One that goes on for 20 seconds is killed: its status is -9.
    """
    plan_fd = os.memfd_create("plan", 0)
    os.write(plan_fd, data)
    status_read, status_write = os.pipe()
    process = subprocess.Popen(
        [launcher, f"--plan-fd={plan_fd}", f"--status-fd={status_write}", *arguments,
         "--", *command],
        pass_fds=[plan_fd, status_write],
        stderr=subprocess.PIPE,
        env=OPTIONS,
    )  # fmt: skip
    os.close(plan_fd)
    os.close(status_write)
    try:
        _, errors = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate(timeout=20)
    with os.fdopen(status_read, errors="replace") as pipe:
        lines = pipe.read().splitlines()
    return process.returncode, lines, errors.decode(errors="replace")


def test_the_sanitized_launcher_runs_a_command(launcher: str, valid: bytes) -> None:
    """The positive control: every wall is raised under the sanitizers too."""
    code, lines, errors = launch(launcher, valid)
    assert (code, errors) == (0, "")
    assert lines[0].startswith("started ")
    assert lines[-1] == "exit 0"


def failed_step(lines: Sequence[str]) -> list[str]:
    """Return step and errno that were reported."""
    return next((line.split()[1:3] for line in lines if line.startswith("error")), [])


def test_a_refused_plan_is_exit_125_with_its_step(launcher: str, valid: bytes) -> None:
    """Nothing is started, and what went wrong is one line."""
    chance, seen = random.Random(1), 0
    while seen < 30:
        data = mutate(valid, chance)
        if reference(data) is not None:
            continue
        seen += 1
        code, lines, errors = launch(launcher, data)
        assert (code, errors) == (125, ""), data.hex()
        expected = ["plan_parse", "22"] if data else ["plan_size", "27"]
        assert failed_step(lines) == expected


def test_a_well_formed_plan_of_nonsense_never_crashes(
    launcher: str, valid: bytes
) -> None:
    """Values that no compiler of ours writes: a named step fails, or it runs."""
    chance, seen = random.Random(2), 0
    while seen < 60:
        data = mutate(valid, chance)
        if reference(data) is None or data == valid:
            continue
        seen += 1
        code, lines, errors = launch(launcher, data)
        if "sigaltstack(nullptr, " in errors:
            continue  # the filter that came of it denies the sanitizers their own call
        assert "Sanitizer" not in errors, f"{errors}\n{data.hex()}"
        assert "runtime error" not in errors, f"{errors}\n{data.hex()}"
        if code == 125:
            assert failed_step(lines), (lines, errors, data.hex())
        elif code != -signal.SIGKILL:  # a mutated limit may be none
            # A mutated root may lack the program, and a filter may kill it.
            ended = r"exit \d+|signal \d+|timeout"
            assert re.fullmatch(ended, lines[-1]), (code, lines, data.hex())
            assert code >= 0, (code, lines, data.hex())


def _without(data: bytes, *kinds: int) -> bytes:
    """Return the plan without the records of some kinds."""
    offset, kept = 16, []
    while offset < len(data):
        kind, _, size = struct.unpack_from("<HHI", data, offset)
        if kind not in kinds:
            kept.append(data[offset : offset + 8 + size])
        offset += 8 + size
    body = b"".join(kept)
    return data[:8] + struct.pack("<II", 16 + len(body), len(kept)) + body


@pytest.mark.parametrize("missing", [1, 3, 14])
def test_a_plan_without_an_indispensable_record_is_refused(
    missing, launcher, valid
) -> None:
    """Without namespaces or ids there is no jail, whatever else it says."""
    code, lines, errors = launch(launcher, _without(valid, missing))
    assert (code, errors) == (125, "")
    assert failed_step(lines)[0] in ("plan_parse", "ids")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--nonsense"], ["/bin/true"]),
        (["--plan-fd="], ["/bin/true"]),
        (["--plan-fd=-1"], ["/bin/true"]),
        (["--plan-fd=99999999999999999999"], ["/bin/true"]),
        (["--plan-fd=1x"], ["/bin/true"]),
        (["--keep-fd=3"] * 17, ["/bin/true"]),
        ([], []),
    ],
)
def test_bad_arguments_are_exit_125(arguments, command, launcher, valid) -> None:
    """An option that is not understood is not passed over."""
    code, lines, errors = launch(launcher, valid, *arguments, command=command)
    assert (code, errors) == (125, "")
    assert failed_step(lines) == ["arguments", "22"]


@pytest.mark.parametrize(
    ("content", "step"),
    [(b"", "plan_size"), (b"\0" * ((16 << 20) + 1), "plan_size")],
    ids=["empty", "too large"],
)
def test_a_plan_of_no_or_too_much_content_is_refused(content, step, launcher) -> None:
    """Before it is read."""
    code, lines, _ = launch(launcher, content)
    assert (code, failed_step(lines)[0]) == (125, step)


def test_a_plan_that_is_no_file_is_refused(launcher: str) -> None:
    """A closed descriptor, a pipe, a directory."""
    for number, step in (("999", "plan_stat"), ("0", "plan_size")):
        done = subprocess.run(
            [launcher, f"--plan-fd={number}", "--", "/bin/true"],
            stdin=subprocess.PIPE,
            capture_output=True,
            text=True,
            env=OPTIONS,
        )
        assert done.returncode == 125
        assert f"raysandbox-launch: {step}: " in done.stderr


def test_a_command_that_is_not_there_is_a_failed_step(
    launcher: str, valid: bytes
) -> None:
    """And not confused with a command that ended with 125 or 127."""
    code, lines, _ = launch(launcher, valid, command=["/no/such/program"])
    assert (code, failed_step(lines)) == (125, ["exec", "2"])
    code, lines, _ = launch(launcher, valid, command=["/bin/sh", "-c", "exit 125"])
    assert (code, failed_step(lines), lines[-1]) == (125, [], "exit 125")
