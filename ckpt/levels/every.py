"""How often a level is due: every so many steps, every so much time, or as often as pays.

What is due by its step is known to every rank alike; what is due by the clock, one rank has to say.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from datetime import timedelta

from ckpt_formats.errors import ConfigurationError

__all__ = ["Every", "EveryLike", "every", "seconds"]

EveryLike = int | str | timedelta
"""A number of steps, a time as `timedelta` or as text such as "10min", or "auto"."""

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})")


@dataclass(frozen=True, slots=True)
class Every:
    """One of: `steps`, `seconds`, or neither of them for "auto"."""

    steps: int | None = None
    seconds: float | None = None

    @property
    def auto(self) -> bool:
        return self.steps is None and self.seconds is None

    def due(self, step: int) -> bool:
        """Whether it is due after a step by the step's number alone."""
        return self.steps is not None and step % self.steps == 0

    def __str__(self) -> str:
        if self.steps is not None:
            return "every step" if self.steps == 1 else f"every {self.steps:,} steps"
        if self.seconds is None:
            return "as often as pays"
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if self.seconds % size == 0:
                return f"every {self.seconds / size:g} {unit}"
        return f"every {self.seconds:g} s"


def every(value: EveryLike) -> Every:
    """What a user said, understood. Raises ConfigurationError."""
    if isinstance(value, (str, timedelta)):
        return Every() if value == "auto" else Every(seconds=seconds(value, "every"))
    try:
        steps = operator.index(value)
    except TypeError:
        steps = 0
    if isinstance(value, bool) or steps < 1:
        raise _wrong("every", value)
    return Every(steps=steps)


def seconds(value: float | str | timedelta, name: str) -> float:
    """A time as seconds: from a timedelta, a text such as "90s", "10min", "6h" or "30d", or a number of seconds."""
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, timedelta):
        found = value.total_seconds()
    elif match is not None:
        found = float(match[1]) * _UNITS[match[2]]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value)
    else:
        raise _wrong(name, value)
    if not 0 < found < float("inf"):
        raise _wrong(name, value)
    return found


def _wrong(name: str, value: object) -> ConfigurationError:
    steps = "a positive number of steps, " if name == "every" else ""
    auto = ', or "auto"' if name == "every" else ""
    return ConfigurationError(f'{name}={value!r}: give {steps}a time such as "90s", "10min", "6h" or a timedelta{auto}')
