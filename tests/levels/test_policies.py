"""Which steps stay, by each policy, and what no policy can take away."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt.levels.policies import Any, BestN, EveryN, LatestN, Policy, Saved, kept, policy
from ckpt_formats.errors import ConfigurationError

_METRICS = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats(width=16), max_size=2)
SAVED = st.lists(
    st.builds(Saved, st.integers(0, 60), _METRICS, st.booleans()), max_size=12, unique_by=lambda item: item.step
)
_SIMPLE = st.one_of(
    st.builds(LatestN, st.integers(1, 5)),
    st.builds(EveryN, st.integers(1, 20)),
    st.builds(BestN, st.integers(1, 4), st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"])),
)
POLICIES = st.one_of(_SIMPLE, st.lists(_SIMPLE, min_size=1, max_size=3).map(lambda some: Any(*some)))


def _saved(*steps: int, **loss: float) -> list[Saved]:
    return [Saved(step, {"loss": loss[f"at{step}"]} if f"at{step}" in loss else {}) for step in steps]


def test_the_newest_n() -> None:
    assert LatestN(2).keeps(_saved(30, 10, 20)) == {20, 30}
    assert LatestN(5).keeps(_saved(30, 10, 20)) == {10, 20, 30}


def test_every_n_steps() -> None:
    assert EveryN(1000).keeps(_saved(0, 500, 1000, 1001, 3000)) == {0, 1000, 3000}


def test_the_n_best_by_a_metric() -> None:
    saved = _saved(1, 2, 3, 4, at1=0.5, at2=0.1, at3=0.3)
    assert BestN(2, "loss").keeps(saved) == {2, 3}
    assert BestN(1, "loss", "max").keeps(saved) == {1}
    assert BestN(9, "loss").keeps(saved) == {1, 2, 3}
    assert BestN(1, "accuracy").keeps(saved) == set()


def test_a_metric_that_is_no_number_is_never_best_and_of_equals_the_newest_is() -> None:
    saved = _saved(1, 2, 3, 4, at1=math.nan, at2=0.5, at3=0.5, at4=math.inf)
    assert BestN(1, "loss").keeps(saved) == {3}
    assert BestN(1, "loss", "max").keeps(saved) == {4}
    assert BestN(4, "loss").keeps(saved) == {2, 3, 4}


def test_any_of_several() -> None:
    saved = _saved(1, 2, 3, 4, 5, at1=0.0)
    assert Any(LatestN(1), EveryN(2), BestN(1, "loss")).keeps(saved) == {1, 2, 4, 5}
    assert Any(2, EveryN(3)) == Any(LatestN(2), EveryN(3))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_any_kind_make_a_policy(kind: Callable[[int], int]) -> None:
    rule = Any(kind(2), EveryN(kind(3)), BestN(kind(1), "loss"))
    assert rule == Any(LatestN(2), EveryN(3), BestN(1, "loss"))
    latest, every, best = rule.policies
    assert isinstance(latest, LatestN)
    assert isinstance(every, EveryN)
    assert isinstance(best, BestN)
    assert {type(latest.n), type(every.steps), type(best.n)} == {int}


def test_a_number_is_the_newest_n() -> None:
    assert policy(3) == LatestN(3)
    assert policy(EveryN(5)) == EveryN(5)


@given(POLICIES, SAVED, st.data())
def test_the_newest_and_the_pinned_stay_whatever_the_policy_and_the_order(
    keep: Policy, saved: list[Saved], data: st.DataObject
) -> None:
    stay = kept(keep, saved)
    assert stay <= {item.step for item in saved}
    assert {item.step for item in saved if item.pinned} <= stay
    if saved:
        assert max(item.step for item in saved) in stay
    assert kept(keep, data.draw(st.permutations(saved))) == stay


@given(POLICIES, SAVED)
def test_pruning_again_changes_nothing(keep: Policy, saved: list[Saved]) -> None:
    stay = kept(keep, saved)
    left = [item for item in saved if item.step in stay]
    assert kept(keep, left) >= keep.keeps(saved) & stay
    assert kept(Any(keep), saved) == stay


@given(st.lists(_SIMPLE, min_size=1, max_size=4), SAVED)
def test_any_keeps_exactly_what_one_of_them_keeps(policies: list[Policy], saved: list[Saved]) -> None:
    assert Any(*policies).keeps(saved) == set().union(*(one.keeps(saved) for one in policies))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LatestN(0),
        lambda: LatestN(-1),
        lambda: LatestN(True),
        lambda: EveryN(0),
        lambda: EveryN(1.5),  # type: ignore[arg-type]
        lambda: BestN(0, "loss"),
        lambda: BestN(1, "loss", "best"),  # type: ignore[arg-type]
        Any,
        lambda: policy(0),
        lambda: policy(True),
        lambda: policy(torch.tensor(1.5)),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_means_nothing_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        wrong()
