"""The proxy in front of raylet's and the object store's sockets, from outside.

`start` runs ``raysandbox-store-proxy`` (see ``native/proxy``) for one session of
Ray. Workers must see the proxy's sockets in place of the real ones and have no way
to those: that is for the launcher, with `StoreProxy.mounts`. A proxy that ends
takes its workers' connections with it, and with these the workers.

A worker says with `bind` which job it belongs to, before any code of a user runs in
it; only the first word counts.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raysandbox.errors import SetupError, UnsupportedError

__all__ = [
    "BIND",
    "PROTOCOLS",
    "Limits",
    "StoreProxy",
    "bind",
    "program",
    "start",
    "stats_of",
    "supported",
    "unsupported",
    "used_by_job",
]

#: Where the launcher puts the proxy's bind socket for a worker.
BIND = "/run/raysandbox/store"

#: Ray's minor versions whose local protocols the proxy knows.
PROTOCOLS = ("2.60",)

_START_S = 10.0
_ANSWER_S = 5.0
_MOST_ANSWER = 1 << 20
# Magic, job, flags, limits of the job and of the worker (bytes and objects).
_BIND = struct.Struct("<8s4sI9Q")
_BIND_MAGIC, _USED_MAGIC = b"RSXBIND2", b"RSXUSED1"
_SERVES_ACTOR, _HOSTS_DRIVERS = 1, 2
_MOST_USED = 4096
_UNLIMITED = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be in the store at once; None is no limit.

    Attributes:
        job_bytes: Of one job's workers on this node together.
        job_objects: How many objects of these.
        worker_bytes: Of one worker, which runs one task at a time.
        worker_objects: How many objects of these.
        job_fetch_bytes: Got from the store and not released, by a job's workers
            together; who has more is ended. These hold by `bind` alone.
        job_fetch_objects: How many objects of these.
        fetch_bytes: The same, of one worker.
        fetch_objects: How many objects of these.
        fetch_each: Bytes of one of them.
    """

    job_bytes: int | None = None
    job_objects: int | None = None
    worker_bytes: int | None = None
    worker_objects: int | None = None
    job_fetch_bytes: int | None = None
    job_fetch_objects: int | None = None
    fetch_bytes: int | None = None
    fetch_objects: int | None = None
    fetch_each: int | None = None


class StoreProxy:
    """A running proxy.

    Attributes:
        directory: Where its sockets are.
        process: The proxy.
    """

    def __init__(
        self,
        directory: str,
        process: subprocess.Popen[bytes],
        real: Mapping[str, str],
    ) -> None:
        self.directory, self.process = directory, process
        self._real = dict(real)

    @property
    def plasma_store(self) -> str:
        """Socket that stands for the object store's."""
        return os.path.join(self.directory, "plasma_store")

    @property
    def raylet(self) -> str:
        """Socket that stands for raylet's."""
        return os.path.join(self.directory, "raylet")

    @property
    def bind_socket(self) -> str:
        """Socket for `bind`."""
        return os.path.join(self.directory, "bind")

    def mounts(self) -> dict[str, str]:
        """Return what a worker must see: real socket's path to proxied one's.

        Both sockets go over the real ones' own names, which is where Ray's
        command line says they are. `bind_socket` must be visible besides.
        """
        return {
            self._real["plasma_store"]: self.plasma_store,
            self._real["raylet"]: self.raylet,
        }

    def alive(self) -> bool:
        """Return whether it runs."""
        return self.process.poll() is None

    def stats(self) -> dict[str, Any]:
        """See `stats_of`."""
        return stats_of(self.directory)

    def stop(self) -> None:
        """End it, and with it all connections of workers. Idempotent."""
        self.process.terminate()
        try:
            self.process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def stats_of(directory: str) -> dict[str, Any]:
    """Return what jobs and workers hold, and what was refused.

    Args:
        directory: Of the proxy's sockets; the launcher's is
            ``raysandbox/sockets`` in Ray's session directory.

    Keys: ``ended`` (connections that broke a rule), ``unwritten`` (events
    left out of the log because there were too many), ``jobs`` and
    ``workers``, lists with ``bytes``, ``objects``, ``most_bytes``,
    ``most_objects`` (-1: no limit), ``refused``, and of a worker also
    ``pid``, ``kind``, ``job``, ``fetched_bytes``, ``fetched_objects``, and what
    its profile leaves its job, ``job_most_bytes`` and ``job_most_objects``.

    Raises:
        SetupError: It does not answer.
    """
    try:
        with _connected(directory, "control") as control:
            control.send(b"stats")
            answer = b""
            while part := control.recv(_MOST_ANSWER):
                answer += part
        found: dict[str, Any] = json.loads(answer)
    except (OSError, ValueError) as error:
        raise SetupError(
            step="store_proxy_stats",
            errno=getattr(error, "errno", None) or 0,
            detail=f"{directory}: {error}",
        ) from error
    return found


def program() -> str:
    """Return where the wheel put the proxy (it may not exist)."""
    package = os.path.dirname(os.path.dirname(__file__))
    return os.path.join(package, "_bin", "raysandbox-store-proxy")


def supported() -> bool:
    """Return whether the proxy knows the installed Ray's local protocols."""
    import ray

    return ".".join(ray.__version__.split(".")[:2]) in PROTOCOLS


def unsupported(profile: str = "") -> UnsupportedError:
    """Say that it does not, and for which profile that matters."""
    import ray

    return UnsupportedError(
        feature="a proxy in front of raylet's and the object store's sockets",
        need=f"Ray {', '.join(PROTOCOLS)}",
        have=f"Ray {ray.__version__}, whose local protocols it does not know",
        remedy="install a supported Ray, or offer no profile with "
        'boundary = "worker" in the policy',
        profile=profile,
    )


def start(
    *,
    plasma_store: str,
    raylet: str,
    directory: str,
    limits: Limits,
    spilled: str | None = None,
    events: str | None = None,
    bind_first_use: bool = False,
    profilers: bool = False,
    executable: str | None = None,
) -> StoreProxy:
    """Start the proxy; its sockets are there when this returns.

    Raylet need not run yet: it is connected to when the first worker comes.

    Args:
        plasma_store: Path of the object store's socket.
        raylet: Path of raylet's socket.
        directory: Where the proxy's own sockets go; made if it is not there.
        limits: For each job and worker; a worker's `bind` can only lower them.
        spilled: Directory that says which objects are in files (see `spilling`):
            these still count. None: what the store has in memory counts alone.
        events: File that refusals and ended connections are appended to, one
            JSON object a line; it is cut at 16 MiB; None: nowhere.
        bind_first_use: A worker that never called `bind` belongs to the job of
            the first object that it makes. Without it such a worker can store
            nothing. Only for workers that run no code of a user.
        profilers: What raylet starts may start one worker instead of being one.
        executable: Another build of the proxy.

    Raises:
        UnsupportedError: This Ray speaks another protocol.
        SetupError: It did not start.
    """
    if not supported():
        raise unsupported()
    os.makedirs(directory, 0o755, exist_ok=True)
    ready, ready_inside = os.pipe()
    log = os.open(
        events or os.devnull,
        os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
        0o640,
    )
    command = [
        executable or program(),
        f"--plasma={plasma_store}",
        f"--raylet={raylet}",
        f"--directory={directory}",
        f"--ready-fd={ready_inside}",
        *([f"--spilled={spilled}"] if spilled is not None else []),
        *(["--bind-first-use"] if bind_first_use else []),
        *(["--profilers"] if profilers else []),
    ]
    for name in ("job_bytes", "job_objects", "worker_bytes", "worker_objects"):
        value = getattr(limits, name)
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.PIPE,
            pass_fds=(ready_inside,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(ready)
        raise SetupError(
            step="store_proxy", errno=error.errno or 0, detail=command[0]
        ) from error
    finally:
        os.close(ready_inside)
        os.close(log)
    with open(ready, "rb") as pipe:
        said = pipe.read()
    if said != b"ready\n":
        _, why = process.communicate(timeout=_START_S)
        detail = why.decode(errors="replace").strip() or "it ended at once"
        raise SetupError(step="store_proxy", detail=detail)
    if process.stderr is not None:
        process.stderr.close()
    real = {"plasma_store": plasma_store, "raylet": raylet}
    return StoreProxy(directory, process, real)


def bind(
    path: str,
    job: bytes,
    *,
    actor: bool,
    drivers: bool = False,
    limits: Limits | None = None,
) -> None:
    """Say which job this worker belongs to, once and for all.

    Called in a worker after it registered with raylet and before any code of a
    user runs in it. Afterwards it stores objects of that job alone.

    Args:
        path: The proxy's bind socket.
        job: The job's id, 4 bytes.
        actor: Whether the worker serves an actor.
        drivers: Whether what it starts may be drivers, each of a job of its own.
        limits: Of its profile, for its job and itself; they can lower what the
            proxy was started with, not raise it.

    Raises:
        SetupError: It was refused, or there is no proxy: run no code of a user.
    """
    limits = limits or Limits()
    numbers = [
        _UNLIMITED if value is None else value
        for value in (
            limits.job_bytes,
            limits.job_objects,
            limits.worker_bytes,
            limits.worker_objects,
            limits.job_fetch_bytes,
            limits.job_fetch_objects,
            limits.fetch_bytes,
            limits.fetch_objects,
            limits.fetch_each,
        )
    ]
    flags = _SERVES_ACTOR * actor | _HOSTS_DRIVERS * drivers
    message = _BIND.pack(_BIND_MAGIC, job, flags, *numbers)
    try:
        directory, name = os.path.split(path)
        with _connected(directory, name) as proxy:
            proxy.send(message)
            answer = proxy.recv(256)
    except OSError as error:
        raise SetupError(
            step="store_proxy_bind", errno=error.errno or 0, detail=path
        ) from error
    if answer != b"ok":
        raise SetupError(
            step="store_proxy_bind", detail=answer.decode(errors="replace") or "ended"
        )


def used_by_job(path: str) -> dict[str, Any]:
    """Return what this worker's job and itself have in the store, and may have.

    Args:
        path: The proxy's bind socket.

    Keys: ``job_bytes``, ``job_objects``, ``worker_bytes``, ``worker_objects``, each
    with how much there is and how much is allowed (-1: no limit); ``job``, its id;
    ``refused``, how many of this worker's objects were refused so far.

    Raises:
        SetupError: There is no proxy, or it does not know this process.
    """
    try:
        directory, name = os.path.split(path)
        with _connected(directory, name) as proxy:
            proxy.send(_USED_MAGIC)
            found: dict[str, Any] = json.loads(proxy.recv(_MOST_USED))
    except (OSError, ValueError) as error:
        raise SetupError(
            step="store_proxy_used",
            errno=getattr(error, "errno", None) or 0,
            detail=f"{path}: {error}",
        ) from error
    return found


@contextmanager
def _connected(directory: str, name: str) -> Iterator[socket.socket]:
    """Connect to a socket in a directory, however long its path is."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_S)
            connection.connect(f"/proc/self/fd/{fd}/{name}")
            yield connection
    finally:
        os.close(fd)
