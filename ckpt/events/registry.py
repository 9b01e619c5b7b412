"""The sinks of this process: who is told of events.

Added in code (`add_sink`) or by the environment variable CKPT_EVENTS, which is read when the first operation begins.
Knows no kind of sink: what the variable's words stand for is handed in.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from ckpt.events.types import Event

__all__ = ["REGISTRY", "Registration", "Registry", "Sink", "add_sink"]

Sink = Callable[[Event], object]
"""Called with each event, on the thread that it happened on, which waits for it. One with a method `close` is closed
when it is removed. If it raises, it is removed, with a warning, and what it was told of goes on."""

_log = logging.getLogger("ckpt")


class Registration:
    """A sink in its registry; leaving its `with` block, or `remove`, takes it out again."""

    def __init__(self, registry: Registry, sink: Sink, *, everywhere: bool = False) -> None:
        self.sink = sink
        self.everywhere = everywhere
        """Whether other processes of this job have the same one, as those that the environment chooses."""
        self._registry = registry

    def remove(self) -> None:
        """Tell the sink nothing more, and close it. Does nothing the second time."""
        if self._registry.discard(self):
            close = getattr(self.sink, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Registry:
    """Sinks, and what is told to all of them."""

    def __init__(self) -> None:
        self.registrations: tuple[Registration, ...] = ()
        """Replaced as a whole, so that it is read without the lock; empty while nobody listens."""
        self._lock = threading.Lock()
        self._prepared = False

    def add(self, sink: Sink) -> Registration:
        """Tell `sink` of every event from now on."""
        registration = Registration(self, sink)
        with self._lock:
            self.registrations = (*self.registrations, registration)
        return registration

    def discard(self, registration: Registration) -> bool:
        """Take a sink out without closing it; whether it was still there."""
        with self._lock:
            left = tuple(other for other in self.registrations if other is not registration)
            found = len(left) < len(self.registrations)
            self.registrations = left
        return found

    def prepare(self, chosen: Callable[[], Sequence[Sink]]) -> None:
        """Add what was chosen by other means, once. If that raises, nothing is added, and the next call tries again."""
        with self._lock:
            if not self._prepared:
                self.registrations = (
                    *self.registrations,
                    *(Registration(self, sink, everywhere=True) for sink in chosen()),
                )
                self._prepared = True

    def tell(self, event: Event) -> None:
        """Call every sink. Raises nothing that a sink raises, but what interrupts the whole program."""
        self._call(self.registrations, event)

    def relay(self, event: Event) -> None:
        """The same with an event of another process, of which only the sinks of this one do not know yet."""
        self._call([registration for registration in self.registrations if not registration.everywhere], event)

    def _call(self, registrations: Sequence[Registration], event: Event) -> None:
        for registration in registrations:
            try:
                registration.sink(event)
            except Exception as error:  # noqa: BLE001 - telling of a save must never be what breaks it
                self._drop(registration, error)

    def _drop(self, registration: Registration, error: Exception) -> None:
        if not self.discard(registration):
            return
        # logging itself may be what raises: a handler of the user's
        with contextlib.suppress(Exception):
            _log.warning(
                "events are no longer given to %r, because it failed: %s: %s",
                registration.sink,
                type(error).__name__,
                error,
            )
        with contextlib.suppress(Exception):
            getattr(registration.sink, "close", lambda: None)()

    def close(self) -> None:
        """Remove and close all sinks."""
        for registration in self.registrations:
            with contextlib.suppress(Exception):
                registration.remove()


REGISTRY = Registry()
atexit.register(REGISTRY.close)


def add_sink(sink: Sink) -> Registration:
    """Tell `sink` of every event of this process from now on: until `remove` of what is returned, or the end of its
    `with` block, or the end of the process.

    Args:
        sink: LogSink, JsonLinesSink, ChromeTraceSink, or anything that can be called with an Event. It is called on the
            thread that the event happened on, several at once if there are several, and a slow one makes saves slow. It
            is closed when it is removed, if it has a method `close`. One that raises is removed, with a warning through
            logging.
    """
    return REGISTRY.add(sink)
