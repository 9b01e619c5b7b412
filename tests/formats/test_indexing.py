"""What an index picks, box by box, is what numpy picks of the whole."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_formats.geometry import Box
from ckpt_formats.indexing import Index, pick

ends = st.none() | st.integers(-9, 9)
steps = st.none() | st.integers(-4, 4).filter(bool)


@st.composite
def picks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Index, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    index: list[Index] = []
    for extent in shape[: draw(st.integers(0, len(shape)))]:
        one = st.integers(-extent, extent - 1) if extent else st.nothing()
        index.append(draw(one | st.builds(slice, ends, ends, steps)))
    if len(index) == len(shape) or draw(st.booleans()):
        return shape, (*index, ...)
    return shape, tuple(index)


@given(picks(), st.integers(1, 12))
def test_what_is_read_box_by_box_is_what_numpy_picks(
    picked: tuple[tuple[int, ...], tuple[Index, ...]], gap: int
) -> None:
    shape, index = picked
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = pick(shape, index, gap)
    array = np.full(found.shape, -1)
    for box, at in found.boxes():
        assert found.bounds.contains(box)
        array[at.slices()] = whole[box.slices()]
    assert -1 not in array
    np.testing.assert_array_equal(array[(*found.rest, ...)], whole[index])


def test_what_a_step_leaves_out_is_read_too_unless_it_is_a_gap() -> None:
    near, far = (pick((9, 4), (slice(1, None, 3),), gap) for gap in (9, 8))
    assert [box for box, _ in near.boxes()] == [Box((1, 0), (7, 4))]
    assert [box for box, _ in far.boxes()] == [Box((row, 0), (1, 4)) for row in (1, 4, 7)]
    assert (near.shape, far.shape) == ((7, 4), (3, 4))
