"""Mutable facts of a checkpoint: metrics, tags, a pin, in `facts.json` beside the manifest. docs/format.md, "Facts".

What they say decides what is kept, never what the checkpoint is: without them, or with them damaged, it loads as well.
Reads them and turns them to bytes; publishing these is for whoever may change file systems.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_formats.errors import CorruptionError, FactsError, FormatError, StoreError, UnknownVersionError
from ckpt_formats.json_text import parse_json, to_json
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import folders_of
from ckpt_formats.sealed import is_whole, seal
from ckpt_formats.sources import read_small
from ckpt_formats.urls import tidy
from ckpt_formats.values.tree import brief

__all__ = ["Facts", "decode", "encode", "metric", "read_facts"]

FORMAT = "ckpt-facts"
VERSION = 1
MAX_SIZE = 1 << 20
"""Bytes of the largest file of facts."""
MAX_NAME = 200
"""Characters of a tag or of a metric's name."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such numbers, and a loss that went wrong is a fact too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a checkpoint beyond its bytes."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> value, such as {"loss": 2.31}; may be NaN or infinite."""
    tags: tuple[str, ...] = ()
    """Names that people gave it, sorted. A tagged checkpoint is not pruned."""
    pinned: bool = False
    """A pinned checkpoint is not pruned."""

    def changed(
        self,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        untag: Iterable[str] = (),
        pinned: bool | None = None,
    ) -> Facts:
        """These facts with some recorded in addition, some tags taken off, and the pin set or taken off."""
        return Facts(
            metrics={**self.metrics, **(metrics or {})},
            tags=tuple(sorted({*self.tags, *tags} - set(untag))),
            pinned=self.pinned if pinned is None else pinned,
        )

    @property
    def protected(self) -> str | None:
        """Why it must not be pruned, for people; None when nothing speaks against it."""
        if self.pinned:
            return "pinned"
        return f"tagged {', '.join(self.tags)}" if self.tags else None

    def __bool__(self) -> bool:
        return bool(self.metrics or self.tags or self.pinned)


def encode(facts: Facts) -> bytes:
    """The bytes of facts.json. Raises FactsError for a tag or metric that can't be recorded."""
    for tag in facts.tags:
        _require_name("tag", tag)
    metrics: dict[str, float | str] = {}
    for name, value in facts.metrics.items():
        number = metric(name, value)
        metrics[name] = number if math.isfinite(number) else next(k for k, v in _NOT_FINITE.items() if _same(v, number))
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "metrics": metrics,
        "tags": list(facts.tags),
        "pinned": bool(facts.pinned),
    }
    data = seal(to_json(tree))
    if len(data) > MAX_SIZE:
        raise FactsError(f"the tags and metrics of a checkpoint would take {len(data)} bytes; at most {MAX_SIZE} fit")
    return data


def metric(name: str, value: object) -> float:
    """The value of a metric that can be recorded. Raises FactsError for what can't be."""
    _require_name("metric", name)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of many
        raise FactsError(f"the metric {name!r} is {brief(value)}; give a number") from None


def decode(data: bytes, path: str) -> Facts:
    """The facts from the bytes of facts.json; `path` is for messages.

    Raises:
        CorruptionError: the bytes do not fit the digest at their end.
        UnknownVersionError: a newer release wrote them.
        FormatError: anything else that docs/format.md rules out.
    """
    if not is_whole(data):
        raise CorruptionError(
            f"{path}: metrics, tags and pin do not fit their checksum: the file is damaged or was edited. The "
            "checkpoint itself is not touched by that; remove the file, then record them anew",
            path=path,
        )
    tree = parse_json(data, path)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise _wrong(path, f'"format" is not "{FORMAT}"')
    version = tree.get("version")
    if version != VERSION or type(version) is not int:
        raise UnknownVersionError(
            f"{path}: metrics, tags and pin have version {brief(version)}; this release reads {VERSION}. "
            "Install a release of anyckpt that knows it",
            path=path,
        )
    metrics, tags, pinned = tree.get("metrics"), tree.get("tags"), tree.get("pinned")
    if not isinstance(tags, list) or not all(map(_is_name, tags)):
        raise _wrong(path, '"tags" is not an array of names')
    if not isinstance(pinned, bool):
        raise _wrong(path, '"pinned" is not true or false')
    if not isinstance(metrics, dict) or not all(map(_is_name, metrics)):
        raise _wrong(path, '"metrics" is not an object of named numbers')
    return Facts(
        metrics={name: _number(path, name, value) for name, value in metrics.items()},
        tags=tuple(sorted(set(tags))),
        pinned=pinned,
    )


def read_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts beside the checkpoint in folder `path`; none where there is no file of them.

    Raises:
        CorruptionError, FormatError: the file of facts is damaged, wrong or can't be read. That says nothing of the
            checkpoint.
        StoreError: its store can't be read.
    """
    # on node-local disks, those of any node that can be reached
    files = [os.path.join(folder, names.FACTS) for folder in folders_of(tidy(path))]
    file = next((each for each in files if len(files) > 1 and os.path.lexists(each)), next(iter(files), ""))
    try:
        data = read_small(file, MAX_SIZE)
    except (FileNotFoundError, NotADirectoryError):
        return Facts()
    except StoreError:
        raise
    except OSError as error:
        raise CorruptionError(
            f"{file}: metrics, tags and pin can't be read ({error.strerror}); the checkpoint itself is not touched by "
            "that",
            path=file,
        ) from error
    if data is None:
        raise _wrong(file, f"it has more than the {MAX_SIZE} bytes that such a file may have")
    return decode(data, file)


def _wrong(path: str, what: str) -> FormatError:
    return FormatError(
        f"{path}: {what}, so metrics, tags and pin are not known. The checkpoint itself is not touched by that; remove "
        "the file, then record them anew",
        path=path,
    )


def _is_name(name: object) -> bool:
    """Whether this can be a tag or the name of a metric: short, printable, without spaces at its ends or commas."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_NAME
        and name.isprintable()
        and name == name.strip()
        and "," not in name
    )


def _require_name(what: str, name: object) -> None:
    if not _is_name(name):
        raise FactsError(
            f"{brief(name)} can't be the name of a {what}: give 1 to {MAX_NAME} printable characters without commas "
            "and without spaces at the ends"
        )


def _number(path: str, name: str, value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(path, f"the metric {brief(name)} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise _wrong(path, f"the metric {brief(name)} is no number that a computer can hold") from None


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
