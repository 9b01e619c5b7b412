"""What rank 0 does for a run: has it to itself, says what is due by the clock, and follows saves to their end.

It follows them on a thread of its own, which waits for the agent's answers and so takes nothing from the training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

from ckpt.agent.pending import PendingSave
from ckpt.agent.saver import AsyncSaver
from ckpt.levels.claim import Claim
from ckpt.levels.owed import steps_in
from ckpt.levels.record import NAME, read_levels, write_levels
from ckpt.levels.tiers import Level
from ckpt.loop.lives import Lives
from ckpt.loop.resume import Resumed
from ckpt.planning.interval import best_interval
from ckpt.storage.objects import ObjectStore
from ckpt_formats.errors import CheckpointError, FormatError, SaveFailedError
from ckpt_formats.native.node_folders import NODE

__all__ = ["Lead", "try_disk"]

PATIENCE_S = 600.0
"""Seconds to wait at the end for what was captured to be committed."""
REMEMBERED = 5
"""Saves from which the cost of one is taken."""
LOOK_S = 1.0
"""Seconds between two looks at how far the agent is with other levels."""
RETRY_S = 60.0
"""Seconds after which a save that pays is tried again, when there is none yet whose cost is known."""

log = logging.getLogger("ckpt")


class _Begun(NamedTuple):
    step: int
    pending: PendingSave | Exception
    """What to follow, or why there is nothing to."""


class Lead:
    """Rank 0's part, as a `with` block.

    Args:
        run: the run's folder; it is made.
        levels: its levels.
        nodes: on how many the job runs.
        mtbf: mean seconds between its failures, for levels that are due as often as pays; for None, what the run has
            seen so far tells.

    Attributes:
        failed: why the newest save that has ended failed; None if it did not.
        first_failure: why the first save that failed did; whatever came after it.
        committed: the newest step that was committed in this job.

    Raises:
        SaveFailedError: the run, or the folder of a level, can't be had.
        StoreError: a remote level can't be used.
    """

    def __init__(self, run: str, levels: Sequence[Level], nodes: int, mtbf: float | None) -> None:
        self.failed: BaseException | None = None
        self.first_failure: BaseException | None = None
        self.committed: int | None = None
        self._before: int | None = None
        """The step that was gone on from."""
        self._run = run
        self._levels = levels
        self._mtbf = mtbf
        self._begin = time.monotonic()
        self._last: dict[str, float] = {}
        """When a save for each level was last begun, by the clock that is never set."""
        self._failures = 0
        self._costs: deque[float] = deque(maxlen=REMEMBERED)
        self._writes: deque[float] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        self._following: threading.Thread | None = None
        self._saver: AsyncSaver | None = None
        self._deadline = float("inf")
        self._said: dict[str, Any] = {}
        """What was known last of how far the agent is."""
        with ExitStack() as claims:
            self.claim = _claimed(run, claims)
            taken = {os.path.realpath(run)}
            # what is wrong with a level is better known now than when the first checkpoint is due there
            for level in levels:
                if level.remote:
                    level.configure()
                    ObjectStore(level.place).check()
                elif NODE not in level.place and os.path.realpath(level.place) not in taken:
                    _claimed(level.place, claims)
                    taken.add(os.path.realpath(level.place))
            try:
                self._new = not os.path.lexists(os.path.join(run, NAME))
                self._left = _left(run, levels)
                write_levels(run, levels)
                self._lives = Lives(run, self.claim, nodes)
            except OSError as error:
                raise _unwritable(run, error) from error
            self._claims = claims.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_following(0.0)
        # an interrupt is what somebody wanted
        self._lives.end(failed=kind is not None and issubclass(kind, Exception))
        self._claims.close()

    def follow(self, saver: AsyncSaver, before: Resumed | None) -> None:
        """Begin to follow saves, after those of `before`, which was gone on from."""
        self._lives.begin()
        self._before = None if before is None else before.step
        self._tell_of_left()
        if self._new and before is not None and os.path.dirname(before.path) != self._run:
            log.warning(
                "%s is new, and goes on from %s; if that is another run's, end this one, and give it places of its own",
                self._run,
                before.path,
            )
        self._saver = saver
        self._begin = time.monotonic()
        self._following = threading.Thread(target=self._follow, name="ckpt-follow", daemon=True)
        self._following.start()

    def _tell_of_left(self) -> None:
        """Warn of what the run would have gone on from if its levels were still those of the job before."""
        now = "begins anew" if self._before is None else f"goes on after step {self._before}"
        why = "which is not among its levels any more"
        for level in self._left:
            more = self._more_on(level)
            if more is not None:
                log.warning(
                    "%s %s, though %s, %s, %s; name it in tiers to go on from it",
                    self._run,
                    now,
                    level.place,
                    why,
                    more,
                )

    def _more_on(self, level: Level) -> str | None:
        """What is newer on a level than what was gone on from, for people; None if nothing is."""
        if level.remote:
            # how it is reached is not known any more
            return "may have checkpoints" if self._before is None else None
        with contextlib.suppress(CheckpointError, OSError):
            newest = max(steps_in(level.place), default=0)
            return f"has step {newest}" if newest > (self._before or 0) else None
        return None

    # when

    def due(self, now: float) -> list[bool]:
        """Which levels are due by the clock, which is `time.monotonic()`."""
        return [self._is_due(level, now) for level in self._levels]

    def _is_due(self, level: Level, now: float) -> bool:
        if level.every is None or level.every.steps is not None:
            return False
        last = self._last.get(level.name)
        if level.every.seconds is not None:
            return now - (self._begin if last is None else last) >= level.every.seconds
        interval = self.interval()
        if interval is None:
            # the first save tells what saves cost, and that they work
            return last is None or now - last > RETRY_S
        return now - (last or 0.0) >= interval

    def interval(self) -> float | None:
        """Seconds between saves that pay, as far as is known: never less than it takes to write one."""
        with self._lock:
            if not self._costs:
                return None
            cost, write = statistics.median(self._costs), statistics.median(self._writes)
        mtbf = self._lives.mtbf() if self._mtbf is None else self._mtbf
        return max(best_interval(cost, mtbf), write)

    # what became of saves

    def begun(self, step: int, levels: Collection[str], pending: PendingSave | Exception) -> None:
        """A save was begun, or could not be."""
        now = time.monotonic()
        self._last.update(dict.fromkeys(levels, now))
        self._queue.put(_Begun(step, pending))

    def _fail(self, step: int, error: Exception) -> None:
        self.failed = error
        self.first_failure = self.first_failure or error
        self._failures += 1
        newest = self._before if self.committed is None else self.committed
        last = "none is saved yet" if newest is None else f"the newest checkpoint is of step {newest}"
        more = f"; {self._failures} saves in a row have failed" if self._failures > 1 else ""
        log.error("step %d is not saved, and the training goes on: %s (%s%s)", step, error, last, more)

    def finish(self) -> None:
        """Wait until what was begun is over, and what is due on other levels is there.

        Raises:
            SaveFailedError, CheckpointError: the newest save failed, or is not committed in time.
        """
        if not self._end_following(PATIENCE_S):
            raise SaveFailedError(
                f"{self._run}: what was captured is not committed within {PATIENCE_S:.0f} s; the agent goes on with it",
                path=self._run,
            )
        if self.failed is not None:
            raise self.failed
        self._wait_for_levels()

    def _end_following(self, patience: float) -> bool:
        """End the thread; whether it saw the end of every save."""
        if self._following is None:
            return True
        self._deadline = time.monotonic() + patience
        self._queue.put(None)
        self._following.join(patience + 1)
        ended = not self._following.is_alive()
        self._following = None
        return ended

    def _follow(self) -> None:
        while True:
            try:
                begun = self._queue.get(timeout=LOOK_S)
            except queue.Empty:
                self._look()
                continue
            if begun is None:
                return
            self._follow_one(*begun)
            self._look()

    def _follow_one(self, step: int, pending: PendingSave | Exception) -> None:
        if isinstance(pending, Exception):
            # in the order of the steps, so that the newest decides
            self._fail(step, pending)
            return
        while True:
            try:
                result = pending.wait(min(10.0, max(0.0, self._deadline - time.monotonic())))
            except CheckpointError as error:
                if not pending.done():
                    if time.monotonic() < self._deadline:
                        continue
                    return
                self._fail(step, error)
            else:
                with self._lock:
                    self._costs.append(pending.blocked)
                    self._writes.append(result.seconds)
                self.committed, self.failed, self._failures = step, None, 0
            return

    # other levels, which the agent looks after

    def _look(self) -> dict[str, Any]:
        """Ask how far the agent is, and say what is new."""
        agent = None if self._saver is None else self._saver.agent
        status = {} if agent is None else agent.aftermath()
        if not status:
            return {}
        said, self._said = self._said, status
        if status["pruning"] not in (None, said.get("pruning")):
            log.warning("what need not be kept can't be removed: %s", status["pruning"])
        for name in status["unmeasured"].keys() - said.get("unmeasured", {}).keys():
            log.warning("%s: %s", self._run, status["unmeasured"][name])
        for name, state in status["levels"].items():
            before = said.get("levels", {}).get(name, {})
            if state["error"] not in (None, before.get("error")):
                log.warning("not all is on %s yet, and is tried again: %s", name, state["error"])
            for step in state["refused"].keys() - before.get("refused", {}).keys():
                log.error("step %s can't be had on %s: %s", step, name, state["refused"][step])
            if state["sent"] not in (None, before.get("sent")):
                log.info("step %d is on %s", state["sent"], name)
        return status

    def _wait_for_levels(self) -> None:
        """Wait until the newest checkpoint is wherever it is due; say so if it is not in time."""
        begin = time.monotonic()
        said = False
        while True:
            status = self._look()
            agent = None if self._saver is None else self._saver.agent
            if agent is None or not agent.alive():
                log.warning("%s: the agent has ended; the next start goes on with what is not on all levels", self._run)
                return
            if status and status["done"] and (self.committed is None or status["seen"] >= self.committed):
                return
            levels: dict[str, Any] = status.get("levels", {})
            owed = ", ".join(f"{state['owed']} on {name}" for name, state in levels.items() if state["owed"])
            waited = time.monotonic() - begin
            if waited > PATIENCE_S:
                log.warning("%s: not there within %.0f s, the agent goes on with it: steps %s", self._run, waited, owed)
                return
            if not said and waited > 5 * LOOK_S:
                log.warning("%s: waits for steps %s", self._run, owed or "to be looked after")
                said = True
            time.sleep(0.02)


def _left(run: str, levels: Sequence[Level]) -> list[Level]:
    """Levels that the run had in the job before and has no more."""
    try:
        known = read_levels(run) or []
    except FormatError:
        return []
    places = {level.place for level in levels}
    return [level for level in known if level.place not in places]


def _claimed(folder: str, claims: ExitStack) -> Claim:
    """The right to save into a folder, which is made, until the end of a block."""
    try:
        os.makedirs(folder, exist_ok=True)
        claim = Claim.take(folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    claims.callback(claim.release)
    return claim


def try_disk(place: str, node: str) -> SaveFailedError | None:
    """Try, on each node, whether it can save to the disk that it has for itself. Returns why it can't."""
    if NODE not in place:
        return None
    folder = place.replace(NODE, node)
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _unwritable(folder, error)
    return None


def _unwritable(run: str, error: OSError) -> SaveFailedError:
    return SaveFailedError(
        f"{run}: nothing can be saved there ({error.strerror or error}); make the folder writable, or choose "
        "another one",
        path=run,
    )
