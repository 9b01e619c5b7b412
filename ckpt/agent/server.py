"""What the agent does for the trainers of its node: give out slots, and write what was captured in them.

What becomes of a save is for the Committer (crew.py): of one agent alone, or of several that one of them leads. The
agent ends when its trainers are gone and nothing is left to write or to be told. Knows no live state and no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ckpt.agent import peers
from ckpt.agent.aftermath import Aftermath
from ckpt.agent.arena import Arena
from ckpt.agent.crew import Committer, Crew
from ckpt.agent.following import Follower
from ckpt.agent.leading import Leader
from ckpt.agent.wire import Channel, Message
from ckpt.agent.writing import CapturedChunk, CapturedFile, write_captured
from ckpt.saving.commit import Contents, Part
from ckpt.storage.files import ALIGNMENT, Files
from ckpt_formats.errors import CheckpointError
from ckpt_formats.geometry import Box

STARTUP = 60.0
"""Seconds that the agent waits for its first trainer."""
LINGER = 0.5
"""Seconds that it stays when there is nobody and nothing left."""

log = logging.getLogger("ckpt.agent")


class Agent:
    """The agent's state, and its answers to trainers."""

    def __init__(self, home: str, files: Files | None = None, aftermath: Aftermath | None = None) -> None:
        self._home = home
        self._files = files or Files()
        self._aftermath = aftermath or Aftermath()
        self._committer: Committer = Leader(Crew("", [""]), self._files, self._aftermath)
        self._changed = threading.Condition()
        self._arenas: dict[str, Arena] = {}
        """By path; those that were outgrown stay for as long as a save lies in them."""
        self._newest: dict[int, Arena] = {}
        """By rank."""
        self._trainers: set[int] = set()
        self._watchers: set[Channel] = set()
        """Connections that are closed when no further save can be begun."""
        self._broken = False
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
            channel = Channel(connection, "a trainer")
            threading.Thread(target=self._attend, args=(channel,), name="ckpt-agent", daemon=True).start()
        self._committer.close()
        for arena in self._newest.values():
            arena.remove()

    def _finished(self) -> bool:
        now = time.monotonic()
        with self._changed:
            if self._trainers or self._writing or self._committer.busy():
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
            "lead": self._lead,
            "follow": self._follow,
            "slot": self._slot,
            "release": self._give_back,
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
                if message["op"] == "watch":
                    self._watch(channel)
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
            with self._changed:
                self._watchers.discard(channel)
                if rank is not None:
                    self._trainers.discard(rank)
            if rank is not None:
                self._committer.left(rank)

    def _watch(self, channel: Channel) -> None:
        with self._changed:
            self._watchers.add(channel)
            broken = self._broken
        if broken:
            channel.close()

    def _break(self) -> None:
        """Another agent is lost: let the trainers know, who start agents anew; what is under way goes on."""
        with self._changed:
            self._broken = True
            watchers = list(self._watchers)
        for channel in watchers:
            channel.close()

    # answers

    def _lead(self, message: Message) -> Message:
        """This agent is the one that commits, perhaps the only one."""
        crew = Crew(message["node"], message["nodes"])
        self._committer = leader = Leader(crew, self._files, self._aftermath, self._break)
        self._aftermath.joined(crew.node)
        if not crew.others:
            return {}
        port = leader.listen(bytes.fromhex(message["secret"]), loopback=message["loopback"])
        return {"port": port, "hosts": ["127.0.0.1"] if message["loopback"] else peers.own_hosts()}

    def _follow(self, message: Message) -> Message:
        """This agent is one of several, and another one commits."""
        crew = Crew(message["node"], message["nodes"])
        leader = peers.Address(**message["leader"])
        secret = bytes.fromhex(message["secret"])
        self._committer = Follower(crew, leader, secret, self._files, self._aftermath, self._break)
        self._aftermath.joined(crew.node)
        return {}

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

    def _give_back(self, message: Message) -> Message:
        """A slot was not filled."""
        self._release(self._arenas[message["arena"]], int(message["slot"]))
        return {}

    def _begin(self, message: Message) -> Message:
        """Rank 0 opens a save before any rank captures for it."""
        self._committer.begin(message)
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
        attempt, path = message["save"], message["path"]
        with self._changed:
            self._writing += 1
        try:
            self._committer.captured(attempt, rank, path, message["step"])
        except BaseException:
            self._written(arena, slot)
            raise
        writing = threading.Thread(
            target=self._write, args=(attempt, path, rank, arena, slot, files), name="ckpt-agent-write"
        )
        writing.start()
        return {}

    def _abandon(self, message: Message) -> Message:
        """A rank can't capture its part."""
        rank = int(message["rank"])
        if message.get("slot") is not None:
            self._release(self._arenas[message["arena"]], int(message["slot"]))
        self._committer.failed(message["save"], f"rank {rank}: {message['why']}", message["kind"])
        return {}

    def _wait(self, message: Message) -> Message:
        """Answer when a save is captured by all, or over, or when the time is up."""
        return self._committer.wait(message["save"], message["until"], float(message["timeout"]))

    # work

    def _write(self, attempt: str, path: str, rank: int, arena: Arena, slot: int, files: list[CapturedFile]) -> None:
        committer = self._committer
        try:
            view = arena.view(slot)
            at = 0
            written = []
            with committer.phase(attempt, rank) as phase:
                for captured in files:
                    # every file of a slot begins at a page
                    written.append(write_captured(self._files, path, captured, view[at:]))
                    at += -(-captured.size // ALIGNMENT) * ALIGNMENT
                    phase.bytes += captured.size
            part = Part(written, [[chunk.name for chunk in captured.chunks] for captured in files])
            committer.prepared(attempt, rank, part)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainers learn it
            kind = type(error).__name__ if isinstance(error, CheckpointError) else "SaveFailedError"
            with contextlib.suppress(CheckpointError):
                committer.failed(attempt, f"{path}: rank {rank}'s part could not be written: {error}", kind)
        finally:
            if committer.failing(attempt):
                # what this wrote after the save had failed
                committer.discard(attempt)
            self._written(arena, slot)

    def _written(self, arena: Arena, slot: int) -> None:
        """A slot is not needed any more."""
        self._release(arena, slot)
        with self._changed:
            self._writing -= 1

    def _release(self, arena: Arena, slot: int) -> None:
        arena.release(slot)
        self._forget_if_idle(arena)

    def _forget_if_idle(self, arena: Arena) -> None:
        """Unmap an arena that was outgrown when nothing lies in it any more."""
        with self._changed:
            if arena.idle and arena not in self._newest.values():
                self._arenas.pop(arena.path, None)


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
