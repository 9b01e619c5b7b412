"""How often saves pay."""

from __future__ import annotations

import math

import pytest

from ckpt.planning.interval import NODE_MTBF, best_interval, expected_mtbf


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


def test_the_rate_of_failures_is_that_of_large_clusters_until_the_run_has_seen_enough() -> None:
    day = 86400.0
    assert expected_mtbf(1, 0, 0.0) == NODE_MTBF
    assert expected_mtbf(512, 0, 0.0) == pytest.approx(NODE_MTBF / 512)
    # a crash while it is being written says little
    assert expected_mtbf(8, 1, 60.0) == pytest.approx(NODE_MTBF / 8 / 2, rel=1e-3)
    # three failures a day on 100 nodes, for a month
    assert expected_mtbf(100, 90, 100 * 30 * day) == pytest.approx(day / 3, rel=0.05)
    # none at all for a year
    assert expected_mtbf(100, 0, 100 * 365 * day) > 300 * day
