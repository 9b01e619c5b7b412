"""From a rule's cuts to boxes: what a rank holds of tensors of given shapes, and where in its memory.

Works on one dimension at a time: a dimension of what a rank holds is a list of segments, each a stretch of the same
dimension of a tensor, or padding. Knows no names and no meshes. Nothing here costs more for larger tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import add
from typing import NamedTuple, cast

from ckpt_formats.geometry import Box, Interval, Shape, chunk_interval, flat_boxes
from ckpt_formats.layout.rules import Boxes, Cut, Held, Pad, Part, Rule

__all__ = ["Core", "MisfitError", "Placed", "lower", "strides_of", "within"]

_PADDING = -1


class MisfitError(Exception):
    """A rule can't be applied to tensors of these shapes, or on a mesh of this size. The message says why."""


class Segment(NamedTuple):
    """A stretch of a dimension of one of the joined tensors, or padding."""

    source: int
    start: int
    stop: int
    copy: bool = False
    """Whether another rank on the axes that are cut holds the same, and counts as its home."""


class Placed(NamedTuple):
    """A box of a tensor and where it lies in what a rank holds. All in elements."""

    source: int
    """Which of the joined tensors."""
    offsets: Shape
    sizes: Shape
    at: Shape
    """Where its lowest corner lies in the rank's tensor."""
    copy: bool


class Core(NamedTuple):
    """What a rank holds, before stacking and flattening."""

    shape: Shape
    placed: Sequence[Placed]


def lower(rule: Rule, shapes: Sequence[Shape], window: Interval | None, ranks: Sequence[tuple[int, int]]) -> Core:
    """Apply a rule's joining, splitting, padding and cuts.

    Args:
        rule: what is done.
        shapes: of the tensors that are joined, usually one.
        window: the part of the dimension that a split gives to this tensor, if it splits.
        ranks: for each cut, or for the boxes, how many ranks there are, and which of them this is; for each padding
            before those the factor of its multiple, as (factor, 0).

    MisfitError says why it can't be applied.
    """
    if rule.boxes is not None:
        ((count, index),) = ranks
        return _held(rule.boxes, shapes[0], count, index)
    dims = _joined(rule, shapes, window)
    widths = [shape[rule.join] for shape in shapes] if rule.join is not None else None
    pads = rule.pads
    for pad, (factor, _) in zip(pads, ranks, strict=False):
        padded = dims[_dim(pad.dim, dims)]
        padded.append(_padding(pad, _length(padded), factor))
    for cut, (parts, index) in zip(rule.cuts, ranks[len(pads) :], strict=True):
        dim = _dim(cut.dim, dims)
        dims[dim] = _cut(dims[dim], cut, parts, index, widths)
    join = rule.join
    rows = []
    for segments in dims:
        position = 0
        row = []
        for segment in segments:
            extent = segment.stop - segment.start
            if segment.source != _PADDING and extent:
                row.append((segment, position, extent))
            position += extent
        rows.append(row)
    placed = [
        Placed(
            picked[join][0].source if join is not None else 0,
            tuple(segment.start for segment, _, _ in picked),
            tuple(extent for _, _, extent in picked),
            tuple(position for _, position, _ in picked),
            any(segment.copy for segment, _, _ in picked),
        )
        for picked in itertools.product(*rows)
    ]
    return Core(tuple(map(_length, dims)), placed)


def _held(boxes: Boxes, shape: Shape, ranks: int, index: int) -> Core:
    if len(boxes.held) != ranks:
        raise MisfitError(f"it has boxes for {len(boxes.held)} ranks, and there are {ranks}")
    placed: list[Placed] = []
    for held in cast("Sequence[Held]", boxes.held[index]):
        box = Box.parse(held.box)
        if box.ndim != len(shape) or not Box.whole(shape).contains(box):
            raise MisfitError(f"the box {box} leaves its shape")
        if box.numel:
            placed.append(Placed(0, box.offsets, box.sizes, tuple(held.at or (0,) * box.ndim), False))
    stops = [tuple(map(add, each.at, each.sizes)) for each in placed] or [(0,) * len(shape)]
    local = tuple(boxes.shapes[index]) if boxes.shapes is not None else tuple(map(max, zip(*stops, strict=True)))
    homes = [Box(each.at, each.sizes) for each in placed]
    for number, home in enumerate(homes):
        if len(local) != home.ndim or not Box.whole(local).contains(home):
            raise MisfitError(f"at {home} a box leaves the shape {list(local)} of the tensor of rank {index}")
        for other in homes[:number]:
            if home.intersect(other) is not None:
                raise MisfitError(f"boxes overlap in the tensor of rank {index}: {other} and {home}")
    return Core(local, placed)


def _joined(rule: Rule, shapes: Sequence[Shape], window: Interval | None) -> list[list[Segment]]:
    first = shapes[0]
    dims = [[Segment(0, 0, extent)] for extent in first]
    if rule.join is not None:
        join = _dim(rule.join, dims)
        if any(_but(shape, join) != _but(first, join) for shape in shapes):
            texts = " and ".join(str(list(shape)) for shape in shapes)
            raise MisfitError(f"tensors of the shapes {texts} can't be joined along dimension {join}")
        dims[join] = [Segment(source, 0, shape[join]) for source, shape in enumerate(shapes)]
    if rule.split is not None and window is not None:
        dim = _dim(rule.split.dim, dims)
        if sum(rule.split.widths) != first[dim]:
            raise MisfitError(
                f"it splits dimension {dim} in widths of {sum(rule.split.widths)} together, and there are {first[dim]}"
            )
        dims[dim] = _select(dims[dim], *window)
    return dims


def _but(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]


def _dim(dim: int, dims: Sequence[object]) -> int:
    if dim >= len(dims):
        raise MisfitError(f"there is no dimension {dim}: it has {len(dims)}, counted from 0")
    return dim


def _padding(pad: Pad, extent: int, factor: int) -> Segment:
    multiple = (pad.multiple or 1) * factor
    whole = pad.to if pad.to is not None else -(-extent // multiple) * multiple
    if whole < extent:
        raise MisfitError(f"dimension {pad.dim} has the extent {extent} and can't be padded to {whole}")
    return Segment(_PADDING, 0, whole - extent)


def _length(segments: Sequence[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in segments)


def _select(segments: Sequence[Segment], start: int, stop: int, copy: bool = False) -> list[Segment]:
    """The elements at positions [start, stop) of what the segments spell out."""
    selected = []
    position = 0
    for segment in segments:
        if position >= stop:
            break
        low = segment.start + max(0, start - position)
        high = min(segment.stop, segment.start + stop - position)
        if low < high:
            selected.append(Segment(segment.source, low, high, segment.copy or copy))
        position += segment.stop - segment.start
    return selected


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """The same with segments joined that follow each other."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        follows = last is not None and last.source == segment.source and last.copy == segment.copy
        if last is not None and follows and (last.stop == segment.start or segment.source == _PADDING):
            merged[-1] = last._replace(stop=last.stop + segment.stop - segment.start)
        else:
            merged.append(segment)
    return merged


def _cut(segments: Sequence[Segment], cut: Cut, ranks: int, index: int, joined: Sequence[int] | None) -> list[Segment]:
    extent = _length(segments)
    if cut.lists is not None:
        return _listed(segments, cut.lists, extent, ranks, index)
    if cut.parts is None:
        start, stop, copy = _share(Part(width=max(extent, 1), sizes=None), extent, cut, ranks, index, cut.sizes)
        return _merged(_select(segments, start, stop, copy))
    parts = _parts(cut, extent, joined)
    starts = list(itertools.accumulate((part.width for part in parts), initial=0))
    if starts[-1] != extent:
        raise MisfitError(
            f"its parts have {starts[-1]} elements of dimension {cut.dim} together, and there are {extent}"
        )
    chosen: list[Segment] = []
    if cut.groups is None:
        for part, base in zip(parts, starts, strict=False):
            start, stop, copy = _share(part, part.width, cut, ranks, index, part.sizes)
            chosen += _select(segments, base + start, base + stop, copy)
        return _merged(chosen)
    for part in parts:
        if part.width % cut.groups:
            raise MisfitError(f"a part of {part.width} elements can't be made of {cut.groups} equal groups")
    if cut.even and cut.groups % ranks:
        raise MisfitError(f"{cut.groups} groups don't cut evenly for {ranks} ranks")
    for group in range(*chunk_interval(cut.groups, ranks, index)):
        for part, base in zip(parts, starts, strict=False):
            each = part.width // cut.groups
            chosen += _select(segments, base + group * each, base + (group + 1) * each)
    return _merged(chosen)


def _parts(cut: Cut, extent: int, joined: Sequence[int] | None) -> Sequence[Part]:
    if cut.parts == "joined":
        return [Part(width=width) for width in joined or () if width]
    if isinstance(cut.parts, int):
        if extent % cut.parts or not extent:
            raise MisfitError(f"{extent} elements of dimension {cut.dim} can't be {cut.parts} equal parts")
        return [Part(width=extent // cut.parts)] * cut.parts
    return cast("Sequence[Part]", cut.parts)


def _share(
    part: Part, extent: int, cut: Cut, ranks: int, index: int, sizes: Sequence[int] | None
) -> tuple[int, int, bool]:
    """Which stretch of `extent` elements a rank gets, and whether another rank with the same counts as its home."""
    if sizes is not None:
        if len(sizes) != ranks or sum(sizes) != extent:
            raise MisfitError(
                f"its sizes are for {len(sizes)} ranks and {sum(sizes)} elements of dimension {cut.dim}, and there are"
                f" {ranks} ranks and {extent} elements"
            )
        start = sum(sizes[:index])
        return start, start + sizes[index], False
    pieces = part.pieces or ranks
    if ranks % pieces:
        raise MisfitError(f"{pieces} pieces can't be held by {ranks} ranks, the same number of ranks each")
    if extent % cut.unit:
        raise MisfitError(f"{extent} elements of dimension {cut.dim} are not a multiple of the unit {cut.unit}")
    units = extent // cut.unit
    if cut.even and units % pieces:
        raise MisfitError(
            f"{extent} elements of dimension {cut.dim}{f' in units of {cut.unit}' if cut.unit > 1 else ''} don't cut"
            f" evenly in {pieces}"
        )
    each = ranks // pieces
    start, stop = chunk_interval(units, pieces, index // each)
    return start * cut.unit, stop * cut.unit, index % each > 0


def _listed(
    segments: Sequence[Segment], lists: Sequence[Sequence[int]], extent: int, ranks: int, index: int
) -> list[Segment]:
    if len(lists) != ranks:
        raise MisfitError(f"it has {len(lists)} lists for {ranks} ranks")
    homes: dict[int, int] = {}
    for rank, numbers in enumerate(lists):
        for number in numbers:
            if number >= extent:
                raise MisfitError(f"its list {rank} has the index {number}, and the extent is {extent}")
            if number in homes:
                raise MisfitError(f"its lists {homes[number]} and {rank} overlap: both have the index {number}")
            homes[number] = rank
    if len(homes) != extent:
        missing = next(number for number in range(extent) if number not in homes)
        raise MisfitError(f"its lists leave a hole: none has the index {missing}")
    chosen: list[Segment] = []
    for number in lists[index]:
        chosen += _select(segments, number, number + 1)
    return _merged(chosen)


# --- the second stage: a stretch of what the first has left, in row-major order


def strides_of(shape: Sequence[int]) -> Shape:
    """Elements from one index to the next in each dimension of a row-major tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def within(core: Core, start: int, stop: int) -> list[Placed]:
    """What of the boxes lies in the flat stretch [start, stop) of the rank's tensor; each still a box."""
    if start == 0 and stop == math.prod(core.shape):
        return list(core.placed)
    runs = flat_boxes(core.shape, start, stop)
    if len(core.placed) == 1 and core.placed[0].sizes == core.shape:
        (whole,) = core.placed
        return [
            Placed(whole.source, tuple(map(add, whole.offsets, run.offsets)), run.sizes, run.offsets, whole.copy)
            for run in runs
        ]
    found = []
    for placed in core.placed:
        home = Box(placed.at, placed.sizes)
        for run in runs:
            common = home.intersect(run)
            if common is not None:
                offsets = tuple(
                    offset + low - at for offset, low, at in zip(placed.offsets, common.offsets, placed.at, strict=True)
                )
                found.append(placed._replace(offsets=offsets, sizes=common.sizes, at=common.offsets))
    return found
