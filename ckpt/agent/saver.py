"""Saving without stopping: plan with the other ranks, capture into the arena, and let the agent write and commit.

`async_save` returns once everything that an optimizer does not own is captured; the rest is copied while the next
forward and backward pass run, and the optimizer's step waits for what is left of it by a hook that is set here. From
when every rank has captured, the save completes although all trainers die.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.util import Finalize
from typing import Literal, NamedTuple, get_args

import torch

from ckpt import collector
from ckpt.agent.client import AgentClient, Launcher, Slot, launch
from ckpt.agent.fence import Fence
from ckpt.agent.outcomes import Outcomes
from ckpt.agent.parcel import Parcel
from ckpt.agent.pending import PendingSave
from ckpt.agent.server import describe
from ckpt.agent.slots import SLOT_TIMEOUT, Slots
from ckpt.agent.wire import Message
from ckpt.agent.worker import Worker
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation
from ckpt.events.log import size_text
from ckpt.provenance import provenance
from ckpt.saving.capture import Capture
from ckpt.saving.expecting import expected_bytes
from ckpt.saving.recurring import NEW, ORIGIN, Greeting, Recurring, place_digest, signature, values_digest
from ckpt.saving.save import PLANS, Attempt, Saver
from ckpt.saving.side_copies import Pinned
from ckpt.storage.compressing import Compress, Readable, require_compress
from ckpt.storage.publish import Folder, is_committed, prepare_folder
from ckpt.storage.throttle import require_bandwidth
from ckpt_formats.digest import DIGEST_SIZE
from ckpt_formats.errors import CheckpointError, ConfigurationError

LAST = 30.0
"""Seconds that rank 0 stays, at the end, to hear what became of the last saves."""

log = logging.getLogger("ckpt")

CaptureMode = Literal["lazy", "eager"]
_Key = tuple[ProcessGroup | None, bool]
"""The ranks that save, and whether onto node-local disks."""


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
        memory: float | None = None,
    ) -> None:
        """Args:
        launcher: starts an agent on this node and returns its address.
        follow: without it, what becomes of saves is the caller's business: it is neither told nor raised at the next
            one.
        memory: bytes that this rank's captures may take; by default three times what it writes.
        """
        self._saver = saver or Saver()
        self._slots = Slots(memory)
        self._told = False
        self._follow = follow
        self._launcher = launcher
        self._begin()
        _savers.add(self)

    def _begin(self) -> None:
        """Nothing is under way yet, in this process."""
        self._client: AgentClient | None = None
        self._starting = threading.Lock()
        """One agent is enough, whichever thread saves first."""
        self._at_exit: Finalize[None] | None = None
        self._known: list[tuple[_Key, Recurring]] = []
        """What is known of the states that were saved, the last one first."""
        self._arena = ""
        """The one that the last slot was in."""
        self._worker = Worker("ckpt-capture")
        self._outcomes = Outcomes()
        self._lock = threading.Lock()
        self._captures: list[tuple[Capture, PendingSave, Operation]] = []
        """Those that may not be copied yet; an optimizer may step on any thread."""
        self._fence = Fence(self.settle)
        self._pinned = Pinned()

    def _leave_to_parent(self) -> None:
        """In a process that was forked off: agent, threads and captures are its parent's; its own saves begin anew."""
        self._fence.close()
        self._slots.forget()
        self._begin()

    def declare(self, memory: float | None) -> None:
        """Declare how many bytes this rank's captures may take, from the next one on. Raises ConfigurationError."""
        self._slots.declare(memory)

    def start(self, group: Collective, state: Mapping[str, object] | None = None) -> AgentClient:
        """Make sure that every node has an agent. Collective.

        With the state that will be saved, the memory for its captures is made in the background, so that the first save
        finds it; how much an optimizer that has not stepped will need, is guessed.
        """
        with self._starting:
            client = self._client
            if client is None:
                client = self._client = AgentClient.join(group, self._launcher, self._pinned.pin)
                self._close_at_exit()
        if state is not None:
            nbytes = 1 if self._slots.memory is not None else expected_bytes(state, group.world_size)
            self._worker.do(partial(self._slots.reserve, client, nbytes))
        return client

    def _close_at_exit(self) -> None:
        """Processes that multiprocessing has started end without atexit, where whoever makes a saver has it closed."""
        if self._at_exit is None and multiprocessing.parent_process() is not None:
            self._at_exit = Finalize(None, self.close, exitpriority=0)

    def prepared(self, timeout: float = SLOT_TIMEOUT) -> bool:
        """Wait until what `start` does in the background is done; whether it was in time."""
        done = threading.Event()
        self._worker.do(done.set)
        return done.wait(timeout)

    def prepare(self) -> CheckpointError | None:
        """Wait until the memory that `start` has made in the background is there. Returns why there can't be any."""
        if not self.prepared():
            log.warning("memory for captures is not there yet: the first save will wait for it")
        return self._slots.problem

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
            self._client = None
            self._slots.forget()
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
        bandwidth = require_bandwidth(bandwidth)
        capture = require_capture(capture)
        compress = require_compress(compress, auto=True)
        begin = time.perf_counter()
        group = Collective(process_group)
        client = self.start(group)
        attempt = Attempt(self._saver, group, path, step, "capture", client.nodes)
        operation = attempt.operation
        with collector.paused():
            try:
                begun = self._agree(client, group, attempt, process_group, state)
                client = begun.client
            except BaseException as error:
                attempt.discard()
                operation.end(error)
                raise
            pending = PendingSave(client, begun.attempt, attempt.path, attempt.step)
            form = begun.known.form
            operation.bytes = form.nbytes
            parcel = Parcel(
                client,
                begun.attempt,
                attempt.path,
                attempt.step,
                form,
                begun.open,
                compress=compress,
                bandwidth=bandwidth,
            )
            memory = self._slots.memory
            try:
                if memory is not None and form.nbytes > memory:
                    self._capture_in_pieces(client, parcel, begun, pending, operation, memory)
                else:
                    with operation.waiting("room in the arena"):
                        slot = self._slots.take(client, form.nbytes, attempt.path, self.prepared)
                    parcel.into(slot)
                    self._capture(begun, slot, parcel, pending, operation, state if capture == "lazy" else None)
            except BaseException as error:
                operation.end(error)
                try:
                    parcel.abandon(error)
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
        """Return when nothing of this process is still being copied, so that its tensors may be changed in any way."""
        with self._lock:
            captures = list(self._captures)
        for work, pending, operation in captures:
            if not work.copied:
                begin = time.perf_counter()
                with operation.waiting("the lazy capture"):
                    work.settle(SLOT_TIMEOUT)
                pending.blocked += time.perf_counter() - begin
        self._forget_copied()

    def _forget_copied(self) -> None:
        with self._lock:
            self._captures = [capture for capture in self._captures if not capture[0].copied]

    @property
    def agent(self) -> AgentClient | None:
        """The agent of this node; another one after the first was lost."""
        return self._client

    def close(self) -> None:
        """Leave the agent, which writes what is left and ends. Rank 0 first hears what becomes of it, if that does not
        take too long.
        """
        self._worker.close(SLOT_TIMEOUT)
        self._fence.close()
        for late in self._outcomes.close(LAST):
            log.warning("%s: not committed after %.0f s; the agent goes on with it", late.path, LAST)
        if self._client is not None:
            self._client.close()
            self._client = None
            self._slots.forget()
        self._pinned.release()
        self._known = []
        if self._at_exit is not None:
            self._at_exit.cancel()
            self._at_exit = None

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

    def _capture(
        self,
        begun: _Begun,
        slot: Slot,
        parcel: Parcel,
        pending: PendingSave,
        operation: Operation,
        lazily: Mapping[str, object] | None,
    ) -> None:
        """Capture into a slot, all of it or, of the state `lazily`, what no optimizer owns; the rest on the worker's
        thread.
        """
        if slot.arena != self._arena:
            # what refers to the memory of an arena that was outgrown keeps all of it
            for _, known in self._known:
                known.form.forget_rooms()
            self._arena = slot.arena
        form = begun.known.form
        with operation.phase("capture") as phase:
            phase.bytes = form.nbytes
            rooms = form.rooms(slot.view, slot.arena, slot.start)
            work = Capture(form, begun.sources, slot.view, rooms, operation.phase("lazy capture"))
            work.begin(_nothing if lazily is None else self._fence.around(lazily, pending))
        self._forget_copied()
        with self._lock:
            self._captures.append((work, pending, operation))
        finish = partial(self._finish, begun.client, form.nbytes, work, parcel, pending, operation)
        try:
            self._worker.do(finish)
        except BaseException as error:
            work.stop(error, SLOT_TIMEOUT)
            raise

    def _finish(
        self,
        client: AgentClient,
        nbytes: int,
        work: Capture,
        parcel: Parcel,
        pending: PendingSave,
        operation: Operation,
    ) -> None:
        """Copy the rest and hand it to the agent; on the worker's thread."""
        failed: Exception | None = None
        try:
            work.finish(parcel.ready, SLOT_TIMEOUT)
            parcel.end()
        except Exception as error:  # noqa: BLE001 - it is told to whoever waits
            failed = error
        try:
            if failed is not None:
                work.stop(failed, SLOT_TIMEOUT)
                parcel.abandon(failed)
        except CheckpointError as lost:
            log.warning("%s: %s", pending.path, lost)
        finally:
            operation.end(failed)
            pending.handed.set()
        # neither shall live on in what waits here for the next save
        del work, parcel
        self._slots.take_ahead(client, nbytes)

    def _capture_in_pieces(
        self,
        client: AgentClient,
        parcel: Parcel,
        begun: _Begun,
        pending: PendingSave,
        operation: Operation,
        memory: int,
    ) -> None:
        """Capture a state that is larger than the memory for captures; the training waits until its last piece is in
        that memory.
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
        parcel.open()
        self._slots.give_back(client)

        def take(nbytes: int) -> Slot:
            with operation.waiting("room in the arena"):
                return self._slots.take(client, nbytes, pending.path, self.prepared, said=False)

        with operation.phase("capture") as phase:
            phase.bytes = form.nbytes
            parcel.send_in_pieces(begun.sources, memory, take)
        operation.end()
        pending.handed.set()


def require_capture(capture: CaptureMode) -> CaptureMode:
    """How to capture. Raises ConfigurationError for what is no way to."""
    if capture not in get_args(CaptureMode):
        raise ConfigurationError(f'capture={capture!r}: give "lazy" or "eager"')
    return capture


_savers: weakref.WeakSet[AsyncSaver] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for saver in list(_savers):
        saver._leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


class _Begun(NamedTuple):
    """A save that all ranks have agreed on."""

    client: AgentClient
    attempt: str
    known: Recurring
    sources: Sequence[Readable]
    open: Callable[[], None] | None
    """Opens it at the agent, where this is rank 0 and that was not done yet."""


def _nothing(_: torch.Tensor) -> bool:
    """What may be copied lazily when all is copied eagerly."""
    return False
