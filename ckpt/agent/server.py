"""What the agent does: give out slots, write what was captured in them, and commit when every rank's part is written.

A save that every rank captured completes although all trainers die; one that a rank died before capturing fails, and
leaves nothing. The agent ends when its trainers are gone and nothing is left to write. Knows no live state and no
torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckpt.agent.aftermath import Aftermath, Committed
from ckpt.agent.arena import Arena
from ckpt.agent.wire import Channel, Message
from ckpt.agent.writing import CapturedChunk, CapturedFile, write_captured
from ckpt.events import Operation
from ckpt.saving.commit import Contents, Part, commit
from ckpt.storage.files import ALIGNMENT, Files
from ckpt.storage.publish import Folder, discard
from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError
from ckpt_formats.geometry import Box

KEPT = 256
"""Finished saves that can still be asked about."""
STARTUP = 60.0
"""Seconds that the agent waits for its first trainer."""
LINGER = 0.5
"""Seconds that it stays when there is nobody and nothing left."""

log = logging.getLogger("ckpt.agent")


@dataclass(slots=True)
class Save:
    """One save, as the agent knows it."""

    attempt: str
    world_size: int
    folder: Folder
    operation: Operation
    """What it tells of itself: the phases of all ranks, which this process works for."""
    contents: Contents | None = None
    """Rank 0 brings it."""
    captured: set[int] = field(default_factory=set)
    parts: dict[int, Part] = field(default_factory=dict)
    failing: bool = False
    """It is decided that it fails, and what it wrote is being removed."""
    error: str | None = None
    kind: str = ""
    """The error's class."""
    committed: bool = False
    bytes: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        return self.committed or self.error is not None

    def status(self) -> Message:
        return {
            "captured": len(self.captured) == self.world_size,
            "committed": self.committed,
            "error": self.error,
            "kind": self.kind,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "waits_for": sorted(set(range(self.world_size)) - self.captured),
        }


class Agent:
    """The agent's state, and its answers to trainers."""

    def __init__(self, home: str, files: Files | None = None, aftermath: Aftermath | None = None) -> None:
        self._home = home
        self._files = files or Files()
        self._aftermath = aftermath or Aftermath()
        self._changed = threading.Condition()
        self._saves: OrderedDict[str, Save] = OrderedDict()
        self._arenas: dict[str, Arena] = {}
        """By path; those that were outgrown stay for as long as a save lies in them."""
        self._newest: dict[int, Arena] = {}
        """By rank."""
        self._trainers: set[int] = set()
        self._writing = 0
        self._arena_count = 0
        self._idle_since: float | None = None
        self._started = time.monotonic()
        self._met = False

    # its life

    def serve(self, listener: socket.socket) -> None:
        """Answer trainers until they are gone and nothing is left to write."""
        listener.settimeout(LINGER / 2)
        while not self._finished():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(None)
            threading.Thread(target=self._attend, args=(Channel(connection),), name="ckpt-agent", daemon=True).start()
        for arena in self._newest.values():
            arena.remove()

    def _finished(self) -> bool:
        now = time.monotonic()
        with self._changed:
            if self._trainers or self._writing:
                self._idle_since = None
                self._aftermath.stay()
                return False
            if not self._met:
                return now - self._started > STARTUP
            self._idle_since = self._idle_since or now
            return now - self._idle_since > LINGER and self._aftermath.finished()

    def _attend(self, channel: Channel) -> None:
        """Answer one connection until it closes. A trainer's first message is `hello`; others only ask."""
        rank: int | None = None
        answers: dict[str, Callable[[Message], Message]] = {
            "slot": self._slot,
            "begin": self._begin,
            "captured": self._captured,
            "abandon": self._abandon,
            "wait": self._wait,
        }
        try:
            while (message := channel.receive()) is not None:
                if message["op"] == "hello":
                    rank = int(message["rank"])
                    with self._changed:
                        self._trainers.add(rank)
                        self._met = True
                    channel.send({"pid": os.getpid()})
                    continue
                try:
                    answer = answers[message["op"]](message)
                except (CheckpointError, OSError) as error:
                    answer = {"error": str(error), "kind": type(error).__name__}
                channel.send(answer)
        except OSError as error:
            log.debug("a connection broke: %s", error)
        finally:
            channel.close()
            if rank is not None:
                self._left(rank)

    def _left(self, rank: int) -> None:
        """A trainer is gone: what it has not captured will never be."""
        with self._changed:
            self._trainers.discard(rank)
            lost = [save for save in self._saves.values() if not save.over and rank not in save.captured]
        for save in lost:
            self._fail(save, f"rank {rank} ended before its part of the save was captured", "RankError")

    # answers

    def _slot(self, message: Message) -> Message:
        rank, nbytes = int(message["rank"]), int(message["bytes"])
        arena = self._newest.get(rank)
        if arena is None or arena.slot_bytes < nbytes:
            with self._changed:
                self._arena_count += 1
                path = os.path.join(self._home, f"arena-{rank}-{self._arena_count}")
            larger = Arena(path, nbytes, int(message["slots"]))
            with self._changed:
                self._arenas[path] = self._newest[rank] = larger
            if arena is not None:
                # unlinked, it lives until trainer and agent are done with what lies in it
                arena.remove()
                self._forget_if_idle(arena)
            arena = larger
        slot = arena.acquire(float(message["timeout"]))
        return {"arena": arena.path, "slot_bytes": arena.slot_bytes, "slot": slot}

    def _begin(self, message: Message) -> Message:
        """Rank 0 opens a save before any rank captures for it."""
        contents = message["contents"]
        save = Save(
            attempt=message["save"],
            world_size=int(message["world_size"]),
            folder=Folder(message["path"], message["made"]),
            operation=Operation("save", message["path"], step=contents["step"], world_size=int(message["world_size"])),
            contents=Contents(
                step=contents["step"],
                tensors={name: (dtype, tuple(shape), cut) for name, (dtype, shape, cut) in contents["tensors"].items()},
                aliases=contents["aliases"],
                values=contents["values"],
                entries=contents["entries"],
                layout=contents["layout"],
                provenance=contents["provenance"],
            ),
        )
        with self._changed:
            self._saves[save.attempt] = save
            over = [attempt for attempt, other in self._saves.items() if other.over]
            for attempt in over[:-KEPT]:
                del self._saves[attempt]
        return {}

    def _captured(self, message: Message) -> Message:
        """A rank's part lies in its slot; from now on it does not need the rank."""
        rank = int(message["rank"])
        arena = self._arenas[message["arena"]]
        slot = int(message["slot"])
        files = [
            CapturedFile(
                path,
                header,
                size,
                [CapturedChunk(name, Box(tuple(o), tuple(s)), start, n) for name, o, s, start, n in chunks],
            )
            for path, header, size, chunks in message["files"]
        ]
        with self._changed:
            save = self._saves[message["save"]]
            save.captured.add(rank)
            self._writing += 1
            self._changed.notify_all()
        writer = threading.Thread(target=self._write, args=(save, rank, arena, slot, files), name="ckpt-agent-write")
        writer.start()
        return {}

    def _abandon(self, message: Message) -> Message:
        """A rank can't capture its part."""
        rank = int(message["rank"])
        if message.get("slot") is not None:
            self._release(self._arenas[message["arena"]], int(message["slot"]))
        save = self._saves.get(message["save"])
        if save is not None:
            self._fail(save, f"rank {rank}: {message['why']}", message["kind"])
        return {}

    def _wait(self, message: Message) -> Message:
        """Answer when a save is captured by all, or over, or when the time is up."""
        deadline = time.monotonic() + float(message["timeout"])
        wanted = message["until"]
        with self._changed:
            save = self._saves.get(message["save"])
            if save is None:
                return {"error": "the agent knows no such save", "kind": "RankError"}
            while not (save.over or (wanted == "captured" and len(save.captured) == save.world_size)):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return save.status()

    # work

    def _write(self, save: Save, rank: int, arena: Arena, slot: int, files: list[CapturedFile]) -> None:
        try:
            view = arena.view(slot)
            at = 0
            written = []
            with save.operation.phase("write", rank=rank) as phase:
                for captured in files:
                    # every file of a slot begins at a page
                    written.append(write_captured(self._files, save.folder.path, captured, view[at:]))
                    at += -(-captured.size // ALIGNMENT) * ALIGNMENT
                    phase.bytes += captured.size
            part = Part(written, [[chunk.name for chunk in captured.chunks] for captured in files])
            with self._changed:
                save.parts[rank] = part
                complete = len(save.parts) == save.world_size and not (save.over or save.failing)
            if complete:
                self._commit(save)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainers learn it
            kind = type(error).__name__ if isinstance(error, CheckpointError) else "SaveFailedError"
            self._fail(save, f"{save.folder.path}: rank {rank}'s part could not be written: {error}", kind)
        finally:
            self._release(arena, slot)
            if save.failing:
                # what this wrote after the save had failed
                with contextlib.suppress(OSError):
                    discard(self._files, save.folder, save.attempt)
            with self._changed:
                self._writing -= 1
                self._changed.notify_all()

    def _release(self, arena: Arena, slot: int) -> None:
        arena.release(slot)
        self._forget_if_idle(arena)

    def _forget_if_idle(self, arena: Arena) -> None:
        """Unmap an arena that was outgrown when nothing lies in it any more."""
        with self._changed:
            if arena.idle and arena not in self._newest.values():
                self._arenas.pop(arena.path, None)

    def _commit(self, save: Save) -> None:
        if save.contents is None:
            raise AssertionError("a save begins with its contents")
        parts = [save.parts[rank] for rank in sorted(save.parts)]
        with save.operation.phase("commit"):
            commit(self._files, save.folder, save.attempt, save.contents, parts)
        nbytes = sum(int(file.rows.length.sum()) for part in parts for file in part.files)
        save.operation.bytes = nbytes
        save.operation.end()
        with self._changed:
            save.bytes = nbytes
            save.seconds = time.monotonic() - save.began
            save.committed = True
            step = save.contents.step
            # the index of a large save is large itself
            save.parts, save.contents = {}, None
            self._changed.notify_all()
        self._aftermath.committed(Committed(save.folder.path, step, save.attempt, leads=True))

    def _fail(self, save: Save, why: str, kind: str) -> None:
        with self._changed:
            if save.over or save.failing:
                return
            save.failing = True
        log.warning("the save to %s failed: %s", save.folder.path, why)
        with contextlib.suppress(OSError):
            discard(self._files, save.folder, save.attempt)
        kind = kind if kind in errors.__all__ else "SaveFailedError"
        save.operation.end(getattr(errors, kind)(why))
        with self._changed:
            # whoever hears of it finds nothing left behind
            save.error = why
            save.kind = kind
            self._changed.notify_all()


def describe(contents: Contents) -> dict[str, Any]:
    """What a checkpoint says beside its chunks, as JSON for `begin`."""
    return {
        "step": contents.step,
        "tensors": contents.tensors,
        "aliases": contents.aliases,
        "values": contents.values,
        "entries": contents.entries,
        "layout": contents.layout,
        "provenance": contents.provenance,
    }
