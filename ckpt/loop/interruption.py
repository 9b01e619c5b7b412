"""Being told to stop: by a signal, by a notice that this machine will be taken away, or by the program itself.

Only notes it; what follows upon it, the ranks agree on. Knows no checkpoints.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

__all__ = ["Interruption", "Notice", "reason"]

POLL_S = 1.0
"""Seconds between two looks for a notice."""
NOTICE = 1000
"""What `told` is for a notice; signals are told by their numbers."""
ASKED = 1001
"""What `told` is when the program asked."""
_ACTION_BYTES = 1024
"""At least what a struct sigaction takes anywhere."""

Notice = Callable[[], bool] | str | os.PathLike[str]
"""Says that this machine will be taken away: a function that returns whether it will, or a file that appears then."""

log = logging.getLogger("ckpt")


class Interruption:
    """Listens from `start` to `close`.

    Attributes:
        told: 0, or what has been told first.
    """

    def __init__(self, signals: Sequence[signal.Signals], notice: Notice | None) -> None:
        self.told = 0
        self._signals = set(signals)
        self._notice = notice if callable(notice) or notice is None else os.path.abspath(notice)
        self._pid = 0
        """The process that listens."""
        self._before: dict[int, tuple[Any, ctypes.Array[ctypes.c_char]]] = {}
        """What each signal did: the handler, as Python knows it, and the system's own note of it."""
        self._over = threading.Event()
        self._watching: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen. Signals are for the main thread alone; elsewhere they are left as they are."""
        self._pid = os.getpid()
        self._over.clear()
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                action = ctypes.create_string_buffer(_ACTION_BYTES)
                ctypes.CDLL(None).sigaction(int(number), None, action)
                self._before[number] = signal.signal(number, self._on_signal), action
        elif self._signals:
            log.warning("signals are not listened to, because the Checkpointer was not entered on the main thread")
        if self._notice is not None:
            self._watching = threading.Thread(target=self._watch, name="ckpt-notice", daemon=True)
            self._watching.start()

    def ask(self) -> None:
        """The program itself wants to stop."""
        self.told = self.told or ASKED

    def close(self) -> None:
        """Listen no more; signals do again what they did before."""
        self._over.set()
        for number, (before, action) in self._before.items():
            # None: it was set by other means than Python's, such as faulthandler's, and only the system can set it back
            signal.signal(number, signal.SIG_IGN if before is None else before)
            ctypes.CDLL(None).sigaction(int(number), action, None)
        self._before.clear()
        if self._watching is not None:
            self._watching.join(POLL_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # a process that was forked, such as a loader's worker: for it the signal means what it always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.told = self.told or number
        outer = getattr(self._before.get(number, [None])[0], "__self__", None)
        if isinstance(outer, Interruption) and outer is not self and outer._pid == self._pid:
            # one Checkpointer within another: both are told
            outer._on_signal(number, frame)

    def _watch(self) -> None:
        said = False
        while True:
            try:
                if self._is_noticed():
                    self.told = self.told or NOTICE
                    return
            except Exception:
                if not said:
                    log.exception("the notice of preemption can't be asked for; it is asked for again")
                said = True
            if self._over.wait(POLL_S):
                return

    def _is_noticed(self) -> bool:
        notice = self._notice
        if callable(notice):
            return bool(notice())
        return notice is not None and os.path.exists(notice)


def reason(told: int) -> str:
    """What was told, for people."""
    if told == NOTICE:
        return "preemption notice"
    if told == ASKED:
        return "stop()"
    try:
        return signal.Signals(told).name
    except ValueError:
        return f"signal {told}"
