"""A limit of bytes per second that several threads keep to together. Knows neither files nor stores."""

from __future__ import annotations

import math
import threading
import time
from numbers import Real

from ckpt_formats.errors import ConfigurationError

__all__ = ["Throttle", "require_bandwidth"]


def require_bandwidth(bandwidth: object, where: str = "") -> float | None:
    """A number of bytes per second, from any kind of number; None is no limit. `where` begins the message.

    Raises:
        ConfigurationError: it is 0 or less, infinite or not a number.
    """
    if bandwidth is None:
        return None
    number = float(bandwidth) if not isinstance(bandwidth, bool) and isinstance(bandwidth, Real) else 0.0
    if not 0 < number < math.inf:
        raise ConfigurationError(
            f"{where}bandwidth={bandwidth!r} is no number of bytes per second; give more than 0, or None"
        )
    return number


class Throttle:
    """Says when bytes may have been moved, one after the other, whichever thread they are of."""

    def __init__(self, bandwidth: float | None = None) -> None:
        """At most `bandwidth` bytes per second; for None, no limit."""
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._due = 0.0

    def limit(self, bandwidth: float | None) -> None:
        """Another limit from now on."""
        with self._lock:
            self._bandwidth = bandwidth

    def take(self, nbytes: int) -> float:
        """The moment, on time.monotonic's clock, before which moving these bytes must not be over.

        The bytes of a second take a second, though what moves them is faster.
        """
        now = time.monotonic()
        with self._lock:
            if self._bandwidth is None:
                return now
            self._due = max(self._due, now) + nbytes / self._bandwidth
            return self._due

    def give_back(self, nbytes: int) -> None:
        """These bytes, which were taken, were not moved after all."""
        with self._lock:
            if self._bandwidth is not None:
                self._due -= nbytes / self._bandwidth
