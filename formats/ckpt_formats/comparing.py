"""How much the elements of two tensors differ: counted, measured, and judged by a tolerance. Works on pieces.

Knows no checkpoints: arrays of raw elements in, numbers out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_formats.arrays import AnyArray
from ckpt_formats.dtypes import DType
from ckpt_formats.geometry import Box

__all__ = ["Numbers", "Tally", "Tolerance"]

RUN = 1 << 20
"""Elements that are converted at once; bounds the memory of conversions."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What still counts as equal, by numpy.isclose's rule: |a - b| <= atol + rtol * |b|. Both 0: equal bits only."""

    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        for value in (self.rtol, self.atol):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"a tolerance is a number that is not negative, not {value}")

    @property
    def exact(self) -> bool:
        return self.rtol == 0 and self.atol == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How much two tensors of one shape and dtype differ."""

    elements: int
    """Elements of the tensor."""
    differing: int
    """Elements whose bits differ."""
    beyond: int
    """Elements that differ by more than the tolerance; without one, those that differ."""
    max_abs: float | None
    """The largest |a - b|; inf where only one is NaN or infinite; None where elements are no numbers."""
    max_rel: float | None
    """The largest |a - b| / |b|."""
    where: tuple[int, ...] | None
    """Index of the element with the largest |a - b|, or of the first one that differs where they are no numbers."""


class Tally:
    """Adds up the differences of one tensor, box by box."""

    def __init__(self, dtype: DType, tolerance: Tolerance) -> None:
        self._dtype = dtype
        self._tolerance = tolerance
        self._differing = self._beyond = 0
        self._max_abs = self._max_rel = 0.0
        self._where: tuple[int, ...] | None = None

    def add(self, box: Box, a: AnyArray, b: AnyArray) -> None:
        """Compare the elements of one box, each a contiguous array of the box's shape and the carrier dtype."""
        one, other = a.reshape(-1), b.reshape(-1)
        for start in range(0, one.size, RUN):
            self._add_run(box, start, one[start : start + RUN], other[start : start + RUN])

    def _add_run(self, box: Box, start: int, a: AnyArray, b: AnyArray) -> None:
        at = np.flatnonzero(_bits_differ(a, b))
        if not at.size:
            return
        self._differing += at.size
        worst = 0
        if self._dtype.numpy is None:
            self._beyond += at.size
            new = self._where is None
        else:
            x, y = a[at].view(self._dtype.numpy), b[at].view(self._dtype.numpy)
            difference, magnitude, same = _measure(x, y)
            self._beyond += self._count_beyond(difference, magnitude, same)
            worst = int(difference.argmax())
            new = self._where is None or difference[worst] > self._max_abs
            self._max_abs = max(self._max_abs, float(difference[worst]))
            with np.errstate(all="ignore"):
                relative = np.where(difference > 0, difference / magnitude, 0.0)
            # inf / inf and what a NaN makes: as far apart as can be
            self._max_rel = max(self._max_rel, float(np.nan_to_num(relative, nan=math.inf, posinf=math.inf).max()))
        if new:
            inside = np.unravel_index(start + int(at[worst]), box.sizes) if box.sizes else ()
            self._where = tuple(offset + int(index) for offset, index in zip(box.offsets, inside, strict=True))

    def _count_beyond(
        self, difference: NDArray[np.float64], magnitude: NDArray[np.float64], same: NDArray[np.bool_]
    ) -> int:
        if self._tolerance.exact:
            return difference.size
        with np.errstate(all="ignore"):
            limit = self._tolerance.atol + self._tolerance.rtol * magnitude
            close = same | (np.isfinite(difference) & np.isfinite(magnitude) & (difference <= limit))
        return int(close.size - np.count_nonzero(close))

    def numbers(self, elements: int) -> Numbers:
        """The sum of all boxes, of a tensor of so many elements."""
        known = self._dtype.numpy is not None
        return Numbers(
            elements=elements,
            differing=self._differing,
            beyond=self._beyond,
            max_abs=self._max_abs if known else None,
            max_rel=self._max_rel if known else None,
            where=self._where,
        )


def _bits_differ(a: AnyArray, b: AnyArray) -> NDArray[np.bool_]:
    if a.dtype.itemsize == 16:  # void: compared as pairs of integers, as fast as those
        pairs = a.view(np.uint64).reshape(-1, 2) != b.view(np.uint64).reshape(-1, 2)
        return np.asarray(pairs.any(axis=1), dtype=bool)
    return np.asarray(a != b, dtype=bool)


def _measure(x: AnyArray, y: AnyArray) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """|x - y|, |y|, and which pairs are equal as numbers although their bits are not (0 and -0, two NaNs)."""
    if x.dtype.kind in "biu":
        wide: Any = np.int64 if x.dtype.kind == "i" else np.uint64
        x, y = x.astype(wide), y.astype(wide)
        # exact where doubles are not: the difference of two 64-bit integers fits 64 unsigned bits
        apart = np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)
        return apart.astype(np.float64), np.abs(y.astype(np.float64)), np.zeros(x.shape, dtype=bool)
    wide = np.complex128 if x.dtype.kind == "c" or "complex" in x.dtype.name else np.float64
    with np.errstate(all="ignore"):
        x, y = x.astype(wide), y.astype(wide)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        difference = np.where(same, 0.0, np.abs(x - y))
    return np.where(np.isnan(difference), np.inf, difference), np.abs(y), same
