"""numpy, Arrow and pandas in the data-only encoding (see `datacodec`).

A module of its own so that a jail whose task has none of these loads none of
this. On the encoding side the three libraries are looked up among the loaded
modules only; on the decoding side they are imported when a value needs them.

Arrow arrays are taken apart into their raw buffers and put together again from
them. Arrow's own IPC format is not used: reading it parses metadata made by the
task, instantiates registered extension types, and decompresses.

pandas: what lies in a numpy array of plain dtype stays numpy; ``str`` and Arrow
columns go as Arrow; object columns go value by value as plain data; nullable,
categorical and time-zone columns by their parts.
"""

from __future__ import annotations

import re
import sys

from raysandbox.datacodec import (
    _ZONE,
    INLINE_BYTES,
    Decoder,
    Encoder,
    RefusedError,
    _shown,
    _steps,
    read_zone,
    write_zone,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "find_writer",
    "read_arrow",
    "read_numpy",
    "read_numpy_scalar",
    "read_pandas",
]

# b1, i1…i8, u1…u8, f2…f8, c8, c16, S and U of at least one character, and the
# two time types with a unit. No long double: it has bit patterns that are no
# number, and printing one has overflowed buffers in C libraries.
_DTYPE = re.compile(
    r"[|<>](b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9]\d{0,8}"
    r"|[mM]8(\[([1-9]\d{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)",
    re.ASCII,
)
_OFFSET = re.compile(r"[+-]\d\d:\d\d", re.ASCII)
_MAX_DIMENSIONS = 32
_MAX_CATEGORIES = 16_384


def find_writer(kind: type) -> Callable[[Encoder, Any], None] | None:
    """Return the writer for a type of numpy, pyarrow or pandas, or None."""
    np = sys.modules.get("numpy")
    if np is not None:
        if kind is np.ndarray:
            return write_numpy
        if issubclass(kind, np.generic) and kind in set(np.sctypeDict.values()):
            return _write_numpy_scalar
    pa = sys.modules.get("pyarrow")
    if pa is not None and kind.__module__ == "pyarrow.lib":
        if issubclass(kind, pa.Array):
            return _write_arrow_array
        for name, writer in (
            ("ChunkedArray", _write_arrow_chunked),
            ("Table", _write_arrow_table),
            ("RecordBatch", _write_arrow_batch),
        ):
            if kind is getattr(pa, name):
                return writer
    pd = sys.modules.get("pandas")
    if pd is not None:
        if kind is pd.DataFrame:
            return _write_frame
        if kind is pd.Series:
            return _write_series
        if issubclass(kind, pd.Index) and kind.__module__.startswith("pandas"):
            return _write_index_value
    return None


def _in(step: str, owner: object, write: Callable[[], None]) -> None:
    """Run a writer; if it refuses, say in which part of ``owner``."""
    try:
        write()
    except RefusedError as refused:
        refused.steps.append((step, id(owner)))
        raise


# --- numpy --------------------------------------------------------------------


def _dtype_text(dtype: Any) -> str:
    text = str(dtype.str)
    if dtype.fields is not None or dtype.subdtype is not None:
        raise RefusedError(f"numpy array of structured dtype {_shown(dtype)}")
    if not _DTYPE.fullmatch(text):
        raise RefusedError(
            f"numpy array of dtype {_shown(dtype)}, which is not plain data"
        )
    return text


def write_numpy(encoder: Encoder, value: Any) -> None:
    """Append an array: dtype, order, shape, memory."""
    import numpy as np

    text = _dtype_text(value.dtype)
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    # The memory of an F-ordered array is that of its transpose in C order.
    flat = np.ascontiguousarray(value.T if fortran else value).reshape(-1)
    encoder.out += b"A" + (b"F" if fortran else b"C") + bytes([value.ndim])
    encoder.text(text)
    for extent in value.shape:
        encoder.number(extent)
    # By way of bytes: datetime64 arrays do not export a buffer.
    encoder.buffer(flat.view(np.uint8).data if flat.size else b"")


def _write_numpy_scalar(encoder: Encoder, value: Any) -> None:
    import numpy as np

    encoder.out += b"G"
    array = np.asarray(value)
    if array.dtype.kind in "SU" and array.dtype.itemsize == 0:
        encoder.text(array.dtype.str[:2])
        encoder.buffer(b"")
        return
    encoder.text(_dtype_text(array.dtype))
    encoder.buffer(array.tobytes())


def _checked_dtype(decoder: Decoder) -> Any:
    import numpy as np

    text = decoder.text()
    if not _DTYPE.fullmatch(text):
        raise decoder.fail(f"no plain dtype: {_shown(text)}")
    return np.dtype(text)


def _check_contents(decoder: Decoder, flat: Any) -> None:
    """Refuse bytes that are no value of their dtype."""
    import numpy as np

    if flat.size == 0:
        return
    if flat.dtype.kind == "b":
        if flat.view(np.uint8).max() > 1:
            raise decoder.fail("a bool that is neither 0 nor 1")
    elif flat.dtype.kind == "U":
        code = flat.view(np.dtype("u4").newbyteorder(flat.dtype.byteorder))
        if code.max() > 0x10FFFF:
            raise decoder.fail("a character beyond Unicode")


def read_numpy(decoder: Decoder) -> Any:
    """Read an array; a large one is a read-only view of its part."""
    import numpy as np

    order = decoder.byte()
    if order not in b"CF":
        raise decoder.fail("unknown array order")
    dimensions = decoder.byte()
    if dimensions > _MAX_DIMENSIONS:
        raise decoder.fail(f"array of {dimensions} dimensions")
    dtype = _checked_dtype(decoder)
    shape = tuple(decoder.number() for _ in range(dimensions))
    raw = decoder.buffer()
    # Python's ints do not overflow, and an extent of 0 may stand beside one
    # that numpy can't hold.
    size = 1
    for extent in shape:
        size *= extent
    if any(extent >= 1 << 40 for extent in shape):
        raise decoder.fail("an extent too large")
    if size * dtype.itemsize != len(raw):
        raise decoder.fail(f"array of {_shown(shape)} with {len(raw)} bytes")
    decoder.charge(200 + 16 * dimensions)
    if size == 0:
        empty = np.empty(shape, dtype, order="F" if order == 0x46 else "C")
        empty.flags.writeable = False
        return empty
    flat = np.frombuffer(raw, dtype)
    if len(raw) <= INLINE_BYTES or not flat.flags.aligned:
        # A small one must not keep the whole structure alive.
        decoder.charge(len(raw))
        flat = flat.copy()
    _check_contents(decoder, flat)
    flat.flags.writeable = False
    return flat.reshape(shape, order="F" if order == 0x46 else "C")


def read_numpy_scalar(decoder: Decoder) -> Any:
    """Read a numpy scalar (``numpy.float64(1.5)``)."""
    import numpy as np

    start = decoder.pos
    text = decoder.text()
    if text in ("|S", "<U"):
        if len(decoder.buffer()):
            raise decoder.fail("an empty text that is not empty")
        return np.bytes_(b"") if text == "|S" else np.str_("")
    decoder.pos = start
    dtype = _checked_dtype(decoder)
    raw = decoder.buffer()
    if dtype.itemsize != len(raw):
        raise decoder.fail(f"{dtype} of {len(raw)} bytes")
    decoder.charge(100 + 2 * len(raw))
    flat = np.frombuffer(raw, dtype)
    _check_contents(decoder, flat)
    return flat[0]


# --- Arrow types --------------------------------------------------------------

_PLAIN_ARROW = (
    "null",
    "bool_",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "date32",
    "date64",
    "string",
    "large_string",
    "binary",
    "large_binary",
    "month_day_nano_interval",
)
# Bits of one value in the data buffer, where that is fixed.
_BITS = {
    "bool_": 1,
    "int8": 8,
    "uint8": 8,
    "int16": 16,
    "uint16": 16,
    "float16": 16,
    "int32": 32,
    "uint32": 32,
    "float32": 32,
    "date32": 32,
    "time32": 32,
    "int64": 64,
    "uint64": 64,
    "float64": 64,
    "date64": 64,
    "time64": 64,
    "timestamp": 64,
    "duration": 64,
    "month_day_nano_interval": 128,
    "decimal32": 32,
    "decimal64": 64,
    "decimal128": 128,
    "decimal256": 256,
}
_VARIABLE = {"string": 4, "binary": 4, "large_string": 8, "large_binary": 8}
_UNITS = ("s", "ms", "us", "ns")


class _Type:
    """An Arrow type, taken apart as far as building arrays of it needs."""

    __slots__ = ("arrow", "children", "kind", "width")

    def __init__(
        self, arrow: Any, kind: str, children: tuple[_Type, ...] = (), width: int = 0
    ) -> None:
        self.arrow, self.kind, self.children = arrow, kind, children
        self.width = width  # bytes of a fixed binary, values of a fixed list


def _plain_arrow() -> dict[Any, str]:
    import pyarrow as pa

    if not _PLAIN_CACHE:
        _PLAIN_CACHE.update({getattr(pa, name)(): name for name in _PLAIN_ARROW})
    return _PLAIN_CACHE


_PLAIN_CACHE: dict[Any, str] = {}


def _write_type(encoder: Encoder, kind: Any) -> _Type:
    """Append an Arrow type, by its name in a closed list."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        raise RefusedError(
            f"Arrow extension type {_shown(str(kind))} is not plain data"
        )
    out = encoder.text
    plain = _plain_arrow().get(kind)
    if plain is not None:
        out(plain)
        return _Type(kind, plain)
    exact = type(kind)
    if pa.types.is_time32(kind) or pa.types.is_time64(kind):
        name = "time32" if pa.types.is_time32(kind) else "time64"
        out(name)
        out(kind.unit)
        return _Type(kind, name)
    if exact is pa.TimestampType:
        if kind.tz is not None and not _zone_ok(kind.tz):
            raise RefusedError(f"Arrow time zone {_shown(kind.tz)} is no plain name")
        out("timestamp")
        out(kind.unit)
        out(kind.tz or "")
        return _Type(kind, "timestamp")
    if exact is pa.DurationType:
        out("duration")
        out(kind.unit)
        return _Type(kind, "duration")
    for name in ("decimal32", "decimal64", "decimal128", "decimal256"):
        if exact is getattr(pa, name.capitalize() + "Type", None):
            out(name)
            encoder.out += bytes([kind.precision, kind.scale & 0xFF])
            return _Type(kind, name)
    if exact is pa.FixedSizeBinaryType:
        out("fixed_binary")
        encoder.number(kind.byte_width)
        return _Type(kind, "fixed_binary", width=kind.byte_width)
    if exact is pa.ListType or exact is pa.LargeListType:
        name = "list" if exact is pa.ListType else "large_list"
        out(name)
        return _Type(kind, name, (_write_field(encoder, kind.value_field),))
    if exact is pa.FixedSizeListType:
        out("fixed_list")
        encoder.number(kind.list_size)
        child = _write_field(encoder, kind.value_field)
        return _Type(kind, "fixed_list", (child,), kind.list_size)
    if exact is pa.StructType:
        out("struct")
        encoder.number(kind.num_fields)
        fields = [_write_field(encoder, kind.field(i)) for i in range(kind.num_fields)]
        return _Type(kind, "struct", tuple(fields))
    if exact is pa.MapType:
        out("map")
        encoder.out += bytes([kind.keys_sorted])
        children = (
            _write_field(encoder, kind.key_field),
            _write_field(encoder, kind.item_field),
        )
        return _Type(kind, "map", children)
    if exact is pa.DictionaryType:
        out("dictionary")
        encoder.out += bytes([kind.ordered])
        index = _write_type(encoder, kind.index_type)
        return _Type(kind, "dictionary", (index, _write_type(encoder, kind.value_type)))
    raise RefusedError(
        f"Arrow type {_shown(str(kind))} has no data-only form; cast it to one that "
        "has (views to string or binary, unions to a struct)"
    )


def _write_field(encoder: Encoder, field: Any) -> _Type:
    if field.metadata and any(k.startswith(b"ARROW:ext") for k in field.metadata):
        raise RefusedError(f"Arrow field {_shown(field.name)} has extension metadata")
    encoder.text(field.name)
    encoder.out += bytes([field.nullable])
    return _write_type(encoder, field.type)


def _zone_ok(zone: str) -> bool:
    return bool(_ZONE.fullmatch(zone) or _OFFSET.fullmatch(zone))


def _read_type(decoder: Decoder) -> _Type:
    import pyarrow as pa

    decoder.enter()
    decoder.charge(500, 1)
    name = decoder.text()
    made = _read_type_named(decoder, pa, name)
    decoder.depth -= 1
    return made


def _unit(decoder: Decoder) -> str:
    unit = decoder.text()
    if unit not in _UNITS:
        raise decoder.fail("unknown time unit")
    return unit


def _read_type_named(decoder: Decoder, pa: Any, name: str) -> _Type:
    if name in _PLAIN_ARROW:
        return _Type(getattr(pa, name)(), name)
    if name in ("time32", "time64", "duration"):
        return _Type(getattr(pa, name)(_unit(decoder)), name)
    if name == "timestamp":
        unit = _unit(decoder)
        zone = decoder.text()
        if zone and not _zone_ok(zone):
            raise decoder.fail(f"no time zone name: {_shown(zone)}")
        return _Type(pa.timestamp(unit, zone or None), name)
    if name in ("decimal32", "decimal64", "decimal128", "decimal256"):
        precision, scale = decoder.take(2)
        scale = scale - 256 if scale > 127 else scale
        return _Type(getattr(pa, name)(precision, scale), name)
    if name == "fixed_binary":
        width = decoder.number()
        if width > 1 << 30:
            raise decoder.fail(f"fixed binary of {width} bytes")
        return _Type(pa.binary(width), name, width=width)
    if name in ("list", "large_list"):
        field, child = _read_field(decoder)
        make = pa.list_ if name == "list" else pa.large_list
        return _Type(make(field), name, (child,))
    if name == "fixed_list":
        width = decoder.number()
        if width > 1 << 30:
            raise decoder.fail(f"fixed list of {width} values")
        field, child = _read_field(decoder)
        return _Type(pa.list_(field, width), name, (child,), width)
    if name == "struct":
        count = decoder.number()
        if count > decoder.size - decoder.pos:
            raise decoder.fail(f"{count} fields named, and no room for them")
        pairs = [_read_field(decoder) for _ in range(count)]
        return _Type(pa.struct([f for f, _ in pairs]), name, tuple(t for _, t in pairs))
    if name == "map":
        ordered = decoder.byte() == 1
        key_field, key = _read_field(decoder)
        item_field, item = _read_field(decoder)
        if key_field.nullable:
            raise decoder.fail("map keys that may be null")
        return _Type(pa.map_(key_field, item_field, ordered), name, (key, item))
    if name == "dictionary":
        ordered = decoder.byte() == 1
        index = _read_type(decoder)
        if not pa.types.is_integer(index.arrow):
            raise decoder.fail("dictionary indices that are no integers")
        value = _read_type(decoder)
        made = pa.dictionary(index.arrow, value.arrow, ordered)
        return _Type(made, name, (index, value))
    raise decoder.fail(f"unknown Arrow type {_shown(name)}")


def _read_field(decoder: Decoder) -> tuple[Any, _Type]:
    import pyarrow as pa

    name = decoder.text()
    nullable = decoder.byte() == 1
    made = _read_type(decoder)
    return pa.field(name, made.arrow, nullable), made


# --- Arrow arrays -------------------------------------------------------------


def _compact(array: Any) -> Any:
    """Return an equal array that starts at its buffers' start.

    A slice shares its parent's buffers: sent as they are, ten rows would take
    the whole table with them, values that the task did not return included.
    """
    import pyarrow as pa

    if array.offset == 0:
        spare = array.get_total_buffer_size() - array.nbytes
        if spare <= 4096 + array.nbytes // 8:
            return array
    # Of two, because a single array is handed back as it is.
    return pa.concat_arrays([array, array.slice(0, 0)])


def _put(encoder: Encoder, buffer: Any, size_bytes: int) -> None:
    """Append a buffer, present or absent, cut to what the array uses."""
    if buffer is None:
        encoder.out += b"\0"
        return
    encoder.out += b"\1"
    encoder.buffer(memoryview(buffer)[:size_bytes].cast("B"))


def _write_values(encoder: Encoder, array: Any, kind: _Type) -> None:
    """Append one array's length and buffers, then its children's."""
    import pyarrow as pa

    array = _compact(array)
    length = len(array)
    encoder.number(length)
    if kind.kind == "dictionary":
        _write_values(encoder, array.indices, kind.children[0])
        _write_values(encoder, array.dictionary, kind.children[1])
        return
    if length == 0 or kind.kind == "null":
        return
    if array.offset:
        raise RefusedError(
            f"Arrow array of type {_shown(str(kind.arrow))} with an offset"
        )
    buffers = array.buffers()
    validity = buffers[0] if array.null_count else None
    _put(encoder, validity, (length + 7) // 8)
    if kind.kind in _BITS:
        _put(encoder, buffers[1], (length * _BITS[kind.kind] + 7) // 8)
    elif kind.kind == "fixed_binary":
        _put(encoder, buffers[1], length * kind.width)
    elif kind.kind in _VARIABLE:
        width = _VARIABLE[kind.kind]
        offsets = memoryview(buffers[1])[: (length + 1) * width].cast("B")
        end = int.from_bytes(offsets[-width:], "little")
        encoder.out += b"\1"
        encoder.buffer(offsets)
        _put(encoder, buffers[2] or pa.py_buffer(b""), end)
    elif kind.kind in ("list", "large_list", "map"):
        width = 8 if kind.kind == "large_list" else 4
        _put(encoder, buffers[1], (length + 1) * width)
        if kind.kind == "map":
            keys, items = array.keys, array.items
            _write_values(encoder, keys, kind.children[0])
            _write_values(encoder, items, kind.children[1])
        else:
            _write_values(encoder, array.values, kind.children[0])
    elif kind.kind == "fixed_list":
        _write_values(encoder, array.values, kind.children[0])
    else:
        for index, child in enumerate(kind.children):
            _write_values(encoder, array.field(index), child)


def _get(decoder: Decoder, least_bytes: int, what: str) -> Any:
    """Read a buffer that must hold at least so many bytes; None if absent."""
    import pyarrow as pa

    present = decoder.byte()
    if present == 0:
        if least_bytes:
            raise decoder.fail(f"Arrow {what} missing")
        return None
    if present != 1:
        raise decoder.fail("a flag that is neither 0 nor 1")
    raw = decoder.buffer()
    if len(raw) < least_bytes:
        raise decoder.fail(f"Arrow {what} of {len(raw)} bytes, not {least_bytes}")
    decoder.charge(200)
    buffer = pa.py_buffer(raw)
    if len(raw) <= INLINE_BYTES or buffer.address % 64:
        decoder.charge(len(raw))
        # Arrow's own memory is aligned; a small one must not keep the whole
        # structure alive.
        copy = pa.allocate_buffer(len(raw))
        memoryview(copy).cast("B")[:] = raw
        return copy
    return buffer


def _validity(decoder: Decoder, length: int) -> Any:
    if decoder.byte() == 0:
        return None
    decoder.pos -= 1
    return _get(decoder, (length + 7) // 8, "validity")


def _read_values(decoder: Decoder, kind: _Type) -> Any:
    """Read one array; its sizes are checked here, its contents by the caller."""
    import pyarrow as pa

    decoder.charge(500, 1)
    length = decoder.number()
    if length >= 1 << 40:
        raise decoder.fail(f"Arrow array of {length} values")
    if kind.kind == "dictionary":
        indices = _read_values(decoder, kind.children[0])
        dictionary = _read_values(decoder, kind.children[1])
        if len(indices) != length:
            raise decoder.fail("Arrow dictionary indices of another length")
        # The indices are compared with the dictionary's length: safe=True.
        return pa.DictionaryArray.from_arrays(
            indices, dictionary, ordered=kind.arrow.ordered, safe=True
        )
    if length == 0:
        return pa.array([], kind.arrow)
    if kind.kind == "null":
        decoder.charge(0, length)
        return pa.nulls(length)
    from_buffers = pa.Array.from_buffers
    validity = _validity(decoder, length)
    if kind.kind in _BITS:
        data = _get(decoder, (length * _BITS[kind.kind] + 7) // 8, "data")
        return from_buffers(kind.arrow, length, [validity, data])
    if kind.kind == "fixed_binary":
        if not kind.width:
            decoder.charge(0, length)
        data = _get(decoder, length * kind.width, "data")
        return from_buffers(kind.arrow, length, [validity, data])
    if kind.kind in _VARIABLE:
        offsets = _get(decoder, (length + 1) * _VARIABLE[kind.kind], "offsets")
        data = _get(decoder, 0, "data")
        return from_buffers(kind.arrow, length, [validity, offsets, data])
    if kind.kind in ("list", "large_list"):
        width = 8 if kind.kind == "large_list" else 4
        offsets = _get(decoder, (length + 1) * width, "offsets")
        child = _read_values(decoder, kind.children[0])
        return from_buffers(kind.arrow, length, [validity, offsets], children=[child])
    if kind.kind == "map":
        offsets = _get(decoder, (length + 1) * 4, "offsets")
        keys = _read_values(decoder, kind.children[0])
        items = _read_values(decoder, kind.children[1])
        # Arrow's constructor ends the process over these, before validation.
        if len(keys) != len(items) or keys.null_count:
            raise decoder.fail("Arrow map keys that are null or not one per item")
        entry = pa.struct([kind.arrow.key_field, kind.arrow.item_field])
        pairs = from_buffers(entry, len(keys), [None], children=[keys, items])
        return from_buffers(kind.arrow, length, [validity, offsets], children=[pairs])
    if kind.kind == "fixed_list":
        child = _read_values(decoder, kind.children[0])
        if len(child) < length * kind.width:
            raise decoder.fail("Arrow fixed lists with too few values")
        if not kind.width:
            decoder.charge(0, length)
        return from_buffers(kind.arrow, length, [validity], children=[child])
    children = [_read_values(decoder, child) for child in kind.children]
    if any(len(child) != length for child in children):
        raise decoder.fail("Arrow struct with fields of another length")
    if not children:
        decoder.charge(0, length)
    return from_buffers(kind.arrow, length, [validity], children=children)


def _checked(value: Any) -> Any:
    # Offsets, UTF-8, dictionary indices, decimals' precision: raises ArrowInvalid.
    value.validate(full=True)
    return value


def _write_arrow_array(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Pa"
    kind = _write_type(encoder, value.type)
    _write_values(encoder, value, kind)


def _write_arrow_chunked(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Pc"
    kind = _write_type(encoder, value.type)
    _write_chunks(encoder, value, kind)


def _write_chunks(encoder: Encoder, value: Any, kind: _Type) -> None:
    encoder.number(value.num_chunks)
    encoder.count(value.num_chunks)
    for chunk in value.chunks:
        _write_values(encoder, chunk, kind)


def _write_arrow_table(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Pt"
    _write_columns(encoder, value, _write_chunks)


def _write_arrow_batch(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Pb"
    _write_columns(encoder, value, _write_values)


def _write_columns(
    encoder: Encoder, value: Any, write: Callable[[Encoder, Any, _Type], None]
) -> None:
    encoder.number(value.num_rows)
    encoder.number(value.num_columns)
    encoder.count(value.num_columns)
    for index in range(value.num_columns):
        field, column = value.schema.field(index), value.column(index)

        def one(field: Any = field, column: Any = column) -> None:
            write(encoder, column, _write_field(encoder, field))

        _in(f".column({_shown(field.name)})", value, one)


def _read_chunks(decoder: Decoder, kind: _Type) -> Any:
    import pyarrow as pa

    count = decoder.number()
    if count > decoder.size - decoder.pos:
        raise decoder.fail(f"{count} chunks named, and no room for them")
    chunks = [_read_values(decoder, kind) for _ in range(count)]
    return pa.chunked_array(chunks, kind.arrow)


def read_arrow(decoder: Decoder) -> Any:
    """Read an array, chunked array, table or record batch; fully validated."""
    import pyarrow as pa

    shape = decoder.byte()
    if shape == 0x61:
        return _checked(_read_values(decoder, _read_type(decoder)))
    if shape == 0x63:
        return _checked(_read_chunks(decoder, _read_type(decoder)))
    if shape not in (0x74, 0x62):
        raise decoder.fail("unknown kind of Arrow value")
    rows, count = decoder.number(), decoder.number()
    if count > decoder.size - decoder.pos:
        raise decoder.fail(f"{count} columns named, and no room for them")
    fields, columns = [], []
    for _ in range(count):
        field, kind = _read_field(decoder)
        column = (_read_chunks if shape == 0x74 else _read_values)(decoder, kind)
        if len(column) != rows:
            raise decoder.fail("Arrow columns of different lengths")
        fields.append(field)
        columns.append(column)
    if not count and rows:
        raise decoder.fail("Arrow rows without a column")
    maker = pa.Table if shape == 0x74 else pa.RecordBatch
    return _checked(maker.from_arrays(columns, schema=pa.schema(fields)))


# --- pandas -------------------------------------------------------------------


def _masked_dtypes() -> set[type]:
    import pandas as pd

    numbers = ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
    names = (*numbers, "Float32", "Float64", "Boolean")
    return {getattr(pd, f"{name}Dtype") for name in names}


def _write_column(encoder: Encoder, column: Any) -> None:
    """Append the values of a Series or flat Index, by its dtype."""
    import numpy as np
    import pandas as pd

    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        if dtype.kind == "O":
            encoder.out += b"O"
            values = column.to_numpy()
            encoder.enter()
            encoder.sequence(values.tolist(), _steps(column, ".iloc[{}]".format))
            encoder.depth -= 1
            return
        encoder.out += b"A"
        write_numpy(encoder, column.to_numpy())
    elif type(dtype) is pd.CategoricalDtype:
        encoder.out += b"C" + bytes([bool(dtype.ordered)])
        if len(dtype.categories) > _MAX_CATEGORIES and _needs_hashing(dtype.categories):
            raise RefusedError(
                f"pandas categorical with {len(dtype.categories)} categories (more "
                f"than {_MAX_CATEGORIES} can pass only if they are ascending numbers; "
                "astype the column to the categories' own type)"
            )
        codes = column.codes if isinstance(column, pd.Index) else column.cat.codes
        write_numpy(encoder, np.asarray(codes))
        _write_index(encoder, dtype.categories)
    elif type(dtype) is pd.DatetimeTZDtype:
        encoder.out += b"Z"
        index = pd.DatetimeIndex(column)
        write_zone(encoder, index.tz)
        write_numpy(encoder, index.tz_convert("UTC").tz_localize(None).to_numpy())
    elif type(dtype) is pd.StringDtype:
        arrow = dtype.storage == "pyarrow"
        encoder.out += b"S" + bytes([dtype.na_value is pd.NA, arrow])
        if arrow:
            _write_arrow_column(encoder, column)
        else:
            missing = column.isna()
            values = column.to_numpy(dtype=object, na_value=None).tolist()
            encoder.enter()
            encoder.sequence(
                [None if gone else v for v, gone in zip(values, missing)],
                _steps(column, ".iloc[{}]".format),
            )
            encoder.depth -= 1
    elif type(dtype) is pd.ArrowDtype:
        encoder.out += b"W"
        _write_arrow_column(encoder, column)
    elif type(dtype) in _masked_dtypes():
        encoder.out += b"M"
        plain = dtype.numpy_dtype
        write_numpy(encoder, column.to_numpy(dtype=plain, na_value=plain.type(0)))
        write_numpy(encoder, np.asarray(column.isna(), dtype=bool))
    else:
        raise RefusedError(
            f"pandas dtype {_shown(str(dtype))} has no data-only form; convert it "
            "(astype) to a plain one"
        )


def _write_arrow_column(encoder: Encoder, column: Any) -> None:
    import pyarrow as pa

    values = column.array.__arrow_array__()
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    _write_arrow_chunked(encoder, values)


def _write_index(encoder: Encoder, index: Any) -> None:
    import pandas as pd

    if type(index) is pd.RangeIndex:
        encoder.out += b"R"
        for bound in (index.start, index.stop, index.step):
            encoder.value(int(bound))
    elif type(index) is pd.MultiIndex:
        encoder.out += b"T"
        encoder.number(index.nlevels)
        for level, codes in zip(index.levels, index.codes):
            _write_index(encoder, level)
            write_numpy(encoder, codes)
        _in(".names", index, lambda: encoder.value(list(index.names)))
        return
    else:
        encoder.out += b"I"
        _write_column(encoder, index)
    _in(".name", index, lambda: encoder.value(index.name))


def _write_index_value(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Xi"
    _write_index(encoder, value)


def _write_series(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Xs"
    _in(".index", value, lambda: _write_index(encoder, value.index))
    _write_column(encoder, value)
    _in(".name", value, lambda: encoder.value(value.name))
    _in(".attrs", value, lambda: encoder.value(value.attrs))


def _write_frame(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Xf"
    _in(".index", value, lambda: _write_index(encoder, value.index))
    _in(".columns", value, lambda: _write_index(encoder, value.columns))
    encoder.count(value.shape[1])
    for position, name in enumerate(value.columns):
        column = value.iloc[:, position]

        def one(column: Any = column) -> None:
            _write_column(encoder, column)

        _in(f"[{_shown(name)}]", value, one)
    _in(".attrs", value, lambda: encoder.value(value.attrs))


def _numpy_value(decoder: Decoder) -> Any:
    if decoder.byte() != 0x41:
        raise decoder.fail("no numpy array where one belongs")
    array = read_numpy(decoder)
    if array.ndim != 1:
        raise decoder.fail("a column of more than one dimension")
    return array


def _chunked_value(decoder: Decoder) -> Any:
    if bytes(decoder.take(2)) != b"Pc":
        raise decoder.fail("no Arrow column where one belongs")
    return _checked(_read_chunks(decoder, _read_type(decoder)))


def _flag(decoder: Decoder) -> bool:
    flag = decoder.byte()
    if flag > 1:
        raise decoder.fail("a flag that is neither 0 nor 1")
    return flag == 1


def _read_column(decoder: Decoder) -> Any:
    """Read a column's values: a numpy array or a pandas extension array."""
    import numpy as np
    import pandas as pd

    form = decoder.byte()
    if form == 0x41:  # A: numpy
        return _numpy_value(decoder)
    if form == 0x4F:  # O: object
        return _object_array(decoder)
    if form == 0x43:  # C: categorical
        ordered = _flag(decoder)
        codes = _numpy_value(decoder)
        categories = _read_index(decoder)
        _check_categories(decoder, categories)
        return pd.Categorical.from_codes(codes, categories, ordered=ordered)
    if form == 0x5A:  # Z: time zone
        zone = read_zone(decoder)
        values = _numpy_value(decoder)
        if zone is None or values.dtype.kind != "M":
            raise decoder.fail("a column with a time zone and no times")
        return pd.DatetimeIndex(values).tz_localize("UTC").tz_convert(zone).array
    if form == 0x53:  # S: str
        na_value = pd.NA if _flag(decoder) else np.nan
        arrow = _flag(decoder)
        dtype = pd.StringDtype("pyarrow" if arrow else "python", na_value=na_value)
        if arrow:
            chunked = _chunked_value(decoder)
            if str(chunked.type) not in ("string", "large_string"):
                raise decoder.fail("a str column that holds no str")
            return dtype.__from_arrow__(chunked)
        values = _object_array(decoder)
        return pd.array(values, dtype=dtype)
    if form == 0x57:  # W: Arrow
        return pd.arrays.ArrowExtensionArray(_chunked_value(decoder))
    if form == 0x4D:  # M: nullable
        values, mask = _numpy_value(decoder), _numpy_value(decoder)
        if values.shape != mask.shape or mask.dtype != bool:
            raise decoder.fail("a nullable column whose mask does not fit")
        maker = {
            "b": pd.arrays.BooleanArray,
            "i": pd.arrays.IntegerArray,
            "u": pd.arrays.IntegerArray,
            "f": pd.arrays.FloatingArray,
        }.get(values.dtype.kind)
        if (
            maker is None
            or not values.dtype.isnative
            or values.dtype.itemsize < (4 if values.dtype.kind == "f" else 1)
        ):
            raise decoder.fail("a nullable column of no such dtype")
        return maker(values, mask)
    raise decoder.fail(f"unknown kind of column {form}")


def _object_array(decoder: Decoder) -> Any:
    import numpy as np

    decoder.enter()
    items = decoder.sequence()
    decoder.depth -= 1
    values = np.empty(len(items), dtype=object)
    # One by one: numpy would look into nested sequences.
    for position, item in enumerate(items):
        values[position] = item
    return values


def _read_index(decoder: Decoder) -> Any:
    import pandas as pd

    decoder.enter()
    decoder.charge(500, 1)
    form = decoder.byte()
    index: Any
    if form == 0x52:  # R: range
        bounds = [decoder.value() for _ in range(3)]
        if any(type(b) is not int for b in bounds) or not bounds[2]:
            raise decoder.fail("no range")
        index = pd.RangeIndex(*bounds)
        if len(index) >= 1 << 40:
            raise decoder.fail("a range too long")
    elif form == 0x54:  # T: several levels
        count = decoder.number()
        if not 0 < count <= decoder.size - decoder.pos:
            raise decoder.fail(f"index of {count} levels")
        levels, codes = [], []
        for _ in range(count):
            levels.append(_read_index(decoder))
            codes.append(_numpy_value(decoder))
        names = decoder.value()
        if type(names) is not list:
            raise decoder.fail("index names that are no list")
        decoder.depth -= 1
        for level, code in zip(levels, codes):
            _check_codes(decoder, code, len(level))
        if len({len(code) for code in codes}) != 1:
            raise decoder.fail("index levels of different lengths")
        # Checked above: pandas would check by hashing (see _check_categories).
        return pd.MultiIndex(levels, codes, names=names, verify_integrity=False)
    elif form == 0x49:  # I: flat
        values = _read_column(decoder)
        index = pd.Index(values, dtype=values.dtype, copy=False)
    else:
        raise decoder.fail(f"unknown kind of index {form}")
    index.name = decoder.value()
    decoder.depth -= 1
    return index


def _check_codes(decoder: Decoder, codes: Any, count: int) -> None:
    if codes.dtype.kind != "i" or not codes.dtype.isnative:
        raise decoder.fail("codes that are no integers")
    if len(codes) and not (codes.min() >= -1 and codes.max() < count):
        raise decoder.fail("codes out of range")


def _check_categories(decoder: Decoder, categories: Any) -> None:
    """Refuse categories whose uniqueness pandas might check in quadratic time.

    It does so by hashing, and values that collide in its tables are easily
    made. Numbers in ascending order it need not hash.
    """
    if len(categories) <= _MAX_CATEGORIES:
        return
    if _needs_hashing(categories):
        raise decoder.fail(f"more than {_MAX_CATEGORIES} unsorted categories")


def _needs_hashing(categories: Any) -> bool:
    import numpy as np

    plain = isinstance(categories.dtype, np.dtype) and categories.dtype.kind in "iufmM"
    # Asking also makes pandas remember the answer to is_unique.
    return not (plain and categories.is_monotonic_increasing)


def _attrs(decoder: Decoder) -> dict[Any, Any]:
    attrs = decoder.value()
    if type(attrs) is not dict:
        raise decoder.fail("attrs that are no dict")
    return attrs


def read_pandas(decoder: Decoder) -> Any:
    """Read a DataFrame, Series or Index."""
    import pandas as pd

    shape = decoder.byte()
    if shape == 0x69:
        return _read_index(decoder)
    index = _read_index(decoder)
    if shape == 0x73:
        values = _read_column(decoder)
        if len(values) != len(index):
            raise decoder.fail("a Series whose index does not fit")
        series = pd.Series(values, index=index, dtype=values.dtype, copy=False)
        series.name = decoder.value()
        series.attrs = _attrs(decoder)
        return series
    if shape != 0x66:
        raise decoder.fail("unknown kind of pandas value")
    columns = _read_index(decoder)
    if len(columns) > decoder.size - decoder.pos:
        raise decoder.fail(f"{len(columns)} columns named, and no room for them")
    made = {}
    for position in range(len(columns)):
        values = _read_column(decoder)
        if len(values) != len(index):
            raise decoder.fail("a column whose index does not fit")
        decoder.charge(2000)
        made[position] = pd.Series(values, index=index, dtype=values.dtype, copy=False)
    frame = pd.DataFrame(made, index=index, copy=False)
    frame.columns = columns
    frame.attrs = _attrs(decoder)
    return frame
