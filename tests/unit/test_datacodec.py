"""The data-only encoding: what passes, what is refused, and hostile bytes."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import uuid
import zoneinfo
from typing import Any

import numpy as np
import pandas as pd
import pandas.testing as pdt
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysandbox import datacodec
from raysandbox.datacodec import (
    DataDecodeError,
    DataEncodeError,
    DecodeLimits,
    decode,
    encode,
)

FUZZ_CASES = int(os.environ.get("RAYSANDBOX_TEST_FUZZ_CASES", "20000"))


def again(value: Any) -> Any:
    """Return what the other side gets."""
    return decode([memoryview(part) for part in encode(value)])


def canonical(value: Any) -> str:
    """Write a value so that equal text is equal type, order and contents."""
    name = type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{name}({', '.join(map(canonical, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{name}({', '.join(sorted(map(canonical, value)))})"
    if isinstance(value, dict):
        return f"dict({canonical(list(value))}, {canonical(list(value.values()))})"
    if isinstance(value, (dt.datetime, dt.time)):
        return f"{value!r} fold={value.fold}"
    return f"{name} {value!r}"


def same(one: Any, two: Any) -> bool:
    return canonical(one) == canonical(two)


ZONES = st.one_of(
    st.none(),
    st.builds(
        dt.timezone,
        st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)),
    ),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Argentina/Ushuaia"]).map(
        zoneinfo.ZoneInfo
    ),
)
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=20),
    st.binary(max_size=20),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.dates(),
    st.timedeltas(),
    st.times(),
    st.datetimes(timezones=ZONES),
)
KEYS = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=4)),
    max_leaves=6,
)
VALUES = st.recursive(
    KEYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=12),
        st.lists(inner, max_size=12).map(tuple),
        st.dictionaries(KEYS, inner, max_size=8),
        st.sets(KEYS, max_size=8),
    ),
    max_leaves=40,
)


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(VALUES)
def test_plain_values_come_back_the_same(value: Any) -> None:
    """Any nest of plain values returns equal, in exact types and order."""
    assert same(again(value), value)


@settings(deadline=None, max_examples=100)
@given(
    st.one_of(
        st.lists(st.integers(-(2**70), 2**70), min_size=8),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8),
        st.lists(st.floats(), min_size=8),
        st.lists(st.text(st.characters(codec=None)), min_size=8),
        st.lists(st.binary(), min_size=8),
        st.lists(st.booleans(), min_size=8),
        st.lists(st.one_of(st.none(), st.text()), min_size=8),
        st.lists(st.one_of(st.none(), st.integers()), min_size=8),
        st.lists(st.one_of(st.integers(), st.booleans(), st.floats()), min_size=8),
    )
)
def test_packed_lists_come_back_the_same(value: list[Any]) -> None:
    """Long lists of one type take another path, with the same result."""
    assert same(again(value), value)


ROWS = st.integers(1, 4).flatmap(
    lambda width: st.one_of(
        st.lists(st.tuples(*[HASHABLE] * width), min_size=8),
        st.lists(st.lists(HASHABLE, min_size=width, max_size=width), min_size=8),
        st.lists(
            st.fixed_dictionaries({f"k{n}": HASHABLE for n in range(width)}),
            min_size=8,
        ),
    )
)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(ROWS)
def test_rows_come_back_the_same(value: list[Any]) -> None:
    """Rows of one form go as columns, with the same result."""
    assert same(again(value), value)


def test_rows_whose_keys_are_only_equal_keep_their_own() -> None:
    """{1: …} and {True: …} are equal in keys and no rows of one form."""
    value = [{1: "a"}] * 5 + [{True: "b"}] * 5 + [{1.0: "c"}] * 5
    assert same(again(value), value)
    rows = [{"k": n, 2: [n]} for n in range(9)]
    assert same(again(rows), rows)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        10**300,
        "\ud800",
        "é" * 5000,
        b"x" * 9999,
        {0, "", b"", -1, -2},
        {(-1, -1), (-1, -2), (-2, -1), (-2, -2)},
        {None: 1, True: 2, 2.5: 3},
        {float("nan"): 1, (float("nan"),): 2},
        [float("nan"), float("-inf"), -0.0],
        decimal.Decimal("1.50"),
        decimal.Decimal("-0E+10"),
        decimal.Decimal("-Infinity"),
        decimal.Decimal("NaN12"),
        decimal.Decimal("1E+999999"),
        dt.datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("CET")),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999),  # noqa: DTZ001 - naive on purpose
        dt.timezone.utc,
        dt.timezone(dt.timedelta(hours=-3), "x y"),
        dt.timedelta.min,
        uuid.UUID(int=5),
    ],
    ids=repr,
)
def test_odd_values_come_back_the_same(value: Any) -> None:
    """The corners of each type."""
    assert same(again(value), value)
    if isinstance(value, decimal.Decimal):
        assert again(value).as_tuple() == value.as_tuple()


def test_utc_is_the_singleton() -> None:
    """Code compares tzinfo by identity; UTC stays UTC."""
    assert again(dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)).tzinfo is (
        dt.timezone.utc
    )


# --- numpy --------------------------------------------------------------------

ARRAYS = [
    np.arange(10000.0).reshape(100, 100),
    np.asfortranarray(np.arange(10000.0).reshape(100, 100)),
    np.zeros((20, 30, 40), "c16", order="F")[:, ::-1],
    np.arange(100)[::-3],
    np.array(5),
    np.zeros((0, 3)),
    np.zeros((3, 0, 2), "S4", order="F"),
    np.array(["a", "é\U0001f600", ""]),
    np.array([b"a", b"\0b"]),
    np.array([1, -2], ">i4"),
    np.array(["2020-01-01", "NaT"], "M8[D]"),
    np.array([5, 6], ">M8[25s]"),
    np.array([1, 2], "m8[ns]"),
    np.array([True, False] * 9000),
    np.array([1.5, np.nan], "f2"),
    np.ones((1,) * 20),
    np.broadcast_to(np.arange(3), (1000, 3)),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back_the_same(value: Any) -> None:
    """Dtype (byte order too), shape, memory order and contents are kept."""
    made = again(value)
    assert type(made) is np.ndarray
    assert made.dtype == value.dtype
    assert made.dtype.str == value.dtype.str
    assert made.shape == value.shape
    np.testing.assert_array_equal(made, value)
    if value.flags.f_contiguous and not value.flags.c_contiguous:
        assert made.flags.f_contiguous
    assert not made.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.float32(-0.0),
        np.int8(-3),
        np.bool_(True),
        np.str_("é"),
        np.str_(""),
        np.bytes_(b""),
        np.datetime64("2020-01-01T00:00", "m"),
        np.datetime64("NaT"),
        np.complex64(1j),
    ],
    ids=repr,
)
def test_numpy_scalars_come_back_the_same(value: Any) -> None:
    """``array.mean()`` is what tasks return; it is data like any other."""
    made = again([value])[0]
    assert type(made) is type(value)
    assert made.dtype == value.dtype
    assert repr(made) == repr(value)


def test_large_array_is_a_view_on_both_sides() -> None:
    """No copy in encode, none in decode: the part's memory is the array's."""
    value = np.arange(100_000)
    parts = encode({"a": value})
    assert len(parts) == 2
    assert np.shares_memory(np.frombuffer(parts[1], np.int64), value)
    made = decode([memoryview(p) for p in parts])["a"]
    assert np.shares_memory(made, value)
    with pytest.raises(ValueError, match="read-only"):
        made[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        made.flags.writeable = True


# --- Arrow --------------------------------------------------------------------


def arrow_table() -> Any:
    return pa.table(
        {
            "i": [1, None, 3],
            "s": ["x", "yé", None],
            "b": [b"", None, b"\0\xff"],
            "ls": pa.array(["a", None, "c"], pa.large_string()),
            "lb": pa.array([b"a", None, b"c"], pa.large_binary()),
            "list": [[1], None, [2, None]],
            "llist": pa.array([[1], [], None], pa.large_list(pa.int8())),
            "fixed": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)),
            "struct": [{"q": 1, "r": ["a"]}, {"q": None, "r": None}, None],
            "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "dict": pa.array(["a", None, "a"]).dictionary_encode(),
            "ordered": pa.DictionaryArray.from_arrays(
                [0, 1, 0], ["x", "y"], ordered=True
            ),
            "null": pa.nulls(3),
            "bool": [True, None, False],
            "d128": pa.array([decimal.Decimal("1.10"), None, None]),
            "d256": pa.array([decimal.Decimal("1.1")] * 3, pa.decimal256(60, -2 + 3)),
            "fb": pa.array([b"ab", None, b"cd"], pa.binary(2)),
            "ts": pa.array([1, None, 3], pa.timestamp("us", "Europe/Berlin")),
            "ts2": pa.array([1, None, 3], pa.timestamp("ns", "+02:00")),
            "t32": pa.array([1, 2, 3], pa.time32("ms")),
            "t64": pa.array([1, 2, 3], pa.time64("ns")),
            "dur": pa.array([1, 2, 3], pa.duration("s")),
            "d32": pa.array([1, 2, 3], pa.date32()),
            "d64": pa.array([86400000, None, 0], pa.date64()),
            "f16": pa.array([np.float16(1), None, np.float16(2)], pa.float16()),
            "mdn": pa.array([(1, 2, 3), None, (4, 5, 6)], pa.month_day_nano_interval()),
            "u8": pa.array([1, 2, 255], pa.uint8()),
        }
    )


def test_arrow_comes_back_the_same() -> None:
    """Every supported type, as table, batch, chunked array, array and slice."""
    table = arrow_table()
    made = again(table)
    assert made.equals(table)
    assert made.schema.equals(table.schema)
    assert again(table.slice(1, 2)).equals(table.slice(1, 2))
    assert again(pa.concat_tables([table, table])).equals(
        pa.concat_tables([table, table])
    )
    batch = table.to_batches()[0]
    assert type(again(batch)) is pa.RecordBatch
    assert again(batch.slice(1, 1)).equals(batch.slice(1, 1))
    for name in table.column_names:
        chunked = table[name]
        array = chunked.chunk(0)
        for value in (chunked, chunked.slice(1, 0), array):
            assert again(value).equals(value), name
        for start, length in ((0, 0), (0, 2), (1, 1), (1, 2), (2, 1)):
            part = array.slice(start, length)
            assert again(part).equals(part), name
            nested = pa.array([part.to_pylist()], pa.list_(part.type))
            assert again(nested).equals(nested), name


def odd_arrow() -> list[Any]:
    """Types within types that Arrow's own constructors are picky about."""
    words = pa.array(["a", "b"]).dictionary_encode()
    return [
        pa.array([[None], [None, None]], pa.list_(pa.null())),
        pa.array([{}, {}], pa.struct([])),
        pa.array([b"", b""], pa.binary(0)),
        pa.array([[], []], pa.list_(pa.int8(), 0)),
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.int8()), [["a"], []]),
        pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), words),
        pa.StructArray.from_arrays([words], ["x"]),
        pa.ListArray.from_arrays([0, 1, 2], words),
        pa.FixedSizeListArray.from_arrays(words, 2),
        pa.MapArray.from_arrays([0, 1, 2], words, pa.array([[1], None])),
        pa.array([[("k", [("z", 1)])]], pa.map_("string", pa.map_("string", "int8"))),
        pa.array([], pa.map_("string", "int8")),
        pa.chunked_array([], pa.string()),
        pa.table({}),
        pa.array(["a", None] * 5000).dictionary_encode().slice(3, 7),
        pa.array([{"a": [{"b": {"c": None}}]}] * 3).slice(1),
    ]


def test_odd_arrow_types_come_back_the_same() -> None:
    """Dictionaries in everything, widths of zero, nothing at all."""
    for value in odd_arrow():
        made = again(value)
        assert made.equals(value), value
        assert type(made) is type(value)
    for name in ("decimal32", "decimal64"):
        if hasattr(pa, name):
            value = pa.array([1, None], getattr(pa, name)(5, 2))
            assert again(value).equals(value)


def test_null_map_keys_are_refused_before_arrow_sees_them() -> None:
    """Arrow's constructor would end the worker's process over these."""
    offsets = b"\1" + inline(struct.pack("<ii", 0, 1))
    kind = (
        b"Pa" + inline(b"map") + b"\0"
        + inline(b"key") + b"\0" + inline(b"string")
        + inline(b"value") + b"\1" + inline(b"int8")
    )  # fmt: skip
    rest = offsets + b"\1" + inline(b"a") + u64(1) + b"\0" + b"\1" + inline(b"1")
    good = kind + u64(1) + b"\0" + offsets + u64(1) + b"\0" + rest
    assert decode([memoryview(good)]).to_pylist() == [[("a", 49)]]
    bad = kind + u64(1) + b"\0" + offsets + u64(1) + b"\1" + inline(b"\0") + rest
    with pytest.raises(DataDecodeError, match="map keys"):
        decode([memoryview(bad)])


def test_arrow_slice_takes_nothing_else_along() -> None:
    """Ten rows of a million are ten rows: not the parent's other values."""
    secret = "the-rest-of-the-table"
    table = pa.table({"s": [secret] * 5000 + ["x"] * 10, "i": range(5010)})
    parts = encode(table.slice(5000, 10))
    assert sum(map(len, parts)) < 3000
    assert secret.encode() not in b"".join(parts)
    struct_array = pa.array([{"a": secret}] * 5000 + [{"a": "y"}])
    assert secret.encode() not in b"".join(encode(struct_array.slice(5000)))


def test_arrow_metadata_is_dropped() -> None:
    """Neither schema nor field metadata reaches the other side."""
    field = pa.field("a", pa.int64(), metadata={"x": "y"})
    schema = pa.schema([field], metadata={"pandas": "{}"})
    made = again(pa.table({"a": [1]}, schema=schema))
    assert made.schema.metadata is None
    assert made.schema.field("a").metadata is None


def test_arrow_extension_is_refused_by_name() -> None:
    """A registered extension type is never sent, however deep it lies."""
    tensor = pa.fixed_shape_tensor(pa.int8(), [2])
    storage = pa.array([[1, 2]], pa.list_(pa.int8(), 2))
    array = pa.ExtensionArray.from_storage(tensor, storage)
    with pytest.raises(DataEncodeError, match="extension"):
        encode(array)
    table = pa.table({"a": [1], "t": array})
    with pytest.raises(DataEncodeError) as caught:
        encode({"k": table})
    assert caught.value.where == 'result["k"].column("t")'
    assert "extension" in caught.value.reason
    smuggled = pa.schema(
        [pa.field("a", pa.binary(), metadata={"ARROW:extension:name": "ray.data"})]
    )
    with pytest.raises(DataEncodeError, match="extension metadata"):
        encode(smuggled.empty_table())


# --- pandas -------------------------------------------------------------------


def frame() -> Any:
    return pd.DataFrame(
        {
            "i": [1, 2, 3],
            "f": [1.0, np.nan, 2],
            "f4": np.array([1, 2, 3], "f4"),
            "b": [True, False, True],
            "s": ["a", None, "b"],
            "o": np.array(["a", None, 3], dtype=object),
            "lists": np.array([[1], [2], None], dtype=object),
            "c": pd.Categorical(["x", None, "x"]),
            "co": pd.Categorical([2, 1, 2], categories=[2, 1], ordered=True),
            "z": pd.date_range("2020", periods=3, tz="Europe/Berlin"),
            "zn": pd.to_datetime(["2020", None, "2021"]).tz_localize("UTC"),
            "t": pd.date_range("2020", periods=3),
            "td": pd.to_timedelta([1, 2, 3]),
            "I": pd.array([1, None, 3], dtype="Int64"),
            "u1": pd.array([1, None, 3], dtype="UInt8"),
            "B": pd.array([True, None, False], dtype="boolean"),
            "F": pd.array([1.0, None, 3], dtype="Float32"),
            "sp": pd.array(["a", None, "b"], dtype="string[python]"),
            "sa": pd.array(["a", None, "b"], dtype="string[pyarrow]"),
            "aw": pd.array([1, None, 3], dtype=pd.ArrowDtype(pa.int32())),
        }
    )


INDEXES = [
    pd.Index(["a", "b", "c"], name="n"),
    pd.Index([1.5, 2, np.nan]),
    pd.Index(["a", 1, None], dtype=object),
    pd.RangeIndex(0, 6, 2, name=("r", 1)),
    pd.MultiIndex.from_tuples([(1, "a"), (1, "b"), (2, None)], names=["p", "q"]),
    pd.CategoricalIndex(["a", "b", "a"], name="c"),
    pd.DatetimeIndex(["2020", "2021", "2022"], tz="UTC"),
    pd.TimedeltaIndex([1, 2, 3]),
]


def test_frame_and_series_come_back_the_same() -> None:
    """Every dtype, the attrs, and columns that share a name."""
    value = frame()
    value.attrs = {"unit": "m"}
    made = again(value)
    pdt.assert_frame_equal(made, value)
    assert made.attrs == {"unit": "m"}
    for name in value:
        pdt.assert_series_equal(again(value[name]), value[name])
    twins = pd.DataFrame(np.ones((3, 2)), columns=["a", "a"])
    pdt.assert_frame_equal(again(twins), twins)
    for empty in (pd.DataFrame(), pd.DataFrame(index=[1, 2]), frame().iloc[:0]):
        pdt.assert_frame_equal(again(empty), empty)


@pytest.mark.parametrize("index", INDEXES, ids=lambda i: type(i).__name__)
def test_index_comes_back_the_same(index: Any) -> None:
    """Alone, of a frame, and as its columns."""
    pdt.assert_index_equal(again(index), index)
    value = frame().set_index(index)
    pdt.assert_frame_equal(again(value), value)
    across = pd.DataFrame([[1, "a", None]], columns=index)
    pdt.assert_frame_equal(again(across), across)


def test_large_categorical_passes_if_no_hashing_is_needed() -> None:
    """Ascending numbers of any count pass; many texts are refused with a remedy."""
    numbers = pd.Series(pd.Categorical(np.arange(50_000) // 2))
    pdt.assert_series_equal(again(numbers), numbers)
    texts = pd.Series(pd.Categorical([str(n) for n in range(20_000)]))
    with pytest.raises(DataEncodeError, match=r"20000 categories .* astype"):
        encode(texts)


# --- what is refused, and how -------------------------------------------------


class Whole(int):
    pass


class Colour(enum.IntEnum):
    RED = 1


class Record:
    pass


Point = collections.namedtuple("Point", "x")
SELF: list[Any] = [1]
SELF.append({"q": SELF})
HERE = __name__


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"a": [1, 2, 3, Whole(3)]},
            (
                f'result["a"][3]: type {HERE}.Whole is not plain data '
                "(a subclass of int; convert it to int itself)"
            ),
        ),
        (
            Colour.RED,
            (
                f"result: type {HERE}.Colour is not plain data "
                "(a subclass of int; convert it to int itself)"
            ),
        ),
        (
            [Point(1)],
            (
                f"result[0]: type {HERE}.Point is not plain data "
                "(a subclass of tuple; convert it to tuple itself)"
            ),
        ),
        (
            [{"k": (1, Record())}],
            f'result[0]["k"][1]: type {HERE}.Record is not plain data',
        ),
        (
            {Whole(4): 1},
            (
                f"result.<key 0>: type {HERE}.Whole is not plain data "
                "(a subclass of int; convert it to int itself)"
            ),
        ),
        (
            [{"a": 1, "b": [[n, n]] * 9} for n in range(20)]
            + [{"a": 1, "b": [[1, 2]] * 8 + [[1, range(2)]]}] * 2,
            'result[20]["b"][8][1]: type range is not plain data',
        ),
        (
            {(n, n) for n in range(9)} | {(1, Whole(2))},
            (
                f"result.<element>[1]: type {HERE}.Whole is not plain data "
                "(a subclass of int; convert it to int itself)"
            ),
        ),
        (
            collections.OrderedDict(),
            (
                "result: type collections.OrderedDict is not plain data "
                "(a subclass of dict; convert it to dict itself)"
            ),
        ),
        ([range(3)], "result[0]: type range is not plain data"),
        ([bytearray()], "result[0]: type bytearray is not plain data"),
        ({1: encode}, "result[1]: type function is not plain data"),
        ([ValueError("x")], "result[0]: type ValueError is not plain data"),
        (SELF, 'result[1]["q"]: contains itself (it is result again)'),
        (
            {"a": (1, SELF)},
            'result["a"][1][1]["q"]: contains itself (it is result["a"][1] again)',
        ),
        (
            np.zeros(2, object),
            "result: numpy array of dtype dtype('O'), which is not plain data",
        ),
        (
            [np.zeros(2, [("a", "i4")])],
            "result[0]: numpy array of structured dtype dtype([('a', '<i4')])",
        ),
        (
            np.zeros(2, "V4"),
            "result: numpy array of dtype dtype('V4'), which is not plain data",
        ),
        (
            np.ma.array([1]),
            (
                "result: type numpy.ma.MaskedArray is not plain data "
                "(a subclass of ndarray; convert it to ndarray itself)"
            ),
        ),
        (
            pd.Timestamp(0),
            (
                "result: type pandas.Timestamp is not plain data "
                "(a subclass of datetime; convert it to datetime itself)"
            ),
        ),
        (
            pd.DataFrame({"x": [1, [2, {3: Record()}]]}),
            f'result["x"].iloc[1][1][3]: type {HERE}.Record is not plain data',
        ),
        (
            pd.period_range("2020", periods=3, freq="D"),
            (
                'result: pandas dtype "period[D]" has no data-only form; convert it '
                "(astype) to a plain one"
            ),
        ),
        (
            {"v": pa.array(["a"], pa.string_view())},
            (
                'result["v"]: Arrow type "string_view" has no data-only form; cast it '
                "to one that has (views to string or binary, unions to a struct)"
            ),
        ),
    ],
    ids=lambda v: v.partition(":")[0] if isinstance(v, str) else type(v).__name__,
)
def test_refusal_names_the_type_and_the_place(value: Any, message: str) -> None:
    """Where in the value, which type, and what to do about it: word for word."""
    with pytest.raises(DataEncodeError) as caught:
        encode(value)
    assert str(caught.value) == message


def test_own_tzinfo_is_refused() -> None:
    """A tzinfo class of the task's own is code."""

    class Own(dt.tzinfo):
        def utcoffset(self, _: dt.datetime | None) -> None: ...
        def tzname(self, _: dt.datetime | None) -> None: ...
        def dst(self, _: dt.datetime | None) -> None: ...

    with pytest.raises(DataEncodeError, match="tzinfo of type"):
        encode([dt.datetime(2020, 1, 1, tzinfo=Own())])


def test_limits_hold_on_the_encoding_side() -> None:
    """What the other side would refuse is refused here, by the same limits."""
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(DataEncodeError, match="more than 100 containers deep"):
        encode(deep)
    wide: list[Any] = [0] * 100
    for _ in range(20):
        wide = [wide, wide]  # two to the 20th, and no memory
    with pytest.raises(DataEncodeError, match="more than 1000 values"):
        encode(wide, DecodeLimits(max_items=1000))
    with pytest.raises(DataEncodeError, match="int of 65538 bytes, more than 65536"):
        encode([1 << (65537 * 8)])
    with pytest.raises(DataEncodeError, match="more than 99 bytes"):
        encode(np.zeros(1000), DecodeLimits(max_part_bytes=99))


def test_errors_survive_pickling() -> None:
    """Ray pickles errors on their way to the driver."""
    for error in (
        DataEncodeError(where="result[0]", reason="type x"),
        DataDecodeError(reason="bad", offset=3),
    ):
        made = pickle.loads(pickle.dumps(error))
        assert type(made) is type(error)
        assert str(made) == str(error)


# --- hostile bytes ------------------------------------------------------------


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def inline(data: bytes) -> bytes:
    return b"\0" + struct.pack("<I", len(data)) + data


def keys_of(keys: list[bytes], tag: bytes = b"e") -> bytes:
    return tag + b"g" + u64(len(keys)) + b"".join(keys)


def big(number: int) -> bytes:
    size = number.bit_length() // 8 + 1
    return b"I" + inline(number.to_bytes(size, "little", signed=True))


PRIME = (1 << 61) - 1  # ints hash modulo this


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (b"", "ends early"),
        (b"\xff", "unknown tag 255"),
        (b"NN", "bytes after the value"),
        (b"i\0", "ends early"),
        (b"x\xffabc", "ends early"),
        (b"lg" + u64(1 << 60), "no room"),
        (b"lg" + u64((1 << 64) - 1), "no room"),
        (b"lj\x02N", "ends early|no room"),
        (b"lz", "unknown kind of sequence"),
        (b"lj\1" * 101 + b"N", "more than 100 containers deep"),
        (b"b\1" + u64(10), "more buffers named than sent"),
        (b"b\2", "buffer kind 2"),
        (b"b\0\xff\xff\xff\xff", "inline buffer"),
        (b"s" + inline(b"\xff"), "UnicodeDecodeError"),
        (b"S" + inline(b"\xff"), "UnicodeDecodeError"),
        (b"lq" + inline(b"1234567"), "broken length"),
        (b"lo" + inline(b"\2"), "neither 0 nor 1"),
        (b"la" + inline(u64(5)) + inline(b"abc"), "do not match"),
        (b"la" + inline(u64((1 << 64) - 1)) + inline(b"abc"), "do not match"),
        (b"l?" + inline(b"\1\1") + b"q" + inline(u64(1)), "do not match"),
        (b"lrx\1" + b"j\0", "no known form"),
        (b"lrt\0", "no known form"),
        (b"lrt\2" + b"j\1N" + b"j\2NN", "different lengths"),
        (b"lrm\2" + b"j\1N" + b"j\1N" * 2, "1 keys for 2 values"),
        (b"lrm\2" + b"j\2NN" + b"j\1N" * 2, "two keys are equal"),
        (b"lrm\1" + b"j\1lj\0" + b"j\1N", "can't be hashed"),
        (b"l" + b"rt\1" * 101 + b"j\0", "containers deep"),
        (keys_of([b"T", b"i" + u64(1)]), "two keys are equal"),
        (keys_of([b"i" + u64(0), b"f" + u64(0)], b"z"), "two keys are equal"),
        (keys_of([b"lj\0"]), "can't be hashed"),
        (keys_of([b"tj\1lj\0"]), "can't be hashed"),
        (b"mj\1T" + b"j\2NN", "1 keys for 2 values"),
        (keys_of([big(PRIME * n + 5) for n in range(100)]), "share one hash"),
        (b"D\0\0\0\0", "ValueError"),
        (b"k" + b"\xff" * 13, "ValueError|unknown kind"),
        (b"r" + b"\xff" * 12, "normal form"),
        (b"n" + inline(b"1_000"), "no Decimal"),
        (b"n" + inline("٣".encode()), "UnicodeDecodeError"),
        (b"n" + inline(b"1E+9999999999999999999"), "InvalidOperation"),
        (b"Z\2" + inline(b"../../etc/passwd"), "no time zone name"),
        (b"Z\2" + inline(b"/etc/localtime"), "no time zone name"),
        (b"Z\2" + inline(b"Europe"), "Error"),
        (b"Z\2" + inline(b"No/Where"), "ZoneInfoNotFound"),
        (b"Z\1" + struct.pack("<iii", 5, 0, 0) + b"N", "ValueError"),
        (b"AC\1" + inline(b"|O") + u64(0) + inline(b""), "no plain dtype"),
        (b"AC\1" + inline(b"|V8") + u64(0) + inline(b""), "no plain dtype"),
        (b"AC\1" + inline(b"i4,O") + u64(0) + inline(b""), "no plain dtype"),
        (b"AC\1" + inline(b"<f16") + u64(0) + inline(b""), "no plain dtype"),
        (b"AC\1" + inline(b"|u1") + u64(1 << 63) + inline(b""), "too large"),
        (b"AC\2" + inline(b"|u1") + u64(1 << 33) * 2 + inline(b""), "with 0 bytes"),
        (b"AC\1" + inline(b"|u1") + u64(9) + inline(b"1"), "with 1 bytes"),
        (b"AC\xff" + inline(b"|u1"), "255 dimensions"),
        (b"AC\1" + inline(b"|b1") + u64(1) + inline(b"\2"), "neither 0 nor 1"),
        (b"AC\1" + inline(b"<U1") + u64(1) + inline(b"\xff" * 4), "beyond Unicode"),
        (b"G" + inline(b"|O") + inline(b"\0" * 8), "no plain dtype"),
        (b"Pa" + inline(b"extension") + u64(0), "unknown Arrow type"),
        (b"Pa" + inline(b"int64") + u64(1 << 62), "values"),
        (b"Pa" + inline(b"int64") + u64(9) + b"\0\0", "data missing"),
        (b"Pa" + inline(b"int64") + u64(9) + b"\0\1" + inline(b"8"), "of 1 bytes"),
        (b"Pa" + inline(b"null") + u64(1 << 39), "more than"),
        (
            b"Pa"
            + inline(b"string")
            + u64(1)
            + b"\0\1"
            + inline(struct.pack("<ii", 0, 1 << 30))
            + b"\1"
            + inline(b"abc"),
            "ArrowInvalid",
        ),
        (
            b"Pa"
            + inline(b"string")
            + u64(1)
            + b"\0\1"
            + inline(struct.pack("<ii", 0, 1))
            + b"\1"
            + inline(b"\xff"),
            "ArrowInvalid",
        ),
        (
            b"Pa"
            + inline(b"list")
            + inline(b"item")
            + b"\1"
            + inline(b"int8")
            + u64(1)
            + b"\0\1"
            + inline(struct.pack("<ii", 0, 99))
            + u64(1)
            + b"\0\1"
            + inline(b"1"),
            "ArrowInvalid",
        ),
        (
            b"Pa"
            + inline(b"dictionary")
            + b"\0"
            + inline(b"int8")
            + inline(b"int8")
            + u64(1)
            + u64(1)
            + b"\0\1"
            + inline(b"\x05")
            + u64(1)
            + b"\0\1"
            + inline(b"1"),
            "Arrow(Invalid|IndexError)|IndexError",
        ),
        (
            b"Pa" + inline(b"timestamp") + inline(b"s") + inline(b"../../x") + u64(0),
            "no time zone name",
        ),
    ],
    ids=lambda v: None if isinstance(v, bytes) else v[:24],
)
def test_malformed_bytes_are_refused(structure: bytes, reason: str) -> None:
    """Each check by itself, with a structure made for it by hand."""
    with pytest.raises(DataDecodeError, match=reason):
        decode([memoryview(structure)])


def test_each_part_is_used_exactly_once() -> None:
    """A part that is left over, missing, or of another size is refused."""
    structure, raw = encode(np.zeros(1000))
    for parts in ([structure], [structure, raw, raw], [structure, raw[:-1]], []):
        with pytest.raises(DataDecodeError):
            decode([memoryview(p) for p in parts])
    two = b"lj\2" + (b"b\1" + u64(5000)) * 2
    with pytest.raises(DataDecodeError, match="more buffers named"):
        decode([memoryview(two), memoryview(bytes(5000))])


@pytest.mark.parametrize(
    "structure",
    [
        # 64 to the depth in comparisons, if each level were allowed its own.
        pytest.param("nested", id="nested-sets"),
        pytest.param("index", id="pandas-index"),
        pytest.param("categories", id="pandas-categories"),
        pytest.param("nan", id="nan-keys"),
        pytest.param("decimal", id="huge-exponent-keys"),
    ],
)
def test_no_bytes_take_more_than_linear_time(structure: str) -> None:
    """Keys built to collide are refused, or cost no more than honest ones."""
    collide = [big(PRIME * n + 5) for n in range(20_000)]
    if structure == "nested":
        # Sets of 8 colliding ints that agree in all but the last one collide
        # with each other, and so on upwards.
        def level(depth: int, salt: int) -> bytes:
            if depth == 0:
                return big(PRIME * (salt + 9) + 5)
            return keys_of([level(depth - 1, salt * 8 + n) for n in range(8)], b"z")

        made = keys_of([level(5, n) for n in range(8)])
    elif structure == "index":
        rows = b"O" + b"g" + u64(len(collide)) + b"".join(collide)
        made = b"XsI" + rows + b"N" + rows + b"N" + b"mj\0j\0"
    elif structure == "categories":
        rows = b"IO" + b"g" + u64(len(collide)) + b"".join(collide) + b"N"
        codes = b"AC\1" + inline(b"|i1") + u64(1) + inline(b"\0")
        made = b"XiIC\0" + codes + rows + b"N"
    elif structure == "nan":
        made = keys_of([b"f" + struct.pack("<d", float("nan"))] * 100_000)
    else:
        made = keys_of(
            [b"n" + inline(b"1E+%d" % (999999999999999999 - n)) for n in range(5000)]
        )
    began = time.process_time()
    try:
        decode([memoryview(made)])
    except DataDecodeError:
        pass
    assert time.process_time() - began < 5


def test_small_input_makes_no_large_object() -> None:
    """Memory is charged before it is taken: a limit of 1 MB holds."""
    limits = DecodeLimits(max_memory_bytes=1 << 20)
    for tag in (b"lj\0", b"ej\0", b"mj\0j\0", b"N"):
        count = 50_000
        with pytest.raises(DataDecodeError, match="bytes of objects"):
            decode([memoryview(b"lg" + u64(count) + tag * count)], limits)
    text = "a" * 1_000_000 + "\U0001f600"
    with pytest.raises(DataDecodeError, match="bytes of objects"):
        decode([memoryview(p) for p in encode(text)], limits)


def test_limits_of_a_result() -> None:
    """for_result() bounds the bytes by the profile's largest result."""
    limits = DecodeLimits.for_result(10_000)
    assert decode(encode(np.zeros(1000)), limits).sum() == 0
    with pytest.raises(DataDecodeError, match="more than 10000 bytes"):
        decode(encode(np.zeros(2000)), limits)


def corpus() -> list[Any]:
    plain = [
        None, True, 5, 2**80, 1.5, 1j, "text", "é" * 50, b"bytes", [], (), {}, set(),
        [1, 2.5, "x", None, [b"y", {"k": (1, 2)}]],
        list(range(50)), [0.5] * 20, ["a", "bb", ""] * 9, [b"a"] * 9, [True] * 9,
        ["a", None] * 9, {f"k{n}": n for n in range(30)}, {1, 2, 3, (4, 5)},
        frozenset([frozenset([1]), frozenset([2])]),
        [(n, "x", None) for n in range(9)], [{"a": n, "b": [n]} for n in range(9)],
        [[[n, n + 0.5]] * 8 for n in range(8)],
        decimal.Decimal("12.50"), uuid.UUID(int=7), dt.date(2020, 1, 2),
        dt.datetime(2020, 1, 2, 3, 4, 5, 6, zoneinfo.ZoneInfo("Europe/Berlin")),
        dt.time(1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1), "n")),
        dt.timedelta(5, 6, 7), np.float64(2.5), np.str_("é"), np.arange(2000),
    ]  # fmt: skip
    table = arrow_table()
    columns = [table[name].chunk(0) for name in table.column_names]
    value = frame()
    series = [value[name] for name in value]
    return [
        *plain, *ARRAYS, table, *columns, *odd_arrow(), value, *series, *INDEXES
    ]  # fmt: skip


def mutate(parts: list[bytes], rng: random.Random) -> list[bytes]:
    """Return the parts with a few bytes changed, moved, cut or repeated."""
    out = [bytearray(p) for p in parts]
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        part = out[0] if rng.random() < 0.8 else rng.choice(out)
        if not part:
            continue
        at = rng.randrange(len(part))
        action = rng.randrange(7)
        if action == 0:
            part[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            part[at] = rng.choice(
                b"\0\1\2\7\x7f\x80\xfe\xffNTFiIfcxsSblt?ezmwnDhkrZAGPXgjqdauyo"
            )
        elif action == 2:
            del part[at : at + rng.randrange(1, 9)]
        elif action == 3:
            part[at:at] = part[at : at + rng.randrange(1, 40)]
        elif action == 4:
            part[at : at + 8] = rng.choice(
                (b"\xff" * 8, b"\0" * 8, u64(1 << 31), u64(1 << 40), u64(1 << 63))
            )
        elif action == 5:
            part[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80"))
        else:
            other = rng.choice(out)
            where = rng.randrange(len(other) + 1)
            other[where:where] = part[at : at + rng.randrange(1, 60)]
    if rng.random() < 0.05:
        out.append(bytearray(rng.randrange(100)))
    if rng.random() < 0.05:
        out.pop()
    return [bytes(p) for p in out]


def peak_bytes() -> int:
    with open("/proc/self/status") as opened:
        line = next(row for row in opened if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fuzz(seed: int, cases: int) -> None:
    """Decode mutated values: a value or DataDecodeError, quickly, in little memory."""
    rng = random.Random(seed)
    encoded = [[bytes(p) for p in encode(value)] for value in corpus()]
    limits = DecodeLimits(max_memory_bytes=32 << 20, max_items=500_000)
    for parts in encoded:
        decode(parts, limits)
    before = peak_bytes()
    refused = 0
    slowest = 0.0
    for _ in range(cases):
        parts = mutate(rng.choice(encoded), rng)
        began = time.process_time()
        try:
            value = decode(parts, limits)
        except DataDecodeError:
            refused += 1
        else:
            # What was accepted is pickled next: by the worker, for the driver.
            pickle.dumps(value, 5)
        slowest = max(slowest, time.process_time() - began)
    grown = peak_bytes() - before
    assert slowest < 2, slowest
    assert grown < 256 << 20, grown
    assert refused > cases // 4, refused
    assert refused < cases, refused


def test_mutated_bytes_give_a_value_or_a_refusal() -> None:
    """Thousands of mutations, in a process of its own so that a crash shows."""
    seed = random.SystemRandom().randrange(1 << 32)
    code = (
        "import sys; from tests.unit import test_datacodec as t; "
        f"t.fuzz({seed}, {FUZZ_CASES})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (
        f"seed {seed}: {done.returncode}\n{done.stderr[-3000:]}"
    )


# --- what it costs to have it -------------------------------------------------


def test_import_is_slim() -> None:
    """In a jail that has no numpy, encoding loads none of the heavy modules."""
    package = os.path.dirname(os.path.dirname(datacodec.__file__))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); "
        "from raysandbox import datacodec; "
        "datacodec.decode(datacodec.encode({'a': [1, (2.5, 'x')]})); "
        "print(' '.join(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, package],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert not loaded & {
        "numpy", "pyarrow", "pandas", "datetime", "decimal", "dataclasses",
        "inspect", "pickle", "logging", "raysandbox.datacodec_arrays",
    }  # fmt: skip


def test_nothing_in_the_module_can_unpickle() -> None:
    """Neither module names pickle, IPC, or a by-name lookup of a class."""
    for name in ("datacodec.py", "datacodec_arrays.py"):
        path = os.path.join(os.path.dirname(datacodec.__file__), name)
        with open(path) as opened:
            text = opened.read().partition('"""\n')[2]
        for word in ("import pickle", "pickle.", "marshal", "eval(", "exec(", "ipc"):
            assert word not in text, (name, word)
