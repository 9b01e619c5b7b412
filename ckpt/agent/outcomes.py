"""What becomes of saves that nobody waits for: a thread of rank 0 does, in the order in which they began.

So a save is logged when it is committed and a failure is known when the next save begins, at no cost for the training.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Protocol

from ckpt_formats.errors import CheckpointError

log = logging.getLogger("ckpt")


class Followed(Protocol):
    """A save under way."""

    path: str

    def follow(self) -> None:
        """Wait until it is over; what it learns, it keeps and tells. Raises CheckpointError if it failed."""
        ...

    def known_failure(self) -> CheckpointError | None:
        """Why it failed, if it did and that is known here. Never waits."""
        ...

    def known_end(self) -> bool:
        """Whether it is known here that it is over. Never waits."""
        ...


class Outcomes:
    """Follows saves until they are over. Close it."""

    def __init__(self) -> None:
        self._open: list[Followed] = []
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Followed | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, save: Followed) -> None:
        """Follow a save."""
        with self._lock:
            self._open.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ckpt-outcomes", daemon=True)
                self._thread.start()
        self._queue.put(save)

    def failure(self) -> CheckpointError | None:
        """The failure of the first save that has failed and was not told of here before. Never waits."""
        failed = None
        with self._lock:
            for save in list(self._open):
                if save.known_end():
                    self._open.remove(save)
                    failed = failed or save.known_failure()
        return failed

    def close(self, timeout: float) -> list[Followed]:
        """Wait until all are over, for at most `timeout` seconds; returns those that are not known to be."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout)
        with self._lock:
            left, self._open = [save for save in self._open if not save.known_end()], []
        return left

    def _run(self) -> None:
        while (save := self._queue.get()) is not None:
            try:
                save.follow()
            except CheckpointError as error:
                log.warning("a save failed: %s", error)
