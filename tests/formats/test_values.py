"""What values promise: what goes in comes out, types included; what can't is refused; hostile JSON is harmless."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckpt_formats.dtypes import DTYPES
from ckpt_formats.errors import CheckpointError, FormatError, StateError, UnsupportedValueError
from ckpt_formats.values import (
    MAX_DEPTH,
    JsonValue,
    Opaque,
    canonical,
    decode,
    encode,
    first_difference,
    register_value,
)
from ckpt_formats.values.decoding import DECODERS
from ckpt_formats.values.encoding import ENCODERS
from ckpt_formats.values.tree import brief

# --- values of every kind ---

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates too
ZONES = st.one_of(
    st.none(),
    st.just(UTC),
    st.sampled_from([None, *map(ZoneInfo, {"Europe/Paris", "America/New_York", "Etc/GMT+5"} & available_timezones())]),
    st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23))),
    st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)), TEXT),
)
ML_DTYPES = [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "int4")]
NUMPY_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(),
    hnp.unicode_string_dtypes(endianness="?"),
    st.sampled_from([np.dtype("V3"), np.dtype("<M8[25s]"), *ML_DTYPES]),
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = draw(NUMPY_DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = math.prod(shape)
    if dtype.kind == "V" or dtype in ML_DTYPES:
        data = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
        array = np.ndarray(shape, dtype, buffer=bytearray(data))
    else:
        array = draw(hnp.arrays(dtype, shape))
    return draw(st.sampled_from([array, array.T, array[..., ::-1] if array.ndim else array, np.asfortranarray(array)]))


NUMPY_SCALARS = st.one_of(
    arrays().filter(lambda array: array.ndim == 0).map(lambda array: array[()]),
    TEXT.map(np.str_),
    st.binary(max_size=4).map(np.bytes_),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**53 - 1, -(2**53) + 1, 2**53, -(2**53), 2**64, -(2**5000)]),
    st.floats(),
    TEXT,
    st.sampled_from(["$", "$x", "$$", "$tuple", "$$int"]),
    st.binary(max_size=8),
    st.complex_numbers(allow_nan=True),
    st.dates(),
    st.datetimes(timezones=ZONES, allow_imaginary=True),
    st.times(timezones=ZONES),
    st.timedeltas(),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    ZONES,
)
KEYS = st.recursive(
    st.one_of(SCALARS, NUMPY_SCALARS.filter(lambda scalar: not isinstance(scalar, np.void))),  # which has no hash
    lambda inner: st.one_of(st.lists(inner, max_size=2).map(tuple), st.frozensets(inner, max_size=2)),
    max_leaves=3,
)
LEAVES = st.one_of(SCALARS, st.binary(max_size=8).map(bytearray), NUMPY_SCALARS, arrays())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(st.one_of(st.integers(), st.booleans()), min_size=9, max_size=12),
        st.lists(st.integers(-(2**53), 2**53), min_size=9, max_size=12),
        st.lists(st.floats(), min_size=9, max_size=12),
        st.dictionaries(st.one_of(TEXT, st.sampled_from(["$", "$x", "$int"])), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(Counter),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.builds(lambda items, more: deque(items, len(items) + more), st.lists(inner, max_size=3), st.integers(0, 2)),
        st.lists(inner, max_size=3).map(deque),
    ),
    max_leaves=12,
)


def bits(number: float) -> bytes:
    return b"nan" if math.isnan(number) else struct.pack("<d", number)


def same(a: object, b: object) -> bool:
    """Equal in value and type at every level, where NaN equals NaN and 0.0 does not equal -0.0."""
    if isinstance(a, np.generic) and isinstance(b, np.generic) and not isinstance(a, np.str_ | np.bytes_):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    match a, b:
        case float(), float():
            return bits(a) == bits(b)
        case complex(), complex():
            return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
        case (list() | tuple(), list() | tuple()):
            return len(a) == len(b) and all(map(same, a, b))
        case deque(), deque():
            return a.maxlen == b.maxlen and same(list(a), list(b))
        case dict(), dict():
            return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
        case (set() | frozenset(), set() | frozenset()):
            left = {canonical(encode(item, "")): item for item in a}
            right = {canonical(encode(item, "")): item for item in b}
            return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
        case (datetime() | time(), datetime() | time()):
            zones = type(a.tzinfo) is type(b.tzinfo) and repr(a.tzinfo) == repr(b.tzinfo)
            return a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.fold == b.fold and zones
        case np.ndarray(), np.ndarray():
            layout = (a.flags.f_contiguous and not a.flags.c_contiguous) <= b.flags.f_contiguous
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() and layout
        case timezone(), timezone():
            return repr(a) == repr(b)
    return a == b


def strict(encoded: JsonValue) -> JsonValue:
    """Through text, as a parser that is strict about Unicode, and has 53 bits for integers, takes it."""

    def never(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    def small(digits: str) -> int:
        assert abs(int(digits)) < 2**53
        return int(digits)

    text = json.dumps(encoded, allow_nan=False, ensure_ascii=False).encode("utf-8")
    return json.loads(text, parse_constant=never, parse_int=small)


# --- what goes in comes out ---


@settings(max_examples=400)
@given(VALUES)
def test_values_come_back_equal_and_of_the_same_types(value: object) -> None:
    assert same(decode(strict(encode(value, "x")), "x"), value)


@given(VALUES, st.integers(0, 6))
def test_bytes_beyond_the_limit_go_through_blobs(value: object, limit: int) -> None:
    blobs: list[bytes] = []

    def put(data: bytes) -> JsonValue:
        assert len(data) > limit
        blobs.append(data)
        return len(blobs) - 1

    encoded = strict(encode(value, "x", blob=put, inline_limit=limit))
    assert same(decode(encoded, "x", blob=lambda reference: blobs[int(str(reference))]), value)


def test_a_large_array_leaves_only_its_description_in_the_json() -> None:
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> JsonValue:
        blobs["d1"] = data
        return "d1"

    array = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    encoded = encode({"noise": array}, "x", blob=put)
    assert encoded == {
        "noise": {"$numpy.ndarray": {"dtype": "<f4", "shape": [100, 100], "data": {"blob": "d1"}}},
    }
    assert blobs["d1"] == array.tobytes()


def test_decoded_arrays_are_writable_and_own_their_memory() -> None:
    array = decode(encode(np.zeros((2, 3)), "x"), "x")
    array[...] = 1
    assert array.sum() == 6


@pytest.mark.parametrize("value", [np.str_(""), np.str_("a\0"), np.str_("\ud800\0"), np.bytes_(b""), np.bytes_(b"a\0")])
def test_numpy_strings_keep_their_zeros(value: np.str_ | np.bytes_) -> None:
    back = decode(strict(encode(value, "x")), "x")
    assert type(back) is type(value)
    assert len(back) == len(value)
    assert back == value


def test_the_order_of_dicts_is_kept() -> None:
    for value in ({"b": 1, "a": 2}, {2: "b", 1: "a", "c": 3}, OrderedDict(z=1, a=2)):
        assert list(decode(strict(encode(value, "x")), "x")) == list(value)


def test_the_encoding_is_the_documented_one() -> None:
    value = {"lr": 0.1, "betas": (0.9, 1), "$seed": 2**64, 3: {b"\x00\xff"}, "best": math.inf, "n": np.int32(7)}
    assert encode(value, "x") == {
        "$dict": [
            ["lr", 0.1],
            ["betas", {"$tuple": [0.9, 1]}],
            ["$seed", {"$int": "0x10000000000000000"}],
            [3, {"$set": [{"$bytes": "AP8="}]}],
            ["best", {"$float": "inf"}],
            ["n", {"$numpy.scalar": {"dtype": "<i4", "data": "BwAAAA=="}}],
        ]
    }
    moment = datetime(2024, 2, 29, 1, 2, 3, 4, timezone(timedelta(hours=-5)), fold=1)
    assert encode(moment, "x") == {
        "$datetime": {"at": "2024-02-29T01:02:03.000004", "fold": 1, "zone": {"$timezone": [-18_000_000_000]}}
    }
    assert encode({"$a": "\ud800", "b": 1.0}, "x") == {"$$a": {"$str": "7aCA"}, "b": 1.0}


def test_the_document_has_every_tag_every_dtype_and_a_true_example() -> None:
    document = (Path(__file__).parents[2] / "docs" / "values.md").read_text()
    for tag in DECODERS:
        if "." not in tag or tag.startswith("numpy."):
            assert f"`${tag}`" in document
    for name in DTYPES:
        assert f"`{name}`" in document or name.strip("u").startswith("int")
    example = {"lr": 0.1, "betas": (0.9, 1), "$seed": 2**64, "best": math.inf, "order": np.arange(2, dtype="<i8")}
    assert json.loads(document.split("```json")[1].split("```")[0]) == encode(example, "x")


def test_python_and_numpy_generators_come_back_exactly() -> None:
    import random

    python, bits = random.Random(3), np.random.default_rng(3)
    python.gauss(0, 1)
    state = {
        "python": python.getstate(),
        "numpy": bits.bit_generator.state,
        "legacy": np.random.RandomState(3).get_state(),
    }
    back = decode(strict(encode(state, "rng")), "rng")
    other, other_bits = random.Random(), np.random.default_rng()
    other.setstate(back["python"])
    other_bits.bit_generator.state = back["numpy"]
    assert [other.gauss(0, 1) for _ in range(5)] == [python.gauss(0, 1) for _ in range(5)]
    assert (other_bits.random(5) == bits.random(5)).all()
    assert same(back["legacy"], state["legacy"])


def test_sets_encode_alike_in_every_process() -> None:
    program = "from ckpt_formats.values import *; print(canonical(encode({str(i) for i in range(50)}, 'x')).decode())"
    paths = os.pathsep.join(path for path in sys.path if path)
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# --- what is refused at saving ---


class Plain:
    pass


class Colour(Enum):
    RED = 1


class Level(IntEnum):
    LOW = 1


class Name(str):
    __slots__ = ()


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


KEYLESS_ZONE = b"TZif" + bytes(16) + struct.pack(">6l", 0, 0, 0, 0, 1, 4) + struct.pack(">lbb", 0, 0, 0) + b"UTC\0"
Point = namedtuple("Point", "x y")  # noqa: PYI024 - what users have

REFUSED: list[tuple[object, str]] = [
    (Plain(), "register_value"),
    (Unprintable(), "register_value"),
    (SimpleNamespace(a=1), "register_value"),
    (slice(1), "register_value"),
    (Colour.RED, r"\.value or \.name"),
    (Level.LOW, r"\.value or \.name"),
    (Name("a"), "plain str"),
    (type("Int", (int,), {})(3), "plain int"),
    (type("Float", (float,), {})(3), "plain float"),
    (type("Dict", (dict,), {})(), "plain dict"),
    (Point(1, 2), "plain tuple"),
    (defaultdict(int), "plain dict"),
    (type("Stamp", (datetime,), {})(2024, 1, 1), "plain datetime"),
    (Plain, "code is not state"),
    (len, "code is not state"),
    (lambda: 0, "code is not state"),
    (memoryview(b"a"), r"bytes\("),
    (np.array([1, None]), "tolist"),
    (np.zeros(2, "i4,f4"), "per field"),
    (np.zeros(2, "i4,f4")[0], "per field"),
    (np.ma.array([1, 2]), "plain numpy.ndarray"),
    (np.longdouble(1), "astype"),
    (np.zeros(2, np.clongdouble), "astype"),
    (np.array(["a"], np.dtypes.StringDType()), "astype"),
    (np.dtype("f4"), "register_value"),
    (Opaque("a.b", 1), "register_value"),
    (ZoneInfo.from_file(io.BytesIO(KEYLESS_ZONE)), "use ZoneInfo"),
]


@pytest.mark.parametrize(
    ("value", "remedy"), REFUSED, ids=[f"{type(value).__name__}{i}" for i, (value, _) in enumerate(REFUSED)]
)
def test_what_has_no_encoding_is_refused_with_its_path_and_a_remedy(value: object, remedy: str) -> None:
    with pytest.raises(UnsupportedValueError, match=remedy) as caught:
        encode({"x": [0, 1, 2, (value,)]}, "sampler.state")
    assert str(caught.value).startswith("sampler.state['x'][3][0] ")
    assert caught.value.tensor == "sampler.state['x'][3][0]"


def test_what_is_inside_sets_and_keys_is_refused_too() -> None:
    with pytest.raises(UnsupportedValueError, match=r"^s\['a'\]\{<Level.LOW: 1>\} "):
        encode({"a": {Level.LOW}}, "s")
    with pytest.raises(UnsupportedValueError, match=r"^s\{key \('a', <Colour.RED: 1>\)\}\[1\] "):
        encode({("a", Colour.RED): 1}, "s")
    with pytest.raises(UnsupportedValueError, match=r"^s\{key 'k'\} .*plain str"):
        encode({Name("k"): 1}, "s")


def test_a_zone_of_another_library_is_refused_unless_registered() -> None:
    from datetime import tzinfo

    class Zone(tzinfo):
        def utcoffset(self, _moment: datetime | None) -> timedelta:
            return timedelta(0)

    with pytest.raises(UnsupportedValueError, match=r"^x\['at'\]\.tzinfo is of type "):
        encode({"at": datetime(2024, 1, 1, tzinfo=Zone())}, "x")


def test_cycles_are_refused_where_they_close() -> None:
    loop: list[object] = [1]
    loop.append({"again": loop})
    with pytest.raises(UnsupportedValueError, match=r"^x\['a'\]\[1\]\['again'\] contains itself"):
        encode({"a": loop}, "x")
    ring: dict[object, object] = {}
    ring[0] = (ring,)
    with pytest.raises(UnsupportedValueError, match=r"^x\[0\]\[0\] contains itself"):
        encode(ring, "x")


def nested(levels: int, wrap: Callable[[object], object]) -> object:
    value: object = "core"
    for _ in range(levels):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], object]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "mixed dict": lambda inner: {1: inner},
    "frozenset": lambda inner: frozenset([inner]),
    "deque": lambda inner: deque([inner]),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_the_deepest_values_survive_json_and_deeper_ones_are_refused(kind: str) -> None:
    deepest = nested(MAX_DEPTH + 1, WRAPS[kind])
    assert same(decode(json.loads(json.dumps(encode(deepest, "x"))), "x"), deepest)
    with pytest.raises(UnsupportedValueError, match="nested deeper than 100 levels"):
        encode(nested(MAX_DEPTH + 2, WRAPS[kind]), "x")


@pytest.mark.parametrize(
    "wrap", [lambda j: [j], lambda j: {"a": j}, lambda j: {"$tuple": [j]}, lambda j: {"$set": [j]}]
)
def test_json_that_is_nested_too_deep_is_refused(wrap: Callable[[Any], Any]) -> None:
    for levels in (MAX_DEPTH + 2, 50_000):
        with pytest.raises(FormatError, match="nested deeper"):
            decode(nested(levels, wrap), "x")  # type: ignore[arg-type]


def test_shared_references_become_copies() -> None:
    shared = [1]
    back = decode(encode([shared, shared], "x"), "x")
    assert back == [[1], [1]]
    assert back[0] is not back[1]


# --- leaves and registered types ---


class Tensor:
    def __init__(self, name: str) -> None:
        self.name = name


def test_leaves_are_the_callers_and_are_told_their_paths() -> None:
    seen: list[str] = []

    def put(value: object, path: str) -> JsonValue | None:
        seen.append(path)
        return {"$tensor": value.name} if isinstance(value, Tensor) else None

    value = {"a": [1, (Tensor("w"),)], 3: deque([Tensor("b")]), "n": np.float32(1)}
    encoded = encode(value, "opt.state", leaf=put)
    assert seen == ["opt.state['a'][1][0]", "opt.state[3][0]"]

    def get(payload: JsonValue, path: str) -> object:
        return (payload, path)

    back = decode(strict(encoded), "opt.state", leaf={"tensor": get})
    assert back["a"][1][0] == ("w", "opt.state['a'][1][0]")
    assert back[3][0] == ("b", "opt.state[3][0]")
    with pytest.raises(UnsupportedValueError, match=r"^opt\[0\] is of type .*Plain"):
        encode([Plain()], "opt", leaf=put)
    with pytest.raises(FormatError, match="'tensor'"):
        decode(encoded, "opt.state")


def test_leaves_inside_sets_and_keys_are_refused() -> None:
    for value in ({Tensor("w")}, {(Tensor("w"),): 1}):
        with pytest.raises(UnsupportedValueError, match=r"test_values\.Tensor"):
            encode(value, "x", leaf=lambda _value, _path: {"$tensor": "w"})


@pytest.fixture
def registry() -> Iterator[None]:
    types, tags = dict(ENCODERS), dict(DECODERS)
    yield
    for table, kept in ((ENCODERS, types), (DECODERS, tags)):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


class Range:
    def __init__(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError("low > high")
        self.low, self.high = low, high

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.low, self.high))


@pytest.mark.usefixtures("registry")
def test_a_registered_type_comes_back_and_its_subclasses_are_refused() -> None:
    register_value(Range, lambda value: (value.low, value.high), lambda content: Range(*content), tag="test.range")
    value = {"a": [Range(0, math.inf)], Range(1, 2): {Range(3, 4)}}
    encoded = strict(encode(value, "x"))
    assert encode(Range(0, 1), "x") == {"$test.range": {"$tuple": [0, 1]}}
    assert decode(encoded, "x") == value

    class Narrow(Range):
        pass

    with pytest.raises(UnsupportedValueError, match="Narrow"):
        encode(Narrow(0, 1), "x")


@pytest.mark.usefixtures("registry")
def test_a_registered_type_may_contain_others_and_leaves() -> None:
    def box(content: object) -> SimpleNamespace:
        return SimpleNamespace(content=content)

    register_value(Range, lambda value: [value.low, value.high], lambda content: Range(*content))
    register_value(SimpleNamespace, lambda value: value.content, box)
    value = box({"range": Range(0, 1), "inner": box((box(None),))})
    assert decode(strict(encode(value, "x")), "x") == value
    encoded = encode(box([Tensor("w")]), "x", leaf=lambda leaf, path: {"$tensor": [leaf.name, path]})  # type: ignore[attr-defined]
    assert decode(encoded, "x", leaf={"tensor": lambda payload, _path: payload}) == box([["w", "x[0]"]])


@pytest.mark.usefixtures("registry")
def test_a_type_that_is_not_registered_here_is_named_with_the_remedy() -> None:
    register_value(Range, lambda value: [value.low, value.high], lambda content: Range(*content), tag="test.range")
    encoded = encode({"a": Range(0, 1)}, "x")
    del DECODERS["test.range"]
    with pytest.raises(FormatError, match=r"^x\['a'\]: .*'test\.range'.*register_value"):
        decode(encoded, "x")
    assert decode(encoded, "x", lenient=True) == {"a": Opaque("test.range", [0, 1])}


@pytest.mark.usefixtures("registry")
def test_failures_of_registered_functions_are_told_with_the_path() -> None:
    register_value(Range, lambda value: value.missing, lambda content: Range(*content), tag="test.range")  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedValueError, match=r"^x\[0\] .*Range failed: AttributeError"):
        encode([Range(0, 1)], "x")
    for content in ([2, 1], [1], 3, {"$bytes": ""}):
        with pytest.raises(FormatError, match=r"^x\[0\]: .*'test\.range' failed"):
            decode([{"$test.range": content}], "x")
        assert decode([{"$test.range": content}], "x", lenient=True) == [Opaque("test.range", content)]


@pytest.mark.usefixtures("registry")
def test_one_type_has_one_tag_and_one_tag_one_type() -> None:
    def same_value(value: Any) -> Any:
        return value

    register_value(Range, same_value, same_value, tag="test.range")
    for kind, tag, match in [
        (Range, "test.other", "only once"),
        (Plain, "test.range", "taken"),
        (Plain, "numpy.ndarray", "taken"),
        (Plain, "plain", "dot"),
        (Plain, "test.\n", "dot"),
        (dict, None, "only once"),
        (dict, "test.dict", "only once"),
        (np.float32, "test.float", "only once"),
    ]:
        with pytest.raises(StateError, match=match):
            register_value(kind, same_value, same_value, tag=tag)


@pytest.mark.usefixtures("registry")
def test_a_class_that_is_defined_again_replaces_the_one_before() -> None:
    def define() -> type:
        class Cell:
            pass

        register_value(Cell, lambda _value: None, lambda _content: Cell())
        return Cell

    first, second = define(), define()
    assert type(decode(encode(second(), "x"), "x")) is second
    with pytest.raises(UnsupportedValueError, match="Cell"):
        encode(first(), "x")


@pytest.mark.usefixtures("registry")
def test_an_encoder_that_never_arrives_at_plain_values_is_refused() -> None:
    register_value(Plain, lambda _value: [Plain()], lambda _content: Plain(), tag="test.plain")
    with pytest.raises(UnsupportedValueError, match="nested deeper"):
        encode(Plain(), "x")


# --- comparing ---


@given(VALUES, VALUES)
def test_there_is_a_first_difference_exactly_where_the_canonical_bytes_differ(a: object, b: object) -> None:
    one, other = encode(a, "x"), encode(b, "x")
    assert first_difference(one, encode(a, "x")) is None
    assert (first_difference(one, other, "x") is None) == (canonical(one) == canonical(other))
    assert first_difference([0, one], [0, other], "x") == (
        None if canonical(one) == canonical(other) else first_difference(one, other, "x[1]")
    )


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [
        (1, 1.0, "x"),
        (1, True, "x"),
        (0.0, -0.0, "x"),
        ([1], (1,), "x"),
        ([1, 2, 3], [1, 4, 3], "x[1]"),
        ([1, 2], [1, 2, 3], "x[2]"),
        ({"a": {"b": [0, 1]}}, {"a": {"b": [0, 2]}}, "x['a']['b'][1]"),
        ({"a": 1}, {"a": 1, "b": 2}, "x['b']"),
        ({"$a": 1}, {"$a": 2}, "x['$a']"),
        ({1: (0, [5])}, {1: (0, [6])}, "x[1][1][0]"),
        ({1: 2}, {1: 2, "a": 3}, 'x["a"]'),
        ({1, 2}, {1, 3}, "x"),
        (np.zeros(3), np.ones(3), "x"),
        (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), "x"),
        (math.nan, 0.0, "x"),
    ],
)
def test_the_first_difference_is_named(a: object, b: object, place: str) -> None:
    assert first_difference(encode(a, "x"), encode(b, "x"), "x") == place


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: {2: 0, 3: 0}, "b": 2}, {"b": 2, 1: {3: 0, 2: 0}}),
        ([math.nan], [math.nan]),
        (Counter("ab"), Counter("ba")),
        ({("a", 1), "b"}, {"b", ("a", 1)}),
    ],
)
def test_what_python_holds_equal_has_no_difference(a: object, b: object) -> None:
    assert canonical(encode(a, "x")) == canonical(encode(b, "x"))
    assert first_difference(encode(a, "x"), encode(b, "x")) is None


def test_differences_of_malformed_json_are_found_without_failing() -> None:
    assert first_difference({"$dict": 1}, {"$dict": [[1, 2]]}, "x") == "x"
    assert first_difference({"$dict": [1]}, {"$dict": [[1, 2, 3]]}, "x") == "x"
    assert first_difference({"$tuple": 1}, {"$tuple": [1]}, "x") == "x"


# --- hostile JSON ---

TAGS = st.sampled_from([f"${tag}" for tag in DECODERS])
PAYLOADS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=5),
    st.sampled_from(["<f4", "|b1", "<U2", "|O", "<M8[s]", "bfloat16", "F", "nan", "0x1", "2024-01-02", "UTC", "AAAA"]),
    st.sampled_from(["at", "zone", "fold", "dtype", "shape", "data", "blob", "maxlen", "items"]),
    st.just({"blob": "x"}),
)
HOSTILE = st.recursive(
    PAYLOADS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TAGS, inner, min_size=1, max_size=1),
        st.dictionaries(st.one_of(TAGS, st.text(max_size=3)), inner, max_size=3),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("dtype", "shape", "data", "order"), inner)),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("at", "fold", "zone", "maxlen", "items", "blob"), inner)),
    ),
    max_leaves=15,
)


def decodes_or_is_refused(encoded: Any) -> None:
    for lenient, blob in ((False, None), (True, None), (False, lambda _reference: b"\xff" * 8)):
        try:
            value = decode(encoded, "x", lenient=lenient, blob=blob)
        except FormatError as error:
            assert str(error).startswith("x")  # noqa: PT017
        else:
            brief(value)


@settings(max_examples=600)
@given(HOSTILE)
def test_any_json_is_a_value_or_refused(encoded: Any) -> None:
    decodes_or_is_refused(encoded)


@settings(max_examples=400)
@given(VALUES, HOSTILE, st.randoms(use_true_random=False))
def test_an_encoded_value_with_a_part_exchanged_is_a_value_or_refused(value: object, part: Any, random: Any) -> None:
    encoded: Any = [encode(value, "x")]
    at, key = encoded, 0
    while isinstance(at[key], list | dict) and at[key] and random.random() < 0.8:
        at, key = at[key], random.choice(list(at[key]) if isinstance(at[key], dict) else range(len(at[key])))
    at[key] = part
    decodes_or_is_refused(encoded[0])


ONE = base64.b64encode(b"\1").decode()
MALFORMED: list[Any] = [
    2**53,
    -(2**53),
    10**5000,
    math.inf,
    math.nan,
    "\ud800",
    {"a": "\udfff"},
    {"\ud800": 1},
    {1: 2},
    b"bytes",
    (1,),
    {"$": 1},
    {"$nonsense": 1},
    {"$os.system": "true"},
    {"$tuple": [], "$list": []},
    {"$x": 1, "a": 2},
    {"$int": 1},
    {"$int": "12"},
    {"$int": "0x"},
    {"$int": "0x1_0"},
    {"$int": " 0x1"},
    {"$int": "0x\u0661"},
    {"$float": 1.0},
    {"$float": "infinity"},
    {"$float": "1"},
    {"$float": ["nan"]},
    {"$str": "@"},
    {"$str": "/w=="},
    {"$complex": [1.0]},
    {"$complex": [1, 2.0]},
    {"$complex": [1.0, "2"]},
    {"$bytes": "A"},
    {"$bytes": "AA==\n"},
    {"$bytes": "\u00e9"},
    {"$bytes": {"blob": 1, "also": 2}},
    {"$bytes": {"blob": 1}},
    {"$bytes": [1, 2]},
    {"$tuple": {"a": 1}},
    {"$tuple": "abc"},
    {"$set": [[1]]},
    {"$set": [1, 1]},
    {"$set": [1, 1.0]},
    {"$frozenset": [{"$set": []}]},
    {"$dict": {}},
    {"$dict": [[1]]},
    {"$dict": [[1, 2, 3]]},
    {"$dict": [["a", 1], ["a", 2]]},
    {"$dict": [[[], 1]]},
    {"$ordered_dict": [[{"a": 1}, 1]]},
    {"$counter": [1]},
    {"$deque": {"items": [1, 2], "maxlen": 1}},
    {"$deque": {"items": [], "maxlen": -1}},
    {"$deque": {"items": [], "maxlen": True}},
    {"$deque": {"items": [], "maxlen": {"$int": hex(2**70)}}},
    {"$deque": {"items": []}},
    {"$deque": []},
    {"$range": [0, 1]},
    {"$range": [0, 1, 0]},
    {"$range": [0, 1.5, 1]},
    {"$date": "2024-02-30"},
    {"$date": "20240101"},
    {"$date": "2024-W01-1"},
    {"$date": 20240101},
    {"$datetime": "2024-01-01T00:00:00.000000"},
    {"$datetime": {"at": "2024-01-01"}},
    {"$datetime": {"at": "2024-01-01T25:00:00.000000"}},
    {"$datetime": {"at": "0000-01-01T00:00:00.000000"}},
    {"$datetime": {"at": "2024-01-01T00:00:00.000000+01:00"}},
    {"$datetime": {"at": "2024-01-01T00:00:00.000000", "zone": 3}},
    {"$datetime": {"at": "2024-01-01T00:00:00.000000", "fold": 2}},
    {"$datetime": {"at": "2024-01-01T00:00:00.000000", "fold": True}},
    {"$datetime": {"at": "2024-01-01T00:00:00.000000", "other": 1}},
    {"$time": {"at": "24:00:00.000000"}},
    {"$timedelta": [10**10, 0, 0]},
    {"$timedelta": [0, 0]},
    {"$timedelta": [0.5, 0, 0]},
    {"$timezone": []},
    {"$timezone": [86_400_000_000]},
    {"$timezone": [0, 1]},
    {"$timezone": [0, "a", "b"]},
    {"$zoneinfo": "../../../etc/passwd"},
    {"$zoneinfo": "/etc/localtime"},
    {"$zoneinfo": "os.path/join"},
    {"$zoneinfo": "No/Such_Zone"},
    {"$zoneinfo": "America"},
    {"$zoneinfo": ""},
    {"$zoneinfo": "UTC\n"},
    {"$numpy.str": 1},
    {"$numpy.str": [1]},
    {"$numpy.bytes": 1},
    {"$numpy.scalar": {"dtype": "<f4", "data": ONE}},
    {"$numpy.scalar": {"dtype": "<f4"}},
    {"$numpy.scalar": 1.0},
    *(
        {"$numpy.ndarray": {"dtype": "|u1", "shape": [1], "data": ONE, **change}}
        for change in [
            {"dtype": "|O"},
            {"dtype": "O"},
            {"dtype": "object"},
            {"dtype": "float128"},
            {"dtype": "<f16"},
            {"dtype": "i4,f4"},
            {"dtype": "|V0"},
            {"dtype": "<U0"},
            {"dtype": "|S1000000000000"},
            {"dtype": "<M8[0s]"},
            {"dtype": "<M8[7fortnights]"},
            {"dtype": "<M8[s"},
            {"dtype": ["|u1"]},
            {"dtype": ""},
            {"dtype": "T"},
            {"dtype": "qint8"},
            {"shape": [], "data": ""},
            {"shape": [2]},
            {"shape": [-1]},
            {"shape": [-1, -1]},
            {"shape": [True]},
            {"shape": [1.0]},
            {"shape": 1},
            {"shape": "1"},
            {"shape": [2**52, 2**52]},
            {"shape": [0]},
            {"shape": [0, 2**52, 2**52], "data": ""},
            {"shape": [1] * 65},
            {"shape": [1] * 100_000},
            {"data": "AA"},
            {"data": 1},
            {"data": None},
            {"data": {"blob": "x"}},
            {"order": "C"},
            {"order": 1},
            {"order": ["F"]},
            {"extra": 1},
        ]
    ),
    {"$numpy.ndarray": {"dtype": "<U1", "shape": [1], "data": "/////w=="}},
    {"$numpy.ndarray": {"dtype": "|u1", "shape": [1]}},
    {"$numpy.ndarray": []},
]


@pytest.mark.parametrize("encoded", MALFORMED, ids=[f"{n}-{brief(json_)[:50]!a}" for n, json_ in enumerate(MALFORMED)])
def test_malformed_json_is_refused_by_its_path(encoded: Any) -> None:
    with pytest.raises(FormatError, match=r"^opt\['a'\]\[1\]") as caught:
        decode({"a": [0, encoded]}, "opt")
    assert len(str(caught.value)) < 2000
    assert str(caught.value.tensor).startswith("opt['a'][1]")


def test_nothing_is_allocated_by_a_claim() -> None:
    claims: list[Any] = [
        {"$numpy.ndarray": {"dtype": "<f8", "shape": [2**40], "data": ""}},
        {"$numpy.ndarray": {"dtype": "<f8", "shape": [2**20, 2**20], "data": ONE}},
        {"$numpy.ndarray": {"dtype": "|S999999999", "shape": [1], "data": ONE}},
        {"$numpy.scalar": {"dtype": "<U999999999", "data": ONE}},
        {"$deque": {"maxlen": 2**52, "items": []}},
        {"$range": [0, 2**52, 1]},
    ]
    tracemalloc.start()
    try:
        for claim in claims:
            decodes_or_is_refused(claim)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_nothing_that_json_names_is_imported() -> None:
    for tag in ("this.s", "antigravity.fly", "xml.dom.minidom.Document", "zoneinfo.ZoneInfo"):
        before = set(sys.modules)
        with pytest.raises(FormatError, match="not registered"):
            decode({f"${tag}": "x"}, "x")
        assert set(sys.modules) == before


def test_bools_of_other_bytes_become_true() -> None:
    array = decode({"$numpy.ndarray": {"dtype": "|b1", "shape": [4], "data": "AAEC/w=="}}, "x")
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_errors_of_blob_readers_reach_the_caller() -> None:
    def torn(_reference: JsonValue) -> bytes:
        raise CheckpointError("the blob is damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        decode({"$bytes": {"blob": "x"}}, "x", blob=torn)


def test_a_lenient_reader_shows_what_it_can() -> None:
    encoded: Any = {
        "epoch": 3,
        "big": {"$numpy.ndarray": {"dtype": "<f4", "shape": [9], "data": {"blob": "d"}}},
        "dtype": {"$torch.some": "x"},
        "set": {"$set": [{"$torch.some": ["a"]}, {"$torch.some": ["b"]}]},
        "at": {"$time": {"at": "00:00:00.000000", "zone": {"$pytz.zone": "x"}}},
    }
    shown = decode(encoded, "x", lenient=True)
    assert shown["epoch"] == 3
    assert [type(value) for value in shown.values()] == [int, Opaque, Opaque, set, Opaque]
    assert len(shown["set"]) == 2
    with pytest.raises(FormatError, match="malformed"):
        decode({"$int": "x"}, "x", lenient=True)


def test_dates_keep_their_type() -> None:
    value = [date(2024, 1, 1), datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC)]  # noqa: DTZ001 - naive on purpose
    assert [type(item) for item in decode(encode(value, "x"), "x")] == [date, datetime, datetime]
