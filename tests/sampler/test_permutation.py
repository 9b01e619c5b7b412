"""The order of an epoch: a permutation, a fair one, and the same one for ever."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ckpt


def _epoch(length: int, seed: int, epochs: int = 1) -> list[int]:
    """The samples of the last of these epochs, in order."""
    sampler = ckpt.Sampler(length, batch_size=length, seed=seed)
    for _ in range(epochs - 1):
        sampler.step()
    return next(iter(sampler))


@given(length=st.integers(1, 3000), seed=st.integers(), epochs=st.integers(1, 4))
@example(length=1, seed=0, epochs=1)
@example(length=2, seed=0, epochs=2)
@example(length=49, seed=0, epochs=1)  # fills its grid
@example(length=50, seed=0, epochs=1)  # just not
def test_an_epoch_has_each_sample_once(length: int, seed: int, epochs: int) -> None:
    assert sorted(_epoch(length, seed, epochs)) == list(range(length))


@given(
    length=st.integers(2**20, 2**62),
    part=st.integers(0, 2**62),
    size=st.integers(1, 64),
    seed=st.integers(0, 2**64),
)
def test_any_part_of_a_huge_epoch_is_known_without_the_rest(length: int, part: int, size: int, seed: int) -> None:
    sampler = ckpt.Sampler(length, batch_size=size, seed=seed)
    sampler.load_state_dict(sampler.state_dict() | {"consumed": part % (length - 2 * size)})
    batches = iter(sampler)
    drawn = next(batches) + next(batches)
    assert len(set(drawn)) == 2 * size
    assert all(0 <= index < length for index in drawn)


def test_the_order_is_the_same_in_every_release() -> None:
    # A checkpoint from the midst of an epoch needs the rest of that epoch: what makes another order gets another name
    # in the sampler's state, and these numbers stay.
    assert _epoch(12, seed=0) == [11, 10, 3, 7, 6, 5, 1, 4, 2, 8, 9, 0]
    assert _epoch(12, seed=0, epochs=2) == [5, 0, 7, 4, 1, 3, 10, 8, 2, 11, 6, 9]
    assert _epoch(12, seed=-1) == [3, 8, 4, 2, 9, 7, 1, 5, 10, 11, 6, 0]
    large = ckpt.Sampler(10**12, batch_size=4, seed=2**70)
    assert next(iter(large)) == [918628697540, 534440260057, 849946314437, 340000495170]


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_permutation_is_as_likely_as_any_other(length: int) -> None:
    permutations = math.factorial(length)
    draws = 100 * permutations
    seen = Counter(tuple(_epoch(length, seed)) for seed in range(draws))
    assert len(seen) == permutations
    chi_squared = sum((count - 100) ** 2 / 100 for count in seen.values())
    # its mean is permutations - 1, its variance twice that; one fixed outcome, for the seeds are
    assert abs(chi_squared - (permutations - 1)) < 4 * math.sqrt(2 * (permutations - 1))


def test_neither_neighbours_nor_epochs_nor_seeds_resemble_each_other() -> None:
    length = 10_000
    first, second, other = _epoch(length, seed=5), _epoch(length, seed=5, epochs=2), _epoch(length, seed=6)
    places = list(range(length))
    pairs = [(places, first), (first[1:], first[:-1]), (first, second), (first, other), (first[100:], first[:-100])]
    for one, another in pairs:
        same = sum(a == b for a, b in zip(one, another, strict=True))
        assert same <= 8  # one is expected, or none
        assert abs(_correlation(one, another)) < 0.04  # four standard deviations


def _correlation(one: list[int], another: list[int]) -> float:
    mean_one, mean_another = sum(one) / len(one), sum(another) / len(another)
    covariance = sum((a - mean_one) * (b - mean_another) for a, b in zip(one, another, strict=True))
    spread_one = sum((a - mean_one) ** 2 for a in one)
    spread_another = sum((b - mean_another) ** 2 for b in another)
    return covariance / math.sqrt(spread_one * spread_another)
