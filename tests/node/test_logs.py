"""Workers' log files: what a client writes into them does not fill the node's disk."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysandbox import plan
from raysandbox.plan import Record
from tests.node.test_keeper import is_soon, keepers, raylet, write_plan

pytestmark = pytest.mark.root

WORKER = "a" * 56
MIB = 1 << 20
_KEEP_SIZE = 1


class Logs:
    """The log directory of a session, and a keeper that looks after it."""

    def __init__(self, base: Path, each: int, total: int) -> None:
        self.base, self.directory = base, base / "logs"
        (self.directory / "old").mkdir(parents=True)
        (self.directory / "events").mkdir()
        self.limit = (Record.LOG_LIMIT, plan.u64(each, total))
        ended = subprocess.Popen(["true"])
        ended.wait()
        self.ended = ended.pid

    def name(self, pid: int, end: str = "out", worker: str = WORKER) -> Path:
        return self.directory / f"worker-{worker}-01000000-{pid}.{end}"

    @property
    def own(self) -> Path:
        """That of a worker that lives."""
        return self.name(os.getpid())

    @contextlib.contextmanager
    def kept(self, *, limited: bool = True) -> Iterator[str]:
        """Have a keeper look after it; yields the path of its plan."""
        records = [
            (Record.LOG, plan.u32(stream) + plan.text(path, path))
            for stream, path in (
                (1, f"{self.directory}/%t-%w-%j%p.out"),
                (0, f"{self.directory}/python-core-%k-%w_%p.log"),
                (0, f"{self.directory}/events/event_CORE_WORKER_%p.log"),
                (0, f"{self.directory}/raysandbox_state-%w.bin"),
            )
        ]
        more = [self.limit] if limited else []
        plan_file = write_plan(self.base / "plan", *records, *more)
        with raylet(plan_file) as process:
            yield plan_file
            process.kill()
            process.wait()
            assert is_soon(lambda: not keepers(plan_file))

    def disk(self) -> int:
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        total = 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # the keeper was faster
                total += path.stat().st_blocks * 512
        return total


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path, 2 * MIB, 64 * MIB)


def _lines(first: int, count: int) -> bytes:
    return b"".join(b"%099d\n" % number for number in range(first, first + count))


def _is(found: bytes, wanted: bytes) -> bool:
    """Compare what is too large to be shown."""
    return found == wanted


def test_log_that_is_filled_starts_anew(logs):
    """Its newest half stays beside it, and its writer goes on where it starts.

    Nothing else bounds it: Ray's own rotation is off, as its files are bound over
    their names. Control: without a limit it stays as it is.
    """
    with open(logs.own, "ab", buffering=0) as log:
        log.write(_lines(0, 50_000))
        with logs.kept(limited=False):
            pass
        assert logs.own.stat().st_size == 5_000_000
        with logs.kept():
            assert is_soon(lambda: logs.own.stat().st_size < 1000)
            kept = Path(f"{logs.own}.1").read_bytes()
            assert _is(kept, _lines(0, 50_000)[-MIB:])
            said = logs.own.read_bytes()
            assert said.startswith(b"raysandbox: the node began this log anew;")
            assert f"{logs.own.name}.1".encode() in said
            log.write(b"goes on\n")
            assert logs.own.read_bytes() == said + b"goes on\n"
        assert logs.own.read_bytes() == said + b"goes on\n"
        assert _is(Path(f"{logs.own}.1").read_bytes(), kept)


def test_each_kind_of_log_is_bounded(logs):
    """Ray's own and those that Ray has moved, too; but only what is told is a line."""
    paths = [
        logs.directory / f"python-core-worker-{WORKER}_{os.getpid()}.log",
        logs.directory / "events" / f"event_CORE_WORKER_{os.getpid()}.log",
        logs.directory / "old" / logs.name(logs.ended).name,
        logs.directory / f"io_worker-{WORKER}-{os.getpid()}.out",
    ]
    for path in paths:
        path.write_bytes(_lines(0, 50_000))
    state = logs.directory / f"raysandbox_state-{WORKER}.bin"
    with open(state, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 40 * MIB)
    with logs.kept():
        assert is_soon(lambda: all(path.stat().st_size < 1000 for path in paths))
        assert is_soon(lambda: not state.exists() or state.stat().st_size == 0)
    assert all(Path(f"{path}.1").stat().st_size == MIB for path in paths)
    assert [path.stat().st_size > 0 for path in paths] == [False, False, True, True]


@pytest.mark.parametrize("way", ["beyond its end", "allocated", "a hole"])
def test_log_is_bounded_however_it_was_filled(logs, way):
    """What it says of its size and what it has on disk both count."""
    log = logs.own
    log.write_bytes(b"")
    fd = os.open(log, os.O_RDWR)
    if way == "beyond its end":
        libc = ctypes.CDLL(None, use_errno=True)
        size = [ctypes.c_long(0), ctypes.c_long(100 * MIB)]
        assert libc.fallocate(fd, _KEEP_SIZE, *size) == 0, ctypes.get_errno()
        assert log.stat().st_size == 0
    elif way == "allocated":
        os.posix_fallocate(fd, 0, 100 * MIB)
    else:
        os.ftruncate(fd, 1 << 40)
    os.close(fd)
    with logs.kept():
        assert is_soon(lambda: log.stat().st_size < 1000 and logs.disk() <= 2 * MIB)


def test_only_workers_logs_are_cut(logs):
    """No link is followed, and no other file of Ray's is touched."""
    target = logs.base / "target"
    spared = [
        target,
        logs.directory / "raylet.out",
        logs.directory / f"worker-{WORKER}-01000000-{os.getpid()}.out.txt",
        logs.directory / f"worker-{WORKER}-01000000-.out",
        logs.directory / f"worker-no-01000000-{os.getpid()}.out",
    ]
    for path in (logs.own, *spared):
        path.write_bytes(_lines(0, 50_000))
    linked, hard = logs.name(1), logs.name(2)
    linked.symlink_to(target)
    os.link(spared[1], hard)
    with logs.kept():
        assert is_soon(lambda: logs.own.stat().st_size < 1000)
    assert {path.stat().st_size for path in spared} == {5_000_000}
    assert linked.is_symlink()
    assert hard.samefile(spared[1])


def test_all_logs_together_are_bounded(tmp_path):
    """The oldest of workers that have ended go; those that live may have less each."""
    logs = Logs(tmp_path, 2 * MIB, 8 * MIB)
    for number in range(12):
        old = logs.name(logs.ended, worker=f"{number:056x}")
        old.write_bytes(_lines(0, 12_000)[:MIB])
        os.utime(old, (number, number))
    logs.own.write_bytes(_lines(0, 12_000)[:MIB])
    os.utime(logs.own, (0, 0))
    with logs.kept() as plan_file:
        assert is_soon(lambda: logs.disk() <= 8 * MIB)
        left = sorted(logs.directory.glob("worker-0*"))
        assert [int(path.name[7:63], 16) for path in left] == [*range(5, 12)]
        assert logs.own.stat().st_size == MIB
        # All at once: of some there would be room for others.
        for pid in keepers(plan_file):
            os.kill(pid, signal.SIGSTOP)
        for number in range(30):
            path = logs.name(os.getpid(), worker=f"b{number:055x}")
            path.write_bytes(_lines(number, 12_000)[:MIB])
        for pid in keepers(plan_file):
            os.kill(pid, signal.SIGCONT)
        assert is_soon(lambda: logs.disk() <= 8 * MIB)
        assert not list(logs.directory.glob("worker-0*"))
        for number in range(30):
            path = logs.name(os.getpid(), worker=f"b{number:055x}")
            kept = Path(f"{path}.1").read_bytes()
            assert kept
            assert _is(kept, _lines(number, 12_000)[:MIB][-len(kept) :])
