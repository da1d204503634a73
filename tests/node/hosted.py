"""An entrypoint of the Jobs API: honest work, and what a hostile one tries.

Travels with ``hostile.py`` as a job's working directory; ``python hosted.py NAME …``
prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time

import hostile

WORKER, DRIVER = 0, 1


def _registration(kind, pid, job):
    """Return the body of a registration: a table and the texts that it names."""
    # Slots 0 to 8: type, worker's id, pid, job, -, -, address, -, configuration.
    places = (4, 8, 24, 12, 0, 0, 16, 0, 20)
    vtable = struct.pack("<11H", 22, 32, *places) + bytes(6)
    at, texts, offsets = 32 + 32, b"", []
    for place, text in ((8, os.urandom(28)), (12, job), (16, b"127.0.0.1"), (20, b"")):
        offsets.append(at + len(texts) - (32 + place))
        texts += struct.pack("<I", len(text)) + text + b"\0"
        texts += bytes(-len(texts) % 4)
    table = struct.pack("<ii4IQ", 28, kind, *offsets, pid)
    return struct.pack("<I", 32) + vtable + table + texts


def _raylet():
    """Return a new connection to whatever has the name of raylet's socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(os.environ["RAYLET"])
    return connection


def register(kind, pid, job):
    """Register at raylet by hand; say whether it answered."""
    with _raylet() as connection:
        body = _registration(int(kind), int(pid) or os.getpid(), bytes.fromhex(job))
        connection.sendall(hostile.message(1, body))
        try:
            return len(connection.recv(1 << 16)) > 0
        except OSError:
            return False


def connect_often(count):
    """Connect as so many processes at once; return how many were not refused.

    None of them leaves before all have come, however slowly they start.
    """
    code = (
        "import sys; sys.path.insert(0, '.'); import hosted, select\n"
        "c = hosted._raylet(); print(flush=True)\n"
        "sys.exit(c in select.select([c, sys.stdin], [], [])[0])"
    )
    made = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(int(count))
    ]
    for each in made:
        each.stdout.readline()
    time.sleep(4)
    for each in made:
        each.stdin.close()
    return sum(each.wait() == 0 for each in made)


def bind(job):
    """Connect, and say as a worker does before code of users that one hosts drivers."""
    with _raylet(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as proxy:
        proxy.settimeout(5)
        proxy.connect("/run/raysandbox/store")
        limits = [(1 << 64) - 1] * 9
        flags = 2
        word = struct.pack("<8s4sI9Q", b"RSXBIND2", bytes.fromhex(job), flags, *limits)
        proxy.send(word)
        return proxy.recv(100).decode()


def junk():
    """Send what no reader of raylet's protocol expects."""
    with _raylet() as connection:
        connection.sendall(b"\xff" * 64)
        try:
            return connection.recv(1) == b""
        except OSError:
            return True


def reach(pid):
    """Say whether that process can be signalled."""
    os.kill(int(pid), 0)
    return True


def read(path):
    """Return the first bytes of a file."""
    with open(path) as file:
        return file.read(100)


def write(path):
    """Make a file."""
    with open(path, "x") as file:
        return file.write("hosted")


def outlive(port):
    """Leave a process behind that calls home later."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            time.sleep(3)
            with socket.create_connection(("127.0.0.1", int(port)), 2) as client:
                client.sendall(b"outlived")
        os._exit(0)
    os.wait()
    return True


def work():
    """Do what drivers do; say what came of it, and where."""
    import ray

    ray.init(log_to_driver=False)
    context = ray.get_runtime_context()

    @ray.remote
    def where(value):
        import os

        return value + 1, os.getpid()

    @ray.remote(resources={"sandbox:standard": 1})
    class Counter:
        def __init__(self):
            self.n = 0

        def add(self, n):
            self.n += n
            return self.n

    counter = Counter.remote()
    calls = [counter.add.remote(n) for n in range(4)]
    return {
        "task": ray.get(where.remote(1)),
        "actor": ray.get(calls),
        "put": len(ray.get(ray.put(b"x" * 5_000_000))),
        "job": context.get_job_id(),
        "user": os.getuid(),
        "variable": os.environ.get("GREETING"),
        "package": os.path.exists("hosted.py"),
        "cpus": ray.cluster_resources()["CPU"],
    }


def store(size):
    """Put more than one may; return the error's name."""
    import ray

    ray.init(log_to_driver=False)
    try:
        kept = [ray.put(bytes(10_000_000)) for _ in range(int(size) // 10_000_000)]
    except ray.exceptions.ObjectStoreFullError as error:
        return type(error).__name__
    return len(kept)


def wait(seconds):
    """Say hello, and stay."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("hello", flush=True)
    time.sleep(float(seconds))
    return True


def main():
    """Run one by its name."""
    name, *arguments = sys.argv[1:]
    try:
        found = globals()[name](*arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps({"found": found}), flush=True)


if __name__ == "__main__":
    main()
