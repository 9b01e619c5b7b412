"""Saving without stopping: plan with the other ranks, capture into the arena, and let the agent write and commit.

`async_save` returns once everything that an optimizer does not own is captured; the rest is copied while the next
forward and backward pass run, and the optimizer's step waits for what is left of it by a hook that is set here. From
when every rank has captured, the save completes although all trainers die.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from ckpt import collector
from ckpt.agent.client import AgentClient, Launcher, Slot, failure, launch
from ckpt.agent.fence import Fence
from ckpt.agent.server import describe
from ckpt.agent.wire import Message
from ckpt.agent.worker import Worker
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation
from ckpt.events.log import seconds_text, size_text
from ckpt.provenance import provenance
from ckpt.saving.capture import Capture, Laid
from ckpt.saving.recurring import NEW, ORIGIN, Greeting, Recurring, place_digest, signature, values_digest
from ckpt.saving.save import PLANS, Attempt, Saver, SaveResult
from ckpt.storage.compressing import Readable
from ckpt.storage.publish import Folder, is_committed, prepare_folder
from ckpt_formats.digest import DIGEST_SIZE
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.native import names

SLOT_TIMEOUT = 600.0
"""Seconds that a save waits for an earlier one to be written before it fails."""
CLOSE = 10.0
"""Seconds for which a process that ends waits until what it has captured is written, to say so in the log."""
SAID = 1.0
"""Seconds of waiting after which it is said that a save waits."""

log = logging.getLogger("ckpt")

CaptureMode = Literal["lazy", "eager"]


class PendingSave:
    """A save under way: what to wait for, and what became of it.

    Attributes:
        path: the checkpoint's folder.
        step: the training step it is of.
        attempt: the id of the attempt.
        handed: set when this rank's part was handed to the agent, or given up.
        phases: seconds of this rank in each phase of the call.
        blocked: seconds for which the call that began it did not return.
        failure: why it failed, as far as this process knows; see `over`.
        trusted: whether somebody has waited until it was captured, and may have changed the state since.
    """

    def __init__(self, client: AgentClient, attempt: str, path: str, step: int | None) -> None:
        self.attempt = attempt
        self.path = path
        self.step = step
        self.blocked = 0.0
        self.phases: Mapping[str, float] = {}
        self.handed = threading.Event()
        self.failure: BaseException | None = None
        self.trusted = False
        self._client = client
        self._lock = threading.Lock()
        self._end: Message | None = None

    def captured(self, timeout: float = SLOT_TIMEOUT) -> None:
        """Wait until every rank has captured its part: from now on the state may be changed in any way, and the save
        completes although trainers die.

        Raises:
            CheckpointError: the save failed, or was not captured within `timeout` seconds; names the ranks waited for.
        """
        self._status("captured", timeout)

    def committed(self, timeout: float = SLOT_TIMEOUT) -> None:
        """Wait until the checkpoint is on stable storage and will be found by the next start. Raises as `captured`."""
        self._status("committed", timeout)

    durable = committed

    def wait(self, timeout: float = SLOT_TIMEOUT) -> SaveResult:
        """Wait until it is committed, and say what was done. Raises as `captured`."""
        end = self._status("committed", timeout)
        return SaveResult(
            path=self.path, step=self.step, bytes=end["bytes"], seconds=end["seconds"], phases=self.phases
        )

    result = wait

    def done(self) -> bool:
        """Whether it is over, well or not. Never waits."""
        try:
            self._ask("committed", 0.0)
        except CheckpointError:
            return True
        return self._end is not None

    @property
    def over(self) -> bool:
        """Whether it is over, as far as this process knows. Asks nobody."""
        return self._end is not None or self.failure is not None

    def watch(self) -> None:
        """Wait until it is over, so that this process knows; raises nothing."""
        try:
            self._ask("committed", SLOT_TIMEOUT)
        except CheckpointError as error:
            self.failure = error

    def _status(self, until: str, timeout: float) -> Message:
        begin = time.monotonic()
        if not self.handed.wait(timeout):
            raise SaveFailedError(f"{self.path}: this rank did not capture its part within {timeout} s", path=self.path)
        status = self._ask(until, max(0.0, timeout - (time.monotonic() - begin)))
        if not status[until]:
            ranks = ", ".join(map(str, status["waits_for"])) or "none: the files are still being written"
            raise SaveFailedError(
                f"{self.path}: not {until} within {timeout} s; ranks that have not captured yet: {ranks}",
                path=self.path,
            )
        self.trusted = True
        return status

    def _ask(self, until: str, timeout: float) -> Message:
        with self._lock:
            status = self._end
        if status is None:
            status = self._client.wait(self.attempt, until, timeout)
            if status.get("error") or status.get("committed"):
                with self._lock:
                    first, self._end = self._end is None, status
                if first and self._client.rank == 0 and status.get("committed"):
                    log.info("%s", self._summary(status))
        if status.get("error"):
            self.failure = failure(status)
            raise self.failure
        return status

    def _summary(self, end: Message) -> str:
        """A line for the log: the agent, which knows more, has no terminal."""
        step = "" if self.step is None else f" step {self.step}"
        return (
            f"saved{step}: {size_text(end['bytes'])} in {seconds_text(end['seconds'])} s, of which the training waited "
            f"for {seconds_text(self.blocked)} s, to {self.path}"
        )


class AsyncSaver:
    """Saves states without stopping the training; one per process.

    Makes the agent at its first save, or when `start` is called. Close it when no more is to be saved: the agent then
    writes what is left, and ends.
    """

    def __init__(self, saver: Saver | None = None, launcher: Launcher = launch) -> None:
        """`launcher` starts an agent on this node and returns its address; by default a process of its own."""
        self._saver = saver or Saver()
        self._launcher = launcher
        self._client: AgentClient | None = None
        self._known: list[tuple[ProcessGroup | None, Recurring]] = []
        """What is known of the states that were saved, the last one first."""
        self._spare: Slot | None = None
        """A slot for the next save, so that it need not ask."""
        self._worker = Worker("ckpt-capture")
        self._watcher = Worker("ckpt-watch")
        self._unheard: list[PendingSave] = []
        """On rank 0: saves whose outcome was not asked for by a later one."""
        self._captures: list[tuple[Capture, PendingSave, Operation]] = []
        self._fence = Fence(self.settle)

    def start(self, group: Collective) -> AgentClient:
        """Make sure that this node has an agent. Collective."""
        if self._client is None:
            self._client = AgentClient.join(group, self._launcher)
        return self._client

    def save(
        self,
        state: Mapping[str, object],
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        process_group: ProcessGroup | None = None,
        capture: CaptureMode = "lazy",
    ) -> PendingSave:
        """See ckpt.async_save."""
        begin = time.perf_counter()
        group = Collective(process_group)
        client = self.start(group)
        attempt = Attempt(self._saver, group, path, step, "capture")
        operation = attempt.operation
        with collector.paused():
            slot: Slot | None = None
            try:
                begun = self._agree(client, group, attempt, process_group, state)
            except BaseException as error:
                attempt.discard()
                operation.end(error)
                raise
            pending = PendingSave(client, begun.attempt, attempt.path, attempt.step)
            try:
                form = begun.known.form
                with operation.waiting("room in the arena"):
                    slot = self._slot(client, form.nbytes, attempt.path)
                with operation.phase("capture") as phase:
                    phase.bytes = operation.bytes = form.nbytes
                    rooms = form.rooms(slot.view, slot.arena, slot.number)
                    work = Capture(form, begun.sources, slot.view, rooms, operation.phase("lazy capture"))
                    work.begin(self._fence.around(state, pending) if capture == "lazy" else _nothing)
            except BaseException as error:
                operation.end(error)
                _tell(begun, error)
                client.abandon(begun.attempt, slot, error)
                raise
        self._captures = [earlier for earlier in self._captures if not earlier[0].copied]
        self._captures.append((work, pending, operation))
        self._worker.do(partial(self._finish, client, begun, work, slot, pending, operation))
        if group.rank == 0:
            self._unheard.append(pending)
        pending.phases = operation.seconds
        pending.blocked = time.perf_counter() - begin
        return pending

    def settle(self) -> None:
        """Wait until nothing of this process is still being copied, so that its tensors may be changed in any way."""
        for work, _, operation in self._captures:
            if not work.copied:
                with operation.waiting("the lazy capture"):
                    work.wait(SLOT_TIMEOUT)
        self._captures = []

    def forget(self, pending: PendingSave) -> None:
        """Whoever follows a save has heard that it failed: the next one need not raise that again."""
        if pending in self._unheard:
            self._unheard.remove(pending)

    def close(self) -> None:
        """Leave the agent, which writes what is left and ends. Waits for captures, and shortly for what is written."""
        self.settle()
        self._worker.close(SLOT_TIMEOUT)
        if self._client is not None:
            self._client.close()
            self._client = None
        self._watcher.close(CLOSE)
        self._unheard = []
        self._spare = None
        self._known = []

    def _agree(
        self,
        client: AgentClient,
        group: Collective,
        attempt: Attempt,
        process_group: ProcessGroup | None,
        state: Mapping[str, object],
    ) -> _Begun:
        """Agree with the other ranks on what is saved, by a few bytes if that is what was saved before. Collective."""
        taken = attempt.take(state)
        failure = self._fence.problem() or (self._earlier_failure() if group.rank == 0 else None)
        known: Recurring | None = None
        with attempt.operation.phase("plan"):
            if taken is not None and failure is None and not (group.rank == 0 and is_committed(attempt.path)):
                marks = signature(taken)
                known = next((k for of, k in self._known if of is process_group and k.fits(marks)), None)
            greeting = Greeting(
                origin=NEW if known is None else known.origin,
                attempt=secrets.token_bytes(ORIGIN),
                place=place_digest(attempt.path, attempt.step),
                values=bytes(DIGEST_SIZE) if taken is None else values_digest(taken),
            )
            greetings = [Greeting.decode(data) for data in group.share(b"".join(greeting))]
            if taken is not None and known is not None and known.agreed(greetings, taken):
                number = greetings[0].attempt.hex()
                self._remember(process_group, known)
                open_save = None
                if known.contents is not None:
                    described = {**known.contents, "step": attempt.step}
                    open_save = partial(self._open, client, number, attempt.path, group.world_size, described)
                return _Begun(number, known, known.sources(taken), open_save)
        planned = attempt.plan(failure)
        if taken is None:
            raise AssertionError("a rank that could not take its state apart has failed")
        contents: Message | None = None
        unopened: BaseException | None = None
        try:
            if planned.plan is not None and attempt.folder is not None:  # on rank 0
                contents = describe(attempt.contents(planned.plan))
                client.begin(planned.attempt, attempt.folder, group.world_size, contents)
            known = Recurring(taken, planned, greetings, contents)
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            unopened = error
        try:
            # no rank may hand over its part before rank 0 has opened the save
            group.agree(planned.failure or unopened)
        except BaseException as error:
            client.abandon(planned.attempt, None, error)
            raise
        if known is None:
            raise AssertionError("a rank that could not open its part of the save has failed")
        self._remember(process_group, known)
        return _Begun(planned.attempt, known, known.sources(taken), None)

    def _remember(self, process_group: ProcessGroup | None, known: Recurring) -> None:
        others = [(of, other) for of, other in self._known if other is not known]
        self._known = [(process_group, known), *others[: PLANS - 1]]

    def _open(self, client: AgentClient, number: str, path: str, world_size: int, contents: Message) -> None:
        """Make the folder and open the save: on rank 0, in the background."""
        contents["provenance"] = provenance()
        folder = Folder(path, ())
        try:
            folder = prepare_folder(self._saver.files, path)
        finally:
            client.begin(number, folder, world_size, contents)

    def _earlier_failure(self) -> BaseException | None:
        """Why an earlier save failed, if one did that nobody was told of here: it must not pass in silence."""
        for pending in list(self._unheard):
            if pending.over:
                self._unheard.remove(pending)
                if pending.failure is not None:
                    return pending.failure
        return None

    def _finish(
        self, client: AgentClient, begun: _Begun, work: Capture, slot: Slot, pending: PendingSave, operation: Operation
    ) -> None:
        """Copy the rest and hand the slot to the agent; on the worker's thread."""
        failure: BaseException | None = None
        try:
            work.finish()
        except Exception as error:  # noqa: BLE001 - it is told to whoever waits
            failure = error
        failure = _tell(begun, failure)
        try:
            if failure is None:
                client.captured(begun.attempt, slot, _table(begun.known.form.files, begun.attempt, client.rank))
            else:
                client.abandon(begun.attempt, slot, failure)
        except CheckpointError as lost:
            log.warning("%s: %s", pending.path, lost)
            failure = failure or lost
        operation.end(failure)
        pending.handed.set()
        if client.rank == 0:
            self._watcher.do(pending.watch)
        if self._spare is None:
            with contextlib.suppress(CheckpointError):
                self._spare = client.slot(begun.known.form.nbytes, 0.0)

    def _slot(self, client: AgentClient, nbytes: int, folder: str) -> Slot:
        slot, self._spare = self._spare, None
        if slot is not None:
            if len(slot.view) >= nbytes:
                return slot
            client.release(slot)
        slot = client.slot(nbytes, 0.0)
        if slot is None:
            # what is captured, but not handed to the agent yet, would never be written while this waits
            for _, pending, _ in self._captures:
                pending.handed.wait(SLOT_TIMEOUT)
            slot = client.slot(nbytes, SAID)
        if slot is None:
            begin = time.monotonic()
            log.warning("%s: waits for earlier saves to be written: the arena is full", folder)
            slot = client.slot(nbytes, SLOT_TIMEOUT)
            if slot is None:
                raise SaveFailedError(
                    f"{folder}: earlier saves were not written within {SLOT_TIMEOUT:.0f} s, so there is no room to "
                    "capture this one; save less often, or to faster storage",
                    path=folder,
                )
            log.warning("%s: waited %.1f s for the arena", folder, time.monotonic() - begin)
        return slot


class _Begun(NamedTuple):
    """A save that all ranks have agreed on."""

    attempt: str
    known: Recurring
    sources: Sequence[Readable]
    open: Callable[[], None] | None
    """Opens it at the agent, where this is rank 0 and that was not done yet."""


def _tell(begun: _Begun, failure: BaseException | None) -> BaseException | None:
    """Open a save that is not open yet. Returns why the save fails, if it does."""
    if begun.open is not None:
        try:
            begun.open()
        except Exception as error:  # noqa: BLE001 - it is told to whoever waits
            return failure or error
    return failure


def _nothing(_: torch.Tensor) -> bool:
    """What may be copied lazily when all is copied eagerly."""
    return False


def _table(files: Sequence[Laid], attempt: str, rank: int) -> list[Any]:
    """What lies in a slot, for the agent."""
    table = []
    for number, laid in enumerate(files):
        chunks = [
            [chunk.name, *chunk.box, start, chunk.nbytes]
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True)
        ]
        table.append([names.data_path(rank, number, attempt), len(laid.layout.header), laid.layout.size, chunks])
    return table
