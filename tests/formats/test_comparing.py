"""How much elements differ: by bits, by numbers, by numpy's own rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckpt_formats import comparing
from ckpt_formats.arrays import AnyArray
from ckpt_formats.comparing import Numbers, Tally, Tolerance
from ckpt_formats.dtypes import DTYPES, DType, dtype
from ckpt_formats.geometry import Box


def numbers_of(kind: DType, a: AnyArray, b: AnyArray, tolerance: Tolerance | None = None) -> Numbers:
    tally = Tally(kind, tolerance or Tolerance())
    one, other = (np.ascontiguousarray(x).view(kind.carrier).reshape(x.shape) for x in (a, b))
    tally.add(Box.whole(a.shape), one, other)
    return tally.numbers(a.size)


floats = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1.0000001]))


@given(
    pair=st.integers(0, 40).flatmap(
        lambda n: st.tuples(*[hnp.arrays(np.float32, n, elements=floats) for _ in range(2)])
    ),
    rtol=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    atol=st.sampled_from([1e-12, 1e-3, 10.0]),
)
def test_the_tolerance_is_numpy_s(pair: tuple[AnyArray, AnyArray], rtol: float, atol: float) -> None:
    a, b = pair
    numbers = numbers_of(dtype("float32"), a, b, Tolerance(rtol, atol))
    with np.errstate(all="ignore"):
        close = np.isclose(a.astype(float), b.astype(float), rtol=rtol, atol=atol, equal_nan=True)
    assert numbers.beyond == np.count_nonzero(~close)
    assert numbers.differing == np.count_nonzero(a.view(np.uint32) != b.view(np.uint32))


@pytest.mark.parametrize("name", DTYPES)
def test_a_bit_that_differs_is_seen_whatever_the_dtype(name: str) -> None:
    kind = DTYPES[name]
    raw = np.zeros(5 * kind.itemsize, np.uint8)
    other = raw.copy()
    other[3 * kind.itemsize] = 1
    numbers = numbers_of(kind, raw.view(kind.carrier), other.view(kind.carrier))
    assert (numbers.differing, numbers.beyond, numbers.where) == (1, 1, (3,))
    assert (numbers.max_abs is None) == (kind.numpy is None)


@pytest.mark.parametrize(
    ("name", "a", "b", "distance"),
    [
        ("int64", 2**62, 2**62 + 1, 1),
        ("int64", -(2**63), 2**63 - 1, 2.0**64),
        ("uint64", 2**64 - 1, 2**64 - 2, 1),
        ("int8", -128, 127, 255),
        ("uint8", 3, 250, 247),
        ("bool", True, False, 1),
        ("float64", 1.5, -1.5, 3),
        ("float64", 1.0, math.nan, math.inf),
        ("float32", -math.inf, math.inf, math.inf),
        ("complex64", 3 + 4j, 0, 5),
        ("complex128", 3 + 4j, 0, 5),
    ],
)
def test_the_largest_difference_is_exact(name: str, a: complex, b: complex, distance: float) -> None:
    kind = dtype(name)
    assert numbers_of(kind, np.array([a], kind.array), np.array([b], kind.array)).max_abs == distance


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_small_floats_are_numbers_too(name: str) -> None:
    kind = dtype(name)
    numbers = numbers_of(kind, np.array([1, 2, 4], kind.array), np.array([1, 4, 4], kind.array))
    assert (numbers.max_abs, numbers.max_rel, numbers.where) == (2.0, 0.5, (1,))


def test_integers_next_to_each_other_are_not_close_because_doubles_are_coarse() -> None:
    a, b = np.array([2**62]), np.array([2**62 + 1])
    assert numbers_of(dtype("int64"), a, b, Tolerance(atol=0.5)).beyond == 1
    assert numbers_of(dtype("int64"), a, b, Tolerance(atol=1)).beyond == 0


def test_runs_and_boxes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "RUN", 7)
    kind = dtype("float32")
    a = np.zeros((6, 10), np.float32)
    b = a.copy()
    b[1, 1], b[5, 9], b[3, 4] = 1, 3, -2
    tally = Tally(kind, Tolerance())
    for start in range(0, 6, 2):
        box = Box((start, 0), (2, 10))
        one, other = (np.ascontiguousarray(x[box.slices()]).view(kind.carrier) for x in (a, b))
        tally.add(box, one, other)
    numbers = tally.numbers(60)
    assert (numbers.differing, numbers.max_abs, numbers.max_rel, numbers.where) == (3, 3.0, 1.0, (5, 9))


def test_a_scalar_that_differs_has_an_empty_index() -> None:
    kind = dtype("float32")
    numbers = numbers_of(kind, np.array(1.0, np.float32), np.array(2.0, np.float32))
    assert numbers.where == ()
