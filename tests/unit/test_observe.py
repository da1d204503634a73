"""What is read of workers and logs that may have been written by anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox.observe import events, live, state
from raysandbox.observe.text import shown
from raysandbox.worker.events import FILE_NAME, OLD_NAME, EventLog
from raysandbox.worker.figures import outcome_label

SIZE = 4096 + 16 * 512

# Holds a state file's lock with any content, as a hostile worker could.
HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

WORKER = """
import sys, time
from raysandbox.observe import state
board = state.Board(sys.argv[1], "ab" * 28, {"worker": "ab" * 28, "node": "cd",
    "started": 1.0, "policy": "p", "bases": [[1, "/x", ["cpu"]]]})
place = board.take()
place.write(running=True, calls=2, denials=1, started=5.0, job=bytes([2, 0, 0, 0]),
    task=b"t" * 24, actor=b"", profile="strict", name="n" * 500, group="g",
    before=(1.5, 2, 3))
print("up", flush=True)
for line in sys.stdin:
    if line == "idle\\n":
        place.idle(7)
    elif line == "free\\n":
        place.free()
    print(place.asked_to_end(), flush=True)
"""


class Other:
    """A process that holds a file."""

    def __init__(self, code: str, argument: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.said()

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def worker(tmp_path) -> Iterator[Other]:
    """A worker with one jail."""
    made = Other(WORKER, str(tmp_path))
    yield made
    made.close()


def test_a_worker_s_word_arrives(worker, tmp_path):
    """What a worker writes about a jail is what others read."""
    (found,) = state.read(str(tmp_path))
    assert (found.pid, found.worker, found.node) == (
        worker.process.pid, "ab" * 28, "cd",
    )  # fmt: skip
    (jail,) = found.jails
    assert (jail.jail_id, jail.state) == (f"{found.pid}.1", "running")
    assert (jail.job, jail.task, jail.actor) == ("02000000", "74" * 24, "")
    assert (jail.profile, jail.name, jail.group) == ("strict", "n" * 120, "g")
    assert (jail.calls, jail.denials, jail.before) == (2, 1, (1.5, 2, 3))
    worker.tell("idle")
    (jail,) = state.read(str(tmp_path))[0].jails
    assert (jail.state, jail.denials, jail.started) == ("idle", 7, 5.0)
    worker.tell("free")
    assert state.read(str(tmp_path))[0].jails == []


def test_a_wish_to_end_a_jail_arrives_and_is_for_that_jail_alone(worker, tmp_path):
    """The worker sees who asks; for a jail that came later the wish is nothing."""
    assert worker.tell("") == "None"
    (found,) = state.read(str(tmp_path))
    (jail,) = found.jails
    other = state.JailState(**{**_fields(jail), "number": 2})
    state.ask_to_end(found, other, "nobody")
    assert worker.tell("") == "None"
    state.ask_to_end(found, jail, "root: reason")
    assert worker.tell("") == "root: reason"


def _fields(jail: state.JailState) -> dict[str, object]:
    return {name: getattr(jail, name) for name in jail.__slots__}


def test_a_dead_worker_s_file_is_nobody_s(worker, tmp_path):
    """Without the lock's holder a file says nothing, and takes no wish."""
    (found,) = state.read(str(tmp_path))
    worker.process.kill()
    worker.process.wait()
    assert state.read(str(tmp_path)) == []
    with pytest.raises(FileNotFoundError):
        state.ask_to_end(found, found.jails[0], "root")
    assert state.sweep(str(tmp_path)) == []  # too young: it may be about to lock
    os.utime(found.path, (1, 1))
    assert state.sweep(str(tmp_path)) == [found.path]


def test_a_link_is_not_followed(worker, tmp_path):
    """A name in the directory that leads elsewhere is no state file."""
    (found,) = state.read(str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{state.FILE_PREFIX}x.bin").symlink_to(found.path)
    assert state.read(str(elsewhere)) == []


def test_writing_costs_microseconds(tmp_path):
    """A task's two writes are memory alone: far below the cost of a task."""
    code = f"""
import time
from raysandbox.observe import state
board = state.Board({str(tmp_path)!r}, "cd" * 28, {{}})
place = board.take()
best = 1.0
for _ in range(20):
    began = time.perf_counter()
    for _ in range(100):
        place.write(running=True, calls=1, denials=0, started=1.0, job=b"1" * 4,
            task=b"t" * 24, actor=b"", profile="strict", name="task", group="g" * 40)
        place.asked_to_end()
    best = min(best, (time.perf_counter() - began) / 100)
print(best)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50e-6


@pytest.fixture(scope="module")
def held() -> Iterator[Path]:
    """A file that a process holds, for tests to fill."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"{state.FILE_PREFIX}{'0' * 56}.bin")
        path.write_bytes(bytes(SIZE))
        holder = Other(HOLDER, str(path))
        yield path
        holder.close()


def _put(path: Path, content: bytes) -> None:
    # In place: the lock is the inode's. By another process's descriptor, since
    # closing ours would end no lock of the holder's.
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, SIZE)
    os.close(fd)


_HEAD = b"RSBSTAT1" + (1).to_bytes(4, "little") + bytes(12)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=600),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(lambda value: json.dumps(value).encode()),
        st.dictionaries(
            st.sampled_from(["worker", "node", "started", "policy", "bases"]),
            st.sampled_from([10**400, -1, [], [[1, 2, 3]], [[1, "/", ["x"]]], {}, "x"]),
        ).map(lambda value: json.dumps(value).encode()),
    ),
    st.binary(max_size=512),
)
def test_any_bytes_in_a_held_file_are_a_worker_or_nothing(held, about, record):
    """Whatever a worker's own code writes there, looking at it raises nothing."""
    about = about[:3000]
    head = _HEAD + len(about).to_bytes(4, "little")
    _put(held, (head + about).ljust(4096, b"\0") + record.ljust(512, b"\xff"))
    for found in state.read(str(held.parent)):
        assert found.pid > 0
        for jail in found.jails:
            live._group(found, jail, live._groups(found))
            assert jail.jail_id.startswith(f"{found.pid}.")
            assert "\x1b" not in shown(jail.name)


def test_only_a_worker_s_own_groups_are_looked_at(held):
    """A group's name must be one that this very process can have made.

    Guards against a worker that has the operator's kill end somebody else's.
    """
    fields = dict.fromkeys(state.WorkerState.__slots__)
    worker = state.WorkerState(**{**fields, "pid": 10, "start_time": 20, "bases": []})
    jail = state.JailState(
        **{
            **dict.fromkeys(state.JailState.__slots__),
            "group": "raysandbox-4026531836-11-20-p1-1",
        }
    )

    class Everything:
        def attach(self, leaf: str) -> str:
            return leaf

    everything = Everything()
    assert live._group(worker, jail, everything) is None
    own = "raysandbox-4026531836-10-20-p1-1"
    mine = state.JailState(**{**_fields(jail), "group": own})
    assert live._group(worker, mine, everything) == own
    for bad in ("..", "", own + "/..", "raysandbox-1-10-20-p1-1/x", "x" + own):
        assert (
            live._group(
                worker, state.JailState(**{**_fields(jail), "group": bad}), everything
            )
            is None
        )


# --- event logs -----------------------------------------------------------------


def _line(**fields: object) -> bytes:
    return json.dumps({"time": 10.0, "event": "jail_ended", **fields}).encode() + b"\n"


def test_lines_that_are_no_events_are_counted_and_skipped(tmp_path):
    """One bad line hides no good one."""
    log = tmp_path / "raysandbox_events.jsonl"
    bad = [b"{", b"[]", b"1", b'{"time": "x", "event": "y"}', b'{"event": "y"}']
    bad += [
        b'{"time": 1e400, "event": "y"}',
        b'{"time": NaN, "event": "y"}',
        b"[" * 99999,
    ]
    log.write_bytes(_line(n=1) + b"\n".join(bad) + b"\n\n" + _line(n=2))
    reader = events.Reader([str(tmp_path)])
    assert [event["n"] for event in reader.read()] == [1, 2]
    assert reader.malformed == len(bad)


def test_a_log_is_read_on_where_it_was_left(tmp_path):
    """Half lines wait for their rest; of a cut file what is later is read."""
    log = tmp_path / "raysandbox_events-1.jsonl"
    reader = events.Reader([str(tmp_path)])
    assert reader.read() == []
    log.write_bytes(_line(n=1) + _line(n=2)[:10])
    assert [event["n"] for event in reader.read()] == [1]
    with log.open("ab") as file:
        file.write(_line(n=2)[10:])
    (tmp_path / "raysandbox_events-2.jsonl").write_bytes(_line(n=3, time=9.0))
    assert [event["n"] for event in reader.read()] == [3, 2]
    log.write_bytes(_line(n=4, time=11.0))
    assert [event["n"] for event in reader.read()] == [4]
    assert reader.malformed == 0


def test_a_log_s_number_may_be_another_s_again(tmp_path):
    """The kernel gives a file's number to the next: none of its events is old."""
    aside, log = tmp_path / OLD_NAME, tmp_path / FILE_NAME
    reader = events.Reader([str(tmp_path)])
    aside.write_bytes(_line(n=1, time=10.0))
    assert [event["n"] for event in reader.read()] == [1]
    aside.rename(log)  # the same number, without a file system's help
    log.write_bytes(_line(n=2, time=10.0) + _line(n=3, time=11.0))
    assert [event["n"] for event in reader.read()] == [2, 3]


def test_a_line_without_end_takes_no_memory(tmp_path):
    """What is longer than any event is dropped up to its end."""
    log = tmp_path / "raysandbox_events.jsonl"
    log.write_bytes(b"x" * (3 << 20) + b"\n" + _line(n=1))
    reader = events.Reader([str(tmp_path)])
    assert [event["n"] for event in reader.read()] == [1]
    assert reader.malformed == 1


WRITER = """
import sys
from raysandbox.worker.events import EventLog
log = EventLog(sys.argv[1], most_bytes=20_000)
log.open()
print("open", flush=True)
sys.stdin.readline()
for number in range(150):
    log.write("jail_ended", writer=sys.argv[2], number=number, padding="x" * 50)
"""


def test_a_log_of_many_writers_takes_bounded_space(tmp_path):
    """Full, it is set aside once, and whoever writes goes on in the new one."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in range(4)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"open\n"
    reader, found = events.Reader([str(tmp_path)]), []
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        found += reader.read()
    found += reader.read()
    for writer in writers:
        writer.communicate()
    assert {p.name for p in tmp_path.iterdir()} == {OLD_NAME, FILE_NAME}
    # A line of each writer may come on top: each looked before it wrote.
    assert all(p.stat().st_size <= 20_000 + 4 * 200 for p in tmp_path.iterdir())
    # Who follows sees no event twice, and the last one was kept.
    seen = [(event["writer"], event["number"]) for event in found]
    assert len(seen) == len(set(seen))
    assert len(seen) > 100  # one file full at least, however slow we read
    last = json.loads((tmp_path / FILE_NAME).read_text().splitlines()[-1])
    assert last["number"] == 149
    assert (last["writer"], 149) in seen
    assert reader.malformed == 0


def test_a_log_that_can_not_be_renamed_loses_its_older_half(tmp_path):
    """Behind the wall a worker's log is bound over its name: it is cut in place."""
    (tmp_path / OLD_NAME / "in the way").mkdir(parents=True)
    log = EventLog(str(tmp_path), most_bytes=20_000)
    reader, found = events.Reader([str(tmp_path)]), []
    for number in range(1000):
        if number % 20 == 0 or number == 999:
            found += reader.read()
            time.sleep(0.002)  # times are in milliseconds
        log.write("jail_ended", number=number, padding="x" * 50)
    found += reader.read()
    assert Path(log.path).stat().st_size <= 20_000
    numbers = [event["number"] for event in found]
    assert len(numbers) == len(set(numbers))
    assert numbers[-1] == 999
    assert len(events.Reader([str(tmp_path)]).read()) > 50
    assert reader.malformed == 0


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ({}, [1, 2, 3]),
        ({"events": ("task_*",)}, [3]),
        ({"profiles": ("strict",)}, [1]),
        ({"jobs": ("02*",)}, [2]),
        ({"tasks": ("b?",)}, [1, 3]),
        ({"outcomes": ("exception",)}, [2]),
        ({"denied": True}, [1, 3]),
        ({"since": 11.0}, [2, 3]),
    ],
)
def test_filters(tmp_path, wanted, numbers):
    """Each filter takes what it says, and nothing else."""
    (tmp_path / "raysandbox_events.jsonl").write_bytes(
        _line(n=1, profile="strict", job="01", tasks=["a", "bb"], denied_count=1)
        + _line(n=2, time=11.0, profile="fast", job="02", outcome="exception: x.Y")
        + _line(n=3, time=12.0, event="task_refused", task="bc", reason="no")
    )
    filter_ = events.Filter(**wanted)
    found = events.Reader([str(tmp_path)]).read()
    assert [event["n"] for event in found if filter_.takes(event)] == numbers


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["time", "event", "job", "profile", "task", "tasks", "outcome", "reason",
             "ended_by", "cpu_time_s", "memory_peak_bytes", "denied_count", "denied"]
        ),
        values,
    )
)  # fmt: skip
def test_any_event_can_be_filtered_and_printed(event):
    """Whatever a line holds, it is shown on one line without control characters."""
    from raysandbox.cli import ps

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "raysandbox_events.jsonl").write_text(json.dumps(event))
        with Path(directory, "raysandbox_events.jsonl").open("a") as file:
            file.write("\n")
        for found in events.Reader([directory]).read():
            for denied in (False, True):
                events.Filter(tasks=("*",), outcomes=("*",), denied=denied).takes(found)
            assert shown(ps._event_line(found), 10_000).isprintable()


@given(st.text())
def test_shown_text_has_no_effect_on_a_terminal(text):
    """Every character is printable, and the length is bounded."""
    found = shown(text, 50)
    assert found.isprintable()
    assert len(found) <= 50


@pytest.mark.parametrize(
    "text",
    ["\x1b[2J", "a\nb", "a\rb", "\u202eabc", "\x9b31m", "\x00", "\ud800", "\u2028"],
)
def test_what_moves_a_cursor_or_turns_a_line_is_written_out(text):
    """Escape sequences, line ends, direction marks and lone surrogates."""
    assert "\\" in shown(text)


def test_outcomes_are_few_words():
    """No metric's label comes from a task."""
    assert outcome_label("exception: evil.Name") == "exception"
    assert outcome_label("ok") == "ok"
    assert outcome_label("evil") == "other"


def test_commands_work_without_ray():
    """Where no node runs, each command says so instead of failing."""
    # A pid namespace of its own: no raylet is in it.
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m"]
    if os.geteuid() != 0:
        command[1:1] = ["--map-root-user"]
    for arguments, code in ((["ps"], 0), (["top", "-n", "1"], 0), (["events"], 1)):
        done = subprocess.run(
            [*command, "raysandbox", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "RAYSANDBOX_POLICY": "/none"},
        )
        assert "Ray is not running on this machine" in done.stdout, done.stderr
        assert done.returncode == code
    done = subprocess.run(
        [*command, "raysandbox", "kill", "123.1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no jail or worker of raysandbox" in done.stdout
