"""Attacks that need a jail of their own: what is used up, and what is left.

Every test shows first that the attack works outside, or that the same code runs
to its end where the limit is higher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.attacks.harness import Actor, interpreter

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended, outside or inside."""

    code: int
    out: str
    err: str
    seconds: float


def _finish(process: subprocess.Popen[bytes], timeout_s: float) -> Done:
    begun = time.monotonic()
    out, err = process.communicate(timeout=timeout_s)
    return Done(
        process.returncode,
        out.decode(errors="replace"),
        err.decode(errors="replace"),
        time.monotonic() - begun,
    )


@dataclass(slots=True)
class Bench:
    """Runs Python code as one actor, outside and inside.

    Attributes:
        mark: In the command line of all that runs here, to find what is left.
    """

    actor: Actor
    mark: str

    def _command(self, code: str) -> list[str]:
        return [interpreter(), "-I", "-S", "-c", code, self.mark]

    def outside(self, code: str, timeout_s: float = 30) -> Done:
        """Run as the positive control."""
        process = self.actor.start(
            self._command(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return _finish(process, timeout_s)

    def start(self, limits: str, code: str) -> subprocess.Popen[bytes]:
        """Start in a jail whose profile extends ``strict`` by ``limits``."""
        name = f"own-{uuid.uuid4().hex[:8]}"
        self.actor.write_profile(name, limits)
        return self.actor.jail(
            self._command(code),
            profile=name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def inside(self, limits: str, code: str, timeout_s: float = 60) -> Done:
        """Run in such a jail, and see that nothing is left of it."""
        done = _finish(self.start(limits, code), timeout_s)
        self.gone()
        return done

    def beyond_start(self, done: Done) -> float:
        """Seconds of a run beyond what an empty jail takes on this machine.

        An emulated machine needs many just to start the launcher.
        """
        return done.seconds - self.inside("", "pass").seconds

    def left(self) -> list[int]:
        """Pids of what still runs."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    if self.mark.encode() in command.split(b"\0"):
                        found.append(int(entry.name))
        return found

    def gone(self, within_s: float = 5) -> None:
        """Fail unless everything has ended."""
        until = time.monotonic() + within_s
        while left := self.left():
            assert time.monotonic() < until, f"still there: {left}"
            time.sleep(0.02)


@pytest.fixture
def bench(actor: Actor) -> Iterator[Bench]:
    """A bench whose survivors are killed, whatever the test finds."""
    made = Bench(actor, f"rsx-mark-{uuid.uuid4().hex}")
    yield made
    for pid in made.left():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def limited(bench: Bench) -> Bench:
    """A bench whose actor can make control groups."""
    if not bench.actor.limited:
        pytest.skip("no delegated cgroup: strict refuses this user, see test_refused")
    return bench


# --- memory -----------------------------------------------------------------

# The scratch counts in the memory: a profile may not give more of it.
_LITTLE = '[filesystem]\nscratch = "80MiB"'
_TAKE = "b = bytearray({mib} << 20); print(len(b))"


def test_memory_bomb(limited: Bench) -> None:
    """More memory than the profile allows ends the jail, and says which key."""
    code = _TAKE.format(mib=192)
    assert limited.outside(code).code == 0
    assert limited.inside('[limits]\nmemory = "512MiB"', code).code == 0
    done = limited.inside(f'[limits]\nmemory = "96MiB"\n{_LITTLE}', code)
    assert done.code == 128 + signal.SIGKILL
    assert "limits.memory" in done.err


def test_memory_in_the_scratch(limited: Bench) -> None:
    """Files of the scratch are memory: they count like it."""
    code = (
        "f = open('/tmp/x', 'wb')\n"
        "for _ in range(70): f.write(bytes(1 << 20)); f.flush()\n"
        "print('written', flush=True)\n"
        "b = bytearray(60 << 20)\n"
        "print('taken')"
    )
    roomy = limited.inside(f'[limits]\nmemory = "512MiB"\n{_LITTLE}', code)
    assert roomy.out == "written\ntaken\n", roomy
    done = limited.inside(f'[limits]\nmemory = "96MiB"\n{_LITTLE}', code)
    assert done.out == "written\n"
    assert done.code == 128 + signal.SIGKILL
    assert "limits.memory" in done.err


def test_memory_of_many_processes(limited: Bench) -> None:
    """It is the sum that counts: eight processes of 24 MiB are 192 MiB."""
    code = (
        "import os, time\n"
        "r, w = os.pipe()\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        b = bytearray(24 << 20); os.write(w, b'x'); time.sleep(60)\n"
        "got = 0\n"
        "while got < 8: got += len(os.read(r, 8))\n"
        "print('all')\n"
        "import signal; os.killpg(0, signal.SIGKILL)"
    )
    roomy = limited.inside('[limits]\nmemory = "512MiB"', code)
    assert roomy.out == "" or "all" in roomy.out
    assert "limits.memory" not in roomy.err
    limits = f'[limits]\nmemory = "96MiB"\nwall_time = "20s"\n{_LITTLE}'
    done = limited.inside(limits, code)
    assert "limits.memory" in done.err, done


def test_locked_memory(bench: Bench) -> None:
    """No memory is locked beyond a small amount: it could never be reclaimed."""
    code = (
        "import ctypes, mmap\n"
        "m = mmap.mmap(-1, 64 << 20)\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "r = libc.mlock(ctypes.c_void_p(a), ctypes.c_size_t(64 << 20))\n"
        "print(r, ctypes.get_errno())"
    )
    if os.geteuid() == 0 and bench.actor.uid == 0:
        assert bench.outside(code).out == "0 0\n"
    assert bench.inside("", code).out.split()[0] == "-1"


# --- processes --------------------------------------------------------------

_FORKS = """
import os, signal, sys, time
made, error = 0, 0
for _ in range(200):
    try:
        pid = os.fork()
    except OSError as problem:
        error = problem.errno
        break
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    made += 1
print(made, error, flush=True)
"""


def test_fork_bomb(limited: Bench) -> None:
    """fork() answers EAGAIN at the limit, and all of them end with the jail."""
    code = _FORKS
    outside = limited.outside(code.replace("time.sleep(60)", "time.sleep(1)"))
    assert outside.out == "200 0\n"
    done = limited.inside("[limits]\npids = 24", code)
    made, error = map(int, done.out.split())
    assert 0 < made < 24
    assert error == 11
    assert limited.beyond_start(done) < 20


def test_thread_bomb(limited: Bench) -> None:
    """Threads count as processes do."""
    code = (
        "import _thread, time\n"
        "n = 0\n"
        "try:\n"
        "    for _ in range(200): _thread.start_new_thread(time.sleep, (5,)); n += 1\n"
        "except RuntimeError: pass\n"
        "print(n, flush=True)\n"
        "import os; os._exit(0)"
    )
    assert limited.outside(code).out == "200\n"
    assert int(limited.inside("[limits]\npids = 24", code).out) < 24


def test_relentless_fork_bomb(limited: Bench) -> None:
    """Children that fork again as soon as they are killed end with the jail."""
    code = (
        "import os, signal\n"
        "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n"
        "    try: os.setsid()\n"
        "    except OSError: pass\n"
        "    try: os.fork()\n"
        "    except OSError: pass\n"
    )
    done = limited.inside('[limits]\npids = 32\nwall_time = "2s"', code)
    assert done.code == 124
    assert "limits.wall_time" in done.err
    assert limited.beyond_start(done) < 20


# --- disk -------------------------------------------------------------------


def test_disk_fill(bench: Bench) -> None:
    """The scratch, /tmp and /dev/shm share one size: ENOSPC at its end."""
    code = (
        "import errno, json\n"
        "total, ends = 0, []\n"
        "for d in ('/scratch', '/tmp', '/dev/shm'):\n"
        "    try:\n"
        "        f = open(d + '/fill', 'wb', buffering=0)\n"
        "        while True: total += f.write(bytes(1 << 20))\n"
        "    except OSError as e: ends.append(errno.errorcode[e.errno])\n"
        "print(json.dumps([total, ends]))"
    )
    done = bench.inside('[filesystem]\nscratch = "16MiB"', code)
    total, ends = json.loads(done.out)
    assert ends == ["ENOSPC"] * 3
    assert 15 * MIB <= total <= 16 * MIB
    # Positive control: more room, more data.
    done = bench.inside('[filesystem]\nscratch = "32MiB"', code)
    assert json.loads(done.out)[0] > 30 * MIB


def test_inode_fill(bench: Bench) -> None:
    """Empty files end at the inode count."""
    code = (
        "import errno, os\n"
        "n = 0\n"
        "try:\n"
        "    while n < 5000: os.close(os.open(f'/tmp/{n}', os.O_CREAT)); n += 1\n"
        "except OSError as e: print(n, errno.errorcode[e.errno])\n"
        "else: print(n, 'done')"
    )
    count, how = bench.inside("[filesystem]\nscratch_inodes = 512", code).out.split()
    assert how == "ENOSPC"
    assert int(count) < 512
    assert bench.inside("", code).out == "5000 done\n"


def test_disk_outside_the_scratch(bench: Bench) -> None:
    """No directory but the scratch takes a file."""
    code = (
        "import os\n"
        "won = []\n"
        "for d, below, _ in os.walk('/'):\n"
        "    if d.count('/') > 2: below.clear()\n"
        "    if d.startswith(('/proc', '/scratch', '/tmp', '/var/tmp', '/dev/shm')):\n"
        "        continue\n"
        "    try: os.close(os.open(d + '/rsx-fill', os.O_CREAT | os.O_EXCL))\n"
        "    except OSError: continue\n"
        "    won.append(d)\n"
        "    os.unlink(d + '/rsx-fill')\n"
        "print(won)"
    )
    assert bench.inside("", code).out == "[]\n"
    here = "/tmp"
    assert here in bench.inside("", code.replace("'/scratch', '/tmp', ", "")).out


def test_file_size(bench: Bench) -> None:
    """A file ends at file_size with EFBIG (Python ignores SIGXFSZ)."""
    code = (
        "import errno\n"
        "f = open('/tmp/x', 'wb', buffering=0)\n"
        "n = 0\n"
        "try:\n"
        "    while n < 8 << 20: n += f.write(bytes(1 << 20))\n"
        "except OSError as e: print(n, errno.errorcode[e.errno])\n"
        "else: print(n, 'done')"
    )
    done = bench.inside('[limits]\nfile_size = "2MiB"', code)
    assert done.out == f"{2 * MIB} EFBIG\n"
    assert bench.inside("", code).out == f"{8 * MIB} done\n"


def test_open_files(bench: Bench) -> None:
    """Descriptors end at open_files, and the limit can't be raised."""
    code = (
        "import os, errno, resource\n"
        "try: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)); print('up')\n"
        "except (ValueError, OSError): print('kept')\n"
        "n = 0\n"
        "try:\n"
        "    while n < 3000: os.dup(0); n += 1\n"
        "except OSError as e: print(errno.errorcode[e.errno], n)\n"
    )
    done = bench.inside("[limits]\nopen_files = 64", code)
    first, second = done.out.splitlines()
    assert first == "kept"
    assert second.startswith("EMFILE ")
    assert int(second.split()[1]) < 64


# --- time -------------------------------------------------------------------

_SPIN = (
    "import time\n"
    "begun, end = time.process_time(), time.monotonic() + {s}\n"
    "while time.monotonic() < end: pass\n"
    "print(time.process_time() - begun)"
)


@pytest.mark.alone
def test_cpu_quota(limited: Bench) -> None:
    """A quarter of a core is a quarter of a core."""
    code = _SPIN.format(s=2)
    for _ in range(5):
        outside = float(limited.outside(code).out)
        inside = float(limited.inside("[limits]\ncpu = 0.25", code).out)
        assert inside < 0.8
        if outside > 1.0 and inside > 0.2:
            return
    raise AssertionError(f"this machine is too busy to tell: {outside} {inside}")


def test_cpu_time(limited: Bench) -> None:
    """CPU time is the group's: a chain of children does not reset it."""
    code = (
        "import os, time\n"
        "while True:\n"
        "    if os.fork() == 0:\n"
        "        end = time.process_time() + 0.3\n"
        "        while time.process_time() < end: pass\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    done = limited.inside('[limits]\ncpu_time = "1s"\nwall_time = "30s"', code)
    assert done.code == 124
    assert "limits.cpu_time allows 1 s" in done.err
    assert limited.beyond_start(done) < 15


def test_wall_time(bench: Bench) -> None:
    """A sleeper that ignores every signal ends all the same."""
    code = (
        "import signal, time\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "time.sleep(60)"
    )
    done = bench.inside('[limits]\nwall_time = "1s"', code)
    assert done.code == 124
    assert "limits.wall_time allows 1 s" in done.err
    assert bench.beyond_start(done) < 10


def test_stopped_processes(bench: Bench) -> None:
    """A stopped process can't outwait the limit."""
    code = "import os, signal, time\nos.fork()\nos.kill(0, signal.SIGSTOP)\n"
    done = bench.inside('[limits]\nwall_time = "1s"', code)
    assert done.code == 124
    assert bench.beyond_start(done) < 10


# --- what is left -----------------------------------------------------------

_DAEMON = (
    "import os, time\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        for fd in (0, 1, 2): os.close(fd)\n"
    "        time.sleep(60)\n"
    "    os._exit(0)\n"
    "os.wait()\n"
)


def test_daemon(bench: Bench) -> None:
    """A daemon outlives its starter outside, and nothing outlives a jail."""
    bench.outside(_DAEMON)
    assert bench.left()
    for pid in bench.left():
        os.kill(pid, signal.SIGKILL)
    bench.gone()
    assert bench.inside("", _DAEMON).code == 0


def _groups_of(pid: int) -> set[str]:
    found = set()
    for base, names, _ in os.walk("/sys/fs/cgroup"):
        found |= {f"{base}/{name}" for name in names if f"-{pid}-" in name}
    return found


_WAIT = "import time, os\nos.fork()\nprint('up', flush=True)\ntime.sleep(60)\n"


def _started(bench: Bench) -> subprocess.Popen[bytes]:
    process = bench.start("", _WAIT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n", process.communicate()
    assert process.stdout.readline() == b"up\n"
    return process


def _all_gone(bench: Bench, process: subprocess.Popen[bytes]) -> None:
    process.communicate(timeout=30)
    bench.gone()
    until = time.monotonic() + 40
    while _groups_of(process.pid):
        assert time.monotonic() < until, _groups_of(process.pid)
        time.sleep(0.05)


def test_starter_killed(bench: Bench) -> None:
    """SIGKILL of whoever started the jail leaves no process and no group."""
    process = _started(bench)
    if bench.actor.limited:
        assert _groups_of(process.pid)
    process.kill()
    _all_gone(bench, process)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def test_monitor_killed(bench: Bench) -> None:
    """SIGKILL of the launcher takes the inside along."""
    process = _started(bench)
    (monitor,) = _children(process.pid)
    assert b"raysandbox-launch" in Path(f"/proc/{monitor}/cmdline").read_bytes()
    os.kill(monitor, signal.SIGKILL)
    _all_gone(bench, process)


def test_init_killed(bench: Bench) -> None:
    """SIGKILL of the jail's pid 1 ends the run with a status that says so."""
    process = _started(bench)
    (monitor,) = _children(process.pid)
    for pid in _children(monitor):
        os.kill(pid, signal.SIGKILL)
    _all_gone(bench, process)
    assert process.returncode != 0


def test_interrupted(bench: Bench) -> None:
    """Ctrl-C ends the jail and what it started."""
    process = _started(bench)
    process.send_signal(signal.SIGINT)
    _all_gone(bench, process)
    assert process.returncode != 0


# --- what the profile can't have --------------------------------------------


def test_refused_without_a_delegated_group(bench: Bench) -> None:
    """A user without a group gets no jail that pretends to be limited."""
    actor = bench.actor
    if actor.uid == 0:
        pytest.skip("root can make groups")
    kept, actor.cgroup_dirs = actor.cgroup_dirs, []
    try:
        path = f"{actor.profile_dir}/demanding.toml"
        Path(path).write_text('extends = "strict"\n')
        done = _finish(
            actor.jail(
                bench._command("print('ran')"),
                profile="demanding",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ),
            30,
        )
    finally:
        actor.cgroup_dirs = kept
    if "ran" in done.out:
        pytest.skip("this user's own group is delegated")
    assert done.code == 125
    assert "demanding" in done.err
    assert "Delegate" in done.err or "RAYSANDBOX_CGROUP" in done.err, done.err


def test_descriptors_of_the_starter(bench: Bench) -> None:
    """What the starter has open under any number stays outside."""
    code = "import os\nprint(sorted(int(n) for n in os.listdir('/proc/self/fd')))\n"
    secret = os.open(bench.actor.world.context["secret"], os.O_RDONLY)
    try:
        for number in (3, 5, 9, 200, 1000):
            if number != secret:
                with contextlib.suppress(OSError):
                    os.fstat(number)
                    continue
                os.dup2(secret, number)
        os.set_inheritable(secret, True)
        name = f"own-{uuid.uuid4().hex[:8]}"
        bench.actor.write_profile(name, "")
        process = bench.actor.jail(
            bench._command(code),
            profile=name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(secret, 200, 1000),
        )
        done = _finish(process, 30)
        control = _finish(
            bench.actor.start(
                bench._command(code),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(secret, 200, 1000),
            ),
            30,
        )
    finally:
        for number in (secret, 200, 1000):
            os.close(number)
    assert {200, 1000} <= set(json.loads(control.out))
    # The fourth is the listing's own.
    assert json.loads(done.out) == [0, 1, 2, 3], done
