"""Code of a user in a worker: what it does to the sockets that the worker has.

Travels by value: nothing here may refer to a module of the tests.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time

COOKIE = 0x5241590000000000
# An empty table: every field left out.
EMPTY = bytes.fromhex("080000000400040004000000")


def message(kind, body=b"", cookie=COOKIE):
    """Return a whole message of Ray's local protocols."""
    return struct.pack("<QqQ", cookie, kind, len(body)) + body


def about(object_id):
    """Return a body with an id alone: seal, abort, release, contains."""
    text = struct.pack("<I", len(object_id)) + object_id + b"\0"
    text += bytes(-len(text) % 4)
    return struct.pack("<I2xHHHII", 12, 6, 8, 4, 6, 4) + text


def create(object_id, size):
    """Return the body of a creation of so many bytes."""
    # Offsets from the body's start: vtable 4, table 24, strings from 64.
    vtable = struct.pack("<10H", 20, 40, 4, 8, 12, 0, 16, 0, 24, 0)
    strings = struct.pack("<I28s4xI4xI4xI4x", 28, object_id, 0, 0, 0)
    at = [64, 100, 108, 116]
    fields = [place - (28 + 4 * i) for i, place in enumerate(at)]
    table = struct.pack("<i4I4xQQ", 20, *fields, size, 0)
    return struct.pack("<I", 24) + vtable + table + strings


def get(object_id):
    """Return the body of a request to get an object, without waiting."""
    text = struct.pack("<I28s4x", 28, object_id)
    head = struct.pack("<I2xHHH", 12, 6, 8, 4)
    return head + struct.pack("<iIII", 6, 4, 1, 4) + text


def own_sockets(name):
    """Return the sockets that this process has to raylet or the store."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(fd)) as peer:
                path = peer.getpeername()
            if isinstance(path, str) and os.path.basename(path) == name:
                found.append(socket.socket(fileno=os.dup(fd)))
        except OSError:
            continue
    if not found:
        raise LookupError(f"no socket to {name}")
    return found


def send(name, data):
    """Write to the worker's own connection, and wait what comes of it."""
    for each in own_sockets(name):
        each.sendall(data)
    time.sleep(2)
    return "still here"


def attack(name):
    """Run one attack by its name."""
    nobody = b"\x07" * 28
    return {
        "junk to raylet": lambda: send("raylet", b"\xff" * 64),
        "wrong cookie": lambda: send("raylet", message(9, EMPTY, cookie=1)),
        "unknown type": lambda: send("raylet", message(77, EMPTY)),
        "negative length": lambda: send("raylet", struct.pack("<Qqq", COOKIE, 9, -1)),
        "empty table": lambda: send("raylet", message(16, EMPTY)),
        "offset past the end": lambda: send(
            "raylet", message(15, struct.pack("<III", 0x7FFFFFF0, 0, 0))
        ),
        "register again": lambda: send("raylet", message(1, EMPTY)),
        "actor done": lambda: send("raylet", message(0) * 3),
        "junk to the store": lambda: send("plasma_store", b"\xff" * 64),
        "unknown type to the store": lambda: send("plasma_store", message(99, EMPTY)),
        "release of what it lacks": lambda: send(
            "plasma_store", message(10, about(nobody))
        ),
        "seal of what it lacks": lambda: send(
            "plasma_store", message(6, about(nobody))
        ),
        "abort of what it lacks": lambda: send(
            "plasma_store", message(4, about(nobody))
        ),
        "short id": lambda: send("plasma_store", message(14, about(b"short"))),
        "create again": lambda: send("plasma_store", message(2, about(nobody))),
        "delete": lambda: send("plasma_store", message(12, EMPTY)),
        "object of another job": lambda: send(
            "plasma_store",
            message(1, create(b"\x07" * 20 + b"\x63\0\0\0\x01\0\0\0", 1000)),
        ),
        "half a message": half,
        "double release": double_release,
    }[name]()


def half():
    """Leave a message unfinished, and go."""
    for name in ("plasma_store", "raylet"):
        for each in own_sockets(name):
            each.sendall(struct.pack("<QqQ", COOKIE, 14, 1 << 20) + bytes(100))
    os._exit(0)


def double_release():
    """Release while a get of the same object is under way."""
    import ray

    ref = ray.put(b"x" * 1000)
    ray.get(ref)
    body, ask = about(ref.binary()), get(ref.binary())
    data = message(8, ask) + message(10, body) + message(10, body)
    return send("plasma_store", data)


def bomb(count, size):
    """Put until it is refused; return how many, and the error's name."""
    import ray

    kept = []
    for _ in range(count):
        try:
            kept.append(ray.put(bytes(size)))
        except Exception as error:
            return len(kept), type(error).__name__
    return len(kept), ""


def bomb_then_free(count, size):
    """Put until it is refused, drop all, and put again."""
    first = bomb(count, size)
    return [*first, *bomb(1, size)]


def raw_bomb(count, size):
    """Ask for creations over the worker's own connection, past Ray's client."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    ray.put(b"x" * 1000)
    for each in own_sockets("plasma_store"):
        for number in range(count):
            unique = b"\x05" * 16 + number.to_bytes(4, "big")
            object_id = unique + bytes.fromhex(job) + b"\x09\0\0\0"
            each.sendall(message(1, create(object_id, size)))
        # Only the proxy's own answer has this length: 148 bytes.
        # Ray's own thread reads from the same socket, and may be faster. (A timeout
        # of the socket's would be that thread's too.)
        seen, until = b"", time.monotonic() + 30
        while struct.pack("<qQ", 3, 148) not in seen and time.monotonic() < until:
            select.select([each], [], [], 0.5)
            with contextlib.suppress(BlockingIOError):
                seen += each.recv(1 << 16, socket.MSG_DONTWAIT)
    os._exit(0)


def unread(seconds):
    """Ask for objects as fast as the store takes it, and read no answer."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    ray.put(b"x" * 1000)
    store, until, asked = own_sockets("plasma_store")[0], time.monotonic() + seconds, 0
    while time.monotonic() < until:
        unique = b"\x06" * 16 + asked.to_bytes(4, "big")
        object_id = unique + bytes.fromhex(job) + b"\x09\0\0\0"
        data = message(1, create(object_id, 1000))
        if select.select([], [store], [], 0.1)[1]:
            # All or nothing: what is left of a message would break a rule.
            with contextlib.suppress(BlockingIOError):
                asked += store.send(data, socket.MSG_DONTWAIT) == len(data)
    os._exit(asked < 1000)


def peers(plasma, raylet):
    """Say who answers at the names of the real sockets."""
    found = []
    for path in (plasma, raylet):
        with socket.socket(socket.AF_UNIX) as tried:
            tried.connect(path)
            credentials = tried.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            found.append(struct.unpack("iII", credentials)[0])
    return found


def child_connects(plasma):
    """Connect from a process that the worker started; b"" is a closed door."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with socket.socket(socket.AF_UNIX) as tried:
                tried.settimeout(5)
                tried.connect(plasma)
                tried.sendall(message(16, EMPTY))
                answer = tried.recv(24)
        except OSError:
            answer = b""
        os.write(writer, b"got:" + answer)
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(reader, 100)[4:].hex()
