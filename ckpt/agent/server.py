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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ckpt import network
from ckpt.agent import peers
from ckpt.agent.aftermath import Aftermath
from ckpt.agent.arena import Arena, pages
from ckpt.agent.crew import Committer, Crew
from ckpt.agent.following import Follower
from ckpt.agent.leading import Leader
from ckpt.agent.parts import Output, PartWriter, Piece
from ckpt.agent.wire import Channel, Message
from ckpt.agent.writing import CapturedChunk, CapturedFile
from ckpt.saving.commit import Contents
from ckpt.storage.files import Files
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.geometry import Box

CAPTURES = 3
"""Captures of a rank that there is room for, unless it is declared: one is filled, one is written, one is spare."""
FEWEST = 2
"""How many of them must fit before a larger arena is made for a state that has grown."""
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
        self._tight: set[int] = set()
        """Ranks whose newest arena is smaller than it should be, for want of room."""
        self._making: dict[int, Future[None]] = {}
        """By rank: done when the arena that is being made for it is there, or can't be had."""
        self._trainers: set[int] = set()
        self._watchers: set[Channel] = set()
        """Connections that are closed when no further save can be begun."""
        self._broken = False
        self._parts: dict[tuple[str, int], PartWriter] = {}
        """By attempt and rank, of those of which more pieces may come."""
        self._output = Output(self._files)
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
            "reserve": self._reserve,
            "release": self._give_back,
            "piece": self._piece,
            "begin": self._begin,
            "captured": self._captured,
            "abandon": self._abandon,
            "wait": self._wait,
            "aftermath": lambda _: {"aftermath": self._aftermath.status()},
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
                except Exception as error:
                    log.exception("a request failed: %s", message["op"])
                    why = f"the agent could not do {message['op']!r}: {type(error).__name__}: {error}"
                    answer = {"error": why, "kind": "SaveFailedError"}
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
                with self._changed:
                    theirs = {key for key in self._parts if key[1] == rank}
                self._stop(theirs)

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
        return {"port": port, "hosts": ["127.0.0.1"] if message["loopback"] else network.own_hosts()}

    def _follow(self, message: Message) -> Message:
        """This agent is one of several, and another one commits."""
        crew = Crew(message["node"], message["nodes"])
        leader = peers.Address(**message["leader"])
        secret = bytes.fromhex(message["secret"])
        self._committer = Follower(crew, leader, secret, self._files, self._aftermath, self._break)
        self._aftermath.joined(crew.node)
        return {}

    def _slot(self, message: Message) -> Message:
        arena = self._arena(message)
        if arena is None:
            return {"making": True}
        slot = arena.acquire(int(message["bytes"]), float(message["timeout"]))
        return {"arena": arena.path, "slot": slot}

    def _reserve(self, message: Message) -> Message:
        """Make an arena before it is needed."""
        arena = self._arena(message)
        return {"making": True} if arena is None else {"arena": arena.path}

    def _arena(self, message: Message) -> Arena | None:
        """A rank's arena: as large as was declared, or large enough for several captures.

        None while it is still being made: that may take minutes, and whoever asks must hear meanwhile that this agent
        is alive.
        """
        rank, nbytes, memory = int(message["rank"]), int(message["bytes"]), message["memory"]
        while True:
            with self._changed:
                making = self._making.get(rank)
                if making is None:
                    arena = self._newest.get(rank)
                    if arena is not None and (
                        arena.size >= (1 if rank in self._tight else FEWEST) * pages(nbytes)
                        if memory is None
                        else arena.size == memory
                    ):
                        return arena
                    making = self._making[rank] = Future()
                    # where there is less room than that, saves wait for each other
                    sizes = [n * pages(nbytes) for n in range(CAPTURES, 0, -1)] if memory is None else [memory]
                    make = threading.Thread(
                        target=self._make, args=(rank, sizes, making), name="ckpt-arena", daemon=True
                    )
                    make.start()
            try:
                making.result(float(message["patience"]))
            except TimeoutError:
                return None

    def _make(self, rank: int, sizes: Sequence[int], making: Future[None]) -> None:
        """Make an arena, the rank's only one from now on, as large as the first of these sizes for which there is room;
        on a thread of its own.
        """
        with self._changed:
            self._arena_count += 1
            path = os.path.join(self._home, f"arena-{rank}-{self._arena_count}")
            outgrown = self._newest.get(rank)
        failed: BaseException | None = None
        try:
            made = _largest(path, sizes)
            with self._changed:
                self._arenas[path] = self._newest[rank] = made
                (self._tight.discard if made.size >= sizes[0] else self._tight.add)(rank)
            if outgrown is not None:
                # unlinked, it lives until trainer and agent are done with what lies in it
                outgrown.remove()
                self._forget_if_idle(outgrown)
        except BaseException as error:  # noqa: BLE001 - it is told to whoever asked for the arena
            failed = error
        with self._changed:
            del self._making[rank]
        if failed is None:
            making.set_result(None)
        else:
            making.set_exception(failed)

    def _give_back(self, message: Message) -> Message:
        """A slot was not filled."""
        self._release(self._arenas[message["arena"]], int(message["slot"]))
        return {}

    def _begin(self, message: Message) -> Message:
        """Rank 0 opens a save before any rank captures for it."""
        self._committer.begin(message)
        return {}

    def _piece(self, message: Message) -> Message:
        """Bytes of a rank's part lie in a slot, and more will come."""
        self._part(message).add(self._piece_of(message))
        return {}

    def _captured(self, message: Message) -> Message:
        """A rank's part lies in its slot, or what is left of it; from now on it does not need the rank."""
        part = self._part(message)
        part.add(self._piece_of(message))
        with self._changed:
            self._parts.pop((message["save"], int(message["rank"])), None)
        try:
            self._committer.captured(message["save"], int(message["rank"]), message["path"], message["step"])
        except BaseException:
            part.stop()
            raise
        part.finish()
        return {}

    def _piece_of(self, message: Message) -> Piece:
        files = [
            CapturedFile(
                path,
                header,
                size,
                [
                    CapturedChunk(name, Box(tuple(offsets), tuple(sizes)), start, nbytes, dtype, tuple(shape))
                    for name, offsets, sizes, start, nbytes, dtype, shape in chunks
                ],
            )
            for path, header, size, chunks in message["files"]
        ]
        self._output.link.limit(message["bandwidth"])
        return Piece(
            self._arenas[message["arena"]],
            int(message["slot"]),
            int(message["begin"]),
            files,
            int(message["bytes"]),
            compress=message["compress"],
            keep=bool(message["keep"]),
        )

    def _part(self, message: Message) -> PartWriter:
        """What writes a rank's part of a save. Raises what has kept it from writing."""
        attempt, rank, path = message["save"], int(message["rank"]), message["path"]
        try:
            self._committer.expect(attempt, path, message["step"])
            part = self._parts.get((attempt, rank))
            if part is not None and part.failure is not None:
                raise SaveFailedError(f"{path}: rank {rank}'s part could not be written: {part.failure}", path=path)
        except BaseException:
            # a slot that is to be kept, the rank is perhaps still writing to: it gives it back itself
            if not message["keep"]:
                self._release(self._arenas[message["arena"]], int(message["slot"]))
            raise
        if part is None:
            with self._changed:
                self._writing += 1
            part = PartWriter(self._output, self._committer, attempt, path, rank, self._release, self._part_ended)
            with self._changed:
                self._parts[attempt, rank] = part
        return part

    def _part_ended(self) -> None:
        with self._changed:
            self._writing -= 1

    def _abandon(self, message: Message) -> Message:
        """A rank can't capture its part."""
        rank = int(message["rank"])
        if message.get("slot") is not None:
            self._release(self._arenas[message["arena"]], int(message["slot"]))
        self._committer.failed(message["save"], f"rank {rank}: {message['why']}", message["kind"])
        self._stop({(message["save"], rank)})
        return {}

    def _wait(self, message: Message) -> Message:
        """Answer when a save is captured by all, or over, or when the time is up."""
        return self._committer.wait(message["save"], message["until"], float(message["timeout"]))

    # work

    def _stop(self, keys: set[tuple[str, int]]) -> None:
        """The rest of these ranks' parts will never come."""
        with self._changed:
            parts = [self._parts.pop(key) for key in keys if key in self._parts]
        for part in parts:
            part.stop()

    def _release(self, arena: Arena, slot: int) -> None:
        arena.release(slot)
        self._forget_if_idle(arena)

    def _forget_if_idle(self, arena: Arena) -> None:
        """Unmap an arena that was outgrown when nothing lies in it any more."""
        with self._changed:
            if arena.idle and arena not in self._newest.values():
                self._arenas.pop(arena.path, None)


def _largest(path: str, sizes: Sequence[int]) -> Arena:
    """An arena of the first of these sizes for which there is room. Raises SaveFailedError if there is for none."""
    *larger, least = sizes
    for size in larger:
        with contextlib.suppress(SaveFailedError):
            return Arena(path, size)
    return Arena(path, least)


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
