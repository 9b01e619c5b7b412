"""Flat buffers: tensors of a rank one after the other, and the stretches of them that ranks of a group have.

What ZeRO, FSDP1 and Megatron's distributed optimizer do. Positions are in elements. Knows no meshes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Interval, Shape
from ckpt_formats.layout.matching import Logical
from ckpt_formats.layout.patterns import Pattern, render
from ckpt_formats.layout.rules import Flat

__all__ = ["Buffer", "Entry", "buffers_of"]


class Entry(NamedTuple):
    """A tensor in a buffer."""

    logical: Logical
    start: int
    numel: int


@dataclass(slots=True)
class Buffer:
    """A buffer, and how it is cut for `parts` ranks."""

    name: str
    parts: int
    entries: list[Entry] = field(default_factory=list)
    filled: int = 0
    """Elements up to the end of the last tensor."""
    total: int = 0
    """With padding."""
    _starts: list[int] = field(default_factory=list)

    def share(self, part: int) -> Interval:
        """The stretch of a rank."""
        each = -(-self.total // self.parts)
        return min(part * each, self.total), min((part + 1) * each, self.total)

    def parts_of(self, entry: Entry) -> range:
        """The ranks that have some of a tensor."""
        if not entry.numel:
            return range(0)
        each = -(-self.total // self.parts)
        return range(entry.start // each, (entry.start + entry.numel - 1) // each + 1)

    def entries_in(self, start: int, stop: int) -> list[Entry]:
        """The tensors that have elements in a stretch, in order."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        for entry in self.entries[first:]:
            if entry.start >= stop:
                break
            if entry.numel and entry.start + entry.numel > start:
                found.append(entry)
        return found

    def close(self, flat: Flat) -> None:
        """Pad it at its end; nothing is added after that."""
        multiple = 1 if flat.ragged else math.lcm(flat.total_multiple, flat.share_multiple * self.parts)
        self.total = -(-self.filled // multiple) * multiple
        # of several that begin at the same place, all but the last are empty
        self._starts = [entry.start for entry in self.entries]


def buffers_of(where: str, flat: Flat, inside: Sequence[tuple[Logical, Shape]], parts: int) -> dict[str, Buffer]:
    """Lay tensors (with the shape that each has on the rank) into buffers, by name."""
    buffers: dict[str, Buffer] = {}
    buckets: dict[str, int] = {}
    for logical, shape in _ordered(where, flat, inside):
        fields = {**logical.captures, "name": logical.local}
        try:
            bare = render(flat.name, {**fields, "bucket": ""})
            bucket = buckets.setdefault(bare, 0)
            name = render(flat.name, {**fields, "bucket": bucket})
            buffer = buffers.get(name)
            if buffer is not None and flat.bucket is not None and buffer.filled >= flat.bucket:
                buckets[bare] = bucket + 1
                name = render(flat.name, {**fields, "bucket": bucket + 1})
                buffer = None
        except KeyError as error:
            raise LayoutError(
                f"{where}: its name {flat.name!r} has the field {error.args[0]!r}, and {logical.by} captures none",
                tensor=logical.name,
            ) from None
        if buffer is None:
            buffer = buffers[name] = Buffer(name, parts)
        start = -(-buffer.filled // flat.align) * flat.align
        numel = math.prod(shape)
        buffer.entries.append(Entry(logical, start, numel))
        buffer.filled = start + numel
    for buffer in buffers.values():
        buffer.close(flat)
    return buffers


def _ordered(where: str, flat: Flat, inside: Sequence[tuple[Logical, Shape]]) -> list[tuple[Logical, Shape]]:
    if flat.order == "given":
        return list(inside)
    if flat.order == "reverse":
        return list(reversed(inside))
    if flat.order == "name":
        return sorted(inside, key=lambda item: item[0].local)
    # most such lists are whole lists of names, which are found at once
    left = {id(item[0]): item for item in inside}
    by_name = {item[0].local: item for item in inside}
    ordered = []
    for text in flat.order:
        named = by_name.get(text)
        if named is not None:
            chosen = [named] if id(named[0]) in left else []
        else:
            pattern = Pattern(text)
            chosen = [item for item in left.values() if pattern.match(item[0].local) is not None]
        ordered += [left.pop(id(item[0])) for item in chosen]
    if left:
        logical = next(iter(left.values()))[0]
        raise LayoutError(
            f"{where}: its order does not have the tensor {logical.local!r}, which goes there by {logical.by}",
            tensor=logical.name,
        )
    return ordered
