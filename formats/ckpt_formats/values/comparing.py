"""Comparing encoded values: are those of two ranks, or of two checkpoints, the same, and if not, where do they differ.

It works on the JSON that `encode` makes, so that it needs neither the values' types nor their equality (which for
arrays and NaN is no yes or no). Members of a dict have no order in a comparison, those of an OrderedDict have.
"""

from __future__ import annotations

import json
from typing import Final

from ckpt_formats.values.tree import JsonValue

__all__ = ["canonical", "first_difference"]

_dumps: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False).encode

# tags whose payload is an array of values, or of pairs of values
_SEQUENCES: Final = frozenset({"$tuple"})
_PAIRS: Final = frozenset({"$dict", "$counter"})


def canonical(encoded: JsonValue) -> bytes:
    """Bytes that are equal exactly if two encoded values are the same: types, NaNs and signs of zero included."""
    text = _dumps(encoded)
    if any(f'{{"{tag}":' in text for tag in _PAIRS):
        text = _dumps(_unordered(encoded))
    return text.encode("ascii")


def _unordered(encoded: JsonValue) -> JsonValue:
    if isinstance(encoded, list):
        return [_unordered(item) for item in encoded]
    if isinstance(encoded, dict):
        out = {key: _unordered(item) for key, item in encoded.items()}
        for tag in _PAIRS & out.keys():
            pairs = out[tag]
            if isinstance(pairs, list):
                out[tag] = sorted(pairs, key=_dumps)
        return out
    return encoded


def first_difference(a: JsonValue, b: JsonValue, path: str = "") -> str | None:
    """The path of the first place where two encoded values differ, or None where they are the same.

    `path` is where `a` and `b` themselves are; the answer begins with it: `sampler.state['order'][3]`. A member that
    only one side has is a difference at that member; lists of unequal length differ at the first place that only one of
    them has.
    """
    if isinstance(a, list) and isinstance(b, list):
        for index, (one, other) in enumerate(zip(a, b, strict=False)):
            place = first_difference(one, other, f"{path}[{index}]")
            if place is not None:
                return place
        return None if len(a) == len(b) else f"{path}[{min(len(a), len(b))}]"
    if isinstance(a, dict) and isinstance(b, dict):
        return _first_in_objects(a, b, path)
    return None if canonical(a) == canonical(b) else path


def _first_in_objects(a: dict[str, JsonValue], b: dict[str, JsonValue], path: str) -> str | None:
    tags = _tag(a), _tag(b)
    if tags == (None, None):
        return _first_in_members(
            {f"[{_unescaped(key)!r}]": item for key, item in a.items()},
            {f"[{_unescaped(key)!r}]": item for key, item in b.items()},
            path,
        )
    tag = tags[0]
    if tag is not None and tags[1] == tag:
        if tag in _SEQUENCES:
            return first_difference(a[tag], b[tag], path)
        if tag in _PAIRS:
            one, other = _members(a[tag]), _members(b[tag])
            if one is not None and other is not None:
                return _first_in_members(one, other, path)
    return None if canonical(a) == canonical(b) else path


def _first_in_members(a: dict[str, JsonValue], b: dict[str, JsonValue], path: str) -> str | None:
    for key in a | b:
        if key not in a or key not in b:
            return path + key
        place = first_difference(a[key], b[key], path + key)
        if place is not None:
            return place
    return None


def _members(pairs: JsonValue) -> dict[str, JsonValue] | None:
    members: dict[str, JsonValue] = {}
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        members[f"[{canonical(pair[0]).decode('ascii')}]"] = pair[1]
    return members


def _tag(members: dict[str, JsonValue]) -> str | None:
    if len(members) == 1:
        (key,) = members
        if key.startswith("$") and not key.startswith("$$"):
            return key
    return None


def _unescaped(key: str) -> str:
    return key[1:] if key.startswith("$$") else key
