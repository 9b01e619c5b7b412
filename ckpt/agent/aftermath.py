"""What is done with a checkpoint after its commit, by the agent and in the background: copies, retention.

What that is, is handed in by a higher floor. Calls come one after the other, in the order of the commits, on one
thread; the agent stays for them when its trainers have left, for a limited time.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PATIENCE = 3600.0
"""Seconds for which the agent stays for what is to be done after commits, when there is nothing else to stay for."""

log = logging.getLogger("ckpt.agent")


class Committed(NamedTuple):
    """A checkpoint that was committed."""

    path: str
    """Its folder on this node."""
    step: int | None
    attempt: str
    leads: bool
    """Whether this is the one agent that committed it; on node-local disks, the others are told as well, each of its
    own folder."""


AfterCommit = Callable[[Committed], None]
"""Errors that it raises are logged; retrying is its own business."""


class Aftermath:
    """Calls `after_commit` for every checkpoint that is told of. Without one, does nothing."""

    def __init__(self, after_commit: AfterCommit | None = None, patience: float = PATIENCE) -> None:
        self._call = after_commit
        self._patience = patience
        self._queue: queue.SimpleQueue[Committed] = queue.SimpleQueue()
        self._changed = threading.Lock()
        self._left = 0
        self._alone_since: float | None = None

    def joined(self, node: str) -> None:
        """The agent is that of this node. Called once, before any commit."""

    def committed(self, what: Committed) -> None:
        """Have it called; does not wait."""
        if self._call is None:
            return
        with self._changed:
            first = not self._left
            self._left += 1
        self._queue.put(what)
        if first:
            # ends with the process, when that has waited long enough
            threading.Thread(target=self._run, name="ckpt-agent-after", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """How far it is, for trainers that ask; empty when there is nothing to tell."""
        return {}

    def finished(self) -> bool:
        """Whether the agent, which has nothing else to stay for, may end."""
        with self._changed:
            if not self._left:
                return True
            self._alone_since = self._alone_since or time.monotonic()
            waited = time.monotonic() - self._alone_since
        if waited < self._patience:
            return False
        log.warning("what was to be done after commits is given up after %.0f s", waited)
        return True

    def stay(self) -> None:
        """Forget how long the agent has stayed for this alone: there is other work again."""
        self._alone_since = None

    def _run(self) -> None:
        left = True
        while left:
            what = self._queue.get()
            try:
                if self._call is not None:
                    self._call(what)
            except Exception:
                log.exception("%s is committed, but what was to be done after that failed", what.path)
            with self._changed:
                self._left -= 1
                left = self._left > 0
