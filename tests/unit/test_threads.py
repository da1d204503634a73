"""Walls for every thread of a process that has threads: none is left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest

from raysandbox.kernel import landlock
from tests.require import require

# Threads that wait in different calls, one that computes, and one that keeps
# starting others: all try the same after the walls are up.
PROGRAM = """
    import ctypes, errno, json, os, resource, select, signal, sys, tempfile
    import threading, time
    from raysandbox.kernel import landlock, threads
    from raysandbox.profile import load
    from raysandbox.kernel import seccomp

    mode = sys.argv[1]
    directory = tempfile.mkdtemp()
    canary, secret = f"{directory}/canary", f"{directory}/secret"
    for path in (canary, secret):
        open(path, "w").close()
    life = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.closerange(0, 3)
        os.close(life[1])
        os.read(life[0], 1)  # until we end
        os._exit(0)
    go, answers, lock = threading.Event(), [], threading.Lock()
    libc = ctypes.CDLL(None, use_errno=True)

    def code(call, *args):
        try:
            call(*args)
        except OSError as error:
            return error.errno
        return 0

    def attempt(name):
        unshared = libc.unshare(0x10000000)
        answer = [name, code(open, secret), code(os.kill, victim, 0),
                  ctypes.get_errno() if unshared else 0]
        with lock:
            answers.append(answer)

    def waiting(name, wait):
        def run():
            while not go.is_set():
                wait()
            attempt(name)
        return run

    read_end, write_end = os.pipe()
    poll = select.epoll()
    poll.register(read_end)
    started, stop = [], threading.Event()

    def spawn():
        def short():
            while not go.is_set():
                time.sleep(0.002)
            attempt("born")
        while not stop.is_set():
            # One ends, the next begins: numbers come and go.
            threading.Thread(target=lambda: None).start()
            if len(started) < 40:
                thread = threading.Thread(target=short)
                started.append(thread)
                thread.start()
            time.sleep(0.0005)
        while not go.is_set():
            time.sleep(0.002)
        attempt("spawner")

    def blocked():
        signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))
        go.wait(20)

    plain = [
        threading.Thread(target=waiting(name, wait))
        for name, wait in (
            ("futex", lambda: go.wait(0.5)),
            ("sleep", lambda: time.sleep(0.05)),
            ("epoll", lambda: poll.poll(0.05)),
            ("select", lambda: select.select([read_end], [], [], 0.05)),
            ("compute", lambda: sum(range(1000))),
        )
    ]
    for thread in plain:
        thread.start()
    busy = threading.Thread(target=spawn)
    busy.start()
    if mode == "blocked":
        threading.Thread(target=blocked, daemon=True).start()
    time.sleep(0.1)
    assert code(open, secret) == 0 and code(os.kill, victim, 0) == 0
    program = b""
    if mode != "unfiltered":
        program = seccomp.compile_policy(load("trusted").syscalls, notify=False).bpf
    paths = {p: landlock.READ for p in (sys.prefix, sys.base_prefix, "/proc", "/usr")}
    if mode == "useless":
        paths[directory] = landlock.READ
    ruleset = landlock.create_ruleset(paths, landlock.handled(landlock.abi_version()))
    failed = ""
    if mode != "open":
        try:
            count = threads.restrict_threads(
                ruleset, "/nowhere" if mode == "absent" else canary, program,
                timeout_s=2 if mode == "blocked" else 20)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    stop.set()
    time.sleep(0.05)
    go.set()
    if not failed:
        for thread in [*plain, busy, *started]:
            thread.join(20)
        attempt("main")
    print(json.dumps({"failed": failed, "answers": answers}), flush=True)
    os._exit(0)
"""


def run(mode):
    """What the program of the given mode found."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), mode],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _names(found):
    return {answer[0] for answer in found["answers"]}


EVERY = {"futex", "sleep", "epoll", "select", "compute", "spawner", "born", "main"}


def test_threads_without_walls_can_do_it_all():
    """Positive control: the same attempts succeed where nothing was restricted."""
    found = run("open")
    assert _names(found) == EVERY
    assert all(answer[1:3] == [0, 0] for answer in found["answers"])


def test_every_thread_is_behind_the_walls():
    """Threads that wait, compute, are born and end meanwhile: none gets through.

    Guards against lists of threads that are old when they are used, and against
    numbers that another thread had before.
    """
    require("landlock:6")
    for _ in range(3):
        found = run("all")
        assert found["failed"] == ""
        assert _names(found) == EVERY
        denied = [13, 1, 1]
        wrong = [answer for answer in found["answers"] if answer[1:] != denied]
        assert not wrong


def test_thread_that_blocks_signals_fails_it():
    """A thread that can't be reached is an error that says why, never left out."""
    require("landlock:1")
    failed = run("blocked")["failed"]
    assert "SetupError" in failed
    why = r"thread \d+, python\S*, does not answer signal \d+ \(state S, and blocks"
    assert re.search(why, failed), failed


@pytest.mark.parametrize(
    ("mode", "message"),
    [("useless", "canary in thread"), ("absent", "can't be opened before")],
)
def test_rules_that_deny_nothing_fail_it(mode, message):
    """The canary: rules that do not hold are noticed, whatever the kernel said."""
    require("landlock:1")
    failed = run(mode)["failed"]
    assert "SetupError" in failed
    assert message in failed


def test_filter_is_not_needed_for_the_rest():
    """Without a filter the other walls stand."""
    require("landlock:6")
    found = run("unfiltered")
    assert found["failed"] == ""
    assert all(answer[1:3] == [13, 1] for answer in found["answers"])


def test_ruleset_is_whole_or_an_error(tmp_path):
    """A path that is not there is an error with nothing left open."""
    require("landlock:1")
    with pytest.raises(FileNotFoundError):
        landlock.create_ruleset({str(tmp_path / "no"): 1}, landlock.handled(1))
