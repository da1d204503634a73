"""Replies that break the protocol end the jail, and nobody else."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

import raysandbox

STRICT = raysandbox.tag("strict")


@ray.remote(resources=STRICT)
def fine() -> int:
    return 1


def _reply_sockets() -> list[socket.socket]:
    """What hostile code finds among its own descriptors."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(socket.socket(fileno=os.dup(int(name))))
        except OSError:
            continue
    assert found
    return found


def _header(
    kind: int = 2, flags: int = 0, call: int = 1, count: int = 1, length: int = 8
) -> bytes:
    from raysandbox import wire

    return wire._HEADER.pack(wire._MAGIC, kind, flags, 0, call, count, length)


def _send(data: bytes, fds: tuple[int, ...] = ()) -> None:
    for sock in _reply_sockets():
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sock.sendmsg([data], rights if fds else [])


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("reply", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, 1033, seals)
    return fd


ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8


def junk() -> None:
    _send(b"\xff" * 64)


def empty_packet() -> None:
    _send(b"")


def pickle_bomb() -> None:
    import pickle

    _send(pickle.dumps(print))


def oversized_announcement() -> None:
    _send(_header(length=1 << 62, flags=1), (_memfd(8, ALL_SEALS),))


def many_parts() -> None:
    _send(_header(count=0xFFFFFFFF))


def table_outside_the_body() -> None:
    _send(_header(count=1, length=8) + struct.pack("<Q", 1 << 40))


def wrong_call() -> None:
    _send(_header(call=77, count=0, length=0))


def a_call_of_its_own() -> None:
    _send(_header(kind=1, count=0, length=0))


def unsealed_memory() -> None:
    _send(_header(flags=1, length=4096), (_memfd(4096, 0),))


def memory_shorter_than_announced() -> None:
    _send(_header(flags=1, length=4096), (_memfd(16, ALL_SEALS),))


def a_file_instead_of_memory() -> None:
    _send(_header(flags=1, length=4096), (os.open("/tmp/f", os.O_CREAT | os.O_RDWR),))


def many_descriptors() -> None:
    fds = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(200))
    _send(_header(flags=1), fds)


def descriptors_beside_an_inline_body() -> None:
    _send(_header(count=0, length=0), (os.open("/dev/null", os.O_RDONLY),))


def a_whole_part_of_nothing() -> None:
    _send(_header(flags=8, length=0))


def a_whole_part_of_two_values() -> None:
    _send(_header(flags=8, length=16) + struct.pack("<BBHIQ", 1, 0, 0, 2, 0))


def a_whole_part_with_a_descriptor() -> None:
    packet = _header(flags=8, length=16) + struct.pack("<BBHIQ", 1, 0, 0, 1, 0)
    _send(packet, (os.open("/dev/null", os.O_RDONLY),))


def closes_its_socket() -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                continue
    time.sleep(60)


BROKEN = [
    junk,
    empty_packet,
    pickle_bomb,
    oversized_announcement,
    many_parts,
    table_outside_the_body,
    wrong_call,
    a_call_of_its_own,
    unsealed_memory,
    memory_shorter_than_announced,
    a_file_instead_of_memory,
    many_descriptors,
    descriptors_beside_an_inline_body,
    a_whole_part_of_nothing,
    a_whole_part_of_two_values,
    a_whole_part_with_a_descriptor,
    closes_its_socket,
]


def _ends(function: Callable[[], None]) -> BaseException:
    def attack() -> str:
        function()
        time.sleep(60)
        return "nobody read it"

    attack.__name__ = attack.__qualname__ = function.__name__
    task = ray.remote(max_retries=0, resources=STRICT)(attack)
    started = time.monotonic()
    with pytest.raises(raysandbox.TaskError) as caught:
        ray.get(task.remote(), timeout=60)
    assert time.monotonic() - started < 50
    return caught.value


def test_what_a_jail_forges_for_its_next_call_is_checked() -> None:
    """An answer that is none ends the jail, on the shorter way too."""

    def forges(answer: bytes) -> None:
        for call in range(3, 9):
            _send(_header(flags=8, call=call, length=len(answer)) + answer)

    def three() -> int:
        return 3

    options: dict[str, Any] = {"max_retries": 0, "num_cpus": 2}
    fast, other = raysandbox.tag("fast"), raysandbox.tag("brisk")
    for forged in (b"", b"x" * 8, struct.pack("<BBHI", 3, 0, 0, 1) + b"x",
                   struct.pack("<BBHI", 1, 0, 0, 1) + bytes(70_000)):  # fmt: skip
        plain = ray.remote(resources=fast, **options)(three)
        assert ray.get([plain.remote() for _ in range(4)]) == [3] * 4
        with pytest.raises(raysandbox.TaskError):
            ray.get([
                ray.remote(resources=fast, **options)(forges).remote(forged),
                *[plain.remote() for _ in range(6)],
            ])  # fmt: skip
        assert ray.get(ray.remote(resources=other, **options)(three).remote()) == 3
        assert ray.get([plain.remote() for _ in range(4)]) == [3] * 4


@pytest.mark.parametrize("function", BROKEN, ids=[each.__name__ for each in BROKEN])
def test_a_broken_reply_ends_the_jail(function: Callable[[], None]) -> None:
    """The error names the task, the profile and what was wrong with the reply."""
    worker = ray.get(fine.remote())
    error = _ends(function)
    assert isinstance(error, raysandbox.JailProtocolError), repr(error)
    message = str(error)
    assert function.__name__ in message
    assert "strict" in message
    assert ray.get(fine.remote(), timeout=30) == worker


def test_a_forged_result_is_only_the_tasks_own() -> None:
    """A well-formed reply sent early is the task's answer, and no other task's."""

    def forged() -> str:
        from raysandbox import datacodec

        parts = datacodec.encode("forged")
        body = b"".join(bytes(part) for part in parts) if parts else b""
        _send(_header(count=0, length=0)[:-1] + body[:1])
        time.sleep(60)
        return "own"

    task = ray.remote(max_retries=0, resources=STRICT)(forged)
    with pytest.raises(raysandbox.TaskError):
        ray.get(task.remote(), timeout=30)
    assert ray.get([fine.remote() for _ in range(20)], timeout=60) == [1] * 20


def test_a_second_reply_reaches_nobody() -> None:
    """One reply per call: what comes after it is not the next task's answer."""

    def twice() -> int:
        import threading

        from raysandbox import wire

        replied, originals = threading.Event(), (wire.send, wire.send_whole)

        def patched(original: Callable[..., Any]) -> Callable[..., Any]:
            def send(*arguments: Any, **options: Any) -> Any:
                wire.send, wire.send_whole = originals
                sent = original(*arguments, **options)
                replied.set()
                return sent

            return send

        def later() -> None:
            replied.wait()
            time.sleep(0.01)
            for sock in _reply_sockets():
                for call in range(1, 9):
                    try:
                        wire.send_whole(sock, wire.RESULT, call, b"second")
                    except OSError:
                        return

        wire.send, wire.send_whole = map(patched, originals)
        threading.Thread(target=later).start()
        return 1

    for profile in ("strict", "fast"):
        task = ray.remote(max_retries=0, resources=raysandbox.tag(profile))(twice)
        follow = ray.remote(max_retries=0, resources=raysandbox.tag(profile))(_two)
        assert ray.get(task.remote(), timeout=30) == 1
        answers = []
        for _ in range(10):
            try:
                answers.append(ray.get(follow.remote(), timeout=30))
            except raysandbox.TaskError:
                continue  # the job's own jail was ended for it
            time.sleep(0.02)
        assert set(answers) <= {2}
        assert ray.get(follow.remote(), timeout=30) == 2


def _two() -> int:
    return 2


def test_what_a_task_does_to_its_output_ends_with_it() -> None:
    """The pipes go from jail to jail: flags, size and owner are as new in the next."""

    def poisons() -> int:
        for fd in (1, 2):
            flags = os.O_NONBLOCK | os.O_DIRECT | os.O_APPEND
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK == 0:
                return 0
        return 1

    def looks() -> list[int]:
        return [
            fcntl.fcntl(fd, command)
            for fd in (1, 2)
            for command in (fcntl.F_GETFL, fcntl.F_GETPIPE_SZ)
        ]

    poisoned = ray.remote(max_retries=0, resources=STRICT)(poisons)
    looked = ray.remote(max_retries=0, resources=STRICT)(looks)
    as_new = ray.get(looked.remote(), timeout=60)
    # More than there are pairs of pipes in all workers.
    assert ray.get([poisoned.remote() for _ in range(16)], timeout=60) == [1] * 16
    assert ray.get([looked.remote() for _ in range(16)], timeout=60) == [as_new] * 16
