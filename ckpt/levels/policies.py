"""Which steps of a run are kept: policies as values, pure functions of what is known of the steps.

    Any(LatestN(3), EveryN(1000), BestN(1, "loss"))     the last three, each thousandth, and the one with the least loss

They know no files. Whatever they say, `prune` never removes the newest step, pinned or tagged ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal, Protocol, SupportsIndex

from ckpt_formats.errors import ConfigurationError

__all__ = ["Any", "BestN", "EveryN", "LatestN", "Policy", "Saved", "kept", "metrics_of", "policy"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a policy knows of a checkpoint."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> value, as recorded beside it."""
    pinned: bool = False
    """Whether something else keeps it anyway: a pin or a tag."""


class Policy(Protocol):
    """Says which steps are kept."""

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        """The steps to keep, of those that are there, in any order."""
        ...


@dataclass(frozen=True, slots=True)
class LatestN:
    """The n newest steps."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _positive("LatestN", self.n))

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        return set(sorted({item.step for item in saved})[-self.n :])


@dataclass(frozen=True, slots=True)
class EveryN:
    """The steps that are multiples of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _positive("EveryN", self.steps))

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        return {item.step for item in saved if item.step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class BestN:
    """The n steps with the best values of a metric; of equal ones, the newest.

    Steps of which the metric was not recorded, or is not a number, are not among the best.
    """

    n: int
    metric: str
    mode: Literal["min", "max"] = "min"
    """Whether the least values are the best, or the greatest."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _positive("BestN", self.n))
        if self.mode not in ("min", "max"):
            raise ConfigurationError(f'BestN(mode={self.mode!r}): give "min" or "max"')

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        sign = 1 if self.mode == "min" else -1
        known = [item for item in saved if not math.isnan(item.metrics.get(self.metric, math.nan))]
        known.sort(key=lambda item: (sign * item.metrics[self.metric], -item.step))
        return {item.step for item in known[: self.n]}


@dataclass(frozen=True, slots=True, init=False)
class Any:
    """The steps that any of several policies keeps."""

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy | int) -> None:
        if not policies:
            raise ConfigurationError("Any() of no policies would keep nothing; give it some")
        object.__setattr__(self, "policies", tuple(map(policy, policies)))

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        return {step for one in self.policies for step in one.keeps(saved)}


def policy(keep: Policy | int) -> Policy:
    """A policy itself, or for a number n the policy that keeps the n newest: the sugar of `keep=3`."""
    return LatestN(keep) if isinstance(keep, SupportsIndex) else keep


def kept(keep: Policy | int, saved: Sequence[Saved]) -> set[int]:
    """The steps that stay: those that the policy keeps, those that are pinned, and the newest."""
    stay = {item.step for item in saved if item.pinned} | (policy(keep).keeps(saved) & {item.step for item in saved})
    if saved:
        stay.add(max(item.step for item in saved))
    return stay


def metrics_of(keep: Policy | int) -> set[str]:
    """The names of the metrics by which a policy chooses."""
    match keep:
        case BestN():
            return {keep.metric}
        case Any():
            return {name for one in keep.policies for name in metrics_of(one)}
    return set()


def _positive(name: str, value: object) -> int:
    """A plain integer, of any kind of integer."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ConfigurationError(f"{name}({value!r}): give a positive integer")
    return number
