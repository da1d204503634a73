"""Control groups: limits that bite, groups that go away, errors that help.

Every limit is proved by a process that runs into it, after the same process
was seen to go through without the limit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raysandbox.errors import SetupError, UnsupportedError
from raysandbox.kernel import cgroup, cgroup_find
from raysandbox.kernel.cgroup import Cgroup, CgroupLimits, Cgroups
from tests.require import require

MiB = 1 << 20
CLONE_INTO_CGROUP = 0x200000000
CLONE3 = 435


@pytest.fixture
def groups() -> Iterator[Cgroups]:
    require("cgroup")
    with cgroup.discover() as found:
        yield found


def spawn(group: Cgroup | None, body: Callable[[], int]) -> int:
    """Fork a child that enters ``group`` as a jail does, then runs ``body``.

    It is in the group, or has ended, when this returns.
    """
    fds = group.procs_fds() if group else []
    entered, enter = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for fd in fds:
                os.write(fd, b"0")
            os.close(enter)
            code = body()
        except MemoryError:
            code = 71
        except OSError as error:
            code = error.errno or 72
        finally:
            os._exit(code)
    os.close(enter)
    os.read(entered, 1)
    for fd in (*fds, entered):
        os.close(fd)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sleeper() -> int:
    signal.pause()
    return 0


def eat(amount_bytes: int) -> Callable[[], int]:
    def body() -> int:
        hold = bytearray(amount_bytes)
        # Touch each page: an untouched one is charged to nobody.
        hold[::4096] = b"x" * len(hold[::4096])
        return 0

    return body


def burn(wall_s: float) -> Callable[[], int]:
    def body() -> int:
        until = time.monotonic() + wall_s
        while time.monotonic() < until:
            pass
        return 0

    return body


def fork_until_refused(at_most: int) -> int:
    """Fork sleepers; return how many forks the kernel allowed."""
    for count in range(at_most):
        try:
            pid = os.fork()
        except OSError as error:
            return count if error.errno == errno.EAGAIN else 99
        if pid == 0:
            sleeper()
    return at_most


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


# --- limits -----------------------------------------------------------------


def test_memory_bomb_is_killed_and_counted(groups: Cgroups) -> None:
    """Memory over the limit is SIGKILL, and the group counts it.

    Control: the same bomb goes through in a group without a limit.
    """
    require("cgroup:memory")
    free = groups.create("mem-free", CgroupLimits())
    try:
        assert ended(spawn(free, eat(96 * MiB))) == 0
        assert (free.usage().memory_peak_bytes or 96 * MiB) >= 96 * MiB
        assert free.usage().oom_kills == 0
    finally:
        assert free.remove()
    limits = CgroupLimits(memory_bytes=48 * MiB, swap_bytes=0)
    group = groups.create("mem", limits, required=True)
    try:
        assert ended(spawn(group, eat(96 * MiB))) == -signal.SIGKILL
        usage = group.usage()
        assert usage.oom_kills is not None
        assert usage.oom_kills >= 1
        assert usage.memory_peak_bytes is None or (
            32 * MiB <= usage.memory_peak_bytes <= 48 * MiB
        )
        assert ended(spawn(group, eat(8 * MiB))) == 0
    finally:
        assert group.remove()


def test_oom_kills_the_whole_group_on_version_2_and_is_reported_off_on_1(
    groups: Cgroups,
) -> None:
    """``oom_group`` in the report says what the kernel then does."""
    require("cgroup:memory")
    group = groups.create("oomgroup", CgroupLimits(memory_bytes=48 * MiB, swap_bytes=0))
    try:
        bystander = spawn(group, sleeper)
        assert ended(spawn(group, eat(96 * MiB))) == -signal.SIGKILL
        if group.report["oom_group"].state == "ENFORCED":
            assert ended(bystander) == -signal.SIGKILL
        else:
            assert "version 1" in group.absent["oom_group"]
            assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
            assert group.kill()
            assert ended(bystander) == -signal.SIGKILL
    finally:
        assert group.remove()


def test_fork_bomb_is_bounded_and_counted(groups: Cgroups) -> None:
    """Forks beyond ``pids`` get EAGAIN, and the group counts them."""
    require("cgroup:pids")
    free = groups.create("fork-free", CgroupLimits())
    try:
        assert ended(spawn(free, lambda: fork_until_refused(12))) == 12
    finally:
        assert free.remove()
    group = groups.create("fork", CgroupLimits(pids=8), required=True)
    try:
        # The one that forks counts too.
        assert ended(spawn(group, lambda: fork_until_refused(12))) == 7
        usage = group.usage()
        assert usage.pids == 7
        assert usage.pids_denied == 1
    finally:
        assert group.remove()


@pytest.mark.alone
def test_cpu_quota_holds_in_cpu_time(groups: Cgroups) -> None:
    """A quota of 0.2 cores gives at most that much CPU time per wall second.

    Measured as CPU time, which other load on the machine can only lower.
    """
    require("cgroup:cpu")
    free = groups.create("cpu-free", CgroupLimits())
    group = groups.create("cpu", CgroupLimits(cpu_cores=0.2), required=True)
    try:
        assert ended(spawn(free, burn(0.5))) == 0
        began = time.monotonic()
        assert ended(spawn(group, burn(1.0))) == 0
        wall_s = time.monotonic() - began
        control_s, used_s = free.usage().cpu_time_s, group.usage().cpu_time_s
        assert used_s is not None
        assert control_s is not None
        # One period of 100 ms more: the first may have begun before we did.
        assert 0.02 < used_s <= 0.2 * (wall_s + 0.1) * 1.15
        assert control_s > used_s or control_s > 0.2
    finally:
        assert group.remove()
        assert free.remove()


def test_cpu_weight_is_the_same_share_in_both_versions(groups: Cgroups) -> None:
    """Weight 100 is the default; on version 1 that is 1024 shares."""
    require("cgroup:cpu")
    group = groups.create("weight", CgroupLimits(cpu_weight=50), required=True)
    try:
        version = groups.versions["cpu"]
        file, want = ("cpu.shares", "512") if version == 1 else ("cpu.weight", "50")
        path = next(p for p in group.paths if os.path.exists(f"{p}/{file}"))
        with open(f"{path}/{file}") as opened:
            assert opened.read().strip() == want
    finally:
        assert group.remove()


def test_io_limits_are_written_or_reported(groups: Cgroups) -> None:
    """Each I/O limit is in the kernel's file for a disk, or named as not there."""
    limits = CgroupLimits(io_read_bytes_per_s=MiB, io_write_bytes_per_s=2 * MiB)
    group = groups.create("io", limits)
    try:
        for limit, value in (
            ("io_read_bytes_per_s", MiB),
            ("io_write_bytes_per_s", 2 * MiB),
        ):
            if group.report[limit].state == "OFF":
                assert group.absent[limit]
                continue
            names = (
                "io.max",
                "blkio.throttle.read_bps_device",
                "blkio.throttle.write_bps_device",
            )
            texts = []
            for path in group.paths:
                for name in names:
                    if os.path.exists(f"{path}/{name}"):
                        with open(f"{path}/{name}") as opened:
                            texts.append(opened.read())
            assert str(value) in " ".join(texts)
    finally:
        assert group.remove()


def test_entering_is_quick(groups: Cgroups) -> None:
    """A jail's entry does not wait for an RCU grace period (10 ms and more).

    Guards against opening version 1's ``cgroup.procs`` instead of ``tasks``.
    """
    require("cgroup1")
    times = []
    for count in range(9):
        group = groups.create(f"quick-{count}", CgroupLimits(pids=4, cpu_cores=1))
        fds = group.procs_fds()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            began = time.perf_counter()
            for fd in fds:
                os.write(fd, b"0")
            os.write(write, str(time.perf_counter() - began).encode())
            os._exit(0)
        os.close(write)
        times.append(float(os.read(read, 64)))
        os.close(read)
        for fd in fds:
            os.close(fd)
        ended(pid)
        assert group.remove()
    assert sorted(times)[len(times) // 2] < 0.005


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_bytes", 100),
        ("swap_bytes", -1),
        ("cpu_cores", 0.001),
        ("cpu_weight", 0),
        ("cpu_weight", 10_001),
        ("pids", 0),
        ("io_read_bytes_per_s", 0),
    ],
)
def test_senseless_limit_is_refused(name: str, value: Any) -> None:
    """A limit that the kernel could not hold is refused by name and value."""
    with pytest.raises(ValueError, match=rf"{name} = {value}"):
        CgroupLimits(**{name: value})


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n"]
)
def test_name_that_could_leave_the_base_is_refused(groups: Cgroups, name: str) -> None:
    """A group's name can't be a path."""
    with pytest.raises(ValueError, match="cgroup name"):
        groups.create(name, CgroupLimits())


# --- the end of a group -----------------------------------------------------


def test_kill_empties_a_group_that_keeps_forking(groups: Cgroups) -> None:
    """A process that forks as fast as it can does not outrun kill()."""
    require("cgroup:pids")
    group = groups.create("storm", CgroupLimits(pids=40))

    def storm() -> int:
        os.setsid()
        while True:
            try:
                os.fork()
            except OSError:
                time.sleep(0.001)

    try:
        first = spawn(group, storm)
        assert wait_for(lambda: (group.usage().pids or 0) > 20)
        assert group.kill()
        assert group.pids() == set()
        assert ended(first) == -signal.SIGKILL
    finally:
        assert group.remove()


def test_kill_hits_nobody_outside(groups: Cgroups) -> None:
    """Only members die: not our other child, not its namesake's neighbour."""
    outside = spawn(None, sleeper)
    one, two = (groups.create(n, CgroupLimits()) for n in ("one", "two"))
    try:
        inside, neighbour = spawn(one, sleeper), spawn(two, sleeper)
        assert wait_for(lambda: inside in one.pids())
        assert one.kill()
        assert ended(inside) == -signal.SIGKILL
        for alive in (outside, neighbour):
            assert os.waitpid(alive, os.WNOHANG) == (0, 0)
        os.kill(outside, signal.SIGKILL)
        assert ended(outside) == -signal.SIGKILL
    finally:
        assert one.remove()
        assert two.remove()
    assert ended(neighbour) == -signal.SIGKILL


def test_kill_of_an_empty_group_is_true_at_once(groups: Cgroups) -> None:
    """Nothing to do is done."""
    group = groups.create("empty", CgroupLimits())
    assert group.kill(timeout_s=0.0)
    assert group.remove(timeout_s=0.0)


def test_remove_ends_what_is_left_and_may_be_repeated(groups: Cgroups) -> None:
    """remove() leaves no process and no directory, however often it is called."""
    group = groups.create("left", CgroupLimits(pids=16))
    children = [spawn(group, sleeper) for _ in range(5)]
    assert wait_for(lambda: set(children) <= group.pids())
    assert group.remove()
    assert [ended(c) for c in children] == [-signal.SIGKILL] * 5
    assert not any(os.path.exists(p) for p in group.paths)
    assert group.remove()
    with pytest.raises(SetupError, match="cgroup_open"):
        group.procs_fds()


def test_create_and_remove_leave_nothing(groups: Cgroups) -> None:
    """A hundred groups with every limit: no directory, no descriptor stays."""
    limits = CgroupLimits(memory_bytes=64 * MiB, cpu_cores=1, cpu_weight=100, pids=9)
    before = len(os.listdir("/proc/self/fd"))
    for count in range(100):
        group = groups.create(f"churn-{count}", limits)
        for fd in group.procs_fds():
            os.close(fd)
        group.usage()
        assert group.remove()
    assert len(os.listdir("/proc/self/fd")) == before
    mine = f"-{os.getpid()}-"
    for path in groups.base_paths:
        assert [n for n in os.listdir(path) if mine in n] == []


def test_close_removes_the_base_and_create_makes_it_again(
    groups: Cgroups,
) -> None:
    """One worker's end does not take the base away from another."""
    groups.close()
    group = groups.create("again", CgroupLimits(pids=5))
    assert all(os.path.isdir(p) for p in group.paths)
    assert group.remove()


def test_groups_are_made_while_others_remove_the_base(groups: Cgroups) -> None:
    """Closing ones take an empty base away at any moment."""
    done = threading.Event()

    def close() -> None:
        while not done.wait(0.0002):
            groups.close()

    others = [threading.Thread(target=close) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for count in range(200):
            assert groups.create(f"beside-{count}", CgroupLimits(pids=5)).remove()
    finally:
        done.set()
        for other in others:
            other.join()


def _unified() -> str:
    """Return where version 2 is mounted, with or without controllers."""
    with open("/proc/self/mountinfo") as opened:
        for mount in cgroup_find.parse_mounts(opened.read()):
            if mount.version == 2:
                return mount.path
    pytest.skip("cgroup version 2 is not mounted")


@pytest.fixture
def unified() -> Iterator[Cgroups]:
    """Groups on version 2 alone: its own files work without any controller."""
    require("root", "cgroup")
    base = f"{_unified()}/raysandbox-test-{os.getpid()}"
    os.mkdir(base)
    yield Cgroups([cgroup_find.Base(2, base, frozenset(), False)], [])
    os.rmdir(base)


def test_version_2_child_is_cloned_into_the_group(unified: Cgroups) -> None:
    """dir_fd() serves CLONE_INTO_CGROUP: the child is inside from the start."""
    group = unified.create("clone", CgroupLimits())
    fd = group.dir_fd()
    assert fd is not None
    libc = ctypes.CDLL(None, use_errno=True)
    args = (ctypes.c_uint64 * 11)()
    args[0], args[4], args[10] = CLONE_INTO_CGROUP, signal.SIGCHLD, fd
    try:
        pid = libc.syscall(CLONE3, ctypes.byref(args), ctypes.sizeof(args))
        if pid == 0:
            signal.pause()
            os._exit(0)
        assert pid > 0, os.strerror(ctypes.get_errno())
        assert group.pids() == {pid}
        assert group.kill()
        assert ended(pid) == -signal.SIGKILL
    finally:
        os.close(fd)
        assert group.remove()


def test_version_2_kill_reaches_groups_below(unified: Cgroups) -> None:
    """``cgroup.kill`` ends a forking process in a group that a member made."""
    group = unified.create("deep", CgroupLimits())
    below = f"{group.paths[0]}/below"
    os.mkdir(below)

    def storm() -> int:
        with open(f"{below}/cgroup.procs", "w") as opened:
            opened.write("0")
        for _ in range(30):
            if os.fork() == 0:
                sleeper()
        return sleeper()

    try:
        first = spawn(group, storm)
        assert wait_for(lambda: len(group.pids()) == 31)
        assert (group.usage().cpu_time_s or 0) > 0
        assert group.kill()
        assert group.pids() == set()
        assert ended(first) == -signal.SIGKILL
    finally:
        assert group.remove()
    assert not os.path.exists(below)


# --- sweeping ---------------------------------------------------------------


def test_sweep_removes_groups_of_dead_owners_only(groups: Cgroups) -> None:
    """A dead owner's group goes, with its processes; a living owner's stays.

    The living one here is ourselves, and one group carries our own pid with
    another start time: a reused pid is not taken for the owner.
    """
    mine = groups.create("mine", CgroupLimits(pids=5))
    read, write = os.pipe()

    def owner() -> int:
        with_group = cgroup.discover().create("orphan", CgroupLimits(pids=5))
        spawn(with_group, sleeper)
        wait_for(lambda: len(with_group.pids()) == 1)
        os.write(write, "\n".join(with_group.paths).encode())
        return 0

    pid = spawn(None, owner)
    orphaned = os.read(read, 65536).decode().split("\n")
    assert ended(pid) == 0
    os.close(read)
    os.close(write)
    assert all(os.path.isdir(p) for p in orphaned)
    with open(orphaned[0] + "/cgroup.procs") as opened:
        lost = int(opened.read())

    parts = os.path.basename(mine.paths[0]).split("-", 4)
    reused = (
        os.path.dirname(mine.paths[0])
        + "/"
        + "-".join([*parts[:3], str(int(parts[3]) - 1), "reused"])
    )
    elsewhere = os.path.dirname(mine.paths[0]) + "/raysandbox-1-2-3-elsewhere"
    os.mkdir(reused)
    os.mkdir(elsewhere)
    try:
        swept = groups.sweep()
        assert set(orphaned) | {reused} <= set(swept)
        assert not any(os.path.exists(p) for p in [*orphaned, reused])
        assert all(os.path.isdir(p) for p in mine.paths)
        assert os.path.isdir(elsewhere), "another pid namespace's group was taken"
        assert wait_for(lambda: not _alive(lost))
    finally:
        os.rmdir(elsewhere)
        assert mine.remove()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as opened:
            return opened.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_start_time_survives_a_hostile_process_name() -> None:
    """``(comm)`` may hold blanks and parentheses; field 22 is still found."""
    read, write = os.pipe()

    def body() -> int:
        libc = ctypes.CDLL(None)
        libc.prctl(15, b") R 1 1 1 (", 0, 0, 0)
        os.write(write, b"x")
        signal.pause()
        return 0

    plain = spawn(None, sleeper)
    named = spawn(None, body)
    os.read(read, 1)
    try:
        one, two = cgroup._start_time(plain), cgroup._start_time(named)
        assert one is not None
        assert two is not None
        assert one <= two <= one + 500
    finally:
        for pid in (plain, named):
            os.kill(pid, signal.SIGKILL)
            ended(pid)


# --- an ordinary user -------------------------------------------------------


def _as_nobody(body: Callable[[], int]) -> int:
    """Run ``body`` in a child with uid and gid 65534; return its exit code."""

    def child() -> int:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        code = 73
        try:
            code = body()
        finally:
            # spawn() ends the child before the interpreter would say why.
            if code == 73:
                traceback.print_exc()
                sys.stderr.flush()
        return code

    return ended(spawn(None, child))


@pytest.fixture
def delegated(groups: Cgroups) -> Iterator[str]:
    """Make a subtree in each hierarchy and give it to uid 65534."""
    require("root")
    made = []
    for base in groups.base_paths:
        path = f"{base}/raysandbox-test-{os.getpid()}"
        os.mkdir(path)
        made.append(path)
        os.chown(path, 65534, 65534)
        for file in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            if os.path.exists(f"{path}/cgroup.subtree_control"):
                os.chown(f"{path}/{file}", 65534, 65534)
    yield ":".join(made)
    for path in made:
        for _ in range(50):
            try:
                os.rmdir(path)
                break
            except OSError:
                time.sleep(0.01)


def test_user_with_a_delegated_subtree_has_limits(delegated: str) -> None:
    """Version 1: directories given to the user are enough, root is not needed."""
    require("cgroup1", "cgroup:memory", "cgroup:pids")

    def body() -> int:
        groups = cgroup.discover({"RAYSANDBOX_CGROUP": delegated})
        limits = CgroupLimits(memory_bytes=48 * MiB, swap_bytes=0, pids=8)
        group = groups.create("user", limits, required=True)
        assert os.stat(group.paths[0]).st_uid == 65534
        assert ended(spawn(group, eat(96 * MiB))) == -signal.SIGKILL
        assert (group.usage().oom_kills or 0) >= 1
        assert ended(spawn(group, lambda: fork_until_refused(12))) == 7
        assert group.kill()
        assert group.remove()
        groups.close()
        return 0

    assert _as_nobody(body) == 0
    # Named by the operator, so the operator's to remove.
    assert all(os.path.isdir(p) for p in delegated.split(":"))


def test_user_without_delegation_is_told_the_remedy(groups: Cgroups) -> None:
    """No writable group: UnsupportedError with a command that would help."""
    require("root")

    def body() -> int:
        bare = cgroup.discover({})
        limits = CgroupLimits(memory_bytes=48 * MiB, pids=8)
        assert {m.controller for m in bare.missing} >= {"memory", "pids", "cpu"}
        assert bare.support(limits)["pids"].state == "OFF"
        with pytest.raises(UnsupportedError) as caught:
            bare.require(limits, profile="strict")
        assert caught.value.profile == "strict"
        assert caught.value.feature == "cgroup limit memory_bytes"
        remedy = caught.value.remedy
        assert ("chown" in remedy and "65534" in remedy) or "Delegate=yes" in remedy
        with pytest.raises(UnsupportedError):
            bare.create("no", limits, required=True)
        # Not required: an empty group that says what does not hold.
        group = bare.create("no", limits)
        assert set(group.absent) == {"memory_bytes", "pids"}
        assert group.paths == ()
        assert group.usage() == cgroup.Usage()
        assert group.remove()
        return 0

    # The fixture's base directories would be found: close first.
    groups.close()
    if any(os.path.isdir(p) for p in groups.base_paths):
        assert all(
            os.stat(p).st_uid == 0 for p in groups.base_paths if os.path.exists(p)
        )
    assert _as_nobody(body) == 0


def _in_own_hierarchies(body: Callable[[], int]) -> int:
    """Run ``body`` in a child for which a new group is the root of each version 1.

    What is made there is nobody else's; it may remain there.
    """
    mounts = [line.split() for line in open("/proc/self/mountinfo")]
    hierarchies = {
        fields[4]: fields[-1].removeprefix("rw,")
        for fields in mounts
        if fields[fields.index("-") + 1] == "cgroup"
    }
    views = [f"{path}/rsx-view-{os.getpid()}" for path in hierarchies]

    def child() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        for view in views:
            if os.path.exists(f"{view}/cpuset.cpus"):
                for name in ("cpuset.cpus", "cpuset.mems"):
                    with open(f"{view}/../{name}") as above:
                        value = above.read()
                    with open(f"{view}/{name}", "w") as file:
                        file.write(value)
            with open(f"{view}/cgroup.procs", "w") as file:
                file.write("0")
        code = 74
        try:
            assert libc.unshare(0x02020000) == 0  # new namespaces: mounts, groups
            assert libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
            for path, options in hierarchies.items():
                arguments = (b"none", path.encode(), b"cgroup", 0, options.encode())
                assert libc.umount2(path.encode(), 0) == 0, ctypes.get_errno()
                assert libc.mount(*arguments) == 0, (path, ctypes.get_errno())
            code = body()
        finally:
            if code == 74:
                traceback.print_exc()
                sys.stderr.flush()
        return code

    for view in views:
        os.mkdir(view)
    try:
        return ended(spawn(None, child))
    finally:
        for view in views:
            for path, _, _ in os.walk(view, topdown=False):
                os.rmdir(path)


def test_remedy_for_version_1_is_what_makes_it_work(groups: Cgroups) -> None:
    """The printed mkdir and chown, run as root, give the user their limits."""
    require("root", "cgroup1", "cgroup:pids")
    groups.close()

    def remedy() -> str:
        read, write = os.pipe()

        def ask() -> int:
            missing = cgroup.discover({}).missing
            os.write(
                write,
                next(m for m in missing if m.controller == "pids").remedy.encode(),
            )
            return 0

        assert _as_nobody(ask) == 0
        return os.read(read, 65536).decode()

    def use() -> int:
        with cgroup.discover({}) as found:
            group = found.create("helped", CgroupLimits(pids=8), required=True)
            assert ended(spawn(group, lambda: fork_until_refused(12))) == 7
            assert group.remove()
        return 0

    def body() -> int:
        command = remedy().removeprefix("as root: ").partition(" (or")[0]
        assert os.system(command) == 0
        return _as_nobody(use)

    assert _in_own_hierarchies(body) == 0


def test_remedy_for_version_2_is_what_makes_it_work(groups: Cgroups) -> None:
    """The printed commands put a user's process where it can make groups."""
    require("root", "cgroup2", "cgroup:memory", "cgroup:pids")
    if os.path.isdir("/run/systemd/system"):
        pytest.skip("the remedy here is systemd's, for a user session")
    mount = _unified()
    base = f"{mount}/raysandbox-65534"

    def use() -> int:
        bare = cgroup.discover({})
        remedy = next(m.remedy for m in bare.missing if m.controller == "memory")
        command = remedy.removeprefix("as root: ").partition(", PID being")[0]
        os.write(wanted, command.replace("PID", str(os.getpid())).encode())
        os.read(done, 1)
        with cgroup.discover({}) as found:
            assert found.missing == (), found.missing
            assert found.base_paths == (f"{base}/raysandbox",)
            limits = CgroupLimits(
                memory_bytes=48 * MiB, swap_bytes=0, pids=8, cpu_cores=0.5
            )
            group = found.create("mine", limits, required=True)
            assert ended(spawn(group, lambda: fork_until_refused(12))) == 7
            assert group.kill()
            assert ended(spawn(group, eat(96 * MiB))) == -signal.SIGKILL
            assert (group.usage().oom_kills or 0) >= 1
            assert group.remove()
        return 0

    request, wanted = os.pipe()
    done, go = os.pipe()

    def helper() -> int:
        return os.waitstatus_to_exitcode(os.system(os.read(request, 65536).decode()))

    groups.close()
    operator = spawn(None, lambda: helper() or (os.write(go, b"x") - 1))
    try:
        assert _as_nobody(use) == 0
        assert ended(operator) == 0
    finally:
        for path in (f"{base}/raysandbox", f"{base}/ray", base):
            if os.path.isdir(path):
                os.rmdir(path)


def test_user_may_not_move_processes_out_of_a_foreign_group(delegated: str) -> None:
    """Version 2: owning the target is not enough; the common ancestor counts."""
    require("cgroup2")

    def body() -> int:
        found = cgroup.discover({"RAYSANDBOX_CGROUP": delegated})
        assert found.versions == {}
        assert "may not move processes" in found.missing[0].have
        return 0

    assert _as_nobody(body) == 0


# --- errors -----------------------------------------------------------------


@pytest.mark.parametrize("bad", ["/tmp", "/sys/fs/cgroup/no/such", "relative"])
def test_named_directory_that_is_no_cgroup_is_refused(bad: str) -> None:
    """RAYSANDBOX_CGROUP that names no group is an error, never a fallback."""
    require("cgroup")
    with pytest.raises(UnsupportedError, match="RAYSANDBOX_CGROUP"):
        cgroup.discover({"RAYSANDBOX_CGROUP": bad})


def test_value_that_the_kernel_refuses_is_a_setup_error(groups: Cgroups) -> None:
    """The step, the errno and the file are named; no directory stays."""
    require("cgroup:pids")
    # PID_MAX_LIMIT is 4 Mi: more is EINVAL.
    with pytest.raises(SetupError) as caught:
        groups.create("toomany", CgroupLimits(pids=1 << 40))
    assert caught.value.step == "cgroup_limit"
    assert caught.value.errno == errno.EINVAL
    assert "pids.max" in caught.value.detail
    for path in groups.base_paths:
        assert not any(n.endswith("-toomany") for n in os.listdir(path))


def test_group_that_exists_is_a_setup_error(groups: Cgroups) -> None:
    """A name is used once at a time; the second create leaves the first alone."""
    group = groups.create("twice", CgroupLimits(pids=5))
    try:
        with pytest.raises(SetupError) as caught:
            groups.create("twice", CgroupLimits(pids=5))
        assert caught.value.step == "cgroup_create"
        assert caught.value.errno == errno.EEXIST
        assert all(os.path.isdir(p) for p in group.paths)
    finally:
        assert group.remove()


def test_lower_quota_of_the_parent_is_reported_as_degraded(groups: Cgroups) -> None:
    """Version 1 refuses a child more CPU than its parent: the parent's holds."""
    require("root", "cgroup1", "cgroup:cpu")
    if groups.versions["cpu"] != 1:
        pytest.skip("version 2 accepts it and applies the lower one")
    base = next(b for b in groups.base_paths if os.path.exists(f"{b}/cpu.cfs_quota_us"))
    path = f"{base}/raysandbox-parent-{os.getpid()}"
    os.mkdir(path)
    try:
        with open(f"{path}/cpu.cfs_quota_us", "w") as opened:
            opened.write("50000")
        below = cgroup.discover({"RAYSANDBOX_CGROUP": path})
        group = below.create("more", CgroupLimits(cpu_cores=1))
        assert "0.5 cores" in group.degraded["cpu_cores"]
        assert group.remove()
        group = below.create("less", CgroupLimits(cpu_cores=0.25))
        assert group.supported == ("cpu_cores",)
        assert group.remove()
        # Whoever makes groups itself is told before: its write would be EINVAL.
        files, lower = below.writes(CgroupLimits(cpu_cores=1))
        assert (files, list(lower)) == ({}, ["cpu_cores"])
        assert "0.5 cores" in lower["cpu_cores"]
        files, lower = below.writes(CgroupLimits(cpu_cores=0.25))
        assert (files, lower) == ({path: [("cpu.cfs_quota_us", b"25000")]}, {})
    finally:
        os.rmdir(path)


def test_swap_without_memory_is_reported_on_version_1(groups: Cgroups) -> None:
    """Version 1 can't limit swap alone, and says so instead of ignoring it."""
    require("cgroup:memory")
    status = groups.support(CgroupLimits(swap_bytes=0))["swap_bytes"]
    if groups.versions["memory"] == 1:
        assert status.state == "OFF"
        assert "together" in status.reason
    else:
        assert status.state == "ENFORCED"


# --- parsing what the kernel says -------------------------------------------


def test_mounts_are_parsed_with_escapes_and_joint_controllers() -> None:
    """Blanks in paths, ``cpu,cpuacct`` together, named hierarchies ignored."""
    text = (
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 /docker/a /my\\040dir/cpu,cpuacct rw shared:1 master:2 "
        "- cgroup cgroup rw,cpu,cpuacct\n"
        "33 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
        "garbage\n"
    )
    joint, named = cgroup_find.parse_mounts(text)
    assert joint.path == "/my dir/cpu,cpuacct"
    assert joint.root == "/docker/a"
    assert joint.controllers == {"cpu", "cpuacct"}
    assert named.controllers == frozenset()


def test_own_group_inside_a_bound_subtree_is_found(tmp_path: object) -> None:
    """A container without cgroup namespace sees its subtree as the mount."""
    mount = cgroup_find.Mount(1, str(tmp_path), "/docker/a", frozenset({"pids"}))
    os.mkdir(f"{tmp_path}/inner")
    assert (
        cgroup_find.own_dir(mount, {"pids": "/docker/a/inner"}) == f"{tmp_path}/inner"
    )
    assert cgroup_find.own_dir(mount, {"pids": "/docker/ab"}) == str(tmp_path)
    assert cgroup_find.own_dir(mount, {"pids": "/docker/a"}) == str(tmp_path)
