"""Ctrl-C and its kin: noted when they come, acted upon where it is safe. Knows nothing of what is interrupted.

An exception out of a signal handler would come in the middle of anything, Ray's own code included, which does not
survive it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The demo was asked to end. Not an Exception: nothing but the command itself is to catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Interruptions:
    """A context manager: inside, signals that ask the process to end are noted, and `check` raises.

    Every wait inside is to check at least `INTERVAL_S` apart. Whatever cleans up doesn't check, and so is not disturbed
    by the second Ctrl-C of an impatient person.
    """

    INTERVAL_S = 0.2

    def __init__(self) -> None:
        self._received: int | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._heard = self._hears = self._former_hears = -1
        self._former_unraisable = sys.unraisablehook

    def __enter__(self) -> Self:
        self._former = {number: signal.getsignal(number) for number in _SIGNALS}
        # here Python itself writes which signals come, whoever's handlers there are meanwhile
        self._heard, self._hears = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(self._hears, False)
        self._former_hears = signal.set_wakeup_fd(self._hears, warn_on_full_buffer=False)
        self._former_unraisable = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_hears)
        sys.unraisablehook = self._former_unraisable
        os.close(self._hears)
        os.close(self._heard)

    def listen(self) -> None:
        """Take the signals' handlers back from whoever set others, as Ray does when it starts."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._heard, 4096):
                if number in _SIGNALS:
                    self._note(number, None)
        if self._received is not None:
            raise Interrupted(self._received)

    def _unraisable(self, told: Any) -> None:
        # a handler of Ray's ends the process by that, and where Python can't, as in the middle of a fork, `check` does
        if told.exc_type is not SystemExit:
            self._former_unraisable(told)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number
