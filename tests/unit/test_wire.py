"""Frames between worker and jail: what is no frame is an error, and costs nothing."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import resource
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox import wire

LIMIT = 1 << 20
MOST_PARTS = 64
HEADER = struct.Struct("<4sBBHIIQ")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The jail's end and the worker's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture(autouse=True)
def no_descriptor_stays(pair: tuple[socket.socket, socket.socket]) -> Iterator[None]:
    """Whatever was received, all that came with it is closed again."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


def receive(worker: socket.socket, limit: int = LIMIT) -> wire.Frame | None:
    """Receive as a worker does."""
    return wire.receive(
        worker, limit_bytes=limit, max_parts=MOST_PARTS, flags=socket.MSG_DONTWAIT
    )


def raw(jail: socket.socket, packet: bytes, fds: list[int] | None = None) -> None:
    """Send what a hostile jail would."""
    rights = []
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    jail.sendmsg([packet], rights)


def head(
    *,
    magic: bytes = b"RSB1",
    kind: int = wire.RESULT,
    flags: int = 0,
    zero: int = 0,
    call: int = 7,
    count: int = 1,
    length: int = 8,
) -> bytes:
    """Return a header that is valid but for what the test changes."""
    return HEADER.pack(magic, kind, flags, zero, call, count, length)


def memfd(content: bytes, seals: int = SEALS) -> int:
    """Return a memory file as a jail may make one."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def body_of(*parts: bytes) -> bytes:
    """Return a body as the module's docstring describes it."""
    body = struct.pack(f"<{len(parts)}Q", *map(len, parts))
    for part in parts:
        body += bytes(-len(body) % 64) + part
    return body


@dataclass
class Reference:
    """What a packet without a descriptor means, read naively from the docstring."""

    kind: int
    call: int
    parts: list[bytes]


def reference(packet: bytes) -> Reference | None:
    """Return what a packet means, None if it is no frame."""
    if len(packet) < HEADER.size:
        return None
    magic, kind, flags, zero, call, count, length = HEADER.unpack_from(packet)
    body = packet[HEADER.size :]
    if (magic, zero) != (b"RSB1", 0) or kind not in (1, 2, 3) or flags not in (0, 8):
        return None
    if count > MOST_PARTS or len(body) != length or length > wire.INLINE_BYTES:
        return None
    if flags == 8:
        return Reference(kind, call, [body]) if count == 1 else None
    if 8 * count > length:
        return None
    parts, end = [], 8 * count
    for size in struct.unpack_from(f"<{count}Q", body):
        end += -end % 64
        if end + size > length:
            return None
        parts.append(body[end : end + size])
        end += size
    return Reference(kind, call, parts) if end == length else None


PARTS = st.lists(st.binary(max_size=200), max_size=5)


@pytest.mark.parametrize(
    "parts",
    [[], [b""], [b"x"], [b"", b"abc", b""], [bytes(65)] * 20, [b"x" * (128 << 10)]],
    ids=repr,
)
def test_frames_arrive_as_they_were_sent(parts, pair) -> None:
    """Small ones inline, large ones as a sealed memory file."""
    jail, worker = pair
    size = wire.send(jail, wire.RESULT, 9, parts)
    frame = receive(worker)
    assert (frame.kind, frame.call, frame.size) == (wire.RESULT, 9, size)
    assert [bytes(part) for part in frame.parts] == parts
    assert all(part.readonly for part in frame.parts)


@pytest.mark.parametrize("part", [b"", b"x", bytes(wire.INLINE_BYTES)], ids=len)
def test_a_whole_part_arrives_as_it_was_sent(part, pair) -> None:
    """Without a table, and with nothing beside it."""
    jail, worker = pair
    wire.send_whole(jail, wire.RESULT, 9, part)
    frame = receive(worker)
    assert (frame.kind, frame.call, frame.size) == (wire.RESULT, 9, len(part))
    assert [bytes(each) for each in frame.parts] == [part]
    assert frame.parts[0].readonly


def test_a_whole_part_is_under_the_limit_too(pair) -> None:
    """The body's limit is that of every frame."""
    jail, worker = pair
    wire.send_whole(jail, wire.RESULT, 9, bytes(101))
    with pytest.raises(wire.WireError, match="101 bytes where 100 are allowed"):
        receive(worker, 100)


def test_a_whole_part_has_no_descriptor(pair) -> None:
    """It is refused with one, and the descriptor is closed."""
    jail, worker = pair
    fd = memfd(b"x" * 8)
    raw(jail, head(flags=8) + bytes(8), [fd])
    os.close(fd)
    with pytest.raises(wire.WireError, match="a descriptor where none belongs"):
        receive(worker)


@settings(max_examples=300, deadline=None)
@given(parts=PARTS, data=st.data())
def test_a_mutated_frame_is_an_error_or_means_what_it_says(parts, data) -> None:
    """No mutation of a valid packet is read otherwise than by the description.

    Guards against a length that is believed before it is checked.
    """
    jail, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with jail, worker:
        if len(parts) == 1:
            wire.send_whole(jail, wire.RESULT, 9, parts[0])
        else:
            wire.send(jail, wire.RESULT, 9, parts)
        packet = bytearray(worker.recv(1 << 20))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(packet)))
            cut = data.draw(st.sampled_from([0, 0, 1, 4, 8]))
            packet[at : at + cut] = data.draw(
                st.binary(min_size=cut, max_size=cut) | st.binary(max_size=9)
            )
        if not packet:
            return  # an empty packet reads as the end
        raw(jail, bytes(packet))
        expected = reference(bytes(packet))
        try:
            frame = receive(worker)
        except wire.WireError:
            assert expected is None
            return
        assert expected is not None
        assert (frame.kind, frame.call) == (expected.kind, expected.call)
        assert [bytes(part) for part in frame.parts] == expected.parts


@settings(max_examples=150, deadline=None)
@given(packet=st.binary(min_size=1, max_size=300))
def test_any_bytes_are_an_error(packet) -> None:
    """Bytes that nobody framed are never a frame."""
    jail, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with jail, worker:
        raw(jail, packet)
        if reference(packet) is None:
            with pytest.raises(wire.WireError):
                receive(worker)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"x", "shorter than a header"),
        (head(magic=b"RSB2") + bytes(8), "of no known kind"),
        (head(kind=0) + bytes(8), "of no known kind"),
        (head(kind=4) + bytes(8), "of no known kind"),
        (head(zero=1) + bytes(8), "of no known kind"),
        (head(flags=2) + bytes(8), "unknown flags"),
        (head(flags=1), "not exactly one descriptor"),
        (head(flags=8, count=0) + bytes(8), "one part that is 0"),
        (head(flags=8, count=2) + bytes(8), "one part that is 2"),
        (head(flags=8, length=9) + bytes(8), "not as long as announced"),
        (head(flags=9) + bytes(8), "unknown flags"),
        (head(count=MOST_PARTS + 1) + bytes(8), "65 parts where 64 are allowed"),
        (head(count=0xFFFFFFFF) + bytes(8), "parts where 64 are allowed"),
        (head(length=LIMIT + 1) + bytes(8), "where 1048576 are allowed"),
        (head(length=(1 << 64) - 1) + bytes(8), "where 1048576 are allowed"),
        (head(length=9) + bytes(8), "not as long as announced"),
        (head(length=7) + bytes(8), "not as long as announced"),
        (head(count=2) + bytes(8), "table of parts that is cut short"),
        (head() + struct.pack("<Q", 1), "ends outside the body"),
        (head() + struct.pack("<Q", (1 << 64) - 1), "ends outside the body"),
        (head(count=0) + bytes(8), "bytes behind the last part"),
        (head(length=65) + bytes(65), "bytes behind the last part"),
        (bytes(HEADER.size + wire.INLINE_BYTES + 1), "of no known kind"),
        (bytes(HEADER.size + wire.INLINE_BYTES + 2), "larger than any frame's"),
    ],
)
def test_each_broken_header_is_named(packet, message, pair) -> None:
    """The error says which promise was broken."""
    jail, worker = pair
    raw(jail, packet)
    with pytest.raises(wire.WireError, match=message):
        receive(worker)


def test_an_announced_size_over_the_limit_says_both(pair) -> None:
    """The owner's error names what is allowed and what was announced."""
    jail, worker = pair
    raw(jail, head(flags=1, length=1 << 40))
    with pytest.raises(wire.WireError) as caught:
        receive(worker)
    assert (caught.value.limit, caught.value.seen) == (LIMIT, 1 << 40)


@pytest.mark.parametrize("seals", [0, SEALS & ~1, SEALS & ~2, SEALS & ~4, SEALS & ~8])
def test_a_memory_file_that_can_change_is_refused(seals, pair) -> None:
    """Each seal counts: without one it could shrink, grow or change under us.

    Guards against SIGBUS in the worker, and against bytes that change between
    the check and the use.
    """
    jail, worker = pair
    body = body_of(b"x" * 100)
    packet = head(flags=1, length=len(body))
    good, bad = memfd(body), memfd(body, seals)
    raw(jail, packet, [good])
    assert receive(worker).parts[0] == b"x" * 100
    raw(jail, packet, [bad])
    with pytest.raises(wire.WireError, match="not sealed"):
        receive(worker)
    os.close(good)
    os.close(bad)


def test_what_is_received_can_not_be_changed_by_the_sender(pair) -> None:
    """The sender keeps its descriptor; the kernel refuses every change."""
    jail, worker = pair
    body = body_of(b"x" * 100)
    fd = memfd(body)
    raw(jail, head(flags=1, length=len(body)), [fd])
    frame = receive(worker)
    for change in (
        lambda: os.pwrite(fd, b"y", 100),
        lambda: os.ftruncate(fd, 0),
        lambda: mmap.mmap(fd, len(body)),
    ):
        with pytest.raises(PermissionError):
            change()
    assert bytes(frame.parts[0]) == b"x" * 100
    with pytest.raises(TypeError):
        frame.parts[0][0] = 0
    os.close(fd)


@pytest.mark.parametrize(("size", "announced"), [(72, 71), (72, 73), (72, 0), (0, 0)])
def test_a_memory_file_of_another_length_is_refused(size, announced, pair) -> None:
    """Too short would be SIGBUS, too long is not what was announced."""
    jail, worker = pair
    fd = memfd(body_of(bytes(size)) if size else b"")
    raw(jail, head(flags=1, length=announced), [fd])
    with pytest.raises(wire.WireError, match="not as long as announced"):
        receive(worker)
    os.close(fd)


@pytest.mark.parametrize("what", ["file", "pipe", "socket", "directory", "device"])
def test_a_descriptor_that_is_no_memory_file_is_refused(what, pair, tmp_path) -> None:
    """Nothing else can be sealed, so nothing else is mapped."""
    jail, worker = pair
    fds = {
        "file": lambda: [os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)],
        "pipe": lambda: list(os.pipe()),
        "socket": lambda: [socket.socket(socket.AF_UNIX).detach()],
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "device": lambda: [os.open("/dev/zero", os.O_RDONLY)],
    }[what]()
    raw(jail, head(flags=1, length=64), fds[:1])
    with pytest.raises(wire.WireError, match="no memfd"):
        receive(worker)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 50])
@pytest.mark.parametrize("flags", [0, 1])
def test_descriptors_where_none_belong_are_closed(flags, count, pair) -> None:
    """Neither too many nor unasked ones stay open in the worker.

    Guards against a jail that fills the worker's table of descriptors.
    """
    jail, worker = pair
    body = body_of(b"")
    fd = memfd(body)
    raw(jail, head(flags=flags, length=64) + (b"" if flags else body), [fd] * count)
    if (flags, count) == (1, 1):
        assert bytes(receive(worker).parts[0]) == b""
    else:
        with pytest.raises(wire.WireError):
            receive(worker)
    os.close(fd)


def test_a_flood_is_refused_one_by_one(pair) -> None:
    """As many bad packets as the socket holds cost as many errors and no more."""
    jail, worker = pair
    jail.setblocking(False)
    fd, sent = memfd(b"x", 0), 0
    while sent < 500:
        try:
            raw(jail, head(flags=sent % 3, length=sent), [fd] * (sent % 5))
        except BlockingIOError:
            break
        sent += 1
    assert sent > 5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(sent):
        with pytest.raises(wire.WireError):
            receive(worker)
    with pytest.raises(BlockingIOError):
        receive(worker)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 << 10
    os.close(fd)


def test_nothing_is_allocated_for_what_is_only_announced(pair) -> None:
    """A terabyte in a header costs nothing."""
    jail, worker = pair
    fd = memfd(b"", 0)
    os.ftruncate(fd, 1 << 40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw(jail, head(flags=1, length=1 << 40), [fd])
    with pytest.raises(wire.WireError, match="allowed"):
        receive(worker)
    raw(jail, head(flags=1, length=64), [fd])
    with pytest.raises(wire.WireError, match="not as long"):
        receive(worker)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4 << 10
    os.close(fd)


def test_the_end_is_none_and_silence_is_not(pair) -> None:
    """A closed socket is told apart from one on which nothing came yet."""
    jail, worker = pair
    with pytest.raises(BlockingIOError):
        receive(worker)
    jail.shutdown(socket.SHUT_RDWR)
    assert receive(worker) is None


def test_an_end_with_a_call_unread_is_the_end_too(pair) -> None:
    """A jail that died before it read its call broke no protocol."""
    jail, worker = pair
    wire.send(worker, wire.CALL, 1, [b"never read"])
    jail.close()
    assert receive(worker) is None


def test_parts_outlive_the_frame(pair) -> None:
    """A view keeps its mapping, and gives it up when it goes."""
    jail, worker = pair
    content = os.urandom(256 << 10)
    wire.send(jail, wire.RESULT, 1, [content, b"tail"])
    parts = receive(worker).parts
    assert (bytes(parts[0]), bytes(parts[1])) == (content, b"tail")
    assert "memfd:raysandbox" in Path("/proc/self/maps").read_text()
    del parts
    assert "memfd:raysandbox" not in Path("/proc/self/maps").read_text()
