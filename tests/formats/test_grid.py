"""Grids: what is said of one without looking at its cells is what looking at them says."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_formats.errors import CoverageError
from ckpt_formats.geometry import Box, check_cover, intersect_rows
from ckpt_formats.grid import grid_of, is_grid, recognise

_CELLS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=3)


def _boxes(cells: list[list[int]]) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The shape, and offsets and sizes of all cells, in row-major order."""
    starts = [[sum(sizes[:k]) for k in range(len(sizes))] for sizes in cells]
    offsets = np.array(list(itertools.product(*starts)), np.int64)
    return tuple(map(sum, cells)), offsets, np.array(list(itertools.product(*cells)), np.int64)


@given(_CELLS, st.data())
def test_a_grid_is_recognised_and_answers_as_its_cells_do(cells: list[list[int]], data: st.DataObject) -> None:
    shape, offsets, sizes = _boxes(cells)
    runs = recognise(shape, offsets, sizes)
    assert runs is not None
    assert is_grid([[list(run) for run in dim] for dim in runs], list(shape), len(offsets))
    grid = grid_of(runs)
    assert all(map(np.array_equal, grid.boxes(0, len(offsets)), (offsets, sizes)))
    for number, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        assert grid.find(Box(tuple(offset), tuple(size))) == number
    low = [data.draw(st.integers(0, extent - 1)) for extent in shape]
    size = [data.draw(st.integers(1, extent - at)) for extent, at in zip(shape, low, strict=True)]
    box = Box(tuple(low), tuple(size))
    rows, _, _ = intersect_rows(offsets, sizes, box)
    assert grid.meeting(box).tolist() == rows.tolist()
    assert (grid.find(box) is None) == (
        box not in map(Box._make, zip(map(tuple, offsets.tolist()), map(tuple, sizes.tolist()), strict=True))
    )


@given(_CELLS, st.data())
def test_what_is_no_cover_is_no_grid(cells: list[list[int]], data: st.DataObject) -> None:
    shape, offsets, sizes = _boxes(cells)
    row = data.draw(st.integers(0, len(offsets) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    column = data.draw(st.sampled_from([offsets, sizes]))
    column[row, dim] += data.draw(st.sampled_from([-1, 1]))
    order = np.lexsort(offsets.T[::-1])
    offsets, sizes = offsets[order], sizes[order]
    try:
        check_cover(shape, offsets, sizes)
    except CoverageError:
        assert recognise(shape, offsets, sizes) is None


def test_bricks_are_no_grid() -> None:
    offsets = np.array([[0, 0], [0, 2], [1, 0], [1, 1]], np.int64)
    sizes = np.array([[1, 2], [1, 2], [1, 1], [1, 3]], np.int64)
    check_cover((2, 4), offsets, sizes)
    assert recognise((2, 4), offsets, sizes) is None
