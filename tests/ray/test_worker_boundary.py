"""``boundary = "worker"``: all of Ray, and walls around the worker itself.

On a cluster that has the hook alone: nothing but what a running worker can do to
itself stands here. `test_worker_boundary_wall` is the other kind of node.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import ray

import raysandbox
from tests.ray.events import events

pytestmark = pytest.mark.usefixtures("hook_alone")

TRUSTED = raysandbox.tag("trusted")
INSIDE = raysandbox.tag("inside")
STRICT = raysandbox.tag("strict")


def errno_of(function, *args):
    """0, or the errno that ``function`` fails with."""
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0


def libc_errno(name, *args):
    """0, or the errno that a call of libc fails with."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if getattr(libc, name)(*args) < 0 else 0


def inside(function, *args, tag=TRUSTED, **keywords):
    """Run ``function`` in a worker of a profile with ``boundary = "worker"``."""
    task = ray.remote(resources=tag, max_retries=0)(function)
    return ray.get(task.remote(*args, **keywords), timeout=60)


def entered(pid):
    """The event of a worker that became a boundary."""
    found = [e for e in events() if e["event"] == "worker_entered" and e["pid"] == pid]
    assert len(found) == 1, "a worker enters one profile, once"
    return found[0]


# --- all of Ray ----------------------------------------------------------------


def test_tasks_take_and_give_any_object():
    """Arguments, references, keywords and results are as on stock Ray."""

    class Own:
        def __init__(self, value):
            self.value = value

    def add(first, second, *, third):
        return Own((first.value + second + third, type(first).__name__))

    made = inside(add, ray.put(Own(1)), 2, third=Own(3).value)
    assert made.value == (6, "Own")


def test_ray_api_inside():
    """put, get, wait, nested tasks of other profiles and named actors work."""

    @ray.remote(resources=STRICT)
    def in_a_jail(value):
        return value * 2

    @ray.remote(resources=INSIDE, num_cpus=0)
    def elsewhere():
        return os.getpid()

    def use_ray():
        refs = [in_a_jail.remote(n) for n in range(4)]
        ready, rest = ray.wait(refs, num_returns=4)
        stored = ray.put(bytes(1 << 20))
        return (
            sorted(ray.get(ready)),
            rest,
            len(ray.get(stored)),
            os.getpid(),
            ray.get(elsewhere.remote()),
        )

    doubled, rest, size, here, there = inside(use_ray)
    assert (doubled, rest, size) == ([0, 2, 4, 6], [], 1 << 20)
    assert here != there
    assert entered(here)["profile"] == "trusted"
    assert entered(there)["profile"] == "inside"


def test_generators_stream():
    """A generator's items come one by one."""

    @ray.remote(resources=TRUSTED)
    def count():
        for number in range(3):
            yield number, os.getpid()

    numbers = [ray.get(ref) for ref in count.remote()]
    assert [number for number, _ in numbers] == [0, 1, 2]


def test_exceptions_keep_their_type():
    """What a task raises is what the driver catches, with its traceback."""

    class OwnError(Exception):
        pass

    def fail():
        raise OwnError("as on stock Ray")

    with pytest.raises(OwnError, match="as on stock Ray") as caught:
        inside(fail)
    assert "in fail" in str(caught.value)


def test_retries_of_exceptions():
    """retry_exceptions looks at types in the worker itself."""

    @ray.remote(resources=TRUSTED, num_cpus=0)
    class Counter:
        def __init__(self):
            self.count = 0

        def next(self):
            self.count += 1
            return self.count

    counter = Counter.remote()

    @ray.remote(resources=TRUSTED, max_retries=3, retry_exceptions=[KeyError])
    def flaky():
        if ray.get(counter.next.remote()) < 3:
            raise KeyError("again")
        return "done"

    assert ray.get(flaky.remote(), timeout=60) == "done"


def test_cancel():
    """ray.cancel interrupts the task, and the worker goes on."""

    @ray.remote(resources=TRUSTED)
    def run():
        while True:
            time.sleep(0.01)

    ref = run.remote()
    time.sleep(1)
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=30)
    assert inside(lambda: 1) == 1


def test_max_calls():
    """A worker leaves after max_calls tasks, as on stock Ray."""

    @ray.remote(resources=TRUSTED, max_calls=1)
    def pid():
        return os.getpid()

    assert len({ray.get(pid.remote(), timeout=60) for _ in range(2)}) == 2


def test_async_and_threaded_actors():
    """Concurrent actors, which jails do not have, run here."""

    @ray.remote(resources=TRUSTED, num_cpus=0)
    class Async:
        async def meet(self, event="both"):
            self.here = getattr(self, "here", 0) + 1
            while self.here < 2:
                await asyncio.sleep(0.01)
            return errno_of(open, "/etc/shadow")

    @ray.remote(resources=TRUSTED, num_cpus=0, max_concurrency=2)
    class Threaded:
        def __init__(self):
            self.barrier = threading.Barrier(2)

        def meet(self):
            self.barrier.wait(30)
            return errno_of(open, "/etc/shadow")

    for actor in (Async.remote(), Threaded.remote()):
        refs = [actor.meet.remote() for _ in range(2)]
        assert ray.get(refs, timeout=60) == [errno.EACCES] * 2


def test_actors_restart():
    """A killed actor comes back in a new worker, behind the same walls."""

    @ray.remote(resources=TRUSTED, num_cpus=0, max_restarts=1, max_task_retries=1)
    class Actor:
        def pid(self):
            return os.getpid()

    actor = Actor.remote()
    first = ray.get(actor.pid.remote(), timeout=60)
    ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + 60
    while (second := ray.get(actor.pid.remote(), timeout=60)) == first:
        assert time.monotonic() < deadline
    assert entered(second)["profile"] == "trusted"


# --- which worker ----------------------------------------------------------------


def test_untagged_tasks_stay_in_jails():
    """No tag means strict, whatever other profiles there are."""

    @ray.remote
    def look():
        return ray.get_runtime_context().get_worker_id()

    with pytest.raises(Exception, match=r"ray\.put\(\) is not available in a jail"):
        ray.get(ray.remote(lambda: ray.put(1)).remote(), timeout=60)
    worker = ray.get(look.remote(), timeout=60)
    assert not [
        e for e in events() if e["event"] == "worker_entered" and e["worker"] == worker
    ]


def test_each_worker_serves_one_profile():
    """Tasks of three profiles, mixed and without retries: no worker has two."""
    jails = []

    def pid():
        time.sleep(0.02)
        return os.getpid()

    def worker():
        time.sleep(0.02)
        return ray.get_runtime_context().get_worker_id()

    trusted = ray.remote(resources=TRUSTED, max_retries=0)(pid)
    other = ray.remote(resources=INSIDE, max_retries=0)(pid)
    jailed = ray.remote(resources=STRICT, max_retries=0)(worker)
    seen = {"trusted": set(), "inside": set()}
    for _ in range(3):
        refs = [each.remote() for each in (trusted, other, jailed)]
        one, two, three = ray.get(refs, timeout=60)
        seen["trusted"].add(one)
        seen["inside"].add(two)
        jails.append(three)
    assert not seen["trusted"] & seen["inside"]
    for profile, pids in seen.items():
        assert {entered(pid)["profile"] for pid in pids} == {profile}
    became = {e["worker"] for e in events() if e["event"] == "worker_entered"}
    assert not became & set(jails)


def test_nested_tasks_do_not_inherit_the_worker():
    """A strict task submitted from inside goes to a worker with jails."""

    @ray.remote(resources=STRICT, max_retries=0)
    def jailed():
        return ray.get_runtime_context().get_worker_id()

    def submit():
        return (
            ray.get_runtime_context().get_worker_id(),
            ray.get(jailed.remote(), timeout=60),
        )

    own, other = inside(submit)
    became = {e["worker"] for e in events() if e["event"] == "worker_entered"}
    assert own in became
    assert other not in became


FOREIGN_DRIVER = """
    import os, ray, sys
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR",
             runtime_env={"worker_process_setup_hook": "raysandbox.worker_hook"})
    def options(name, **more): return {"resources": {"sandbox:" + name: 1}, **more}
    def pid(): return os.getpid()
    def where(): return ray.get_runtime_context().get_worker_id()
    trusted = ray.remote(**options("trusted", max_retries=0))(pid)
    inside = ray.remote(**options("inside", max_retries=0))(pid)
    strict = ray.remote(**options("strict", max_retries=0))(where)
    found = []
    for _ in range(2):
        found += ray.get([trusted.remote(), inside.remote()], timeout=60)
    assert len(set(found)) == 4, found
    again = ray.remote(**options("trusted", max_retries=0))(where)
    for _ in range(3):
        jail = ray.get(strict.remote(), timeout=60)
        # That worker is idle now, and raylet takes it: it ends its jails for it.
        assert ray.get(again.remote(), timeout=60) == jail
    # Actors have workers of their own anyway.
    actor = ray.remote(**options("trusted"))(type("A", (), {"pid": lambda self: pid()}))
    assert ray.get(actor.remote().pid.remote(), timeout=60) not in found
    assert "raysandbox" not in sys.modules
    print("served")
"""


def test_driver_without_raysandbox_is_served():
    """Its workers leave after each task, so that no other profile's comes to them.

    Where a worker has served jails already it serves that profile from then on: to
    send the task elsewhere would use up a retry.
    """
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOREIGN_DRIVER), address],
        capture_output=True,
        text=True,
        timeout=110,
        cwd="/",
    )
    assert "served" in done.stdout, done.stderr[-3000:]


def test_a_required_wall_that_is_missing_refuses():
    """namespaces.required: the task's owner is told what is missing and why."""
    with pytest.raises(raysandbox.UnsupportedError) as caught:
        inside(lambda: 1, tag=raysandbox.tag("demanding"))
    message = str(caught.value)
    assert "profile 'demanding' requires user namespace" in message
    assert "process with threads" in message


# --- attacks -----------------------------------------------------------------------


@pytest.fixture
def secret():
    """A file in a home, such as a key."""
    directory = Path(tempfile.mkdtemp(prefix="rsx-secret-", dir=Path.home()))
    file = directory / "id_ed25519"
    file.write_text("secret")
    yield str(file)
    file.unlink()
    directory.rmdir()


def read(path):
    with open(path) as file:
        return file.read()


def test_reading_a_file_outside_the_view_is_denied(secret):
    """A key in a home, the cluster's token and logs: none can be opened."""
    session = ray._private.worker._global_node.get_session_dir_path()
    logs = os.path.join(session, "logs")
    others = [
        secret,
        os.path.join(logs, "raylet.out"),
        f"/proc/{os.getpid()}/cmdline",
        "/etc/shadow",
    ]
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        others.append(str(token))
    for path in others:
        if os.getuid() == 0 or path != "/etc/shadow":
            assert errno_of(read, path) == 0
    assert inside(lambda: [errno_of(read, path) for path in others]) == [
        errno.EACCES
    ] * len(others)
    assert inside(errno_of, os.listdir, logs) == errno.EACCES
    assert errno_of(os.listdir, logs) == 0


def test_the_scratch_of_another_worker_is_out_of_reach():
    """What one worker writes is its own; /tmp is nobody's."""

    def leave():
        path = os.path.join(os.environ["HOME"], "mine")
        Path(path).write_text("mine")
        return path, read(path)

    path, own = inside(leave)
    assert own == "mine"
    assert errno_of(read, path) == 0
    assert inside(errno_of, read, path, tag=INSIDE) == errno.EACCES
    assert inside(errno_of, open, "/tmp/rsx-mine", "w") == errno.EACCES


def test_connecting_to_another_port_is_denied():
    """TCP to what is not Ray's fails, as does every other protocol."""
    server = socket.socket()
    for port in range(18000, 18200):
        if not errno_of(server.bind, ("127.0.0.1", port)):
            break
    server.listen()

    def connect():
        with socket.socket() as client:
            client.settimeout(5)
            client.connect(("127.0.0.1", port))

    def bind():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))

    def udp():
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()

    def multipath():
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()

    def netlink():
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()

    with server:
        assert [errno_of(each) for each in (connect, bind, udp, netlink)] == [0] * 4
        assert inside(errno_of, connect) == errno.EACCES
        assert inside(errno_of, bind) == errno.EPERM
        assert inside(errno_of, udp) == errno.EPERM
        assert inside(errno_of, multipath) == errno.EPERM
        assert inside(errno_of, netlink) == errno.EPERM


def test_sockets_of_others_by_path_are_denied(tmp_path):
    """No Unix socket can be made: Landlock knows none, and a path reaches them all."""
    path = str(tmp_path / "docker.sock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()

    def connect():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)

    with server:
        assert errno_of(connect) == 0
        assert inside(errno_of, connect) == errno.EPERM


def test_attributes_of_files_are_denied(secret):
    """chmod and the like need no open file, and Landlock does not see them."""

    def attack():
        fd = os.open(sys.executable, os.O_RDONLY)
        return [
            errno_of(os.chmod, secret, 0o644),
            errno_of(os.chown, secret, 12345, 12345),
            errno_of(os.utime, secret),
            errno_of(os.fchmod, fd, 0o755),
        ]

    assert errno_of(os.chmod, secret, 0o600) == 0
    assert inside(attack) == [errno.EPERM] * 4
    assert os.stat(secret).st_mode & 0o777 == 0o600


def test_other_processes_of_the_user_are_left_alone(victim):
    """Limits, priorities and CPUs of a neighbour can't be set, nor its memory had.

    With RLIMIT_CPU alone raylet could be ended, and no scope of Landlock's covers it.
    """
    pid = victim.pid

    def attack():
        return [
            errno_of(resource.prlimit, pid, resource.RLIMIT_CORE, (0, 0)),
            errno_of(os.sched_setaffinity, pid, {0}),
            errno_of(os.setpriority, os.PRIO_PROCESS, pid, 19),
            libc_errno("shmget", 0, 4096, 0o1600),
            errno_of(resource.getrlimit, resource.RLIMIT_CORE),
        ]

    assert errno_of(resource.prlimit, pid, resource.RLIMIT_CORE) == 0
    assert errno_of(os.sched_setaffinity, pid, {0}) == 0
    assert inside(attack) == [errno.EPERM] * 4 + [0]


def fork_many(count):
    """How many children could be started, all alive at once."""
    children = []
    with contextlib.suppress(BlockingIOError):
        while len(children) < count:
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)


def test_fork_bomb_ends_at_the_limit():
    """limits.pids counts the worker's threads and children; others go on."""
    code = "from tests.ray.test_worker_boundary import fork_many; print(fork_many(300))"
    outside = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert outside.stdout.strip() == "300", outside.stderr
    assert 50 < inside(fork_many, 300, tag=INSIDE) < 200
    assert inside(lambda: 1, tag=INSIDE) == 1


def test_memory_bomb_ends_the_worker_alone():
    """limits.memory: the worker is killed, its owner told, and the node goes on."""

    def fill():
        kept = [bytearray(os.urandom(1 << 20)) for _ in range(600)]
        return len(kept)

    code = "import os; [bytearray(os.urandom(1 << 20)) for _ in range(600)]"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def own_pid():
        return os.getpid()

    pid = inside(own_pid, tag=INSIDE)
    with pytest.raises(ray.exceptions.RayError) as caught:
        inside(fill, tag=INSIDE)
    assert not isinstance(caught.value, ray.exceptions.RayTaskError)
    assert inside(lambda: 1, tag=INSIDE) == 1
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended = [e for e in events() if e["event"] == "worker_ended"]
        if any(e["pid"] == pid and e["oom_kills"] for e in ended):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"no event of the end of {pid}: {ended}")


@pytest.fixture
def victim():
    """A process of the same user."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def test_signals_to_others_are_denied(victim):
    """Neither a neighbour nor raylet can be killed; own children can."""
    assert errno_of(os.kill, victim.pid, 0) == 0
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid

    def attack():
        child = subprocess.Popen(["sleep", "100"])
        child.kill()
        return (
            child.wait(),
            errno_of(os.kill, victim_pid, signal.SIGKILL),
            errno_of(os.kill, raylet, signal.SIGTERM),
            errno_of(os.kill, os.getppid(), signal.SIGTERM),
            errno_of(os.kill, os.getpid(), 0),
        )

    victim_pid = victim.pid
    assert inside(attack) == (-9, errno.EPERM, errno.EPERM, errno.EPERM, 0)
    assert victim.poll() is None


def test_kernel_surfaces_are_closed(victim):
    """ptrace, mounts, namespaces, process memory: none, and no way back."""
    pid = victim.pid

    def attack():
        return {
            "ptrace": libc_errno("ptrace", 16, pid, 0, 0),
            "mount": libc_errno("mount", b"none", b"/mnt", b"tmpfs", 0, None),
            "user namespace": libc_errno("unshare", 0x10000000),
            "dumpable": libc_errno("prctl", 4, 1, 0, 0, 0),
            "open mem": errno_of(open, f"/proc/{pid}/mem", "rb"),
            "setuid": libc_errno("setuid", 12345),
        }

    assert inside(attack) == {
        "ptrace": errno.EPERM,
        "mount": errno.EPERM,
        "user namespace": errno.EPERM,
        "dumpable": errno.EPERM,
        "open mem": errno.EACCES,
        "setuid": errno.EPERM,
    }
    control = (
        "import ctypes; l = ctypes.CDLL(None); "
        f"print(l.ptrace(16, {pid}, 0, 0), l.unshare(0x10000000), l.prctl(4, 1))"
    )
    outside = subprocess.run(
        [sys.executable, "-c", control], capture_output=True, text=True
    )
    assert outside.stdout.split() == ["0", "0", "0"]


def test_threads_from_before_are_behind_the_walls(secret, victim):
    """Ray's own threads, older than the profile, get no further than the task's.

    Landlock and credentials belong to threads: a callback on one of them would
    otherwise be the way out.
    """
    pid = victim.pid

    def attack():
        answer, done = [], threading.Event()

        def on_a_thread_of_rays(_value):
            answer.append(
                (
                    threading.get_native_id(),
                    read("/proc/thread-self/comm").strip(),
                    errno_of(read, secret),
                    errno_of(os.kill, pid, signal.SIGKILL),
                    libc_errno("unshare", 0x10000000),
                )
            )
            done.set()

        ref = ray.put(1)
        ref._on_completed(on_a_thread_of_rays)
        assert done.wait(30)
        return os.getpid(), threading.get_native_id(), answer[0]

    process, thread, (there, name, *denied) = inside(attack)
    assert there not in (process, thread)
    assert not name.startswith("ray::")
    assert denied == [errno.EACCES, errno.EPERM, errno.EPERM]


def test_every_thread_says_so_itself():
    """The kernel's own view of each thread: filtered, without privileges."""

    def look():
        found = []
        for tid in os.listdir("/proc/self/task"):
            lines = read(f"/proc/self/task/{tid}/status").splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            names = ("Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapAmb")
            found.append([int(status[name], 16) for name in names])
        return os.getpid(), found

    pid, found = inside(look)
    assert len(found) > 10
    assert all(each == [2, 1, 0, 0, 0] for each in found)
    event = entered(pid)
    assert event["threads"] > 10
    assert event["protections"]["seccomp"] == "enforced"
    assert event["protections"]["landlock"] == "enforced"
    assert event["protections"]["limits.memory_bytes"] == "enforced"
    assert event["protections"]["pid namespace"].startswith("off: ")


def test_environment_is_the_profiles():
    """What the node's environment holds is gone, from /proc too; the task's stays."""

    @ray.remote(
        resources=TRUSTED, runtime_env={"env_vars": {"MINE": "yes"}}, max_retries=0
    )
    def look():
        return dict(os.environ), read("/proc/self/environ")

    variables, block = ray.get(look.remote(), timeout=60)
    assert variables["MINE"] == "yes"
    assert "RSX_TEST_SESSION" in os.environ
    assert "RSX_TEST_SESSION" not in variables
    assert os.environ["RSX_TEST_SESSION"] not in block
    assert variables["HOME"].endswith("/scratch")


def test_leaked_descriptors_lead_nowhere():
    """raylet's logs, open in every worker, are not open in this one."""

    def targets():
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return found

    found = inside(targets)
    logs = [os.path.basename(each) for each in found if "/logs/" in each]
    assert logs
    assert not [each for each in logs if "raylet" in each.lower()]
