"""Asks the node which objects it has: its object store, in memory, and in files.

Ray's worker has no call for that which looks beyond its own references. The
question is one message of the store's local protocol (Ray 2.60: a header of
cookie, type and length, and a flatbuffer), sent over a connection of our own.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from raysandbox.errors import InternalError
from raysandbox.node import spilling

__all__ = ["StoreError", "which_kept", "which_stored"]

_HEADER = struct.Struct("<QqQ")
_COOKIE = 0x5241590000000000
_CONTAINS_REQUEST, _CONTAINS_REPLY = 14, 15
# Root offset; vtable of a table of 8 bytes with one field at 4; the table; the id.
_BODY = struct.Struct("<I2xHHHIII28s4x")
_ID_BYTES = 28
_AHEAD = 64
_TIMEOUT_S = 10.0
_MOST_REPLY = 4096


class StoreError(InternalError):
    """The store did not answer, or not in a form that is known."""


def which_kept(path: str, spilled: str, ids: Sequence[bytes]) -> set[bytes]:
    """Return those of `ids` that the node has, in memory or in a file.

    Args:
        path: The store's socket.
        spilled: Directory that says what is in files, see `spilling`.
        ids: Of objects.

    Raises:
        StoreError: The store can't be asked.
    """
    stored = which_stored(path, ids)
    rest = (each for each in ids if each not in stored)
    return stored | spilling.which_spilled(spilled, rest)


def which_stored(path: str, ids: Sequence[bytes]) -> set[bytes]:
    """Return those of `ids` that the store at this socket has, sealed.

    Raises:
        StoreError: It can't be asked.
    """
    if not ids:
        return set()
    found = set()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as store:
            store.settimeout(_TIMEOUT_S)
            store.connect(path)
            stream = store.makefile("rb")
            for start in range(0, len(ids), _AHEAD):
                some = ids[start : start + _AHEAD]
                store.sendall(b"".join(map(_question, some)))
                for object_id in some:
                    head = stream.read(_HEADER.size)
                    cookie, kind, size = _HEADER.unpack(head)
                    if (cookie, kind) != (_COOKIE, _CONTAINS_REPLY) or (
                        size > _MOST_REPLY
                    ):
                        raise ValueError("an answer of another form")
                    if _answer(stream.read(size), object_id):
                        found.add(object_id)
    except (OSError, ValueError, struct.error) as error:
        raise StoreError(what=f"asking the object store at {path}: {error}") from error
    return found


def _question(object_id: bytes) -> bytes:
    body = _BODY.pack(12, 6, 8, 4, 6, 4, _ID_BYTES, object_id)
    return _HEADER.pack(_COOKIE, _CONTAINS_REQUEST, len(body)) + body


def _answer(body: bytes, object_id: bytes) -> bool:
    """Read ContainsReply: the id, and 1 if the store has it (0 may be left out)."""
    (table,) = struct.unpack_from("<I", body, 0)
    (back,) = struct.unpack_from("<i", body, table)
    vtable = table - back
    fields = struct.unpack_from(
        f"<{struct.unpack_from('<H', body, vtable)[0] // 2}H", body, vtable
    )[2:]
    at = table + fields[0]
    at += struct.unpack_from("<I", body, at)[0] + 4
    if body[at : at + _ID_BYTES] != object_id:
        raise ValueError("an answer to another question")
    if len(fields) < 2 or fields[1] == 0:
        return False
    return bool(struct.unpack_from("<i", body, table + fields[1])[0])
