"""Geometry against brute force: every promise is checked by counting elements of small tensors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_formats import geometry
from ckpt_formats.errors import CoverageError, FormatError
from ckpt_formats.geometry import (
    Box,
    boxes_from_intervals,
    check_cover,
    chunk_interval,
    flat_boxes,
    flat_hull,
    intersect_rows,
    shard_intervals,
    strided_shard_intervals,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    offsets, sizes = [], []
    for extent in shape:
        start = draw(st.integers(0, extent))
        offsets.append(start)
        sizes.append(draw(st.integers(0, extent - start)))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def tilings(draw, shape):
    """Boxes that tile the shape, by cutting it again and again at random places."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        victim = draw(st.integers(0, len(boxes) - 1))
        box = boxes[victim]
        cuttable = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not cuttable:
            continue
        dim = draw(st.sampled_from(cuttable))
        at = draw(st.integers(1, box.sizes[dim] - 1))
        left, right = list(box.sizes), list(box.sizes)
        left[dim], right[dim] = at, box.sizes[dim] - at
        offsets = list(box.offsets)
        offsets[dim] += at
        boxes[victim : victim + 1] = [Box(box.offsets, tuple(left)), Box(tuple(offsets), tuple(right))]
    return draw(st.permutations(boxes))


def rows(boxes, ndim):
    return (
        np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), ndim),
        np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), ndim),
    )


def count(shape, boxes):
    """How many of the boxes hold each element."""
    counts = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        counts[box.slices()] += 1
    return counts


def vector(intervals):
    """The index vector that the intervals spell out."""
    return [index for low, high in intervals for index in range(low, high)]


# --- boxes


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape))))
def test_an_intersection_holds_exactly_the_elements_of_both(case):
    shape, a, b = case
    both = (count(shape, [a]) > 0) & (count(shape, [b]) > 0)
    met = a.intersect(b)
    if met is None:
        assert not both.any()
    else:
        assert met == b.intersect(a)
        assert met.numel > 0
        np.testing.assert_array_equal(count(shape, [met]) > 0, both)
        assert a.contains(met)
        assert b.contains(met)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape))))
def test_a_box_contains_another_when_it_holds_its_elements(case):
    shape, a, b = case
    if b.numel:
        assert a.contains(b) == bool((count(shape, [a])[b.slices()] > 0).all())
    assert Box.whole(shape).contains(a)


@given(shapes.flatmap(boxes_in))
def test_a_box_is_read_back_from_its_text(box):
    assert Box.parse(str(box)) == box


def test_zero_dimensional_boxes_hold_one_element():
    box = Box.whole(())
    assert (box.ndim, box.numel, box.stops, box.slices(), str(box)) == (0, 1, (), (), "[]")
    assert box.intersect(box) == box
    assert box.contains(box)
    assert Box.parse("[]") == box


@pytest.mark.parametrize(
    "text",
    ["", "[", "0:1", "[0:1", "[0]", "[1:0]", "[-1:2]", "[0:1,]", "[0:1] ", "[0:1]\n", "[0:٣]",
     "[0:9223372036854775808]", "[" + "0:1," * 10**5 + "0:1]", "[0:" + "9" * 5000 + "]"],
)  # fmt: skip
def test_text_that_is_not_a_box_is_refused(text):
    with pytest.raises(FormatError):
        Box.parse(text)


def test_a_box_says_where_it_lies_within_another():
    assert Box((4, 6), (2, 3)).relative_to((4, 5)) == Box((0, 1), (2, 3))
    assert Box((4, 6), (2, 3)).stops == (6, 9)


# --- flat intervals


@st.composite
def flat_cases(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4).map(tuple))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


def fewest_contiguous(shape, start, stop):
    """The fewest boxes, each contiguous in the flat order, that make up the interval: by trying all of them."""
    index = np.arange(math.prod(shape)).reshape(shape)
    reach: dict[int, set[int]] = {}
    for bounds in itertools.product(*(itertools.combinations(range(extent + 1), 2) for extent in shape)):
        held = index[tuple(slice(low, high) for low, high in bounds)].ravel()
        if held[-1] - held[0] + 1 == len(held):
            reach.setdefault(int(held[0]), set()).add(int(held[-1]) + 1)

    @functools.cache
    def best(position):
        if position == stop:
            return 0
        return 1 + min(best(end) for end in reach[position] if end <= stop)

    return best(start)


@given(flat_cases())
def test_a_flat_interval_becomes_few_contiguous_boxes_in_order(case):
    shape, start, stop = case
    index = np.arange(math.prod(shape)).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    held = [element for box in boxes for element in index[box.slices()].ravel().tolist()]
    assert held == list(range(start, stop))
    assert all(box.numel for box in boxes)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    if start < stop:
        assert len(boxes) == fewest_contiguous(shape, start, stop)


def test_a_flat_interval_of_a_huge_tensor_costs_nothing():
    boxes = flat_boxes((2**40, 2**40, 2**40), 5, 2**120 - 7)
    assert len(boxes) == 5
    assert sum(box.numel for box in boxes) == 2**120 - 12


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 2)])
def test_a_flat_interval_that_leaves_the_tensor_is_refused(start, stop):
    with pytest.raises(ValueError, match="leaves a tensor"):
        flat_boxes((2, 3), start, stop)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape))))
def test_the_flat_hull_is_the_smallest_interval_that_holds_a_box(case):
    shape, box = case
    held = np.arange(math.prod(shape)).reshape(shape)[box.slices()]
    expected = (int(held.min()), int(held.max()) + 1) if held.size else (0, 0)
    assert flat_hull(shape, box) == expected


# --- intervals of one dimension

ascending = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), max_size=4).map(
    lambda gaps: [
        (sum(map(sum, gaps[:k])) + gap, sum(map(sum, gaps[:k])) + gap + size) for k, (gap, size) in enumerate(gaps)
    ]
)


def chunked(elements, parts):
    """torch.chunk on a list: ceil(len / parts) each, filled up with empty lists."""
    step = max(1, -(-len(elements) // parts))
    pieces = [elements[start : start + step] for start in range(0, len(elements), step)]
    return pieces + [[]] * (parts - len(pieces))


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_those_of_torch_chunk(size, parts):
    pieces = [list(range(*chunk_interval(size, parts, index))) for index in range(parts)]
    assert pieces == chunked(list(range(size)), parts)


def test_uneven_and_empty_chunks():
    assert [chunk_interval(101, 4, index) for index in range(4)] == [(0, 26), (26, 52), (52, 78), (78, 101)]
    assert [chunk_interval(3, 5, index) for index in range(5)] == [(0, 1), (1, 2), (2, 3), (3, 3), (3, 3)]


@pytest.mark.parametrize(("parts", "index"), [(2, 2), (2, -1), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(parts, index):
    with pytest.raises(ValueError, match="there is no part"):
        chunk_interval(10, parts, index)


@given(ascending, st.integers(1, 6))
def test_sharding_cuts_the_index_vector(intervals, parts):
    pieces = [vector(shard_intervals(intervals, parts, index)) for index in range(parts)]
    assert pieces == chunked(vector(intervals), parts)


@given(ascending, st.integers(1, 6), st.integers(1, 30))
@example([(0, 101)], 2, 2)
@example([(0, 7)], 2, 3)
def test_strided_sharding_cuts_pieces_of_the_index_vector(intervals, parts, split_factor):
    elements = vector(intervals)
    expected = [
        [element for piece in chunked(elements, split_factor) for element in chunked(piece, parts)[index]]
        for index in range(parts)
    ]
    held = [strided_shard_intervals(intervals, parts, index, split_factor) for index in range(parts)]
    assert [vector(part) for part in held] == expected
    for part in held:
        # touching intervals are joined and empty ones dropped
        assert all(low < high for low, high in part)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(part))


def test_a_split_factor_that_a_file_claims_does_not_cost_time():
    assert strided_shard_intervals([(0, 6)], 2, 0, 2**60) == [(0, 6)]
    with pytest.raises(ValueError, match="split factor"):
        strided_shard_intervals([(0, 6)], 2, 0, 0)


@given(st.lists(ascending, max_size=3))
def test_boxes_from_intervals_say_where_each_lies_in_the_local_tensor(per_dim):
    vectors = [vector(intervals) for intervals in per_dim]
    extent = tuple(max(elements, default=-1) + 1 for elements in vectors)
    full = np.arange(math.prod(extent)).reshape(extent)
    local = full[np.ix_(*vectors)] if per_dim else full
    pairs = boxes_from_intervals(per_dim)
    for global_box, local_box in pairs:
        np.testing.assert_array_equal(full[global_box.slices()], local[local_box.slices()])
    assert (count(local.shape, [local_box for _, local_box in pairs]) == 1).all()


def test_empty_intervals_give_no_boxes():
    assert boxes_from_intervals([[(0, 4)], []]) == []
    assert boxes_from_intervals([[(0, 4)], [(2, 2)]]) == []
    assert boxes_from_intervals([]) == [(Box((), ()), Box((), ()))]


# --- many boxes at once


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_in(shape), max_size=6), boxes_in(shape))))
def test_intersecting_rows_is_intersecting_each(case):
    shape, boxes, wanted = case
    selected, offsets, sizes = intersect_rows(*rows(boxes, len(shape)), wanted)
    expected = [(row, met) for row, box in enumerate(boxes) if (met := box.intersect(wanted)) is not None]
    met = [Box(tuple(o), tuple(s)) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True)]
    assert list(zip(selected.tolist(), met, strict=True)) == expected


both_methods = pytest.mark.parametrize("few", [0, 100], ids=["signed-corners", "pairs"])


@both_methods
@given(case=shapes.flatmap(lambda shape: st.tuples(st.just(shape), tilings(shape))))
def test_boxes_that_tile_are_accepted(few, case):
    shape, boxes = case
    with mock.patch.object(geometry, "_FEW", few):
        check_cover(shape, *rows(boxes, len(shape)))


@both_methods
@given(case=shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_in(shape), max_size=5))))
def test_coverage_is_what_counting_elements_says(few, case):
    shape, boxes = case
    with (
        mock.patch.object(geometry, "_FEW", few),
        contextlib.nullcontext() if (count(shape, boxes) == 1).all() else pytest.raises(CoverageError),
    ):
        check_cover(shape, *rows(boxes, len(shape)))


@st.composite
def spoiled_tilings(draw):
    """A tiling with one of its boxes moved, resized, dropped, doubled, or replaced by another of them."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    boxes = list(draw(tilings(shape)))
    victim = draw(st.integers(0, len(boxes) - 1))
    spoil = draw(st.sampled_from(["drop", "double", "swap", "replace"]))
    if spoil == "drop":
        del boxes[victim]
    elif spoil == "double":
        boxes.append(boxes[victim])
    elif spoil == "swap":
        boxes[victim] = boxes[draw(st.integers(0, len(boxes) - 1))]
    else:
        boxes[victim] = draw(boxes_in(shape))
    return shape, boxes


@both_methods
@given(case=spoiled_tilings())
def test_an_error_names_elements_that_are_missing_or_boxes_that_overlap(few, case):
    shape, boxes = case
    counts = count(shape, boxes)
    if (counts == 1).all():
        with mock.patch.object(geometry, "_FEW", few):
            check_cover(shape, *rows(boxes, len(shape)))
        return
    with mock.patch.object(geometry, "_FEW", few), pytest.raises(CoverageError) as caught:
        check_cover(shape, *rows(boxes, len(shape)))
    words = str(caught.value).split()
    if words[:3] == ["no", "box", "covers"]:
        assert (counts[Box.parse(words[3].rstrip(":")).slices()] == 0).all()
    else:
        first, first_box, second, second_box, cell = (words[k] for k in (1, 2, 4, 5, 8))
        assert boxes[int(first)] == Box.parse(first_box)
        assert boxes[int(second)] == Box.parse(second_box)
        assert int(first) != int(second)
        met = Box.parse(first_box).intersect(Box.parse(second_box))
        assert met is not None
        assert met.contains(Box.parse(cell))


def test_a_doubled_box_is_not_excused_by_a_hole_of_its_size():
    grid = [Box((4 * i, 4 * j), (4, 4)) for i in range(3) for j in range(3)]
    for hole, doubled in itertools.permutations(range(9), 2):
        boxes = [grid[doubled] if k == hole else box for k, box in enumerate(grid)]
        with pytest.raises(CoverageError):
            check_cover((12, 12), *rows(boxes, 2))


def test_a_scalar_needs_exactly_one_box():
    check_cover((), *rows([Box((), ())], 0))
    for n in (0, 2):
        with pytest.raises(CoverageError, match=f"exactly one box, but has {n}"):
            check_cover((), *rows([Box((), ())] * n, 0))


def test_a_tensor_without_elements_needs_no_box():
    check_cover((3, 0), *rows([], 2))
    check_cover((3, 0), *rows([Box((0, 0), (3, 0)), Box((1, 0), (1, 0))], 2))
    with pytest.raises(CoverageError, match="leaves"):
        check_cover((3, 0), *rows([Box((0, 0), (1, 1))], 2))


def test_empty_boxes_are_ignored_but_stay_within_bounds():
    check_cover((4,), *rows([Box((0,), (4,)), Box((4,), (0,)), Box((2,), (0,))], 1))
    with pytest.raises(CoverageError, match=r"box 1.*leaves"):
        check_cover((4,), *rows([Box((0,), (4,)), Box((5,), (0,))], 1))


@pytest.mark.parametrize(
    ("offset", "size"),
    [(-1, 5), (0, 5), (4, 1), (0, -1), (2**62, 2**62), (2**63 - 1, 2**63 - 1),
     (-(2**63), 1), (1, 2**63 - 1), (1, -(2**63))],
)  # fmt: skip
def test_boxes_out_of_bounds_are_named(offset, size):
    with pytest.raises(CoverageError, match="box 1, at offsets"):
        check_cover((4,), np.array([[0], [offset]]), np.array([[4], [size]]))


def test_a_box_with_two_negative_sizes_does_not_count_as_volume():
    boxes = [Box((0, 0), (2, 1)), Box((0, 1), (1, 1)), Box((2, 2), (-1, -1))]
    with pytest.raises(CoverageError, match="box 2, at offsets"):
        check_cover((2, 2), *rows(boxes, 2))


def test_huge_shapes_cost_nothing_and_do_not_wrap_around():
    huge = 2**63 - 1
    shape = (huge,) * 40
    begun = time.perf_counter()
    check_cover(shape, *rows([Box.whole(shape)], 40))
    halves = [Box((0,) * 40, (2**62,) + (huge,) * 39), Box((2**62,) + (0,) * 39, (huge - 2**62,) + (huge,) * 39)]
    check_cover(shape, *rows(halves, 40))
    # 2**62 * 4 is 0 modulo 2**64: a product of sizes that wraps around would take this for a whole
    for boxes in ([halves[0]], halves[:1] * 2, [Box((0,) * 40, (2,) * 40)] * 3, []):
        with pytest.raises(CoverageError):
            check_cover(shape, *rows(boxes, 40))
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("extent", [-1, 2**63])
def test_impossible_shapes_are_refused(extent):
    with pytest.raises(CoverageError, match="can't have the shape"):
        check_cover((extent,), *rows([], 1))


def test_tables_of_the_wrong_shape_or_type_are_refused():
    with pytest.raises(CoverageError, match="need offsets and sizes"):
        check_cover((4, 4), *rows([Box((0,), (4,))], 1))
    with pytest.raises(CoverageError, match="int64"):
        check_cover((4,), np.zeros((1, 1)), np.full((1, 1), 4.0))


def test_a_large_table_is_checked_quickly_and_its_fault_is_found():
    grid = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    offsets, sizes = grid * 2, np.full_like(grid, 2)
    begun = time.perf_counter()
    check_cover((64, 64, 64), offsets, sizes)
    offsets[20_000] = offsets[3]
    with pytest.raises(CoverageError, match=r"boxes 3 \[0:2,0:2,6:8\] and 20000 \[0:2,0:2,6:8\] overlap|no box covers"):
        check_cover((64, 64, 64), offsets, sizes)
    # an element-wise or pairwise method would need minutes
    assert time.perf_counter() - begun < 10
