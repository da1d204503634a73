"""``boundary = "worker"``: walls around this worker, then the task in it.

Nothing of a user's has been opened in this process when :func:`enter` is
called, and nothing may be before it returns: only then are all walls up, on
every thread. A worker goes through it once, for one profile.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from raysandbox import launch, plan, walls
from raysandbox.errors import ProfileError, SetupError
from raysandbox.kernel import cgroup, landlock
from raysandbox.kernel.threads import restrict_threads
from raysandbox.node.wall import TLS_FILES
from raysandbox.probe import probe
from raysandbox.profile import Profile
from raysandbox.run import cgroup_limits
from raysandbox.worker import janitor
from raysandbox.worker.events import FILE_NAME, OLD_NAME

__all__ = ["Entered", "NotRestrictedError", "Worker", "enter"]

_THREADS_S = 10.0
# What Ray itself reads or sets; its secrets are in memory already.
_RAY_VARIABLES = (
    "RAY_*", "__RAY_*", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "PYTHONUNBUFFERED", "PYTHONBREAKPOINT", "SPT_NOENV",
)  # fmt: skip
_SECRET_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_REDIS_PASSWORD", "RAY_REDIS_USERNAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What :func:`enter` must know of this Ray worker.

    Attributes:
        launched: The node's launcher started it.
        python_path: Its module search path; nothing of a user's.
        system: What ``@system`` stands for; see `plan.Context`.
        working_dirs: Directories of the runtime environment.
        variables: The runtime environment's own variables.
        ports: TCP ports that Ray may connect to from here.
        loose_ports: Why these are more than Ray's own, or ``""``.
        ray_log_dir: Ray's log directory.
        event_dir: Where events go.
        event: What events say about this worker.
        driver_ports: TCP ports for drivers that the task starts; None if it may
            start none.
        log: Its own output.
    """

    launched: bool
    python_path: Sequence[str]
    system: Sequence[str]
    working_dirs: Sequence[str]
    variables: Mapping[str, str]
    ports: frozenset[int]
    loose_ports: str
    ray_log_dir: str
    event_dir: str
    event: Mapping[str, object]
    driver_ports: frozenset[int] | None = None
    log: str = ""


@dataclass(frozen=True, slots=True)
class Entered:
    """What holds from now on.

    Attributes:
        scratch: The worker's own directory.
        threads: How many there were.
        protections: What was enforced.
        took_s: Seconds that it took.
        group: Name of the control group that this process is in now.
    """

    scratch: str
    threads: int
    protections: tuple[plan.Protection, ...]
    took_s: float
    group: str


class NotRestrictedError(SetupError):
    """The walls are up in part: this process must serve nobody and end."""


def enter(profile: Profile, worker: Worker) -> Entered:
    """Restrict this process to ``profile``; there is no way back.

    Raises:
        UnsupportedError: The host lacks what the profile requires.
        ProfileError: The profile names what is not there.
        SetupError: A step failed. In these three cases nothing was restricted.
        NotRestrictedError: A step failed midway.
    """
    begun = time.monotonic()
    groups, limits = cgroup.discover(), cgroup_limits(profile)
    if profile.limits.required:
        groups.require(limits, profile=profile.name)
    for module in profile.preload:
        _import_if_there(module)
    own = tempfile.mkdtemp(prefix="raysandbox-worker-", dir="/tmp")
    group = None
    try:
        scratch, canary = _furnish(own)
        ready = walls.plan_walls(
            profile,
            probe(),
            walls.Surroundings(
                python=worker.python_path,
                system=worker.system,
                working_dirs=worker.working_dirs,
                scratch=scratch,
                own_proc=f"/proc/{os.getpid()}",
                ports=worker.ports,
                loose_ports=worker.loose_ports,
                launched=worker.launched,
                own_user=worker.launched and _has_own_user(),
                driver_ports=worker.driver_ports,
                log=worker.log,
            ),
        )
        _check_canary(profile, canary, ready.paths)
        groups.sweep()
        group = groups.create("worker", limits, required=profile.limits.required)
        paths = {**ready.paths, **_tls_files(launched=worker.launched)}
        ruleset = landlock.create_ruleset(
            paths, ready.governed, ready.ports, ready.bind_ports
        )
        janitor.start(
            directory=own,
            group=groups.describe(group),
            log_dir=worker.event_dir,
            event={**worker.event, "profile": profile.name},
            python_path=worker.python_path,
        )
    except BaseException as error:
        shutil.rmtree(own, ignore_errors=True)
        if group is not None:
            group.remove()
        if isinstance(error, OSError):
            detail = f"{error.filename or ''}"
            raise SetupError(
                step="worker_walls", errno=error.errno or 0, detail=detail
            ) from error
        raise
    try:
        threads = _restrict(profile, worker, ready, group, ruleset, canary, scratch)
    except Exception as error:
        step = error.step if isinstance(error, SetupError) else "worker_walls"
        raise NotRestrictedError(step=step, detail=str(error)) from error
    protections = (*ready.protections, *_of_group(group))
    took_s = time.monotonic() - begun
    return Entered(scratch, threads, protections, took_s, group.leaf)


def _tls_files(*, launched: bool) -> dict[str, int]:
    """Return what Ray must read whenever it connects to another process.

    Its contents are in this process's memory all the same. By their names in the
    launcher's view alone: where a client chose a worker's variables, these could
    name any file.
    """
    if not launched:
        return {}
    return dict.fromkeys(filter(os.path.exists, TLS_FILES), landlock.READ_FILE)


def _has_own_user() -> bool:
    """Whether the launcher gave this worker an id out of the range for that."""
    with open("/proc/self/uid_map") as file:
        lines = [[int(word) for word in line.split()] for line in file]
    return len(lines) == 1 and lines[0][2] == 1 and launch.is_worker_id(lines[0][1])


def _furnish(own: str) -> tuple[str, str]:
    """Make the scratch, and the file by which each thread proves its walls."""
    scratch, canary = os.path.join(own, "scratch"), os.path.join(own, "canary")
    os.mkdir(scratch, 0o700)
    os.close(os.open(canary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return scratch, canary


def _check_canary(profile: Profile, canary: str, rules: Iterable[str]) -> None:
    for path in rules:
        if _is_below(os.path.realpath(canary), path):
            raise ProfileError(
                source=profile.name,
                where="filesystem",
                value=path,
                reason='shows other workers\' files too: boundary = "worker" must '
                "not have it, give a directory below it",
            )


def _import_if_there(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        return


def _make_canary() -> str:
    """Make the file by which each thread proves that the rules hold for it."""
    fd, path = tempfile.mkstemp(prefix="raysandbox-canary-", dir="/tmp")
    os.close(fd)
    return path


def _restrict(
    profile: Profile,
    worker: Worker,
    ready: walls.Walls,
    group: cgroup.Cgroup,
    ruleset: int,
    canary: str,
    scratch: str,
) -> int:
    # Keeps the kernel from making a new inode for it, which no rule would know.
    os.open(f"/proc/{os.getpid()}", os.O_PATH | os.O_CLOEXEC)
    group.move(os.getpid())
    for which, value in ready.rlimits.items():
        resource.setrlimit(which, (value, value))
    _set_environment(profile, worker, scratch)
    if not any(_is_below(os.getcwd(), each) for each in worker.working_dirs):
        os.chdir(scratch)
    _drop_foreign_logs(worker)
    threads = restrict_threads(ruleset, canary, ready.program, timeout_s=_THREADS_S)
    os.close(ruleset)
    _check_threads(filtered=bool(ready.program))
    return threads


def _drop_foreign_logs(worker: Worker) -> None:
    """Point descriptors of raylet's logs, which it leaks to workers, nowhere.

    Landlock looks when a file is opened, and these are open.
    """
    own = (str(worker.event["worker"]), f"_{os.getpid()}.", f"-{os.getpid()}.")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        file = os.path.basename(target)
        if not _is_below(target, worker.ray_log_dir) or file in (
            FILE_NAME,
            OLD_NAME,
        ):
            continue
        if not any(mark in file for mark in own):
            os.dup2(null, int(name), inheritable=False)
    os.close(null)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _check_threads(*, filtered: bool) -> None:
    """Look at what the kernel says of each thread; a second opinion."""
    wanted = {"NoNewPrivs": "1", "CapEff": "0" * 16, "CapPrm": "0" * 16}
    if filtered:
        wanted["Seccomp"] = "2"
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/status") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        found = dict(
            line.split(":\t", 1) for line in text.splitlines() if ":\t" in line
        )
        for key, value in wanted.items():
            if found.get(key) != value:
                detail = f"thread {tid}: {key} is {found.get(key)}, not {value}"
                raise SetupError(step="check_threads", detail=detail)


def _of_group(group: cgroup.Cgroup) -> list[plan.Protection]:
    states = {
        "ENFORCED": plan.State.ENFORCED,
        "DEGRADED": plan.State.DEGRADED,
        "OFF": plan.State.OFF,
    }
    return [
        plan.Protection(f"limits.{name}", states[status.state], status.reason)
        for name, status in group.report.items()
    ]


# --- environment --------------------------------------------------------------


def _set_environment(profile: Profile, worker: Worker, scratch: str) -> None:
    """Leave what the profile passes, what the user sent, and what Ray needs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SECRET_VARIABLES
        and any(
            fnmatchcase(name, pattern)
            for pattern in (*profile.environment.pass_, *_RAY_VARIABLES)
        )
    }
    kept |= {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": kept.get("LANG", "C.UTF-8"),
    }
    kept |= {**profile.environment.set, **worker.variables}
    kept |= {"HOME": scratch, "TMPDIR": scratch, "USER": "task"}
    gone = [name for name in os.environ if name not in kept]
    _erase(gone)
    for name in gone:
        del os.environ[name]
    os.environ.update(kept)
    tempfile.tempdir = None


def _erase(names: Iterable[str]) -> None:
    """Overwrite variables where exec put them: /proc/self/environ shows that.

    The process could look through its memory all the same; this is about what
    lies open.
    """
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    for name in names:
        address = libc.getenv(ctypes.c_char_p(os.fsencode(name)))
        if address:
            ctypes.memset(address, 0, len(ctypes.string_at(address)))
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start, env_end of proc(5)
    unwanted = {os.fsencode(name) for name in names}
    position = start
    while position < end:
        entry = ctypes.string_at(position)
        if entry.partition(b"=")[0] in unwanted:
            ctypes.memset(position, 0, len(entry))
        position += len(entry) + 1
