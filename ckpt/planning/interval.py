"""The time between saves at which saving and repeating lost work together cost least.

After J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 1974), in the higher order
of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (FGCS 2006).
"""

from __future__ import annotations

import math

__all__ = ["NODE_MTBF", "best_interval", "expected_mtbf"]

NODE_MTBF = 86400.0 * 1000 / 6.5
"""Seconds between failures of a node when nothing better is known: 6.5 failures per thousand node-days, as on the
larger of the clusters in A. Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters"
(HPCA 2025)."""


def expected_mtbf(nodes: int, failures: int, node_seconds: float) -> float:
    """Mean seconds between failures of a job on so many nodes, after what it has seen itself.

    What is known of large clusters counts for one failure in NODE_MTBF, to which its own are added: the mean rate of a
    Poisson process of which that is the prior (a gamma distribution of shape 1).

    Args:
        failures: how often the job was interrupted.
        node_seconds: for how long it ran, times the nodes on which it did.
    """
    return (NODE_MTBF + node_seconds) / (1 + failures) / nodes


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds from one save to the next.

    Args:
        cost: seconds for which a save stops the training.
        mtbf: mean seconds between failures that the training does not survive.
    """
    if cost <= 0:
        return 0.0
    if cost >= 2 * mtbf:
        return mtbf
    x = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - cost
