"""A driver with a Ray of its own that meets whatever can be missing or broken.

Prints one JSON line for each case: what a task gave, or what its owner caught.
Run as root in a mount namespace of its own, or as an ordinary user; the tests
that look at the lines are in test_bad_input.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

import raysandbox
from raysandbox import launch

HERE = Path(sys.argv[1])
TEMPORARY = HERE / "ray"
PIDS = Path("/sys/fs/cgroup/pids")


def attempt(case: str, act: Callable[[], Any]) -> None:
    """Report what a case gave."""
    begun = time.monotonic()
    line: dict[str, Any] = {"case": case}
    try:
        line["value"] = act()
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        line["error"], line["message"] = type(cause).__name__, str(cause)
        line["ray"] = isinstance(error, ray.exceptions.RayTaskError)
    line["seconds"] = round(time.monotonic() - begun, 1)
    print(json.dumps(line), flush=True)


def where() -> str:
    """Return the worker that a task's jail belongs to."""
    return str(ray.get_runtime_context().get_worker_id())


def run(profile: str, function: Callable[..., Any] = where, *args: Any) -> Any:
    """Run a task under a profile."""
    resources = {f"sandbox:{profile}": 0.001}
    task = ray.remote(resources=resources, max_retries=0)(function)
    return ray.get(task.remote(*args), timeout=60)


def until_it_runs(profile: str) -> str:
    """Return how a task fares after something was killed under it."""
    met = []
    for _ in range(5):
        try:
            run(profile)
        except Exception as error:
            met.append(type(getattr(error, "cause", None) or error).__name__)
        else:
            break
    return f"{' '.join(met)} then ran" if len(met) < 5 else " ".join(met)


# --- as root -------------------------------------------------------------------


@contextlib.contextmanager
def no_launcher() -> Iterator[None]:
    """Take the launcher out of the installed package for a while."""
    path = Path(launch.launcher_path())
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(path)


@contextlib.contextmanager
def no_ids() -> Iterator[None]:
    """Take every host id of this cluster's range."""
    first, count = map(int, os.environ["RAYSANDBOX_UID_RANGE"].split(":"))
    held = []
    for start in range(first, first + count, 4):
        fd = os.open(f"/run/raysandbox/ids/{start}", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(fd)
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


def workers() -> list[psutil.Process]:
    """Return the Ray workers of this cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::"):
                found.append(process)
    return found


@contextlib.contextmanager
def no_pids() -> Iterator[None]:
    """Put the workers into a group that has no process left to give."""
    group = PIDS / f"rsx-bad-{os.getpid()}"
    group.mkdir()
    moved = workers()
    homes = {}
    try:
        for worker in moved:
            lines = Path(f"/proc/{worker.pid}/cgroup").read_text().splitlines()
            (home,) = (line.split(":")[2] for line in lines if ":pids:" in line)
            homes[worker.pid] = home
            (group / "cgroup.procs").write_text(str(worker.pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (group / "pids.max").write_text("max")
        for pid, home in homes.items():
            with contextlib.suppress(OSError):
                (PIDS / home.lstrip("/") / "cgroup.procs").write_text(str(pid))
        group.rmdir()


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    """Fill the file system that Ray's session and our log are on."""
    filler = TEMPORARY / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    try:
        yield
    finally:
        filler.unlink()


def processes(kind: str) -> list[int]:
    """Return this cluster's monitors, zygotes or jails.

    The command line of each has the path of this driver's own package in it, and
    a jail is the child of a zygote.
    """
    ours, monitors = {}, []
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        words = process.info["cmdline"] or []
        if str(HERE / "tree") not in words:
            continue
        if words[0].endswith("raysandbox-launch"):
            monitors.append(process.pid)
        elif "raysandbox.jail.zygote" in " ".join(words):
            ours[process.pid] = process.info["ppid"]
    if kind == "monitor":
        return monitors
    return [pid for pid, parent in ours.items() if (parent in ours) == (kind == "jail")]


def killed(kind: str, profile: str) -> str:
    """Kill what waits for the next task, and run it."""
    # A settled jail is on its way out; the one that waits stays.
    time.sleep(0.5)
    victims = processes(kind)
    if not victims:
        return "nothing to kill"
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return until_it_runs(profile)


def shout() -> str:
    """Print more than a full disk takes."""
    for _ in range(200):
        print("x" * 1000)
    return where()


def logged() -> list[int]:
    """Return how many lines of the log of events are whole, and how many are cut."""
    log = next(TEMPORARY.glob("session_2*/logs/raysandbox_events.jsonl"))
    whole = cut = 0
    for line in log.read_text().splitlines():
        try:
            whole += isinstance(json.loads(line), dict)
        except ValueError:
            cut += 1
    return [whole, cut]


def root() -> None:
    """Everything that only root can arrange."""
    TEMPORARY.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", TEMPORARY], check=True
    )
    tags = {"sandbox:ghost": 1, "sandbox:Not A Name": 1}
    start(resources=tags)
    attempt("unknown tag", lambda: run("ghost"))
    attempt("impossible tag", lambda: run("Not A Name"))
    attempt("two tags", two_tags)
    attempt("missing path", lambda: run("nowhere"))
    attempt("missing wall", lambda: run("future"))
    # A profile that the driver does not know has had workers of its own.
    seen = {run("strict") for _ in range(4)}
    print(json.dumps({"case": "workers", "value": sorted(seen)}), flush=True)
    for case, arrange, profile in (
        # First: a third zygote makes room by ending one, which frees its ids.
        ("ids", no_ids, "two"),
        ("launcher", no_launcher, "one"),
        ("pids", no_pids, "three"),
    ):
        with arrange():
            attempt(f"no {case}", lambda profile=profile: run(profile))
        attempt(f"{case} again", lambda profile=profile: run(profile))
    before = logged()[0]
    with no_space():
        attempt("no space", lambda: run("four", shout))
        attempt("no space, next", lambda: run("four"))
        attempt("no space, event", lambda: run("strict"))
    attempt("space again", lambda: run("strict"))
    run("strict")  # by now the end of the one before is in the log
    attempt("events", lambda: [before, *logged()])
    for case, kind, profile in (
        ("jail before", "jail", "strict"),
        ("jail after", "jail", "fast"),
        ("zygote", "zygote", "strict"),
        ("monitor", "monitor", "strict"),
    ):
        run(profile)
        attempt(f"{case} killed", lambda k=kind, p=profile: killed(k, p))
    attempt("last", lambda: sorted({run("strict") for _ in range(4)}))


def two_tags() -> Any:
    """Ask for two profiles at once."""
    resources = {"sandbox:strict": 0.001, "sandbox:standard": 0.001}
    task = ray.remote(resources=resources, max_retries=0)(where)
    return ray.get(task.remote(), timeout=60)


# --- as an ordinary user -------------------------------------------------------


def length(blob: bytes) -> int:
    """Look at an argument."""
    return len(blob)


def who() -> int:
    """Return the user that a task believes to be."""
    return os.getuid()


def user() -> None:
    """A worker without groups: nothing is delegated."""
    start()
    attempt("required limits", lambda: run("strict"))
    attempt("lax", lambda: run("lax", length, bytes(1 << 20)))
    attempt("lax error", lambda: run("lax", lambda: {}["missing"]))
    attempt("lax denied", lambda: run("lax", lambda: open("/etc/shadow").read()))
    attempt("missing wall", lambda: run("future"))
    attempt("lax again", lambda: run("lax", who))
    # The event of a jail's end is written a moment later.
    log = next(TEMPORARY.glob("session_2*/logs")) / "raysandbox_events.jsonl"
    until = time.monotonic() + 40
    while time.monotonic() < until and not log.exists():
        time.sleep(0.1)
    attempt("walls", lambda: json.loads(log.read_text().splitlines()[0])["protections"])


def start(**options: Any) -> None:
    """Start a small Ray of one's own; the hook alone decides here."""
    raysandbox.init(
        wall=False,
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
        _temp_dir=str(TEMPORARY),
        **options,
    )


if __name__ == "__main__":
    root() if os.geteuid() == 0 else user()
    ray.shutdown()
