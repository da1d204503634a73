"""The demo's attacks, each with what must happen on stock Ray and in the sandbox.

An attack is won, or it ends with an exception: raised in the hostile code by the
kernel, or by ``ray.get`` when the sandbox ended the task. Which exception says
which wall it was; one that is not in the table is a finding, not a success.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysandbox.demo import hostile

__all__ = ["ATTACKS", "Attack", "Lost", "Stage"]


class Lost(Exception):  # noqa: N818 - an outcome
    """The attack was stopped: the type of what stopped it, and its message."""

    def __init__(self, how: str, message: str) -> None:
        super().__init__(f"{how}: {message}")
        self.how = how


_VICTIM = """
import sys
import numpy, ray
ray.init(address=sys.argv[1], namespace="victim", logging_level="ERROR",
         log_to_driver=False)
@ray.remote(num_cpus=0)
class Service:
    def ping(self):
        return "pong"
service = Service.options(name="service").remote()
ray.get(service.ping.remote())
secret = (sys.argv[2] + sys.argv[3]).encode()
ref = ray.put(numpy.frombuffer(secret * 20000, dtype="uint8"))
print("ready", flush=True)
sys.stdin.readline()
"""
_MARKER = "raysandbox-demo-object:"


class Victim:
    """Another job in the cluster, which keeps an object and an actor.

    Attributes:
        secret: What the object says behind its marker.
    """

    def __init__(self, gcs_address: str) -> None:
        self.secret = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, gcs_address, _MARKER, self.secret],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            _, errors = self._process.communicate()
            raise RuntimeError(errors.decode(errors="replace")[-1000:])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@dataclass(slots=True)
class Stage:
    """What an attack may use: a connected Ray, and the victims.

    Attributes:
        remote: Makes a remote function, with the side's tag.
        sandboxed: Which side it is.
        directory: Temporary, of this run.
        token_path: The cluster's token.
    """

    remote: Callable[[Callable[..., Any]], Any]
    sandboxed: bool
    directory: Path
    token_path: Path
    gcs_address: str
    raylet_pid: int
    raylet_socket: str
    _victim: Victim | None = None

    def victim(self) -> Victim:
        """Return the job that is attacked; it is started for the first attack."""
        if self._victim is None:
            self._victim = Victim(self.gcs_address)
        return self._victim

    def close(self) -> None:
        """End what was started for attacks."""
        if self._victim is not None:
            self._victim.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Send hostile code, and return what it won.

        Raises:
            Lost: It was stopped.
        """
        task = self.remote(hostile.attempt)
        return _won(_get(task.remote(function, *arguments)))


def _get(ref: Any) -> Any:
    """Return a task's result, or raise `Lost` with what ended it."""
    import ray

    try:
        return ray.get(ref, timeout=60)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        raise Lost(_name(error), str(error)) from None


def _won(reply: tuple[str, str]) -> str:
    """Return what `hostile.attempt` won, or raise `Lost`."""
    how, text = reply
    if how:
        raise Lost(how, text)
    return text


def _name(error: BaseException) -> str:
    """Return the name of ours among the types of an error, else its own."""
    for kind in type(error).__mro__:
        if kind.__module__ == "raysandbox.errors":
            return kind.__name__
    return type(error).__name__


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: For ``--only`` and ``--json``.
        title: For people.
        run: Returns what was won, or raises `Lost`.
        walls: What stops it, by the type of exception that it ends with.
        fatal: It kills the node where it succeeds: it comes last.
    """

    name: str
    title: str
    run: Callable[[Stage], str]
    walls: Mapping[str, str]
    fatal: bool = False


def _read_token(stage: Stage) -> str:
    return stage.run(hostile.read_file, str(stage.token_path))


def _read_neighbour(stage: Stage) -> str:
    import ray

    path = f"/tmp/raysandbox-demo-{secrets.token_hex(4)}"
    ray.get(stage.remote(hostile.write_file).remote(path, "a task's own data"))
    try:
        return stage.run(hostile.read_file, path)
    finally:
        Path(path).unlink(missing_ok=True)


def _poison(stage: Stage) -> str:
    import ray

    for _ in range(8):
        stage.run(hostile.poison)
        root = ray.get(stage.remote(hostile.square_root).remote(16.0))
        if root != 4.0:
            return f"the next task computes sqrt(16) = {root:g}"
    raise Lost("Untouched", "the next tasks compute sqrt(16) = 4")


def _gcs(stage: Stage) -> str:
    host, _, port = stage.gcs_address.rpartition(":")
    return stage.run(hostile.connect_tcp, host, int(port))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _raylet_dies(stage: Stage, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while _alive(stage.raylet_pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _kill_raylet(stage: Stage) -> str:
    import ray

    ref = stage.remote(hostile.attempt).remote(hostile.kill, stage.raylet_pid)
    done, _ = ray.wait([ref], timeout=5)
    if _raylet_dies(stage, 1):
        return "raylet is dead, and the node with it"
    how, text = ray.get(ref) if done else ("NoAnswer", "")
    raise Lost(how, text)


def _junk(stage: Stage) -> str:
    for tries_left in (2, 1, 0):
        ref = stage.remote(hostile.attempt).remote(hostile.junk_on_descriptors)
        if _raylet_dies(stage, 5):
            break
        try:
            raise Lost("Survived", _won(_get(ref)))
        except Lost as lost:
            # On stock Ray its own junk may end it before it comes to raylet's socket.
            again = lost.how == "WorkerCrashedError" and not stage.sandboxed
            if not again or not tries_left:
                raise
    return "raylet aborted, and the node with it"


def _steal(stage: Stage) -> str:
    secret = stage.victim().secret
    if stage.run(hostile.steal_object, _MARKER.encode()) != secret:
        raise Lost("LookupError", "another object was found")
    return "the other job's object is read"


def _kill_actor(stage: Stage) -> str:
    stage.victim()
    return stage.run(hostile.kill_actor, "service", "victim")


def _argument(stage: Stage) -> str:
    """The payload runs where the argument is opened: does it see the token?"""
    path = str(stage.token_path)
    payload = hostile.Payload(hostile.attempt, hostile.read_file, path)
    text = _won(_get(stage.remote(hostile.answer).remote(payload)))
    return f"runs in the worker, which holds the token: {text[:8]}..."


def _result(stage: Stage) -> str:
    """The payload runs where the result is opened: in the driver?"""
    path = stage.directory / "written-by-a-result"
    payload = hostile.Payload(hostile.write_file, str(path), "gotcha")
    try:
        _get(stage.remote(_Returns(payload)).remote())
    except Lost:
        if not path.exists():
            raise
    if path.exists():
        return "runs in the driver as soon as it reads the result"
    raise Lost("Survived", "the payload ran nowhere outside")


def _Returns(payload: Any) -> Callable[[], Any]:  # noqa: N802 - reads as a task
    # Inside, so that the payload is opened only when the result is.
    call = payload.call

    def returns_a_payload() -> Any:
        return hostile.Payload(call[0], *call[1])

    return returns_a_payload


def _for_ever(stage: Stage) -> str:
    import ray

    ref = stage.remote(hostile.spin).remote()
    done, _ = ray.wait([ref], timeout=8)
    if not done:
        ray.cancel(ref, force=True)
        return "still running after 8 s"
    return f"ended by itself: {_get(ref)}"


MOUNTS, PIDS = "mount namespace", "pid namespace"

ATTACKS: tuple[Attack, ...] = (
    Attack(
        "read-token",
        "read the cluster token",
        _read_token,
        {"FileNotFoundError": MOUNTS},
    ),
    Attack(
        "read-neighbour",
        "read another task's file",
        _read_neighbour,
        {"FileNotFoundError": f"{MOUNTS}: own /tmp"},
    ),
    Attack(
        "poison",
        "poison the next task in the same worker",
        _poison,
        {"Untouched": "a fresh jail for each task"},
    ),
    Attack(
        "fork-bomb",
        "fork bomb (200 processes)",
        lambda stage: stage.run(hostile.fork_bomb, 200),
        {"BlockingIOError": "cgroup: limits.pids"},
    ),
    Attack(
        "memory-bomb",
        "memory bomb (512 MiB)",
        lambda stage: stage.run(hostile.memory_bomb, 512),
        {"TaskOutOfMemory": "cgroup: limits.memory"},
    ),
    Attack(
        "disk-fill",
        "fill the disk (48 MiB)",
        lambda stage: stage.run(hostile.fill_disk, 48),
        {"OSError": "scratch quota: filesystem.scratch"},
    ),
    Attack(
        "connect-gcs",
        "connect to the GCS",
        _gcs,
        {"PermissionError": "seccomp, network namespace behind it"},
    ),
    Attack(
        "connect-raylet",
        "connect to raylet's socket",
        lambda stage: stage.run(hostile.connect_unix, stage.raylet_socket),
        {"PermissionError": f"seccomp, {MOUNTS} behind it"},
    ),
    Attack(
        "kill-actor",
        "kill another job's actor",
        _kill_actor,
        {"RayApiUnavailableError": "no Ray connection in a jail"},
    ),
    Attack(
        "steal-object",
        "read another job's object",
        _steal,
        {"LookupError": "no shared memory in a jail"},
    ),
    Attack(
        "pickle-argument",
        "pickle payload in an argument",
        _argument,
        {"FileNotFoundError": "sealed data path: opened in the jail"},
    ),
    Attack(
        "pickle-result",
        "pickle payload in a result",
        _result,
        {"TaskUnsupported": 'sealed data path: results = "data"'},
    ),
    Attack(
        "run-for-ever", "run for ever", _for_ever, {"TaskTimedOut": "limits.wall_time"}
    ),
    Attack(
        "flood",
        "flood the output (16 MiB)",
        lambda stage: stage.run(hostile.flood, 16),
        {"TaskQuotaExceeded": "limits.output"},
    ),
    Attack(
        "kill-raylet",
        "kill raylet",
        _kill_raylet,
        {"ProcessLookupError": PIDS},
        fatal=True,
    ),
    Attack(
        "malformed-frame",
        "kill the node with a malformed frame",
        _junk,
        {
            "LookupError": "closed descriptors",
            "JailProtocolError": "closed descriptors, strict reply protocol",
        },
        fatal=True,
    ),
)
