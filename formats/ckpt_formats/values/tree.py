"""What encoding and decoding agree on: JSON, which values are their own JSON, how deep a tree may be, and paths in it.

It knows no types beyond JSON's own.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

__all__ = [
    "ELEMENT",
    "INDEX",
    "KEY",
    "MAX_DEPTH",
    "ZONE",
    "JsonValue",
    "Where",
    "are_plain",
    "brief",
    "have_plain_keys",
    "is_plain",
    "path_of",
]

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
"""A tree of JSON as Python's json module has it; floats are finite."""

MAX_DEPTH: Final = 100
"""How deep values may be nested: so little that neither side here, nor a parser of JSON, runs out of stack."""

Where: TypeAlias = "str | tuple[Where, str, object, object]"
"""Where a value is: a path, or (where its container is, form of the step, the step, the container).

Only errors and leaves make text of it, so that the way down costs a tuple a step.
"""

INDEX: Final = "[%s]"
KEY: Final = "{key %s}"
ELEMENT: Final = "{%s}"
ZONE: Final = ".tzinfo"

_MAX_INT: Final = 2**53 - 1  # beyond it, other languages' parsers of JSON lose digits

_repr: Final = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def brief(value: object) -> str:
    """A repr that is short whatever the value is, and never fails."""
    try:
        return _repr.repr(value)
    except Exception:  # noqa: BLE001 - ints of too many digits, and whatever users' types do
        return f"<{type(value).__name__}>"


def path_of(where: Where) -> str:
    """The path as Python would write it: `sampler.state['order'][3]`."""
    steps: list[str] = []
    while not isinstance(where, str):
        where, form, step, _ = where
        steps.append(form.replace("%s", brief(step)) if "%s" in form else form)
    return where + "".join(reversed(steps))


def is_plain(value: object) -> bool:
    """Whether a value is its own JSON: null, a bool, a small int, a finite float, or a string of Unicode characters."""
    kind = type(value)
    if kind is int:
        return -_MAX_INT <= value <= _MAX_INT  # type: ignore[operator]
    if kind is str:
        return value.isascii() or _is_unicode(value)  # type: ignore[attr-defined,arg-type]
    if kind is float:
        return math.isfinite(value)  # type: ignore[arg-type]
    return value is None or kind is bool


def are_plain(values: Sequence[object]) -> bool:
    """Whether many values are their own JSON. Told quickly, and only for numbers of one type; False may be wrong.

    An order of data is a list of a million integers.
    """
    kinds = set(map(type, values))
    if kinds == {int}:
        return min(values) >= -_MAX_INT and max(values) <= _MAX_INT  # type: ignore[operator,type-var]
    return kinds == {float} and all(map(math.isfinite, values))  # type: ignore[arg-type]


def have_plain_keys(members: Mapping[Any, object]) -> bool:
    """Whether all keys are strings of Unicode characters."""
    return set(map(type, members)) <= {str} and ("".join(members).isascii() or all(map(is_plain, members)))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: strict parsers of JSON refuse it
        return False
    return True
