"""The chunk table of a checkpoint, made of what its writers report: sorted, checked to cover every tensor, by the page.

Works on columns, since chunks may be tens of millions; nothing is made for each of them. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_formats.arrays import Int64Array
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.errors import CoverageError
from ckpt_formats.geometry import check_cover
from ckpt_formats.grid import Runs, recognise
from ckpt_formats.manifest import TensorMeta, plainly_covered
from ckpt_formats.native import index
from ckpt_formats.native.index import IndexRows

GRID_ROWS = 64
"""Chunks from which on a tensor's grid is noted in the manifest."""


class Page(NamedTuple):
    """A page of the index.

    `partly` is whether it is for reading in part; `metas` are the tensors whose chunks it has.
    """

    rows: IndexRows
    metas: Sequence[TensorMeta]
    partly: bool


class ChunkTable:
    """All chunks of a checkpoint.

    Attributes:
        names: the tensors, sorted.
        counts: how many chunks each has.
        codecs: how many codecs are in use, as numbered by `codecs.KNOWN`.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, tuple[int, ...], int | None]],
        files: Sequence[IndexRows],
        row_names: Sequence[tuple[Sequence[str], Sequence[str]]],
    ) -> None:
        """
        Args:
            tensors: name -> dtype, global shape, position of its cut.
            files: the rows of each data file.
            row_names: for each file the names of its rows, in two parts, one after the other; of the first, a sequence
                that several files have is best the same object.
        """
        self._tensors = tensors
        self.names = sorted(tensors)
        position = {name: number for number, name in enumerate(self.names)}
        known: dict[int, Int64Array] = {}
        numbers: list[Int64Array] = []
        for shared, own in row_names:
            at = known.get(id(shared))
            if at is None:
                at = known[id(shared)] = np.fromiter((position[name] for name in shared), np.int64, len(shared))
            numbers += [at, np.fromiter((position[name] for name in own), np.int64, len(own))]
        tensor = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        self._rows = index.merge(files, range(len(files)))
        self._blocks = index.block_counts(self._rows)
        self._order = _stable_order(tensor, len(self.names))
        self.counts: list[int] = np.bincount(tensor, minlength=len(self.names)).tolist()
        self._begin = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        self.codecs = int(self._rows.codec.max(initial=0)) + 1

    def page(self, first: int, last: int, placed: Sequence[tuple[int, int]]) -> Page:
        """The chunks of the tensors from number `first` up to `last`, sorted by tensor and offset.

        `placed` is the page and the first row there of each tensor of the checkpoint. Raises CoverageError.
        """
        order = self._order[self._begin[first] : self._begin[last]]
        counts = np.array(self.counts[first:last], np.int64)
        tensor = np.repeat(np.arange(len(counts)), counts)
        rows = index.take(self._rows, order, self._blocks)
        if not _is_sorted(tensor, rows.offset):
            # by tensor, then by offset: the last key of lexsort is the first to sort by
            rows = index.take(rows, np.lexsort((*rows.offset.T[::-1], tensor)))
        metas = [
            self._meta(number, self.counts[number], *placed[number])
            for number in range(first, last)
            if self.counts[number]
        ]
        partly = index.pays_partly(rows, len(metas))
        grids: dict[int, Runs] = {}
        if partly:
            for number, meta in enumerate(metas):
                grid = recognise(meta.shape, *_boxes(rows, meta)) if meta.rows >= GRID_ROWS else None
                if grid is not None:
                    grids[number] = grid
        rest = [meta for number, meta in enumerate(metas) if number not in grids]
        chosen = slice(None) if not grids else np.concatenate([_span(meta) for meta in rest]) if rest else slice(0)
        covered = plainly_covered(rest, rows.offset[chosen], rows.size[chosen])
        for meta, plain in zip(rest, covered, strict=True):
            if not plain:
                require_cover(meta, *_boxes(rows, meta))
        for number, grid in grids.items():
            metas[number] = metas[number]._replace(grid=grid)
        return Page(rows, metas, partly)

    def empty(self, name: str) -> TensorMeta:
        """A tensor without chunks. Raises CoverageError if it has elements."""
        dtype, shape, cut = self._tensors[name]
        meta = TensorMeta(name, dtype_named(dtype), shape, 0, 0, 0, cut)
        none = np.empty((0, len(shape)), np.int64)
        require_cover(meta, none, none)
        return meta

    def _meta(self, number: int, count: int, page: int, row: int) -> TensorMeta:
        dtype, shape, cut = self._tensors[self.names[number]]
        return TensorMeta(self.names[number], dtype_named(dtype), shape, page, row, count, cut)


def _span(meta: TensorMeta) -> Int64Array:
    """The rows of a tensor in its page."""
    return np.arange(meta.row, meta.row + meta.rows)


def _boxes(rows: IndexRows, meta: TensorMeta) -> tuple[Int64Array, Int64Array]:
    """Offsets and sizes of a tensor's chunks, from the rows of its page."""
    span, ndim = slice(meta.row, meta.row + meta.rows), len(meta.shape)
    return rows.offset[span, :ndim], rows.size[span, :ndim]


def require_cover(meta: TensorMeta, offsets: Int64Array, sizes: Int64Array) -> None:
    """Raise CoverageError unless the boxes of the chunks that were written cover a tensor."""
    try:
        check_cover(meta.shape, offsets, sizes)
    except CoverageError as error:
        raise CoverageError(
            f"tensor {meta.name!r}: what was written does not cover it: {error}. Nothing was committed",
            tensor=meta.name,
        ) from None


def _is_sorted(tensor: Int64Array, offset: Int64Array) -> bool:
    """Whether rows that are sorted by tensor are sorted by offset, too."""
    undecided = tensor[1:] == tensor[:-1]
    for column in offset.T:
        low, high = column[:-1], column[1:]
        if (undecided & (low > high)).any():
            return False
        undecided &= low == high
    return True


def _stable_order(numbers: Int64Array, limit: int) -> Any:
    """The order that sorts numbers below `limit`, equal ones as they come.

    16 bits at a time, which numpy sorts by radix.
    """
    order = np.argsort((numbers & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while limit >> shift:
        digit = ((numbers >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
        shift += 16
    return order
