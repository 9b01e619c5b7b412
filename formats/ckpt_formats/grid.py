"""Grids: cuts of a tensor at the same places all the way through, as every mesh of ranks makes them.

A tensor in 16,384 chunks is mostly such a grid, and is then known by a few numbers for each dimension: that its chunks
cover it, and which of them meet a box, follows without looking at one. Knows no files; sizes are in elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ckpt_formats.arrays import Int64Array
from ckpt_formats.geometry import Box

Runs = tuple[tuple[tuple[int, int], ...], ...]
"""For each dimension the sizes of its cells, in order, as (size, how many of that size one after the other)."""

MAX_RUNS = 64
"""Runs that a grid may have in all; a cut that needs more is hardly one of a mesh."""


class Cells(NamedTuple):
    """The cells of one dimension: where each begins, and its size."""

    starts: Int64Array
    sizes: Int64Array


class Grid:
    """A grid whose cells are numbered in row-major order.

    Attributes:
        shape: how many cells there are in each dimension.
    """

    def __init__(self, runs: Runs) -> None:
        self._dims: list[Cells] = []
        for dim in runs:
            sizes = np.repeat(*np.array(dim, np.int64).T) if len(dim) > 1 else np.full(dim[0][1], dim[0][0], np.int64)
            self._dims.append(Cells(np.cumsum(sizes) - sizes, sizes))
        self.shape = tuple(len(cells.sizes) for cells in self._dims)

    def find(self, box: Box) -> int | None:
        """The number of the cell that is exactly that box, if there is one."""
        number = 0
        for cells, offset, size in zip(self._dims, box.offsets, box.sizes, strict=True):
            at = int(cells.starts.searchsorted(offset))
            if at == len(cells.starts) or cells.starts[at] != offset or cells.sizes[at] != size:
                return None
            number = number * len(cells.starts) + at
        return number

    def meeting(self, box: Box) -> Int64Array:
        """The numbers of the cells that have elements in common with a box that has some, ascending."""
        number = np.zeros(1, np.int64)
        for cells, offset, size in zip(self._dims, box.offsets, box.sizes, strict=True):
            first = int(cells.starts.searchsorted(offset, side="right")) - 1
            last = int(cells.starts.searchsorted(offset + size))
            number = (number[:, None] * len(cells.starts) + np.arange(first, last)).reshape(-1)
        return number

    def boxes(self, first: int, last: int) -> tuple[Int64Array, Int64Array]:
        """Offsets and sizes, each int64 [last - first, ndim], of the cells from number `first` up to `last`."""
        places = np.unravel_index(np.arange(first, last), self.shape)
        count = last - first
        offsets = np.empty((count, len(self.shape)), np.int64)
        sizes = np.empty((count, len(self.shape)), np.int64)
        for dim, (cells, place) in enumerate(zip(self._dims, places, strict=True)):
            offsets[:, dim] = cells.starts[place]
            sizes[:, dim] = cells.sizes[place]
        return offsets, sizes


@lru_cache(maxsize=1024)
def grid_of(runs: Runs) -> Grid:
    """The grid with these runs; the tensors of a model have a few in common."""
    return Grid(runs)


def recognise(shape: Sequence[int], offsets: Int64Array, sizes: Int64Array) -> Runs | None:
    """The grid that n boxes are (offsets and sizes [n, ndim], sorted by offset), None if they are none.

    Exact: a grid covers its tensor, each element once. Costs O(n·ndim), without sorting.
    """
    count, ndim = offsets.shape
    if not count or not ndim or offsets[0].any():
        return None
    cells: list[Int64Array] = []
    stride = 1  # of the dimension at hand, in rows
    for dim in range(ndim - 1, -1, -1):
        column = offsets[::stride, dim]
        falls = np.flatnonzero(column[1:] <= column[:-1])
        length = int(falls[0]) + 1 if len(falls) else len(column)
        cells.insert(0, column[:length])
        stride *= length
        if count % stride:
            return None
    if stride != count:
        return None
    lengths = tuple(map(len, cells))
    runs = []
    for dim, (starts, extent) in enumerate(zip(cells, shape, strict=True)):
        extents = np.diff(starts, append=extent)
        if extents.min() < 1:
            return None
        around = [1] * ndim
        around[dim] = -1
        if (offsets[:, dim].reshape(lengths) != starts.reshape(around)).any():
            return None
        if (sizes[:, dim].reshape(lengths) != extents.reshape(around)).any():
            return None
        changes = np.flatnonzero(extents[1:] != extents[:-1]) + 1
        if len(changes) >= MAX_RUNS:
            return None
        bounds = [0, *changes.tolist(), len(extents)]
        runs.append(tuple((int(extents[low]), high - low) for low, high in itertools.pairwise(bounds)))
    return tuple(runs) if sum(map(len, runs)) <= MAX_RUNS else None


def is_grid(item: Any, shape: Sequence[int], count: int) -> TypeGuard[list[list[list[int]]]]:
    """Whether this, from a file, is a grid of so many cells that cover a tensor of that shape."""
    if type(item) is not list or len(item) != len(shape) or not item:
        return False
    if any(type(runs) is not list for runs in item) or sum(map(len, item)) > MAX_RUNS:
        return False
    cells = 1
    for runs, extent in zip(item, shape, strict=True):
        covered = along = 0
        for run in runs:
            if type(run) is not list or len(run) != 2 or any(type(number) is not int or number < 1 for number in run):
                return False
            covered += run[0] * run[1]
            along += run[1]
        cells *= along
        if covered != extent:
            return False
    return cells == count
