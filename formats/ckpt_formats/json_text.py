"""JSON as the formats write and read it: compact, strict, one value per name. Knows nothing of what it says.

orjson does the work, at a fifth of what the standard library costs, wherever it can say the same.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from ckpt_formats.arrays import Buffer
from ckpt_formats.errors import FormatError


def to_json(tree: object) -> bytes:
    """A tree of dicts, lists, tuples, strings, numbers, bools and None as compact JSON.

    Floats in it must be finite. Integers of any size and strings that are no valid Unicode are fine.
    """
    try:
        return orjson.dumps(tree)
    except TypeError:
        # integers beyond 64 bits, lone surrogates, named tuples
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_json(text: Buffer, what: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN. Raises FormatError that names `what`."""
    data = bytes(text)
    try:
        tree = orjson.loads(data)
        # orjson takes the last of two members with one name, and rounds integers that are too large for it: what
        # comes out as it went in had neither
        if orjson.dumps(tree) == data.rstrip(b" \n"):
            return tree
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass
    return _parse_slowly(data, what)


def _parse_slowly(data: bytes, what: str) -> Any:
    def refuse(token: str) -> Any:
        raise FormatError(f"{what}: {token} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=refuse)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FormatError(f"the name {key!r} occurs twice in one JSON object")
            seen.add(key)
    return result
