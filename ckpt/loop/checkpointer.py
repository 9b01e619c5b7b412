"""Checkpointer: the object around a training loop.

    with ckpt.Checkpointer("runs/a", state, every="10min", keep=3) as run:
        for step in run.steps(10_000):
            ...                            # forward, backward, optimizer.step(): unchanged

Goes on where the run was left, saves without stopping the training, moves checkpoints to further levels in the
background, and saves a last time when it is told to stop. docs/loop.md.
"""

from __future__ import annotations

import atexit
import json
import logging
import operator
import os
import signal
import socket
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self

from ckpt.agent.saver import AsyncSaver, CaptureMode, require_capture
from ckpt.agent.slots import require_memory
from ckpt.collective import Collective, ProcessGroup
from ckpt.levels.every import EveryLike, seconds
from ckpt.levels.launching import launcher
from ckpt.levels.note import ENTRY, Note
from ckpt.levels.policies import Policy
from ckpt.levels.tiers import Disk, Level, Remote, settle
from ckpt.loop.agreement import Act, Agreement, require_alike
from ckpt.loop.interruption import Interruption, Notice, reason
from ckpt.loop.lead import Lead, try_disk
from ckpt.loop.resume import resume
from ckpt.storage.compressing import Compress, require_compress
from ckpt.storage.throttle import require_bandwidth
from ckpt_formats.errors import (
    CheckpointError,
    ConfigurationError,
    CoverageError,
    SaveFailedError,
    StateError,
    UnsupportedValueError,
    ValuesDifferError,
)
from ckpt_formats.facts import metric
from ckpt_formats.native import names
from ckpt_formats.urls import is_url

__all__ = ["Checkpointer"]

_UNSAVEABLE = (StateError, UnsupportedValueError, ValuesDifferError, CoverageError)
"""What is wrong with a state, and will be at the next step too."""

log = logging.getLogger("ckpt")


class Checkpointer:
    """Saves a run while it trains, and goes on where it was left. Collective: every rank makes one, alike.

    Args:
        run: the run's folder, which all ranks reach; it is made. Holds the checkpoints `step_00000100`, unless a Disk
            says otherwise, and what says which levels the run has.
        state: as for `ckpt.save`. Loaded in place when the run has checkpoints.
        every: how often to save: a number of steps, a time such as "10min" or a timedelta, or "auto", which weighs
            what saves cost the training against the work that a failure would lose (after Young and Daly).
        keep: which checkpoints stay: the n newest for a number, or LatestN, EveryN, BestN or Any of them; all without.
        tiers: levels, when there are several: Disk and Remote. Saves are committed on the first disk, and flow to the
            others in the background. `every` and `keep` are for that first disk, where it does not say them itself.
        mtbf: for "auto", the mean time between failures of the whole job; by default what is known of large clusters,
            and as the run goes on, what it has seen itself.
        preemption: says that this machine will be taken away: a function without arguments that returns whether it
            will, called about every second, or the path of a file that appears then. Asked on every rank.
        signals: which signals ask for a last save and the end of the loop.
        on_error: what follows upon a save that fails: "log" says so and trains on, "raise" raises at the end of a
            later step, on every rank. A state that can't be saved at all is raised at once in either case.
        capture: as for `ckpt.async_save`.
        memory: bytes of shared memory that the captures of a rank may take; by default three times what it writes, or
            once if there is no more. It is made on entering, so that the first save is as fast as the others.
        compress: whether checkpoints are compressed, without loss, for all levels: True, False, or "auto", which does
            for as long as the first disk is so slow that it pays.
        bandwidth: bytes per second at which each node may write to the first disk; by default as fast as it can.
        process_group: the ranks that take part; the default group when there is one, else this process alone.

    Raises:
        ConfigurationError: an option means nothing, or contradicts another. On several ranks it is raised on all of
            them, on entering, and so is an option that differs between ranks.
        StateError: `state` has an entry of the name that the Checkpointer's own has.
        SaveFailedError, CorruptionError, StateMismatchError, RankError and others of `ckpt.load`: on entering, when
            nothing can be saved in the run's folder, all that is there is damaged, or it does not fit `state`.

    Attributes:
        path: the run's folder.
        step: the last step that was completed: of the checkpoint gone on from, then of the loop. 0 before the first.
        resumed: the checkpoint that was gone on from, None when the run began anew.
        stopped: why the loop ended before its last step: the name of a signal, "preemption notice", "stop()"; else
            None.
        levels: the levels, settled.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        state: MutableMapping[str, object],
        *,
        every: EveryLike | None = None,
        keep: Policy | int | None = None,
        tiers: Sequence[Disk | Remote] = (),
        mtbf: float | str | timedelta | None = None,
        preemption: Notice | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1),
        on_error: Literal["log", "raise"] = "log",
        capture: CaptureMode = "lazy",
        memory: float | None = None,
        compress: Compress = False,
        bandwidth: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.path = os.path.abspath(os.fspath(run))
        self.levels: list[Level] = []
        self.step = 0
        self.resumed: str | None = None
        self.stopped: str | None = None
        self._state = state
        self._mtbf: float | None = None
        self._raises = on_error == "raise"
        self._capture: CaptureMode = "lazy"
        self._memory: int | None = None
        self._compress: Compress = False
        self._bandwidth: float | None = None
        self._given_group = process_group
        self._process_group = process_group
        """Of our own, from when the block is entered."""
        self._interruption = Interruption(signals, preemption)
        self._metrics: dict[str, float] = {}
        self._asked = False
        self._saved: int | None = None
        """The step of the newest save that was begun."""
        self._over = ExitStack()
        self._process = 0
        """The one that is in the block; 0 outside of it."""
        # made on entering
        self._agreement: Agreement
        self._saver: AsyncSaver
        self._lead: Lead | None = None
        """On rank 0."""
        self._refused: CheckpointError | None = None
        try:
            if is_url(os.fspath(run)):
                raise ConfigurationError(
                    f"{run!r} is a URL; name a local or mounted folder for the run, and the URL in "
                    "tiers=[ckpt.Remote(…)]"
                )
            if on_error not in ("log", "raise"):
                raise ConfigurationError(f'on_error={on_error!r}: give "log" or "raise"')
            if ENTRY in state:
                raise StateError(f"the entry {ENTRY!r} of the state is the Checkpointer's own; rename yours")
            self.levels = settle(self.path, tiers, every, keep)
            self._mtbf = None if mtbf is None else seconds(mtbf, "mtbf")
            self._capture = require_capture(capture)
            self._memory = require_memory(memory)
            self._compress = require_compress(compress, auto=True)
            self._bandwidth = require_bandwidth(bandwidth)
        except CheckpointError as error:
            if Collective(process_group).world_size == 1:
                raise
            # the others, who may have been given something else, wait for this rank where they enter, and hear of it
            self._refused = error

    # its life

    def __enter__(self) -> Self:
        """Take the run, start the agent, and load the newest checkpoint. Collective.

        Raises:
            SaveFailedError: another job saves into this run, or it can't be written to, or the agent does not start, or
                there is no memory for captures.
            What `ckpt.load` raises; CorruptionError if all checkpoints of the run are damaged.
        """
        if self._process == os.getpid():
            raise SaveFailedError(
                f"{self.path}: this Checkpointer's `with` block is entered a second time, inside of itself; make one "
                "for each run",
                path=self.path,
            )
        with ExitStack() as stack:
            # who is told to stop while it starts leaves the block as who is told later does
            stack.callback(self._interruption.close)
            self._interruption.start()
            self._agreement = Agreement(self._given_group)
            stack.push(self._agreement.fail)
            self._process_group = self._agreement.group or self._given_group
            group = Collective(self._process_group)
            self._take_run(group, stack)
            resumed = resume(self._state, self.levels, self._process_group)
            if resumed is not None:
                self.step, self.resumed = resumed
                self._saved = resumed.step
            claim = None if self._lead is None else self._lead.claim.fd
            self._saver = AsyncSaver(
                launcher=launcher(self.path, self.levels, claim), follow=False, memory=self._memory
            )
            stack.callback(self._saver.close)
            # a program that ends without leaving the block finishes its captures, too
            stack.callback(atexit.unregister, self._saver.close)
            atexit.register(self._saver.close)
            agent = self._saver.start(group, self._state)
            if self._lead is not None:
                self._lead.follow(self._saver, resumed)
            group.agree(self._saver.prepare() or try_disk(self.levels[0].place, agent.nodes[group.rank]))
            told = int.from_bytes(max(group.share(self._interruption.told.to_bytes(4, "big"))), "big")
            if told:
                self.stopped = reason(told)
            self._process = os.getpid()
            self._over = stack.pop_all()
        return self

    def _take_run(self, group: Collective, stack: ExitStack) -> None:
        """Rank 0 takes the run for all, who were given the same. Collective."""

        def take(payloads: list[bytes]) -> bytes:
            given = [json.loads(payload) for payload in payloads]
            require_alike([options for _, options in given])
            nodes = len({host for host, _ in given})
            self._lead = stack.enter_context(Lead(self.path, self.levels, nodes, self._mtbf))
            return b""

        failure: BaseException | None = self._refused
        try:
            for level in self.levels:
                level.configure()
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            failure = failure or error
        group.exchange(json.dumps([socket.gethostname(), self._options()]).encode(), failure, take)

    def _options(self) -> dict[str, str]:
        """What has to be the same on all ranks, for people."""
        options = {
            "run": self.path,
            "on_error": "raise" if self._raises else "log",
            "tiers": ", ".join(f"{level.name} in {level.place}" for level in self.levels),
        }
        for level in self.levels:
            options[f"every of {level.name}"] = "each checkpoint" if level.every is None else str(level.every)
            options[f"keep of {level.name}"] = str(level.keep)
            options[f"bandwidth of {level.name}"] = str(level.bandwidth)
        return options

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until what was saved is committed, and is where it has to go; after an error in the block, don't.

        Raises:
            SaveFailedError: the last save failed, so that the end of the training is not stored.
        """
        if os.getpid() != self._process:
            return  # a process that was forked off in the block leaves it, too: nothing of this is its own
        self._process = 0
        if kind is not None:
            # at once: to finish what was captured takes a while
            self._agreement.fail(kind, error, trace)
            self._over.__exit__(kind, error, trace)
            return
        with self._over:
            self._finish()

    def _finish(self) -> None:
        """Collective."""
        self._agreement.meet(self._flags(), Act.LEAVES, self.step)
        self._saver.settle()
        failure: BaseException | None = None
        if self._lead is not None:
            try:
                self._lead.finish()
            except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
                failure = error
        Collective(self._process_group).agree(failure)
        self._agreement.close()

    # the loop

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are left, up to `total`, counting from 1 and from the beginning of the run.

        When the loop asks for the next, the step is complete, and saved if that is due. The last one always is. Ends
        early when any rank was told to stop: then `stopped` says why, and the last step that was yielded is saved.

        Raises:
            SaveFailedError: a save failed, with on_error="raise"; or this is used outside of the `with` block.
            StateError and the like: the state can't be saved.
            RankError: another rank died, failed, or does something else: it has left the loop, or only some ranks
                have called `save`.
            ConfigurationError: `total` is no integer, or differs between ranks.
        """
        self._require_inside()
        try:
            total = operator.index(total)
        except TypeError:
            raise ConfigurationError(f"steps({total!r}): give the number of the last step") from None
        self._agreement.meet(self._flags(), Act.BEGINS, total)
        return self._steps(total)

    def _steps(self, total: int) -> Iterator[int]:
        for step in range(self.step + 1, total + 1):
            if self.stopped is not None:
                return  # a loop before this one ended early
            self._require_inside()
            yield step
            self._require_inside()
            self.step = step
            self._after(step, last=step == total)

    def _require_inside(self) -> None:
        if self._process != os.getpid():
            raise SaveFailedError(
                f"{self.path}: steps() is used outside of the `with` block, where nothing is saved; write `with "
                "ckpt.Checkpointer(…) as run:`, and the loop inside of it",
                path=self.path,
            )

    def save(self) -> None:
        """Save at the end of this step, whatever is due. Every rank calls it."""
        self._asked = True

    def stop(self) -> None:
        """End the loop soon, on a step that all ranks agree on, with a last save. One rank is enough."""
        self._interruption.ask()

    def log(self, **metrics: float) -> None:
        """Note metrics of this step, such as loss=2.3. Those that rank 0 has noted are recorded beside a checkpoint of
        this step, where BestN and `ckpt tag` find them.

        Raises:
            FactsError: a name can't be that of a metric, or a value is no number.
        """
        self._metrics.update({name: metric(name, value) for name, value in metrics.items()})

    def _after(self, step: int, *, last: bool) -> None:
        """The end of a step."""
        flags = self._agreement.read(self._flags())
        told, failed, *due = flags
        if told and not last:
            self.stopped = reason(told)
            if self._lead is not None:
                log.warning("was told to stop (%s): saves step %d, and ends", self.stopped, step)
            last = True
        if failed and self._raises:
            raise self._failure()
        levels = [
            level
            for level, flag in zip(self.levels, due, strict=True)
            if last or flag or (level.every is not None and level.every.due(step))
        ]
        asked = self._asked and not levels
        if self._asked:
            levels = self.levels
        # what this step's save is for, is not due any more
        self._agreement.announce(self._flags(saved=levels), Act.SAVES if asked else Act.COMPLETES, step)
        if asked:
            # the others know of this save only if they have asked for it, too
            self._agreement.read([])
        if levels and self._saved != step:
            # where every checkpoint goes
            names_of = [level.name for level in self.levels if level in levels or level.every is None]
            self._save(step, names_of)
        self._asked = False
        self._metrics.clear()

    def _flags(self, saved: Sequence[Level] = ()) -> list[int]:
        """What this rank would have all ranks know: that it was told to stop, that a save failed, which levels are due
        by the clock once these are saved.
        """
        if self._lead is None:
            return [self._interruption.told, 0, *(0 for _ in self.levels)]
        due = zip(self.levels, self._lead.due(time.monotonic()), strict=True)
        failed = self._lead.first_failure is not None
        return [self._interruption.told, int(failed), *(int(flag and level not in saved) for level, flag in due)]

    def _save(self, step: int, levels: Sequence[str]) -> None:
        path = os.path.join(self.levels[0].place, names.step_folder(step))
        self._saved = step
        try:
            state = {**self._state, ENTRY: self._note(levels).tree()}
            pending = self._saver.save(
                state,
                path,
                step=step,
                process_group=self._process_group,
                capture=self._capture,
                compress=self._compress,
                bandwidth=self._bandwidth,
            )
        except _UNSAVEABLE:
            raise
        except (CheckpointError, OSError) as error:
            if self._lead is not None:
                self._lead.begun(step, levels, error)
            if self._raises:
                raise
            return
        if self._lead is not None:
            self._lead.begun(step, levels, pending)

    def _note(self, levels: Sequence[str]) -> Note:
        """What goes into the checkpoint beside the state, the same on all ranks."""
        group = Collective(self._process_group)
        due = {level.place: level.name in levels for level in self.levels[1:]}
        mine = json.dumps([due, self._metrics]).encode() if group.rank == 0 else None
        due, metrics = json.loads(group.broadcast(mine))
        return Note(due, metrics)

    def _failure(self) -> BaseException:
        if self._lead is not None and self._lead.first_failure is not None:
            return self._lead.first_failure
        return SaveFailedError("a save failed; rank 0 says which and why", rank=0)
