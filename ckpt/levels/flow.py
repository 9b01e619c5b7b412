"""From level to level, in the background: what was committed on the first goes on to the others, and each is pruned.

Runs in the agent, so it takes nothing from the training and outlives it. It has no memory of its own: what is due is
read from the checkpoints themselves and from what the other levels have, so whoever dies when, the next agent goes on.
What is due on a further level and not there yet is not pruned on the first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any as Anything

from ckpt.agent.aftermath import PATIENCE, Aftermath, Committed
from ckpt.levels.claim import held_by_another
from ckpt.levels.note import note_of
from ckpt.levels.owed import OnDisk, owed
from ckpt.levels.places import Place
from ckpt.levels.policies import Any, Saved
from ckpt.levels.prune import facts_of, prune
from ckpt.levels.report import PruneReport
from ckpt.levels.tiers import Level
from ckpt.storage.facts import update_facts
from ckpt_formats.errors import CheckpointError, CheckpointExistsError, CorruptionError, FormatError
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE
from ckpt_formats.native.reader import read_root

__all__ = ["Flow"]

FIRST_PAUSE_S = 1.0
"""Seconds before what failed is tried again; twice as long after each further failure, up to the longest."""
LONGEST_PAUSE_S = 60.0
TRIES = 3
"""How often a checkpoint is sent that can't be read: it may be damaged, or its disk may have failed for a moment."""
UNREAD_S = 10.0
"""Seconds for which is tried to read what a checkpoint is, until it is taken for damaged."""

log = logging.getLogger("ckpt.agent")


@dataclass(frozen=True, slots=True)
class _AllBut:
    """Keeps everything but given steps: what is still to go elsewhere, and what was committed since anybody looked."""

    steps: AbstractSet[int]

    def keeps(self, saved: Sequence[Saved]) -> AbstractSet[int]:
        return {item.step for item in saved} - self.steps


_Key = tuple[str, int, int]
"""A checkpoint's folder, and inode and time of its manifest."""


class Flow(Aftermath):
    """What an agent does for the levels of its run.

    Args:
        run: the run's folder.
        levels: its levels; the first is where saves are committed.
        claim: the lock that this process shares with the trainers; None when this is not the agent that leads.

    On node-local disks, every agent brings its node's part of a checkpoint to the other levels, and the one that leads
    commits it there when all parts have come.
    """

    def __init__(self, run: str, levels: Sequence[Level], claim: int | None) -> None:
        super().__init__()
        self._run_folder = run
        self._claim = claim
        self._first = levels[0]
        self._node_local = NODE in self._first.place
        self._folder = self._first.place
        """Where the checkpoints of the first level lie, on this node."""
        self._places = [Place(level, part=claim is None) for level in levels[1:]]
        self._known: dict[_Key, OnDisk | None] = {}
        self._unread: dict[_Key, float] = {}
        """What could not be read, and since when; not what was given up."""
        self._condition = threading.Condition()
        self._wakes = 0
        """How often there may have been something new to do."""
        self._done: dict[str, int] = {}
        """Up to which of these each worker has done all there was."""
        self._seen = -1
        self._states = {place.level.name: _State() for place in self._places}
        self._pruning: dict[str, str] = {}
        """Why levels could not be pruned."""
        self._unmeasured: dict[str, str] = {}
        """Metrics by which levels are pruned and that nothing there has, and what is to be said of each."""
        self._since: float | None = None
        self._released = False
        """Whether the lock was given back."""
        self._over = False
        """Whether another job looks after the levels now."""
        if claim is not None and not self._node_local:
            self._start()

    def _start(self) -> None:
        workers: dict[str, Callable[[], float | None]] = {self._first.name: self._keep_first}
        workers |= {place.level.name: partial(self._bring, place) for place in self._places}
        self._done = dict.fromkeys(workers, -1)
        for name, work in workers.items():
            # they end with the process, which stays until they are done or given up
            threading.Thread(target=self._work, args=(name, work), name=f"ckpt-flow-{name}", daemon=True).start()

    # what the agent asks

    def joined(self, node: str) -> None:
        if self._node_local:
            self._folder = self._folder.replace(NODE, node)
            self._start()

    def committed(self, what: Committed) -> None:
        if not self._done:
            return
        with self._condition:
            self._seen = max(self._seen, -1 if what.step is None else what.step)
        self._wake()

    def finished(self) -> bool:
        now = time.monotonic()
        if self._since is None:
            # everything that was captured is written: the next job may have the run, and finds it
            self._since = now
            if self._claim is not None and not self._released:
                self._released = True
                os.close(self._claim)
        with self._condition:
            behind = [name for name, done in self._done.items() if done < self._wakes]
        if not behind or self._over:
            return True
        if not os.path.isdir(self._run_folder):
            log.warning("%s: the run was removed, so there is nothing left to do for its levels", self._run_folder)
            return True
        if self._claim is not None and held_by_another(self._run_folder):
            log.warning("%s: another job goes on with this run, and with what is not on all levels", self._run_folder)
            return True
        if now - self._since < PATIENCE:
            return False
        log.warning("%s: given up after %.0f s: %s", self._run_folder, PATIENCE, ", ".join(behind))
        return True

    def stay(self) -> None:
        self._since = None

    # workers

    def _wake(self) -> None:
        with self._condition:
            self._wakes += 1
            self._condition.notify_all()

    def _work(self, name: str, work: Callable[[], float | None]) -> None:
        """Do some work whenever there may be some; it says after how many seconds to try again what failed."""
        begun = -1
        failures = 0
        pause: float | None = None
        while True:
            with self._condition:
                if pause is not None:
                    self._condition.wait(pause)
                while self._wakes == begun and pause is None:
                    self._condition.wait()
                begun = self._wakes
            try:
                pause = work()
                failures = 0
            except Exception:
                log.exception("%s: the level %s can't be looked after; tried again", self._run_folder, name)
                failures += 1
                pause = _pause_after(failures)
            if pause is None:
                with self._condition:
                    self._done[name] = begun

    def _bring(self, place: Place) -> float | None:
        """Have on a level what is due there, and prune it."""
        state = self._states[place.level.name]
        try:
            while True:
                if place.present is None:
                    place.look()
                    self._wake()
                left = self._owed(place)
                with self._condition:
                    state.owed = [item.step for item in left]
                if not left:
                    break
                # the newest first: it is worth the most
                self._send(place, left[0], state)
            if state.changed and place.level.keep is not None and place.present:
                self._pruned(place.level, place.prune(self._protected()))
                state.changed = False
        except (CheckpointError, OSError) as error:
            if self._taken_over():
                return None
            with self._condition:
                state.error = str(error)
                state.failures += 1
            log.warning("%s: %s", place.level.place, error)
            place.present = None
            return _pause_after(state.failures)
        with self._condition:
            state.error, state.failures = None, 0
        return self._pause()

    def _send(self, place: Place, item: OnDisk, state: _State) -> None:
        # they go with it
        self._record(item)
        try:
            place.bring(item.path, item.step)
        except (CheckpointExistsError, CorruptionError, FormatError) as error:
            place.tried[item.step] += 1
            if place.tried[item.step] < TRIES and not isinstance(error, CheckpointExistsError):
                raise
            # no better the next time
            place.refused.add(item.step)
            with self._condition:
                state.refused[item.step] = str(error)
            log.error("step %d can't be had on %s: %s", item.step, place.level.name, error)  # noqa: TRY400
            return
        with self._condition:
            state.sent = item.step
            state.changed = True
            state.failures = 0
            state.error = None
        # the first level may let go of it
        self._wake()

    def _keep_first(self) -> float | None:
        """Record what was measured beside new checkpoints, and prune the first level."""
        for item in self._on_disk():
            self._record(item)
        if self._first.keep is None or self._taken_over():
            return self._pause()
        removable = {item.step for item in self._on_disk()}
        for place in self._places:
            if place.present is None:
                return None  # who looks there wakes this one up
            removable.difference_update(item.step for item in self._owed(place))
        # a node that could not get a manifest has its part of that checkpoint all the same
        begun = self._first.keep if self._node_local else None
        keep = Any(self._first.keep, _AllBut(removable))
        report = prune(self._folder, keep, begun=begun, of_loop=True, needed={})
        self._pruned(self._first, report)
        if report.removed:
            with self._condition:
                self._known = {key: item for key, item in self._known.items() if os.path.lexists(key[0])}
        return self._pause()

    def _pruned(self, level: Level, report: PruneReport | None) -> None:
        """Note what could not be removed; it is tried again with the next checkpoint."""
        with self._condition:
            self._pruning.pop(level.name, None)
            if report is not None and report.failed:
                self._pruning[level.name] = ": ".join(report.failed[0])
            self._unmeasured |= {} if report is None else report.unmeasured

    def _pause(self) -> float | None:
        """After how many seconds to look again for what could not be read."""
        with self._condition:
            return FIRST_PAUSE_S if self._unread else None

    # what is where

    def _on_disk(self) -> list[OnDisk]:
        """The committed checkpoints of the first level, the newest first."""
        found: list[OnDisk] = []
        try:
            entries = list(os.scandir(self._folder))
        except FileNotFoundError:
            return []
        for entry in entries:
            if entry.is_symlink():
                continue
            try:
                info = os.stat(os.path.join(entry.path, names.MANIFEST))
            except OSError:
                continue
            key = (entry.path, info.st_ino, info.st_mtime_ns)
            with self._condition:
                known = key in self._known
                item = self._known.get(key)
            if not known:
                item = self._read(key)
            if item is not None:
                found.append(item)
        return sorted(found, key=lambda item: -item.step)

    def _read(self, key: _Key) -> OnDisk | None:
        """What a checkpoint says of itself; None when it is not a step of the loop's own, or can't be read."""
        item = None
        unread = False
        try:
            root = read_root(key[0])
            if root.step is not None and names.is_called_after(key[0], root.step):
                item = OnDisk(key[0], root.step, note_of(root.values))
        except (CheckpointError, OSError) as error:
            unread = not isinstance(error, FormatError | FileNotFoundError)
        now = time.monotonic()
        with self._condition:
            since = self._unread.pop(key, now)
            if unread and now - since < UNREAD_S:
                self._unread[key] = since
            else:
                self._known[key] = item
        return item

    def _owed(self, place: Place) -> list[OnDisk]:
        """What is due on a level and is not there, and would not be pruned there at once; the newest first."""
        return owed(place.level, self._on_disk(), place.present or set(), place.brought | place.refused)

    def _protected(self) -> dict[int, str]:
        """What is pinned or tagged on the first level, often only after it was brought: it stays on the others, too."""
        found = ((item.step, facts_of(item.path)[1]) for item in self._on_disk())
        return {step: f"{why} on {self._first.name}" for step, why in found if why is not None}

    def _record(self, item: OnDisk) -> None:
        """Put the metrics of a checkpoint beside it, once: what a user records later stands."""
        if not item.note.metrics or os.path.lexists(os.path.join(item.path, names.FACTS)):
            return
        with contextlib.suppress(CheckpointError):
            update_facts(item.path, lambda facts: facts if facts.metrics else facts.changed(metrics=item.note.metrics))

    def _taken_over(self) -> bool:
        """Whether the trainers are gone and another job has the run; then its levels are that one's business."""
        if self._since is None or self._claim is None:
            return False
        self._over = self._over or held_by_another(self._run_folder)
        return self._over

    # telling

    def status(self) -> dict[str, Anything]:
        with self._condition:
            return {
                "seen": self._seen,
                "pruning": "; ".join(self._pruning.values()) or None,
                "unmeasured": dict(self._unmeasured),
                "done": all(done == self._wakes for done in self._done.values()),
                "levels": {name: state.tree() for name, state in self._states.items()},
            }


class _State:
    """How far a level is."""

    def __init__(self) -> None:
        self.owed: list[int] = []
        self.sent: int | None = None
        """The step that was brought last."""
        self.refused: dict[int, str] = {}
        """Steps that can't be brought, and why."""
        self.error: str | None = None
        self.failures = 0
        self.changed = True
        """Whether it has something new since it was pruned."""

    def tree(self) -> dict[str, Anything]:
        return {
            "owed": self.owed,
            "sent": self.sent,
            "refused": {str(step): why for step, why in self.refused.items()},
            "error": self.error,
        }


def _pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE_S)
