"""Boxes of index space: where a piece of a tensor lies in the global tensor.

Every parallelism comes down to these: a chunk is a box, a rank's shard is a list of boxes, resharding is intersecting
them. Knows no tensors, files or ranks; all sizes are in elements. A box never needs the space it speaks of, so the
shapes that a hostile file claims cost nothing here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckpt_formats.errors import CoverageError, FormatError

__all__ = [
    "Box",
    "Interval",
    "Shape",
    "boxes_from_intervals",
    "check_cover",
    "chunk_interval",
    "flat_boxes",
    "flat_hull",
    "intersect_rows",
    "shard_intervals",
    "strided_shard_intervals",
]

Shape = tuple[int, ...]
Interval = tuple[int, int]
"""Indices from the first number up to, but without, the second."""

_INT64_MAX = 2**63 - 1
_BOX = re.compile(r"\[(?:\d+:\d+(?:,\d+:\d+)*)?\]", re.ASCII)


class Box(NamedTuple):
    """An axis-aligned box of a tensor's index space: its lowest corner and its extent, in elements.

    A tuple, not a dataclass: a save makes tens of thousands of them, and this is made in a third of the time. Nothing
    is checked on construction; what comes from a file goes through `parse` or `check_cover`.
    """

    offsets: Shape
    sizes: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of a whole tensor of that shape."""
        sizes = tuple(shape)
        return cls((0,) * len(sizes), sizes)

    @classmethod
    def parse(cls, text: str) -> Box:
        """The box written as by `str`: `[0:4,8:16]`, or `[]` of a 0-d tensor. FormatError for anything else."""
        if len(text) > 4096 or _BOX.fullmatch(text) is None:
            raise FormatError(f"{text[:80]!r} is not a box; a box is written like [0:4,8:16]")
        bounds = [part.split(":") for part in text[1:-1].split(",")] if len(text) > 2 else []
        starts = tuple(int(start) for start, _ in bounds)
        stops = tuple(int(stop) for _, stop in bounds)
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if any(size < 0 for size in sizes) or any(stop > _INT64_MAX for stop in stops):
            raise FormatError(f"{text[:80]!r} is not a box: each stop must be at least its start and below 2**63")
        return cls(starts, sizes)

    def __str__(self) -> str:
        return "[" + ",".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True)) + "]"

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return math.prod(self.sizes)

    @property
    def stops(self) -> Shape:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """What both hold, or None when that is nothing. Two 0-d boxes intersect in the 0-d box."""
        offsets, sizes = [], []
        for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start = max(a, b)
            size = min(a + m, b + n) - start
            if size <= 0:
                return None
            offsets.append(start)
            sizes.append(size)
        return Box(tuple(offsets), tuple(sizes))

    def contains(self, other: Box) -> bool:
        """Whether `other` lies within this box, bounds included; so an empty box has to lie within them too."""
        return all(
            a <= b and b + n <= a + m
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )

    def relative_to(self, origin: Sequence[int]) -> Box:
        """The same box in coordinates that begin at `origin`."""
        return Box(tuple(o - begin for o, begin in zip(self.offsets, origin, strict=True)), self.sizes)

    def slices(self) -> tuple[slice, ...]:
        """An index that selects the box from an array that begins at the same origin."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


# --- flat intervals: ZeRO and FSDP1 cut a flattened tensor wherever they like


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the flat row-major elements [start, stop) of a tensor into boxes, in order.

    Each box is itself a contiguous run of the flat order, so each is a plain view of a flat buffer; they are the
    fewest such, at most 2d-1 for d >= 1 dimensions. ValueError when the interval leaves the tensor.
    """
    numel = math.prod(shape)
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"the flat interval [{start}, {stop}) leaves a tensor of shape {tuple(shape)}")
    ndim = len(shape)
    strides = [1] * ndim
    for dim in range(ndim - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    boxes = []
    position = start
    while position < stop:
        # The longest run that begins here is made of whole slices of the outermost dimension that allows one.
        offsets = []
        sizes = []
        rest = position
        for dim in range(ndim):
            index, rest = divmod(rest, strides[dim])
            offsets.append(index)
            count = 0 if rest else min(shape[dim] - index, (stop - position) // strides[dim])
            if count:
                sizes.append(count)
                offsets.extend([0] * (ndim - dim - 1))
                sizes.extend(shape[dim + 1 :])
                break
            sizes.append(1)
        box = Box(tuple(offsets), tuple(sizes))
        boxes.append(box)
        position += box.numel
    return boxes


def flat_hull(shape: Sequence[int], box: Box) -> Interval:
    """The smallest flat row-major interval that holds the box; (0, 0) for an empty box."""
    if 0 in box.sizes:
        return (0, 0)
    first = last = 0
    for extent, offset, size in zip(shape, box.offsets, box.sizes, strict=True):
        first = first * extent + offset
        last = last * extent + offset + size - 1
    return (first, last + 1)


# --- intervals of one dimension: the rules by which torch cuts a dimension over a mesh axis


def chunk_interval(size: int, parts: int, index: int) -> Interval:
    """What part `index` of `parts` gets of `size` elements by the rule of torch.chunk as DTensor uses it.

    Every part has ceil(size / parts) elements until they run out; trailing parts may be shorter, or empty (then the
    interval is (size, size)).
    """
    if not 0 <= index < parts:
        raise ValueError(f"there is no part {index} of {parts}")
    step = -(-size // parts)
    start = min(index * step, size)
    return (start, min(start + step, size))


def _select(intervals: Sequence[Interval], start: int, stop: int) -> list[Interval]:
    """The elements at positions [start, stop) of the index vector that the intervals spell out."""
    selected: list[Interval] = []
    position = 0
    for low, high in intervals:
        if position >= stop:
            break
        first = low + max(0, start - position)
        last = min(high, low + stop - position)
        if first < last:
            selected.append((first, last))
        position += high - low
    return selected


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Join intervals that touch, drop empty ones; the index vector stays the same."""
    merged: list[Interval] = []
    for low, high in intervals:
        if low == high:
            continue
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def _length(intervals: Iterable[Interval]) -> int:
    return sum(high - low for low, high in intervals)


def shard_intervals(intervals: Sequence[Interval], parts: int, index: int) -> list[Interval]:
    """Cut an index vector, given as disjoint ascending intervals, by torch's `Shard`: part `index` of `parts`.

    Returns the intervals that the part holds, ascending, touching ones joined; an empty list when it holds nothing.
    """
    return _merge(_select(intervals, *chunk_interval(_length(intervals), parts, index)))


def strided_shard_intervals(intervals: Sequence[Interval], parts: int, index: int, split_factor: int) -> list[Interval]:
    """Cut an index vector by torch's `_StridedShard` (as of torch 2.13): part `index` of `parts`.

    The vector is first cut into `split_factor` pieces as by `Shard`, each piece is cut into `parts`, and the part
    holds its share of every piece, one after the other.
    """
    if split_factor < 1:
        raise ValueError(f"a strided shard needs a split factor of at least 1, not {split_factor}")
    length = _length(intervals)
    held: list[Interval] = []
    for piece in range(min(split_factor, length)):
        start, stop = chunk_interval(length, split_factor, piece)
        low, high = chunk_interval(stop - start, parts, index)
        held.extend(_select(intervals, start + low, start + high))
    return _merge(held)


def boxes_from_intervals(per_dim: Sequence[Sequence[Interval]]) -> list[tuple[Box, Box]]:
    """The boxes that a rank holds when in each dimension it holds these intervals, packed one after the other.

    Returns (global box, local box) pairs in row-major order: the local box says where the global one lies in the
    rank's local tensor. An empty list when some dimension holds nothing; one pair for a 0-d tensor.
    """
    placed: list[list[tuple[int, int, int]]] = []
    for intervals in per_dim:
        position = 0
        row = []
        for low, high in intervals:
            if high > low:
                row.append((low, position, high - low))
                position += high - low
        placed.append(row)
    pairs = []
    for combination in itertools.product(*placed):
        sizes = tuple(size for _, _, size in combination)
        pairs.append(
            (
                Box(tuple(low for low, _, _ in combination), sizes),
                Box(tuple(position for _, position, _ in combination), sizes),
            )
        )
    return pairs


# --- many boxes at once: the chunk tables of a checkpoint, as int64 arrays [n, d]


def intersect_rows(
    offsets: NDArray[np.int64], sizes: NDArray[np.int64], box: Box
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Intersect n boxes (offsets and sizes [n, d], within some tensor) with one.

    Returns (rows [m], offsets [m, d], sizes [m, d]): which of the boxes meet `box`, and the intersections, in global
    coordinates. Empty intersections are left out.
    """
    low = np.asarray(box.offsets, dtype=np.int64)
    starts = np.maximum(offsets, low)
    extents = np.minimum(offsets + sizes, low + np.asarray(box.sizes, dtype=np.int64)) - starts
    rows = np.flatnonzero((extents > 0).all(axis=1))
    return rows, starts[rows], extents[rows]


# The four lanes of the field in which corners are hashed. A sum that is zero by accident has probability at most
# (d / 2**31) ** 4, and the random numbers come from the system, so no file can be made to fit them.
_PRIME = np.uint64(2**31 - 1)
_LANES = 4
_random = np.random.default_rng()

# Most tensors of most checkpoints have one box or a few; up to this many, comparing pairs is quicker than numpy.
_FEW = 6


def check_cover(shape: Sequence[int], offsets: NDArray[Any], sizes: NDArray[Any]) -> None:
    """Check that n boxes (integer arrays offsets and sizes [n, d]) cover a tensor of that shape, each element once.

    Boxes without elements must lie within the bounds and are otherwise ignored, so a tensor with a zero dimension
    needs no box; a 0-d tensor needs exactly one.

    CoverageError says which box leaves the bounds, which elements no box covers, or which two boxes overlap. It does
    not know the tensor's name: callers add it. Costs O(n·d) time and memory besides sorting the coordinates, whatever
    the volume and however many dimensions a file claims.

    Method: the number of boxes over each element, minus one, is zero everywhere exactly when its mixed difference is,
    which is the sum over all boxes of their 2^d corners with alternating signs, minus the corners of the whole. A
    corner's hash is the product of a random field element per coordinate, so a box's 2^d signed corners sum to
    the product over its dimensions of (hash of its start - hash of its stop), and corners that do not cancel leave
    a non-zero polynomial in random variables, which vanishes by accident as rarely as Schwartz and Zippel say.
    """
    whole = Box.whole(shape)
    ndim = whole.ndim
    if any(not 0 <= extent <= _INT64_MAX for extent in whole.sizes):
        raise CoverageError(f"a tensor can't have the shape {list(shape)}: a dimension is negative or above 2**63-1")
    if offsets.shape != sizes.shape or offsets.ndim != 2 or offsets.shape[1] != ndim:
        raise CoverageError(
            f"the boxes of a tensor of shape {list(shape)} need offsets and sizes of shape [n, {ndim}],"
            f" but have {list(offsets.shape)} and {list(sizes.shape)}"
        )
    if not (np.can_cast(offsets.dtype, np.int64) and np.can_cast(sizes.dtype, np.int64)):
        raise CoverageError(f"offsets and sizes of boxes are int64, not {offsets.dtype} and {sizes.dtype}")

    if len(offsets) <= _FEW and _few_cover(whole, offsets.tolist(), sizes.tolist()):
        return
    starts = offsets.astype(np.int64)
    extents = sizes.astype(np.int64)
    limits = np.asarray(whole.sizes, dtype=np.int64)
    # in this order nothing can overflow: the sum of start and extent is never formed before both are known to be small
    inside = (starts >= 0) & (extents >= 0) & (extents <= limits)
    inside &= starts <= limits - np.where(inside, extents, 0)
    if not inside.all():
        row = int(np.flatnonzero(~inside.all(axis=1))[0])
        raise CoverageError(
            f"box {row}, at offsets {starts[row].tolist()} with sizes {extents[row].tolist()},"
            f" leaves the tensor's shape {list(shape)}"
        )

    kept = np.flatnonzero((extents > 0).all(axis=1))
    if 0 in whole.sizes:
        return
    if ndim == 0:
        if len(kept) != 1:
            raise CoverageError(f"a 0-d tensor needs exactly one box, but has {len(kept)}")
        return
    if not len(kept):
        raise CoverageError(f"no box covers {whole}: the tensor has no boxes with elements")
    _check_signed_corners(whole, starts[kept], starts[kept] + extents[kept], kept)


def _few_cover(whole: Box, offsets: list[list[int]], sizes: list[list[int]]) -> bool:
    """Whether a few boxes cover the whole, by the definition: all within it, no two meeting, of its volume together."""
    boxes = [Box(tuple(start), tuple(size)) for start, size in zip(offsets, sizes, strict=True)]
    if boxes == [whole]:
        return True
    for row, box in enumerate(boxes):
        if min(box.sizes, default=1) < 1 or not whole.contains(box):
            return False
        if any(box.intersect(other) is not None for other in boxes[:row]):
            return False
    return sum(box.numel for box in boxes) == whole.numel  # integers of Python: exact


class _Axis(NamedTuple):
    """One dimension in ranks: its coordinates in order, and each box's start and stop as positions among them."""

    dim: int
    coordinates: NDArray[np.int64]
    starts: NDArray[np.intp]
    stops: NDArray[np.intp]
    hashes: NDArray[np.uint64]


def _check_signed_corners(
    whole: Box, starts: NDArray[np.int64], stops: NDArray[np.int64], names: NDArray[np.int64]
) -> None:
    axes = []
    count = len(starts)
    # a dimension in which every box is whole is a common factor of every term
    cut = np.flatnonzero(starts.any(axis=0) | (stops != np.asarray(whole.sizes)).any(axis=0)).tolist()
    if len(cut) == 1:
        # by far the most frequent, and a matter of sorting: each box has to begin where the one before it ends
        order = np.argsort(starts[:, cut[0]])
        low, high = starts[order, cut[0]], stops[order, cut[0]]
        if low[0] == 0 and high[-1] == whole.sizes[cut[0]] and (low[1:] == high[:-1]).all():
            return
    for dim in cut:
        low, high, extent = starts[:, dim], stops[:, dim], whole.sizes[dim]
        coordinates, ranks = np.unique(np.concatenate([low, high, [0, extent]]), return_inverse=True)
        hashes = _random.integers(0, _PRIME, size=(len(coordinates), _LANES), dtype=np.uint64)
        axes.append(_Axis(dim, coordinates, ranks[:count], ranks[count : 2 * count], hashes))
    bounds = [(0, len(axis.coordinates) - 1) for axis in axes]
    if _covers_once(axes, bounds, count):
        return

    # Something is wrong; halve the space, keeping a half that is wrong, down to a cell that no box's side crosses.
    for k in range(len(axes)):
        low, high = bounds[k]
        while high - low > 1:
            middle = (low + high) // 2
            bounds[k] = (low, middle)
            if _covers_once(axes, bounds, count):
                bounds[k] = (middle, high)
            low, high = bounds[k]
    covering = np.ones(count, dtype=bool)
    offsets, ends = list(whole.offsets), list(whole.sizes)
    for axis, (low, high) in zip(axes, bounds, strict=True):
        covering &= (axis.starts <= low) & (axis.stops >= high)
        offsets[axis.dim], ends[axis.dim] = int(axis.coordinates[low]), int(axis.coordinates[high])
    cell = Box(tuple(offsets), tuple(end - offset for offset, end in zip(offsets, ends, strict=True)))
    rows = np.flatnonzero(covering)
    if not len(rows):
        raise CoverageError(f"no box covers {cell} of the tensor's {whole}")
    first, second = (
        Box(tuple(starts[row].tolist()), tuple((stops[row] - starts[row]).tolist())) for row in (rows[0], rows[-1])
    )
    raise CoverageError(
        f"boxes {int(names[rows[0]])} {first} and {int(names[rows[-1]])} {second} overlap in {cell} of the tensor's"
        f" {whole}"
    )


def _covers_once(axes: Sequence[_Axis], bounds: Sequence[Interval], count: int) -> bool:
    """Whether the boxes, clipped to the bounds (positions on each axis), cover what is within them exactly once."""
    # a box without elements within the bounds has a dimension whose clipped start and stop are the same: a factor of 0
    terms = np.ones((count, _LANES), dtype=np.uint64)
    expected = np.ones(_LANES, dtype=np.uint64)
    for axis, (low, high) in zip(axes, bounds, strict=True):
        hashes = axis.hashes
        begin = np.clip(axis.starts, low, high)
        end = np.clip(axis.stops, low, high)
        terms *= hashes[begin] + (_PRIME - hashes[end])
        terms %= _PRIME
        expected *= hashes[low] + (_PRIME - hashes[high])
        expected %= _PRIME
    # below 2**31 terms of less than 2**31 each, so the sum fits in 62 bits
    return bool((terms.sum(axis=0) % _PRIME == expected).all())
