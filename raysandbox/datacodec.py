"""The data-only encoding of results (``results = "data"``).

`encode` runs in the jail, on whatever the task returned. `decode` runs in the
trusted worker, on bytes that the task had full control of. What it builds is
data of a closed list of exact types; no name that the bytes hold is ever looked
up as a class, function or module, and no bytes are ever unpickled.

Form::

    part 0     the structure: one tag byte for each value, then its fields
    part 1…    raw buffers, in the order in which the structure needs them

All integers are little-endian. A buffer is inline in the structure if it is
small, else it is the next part; each part is used exactly once. So a claimed
size is always checked against bytes that are really there *before* anything is
made from it, and sending little can't make much: `DecodeLimits` bounds depth,
number of values and an estimate of the memory that they will take.

What was thought of on the decoding side:

* depth: bounded, well below Python's own recursion limit;
* hash collisions: keys are hashed and the hashes sorted before anything is
  inserted; more than `MAX_SAME_HASH` keys with one full hash are refused, and
  what the comparisons among fewer will cost, nested sets included, is charged
  to a budget first (equal hashes are the only thing that makes a dict
  quadratic; hashes that agree in some bits only are spread by its probing);
* equal keys (1 and True): refused, for they would silently drop values. NaN is
  equal to nothing and hashes by identity: several may be keys;
* time zones by name: a plain zone name only, never a path;
* Arrow: arrays are built from raw buffers and a type from a closed list, so
  that no extension type and no metadata can exist (a registered extension
  type may unpickle its metadata). Sizes are checked here, contents by Arrow's
  own full validation. Views into the buffers are made only after that.

**Aliasing.** Decoded numpy arrays and Arrow data larger than a few KiB are
read-only views of the parts: the parts must stay as they are from the start
of decode() to the end of the value's life. A sealed memfd does.

Not kept: sharing (a list that occurs twice becomes two equal lists), schema
and field metadata, and a DatetimeIndex's ``freq``.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from itertools import pairwise

from raysandbox.errors import RaysandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    # Steps from an element outwards, each with the id of what it is taken in.
    Where = Callable[[int], list[tuple[str, int]]]

__all__ = [
    "DataDecodeError",
    "DataEncodeError",
    "DecodeLimits",
    "decode",
    "encode",
]

INLINE_BYTES = 4096  # larger buffers become parts of their own
MAX_SAME_HASH = 64
_COMPARE_BUDGET = 4_000_000  # element comparisons among keys with equal hashes
_PACK_FROM = 8  # shorter sequences are not worth a look for one common type
_MAX_NAME = 80
_MAX_KEY_SHOWN = 40

_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_C128 = struct.Struct("<dd")
_DELTA = struct.Struct("<iii")
_DATE = struct.Struct("<HBB")
_TIME = struct.Struct("<BBBIB")

_ZONE = re.compile(r"[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,3}", re.ASCII)
_DECIMAL = re.compile(r"-?(\d+(\.\d+)?(E[+-]\d{1,19})?|Infinity|s?NaN\d*)", re.ASCII)


class DataEncodeError(RaysandboxError):
    """The value holds something that is not plain data.

    Attributes:
        where: The place in the value (``result["a"][3]``).
        reason: What stands there, by type name, and why it can't pass.
    """

    def __init__(self, *, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}", where=where, reason=reason)
        self.where, self.reason = where, reason


class DataDecodeError(RaysandboxError):
    """The bytes are no valid encoding, or go over a limit.

    Attributes:
        reason: What is wrong with them.
        offset: Where in the structure it was noticed, in bytes.
    """

    def __init__(self, *, reason: str, offset: int = 0) -> None:
        super().__init__(
            f"data encoding, byte {offset}: {reason}", reason=reason, offset=offset
        )
        self.reason, self.offset = reason, offset


class DecodeLimits:
    """Bounds on one value; the same on both sides.

    Attributes:
        max_depth: Containers within containers.
        max_items: Values in total, each element of a container counted; array
            elements are bounded by their bytes.
        max_memory_bytes: Estimated memory of the Python objects, arrays that
            view their part not counted.
        max_parts: Buffers next to the structure.
        max_part_bytes: Size of all parts together.
        max_int_bytes: Size of one integer; of the digits of one Decimal too.
    """

    __slots__ = (
        "max_depth",
        "max_int_bytes",
        "max_items",
        "max_memory_bytes",
        "max_part_bytes",
        "max_parts",
    )

    def __init__(
        self,
        *,
        max_depth: int = 100,
        max_items: int = 20_000_000,
        max_memory_bytes: int = 4 << 30,
        max_parts: int = 65_536,
        max_part_bytes: int = 16 << 30,
        max_int_bytes: int = 65_536,
    ) -> None:
        self.max_depth = max_depth
        self.max_items = max_items
        self.max_memory_bytes = max_memory_bytes
        self.max_parts = max_parts
        self.max_part_bytes = max_part_bytes
        self.max_int_bytes = max_int_bytes

    @classmethod
    def for_result(cls, max_result_bytes: int) -> DecodeLimits:
        """Return the limits that go with a profile's largest result.

        Objects may take eight times the bytes that describe them, which is what
        lists of small values come to.
        """
        return cls(
            max_part_bytes=max_result_bytes,
            max_memory_bytes=(64 << 20) + 8 * max_result_bytes,
        )


# --- encoding (in the jail) ---------------------------------------------------


class RefusedError(Exception):
    """A value that can't pass, on its way up; each container adds its step."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[tuple[str, int]] = []  # innermost first


def type_name(value: object) -> str:
    """Return a type's full name, shortened if it is absurdly long."""
    kind = type(value)
    module = kind.__module__
    name = (
        kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    )
    return name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "…"


def _shown(key: object) -> str:
    if type(key) is str:
        text = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    else:
        text = repr(key)
    return text if len(text) <= _MAX_KEY_SHOWN else text[:_MAX_KEY_SHOWN] + "…"


class Encoder:
    """Writes one value; `arrays` (loaded on need) adds numpy, Arrow, pandas."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.limits = limits
        self.out = bytearray()
        self.parts: list[bytes | memoryview] = []
        self.items = 0
        self.depth = 0
        self.part_bytes = 0

    def value(self, value: Any) -> None:
        """Append one value of any encodable type."""
        writer = _WRITERS.get(type(value))
        if writer is None:
            writer = _find_writer(value)
        writer(self, value)

    def buffer(self, data: bytes | memoryview) -> None:
        """Append raw bytes: inline if few, else as a part of their own."""
        size = len(data)
        if size <= INLINE_BYTES:
            self.out += b"\0" + _U32.pack(size) + data
            return
        self.out += b"\1" + _U64.pack(size)
        self.parts.append(data)
        self.part_bytes += size
        limits = self.limits
        if len(self.parts) > limits.max_parts:
            raise RefusedError(f"more than {limits.max_parts} large buffers")
        if self.part_bytes > limits.max_part_bytes:
            raise RefusedError(f"more than {limits.max_part_bytes} bytes in all")

    def text(self, text: str) -> None:
        """Append a short string, such as a name."""
        self.buffer(text.encode("utf-8", "surrogatepass"))

    def number(self, number: int) -> None:
        """Append an unsigned 64-bit number."""
        self.out += _U64.pack(number)

    def count(self, items: int) -> None:
        """Account for this many values."""
        self.items += items
        if self.items > self.limits.max_items:
            raise RefusedError(f"more than {self.limits.max_items} values in all")

    def enter(self) -> None:
        """Account for one more level of containers."""
        self.depth += 1
        if self.depth > self.limits.max_depth:
            raise RefusedError(f"more than {self.limits.max_depth} containers deep")

    def sequence(self, value: Sequence[Any], where: Where) -> None:
        """Append the elements of a list or tuple.

        Elements that all have one simple type are packed, for that is what
        large lists are made of, and packing them is done in C.

        Args:
            value: The elements.
            where: The steps that lead to one of them, for errors.
        """
        count = len(value)
        self.count(count)
        if count >= _PACK_FROM:
            kinds = set(map(type, value))
            if len(kinds) == 1:
                kind = next(iter(kinds))
                pack = _PACKERS.get(kind)
                if pack is not None and pack(self, value):
                    return
                if kind in _ROWS and self._rows(kind, value, where):
                    return
            elif len(kinds) == 2 and _NONE in kinds:
                kinds.discard(_NONE)
                if self._optional(value, _PACKERS.get(next(iter(kinds)))):
                    return
        self.out += b"j%c" % count if count < 256 else b"g" + _U64.pack(count)
        done = 0
        get = _WRITERS.get
        try:
            for item in value:
                (get(type(item)) or _find_writer(item))(self, item)
                done += 1
        except RefusedError as refused:
            refused.steps += where(done)
            raise

    def _rows(self, kind: type, value: Sequence[Any], where: Where) -> bool:
        """Append rows of one form as columns; False if they have not one form.

        A column mostly has one type, which packs; a row mostly has not.
        """
        width = len(value[0])
        if not 0 < width < 256 or set(map(len, value)) != {width}:
            return False
        keys: list[Any] = []
        columns: Iterable[Sequence[Any]]
        if kind is dict:
            # The same objects as keys: equal ones may differ in type (1, True).
            keys = list(value[0])
            ids = [*map(id, keys)]
            if any([*map(id, row)] != ids for row in value):
                return False
            columns = zip(*[row.values() for row in value])
        else:
            columns = zip(*value)
        self.out += b"r" + _ROWS[kind] + bytes([width])
        self.enter()
        if keys:
            self.sequence(keys, _steps(value[0], ".<key {}>".format))
        for number, column in enumerate(columns):
            shown = f"[{_shown(keys[number])}]" if keys else f"[{number}]"
            self.sequence(column, _within(value, shown, where))
        self.depth -= 1
        return True

    def _optional(
        self,
        value: Sequence[Any],
        pack: Callable[[Encoder, Sequence[Any]], bool] | None,
    ) -> bool:
        """Pack a sequence of one simple type and None; False if it can't be."""
        if pack is None:
            return False
        mark = len(self.out), len(self.parts), self.part_bytes
        self.out += b"?"
        self.buffer(bytes([item is not None for item in value]))
        if pack(self, [item for item in value if item is not None]):
            return True
        del self.out[mark[0] :], self.parts[mark[1] :]
        self.part_bytes = mark[2]
        return False


_NONE = type(None)
_ROWS: dict[type, bytes] = {tuple: b"t", list: b"l", dict: b"m"}


def _steps(owner: object, step: Callable[[int], str]) -> Where:
    """Return how errors lead from a container to one of its elements."""
    return lambda at: [(step(at), id(owner))]


def _within(rows: Sequence[Any], shown: str, where: Where) -> Where:
    """Return how errors lead to an element of one column of rows."""
    return lambda at: [(shown, id(rows[at])), *where(at)]


def _pack_numbers(code: str, tag: bytes) -> Callable[[Encoder, Sequence[Any]], bool]:
    def pack(encoder: Encoder, value: Sequence[Any]) -> bool:
        try:
            packed = array(code, value)
        except OverflowError:
            return False  # a larger int among them
        if sys.byteorder == "big":
            packed.byteswap()
        encoder.out += tag
        encoder.buffer(memoryview(packed).cast("B"))
        return True

    return pack


def _pack_str(encoder: Encoder, value: Sequence[str]) -> bool:
    text = "".join(value)
    lengths = array("Q", map(len, value))
    if sys.byteorder == "big":
        lengths.byteswap()
    encoder.out += b"a" if text.isascii() else b"u"
    encoder.buffer(memoryview(lengths).cast("B"))
    encoder.buffer(text.encode("utf-8", "surrogatepass"))
    return True


def _pack_bytes(encoder: Encoder, value: Sequence[bytes]) -> bool:
    lengths = array("Q", map(len, value))
    if sys.byteorder == "big":
        lengths.byteswap()
    encoder.out += b"y"
    encoder.buffer(memoryview(lengths).cast("B"))
    encoder.buffer(b"".join(value))
    return True


def _pack_bool(encoder: Encoder, value: Sequence[bool]) -> bool:
    encoder.out += b"o"
    encoder.buffer(bytes(value))
    return True


_PACKERS: dict[type, Callable[[Encoder, Sequence[Any]], bool]] = {
    int: _pack_numbers("q", b"q"),
    float: _pack_numbers("d", b"d"),
    str: _pack_str,
    bytes: _pack_bytes,
    bool: _pack_bool,
}


def _write_none(encoder: Encoder, _: None) -> None:
    encoder.out += b"N"


def _write_bool(encoder: Encoder, value: bool) -> None:
    encoder.out += b"T" if value else b"F"


def _write_int(encoder: Encoder, value: int) -> None:
    try:
        encoder.out += b"i" + _I64.pack(value)
    except struct.error:
        size = value.bit_length() // 8 + 1
        if size > encoder.limits.max_int_bytes:
            raise RefusedError(
                f"int of {size} bytes, more than {encoder.limits.max_int_bytes}"
            ) from None
        encoder.out += b"I"
        encoder.buffer(value.to_bytes(size, "little", signed=True))


def _write_float(encoder: Encoder, value: float) -> None:
    encoder.out += b"f" + _F64.pack(value)


def _write_complex(encoder: Encoder, value: complex) -> None:
    encoder.out += b"c" + _C128.pack(value.real, value.imag)


_SHORT = [b"x" + bytes([size]) for size in range(256)]


def _write_str(encoder: Encoder, value: str) -> None:
    size = len(value)
    if size < 256 and value.isascii():
        encoder.out += _SHORT[size]
        encoder.out += value.encode("ascii")
        return
    encoder.out += b"s" if value.isascii() else b"S"
    encoder.buffer(value.encode("utf-8", "surrogatepass"))


def _write_bytes(encoder: Encoder, value: bytes) -> None:
    encoder.out += b"b"
    encoder.buffer(memoryview(value) if len(value) > INLINE_BYTES else value)


def _write_list(encoder: Encoder, value: list[Any] | tuple[Any, ...]) -> None:
    encoder.out += b"l" if type(value) is list else b"t"
    encoder.enter()
    encoder.sequence(value, _steps(value, "[{}]".format))
    encoder.depth -= 1


def _write_set(encoder: Encoder, value: set[Any] | frozenset[Any]) -> None:
    encoder.out += b"e" if type(value) is set else b"z"
    encoder.enter()
    encoder.sequence(list(value), _steps(value, ".<element>".format))
    encoder.depth -= 1


def _write_dict(encoder: Encoder, value: dict[Any, Any]) -> None:
    encoder.out += b"m"
    encoder.enter()
    keys = list(value)
    encoder.sequence(keys, _steps(value, ".<key {}>".format))
    encoder.sequence(
        list(value.values()), _steps(value, lambda at: f"[{_shown(keys[at])}]")
    )
    encoder.depth -= 1


_WRITERS: dict[type, Callable[[Encoder, Any], None]] = {
    type(None): _write_none,
    bool: _write_bool,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: _write_str,
    bytes: _write_bytes,
    list: _write_list,
    tuple: _write_list,
    set: _write_set,
    frozenset: _write_set,
    dict: _write_dict,
}


def _write_uuid(encoder: Encoder, value: Any) -> None:
    encoder.out += b"w" + value.bytes


def _write_decimal(encoder: Encoder, value: Any) -> None:
    sign, digits, exponent = value.as_tuple()
    if len(digits) > encoder.limits.max_int_bytes:
        raise RefusedError(
            f"Decimal of {len(digits)} digits, more than {encoder.limits.max_int_bytes}"
        )
    # Not str(): its exponent form depends on the value, and this one is exact.
    text = "-" if sign else ""
    plain = "".join(map(str, digits))
    if exponent == "F":
        text += "Infinity"
    elif exponent in ("n", "N"):
        text += ("s" if exponent == "N" else "") + "NaN" + plain
    else:
        text += f"{plain}E{exponent:+d}"
    encoder.out += b"n"
    encoder.text(text)


def _write_date(encoder: Encoder, value: Any) -> None:
    encoder.out += b"D" + _DATE.pack(value.year, value.month, value.day)


def _time_fields(value: Any) -> bytes:
    return _TIME.pack(
        value.hour, value.minute, value.second, value.microsecond, value.fold
    )


def _write_time(encoder: Encoder, value: Any) -> None:
    encoder.out += b"h" + _time_fields(value)
    write_zone(encoder, value.tzinfo)


def _write_datetime(encoder: Encoder, value: Any) -> None:
    date = _DATE.pack(value.year, value.month, value.day)
    encoder.out += b"k" + date + _time_fields(value)
    write_zone(encoder, value.tzinfo)


def _write_delta(encoder: Encoder, value: Any) -> None:
    encoder.out += b"r" + _DELTA.pack(value.days, value.seconds, value.microseconds)


def _write_zone_value(encoder: Encoder, value: Any) -> None:
    encoder.out += b"Z"
    write_zone(encoder, value)


def write_zone(encoder: Encoder, zone: Any) -> None:
    """Append a tzinfo: none, a fixed offset, or the name of a zone."""
    kind = type(zone)
    if zone is None:
        encoder.out += b"\0"
    elif kind is _loaded("datetime", "timezone"):
        arguments = zone.__getinitargs__()
        delta = arguments[0]
        encoder.out += b"\1" + _DELTA.pack(
            delta.days, delta.seconds, delta.microseconds
        )
        encoder.value(arguments[1] if len(arguments) > 1 else None)
    elif kind is _loaded("zoneinfo", "ZoneInfo"):
        if zone.key is None or not _ZONE.fullmatch(zone.key):
            raise RefusedError(f"time zone without a plain name: {_shown(zone.key)}")
        encoder.out += b"\2"
        encoder.text(zone.key)
    else:
        raise RefusedError(
            f"tzinfo of type {type_name(zone)} (only datetime.timezone and "
            "zoneinfo.ZoneInfo can pass)"
        )


def _loaded(module: str, name: str) -> Any:
    """Return a class only if its module is loaded: nobody else has instances."""
    return getattr(sys.modules.get(module), name, None)


_LATER: tuple[tuple[str, str, Callable[[Encoder, Any], None]], ...] = (
    ("datetime", "datetime", _write_datetime),
    ("datetime", "date", _write_date),
    ("datetime", "time", _write_time),
    ("datetime", "timedelta", _write_delta),
    ("datetime", "timezone", _write_zone_value),
    ("zoneinfo", "ZoneInfo", _write_zone_value),
    ("decimal", "Decimal", _write_decimal),
    ("uuid", "UUID", _write_uuid),
)


def _find_writer(value: object) -> Callable[[Encoder, Any], None]:
    """Find the writer of a type that is not built in, and remember it."""
    kind = type(value)
    for module, name, writer in _LATER:
        if kind is _loaded(module, name):
            _WRITERS[kind] = writer
            return writer
    if any(name in sys.modules for name in ("numpy", "pyarrow", "pandas")):
        from raysandbox import datacodec_arrays

        found = datacodec_arrays.find_writer(kind)
        if found is not None:
            _WRITERS[kind] = found
            return found
    raise RefusedError(_why_refused(value))


def _why_refused(value: object) -> str:
    kind = type(value)
    reason = f"type {type_name(value)} is not plain data"
    for base in kind.__mro__[1:]:
        if base in _WRITERS or any(base is _loaded(m, n) for m, n, _ in _LATER):
            name = base.__qualname__
            return f"{reason} (a subclass of {name}; convert it to {name} itself)"
    return reason


def encode(
    value: object, limits: DecodeLimits | None = None
) -> list[bytes | memoryview]:
    """Encode a value as structure and raw buffers.

    Args:
        value: Anything of the types listed in the profile documentation.
        limits: What the decoding side will accept; the default limits if None.

    Returns:
        Part 0, the structure, and any number of raw buffers. Those are views
        of the value's own memory where it has any: don't change it before
        they are sent.

    Raises:
        DataEncodeError: Something in the value is not plain data, contains
            itself, or goes over a limit.
    """
    encoder = Encoder(limits or DecodeLimits())
    try:
        encoder.value(value)
    except RefusedError as refused:
        raise _located(refused) from None
    except RecursionError:
        raise DataEncodeError(where="result", reason="nested too deeply") from None
    return [bytes(encoder.out), *encoder.parts]


def _located(refused: RefusedError) -> DataEncodeError:
    steps = list(reversed(refused.steps))
    seen: dict[int, int] = {}
    for level, (_, owner) in enumerate(steps):
        if owner in seen:
            # Found only once the depth limit was hit; the place that matters is
            # where the container first contains itself.
            first = "".join(step for step, _ in steps[: seen[owner]])
            where = "".join(step for step, _ in steps[:level])
            return DataEncodeError(
                where=f"result{where}",
                reason=f"contains itself (it is result{first} again)",
            )
        seen[owner] = level
    path = "".join(step for step, _ in steps)
    if len(path) > 400:
        path = path[:300] + "…" + path[-80:]
    return DataEncodeError(where=f"result{path}", reason=refused.reason)


# --- decoding (in the trusted worker) -----------------------------------------


class Decoder:
    """Reads one value from hostile bytes."""

    def __init__(self, parts: Sequence[memoryview], limits: DecodeLimits) -> None:
        self.limits = limits
        # A copy, for speed (bytes are indexed faster) and so that at least the
        # structure can't change between a check and its use.
        self.buf = bytes(parts[0])
        self.size = len(self.buf)
        self.pos = 0
        self.parts = parts
        self.next_part = 1
        self.depth = 0
        self.items = 0
        self.memory_bytes = 0
        self.compares = 0

    # Reading.

    def fail(self, reason: str) -> DataDecodeError:
        """Return the error for this place."""
        return DataDecodeError(reason=reason, offset=self.pos)

    def take(self, count: int) -> bytes:
        """Return the next bytes of the structure."""
        start, end = self.pos, self.pos + count
        if end > self.size:
            raise self.fail("the structure ends early")
        self.pos = end
        return self.buf[start:end]

    def byte(self) -> int:
        """Read one byte."""
        return self.take(1)[0]

    def number(self) -> int:
        """Read an unsigned 64-bit number."""
        return int(_U64.unpack(self.take(8))[0])

    def buffer(self) -> bytes | memoryview:
        """Return a raw buffer: inline bytes or the next part."""
        how = self.byte()
        if how == 0:
            size = _U32.unpack(self.take(4))[0]
            if size > INLINE_BYTES:
                raise self.fail(f"inline buffer of {size} bytes")
            return self.take(size)
        if how != 1:
            raise self.fail(f"buffer kind {how}")
        size = self.number()
        if self.next_part >= len(self.parts):
            raise self.fail("more buffers named than sent")
        part = self.parts[self.next_part]
        self.next_part += 1
        if len(part) != size:
            raise self.fail(f"buffer of {len(part)} bytes where {size} are named")
        return part

    def text(self) -> str:
        """Read a short string."""
        raw = self.buffer()
        if len(raw) > INLINE_BYTES:
            raise self.fail("a name too long")
        return str(raw, "utf-8", "surrogatepass")

    def charge(self, memory_bytes: int, items: int = 0) -> None:
        """Account for memory and values that are about to be made."""
        self.memory_bytes += memory_bytes
        if self.memory_bytes > self.limits.max_memory_bytes:
            raise self.fail(
                f"more than {self.limits.max_memory_bytes} bytes of objects"
            )
        self.items += items
        if self.items > self.limits.max_items:
            raise self.fail(f"more than {self.limits.max_items} values")

    def enter(self) -> None:
        """Account for one more level of containers."""
        self.depth += 1
        if self.depth > self.limits.max_depth:
            raise self.fail(f"more than {self.limits.max_depth} containers deep")

    # Values.

    def value(self) -> Any:
        """Read one value."""
        pos = self.pos
        self.pos = pos + 1
        return _READERS[self.buf[pos]](self)

    def sequence(self, item_bytes: int = 64) -> list[Any]:
        """Read the elements of a list or tuple.

        Args:
            item_bytes: Memory to charge for each, small objects included.
        """
        kind = self.byte()
        if kind == 0x6A or kind == 0x67:  # j, g: of any types
            count = self.byte() if kind == 0x6A else self.number()
            # Each value takes a byte at least.
            if count > self.size - self.pos:
                raise self.fail(f"{count} values named, and no room for them")
            self.charge(56 + item_bytes * count, count)
            buf, readers = self.buf, _READERS
            out = []
            for _ in range(count):
                pos = self.pos
                self.pos = pos + 1
                out.append(readers[buf[pos]](self))
            return out
        if kind == 0x72:  # r: rows of one form, as columns
            return self._rows()
        if kind == 0x3F:  # ?: one type and None
            present = self._flags()
            self.charge(8 * len(present), len(present))
            kind = self.byte()
            given = self._packed(kind)
            if len(given) != sum(present):
                raise self.fail("values do not match their None flags")
            items = iter(given)
            return [next(items) if flag else None for flag in present]
        return self._packed(kind)

    def _rows(self) -> list[Any]:
        form, width = self.byte(), self.byte()
        if form not in b"tlm" or not width:
            raise self.fail("rows of no known form")
        self.enter()
        keys: list[Any] = []
        if form == 0x6D:
            keys = self.sequence()
            self.check_keys(keys)
            if len(keys) != width:
                raise self.fail(f"{len(keys)} keys for {width} values")
        columns = [self.sequence() for _ in range(width)]
        count = len(columns[0])
        if any(len(column) != count for column in columns):
            raise self.fail("columns of different lengths")
        self.charge((64 + (104 if keys else 8) * width) * count, count)
        self.depth -= 1
        rows: list[Any] = list(zip(*columns))
        if form == 0x6C:
            return list(map(list, rows))
        if form == 0x6D:
            rows = [dict(zip(keys, row)) for row in rows]
            if count and len(rows[0]) != width:
                raise self.fail("two keys are equal")
        return rows

    def _flags(self) -> bytes:
        raw = bytes(self.buffer())
        if raw.translate(None, b"\0\1"):
            raise self.fail("a flag that is neither 0 nor 1")
        return raw

    def _packed(self, kind: int) -> list[Any]:
        if kind == 0x71 or kind == 0x64:  # q, d: numbers
            raw = self.buffer()
            if len(raw) % 8:
                raise self.fail("packed numbers of a broken length")
            self.charge(5 * len(raw), len(raw) // 8)
            packed = array("q" if kind == 0x71 else "d")
            packed.frombytes(raw)
            if sys.byteorder == "big":
                packed.byteswap()
            return packed.tolist()
        if kind == 0x6F:  # o: bools
            flags = self._flags()
            self.charge(8 * len(flags), len(flags))
            return list(map(bool, flags))
        if kind not in (0x61, 0x75, 0x79):  # a, u, y: str (ASCII, any), bytes
            raise self.fail(f"unknown kind of sequence {kind}")
        raw_lengths = self.buffer()
        if len(raw_lengths) % 8:
            raise self.fail("packed lengths of a broken length")
        lengths = array("Q")
        lengths.frombytes(raw_lengths)
        if sys.byteorder == "big":
            lengths.byteswap()
        raw = self.buffer()
        self.charge(72 * len(lengths) + (9 if kind == 0x75 else 2) * len(raw))
        self.charge(0, len(lengths))
        whole: Any = (
            bytes(raw)
            if kind == 0x79
            else str(raw, "ascii" if kind == 0x61 else "utf-8", "surrogatepass")
        )
        if sum(lengths) != len(whole):
            raise self.fail("packed texts do not match their lengths")
        out = []
        start = 0
        for length in lengths:
            end = start + length
            out.append(whole[start:end])
            start = end
        return out

    # Keys.

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse keys whose insertion would take more than linear time."""
        if len(keys) <= MAX_SAME_HASH and _ATOMS.issuperset(map(type, keys)):
            return
        try:
            hashes = list(map(hash, keys))
        except (TypeError, ValueError, OverflowError) as error:
            raise self.fail(f"a key can't be hashed: {error}") from None
        # A hash is an int of 64 bits, and those hash modulo 2**61 - 1: at most
        # nine share one, so this set can't be made slow, unlike one of the keys.
        if len(set(hashes)) == len(hashes):
            return
        ordered = sorted(hashes)
        groups: dict[int, int] = {}
        run = 1
        for before, here in pairwise(ordered):
            run = run + 1 if here == before else 1
            if run == 2:
                groups[here] = 0
            if run > MAX_SAME_HASH:
                raise self.fail(f"more than {MAX_SAME_HASH} keys share one hash")
        for hashed in hashes:
            if hashed in groups:
                groups[hashed] += 1
        for key, hashed in zip(keys, hashes):
            if hashed in groups:
                self._charge_compare(key, groups[hashed])

    def _charge_compare(self, key: Any, times: int) -> None:
        """Charge for comparing a key with ``times`` others of equal hash.

        Comparing two frozensets looks each element of one up in the other,
        which again compares elements of equal hash: the cost multiplies with
        each level, so it has to be known before the first comparison.
        """
        kind = type(key)
        if kind is tuple:
            self._spend(times)
            for item in key:
                self._charge_compare(item, times)
        elif kind is frozenset:
            self._spend(times)
            hashes = list(map(hash, key))
            ordered = sorted(hashes)
            longest = run = 1
            for before, here in pairwise(ordered):
                run = run + 1 if here == before else 1
                longest = max(longest, run)
            for item in key:
                self._charge_compare(item, times * longest)
        else:
            self._spend(times * (1 + sys.getsizeof(key) // 256))

    def _spend(self, compares: int) -> None:
        self.compares += compares
        if self.compares > _COMPARE_BUDGET:
            raise self.fail("keys made to be compared with each other too often")


def _read_int(decoder: Decoder) -> int:
    pos = decoder.pos
    decoder.pos = pos + 8
    # Beyond the end this raises struct.error, which decode() turns into ours.
    return int(_I64.unpack_from(decoder.buf, pos)[0])


def _read_big_int(decoder: Decoder) -> int:
    raw = decoder.buffer()
    if len(raw) > decoder.limits.max_int_bytes:
        raise decoder.fail(f"int of {len(raw)} bytes")
    decoder.charge(2 * len(raw))
    return int.from_bytes(raw, "little", signed=True)


def _read_float(decoder: Decoder) -> float:
    pos = decoder.pos
    decoder.pos = pos + 8
    return float(_F64.unpack_from(decoder.buf, pos)[0])


def _read_complex(decoder: Decoder) -> complex:
    return complex(*_C128.unpack(decoder.take(16)))


def _read_short(decoder: Decoder) -> str:
    buf, pos = decoder.buf, decoder.pos + 1
    end = pos + buf[pos - 1]
    if end > decoder.size:
        raise decoder.fail("the structure ends early")
    decoder.pos = end
    return buf[pos:end].decode("ascii")


def _read_ascii(decoder: Decoder) -> str:
    raw = decoder.buffer()
    decoder.charge(50 + len(raw))
    return str(raw, "ascii")


def _read_str(decoder: Decoder) -> str:
    raw = decoder.buffer()
    # One character beyond the BMP makes every character take four bytes.
    decoder.charge(76 + 4 * len(raw))
    return str(raw, "utf-8", "surrogatepass")


def _read_bytes(decoder: Decoder) -> bytes:
    raw = decoder.buffer()
    decoder.charge(40 + len(raw))
    return bytes(raw)


def _read_list(decoder: Decoder) -> list[Any]:
    decoder.enter()
    value = decoder.sequence()
    decoder.depth -= 1
    return value


def _read_tuple(decoder: Decoder) -> tuple[Any, ...]:
    return tuple(_read_list(decoder))


def _read_elements(decoder: Decoder) -> list[Any]:
    value = _read_list(decoder)
    decoder.charge(216 + 64 * len(value))
    decoder.check_keys(value)
    return value


def _hashed(decoder: Decoder, made: Any, count: int) -> Any:
    if len(made) != count:
        raise decoder.fail("two keys are equal")
    return made


def _read_set(decoder: Decoder) -> set[Any]:
    value = _read_elements(decoder)
    made: set[Any] = _hashed(decoder, set(value), len(value))
    return made


def _read_frozenset(decoder: Decoder) -> frozenset[Any]:
    value = _read_elements(decoder)
    made: frozenset[Any] = _hashed(decoder, frozenset(value), len(value))
    return made


def _read_dict(decoder: Decoder) -> dict[Any, Any]:
    decoder.enter()
    keys = decoder.sequence(168)
    decoder.check_keys(keys)
    values = decoder.sequence()
    decoder.depth -= 1
    if len(keys) != len(values):
        raise decoder.fail(f"{len(keys)} keys for {len(values)} values")
    made: dict[Any, Any] = _hashed(decoder, dict(zip(keys, values)), len(keys))
    return made


def _read_uuid(decoder: Decoder) -> Any:
    from uuid import UUID

    return UUID(bytes=bytes(decoder.take(16)))


def _read_decimal(decoder: Decoder) -> Any:
    from decimal import Decimal

    raw = decoder.buffer()
    if len(raw) > decoder.limits.max_int_bytes + 32:
        raise decoder.fail(f"Decimal of {len(raw)} characters")
    text = str(raw, "ascii")
    if not _DECIMAL.fullmatch(text):
        raise decoder.fail("no Decimal")
    decoder.charge(104 + len(text))
    # Exact: the context's precision bounds operations, not construction.
    return Decimal(text)


def _read_date(decoder: Decoder) -> Any:
    from datetime import date

    return date(*_DATE.unpack(decoder.take(4)))


def _read_time(decoder: Decoder) -> Any:
    from datetime import time

    hour, minute, second, microsecond, fold = _TIME.unpack(decoder.take(8))
    zone = read_zone(decoder)
    return time(hour, minute, second, microsecond, zone, fold=fold)


def _read_datetime(decoder: Decoder) -> Any:
    from datetime import datetime

    year, month, day = _DATE.unpack(decoder.take(4))
    hour, minute, second, microsecond, fold = _TIME.unpack(decoder.take(8))
    zone = read_zone(decoder)
    return datetime(
        year, month, day, hour, minute, second, microsecond, zone, fold=fold
    )


def _read_delta(decoder: Decoder) -> Any:
    from datetime import timedelta

    days, seconds, microseconds = _DELTA.unpack(decoder.take(12))
    if not (0 <= seconds < 86_400 and 0 <= microseconds < 1_000_000):
        raise decoder.fail("a timedelta that is not in normal form")
    return timedelta(days, seconds, microseconds)


def _read_zone_value(decoder: Decoder) -> Any:
    zone = read_zone(decoder)
    if zone is None:
        raise decoder.fail("no time zone")
    return zone


def read_zone(decoder: Decoder) -> Any:
    """Read a tzinfo or None."""
    kind = decoder.byte()
    if kind == 0:
        return None
    if kind == 1:
        from datetime import timezone

        delta = _read_delta(decoder)
        name = decoder.value()
        if name is None:
            return timezone(delta)
        if type(name) is not str or len(name) > INLINE_BYTES:
            raise decoder.fail("a time zone's name is no short str")
        return timezone(delta, name)
    if kind == 2:
        from zoneinfo import ZoneInfo

        name = decoder.text()
        if not _ZONE.fullmatch(name):
            raise decoder.fail(f"no time zone name: {_shown(name)}")
        return ZoneInfo(name)
    raise decoder.fail(f"unknown kind of time zone {kind}")


def _read_array(decoder: Decoder) -> Any:
    from raysandbox import datacodec_arrays

    return datacodec_arrays.read_numpy(decoder)


def _read_scalar(decoder: Decoder) -> Any:
    from raysandbox import datacodec_arrays

    return datacodec_arrays.read_numpy_scalar(decoder)


def _read_arrow(decoder: Decoder) -> Any:
    from raysandbox import datacodec_arrays

    return datacodec_arrays.read_arrow(decoder)


def _read_pandas(decoder: Decoder) -> Any:
    from raysandbox import datacodec_arrays

    return datacodec_arrays.read_pandas(decoder)


def _read_unknown(decoder: Decoder) -> Any:
    decoder.pos -= 1
    raise decoder.fail(f"unknown tag {decoder.buf[decoder.pos]}")


_READERS: list[Callable[[Decoder], Any]] = [_read_unknown] * 256
for _tag, _reader in {
    "N": lambda _: None,
    "T": lambda _: True,
    "F": lambda _: False,
    "i": _read_int,
    "I": _read_big_int,
    "f": _read_float,
    "c": _read_complex,
    "x": _read_short,
    "s": _read_ascii,
    "S": _read_str,
    "b": _read_bytes,
    "l": _read_list,
    "t": _read_tuple,
    "e": _read_set,
    "z": _read_frozenset,
    "m": _read_dict,
    "w": _read_uuid,
    "n": _read_decimal,
    "D": _read_date,
    "h": _read_time,
    "k": _read_datetime,
    "r": _read_delta,
    "Z": _read_zone_value,
    "A": _read_array,
    "G": _read_scalar,
    "P": _read_arrow,
    "X": _read_pandas,
}.items():
    _READERS[ord(_tag)] = _reader
# Keys whose comparison costs no more than their size.
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))


def decode(
    parts: Sequence[memoryview | bytes], limits: DecodeLimits | None = None
) -> Any:
    """Decode what `encode` made, or refuse it.

    Args:
        parts: Structure and buffers, as sent; from anyone. They must not change
            while this runs nor while the value is in use.
        limits: Bounds on what may be built; the default limits if None.

    Raises:
        DataDecodeError: The bytes are no valid encoding or go over a limit.
            No other exception leaves this function, whatever the bytes are.
    """
    limits = limits or DecodeLimits()
    decoder: Decoder | None = None
    try:
        views = _views(parts, limits)
        decoder = Decoder(views, limits)
        value = decoder.value()
        if decoder.pos != decoder.size:
            raise decoder.fail("bytes after the value")
        if decoder.next_part != len(views):
            raise decoder.fail("buffers that nothing names")
        return value
    except DataDecodeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a constructor objects to
        # numpy, pyarrow, pandas, datetime…: their refusals are the data's fault.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        offset = decoder.pos if decoder is not None else 0
        if decoder is not None and offset > decoder.size:
            # The readers of single values leave the bounds check to Python.
            reason = "the structure ends early"
        raise DataDecodeError(reason=reason, offset=offset) from None


def _views(
    parts: Iterable[memoryview | bytes], limits: DecodeLimits
) -> list[memoryview]:
    views = [memoryview(part).toreadonly().cast("B") for part in parts]
    if not views:
        raise DataDecodeError(reason="no structure")
    if len(views) - 1 > limits.max_parts:
        raise DataDecodeError(reason=f"more than {limits.max_parts} buffers")
    if sum(map(len, views)) > limits.max_part_bytes:
        raise DataDecodeError(reason=f"more than {limits.max_part_bytes} bytes")
    return views
