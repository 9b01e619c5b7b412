"""The handle of a save under way: what to wait for, and what became of it. Knows the agent, and no live state."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping

from ckpt.agent.client import AgentClient
from ckpt.agent.wire import Message, failure
from ckpt.events.log import seconds_text, size_text
from ckpt.events.relay import relay
from ckpt.saving.save import SaveResult
from ckpt_formats.errors import CheckpointError, RankError, SaveFailedError
from ckpt_formats.native.reader import read_root

PATIENCE = 600.0
"""Seconds that a handle waits for what it is asked to wait for, unless it is told otherwise."""

log = logging.getLogger("ckpt")


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

    def captured(self, timeout: float = PATIENCE) -> None:
        """Wait until every rank has captured its part: from now on the state may be changed in any way, and the save
        completes although trainers die.

        Raises:
            CheckpointError: the save failed, or was not captured within `timeout` seconds; names the ranks waited for.
        """
        self._status("captured", timeout)

    def committed(self, timeout: float = PATIENCE) -> None:
        """Wait until the checkpoint is on stable storage and will be found by the next start. Raises as `captured`."""
        self._status("committed", timeout)

    durable = committed

    def wait(self, timeout: float = PATIENCE) -> SaveResult:
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
            self._ask("committed", PATIENCE)

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
