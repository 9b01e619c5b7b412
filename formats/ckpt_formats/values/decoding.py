"""Typed JSON -> values. The JSON need not be trusted: all it can do is to be refused.

Nothing is imported or called because the JSON names it, and nothing is allocated because it claims a size: every object
that is made is about as large as the text that it is made from. (A blob's size is for whoever reads it to check.)
"""

from __future__ import annotations

import binascii
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any, Final, TypeAlias, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from ckpt_formats.errors import FormatError
from ckpt_formats.values.numpy_values import array_dtype, array_of
from ckpt_formats.values.tree import (
    INDEX,
    KEY,
    MAX_DEPTH,
    ZONE,
    JsonValue,
    Where,
    are_plain,
    brief,
    have_plain_keys,
    is_plain,
    path_of,
)

__all__ = ["DECODERS", "CannotDecodeError", "Decoder", "Opaque", "decode"]

Blob: TypeAlias = Callable[[JsonValue], bytes]
Leaf: TypeAlias = Callable[[JsonValue, str], object]

_T = TypeVar("_T")


def decode(
    encoded: JsonValue,
    path: str,
    *,
    blob: Blob | None = None,
    leaf: Mapping[str, Leaf] | None = None,
    lenient: bool = False,
) -> Any:
    """The value of its typed JSON, which need not be trusted.

    Args:
        encoded: JSON as `json.loads` makes it.
        path: what errors call the value, such as `sampler.state`.
        blob: returns the bytes for what `encode`'s `blob` returned.
        leaf: tag (without `$`) -> function of (payload, path) that makes the value; asked before all other tags.
        lenient: put an `Opaque` in the place of a value that can't be made here although nothing is wrong with the
            JSON: its tag is not known, its registered decoder fails, or there is no `blob` to read its bytes.

    Raises FormatError, naming path and tag, for anything that `encode` can't have made.
    """
    return Decoder(blob, leaf or {}, lenient).value(encoded, path, 0)


@dataclass(frozen=True, slots=True)
class Opaque:
    """What a lenient `decode` gives for a value that it can't make: its tag, and its payload as it is stored."""

    tag: str
    payload: JsonValue

    def __hash__(self) -> int:
        return hash(self.tag)  # the payload may be a list


class CannotDecodeError(Exception):
    """The JSON may be right, but its value can't be made here."""


class Decoder:
    """One call of `decode`."""

    __slots__ = ("blob", "leaf", "lenient")

    def __init__(self, blob: Blob | None, leaf: Mapping[str, Leaf], lenient: bool) -> None:
        self.blob = blob
        self.leaf = leaf
        self.lenient = lenient

    def value(self, encoded: object, where: Where, depth: int) -> Any:
        if is_plain(encoded):
            return encoded
        if depth > MAX_DEPTH:
            raise _malformed(where, f"values are nested deeper than {MAX_DEPTH} levels")
        if type(encoded) is list:
            return self.items(encoded, where, depth)
        if type(encoded) is dict:
            return self.mapping(encoded, where, depth)
        raise _malformed(where, f"{brief(encoded)} has to be written with a tag")

    def items(self, encoded: list[Any], where: Where, depth: int) -> list[Any]:
        if len(encoded) > 8 and are_plain(encoded):
            return list(encoded)
        depth += 1
        return [
            item if is_plain(item) else self.value(item, (where, INDEX, index, None), depth)
            for index, item in enumerate(encoded)
        ]

    def mapping(self, encoded: dict[Any, Any], where: Where, depth: int) -> Any:
        if len(encoded) == 1:
            ((key, payload),) = encoded.items()
            if type(key) is str and key[:1] == "$" and key[:2] != "$$":
                return self.tagged(key[1:], payload, where, depth)
        if not have_plain_keys(encoded):
            raise _malformed(where, "a key is not a string of Unicode characters")
        depth += 1
        members: dict[str, Any] = {}
        for key, item in encoded.items():
            if key[:1] == "$" and key[:2] != "$$":
                raise _malformed(where, f"an object of {len(encoded)} members can't have the tag {brief(key)}")
            name = key[1:] if key[:1] == "$" else key
            members[name] = item if is_plain(item) else self.value(item, (where, INDEX, name, None), depth)
        return members

    def tagged(self, tag: str, payload: Any, where: Where, depth: int) -> Any:
        leaf = self.leaf.get(tag)
        if leaf is not None:
            return leaf(payload, path_of(where))
        try:
            decoder = DECODERS.get(tag)
            if decoder is None:
                raise CannotDecodeError(_unknown(tag))
            return decoder(self, payload, where, depth)
        except FormatError:
            raise
        except CannotDecodeError as error:
            if self.lenient:
                return Opaque(tag, payload)
            raise _malformed(where, str(error)) from error.__cause__
        except (ValueError, TypeError, OverflowError) as error:
            raise _malformed(where, f"malformed ${brief(tag)[1:-1]}: {error}") from error

    def pairs(self, encoded: object, where: Where, depth: int) -> dict[Any, Any]:
        depth += 1
        pairs = _a(list, encoded)
        members: dict[Any, Any] = {}
        for pair in pairs:
            first, second = _a(list, pair, 2)
            key = self.value(first, (where, KEY, first, None), depth)
            members[key] = self.value(second, (where, INDEX, key, None), depth)
        if len(members) != len(pairs):
            raise ValueError("a key is there twice")
        return members

    def elements(self, encoded: object, where: Where, depth: int) -> set[Any]:
        items = self.items(_a(list, encoded), where, depth)
        members = set(items)
        if len(members) != len(items):
            raise ValueError("an element is there twice")
        return members

    def raw(self, encoded: object) -> bytes:
        if type(encoded) is str:
            return binascii.a2b_base64(encoded, strict_mode=True)
        (reference,) = _members(encoded, "blob")
        if self.blob is None:
            raise CannotDecodeError("its bytes are stored apart, and no way to read them was given")
        return bytes(self.blob(reference))

    def array(self, payload: object) -> np.ndarray[Any, Any]:
        dtype, shape, data, order = _members(payload, "dtype", "shape", "data", optional="order")
        sizes = [_a(int, size) for size in _a(list, shape)]
        if order not in (None, "F"):
            raise ValueError(f"order {brief(order)} is unknown")
        return array_of(array_dtype(_a(str, dtype)), sizes, self.raw(data), fortran=order is not None)

    def scalar(self, payload: object) -> Any:
        dtype, data = _members(payload, "dtype", "data")
        return array_of(array_dtype(_a(str, dtype)), [], self.raw(data), fortran=False)[()]

    def numbers(self, kind: type[_T], count: int, payload: object, where: Where, depth: int) -> list[_T]:
        return [_a(kind, item) for item in self.items(_a(list, payload, count), where, depth)]

    def bounded(self, payload: object, where: Where, depth: int) -> deque[Any]:
        maxlen, encoded = _members(payload, "maxlen", "items")
        items = self.items(_a(list, encoded), where, depth)
        if maxlen is not None and _a(int, maxlen) < len(items):
            raise ValueError(f"{len(items)} items do not fit maxlen {maxlen}")
        return deque(items, maxlen)

    def zone_and_fold(self, zone: object, fold: object, where: Where, depth: int) -> dict[str, Any]:
        made = self.value(zone, (where, ZONE, None, None), depth + 1)
        if isinstance(made, Opaque):
            raise CannotDecodeError(f"its time zone is of the unknown kind {made.tag!r}")
        if made is not None and not isinstance(made, tzinfo):
            raise ValueError(f"{brief(made)} is not a time zone")
        if fold is not None and (type(fold) is not int or fold != 1):
            raise ValueError(f"fold {brief(fold)} is not 1")
        return {"tzinfo": made, "fold": 0 if fold is None else 1}

    def moment(self, payload: object, where: Where, depth: int) -> datetime:
        at, zone, fold = _members(payload, "at", optional=("zone", "fold"))
        return datetime.fromisoformat(_matching(_DATETIME, at)).replace(**self.zone_and_fold(zone, fold, where, depth))

    def clock(self, payload: object, where: Where, depth: int) -> time:
        at, zone, fold = _members(payload, "at", optional=("zone", "fold"))
        return time.fromisoformat(_matching(_TIME, at)).replace(**self.zone_and_fold(zone, fold, where, depth))

    def offset(self, payload: object, where: Where, depth: int) -> timezone:
        offset, *name = self.items(_a(list, payload), where, depth)
        return timezone(timedelta(microseconds=_a(int, offset)), *(_a(str, text) for text in name))


_HEX: Final = re.compile(r"-?0x[0-9a-f]+", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIME: Final = re.compile(r"\d\d:\d\d:\d\d\.\d{6}", re.ASCII)
_DATETIME: Final = re.compile(f"{_DATE.pattern}T{_TIME.pattern}", re.ASCII)
# No dots, because zoneinfo may look for a zone as a resource of a package that is named by its key
_ZONE_KEY: Final = re.compile(r"[A-Za-z0-9_+-]{1,64}(?:/[A-Za-z0-9_+-]{1,64}){0,4}", re.ASCII)


def _zoneinfo(payload: object) -> ZoneInfo:
    key = _matching(_ZONE_KEY, payload)
    try:
        return ZoneInfo(key)
    except (ZoneInfoNotFoundError, OSError) as error:
        raise CannotDecodeError(f"this machine has no time zone {key!r}; install the tzdata package") from error


def _float(payload: object) -> float:
    if payload not in ("nan", "inf", "-inf"):
        raise ValueError(f"{brief(payload)} is not nan, inf or -inf")
    return float(_a(str, payload))


def _str(payload: object) -> str:
    return binascii.a2b_base64(_a(str, payload), strict_mode=True).decode("utf-8", "surrogatepass")


DECODERS: Final[dict[str, Callable[[Decoder, Any, Where, int], Any]]] = {
    "int": lambda _d, p, _w, _n: int(_matching(_HEX, p), 16),
    "float": lambda _d, p, _w, _n: _float(p),
    "str": lambda _d, p, _w, _n: _str(p),
    "complex": lambda d, p, w, n: complex(*d.numbers(float, 2, p, w, n)),
    "bytes": lambda d, p, _w, _n: d.raw(p),
    "bytearray": lambda d, p, _w, _n: bytearray(d.raw(p)),
    "tuple": lambda d, p, w, n: tuple(d.items(_a(list, p), w, n)),
    "deque": lambda d, p, w, n: d.bounded(p, w, n),
    "dict": lambda d, p, w, n: d.pairs(p, w, n),
    "ordered_dict": lambda d, p, w, n: OrderedDict(d.pairs(p, w, n)),
    "counter": lambda d, p, w, n: Counter(d.pairs(p, w, n)),
    "set": lambda d, p, w, n: d.elements(p, w, n),
    "frozenset": lambda d, p, w, n: frozenset(d.elements(p, w, n)),
    "range": lambda d, p, w, n: range(*d.numbers(int, 3, p, w, n)),
    "datetime": lambda d, p, w, n: d.moment(p, w, n),
    "date": lambda _d, p, _w, _n: date.fromisoformat(_matching(_DATE, p)),
    "time": lambda d, p, w, n: d.clock(p, w, n),
    "timedelta": lambda d, p, w, n: timedelta(*d.numbers(int, 3, p, w, n)),
    "timezone": lambda d, p, w, n: d.offset(p, w, n),
    "zoneinfo": lambda _d, p, _w, _n: _zoneinfo(p),
    "numpy.ndarray": lambda d, p, _w, _n: d.array(p),
    "numpy.scalar": lambda d, p, _w, _n: d.scalar(p),
    "numpy.str": lambda d, p, w, n: np.str_(_a(str, d.value(p, w, n + 1))),
    "numpy.bytes": lambda d, p, _w, _n: np.bytes_(d.raw(p)),
}
"""Tag (without `$`) -> its decoder. Tags of registered types join here."""


def _a(kind: type[_T], value: object, length: int | None = None) -> _T:
    """`value`, which must be of exactly this type, and a list of that length."""
    if type(value) is not kind:
        raise ValueError(f"{brief(value)} is not of type {kind.__name__}")
    if length is not None and isinstance(value, list) and len(value) != length:
        raise ValueError(f"{brief(value)} should have {length} items")
    return value


def _members(value: object, *names: str, optional: str | tuple[str, ...] = ()) -> list[Any]:
    """The members of an object that has all of `names`, perhaps those in `optional` (None otherwise), and no others."""
    members = _a(dict, value)
    known = (*names, *((optional,) if isinstance(optional, str) else optional))
    if not members.keys() <= set(known) or not members.keys() >= set(names):
        raise ValueError(f"an object of {', '.join(known)} is due, not {brief(value)}")
    return [members.get(name) for name in known]


def _matching(pattern: re.Pattern[str], value: object) -> str:
    text = _a(str, value)
    if not pattern.fullmatch(text):
        raise ValueError(f"{brief(text)} is not of the form {pattern.pattern}")
    return text


def _malformed(where: Where, reason: str) -> FormatError:
    path = path_of(where)
    return FormatError(f"{path}: {reason}", tensor=path)


def _unknown(tag: str) -> str:
    if "." in tag:
        return (
            f"a value of the type {brief(tag)}, which is not registered here; call ckpt.register_value for it first "
            "(importing the module that does so is the usual way)"
        )
    return f"a value of the kind {brief(tag)}, which this release does not know; update it"
