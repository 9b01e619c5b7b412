"""What several ranks of a node need: which blocks those are, who reads them, in which portions.

Every rank computes the same from the same needs, so nobody has to be told. Knows neither how ranks talk nor how bytes
are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ckpt_formats.arrays import Int64Array
from ckpt_formats.pieces import Piece

MOST = 32
"""Ranks that share with each other at most; on a node with more there are several such groups."""


class Extent(NamedTuple):
    """Whole blocks of one chunk."""

    page: int
    row: int
    first: int
    """Position in the chunk, in bytes, of the first; a multiple of the block size."""
    last: int
    """The same of the byte after the last."""


class Batch(NamedTuple):
    """Extents that one rank reads for several, among them itself."""

    owner: int
    """Who reads, by its position among the ranks of the node."""
    readers: int
    """Who needs it: bit k stands for rank k of the node."""
    extents: list[Extent]

    @property
    def nbytes(self) -> int:
        return sum(extent.last - extent.first for extent in self.extents)


def needs_of(pieces: Iterable[Piece]) -> Int64Array:
    """What a rank needs, as others have to know it: int64 [n, 6] of page, row, first, last, source, start."""
    rows = [(p.meta.page, p.row, p.first, p.first + p.stop - p.start, p.source, p.start) for p in pieces]
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def make_batches(needs: Sequence[Int64Array], size: int) -> list[Batch]:
    """The blocks that at least two ranks need, in batches of at most `size` bytes, each with who reads it.

    Batches have the order of their bytes in the files. Each rank reads as many bytes as another of what the same ranks
    need, in one stretch, as devices and file systems like it best.

    Args:
        needs: of each rank, by `needs_of`; at most MOST.
        size: a multiple of the block size.
    """
    everything = np.concatenate(needs)
    if not len(everything):
        return []
    rank = np.repeat(np.arange(len(needs)), [len(rows) for rows in needs])
    # all chunks one after the other on one line
    chunks, first_seen, chunk = np.unique(everything[:, :2], axis=0, return_index=True, return_inverse=True)
    chunk = chunk.reshape(-1)
    length = np.zeros(len(chunks), np.int64)
    np.maximum.at(length, chunk, everything[:, 3])
    base = np.concatenate(([0], np.cumsum(length)))
    low, high = base[chunk] + everything[:, 2], base[chunk] + everything[:, 3]
    points = np.unique(np.concatenate((low, high, base)))
    readers = np.zeros(len(points), np.int64)
    for number in range(len(needs)):
        mine = rank == number
        edges = np.zeros(len(points) + 1, np.int64)
        np.add.at(edges, np.searchsorted(points, low[mine]), 1)
        np.add.at(edges, np.searchsorted(points, high[mine]), -1)
        readers |= (np.cumsum(edges)[: len(points)] > 0).astype(np.int64) << number
    of_chunk = np.searchsorted(base, points, side="right") - 1
    # stretches of one chunk with the same readers
    begins = np.flatnonzero(np.r_[True, (readers[1:] != readers[:-1]) | (of_chunk[1:] != of_chunk[:-1])])
    nbytes = np.diff(np.r_[points[begins], points[-1]])
    several = (readers[begins] & (readers[begins] - 1)) != 0
    begins, nbytes = begins[several & (nbytes > 0)], nbytes[several & (nbytes > 0)]
    source, origin = everything[first_seen, 4], everything[first_seen, 5] - everything[first_seen, 2]
    at = of_chunk[begins]
    in_chunk = points[begins] - base[at]
    order = np.lexsort((origin[at] + in_chunk, source[at]))
    batches: list[Batch] = []
    open_batch: dict[int, int] = {}
    filled: list[int] = []
    columns = (chunks[at[order]], readers[begins[order]], in_chunk[order], nbytes[order])
    for (page, row), mask, begin, count in zip(*(column.tolist() for column in columns), strict=True):
        end = begin + count
        for first in range(begin, end, size):
            last = min(first + size, end)
            number = open_batch.get(mask, -1)
            if number < 0 or filled[number] + last - first > size:
                number = open_batch[mask] = len(batches)
                batches.append(Batch(-1, mask, []))
                filled.append(0)
            batches[number].extents.append(Extent(page, row, first, last))
            filled[number] += last - first
    return _owned(batches, filled)


def _owned(batches: list[Batch], filled: list[int]) -> list[Batch]:
    """The same with who reads each."""
    total: dict[int, int] = {}
    for batch, nbytes in zip(batches, filled, strict=True):
        total[batch.readers] = total.get(batch.readers, 0) + nbytes
    before = dict.fromkeys(total, 0)
    members = {mask: [number for number in range(MOST) if mask >> number & 1] for mask in total}
    owned = []
    for batch, nbytes in zip(batches, filled, strict=True):
        mask = batch.readers
        owner = members[mask][before[mask] * len(members[mask]) // total[mask]]
        owned.append(Batch(owner, mask, batch.extents))
        before[mask] += nbytes
    return owned
