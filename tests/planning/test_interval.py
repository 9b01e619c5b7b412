"""How often saves pay."""

from __future__ import annotations

import math

import pytest

from ckpt.planning.interval import NODE_MTBF, best_interval


def waste(interval: float, cost: float, mtbf: float) -> float:
    """Expected share of time that is lost, with failures that come at random and a restart that costs nothing: each
    interval is tried until it and its save are survived.
    """
    span = (interval + cost) / mtbf
    return (math.expm1(span) * mtbf) / interval


@pytest.mark.parametrize("mtbf", [600.0, 3600.0, 86400.0])
@pytest.mark.parametrize("share", [1e-6, 1e-4, 1e-2, 0.2])
def test_no_other_interval_wastes_less(mtbf: float, share: float) -> None:
    cost = share * mtbf
    best = best_interval(cost, mtbf)
    least = waste(best, cost, mtbf)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert waste(best * factor, cost, mtbf) > least
    # Young's first order is close when saves are cheap
    if share < 1e-3:
        assert best == pytest.approx(math.sqrt(2 * cost * mtbf), rel=0.01)


def test_saves_that_cost_nothing_or_more_than_they_are_worth() -> None:
    assert best_interval(0.0, 3600.0) == 0.0
    assert best_interval(9000.0, 3600.0) == 3600.0
    assert 100 * 86400 < NODE_MTBF < 200 * 86400
