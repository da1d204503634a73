"""Frames between a worker and a jail, over one SOCK_SEQPACKET socketpair.

::

    header   magic "RSB1"  u8 kind  u8 flags  u16 zero  u32 call  u32 parts
             u64 length of the body
    body     u64 length of each part, then the parts, each at a multiple of 64

A body of up to :data:`INLINE_BYTES` follows the header in the same packet; a
larger one is a sealed memfd that travels beside it, so that each side copies
the data once at most and the receiver maps it read-only. A body that is one part
may come without its table (`send_whole`): most calls and answers are small.

A worker's memfd may be one that it keeps and fills again (``worker/buffers.py``):
longer than the body, and sealed against everybody but the worker. It may come
ahead, in a packet of its own, so that the jail maps it while the worker fills
it. No worker takes any of that from a jail.

Whatever comes from a jail is hostile: every number is checked against what the
receiver allows before anything is allocated or mapped, and anything that is
not exactly a frame is a :class:`WireError`.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CALL", "ERROR", "INLINE_BYTES", "RESULT", "Frame", "WireError"]
__all__ += ["receive", "send", "send_whole"]

CALL, RESULT, ERROR = _KINDS = 1, 2, 3

INLINE_BYTES = 64 << 10
ALIGN = 64
_PADDING = bytes(ALIGN)
_HEADER = struct.Struct("<4sBBHIIQ")
_HEAD_BYTES = _HEADER.size
# One byte more than any frame has.
_PACKET_BYTES = _HEAD_BYTES + INLINE_BYTES + 1
# Tables of parts, by their number; those of most calls.
_TABLES = [struct.Struct(f"<{count}Q") for count in range(16)]
_MAGIC = b"RSB1"
_IN_MEMFD, _IN_KEPT, _AHEAD, _WHOLE = 1, 2, 4, 8
_MAX_FDS = 4
_CONTROL_BYTES = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
# As plain numbers: each operation on the enumeration costs a microsecond.
_CLOEXEC, _CUT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_TRUNC)
_CONTROL_CUT = int(socket.MSG_CTRUNC)
_ANY_CUT = _CUT | _CONTROL_CUT

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
# Against further seals, shrinking, growing and writing.
_SEALED = 1 | 2 | 4 | 8
# The same, but for a writable mapping that its sender has from before.
_KEPT = 1 | 2 | 4 | 16
# os.pwrite moves at most this much at once (MAX_RW_COUNT of the kernel).
_CHUNK = 1 << 30


@dataclass(frozen=True, slots=True)
class Lent:
    """A memory file for one body.

    Attributes:
        fd: A descriptor for reading, the receiver's alone.
        is_ahead: It may be sent before it is filled: whatever is in it until
            then, nobody reads it who should not.
        fill: Puts the body in.
    """

    fd: int
    is_ahead: bool
    fill: Callable[[], None]


#: Returns a file for these pieces up to this end, or None.
Lend = Callable[[list[tuple[int, memoryview]], int], "Lent | None"]


class WireError(Exception):
    """What came is not a frame, or more than the receiver allows.

    Attributes:
        limit: Bytes allowed, if it was a body over that limit; else 0.
        seen: Bytes announced in that case.
    """

    def __init__(self, message: str, limit: int = 0, seen: int = 0) -> None:
        super().__init__(message)
        self.limit, self.seen = limit, seen


class Frame:
    """One received frame; its parts are read-only views.

    Attributes:
        kind: One of :data:`CALL`, :data:`RESULT`, :data:`ERROR`.
        call: Number of the call that it belongs to.
        parts: Views into the packet or the mapped memfd, which they keep
            alive.
        size: Bytes of the body.
    """

    __slots__ = ("call", "kind", "parts", "size")

    def __init__(
        self, kind: int, call: int, parts: list[memoryview], size: int
    ) -> None:
        self.kind, self.call, self.parts, self.size = kind, call, parts, size


def send(
    sock: socket.socket,
    kind: int,
    call: int,
    parts: list[bytes] | list[memoryview] | list[bytes | memoryview],
    lend: Lend | None = None,
) -> int:
    """Send a frame; return the size of its body in bytes.

    Args:
        sock: The call socket.
        kind: One of :data:`CALL`, :data:`RESULT`, :data:`ERROR`.
        call: Number of the call that it belongs to.
        parts: Of the frame.
        lend: Where a worker has memory files from; the other side must take
            what is kept (`receive`).

    Raises:
        OSError: The other side is gone, or no memory is left for the memfd.
    """
    views = [p if type(p) is bytes else memoryview(p).cast("B") for p in parts]
    sizes, count = [len(view) for view in views], len(views)
    table = _table(count).pack(*sizes)
    offsets, end = [], len(table)
    pieces: list[bytes | memoryview] = [b"", table]
    for view, size in zip(views, sizes):
        if end % ALIGN:
            padding = -end % ALIGN
            pieces.append(_PADDING[:padding])
            end += padding
        offsets.append(end)
        pieces.append(view)
        end += size
    if end <= INLINE_BYTES:
        pieces[0] = _HEADER.pack(_MAGIC, kind, 0, 0, call, count, end)
        sock.send(b"".join(pieces))
        return end
    content = [(0, memoryview(table)), *zip(offsets, [memoryview(v) for v in views])]
    lent = lend(content, end) if lend is not None else None
    if lent is None:
        fd = _new_memfd(content, end)
        flags = _IN_MEMFD
    else:
        fd, flags = lent.fd, _IN_KEPT
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        if lent is not None:
            if lent.is_ahead:
                header = _HEADER.pack(_MAGIC, kind, _AHEAD, 0, call, 0, end)
                sock.sendmsg([header], rights)
                rights = []
            lent.fill()
        header = _HEADER.pack(_MAGIC, kind, flags, 0, call, count, end)
        sock.sendmsg([header], rights)
    finally:
        os.close(fd)
    return end


def send_whole(sock: socket.socket, kind: int, call: int, part: bytes) -> None:
    """Send a frame of one part of at most :data:`INLINE_BYTES`; see `send`."""
    head = _HEADER.pack(_MAGIC, kind, _WHOLE, 0, call, 1, len(part))
    sock.send(head + part)


def _table(count: int) -> struct.Struct:
    return _TABLES[count] if count < len(_TABLES) else struct.Struct(f"<{count}Q")


def _new_memfd(pieces: list[tuple[int, memoryview]], end: int) -> int:
    fd = os.memfd_create("raysandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, end)
        for start, view in pieces:
            write(fd, view, start)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALED)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write(fd: int, view: memoryview, offset: int) -> None:
    """Write all of it."""
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done : done + _CHUNK], offset + done)


def receive(
    sock: socket.socket,
    *,
    limit_bytes: int,
    max_parts: int,
    flags: int = 0,
    takes_kept: bool = False,
) -> Frame | None:
    """Receive a frame; None when the other side has closed.

    Args:
        sock: The call socket.
        limit_bytes: Largest body allowed.
        max_parts: Most parts allowed.
        flags: For recvmsg (``MSG_DONTWAIT``).
        takes_kept: For a jail alone: take a file that its sender can still
            change, as it does once nobody else has it.

    Raises:
        WireError: See the class.
        BlockingIOError: With ``MSG_DONTWAIT``: nothing there.
    """
    ahead: memoryview | None = None
    while True:
        try:
            packet, ancillary, got, _ = sock.recvmsg(
                _PACKET_BYTES, _CONTROL_BYTES, flags | _CLOEXEC
            )
        except ConnectionResetError:
            return None  # it closed, and what we sent last it never read
        is_cut = got & _ANY_CUT
        if ancillary:
            fds = _descriptors(ancillary)
        elif not packet and not is_cut:
            return None
        else:
            fds = []
        try:
            if is_cut:
                raise WireError("a packet that is larger than any frame's")
            if takes_kept and ahead is None and _is_ahead(packet):
                ahead = _map_ahead(packet, fds, limit_bytes)
                continue
            return _parse(packet, fds, limit_bytes, max_parts, takes_kept, ahead)
        finally:
            for fd in fds:
                os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a packet."""
    ints = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            ints.frombytes(data[: len(data) - len(data) % ints.itemsize])
    return list(ints)


def _is_ahead(packet: bytes) -> bool:
    return len(packet) == _HEAD_BYTES and _HEADER.unpack(packet)[2] == _AHEAD


def _map_ahead(packet: bytes, fds: list[int], limit_bytes: int) -> memoryview:
    magic, _, _, zero, _, count, length = _HEADER.unpack(packet)
    if magic != _MAGIC or zero or count or length > limit_bytes or len(fds) != 1:
        raise WireError("a descriptor ahead of no body")
    return _map(fds[0], length, kept=True)


def _parse(
    packet: bytes,
    fds: list[int],
    limit_bytes: int,
    max_parts: int,
    takes_kept: bool,
    ahead: memoryview | None,
) -> Frame:
    if len(packet) < _HEAD_BYTES:
        raise WireError("a packet that is shorter than a header")
    magic, kind, flags, zero, call, count, length = _HEADER.unpack_from(packet)
    if magic != _MAGIC or zero or kind not in _KINDS:
        raise WireError("a header of no known kind")
    if count > max_parts:
        raise WireError(f"{count} parts where {max_parts} are allowed")
    if length > limit_bytes:
        raise WireError(
            f"a body of {length} bytes where {limit_bytes} are allowed",
            limit_bytes,
            length,
        )
    if ahead is not None:
        if flags != _IN_KEPT or fds or len(packet) != _HEAD_BYTES:
            raise WireError("another body than the one that was announced")
        if length != ahead.nbytes:
            raise WireError("a body that is not as long as announced")
        body = ahead
    elif flags in (0, _WHOLE):
        if fds:
            raise WireError("a descriptor where none belongs")
        if len(packet) - _HEAD_BYTES != length:
            raise WireError("a body that is not as long as announced")
        body = memoryview(packet)[_HEAD_BYTES:]
        if flags == _WHOLE:
            if count != 1:
                raise WireError(f"one part that is {count}")
            return Frame(kind, call, [body], length)
    elif flags == _IN_MEMFD or (flags == _IN_KEPT and takes_kept):
        if len(fds) != 1 or len(packet) != _HEAD_BYTES:
            raise WireError("not exactly one descriptor beside the header")
        body = _map(fds[0], length, kept=flags == _IN_KEPT)
    else:
        raise WireError("unknown flags")
    return Frame(kind, call, _split(body, count), length)


def _map(fd: int, length: int, *, kept: bool) -> memoryview:
    """Map a sealed memfd; a file that could still change is refused.

    Without the seal against shrinking, the sender could truncate it under us,
    and reading the mapping would kill this process with SIGBUS.
    """
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise WireError("a descriptor that is no memfd") from error
    needed = _KEPT if kept else _SEALED
    if seals & needed != needed:
        raise WireError("a memfd that is not sealed")
    size = os.fstat(fd).st_size
    if length == 0 or (size < length if kept else size != length):
        raise WireError("a memfd that is not as long as announced")
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return memoryview(mmap.mmap(fd, length, flags, mmap.PROT_READ))


def _split(body: memoryview, count: int) -> list[memoryview]:
    table = 8 * count
    if table > body.nbytes:
        raise WireError("a table of parts that is cut short")
    parts, end, size = [], table, body.nbytes
    for length in _table(count).unpack_from(body):
        start = end + -end % ALIGN
        end = start + length
        if end > size:
            raise WireError("a part that ends outside the body")
        parts.append(body[start:end])
    if end != size:
        raise WireError("bytes behind the last part")
    return parts
