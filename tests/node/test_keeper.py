"""The keeper that a node leaves behind, with something else in raylet's place."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysandbox import launch, plan
from raysandbox.kernel import cgroup
from raysandbox.plan import Plan, Record

pytestmark = pytest.mark.root

# What may pass between an end and what follows from it: far below the 30 seconds
# that the keeper may take where something is left.
_SOON_S = 4.0


@pytest.fixture
def base() -> Iterator[tuple[int, str]]:
    """A control group in which workers make theirs: version and directory."""
    with cgroup.discover() as groups:
        version, path, _ = groups.places()[0]
        own = os.path.join(path, f"raysandbox-keeper-{os.getpid()}")
        os.makedirs(own)
        yield version, own
        subprocess.run(["find", own, "-depth", "-type", "d", "-delete"], check=False)


def write_plan(path: Path, *records: tuple[Record, bytes]) -> str:
    """Write a plan of these records."""
    path.write_bytes(Plan("worker", tuple(records), ()).encode())
    return str(path)


def base_record(base: tuple[int, str]) -> tuple[Record, bytes]:
    """Say where groups are made."""
    return (Record.CGROUP_BASE, plan.u32(base[0]) + plan.text(base[1], base[1]))


def group_name(pid: int, raylet: int) -> str:
    """A worker's group, as the launcher names it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"raysandbox-{namespace}-{pid}-{stat[19]}-w{raylet}"


@contextlib.contextmanager
def raylet(plan_file: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start what stands for raylet, by the way that raylet is started."""
    command = [launch.program_path("node"), plan_file, "/bin/cat", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            exe = f"/proc/{process.pid}/exe"
            assert is_soon(lambda: os.path.samefile(exe, "/bin/cat"))
            yield process
        finally:
            process.kill()


def keepers(plan_file: str) -> list[int]:
    """Return the keepers of this plan: who waits for its raylet's end."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if (
                entry.isdigit()
                and plan_file.encode() in Path(f"/proc/{entry}/cmdline").read_bytes()
            ):
                found.append(int(entry))
    return found


def is_soon(check) -> bool:
    """Whether something comes true in the time that it may take."""
    end = time.monotonic() + _SOON_S
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_the_keeper_ends_with_its_raylet(tmp_path, base):
    """Nothing of this raylet's is left: it does not wait for other nodes' workers.

    Guards against counting every group in a directory that nodes share.
    """
    plan_file = write_plan(tmp_path / "plan", base_record(base))
    other = Path(base[1], group_name(os.getpid(), 1))
    other.mkdir()
    with raylet(plan_file) as process:
        mine = Path(base[1], group_name(os.getpid(), process.pid))
        mine.mkdir()
        gone = subprocess.Popen(["true"])
        left = Path(base[1], group_name(gone.pid, process.pid))
        gone.wait()
        left.mkdir()
        assert is_soon(lambda: not left.exists())
        mine.rmdir()
        assert keepers(plan_file)
        process.kill()
        process.wait()
        assert is_soon(lambda: not keepers(plan_file))
    assert other.exists()
    other.rmdir()


def test_the_keeper_outlives_what_ends_a_node(tmp_path, base):
    """It still removes what is left when all of the node were told to end.

    Guards against ``ray stop``, which ends what has a name of Ray's in its
    arguments, as raylet has, and against a service manager, which ends everything.
    """
    plan_file = write_plan(tmp_path / "plan", base_record(base))
    word = "default_worker.py"
    with raylet(plan_file, "-", word) as process:
        assert word in Path(f"/proc/{process.pid}/cmdline").read_text()
        (keeper,) = keepers(plan_file)
        line = Path(f"/proc/{keeper}/cmdline")
        assert is_soon(lambda: word not in line.read_text())
        os.kill(keeper, signal.SIGTERM)
        gone = subprocess.Popen(["true"])
        left = Path(base[1], group_name(gone.pid, process.pid))
        gone.wait()
        left.mkdir()
        process.kill()
        process.wait()
        assert is_soon(lambda: not keepers(plan_file))
        assert not left.exists()


def start_worker(directory: Path, base: tuple[int, str], parent: int) -> str:
    """Start a worker of a plan that is too small for one; return what it says."""
    records = (
        base_record(base),
        (Record.PROGRAM, plan.text("/bin/true", "worker.py")),
        (Record.USER, plan.u32(os.geteuid(), 1) + plan.text("")),
        (Record.INNER_ID, plan.u32(1000, 1000)),
    )
    wrapper = directory / "worker"
    write_plan(directory / "worker.plan", *records)
    command = [launch.program_path("worker"), str(wrapper), "worker.py"]
    command.append(f"--worker-id={'a' * 56}")
    done = subprocess.run(
        command,
        env={"__RAYSANDBOX_RAYLET": str(parent)},
        capture_output=True,
        text=True,
    )
    return done.stderr


def test_no_worker_starts_without_the_nodes_group(tmp_path, base):
    """A node's group that somebody removed is not made again, without its limits."""
    version, path = base
    there, gone = (version, f"{path}/raysandbox-node-1-2-3"), (version, f"{path}/other")
    os.mkdir(there[1])
    assert "cgroup_create" not in start_worker(tmp_path, there, os.getpid())
    assert "cgroup_create" in start_worker(tmp_path, gone, os.getpid())
    assert not os.path.exists(gone[1])


def test_no_group_is_made_after_raylet(tmp_path, base):
    """A worker that starts as raylet ends leaves nothing: nobody would remove it."""
    start = functools.partial(start_worker, tmp_path, base)
    # The control dies later, of what such a small plan lacks, and in its group.
    assert "raylet has ended" not in start(os.getpid())
    assert len(os.listdir(base[1])) > len(_files_of(base[1]))
    subprocess.run(
        ["find", base[1], "-mindepth", "1", "-depth", "-type", "d", "-delete"]
    )
    assert "raylet has ended" in start(1)
    assert len(os.listdir(base[1])) == len(_files_of(base[1]))


def test_what_all_share_goes_with_the_last_group_in_it(tmp_path, base):
    """The maker of a group that is too late takes an empty base along, too."""
    version, path = base
    shared = (version, f"{path}/raysandbox")
    assert "raylet has ended" in start_worker(tmp_path, shared, 1)
    assert not os.path.exists(shared[1])
    os.makedirs(f"{shared[1]}/raysandbox-of-another")
    assert "raylet has ended" in start_worker(tmp_path, shared, 1)
    assert os.listdir(shared[1])


def test_workers_start_while_what_they_share_is_removed(tmp_path, base):
    """Nodes end and start side by side: neither is in the other's way."""
    shared = Path(base[1], "raysandbox")
    done = threading.Event()

    def remove() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                shared.rmdir()

    def start(number: int) -> set[str]:
        said = set()
        directory = tmp_path / str(number)
        directory.mkdir()
        for _ in range(40):
            said.add(start_worker(directory, (base[0], str(shared)), os.getpid()))
            for left in _groups_in(shared):
                if not os.path.exists(f"/proc/{left.name.split('-')[2]}"):
                    # The other threads look for them, too.
                    for group in (left / "inner", left):
                        with contextlib.suppress(OSError):
                            group.rmdir()
        return said

    remover = threading.Thread(target=remove)
    remover.start()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        said = set().union(*pool.map(start, range(4)))
    done.set()
    remover.join()
    assert not [words for words in said if "cgroup_create" in words]


def _groups_in(directory: Path) -> list[Path]:
    # The remover may take it away meanwhile.
    with contextlib.suppress(FileNotFoundError):
        return list(directory.glob("raysandbox-*"))
    return []


def _files_of(directory: str) -> list[str]:
    return [each for each in os.scandir(directory) if not each.is_dir()]


def test_files_of_workers_that_are_gone_are_swept(tmp_path):
    """A state file without its worker goes; of old event logs the newest stay."""
    logs = tmp_path / "logs"
    logs.mkdir()
    state = str(logs / "raysandbox_state-%w.bin")
    plan_file = write_plan(
        tmp_path / "plan", (Record.LOG, plan.u32(0) + plan.text(state, state))
    )
    alive, dead = "a" * 56, "b" * 56
    for worker in (alive, dead):
        (logs / f"raysandbox_state-{worker}.bin").write_bytes(b"x")
        (logs / f"raysandbox_events-{worker}.jsonl").write_bytes(b"{}\n")
    for number in range(520):
        old = logs / f"raysandbox_events-{number:056x}.jsonl"
        old.write_bytes(b"{}\n")
        os.utime(old, (number, number))
    os.utime(logs / f"raysandbox_events-{alive}.jsonl", (1, 1))
    others = ["raysandbox_state-.bin", "raysandbox_state-../x.bin", "worker-1.out"]
    kept = [logs / name for name in others if "/" not in name]
    (tmp_path / "target").write_bytes(b"x")
    link = logs / f"raysandbox_state-{'c' * 56}.bin"
    link.symlink_to(tmp_path / "target")
    for each in kept:
        each.write_bytes(b"x")
    with open(logs / f"raysandbox_state-{alive}.bin", "r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        with raylet(plan_file) as process:
            process.kill()
            process.wait()
            assert is_soon(lambda: not keepers(plan_file))
        assert (logs / f"raysandbox_state-{alive}.bin").exists()
    assert (logs / f"raysandbox_events-{alive}.jsonl").exists()
    assert not (logs / f"raysandbox_state-{dead}.bin").exists()
    assert (logs / f"raysandbox_events-{dead}.jsonl").exists()
    left = sorted(logs.glob("raysandbox_events-0*.jsonl"))
    assert len(left) == 511  # the dead worker's is the newest
    assert left[0].name == f"raysandbox_events-{9:056x}.jsonl"
    assert all(each.exists() for each in kept)
    assert link.is_symlink()
    assert (tmp_path / "target").exists()
