"""Values -> typed JSON. What is not in the table of encoders is refused, by its path and with a remedy."""

from __future__ import annotations

import binascii
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np

from ckpt_formats.errors import UnsupportedValueError
from ckpt_formats.values.comparing import canonical
from ckpt_formats.values.numpy_values import SCALAR_TYPES, array_bytes, dtype_name
from ckpt_formats.values.tree import (
    ELEMENT,
    INDEX,
    KEY,
    MAX_DEPTH,
    ZONE,
    JsonValue,
    Where,
    are_plain,
    have_plain_keys,
    is_plain,
    path_of,
)

__all__ = ["ENCODERS", "Encoder", "encode", "refused", "type_name"]

Blob: TypeAlias = Callable[[bytes], JsonValue]
Leaf: TypeAlias = Callable[[object, str], "JsonValue | None"]


def encode(
    value: object, path: str, *, blob: Blob | None = None, inline_limit: int = 4096, leaf: Leaf | None = None
) -> JsonValue:
    """The typed JSON of a value.

    Args:
        value: built from the types listed in docs/values.md and registered ones. References that are shared within it
            are not kept: each becomes a copy.
        path: what errors call the value, such as `sampler.state`.
        blob: stores bytes and returns how `decode`'s `blob` will find them. Called for bytes and arrays of more than
            `inline_limit` bytes, except those inside sets and keys. Without it everything is inline.
        inline_limit: in bytes.
        leaf: asked for each value whose type has no encoding (in containers too, but not in sets and keys), with its
            path. Returns its JSON, an object with the single key `$<tag>`, or None: then the value is refused.

    Raises UnsupportedValueError for values that can't be stored, that contain themselves, or that are nested deeper
    than MAX_DEPTH; it names their path and the remedy.
    """
    return Encoder(blob, inline_limit, leaf).value(value, path, 0)


class Encoder:
    """One call of `encode`."""

    __slots__ = ("blob", "inline_limit", "leaf", "sealed")

    def __init__(self, blob: Blob | None, inline_limit: int, leaf: Leaf | None) -> None:
        self.blob = blob
        self.inline_limit = inline_limit
        self.leaf = leaf
        # Elements of sets are sorted by their JSON, and keys compared by it, so it has to say all there is
        self.sealed = self if blob is None and leaf is None else Encoder(None, 0, None)

    def value(self, value: Any, where: Where, depth: int) -> JsonValue:
        if is_plain(value):
            return value  # type: ignore[no-any-return]
        if depth > MAX_DEPTH:
            raise _too_deep(value, where)
        encoder = ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value, where, depth)
        encoded = None if self.leaf is None else self.leaf(value, path_of(where))
        if encoded is None:
            reason = f"is of type {type_name(type(value))}, which can't be saved without a pickle"
            raise refused(where, f"{reason}: {_remedy(value)}")
        return encoded

    def sequence(self, items: Sequence[Any], where: Where, depth: int) -> list[JsonValue]:
        if len(items) > 8 and are_plain(items):
            return list(items)
        depth += 1
        encoded: list[JsonValue] = []
        for index, item in enumerate(items):
            encoded.append(item if is_plain(item) else self.value(item, (where, INDEX, index, items), depth))
        return encoded

    def mapping(self, items: dict[Any, Any], where: Where, depth: int) -> JsonValue:
        if not have_plain_keys(items):
            return {"$dict": self.pairs(items, where, depth)}
        depth += 1
        encoded: dict[str, JsonValue] = {}
        for key, item in items.items():
            plain = item if is_plain(item) else self.value(item, (where, INDEX, key, items), depth)
            encoded["$" + key if key[:1] == "$" else key] = plain
        return encoded

    def pairs(self, items: Mapping[Any, Any], where: Where, depth: int) -> list[JsonValue]:
        depth += 1
        encoded: list[JsonValue] = []
        for key, item in items.items():
            first = self.sealed.value(key, (where, KEY, key, items), depth)
            encoded.append([first, self.value(item, (where, INDEX, key, items), depth)])
        return encoded

    def elements(self, items: Iterable[Any], where: Where, depth: int) -> list[JsonValue]:
        depth += 1
        encoded = [self.sealed.value(item, (where, ELEMENT, item, items), depth) for item in items]
        return sorted(encoded, key=canonical)  # a set's own order differs from process to process

    def raw(self, data: bytes | bytearray) -> JsonValue:
        if self.blob is not None and len(data) > self.inline_limit:
            return {"blob": self.blob(bytes(data))}
        return binascii.b2a_base64(data, newline=False).decode("ascii")

    def array(self, value: np.ndarray[Any, Any], where: Where) -> JsonValue:
        name = _numpy_name(value.dtype, where)
        data, fortran = array_bytes(value)
        encoded: dict[str, JsonValue] = {"dtype": name, "shape": list(value.shape), "data": self.raw(data)}
        if fortran:
            encoded["order"] = "F"
        return {"$numpy.ndarray": encoded}

    def scalar(self, value: np.generic[Any], where: Where) -> JsonValue:
        return {"$numpy.scalar": {"dtype": _numpy_name(value.dtype, where), "data": self.raw(value.tobytes())}}

    def moment(self, value: datetime | time, where: Where, depth: int) -> JsonValue:
        encoded: dict[str, JsonValue] = {"at": value.replace(tzinfo=None).isoformat(timespec="microseconds")}
        if value.fold:
            encoded["fold"] = 1
        if value.tzinfo is not None:
            encoded["zone"] = self.value(value.tzinfo, (where, ZONE, None, value), depth + 1)
        return encoded

    def offset(self, value: timezone, where: Where, depth: int) -> JsonValue:
        # what its constructor was given: an offset, and perhaps a name
        offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
        return {"$timezone": [offset // timedelta(microseconds=1), *self.sequence(name, where, depth)]}

    def zone(self, value: ZoneInfo, where: Where) -> JsonValue:
        if not value.key:
            raise refused(where, "is a ZoneInfo that was read from a file; use ZoneInfo(key), or a datetime.timezone")
        return {"$zoneinfo": value.key}


def _int(value: int) -> JsonValue:
    return value if is_plain(value) else {"$int": hex(value)}


def _float(value: float) -> JsonValue:
    if math.isfinite(value):
        return value
    return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}


def _str(value: str) -> JsonValue:
    if is_plain(value):
        return value
    data = value.encode("utf-8", "surrogatepass")
    return {"$str": binascii.b2a_base64(data, newline=False).decode("ascii")}


def _numpy_name(dtype: np.dtype[Any], where: Where) -> str:
    try:
        return dtype_name(dtype)
    except TypeError as error:
        raise refused(where, str(error)) from None


ENCODERS: Final[dict[type, Callable[[Encoder, Any, Where, int], JsonValue]]] = {
    type(None): lambda _e, _v, _w, _d: None,
    bool: lambda _e, v, _w, _d: bool(v),
    int: lambda _e, v, _w, _d: _int(v),
    float: lambda _e, v, _w, _d: _float(v),
    str: lambda _e, v, _w, _d: _str(v),
    complex: lambda _e, v, _w, _d: {"$complex": [_float(v.real), _float(v.imag)]},
    bytes: lambda e, v, _w, _d: {"$bytes": e.raw(v)},
    bytearray: lambda e, v, _w, _d: {"$bytearray": e.raw(v)},
    list: lambda e, v, w, d: e.sequence(v, w, d),
    tuple: lambda e, v, w, d: {"$tuple": e.sequence(v, w, d)},
    deque: lambda e, v, w, d: {"$deque": {"maxlen": v.maxlen, "items": e.sequence(v, w, d)}},
    dict: lambda e, v, w, d: e.mapping(v, w, d),
    OrderedDict: lambda e, v, w, d: {"$ordered_dict": e.pairs(v, w, d)},
    Counter: lambda e, v, w, d: {"$counter": e.pairs(v, w, d)},
    set: lambda e, v, w, d: {"$set": e.elements(v, w, d)},
    frozenset: lambda e, v, w, d: {"$frozenset": e.elements(v, w, d)},
    range: lambda _e, v, _w, _d: {"$range": [_int(v.start), _int(v.stop), _int(v.step)]},
    datetime: lambda e, v, w, d: {"$datetime": e.moment(v, w, d)},
    date: lambda _e, v, _w, _d: {"$date": v.isoformat()},
    time: lambda e, v, w, d: {"$time": e.moment(v, w, d)},
    timedelta: lambda _e, v, _w, _d: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    timezone: lambda e, v, w, d: e.offset(v, w, d),
    ZoneInfo: lambda e, v, w, _d: e.zone(v, w),
    np.ndarray: lambda e, v, w, _d: e.array(v, w),
    **dict.fromkeys(SCALAR_TYPES, lambda e, v, w, _d: e.scalar(v, w)),
    # these may be empty or end with zeros, which their dtypes (and np.str_'s own str) would drop
    np.str_: lambda _e, v, _w, _d: {"$numpy.str": _str(str.__str__(v))},
    np.bytes_: lambda e, v, _w, _d: {"$numpy.bytes": e.raw(bytes(v))},
}
"""Type, exactly -> its encoder. Registered types join here."""

_BUILT_IN: Final = (*ENCODERS, np.generic)


def refused(where: Where, reason: str) -> UnsupportedValueError:
    path = path_of(where)
    return UnsupportedValueError(f"{path} {reason}", tensor=path)


def type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _too_deep(value: object, where: Where) -> UnsupportedValueError:
    # A cycle always ends here, since each turn takes it down, so only here is one looked for
    chain: list[tuple[Where, object]] = [(where, value)]
    while not isinstance(where, str):
        where, _, _, container = where
        chain.append((where, container))
    seen: set[int] = set()
    for place, container in reversed(chain):
        if id(container) in seen:
            return refused(place, "contains itself; save what it refers back to by a name or an index instead")
        seen.add(id(container))
    return refused(where, f"is nested deeper than {MAX_DEPTH} levels; flatten it, or convert it to an array")


def _remedy(value: object) -> str:
    register = "register its type with ckpt.register_value"
    if isinstance(value, Enum):
        return f"save its .value or .name, or {register}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType | MethodType):
        return "code is not state; save what is needed to find it again, such as a name"
    if isinstance(value, memoryview):
        return "convert it with bytes(...)"
    for base in _BUILT_IN:
        if isinstance(value, base):
            return f"convert it to a plain {type_name(base)}, or {register}"
    return f"convert it to numbers, strings, lists, dicts or arrays, or {register}"
