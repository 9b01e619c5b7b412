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
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch

from ckpt import collector
from ckpt.agent.arena import PAGE
from ckpt.agent.client import AgentClient, Compress, Launcher, Slot, launch
from ckpt.agent.fence import Fence
from ckpt.agent.outcomes import Outcomes
from ckpt.agent.server import describe
from ckpt.agent.wire import Message, failure
from ckpt.agent.worker import Worker
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation
from ckpt.events.log import seconds_text, size_text
from ckpt.events.relay import relay
from ckpt.provenance import provenance
from ckpt.saving.capture import Capture, Laid, fill
from ckpt.saving.expecting import expected_bytes
from ckpt.saving.recurring import NEW, ORIGIN, Greeting, Recurring, place_digest, signature, values_digest
from ckpt.saving.save import PLANS, Attempt, Saver, SaveResult
from ckpt.saving.side_copies import Pinned
from ckpt.storage.compressing import Readable
from ckpt.storage.publish import Folder, is_committed, prepare_folder
from ckpt_formats.digest import DIGEST_SIZE
from ckpt_formats.errors import CheckpointError, ConfigurationError, RankError, SaveFailedError
from ckpt_formats.native import names
from ckpt_formats.native.reader import read_root

SLOT_TIMEOUT = 600.0
"""Seconds that a save waits for an earlier one to be written before it fails."""
LAST = 30.0
"""Seconds that rank 0 stays, at the end, to hear what became of the last saves."""
LEAST = 1 << 20
"""Bytes of the least memory for captures that can be declared."""
PIECES = 4
"""Into so many pieces memory is divided for a state that is larger: some are filled while others are written."""
SAID = 1.0
"""Seconds of waiting after which it is said that a save waits."""

log = logging.getLogger("ckpt")

CaptureMode = Literal["lazy", "eager"]
_Key = tuple[ProcessGroup | None, bool]
"""The ranks that save, and whether onto node-local disks."""


class PendingSave:
    """A save under way: what to wait for, and what became of it.

    Attributes:
        path: the checkpoint's folder.
        step: the training step it is of.
        attempt: the id of the attempt.
        handed: set when this rank's part was handed to the agent, or given up.
        phases: seconds of this rank in each phase of the call.
        blocked: seconds for which the call that began it did not return, and for which an optimizer had to wait for the
            rest of the capture.
        trusted: whether somebody has waited until it was captured, and may have changed the state since.
    """

    def __init__(self, client: AgentClient, attempt: str, path: str, step: int | None) -> None:
        self.attempt = attempt
        self.path = path
        self.step = step
        self.blocked = 0.0
        self.trusted = False
        self.phases: Mapping[str, float] = {}
        self.handed = threading.Event()
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
        if not self.handed.is_set():
            return False
        try:
            self._ask("committed", 0.0)
        except CheckpointError:
            return True
        return self._end is not None

    def _status(self, until: str, timeout: float) -> Message:
        begin = time.monotonic()
        if not self.handed.wait(timeout):
            raise SaveFailedError(f"{self.path}: this rank did not capture its part within {timeout} s", path=self.path)
        status = self._ask(until, max(0.0, timeout - (time.monotonic() - begin)))
        if not status[until]:
            captures, writes = status["waits_for"], status["writes"]
            waits = (
                f"ranks that have not captured yet: {', '.join(captures)}"
                if captures
                else f"ranks whose part is still being written: {', '.join(writes)}"
                if writes
                else "it is being committed"
            )
            raise SaveFailedError(f"{self.path}: not {until} within {timeout} s; {waits}", path=self.path)
        self.trusted = True
        return status

    def follow(self) -> None:
        """Wait until it is over, however long that takes. Raises as `captured`."""
        self.handed.wait()
        while self._end is None:
            self._ask("committed", SLOT_TIMEOUT)

    def known_end(self) -> bool:
        """Whether it is known here that it is over. Never waits."""
        return self._end is not None

    def known_failure(self) -> CheckpointError | None:
        """Why it failed, if it did and that is known here. Never waits."""
        end = self._end
        return failure(end) if end is not None and end.get("error") else None

    def _ask(self, until: str, timeout: float) -> Message:
        with self._lock:
            status = self._end
        if status is None:
            try:
                status = self._client.wait(self.attempt, until, timeout)
            except RankError as lost:
                status = self._without_agent(lost)
            if status.get("error") and self.path not in status["error"]:
                # of a save that the agent has never heard of it knows no path
                status = {**status, "error": f"{self.path}: {status['error']}"}
            if status.get("error") or status.get("committed"):
                with self._lock:
                    first, self._end = self._end is None, status
                if first and self._client.rank == 0:
                    if self._client.pid != os.getpid():
                        relay(status.get("events", ()))
                    if status.get("committed"):
                        log.info("%s", self._summary(status))
        if status.get("error"):
            raise failure(status)
        return status

    def _without_agent(self, lost: RankError) -> Message:
        """The end of a save whose agent is gone: the disk says whether it was committed."""
        committed: Message = {"captured": True, "committed": True, "bytes": 0, "seconds": 0.0}
        try:
            root = read_root(self.path)
        except (CheckpointError, OSError):
            root = None
        if root is None or root.attempt != self.attempt:
            return {"error": f"{self.path}: {lost}", "kind": "RankError"}
        return committed | {"bytes": sum(file.size for file in root.files)}

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

    def __init__(
        self,
        saver: Saver | None = None,
        *,
        launcher: Launcher = launch,
        follow: bool = True,
        memory: int | None = None,
    ) -> None:
        """Args:
        launcher: starts an agent on this node and returns its address.
        follow: without it, what becomes of saves is the caller's business: it is neither told nor raised at the next
            one.
        memory: bytes that this rank's captures may take; by default three times what it writes.
        """
        self._saver = saver or Saver()
        self._memory: int | None = None
        self.declare(memory)
        self._told = False
        self._follow = follow
        self._launcher = launcher
        self._client: AgentClient | None = None
        self._known: list[tuple[_Key, Recurring]] = []
        """What is known of the states that were saved, the last one first."""
        self._spare: Slot | None = None
        """A slot for the next save, so that it need not ask."""
        self._worker = Worker("ckpt-capture")
        self._outcomes = Outcomes()
        self._captures: list[tuple[Capture, PendingSave, Operation]] = []
        self._fence = Fence(self.settle)
        self._pinned = Pinned()

    def declare(self, memory: int | None) -> None:
        """Declare how many bytes this rank's captures may take, from the next one on. Raises ConfigurationError."""
        if memory is not None and memory < LEAST:
            raise ConfigurationError(
                f"memory={memory} is too little for captures, whose pieces are a few pages long; give {LEAST} or more"
            )
        self._memory = None if memory is None else memory // PAGE * PAGE

    def start(self, group: Collective, state: Mapping[str, object] | None = None) -> AgentClient:
        """Make sure that every node has an agent. Collective.

        With the state that will be saved, the memory for its captures is made in the background, so that the first save
        finds it; how much an optimizer that has not stepped will need, is guessed.
        """
        if self._client is None:
            self._client = AgentClient.join(group, self._launcher, self._pinned.pin)
        if state is not None:
            nbytes = 1 if self._memory is not None else expected_bytes(state, group.world_size)
            self._worker.do(partial(self._reserve, self._client, nbytes))
        return self._client

    def prepared(self, timeout: float = SLOT_TIMEOUT) -> bool:
        """Wait until what `start` does in the background is done; whether it was in time."""
        done = threading.Event()
        self._worker.do(done.set)
        return done.wait(timeout)

    def _reserve(self, client: AgentClient, nbytes: int) -> None:
        try:
            client.reserve(nbytes, self._memory)
            if self._spare is None and self._memory is None:
                self._spare = client.slot(nbytes, None, 0.0)
        except CheckpointError as error:
            # the first save will say so
            log.debug("memory for captures could not be made ahead: %s", error)

    def _start_anew(self, group: Collective) -> AgentClient:
        """Some agent is lost: start new ones on all nodes; the old ones end when they have written what they can.
        Collective.
        """
        if group.rank == 0:
            log.warning("an agent was lost, so new ones are started; what is not committed yet may fail")
        if self._client is not None:
            # what is captured is still handed to the old ones
            self._worker.close(SLOT_TIMEOUT)
            self._client.close()
            self._client = self._spare = None
        return self.start(group)

    def save(
        self,
        state: Mapping[str, object],
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        process_group: ProcessGroup | None = None,
        capture: CaptureMode = "lazy",
        compress: Compress = False,
        bandwidth: float | None = None,
    ) -> PendingSave:
        """See ckpt.async_save."""
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigurationError(
                f"bandwidth={bandwidth} is no number of bytes per second; give more than 0, or None"
            )
        begin = time.perf_counter()
        group = Collective(process_group)
        client = self.start(group)
        attempt = Attempt(self._saver, group, path, step, "capture", client.nodes)
        operation = attempt.operation
        with collector.paused():
            slot: Slot | None = None
            try:
                begun = self._agree(client, group, attempt, process_group, state)
                begun = begun._replace(compress=compress, bandwidth=bandwidth)
                client = begun.client
            except BaseException as error:
                attempt.discard()
                operation.end(error)
                raise
            pending = PendingSave(client, begun.attempt, attempt.path, attempt.step)
            form = begun.known.form
            operation.bytes = form.nbytes
            try:
                if self._memory is not None and form.nbytes > self._memory:
                    self._capture_in_pieces(client, begun, pending, operation, self._memory)
                else:
                    with operation.waiting("room in the arena"):
                        slot = self._slot(client, form.nbytes, attempt.path)
                    with operation.phase("capture") as phase:
                        phase.bytes = form.nbytes
                        rooms = form.rooms(slot.view, slot.arena, slot.start)
                        work = Capture(form, begun.sources, slot.view, rooms, operation.phase("lazy capture"))
                        work.begin(self._fence.around(state, pending) if capture == "lazy" else _nothing)
                    self._captures = [earlier for earlier in self._captures if not earlier[0].copied]
                    self._captures.append((work, pending, operation))
                    self._worker.do(partial(self._finish, begun, work, slot, pending, operation))
            except BaseException as error:
                operation.end(error)
                _open(begun)
                try:
                    client.abandon(begun.attempt, slot, error)
                except CheckpointError:
                    # the agent, which would have, is gone
                    attempt.discard()
                raise
        if group.rank == 0 and self._follow:
            self._outcomes.add(pending)
        pending.phases = operation.seconds
        pending.blocked = time.perf_counter() - begin
        return pending

    def settle(self) -> None:
        """Wait until nothing of this process is still being copied, so that its tensors may be changed in any way."""
        for work, pending, operation in self._captures:
            if not work.copied:
                begin = time.perf_counter()
                with operation.waiting("the lazy capture"):
                    work.settle(SLOT_TIMEOUT)
                pending.blocked += time.perf_counter() - begin
        self._captures = []

    @property
    def agent(self) -> AgentClient | None:
        """The agent of this node; another one after the first was lost."""
        return self._client

    def close(self) -> None:
        """Leave the agent, which writes what is left and ends. Rank 0 first hears what becomes of it, if that does not
        take too long.
        """
        self._worker.close(SLOT_TIMEOUT)
        for late in self._outcomes.close(LAST):
            log.warning("%s: not committed after %.0f s; the agent goes on with it", late.path, LAST)
        if self._client is not None:
            self._client.close()
            self._client = self._spare = None
        self._pinned.release()
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
        unannounced = self._fence.problem()
        problem = self._outcomes.failure() or unannounced
        alive = client.alive()
        known: Recurring | None = None
        of = (process_group, attempt.node_local)
        with attempt.operation.phase("plan"):
            free = group.rank > 0 or not is_committed(attempt.path)
            if taken is not None and problem is None and alive and free:
                marks = signature(taken)
                known = next((known for key, known in self._known if key == of and known.fits(marks)), None)
            greeting = Greeting(
                origin=NEW if known is None else known.origin,
                attempt=secrets.token_bytes(ORIGIN),
                place=place_digest(attempt.given, attempt.step),
                values=bytes(DIGEST_SIZE) if taken is None else values_digest(taken),
            )
            greetings = [Greeting.decode(data) for data in group.share(b"".join(greeting))]
            if taken is not None and known is not None and known.agreed(greetings, taken):
                number = greetings[0].attempt.hex()
                self._remember(of, known)
                open_save = None
                if known.contents is not None:
                    # a copy: the next save has other values, perhaps before this one is opened
                    open_save = partial(self._open, client, number, attempt, dict(known.contents))
                return _Begun(client, number, known, known.sources(taken), open_save)
        planned = attempt.plan(problem, question=not alive)
        if taken is None:
            raise AssertionError("a rank that could not take its state apart has failed")
        if planned.answer:
            client = self._start_anew(group)
        contents: Message | None = None
        unopened: Exception | None = planned.failure
        try:
            if planned.plan is not None and attempt.folder is not None:  # on rank 0
                contents = describe(attempt.contents(planned.plan))
                client.begin(planned.attempt, attempt.folder, group.world_size, contents, node_local=attempt.node_local)
            known = Recurring(taken, planned, greetings, contents)
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            unopened = unopened or error
        try:
            # no rank may hand over its part before rank 0 has opened the save
            group.agree(unopened)
        except BaseException as error:
            try:
                client.abandon(planned.attempt, None, error)
            except CheckpointError:
                attempt.discard()
            raise
        if known is None:
            raise AssertionError("a rank that could not open its part of the save has failed")
        self._remember(of, known)
        return _Begun(client, planned.attempt, known, known.sources(taken), None)

    def _remember(self, of: _Key, known: Recurring) -> None:
        others = [(key, other) for key, other in self._known if other is not known]
        self._known = [(of, known), *others[: PLANS - 1]]

    def _open(self, client: AgentClient, number: str, attempt: Attempt, contents: Message) -> None:
        """Make the folder and open the save: on rank 0, in the background."""
        layout = {**contents["layout"], **attempt.places()}
        contents = {**contents, "step": attempt.step, "layout": layout, "provenance": provenance()}
        folder = Folder(attempt.path, ())
        try:
            folder = prepare_folder(self._saver.files, attempt.path)
        finally:
            world_size = int(layout["world_size"])
            client.begin(number, folder, world_size, contents, node_local=attempt.node_local)

    def _finish(self, begun: _Begun, work: Capture, slot: Slot, pending: PendingSave, operation: Operation) -> None:
        """Copy the rest and hand the slot to the agent; on the worker's thread."""
        client, form = begun.client, begun.known.form
        failed: BaseException | None = None
        try:
            work.finish()
        except Exception as error:  # noqa: BLE001 - it is told to whoever waits
            failed = error
        unopened = _open(begun)
        failed = failed or unopened
        try:
            if failed is None:
                table = _table(form.files, begun.attempt, client.rank)
                client.captured(
                    begun.attempt,
                    slot,
                    form.nbytes,
                    table,
                    pending.path,
                    pending.step,
                    compress=begun.compress,
                    bandwidth=begun.bandwidth,
                )
            else:
                client.abandon(begun.attempt, slot, failed)
        except CheckpointError as lost:
            log.warning("%s: %s", pending.path, lost)
        operation.end(failed)
        pending.handed.set()
        if self._spare is None:
            with contextlib.suppress(CheckpointError):
                self._spare = client.slot(form.nbytes, self._memory, 0.0)

    def _capture_in_pieces(
        self, client: AgentClient, begun: _Begun, pending: PendingSave, operation: Operation, memory: int
    ) -> None:
        """Capture a state that is larger than the memory for captures: each piece is written before its memory can take
        another one, and the training waits for all that.
        """
        form = begun.known.form
        if not self._told:
            self._told = True
            log.warning(
                "%s: %s are larger than the memory for captures, %s: they go through in pieces, and the training waits "
                "for the disk; declare more with memory=…",
                pending.path,
                size_text(form.nbytes),
                size_text(memory),
            )
        failed = _open(begun)
        if failed is not None:
            raise failed
        # it is too small for pieces, or they for it
        spare, self._spare = self._spare, None
        if spare is not None:
            client.release(spare)
        size = memory // PIECES // PAGE * PAGE
        table = _table(form.files, begun.attempt, client.rank)
        sources = iter(begun.sources)
        with operation.phase("capture") as phase:
            phase.bytes = form.nbytes
            for laid, row in zip(form.files, table, strict=True):
                own = list(islice(sources, len(laid.chunks)))
                for at in range(0, laid.layout.size, size):
                    nbytes = min(size, laid.layout.size - at)
                    with operation.waiting("room in the arena"):
                        slot = self._slot(client, nbytes, pending.path, said=False)
                    fill(laid, own, at, slot.view[:nbytes])
                    more = laid is not form.files[-1] or at + nbytes < laid.layout.size
                    client.captured(
                        begun.attempt,
                        slot,
                        nbytes,
                        [] if at else [row],
                        pending.path,
                        pending.step,
                        more=more,
                        bandwidth=begun.bandwidth,
                    )
        operation.end()
        pending.handed.set()

    def _slot(self, client: AgentClient, nbytes: int, folder: str, *, said: bool = True) -> Slot:
        """Memory for a capture; waits for it if it must, and unless it is told otherwise, says so."""
        slot = self._use_spare(client, nbytes) or client.slot(nbytes, self._memory, 0.0)
        if slot is None:
            # what is captured, but not handed to the agent yet, would never be written while this waits
            self.prepared()
            # nor would a slot that was taken for this save meanwhile come free
            slot = self._use_spare(client, nbytes) or client.slot(nbytes, self._memory, SAID)
        if slot is None:
            begin = time.monotonic()
            if said:
                log.warning("%s: waits for earlier saves to be written: the arena is full", folder)
            slot = client.slot(nbytes, self._memory, SLOT_TIMEOUT)
            if slot is None:
                raise SaveFailedError(
                    f"{folder}: earlier saves were not written within {SLOT_TIMEOUT:.0f} s, so there is no room to "
                    "capture this one; save less often, or to faster storage",
                    path=folder,
                )
            if said:
                log.warning("%s: waited %.1f s for the arena", folder, time.monotonic() - begin)
        return slot

    def _use_spare(self, client: AgentClient, nbytes: int) -> Slot | None:
        """The slot that was taken ahead, if it is large enough; else it is given back."""
        slot, self._spare = self._spare, None
        if slot is not None and len(slot.view) < nbytes:
            client.release(slot)
            slot = None
        return slot


class _Begun(NamedTuple):
    """A save that all ranks have agreed on."""

    client: AgentClient
    attempt: str
    known: Recurring
    sources: Sequence[Readable]
    open: Callable[[], None] | None
    """Opens it at the agent, where this is rank 0 and that was not done yet."""
    compress: Compress = False
    bandwidth: float | None = None


def _open(begun: _Begun) -> BaseException | None:
    """Open a save that is not open yet. Returns why that failed, if it did."""
    if begun.open is not None:
        try:
            begun.open()
        except Exception as error:  # noqa: BLE001 - it is told to whoever waits
            return error
    return None


def _nothing(_: torch.Tensor) -> bool:
    """What may be copied lazily when all is copied eagerly."""
    return False


def _table(files: Sequence[Laid], attempt: str, rank: int) -> list[Any]:
    """What lies in a slot, for the agent."""
    table = []
    for number, laid in enumerate(files):
        chunks = [
            [chunk.name, *chunk.box, start, chunk.nbytes, chunk.dtype.name, chunk.shape]
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True)
        ]
        table.append([names.data_path(rank, number, attempt), len(laid.layout.header), laid.layout.size, chunks])
    return table
