"""Saving without stopping: plan with the other ranks, capture into the arena, and let the agent write and commit.

`async_save` returns once everything that an optimizer does not own is captured; the rest is copied while the next
forward and backward pass run, and the optimizer's step waits for what is left of it by a hook that is set here. From
when every rank has captured, the save completes although all trainers die.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from ckpt import collector
from ckpt.agent.client import AgentClient, Launcher, Slot, launch
from ckpt.agent.outcomes import Outcomes
from ckpt.agent.server import describe
from ckpt.agent.wire import Message, failure
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation
from ckpt.events.log import seconds_text, size_text
from ckpt.saving.capture import Capture, Laid, lay_files
from ckpt.saving.save import Attempt, Saver, SaveResult
from ckpt.state.dtensor import local_tensor
from ckpt.state.entries import entries_of
from ckpt_formats.errors import CheckpointError, RankError, SaveFailedError
from ckpt_formats.native import names
from ckpt_formats.native.reader import read_root

SLOT_TIMEOUT = 600.0
"""Seconds that a save waits for an earlier one to be written before it fails."""
LAST = 30.0
"""Seconds that rank 0 stays, at the end, to hear what became of the last saves."""
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
    """

    def __init__(self, client: AgentClient, attempt: str, path: str, step: int | None) -> None:
        self.attempt = attempt
        self.path = path
        self.step = step
        self.blocked = 0.0
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
            if status.get("error") or status.get("committed"):
                with self._lock:
                    first, self._end = self._end is None, status
                if first and self._client.rank == 0 and status.get("committed"):
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

    def __init__(self, saver: Saver | None = None, *, launcher: Launcher = launch, follow: bool = True) -> None:
        """`launcher` starts an agent on this node and returns its address. Without `follow`, what becomes of saves is
        the caller's business: it is neither told nor raised at the next one.
        """
        self._saver = saver or Saver()
        self._follow = follow
        self._launcher = launcher
        self._client: AgentClient | None = None
        self._outcomes = Outcomes()
        self._fenced: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._captures: list[tuple[Capture, Operation]] = []

    def start(self, group: Collective) -> AgentClient:
        """Make sure that every node has an agent. Collective."""
        if self._client is None:
            self._client = AgentClient.join(group, self._launcher)
        return self._client

    def _start_anew(self, group: Collective) -> AgentClient:
        """Some agent is lost: start new ones on all nodes; the old ones end when they have written what they can.
        Collective.
        """
        if group.rank == 0:
            log.warning("an agent was lost, so new ones are started; what is not committed yet may fail")
        if self._client is not None:
            # what is captured is still handed to the old ones
            self.settle()
            self._client.close()
            self._client = None
        return self.start(group)

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
        attempt = Attempt(self._saver, group, path, step, "capture", client.nodes)
        operation = attempt.operation
        with collector.paused():
            slot: Slot | None = None
            try:
                attempt.take(state)
                planned = attempt.plan(self._outcomes.failure(), question=not client.alive())
                if planned.answer:
                    client = self._start_anew(group)
            except BaseException as error:
                attempt.discard()
                operation.end(error)
                raise
            try:
                problem: Exception | None = planned.failure
                if planned.plan is not None and attempt.folder is not None:  # on rank 0
                    try:
                        contents = describe(attempt.contents(planned.plan))
                        client.begin(
                            planned.attempt,
                            attempt.folder,
                            group.world_size,
                            contents,
                            node_local=attempt.node_local,
                        )
                    except CheckpointError as error:
                        problem = problem or error
                # no rank may hand over its part before rank 0 has opened the save
                group.agree(problem)
                files, nbytes = lay_files(planned.chunks, planned.layouts())
                with operation.waiting("room in the arena"):
                    slot = self._slot(client, nbytes, attempt.path)
                owned = self._fence(state) if capture == "lazy" else frozenset()
                pending = PendingSave(client, planned.attempt, attempt.path, attempt.step)
                with operation.phase("capture") as phase:
                    phase.bytes = operation.bytes = nbytes
                    self._capture(client, files, slot, pending, owned, operation)
            except BaseException as error:
                operation.end(error)
                try:
                    client.abandon(planned.attempt, slot, error)
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
        self._before_step()

    @property
    def agent(self) -> AgentClient | None:
        """The agent of this node; another one after the first was lost."""
        return self._client

    def close(self) -> None:
        """Leave the agent, which writes what is left and ends. Rank 0 first hears what becomes of it, if that does not
        take too long.
        """
        self.settle()
        for late in self._outcomes.close(LAST):
            log.warning("%s: not committed after %.0f s; the agent goes on with it", late.path, LAST)
        if self._client is not None:
            self._client.close()
            self._client = None

    def _capture(
        self,
        client: AgentClient,
        files: list[Laid],
        slot: Slot,
        pending: PendingSave,
        owned: frozenset[int],
        operation: Operation,
    ) -> None:
        """Begin to copy into the slot; whoever ends it hands the slot to the agent."""
        attempt = pending.attempt
        capture = Capture(
            files,
            slot.view,
            lambda tensor: tensor.untyped_storage().data_ptr() in owned,
            operation.phase("lazy capture"),
        )
        table = _table(files, attempt, client.rank)

        def then(error: BaseException | None) -> None:
            try:
                if error is None:
                    client.captured(attempt, slot, table, pending.path, pending.step)
                else:
                    client.abandon(attempt, slot, error)
            except CheckpointError as lost:
                log.warning("%s: %s", pending.path, lost)
            finally:
                operation.end(error)
                pending.handed.set()

        self._captures = [earlier for earlier in self._captures if not earlier[0].copied]
        self._captures.append((capture, operation))
        capture.start(then)

    def _slot(self, client: AgentClient, nbytes: int, folder: str) -> Slot:
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

    def _fence(self, state: Mapping[str, object]) -> frozenset[int]:
        """Make the optimizers wait for captures before they step; returns the addresses of the storages that they
        own.
        """
        owned: set[int] = set()
        for entry in entries_of(state):
            optimizer = entry.value
            if entry.kind != "optimizer" or not isinstance(optimizer, torch.optim.Optimizer):
                continue
            if optimizer not in self._fenced:
                self._fenced.add(optimizer)
                optimizer.register_step_pre_hook(self._before_step)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owned.add(_address(parameter))
                    slots = optimizer.state.get(parameter)
                    for value in (slots or {}).values():
                        if isinstance(value, torch.Tensor):
                            owned.add(_address(value))
        return frozenset(owned)

    def _before_step(self, *_: object) -> None:
        for capture, operation in self._captures:
            if not capture.copied:
                with operation.waiting("the lazy capture"):
                    capture.wait(SLOT_TIMEOUT)
        self._captures = []


def _address(tensor: torch.Tensor) -> int:
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage().data_ptr())


def _table(files: list[Laid], attempt: str, rank: int) -> list[Any]:
    """What lies in a slot, for the agent."""
    table = []
    for number, laid in enumerate(files):
        chunks = [
            [chunk.name, *chunk.box, start, chunk.nbytes]
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True)
        ]
        table.append([names.data_path(rank, number, attempt), len(laid.layout.header), laid.layout.size, chunks])
    return table
