"""What an index of integers, slices and `...` picks of a tensor: the boxes to read, and where they go.

Knows shapes alone, no files.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import SupportsIndex

from ckpt_formats.geometry import Box, Shape

__all__ = ["Index", "Picked", "pick"]

Index = SupportsIndex | slice | EllipsisType


@dataclass(frozen=True, slots=True)
class Picked:
    """What an index picks. Boxes are in the tensor or in the array that they are read into, whose corner is at 0."""

    bounds: Box
    """Everything that is picked lies in this box of the tensor."""
    shape: Shape
    """Of the array to read into."""
    runs: Sequence[Sequence[tuple[int, int, int]]]
    """For each dimension what is read of it: where a run begins in the tensor, where in the array, and how long it
    is."""
    rest: tuple[int | slice, ...]
    """The index that is left to apply to the array."""

    def boxes(self) -> Iterator[tuple[Box, Box]]:
        """Each box to read, and where it goes in the array."""
        for runs in itertools.product(*self.runs):
            offsets, at, sizes = zip(*runs, strict=True) if runs else ((), (), ())
            yield Box(offsets, sizes), Box(at, sizes)


def pick(shape: Shape, index: tuple[Index, ...], gap: int) -> Picked:
    """What an index picks of a tensor of a shape.

    What a step leaves out is read with the rest, and picked apart then, unless it is `gap` elements or more.

    Raises IndexError: the index does not fit the shape.
    """
    offsets, extents, sizes, all_runs, rest = [], [], [], [], []
    for dim, (part, extent) in enumerate(zip(_for_each(shape, index), shape, strict=True)):
        if isinstance(part, slice):
            picked = range(extent)[part]
            left: int | slice = slice(None, None, part.step)
        else:
            at = part + extent if part < 0 else part
            if not 0 <= at < extent:
                raise IndexError(f"index {part} is out of range for dimension {dim} of size {extent}")
            picked, left = range(at, at + 1), 0
        low = min(picked[0], picked[-1]) if picked else 0
        span = abs(picked[-1] - picked[0]) + 1 if picked else 0
        runs = [(low, 0, span)]
        if len(picked) > 1 and (abs(picked.step) - 1) * math.prod(shape[dim + 1 :]) >= gap:
            runs = [(start, number, 1) for number, start in enumerate(picked)]
            left = slice(None)
        offsets.append(low)
        extents.append(span)
        sizes.append(len(runs) if len(runs) > 1 else span)
        all_runs.append(runs)
        rest.append(left)
    return Picked(Box(tuple(offsets), tuple(extents)), tuple(sizes), all_runs, tuple(rest))


def _for_each(shape: Shape, index: tuple[Index, ...]) -> list[int | slice]:
    """The index of each dimension."""
    if sum(part is Ellipsis for part in index) > 1:
        raise IndexError("an index can have only one '...'")
    explicit = sum(part is not Ellipsis for part in index)
    if explicit > len(shape):
        raise IndexError(f"{explicit} indices for a tensor of {len(shape)} dimensions")
    parts: list[int | slice] = []
    for part in index:
        if part is Ellipsis:
            parts.extend([slice(None)] * (len(shape) - explicit))
        elif isinstance(part, slice):
            parts.append(part)
        else:
            try:
                parts.append(operator.index(part))
            except TypeError:
                raise IndexError(
                    f"a tensor of a checkpoint is indexed by integers, slices and '...', not {part!r}"
                ) from None
    return parts + [slice(None)] * (len(shape) - len(parts))
