"""Ray's serialized objects, read without Ray.

A Python object in Ray's store is ``metadata`` (what kind it is) and ``data``::

    9 bytes      msgpack: length of the msgpack part
    msgpack      the value; what msgpack can't hold is an extension (101) that
                 is an index into the pickled list that follows
    int64 int64  length of the in-band pickle, length of the protobuf
    pickle       of that list, protocol 5
    protobuf     PythonObject: for each out-of-band buffer its address, length…
    buffers      from the next multiple of 64 bytes

Source: ``python/ray/includes/serialization.pxi`` and
``src/ray/protobuf/serialization.proto`` of Ray 2.60. Runs inside the jail, so
what it reads may be hostile: the worst that a wrong byte does is an exception.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any

__all__ = ["ObjectError", "loads"]

_MSGPACK_OFFSET = 9
_ALIGN = 64
_EXT_PYTHON, _EXT_OBJECT_REF = 101, 102
_SIZES = struct.Struct("<qq")

# Field numbers of PythonObject and PythonBuffer.
_OBJECT_BUFFER = 3
_BUFFER_ADDRESS, _BUFFER_LENGTH = 1, 2


class ObjectError(Exception):
    """The bytes are not an object that a jail can read."""


def loads(metadata: bytes, data: memoryview) -> Any:
    """Return the value of a serialized object.

    Large buffers (numpy, Arrow) stay where they are: the value refers to
    ``data``, read-only.

    Raises:
        ObjectError: Of a kind that has no meaning in a jail, or cut short.
        Exception: Whatever unpickling it raises.
    """
    kind = metadata.split(b",")[0]
    if kind == b"RAW":
        return bytes(data)
    if kind in (b"PYTHON", b"XLANG"):
        return _python(data, kind == b"PYTHON")
    if kind == b"ACTOR_HANDLE":
        raise ObjectError("an actor handle has no meaning in a jail")
    raise ObjectError(f"an object of kind {kind!r}")


def _python(data: memoryview, has_pickle: bool) -> Any:
    import msgpack  # Ray's own dependency: on the path once Ray's is

    header = msgpack.Unpacker()
    header.feed(data[:_MSGPACK_OFFSET])
    length = header.unpack()
    end = _MSGPACK_OFFSET + int(length)
    if end > data.nbytes:
        raise ObjectError("an object that is cut short")
    values = _unpickle(data, end) if has_pickle else []

    def extension(code: int, payload: bytes) -> Any:
        if code == _EXT_PYTHON:
            return values[msgpack.unpackb(payload)]
        if code == _EXT_OBJECT_REF:
            raise ObjectError("an object reference has no meaning in a jail")
        raise ObjectError(f"unknown extension {code}")

    return msgpack.unpackb(
        data[_MSGPACK_OFFSET:end], ext_hook=extension, raw=False, strict_map_key=False
    )


def _unpickle(data: memoryview, start: int) -> Any:
    inband_size, protobuf_size = _SIZES.unpack_from(data, start)
    inband = start + _SIZES.size
    protobuf = inband + inband_size
    segment = protobuf + protobuf_size
    if inband_size < 0 or protobuf_size < 0 or segment > data.nbytes:
        raise ObjectError("an object that is cut short")
    segment = (segment + _ALIGN - 1) & -_ALIGN
    buffers = []
    for field, value in _fields(data[protobuf : protobuf + protobuf_size]):
        if field == _OBJECT_BUFFER and isinstance(value, memoryview):
            entry = dict(_fields(value))
            first = segment + int(entry.get(_BUFFER_ADDRESS, 0))
            size = int(entry.get(_BUFFER_LENGTH, 0))
            if first + size > data.nbytes:
                raise ObjectError("a buffer outside the object")
            buffers.append(data[first : first + size])
    return pickle.loads(data[inband:protobuf], buffers=buffers)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message: integers and byte strings."""
    position = 0
    while position < message.nbytes:
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
        elif kind == 2:
            length, position = _varint(message, position)
            yield tag >> 3, message[position : position + length]
            position += length
        else:
            raise ObjectError(f"unknown protobuf wire type {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ObjectError("a number that is too long")
