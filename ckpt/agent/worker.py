"""A thread that does one thing after the other, for as long as its owner wants. Knows nothing of what it does."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("ckpt")


class Worker:
    """The thread is made with the first thing to do, and dies with the process if it is not closed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def do(self, what: Callable[[], None]) -> None:
        """Have it done, after everything else that is still to be done. Errors are the callable's own to tell."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._queue.put(what)

    def close(self, timeout: float) -> None:
        """Wait at most so many seconds until all is done, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _run(self) -> None:
        while (what := self._queue.get()) is not None:
            try:
                what()
            except Exception:
                log.exception("the thread %s failed", self._name)
            # nothing of it shall live until the next one comes
            del what
