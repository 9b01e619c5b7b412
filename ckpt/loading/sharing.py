"""Reading once: a block that several ranks need is read and verified by one of them, and all take their parts.

A rank reads its batches into slots of its memory, in turn, and says so; the others of its node put their parts where
they belong, and say that they are done, which frees the slot. So memory is bounded, and reading goes on while parts are
copied. What another node reads comes into such slots too (exchange.py), is verified, and passed on from there. What
only one rank needs it reads by itself.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from ckpt import network
from ckpt.collective import Collective
from ckpt.loading.batches import COLUMNS, MOST, Batch, Extent, make_batches, needs_of
from ckpt.loading.exchange import ElsewhereError, Lines, connect, home_of, listen_address
from ckpt.loading.node import Meeting, Node
from ckpt_formats.arrays import Int64Array
from ckpt_formats.digest import DIGEST_SIZE, digest
from ckpt_formats.errors import CorruptionError, RankError
from ckpt_formats.pieces import EncodedPiece, Piece, clip, scatter
from ckpt_formats.reading import DEVICE_THREADS, FAR_THREADS, Reader, ReadPlan, ReadStats, Staging

SLOT = 2 << 20
"""Bytes of a batch at most, if a block is not larger."""
SLOTS = 2
"""Batches that a rank has read and others have not yet taken, when they come from memory: all ranks' slots together
stay in a CPU's cache. When they come from a device or from far, as many as threads."""
COMING = 8
"""Slots for batches that come from other nodes, at most."""
TOLD = 32 << 20
"""Bytes that ranks tell each other of what they need, at most; where it would be more, each node reads for itself."""
LINES = 256
"""Ranks of other nodes that a rank is connected with at most."""
_LISTED = 4
"""Ranks that an error names at most."""
_READY, _DONE, _FAILED, _BYE = 1, 2, 3, 4
_SAID = struct.Struct(f"<{DIGEST_SIZE}sQIQQ")
"""What a rank says of itself: digest and bytes of its needs, bytes of its address, the bytes that it needs, and how
many of these it would rather have from another node than read."""


def share(
    group: Collective,
    reader: Reader,
    plan: ReadPlan,
    *,
    far: bool,
    block_size: int,
    buffers: int,
    exchange: str,
    shared_store: bool,
) -> tuple[ReadStats, int, ReadPlan] | None:
    """Read what ranks have in common together. Collective over all ranks.

    Args:
        group: all ranks.
        reader: of the checkpoint.
        plan: what this rank needs.
        far: whether the checkpoint lies behind a network, in an object store.
        block_size: of the checkpoint.
        buffers: bytes of memory that each rank may take.
        exchange: "auto", "always" or "never": whether nodes pass on to each other what they read.
        shared_store: whether all nodes read from one storage, over a network.

    Returns what it cost, the bytes that came from other nodes, and what is left for this rank alone; None, and nothing
    was read, if ranks can't share.

    Raises:
        CorruptionError: as reading does.
        RankError: a rank of this node, or one that this rank exchanges with, died.
        ElsewhereError: one of them failed otherwise.
    """
    slot = max(SLOT // block_size * block_size, block_size)
    pieces = list(plan.pieces())
    cold = _is_cold(reader, pieces)
    threads = FAR_THREADS if far else DEVICE_THREADS if cold else 0
    budget = max(2, buffers // 2 // slot)
    reading = min(threads or SLOTS, budget)
    needs = needs_of(pieces)
    with ExitStack() as stack:
        listener = stack.enter_context(network.listen(loopback=False)) if exchange != "never" else None
        address = listen_address(listener) if listener is not None else b""
        told = needs.tobytes()
        nbytes = int((needs[:, 3] - needs[:, 2]).sum())
        wanted = nbytes if exchange == "always" or (shared_store and (far or cold)) else 0
        say = _SAID.pack(digest(told), len(told), len(address), nbytes, wanted)
        meeting = stack.enter_context(Meeting(group, say, MOST))
        known = _Known(group, meeting, told, address)
        node_ranks = meeting.nodes[meeting.node]
        coming = min(COMING, max(1, budget - reading)) if known.several else 0
        node = meeting.connect(b"" if known.several else told, slot * (reading + coming))
        if node is None:
            return None
        stack.callback(node.close)
        lines = None
        if known.several and listener is not None:
            batches = make_batches(known.needs, known.holders, meeting.nodes, meeting.node, slot)
            lines = _lines(group, listener, meeting, known, node, batches)
            if lines is None:
                batches = known.alone(node_ranks, slot)
        else:
            said = [np.frombuffer(text, np.int64).reshape(-1, COLUMNS) for text in node.said]
            batches = make_batches(said, [[rank] for rank in node_ranks], [node_ranks], 0, slot)
        try:
            ours = _Round(group.rank, node, node_ranks, lines, reader, pieces, batches, slot, reading, coming)
            stats = ours.run(threads, past_cache=not far)
        except BaseException:
            # what another has told is told on: a line that closes without a word is a death
            node.tell_all(_FAILED)
            if lines is not None:
                lines.close(failed=True)
            raise
        node.tell_all(_BYE)
        if lines is not None:
            lines.close(failed=False)
        return stats, ours.received, ours.left()


class _Known:
    """What all ranks need, as far as they tell each other. Collective.

    Attributes:
        several: whether nodes are to pass on to each other what they read; the same on all ranks.
        needs: of each rank that needs something else than those before it; only if `several`.
        holders: which ranks need that.
        addresses: of all ranks.
    """

    def __init__(self, group: Collective, meeting: Meeting, told: bytes, address: bytes) -> None:
        said = [_SAID.unpack(text) for text in meeting.said]
        needed, wanted = sum(entry[3] for entry in said), sum(entry[4] for entry in said)
        self.several = False
        self.needs: list[Int64Array] = []
        self.holders: list[list[int]] = []
        self.addresses: dict[int, bytes] = {}
        # who does not exchange has no address
        if len(meeting.nodes) < 2 or 2 * wanted < needed or not all(entry[2] for entry in said):
            return
        holders: dict[bytes, list[int]] = {}
        for rank, entry in enumerate(said):
            holders.setdefault(entry[0], []).append(rank)
        parts = [(entry[1] if holders[entry[0]][0] == rank else 0, entry[2]) for rank, entry in enumerate(said)]
        total = sum(map(sum, parts))
        if total > TOLD:
            return
        own = parts[group.rank]
        before = sum(map(sum, parts[: group.rank]))
        everything = group.piece_together(told[: own[0]] + address, before, total)
        at = 0
        for rank, (length, more) in enumerate(parts):
            if length:
                self.needs.append(np.frombuffer(everything, np.int64, length // 8, at).reshape(-1, COLUMNS))
                self.holders.append(holders[said[rank][0]])
            self.addresses[rank] = everything[at + length : at + length + more]
            at += length + more
        self.several = True

    def alone(self, ranks: Sequence[int], slot: int) -> list[Batch]:
        """The batches of a node that reads for itself."""
        holders = [[rank for rank in held if rank in ranks] for held in self.holders]
        return make_batches(self.needs, holders, [ranks], 0, slot)


def _lines(
    group: Collective, listener: socket.socket, meeting: Meeting, known: _Known, node: Node, batches: Sequence[Batch]
) -> Lines | None:
    """The lines over which this rank's batches come and go; None, everywhere, if any can't connect. Collective."""
    mine = [batch for batch in batches if batch.taker == group.rank]
    coming = Counter(batch.origin for batch in mine if batch.origin is not None)
    going = Counter(batch.onward for batch in mine if batch.onward is not None)
    lines = None
    failed = len(coming) + len(going) > LINES
    if not failed:
        try:
            incoming, outgoing = connect(group.rank, listener, meeting.tokens, known.addresses, coming, going)
            homes = {other: home_of(known.addresses[other]) for other in {*coming, *going}}
            lines = Lines(incoming, outgoing, coming, going, node.wake, node.patience, homes)
        except OSError:
            # no way through between the nodes
            failed = True
    if group.tally(None, failed)[0] and lines is not None:
        lines.close(failed=False)
        lines = None
    return lines


def _is_cold(reader: Reader, pieces: list[Piece]) -> bool:
    try:
        return reader.is_cold(pieces)
    except CorruptionError:
        # whoever reads it says so, when all ranks listen
        return False


class _Round:
    """This rank's part in one sharing.

    Attributes:
        received: bytes that came from other nodes.
    """

    def __init__(
        self,
        rank: int,
        node: Node,
        ranks: Sequence[int],
        lines: Lines | None,
        reader: Reader,
        pieces: list[Piece],
        batches: list[Batch],
        slot: int,
        reading: int,
        coming: int,
    ) -> None:
        self._node = node
        self._lines = lines
        self._reader = reader
        self._slot = slot
        self._batches = batches
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault((piece.meta.page, piece.row), []).append(piece)
        self._rank = rank
        self._place_of = {other: number for number, other in enumerate(ranks)}
        mine = [number for number, batch in enumerate(batches) if batch.taker == rank]
        self._mine = deque(number for number in mine if batches[number].origin is None)
        """Batches that I read."""
        self._coming = deque(number for number in mine if batches[number].origin is not None)
        """Batches that come to me from other nodes, and have no slot yet."""
        self._shared = [batch for batch in batches if rank in batch.readers]
        self._queues: dict[int, deque[int]] = {}
        """By rank of another node: the batches that go there, in their order."""
        for number in mine:
            onward = batches[number].onward
            if onward is not None:
                self._queues.setdefault(onward, deque()).append(number)
        self._to_go: set[int] = set()
        """Those of them that I have."""
        self._due = {number: batches[number].origin for number in self._coming}
        """Batches that have yet to come, and which rank has them: one of another node, or of this one."""
        self._due |= {
            n: batch.taker for n, batch in enumerate(batches) if rank in batch.readers and batch.taker != rank
        }
        self._free = deque(range(reading))
        self._free_to_come = deque(range(reading, reading + coming))
        self._slot_of: dict[int, int] = {}
        """Slot of each batch of mine that not everybody has taken yet."""
        self._takers: dict[int, int] = {}
        """How many have yet to take it: ranks, and the line to another node."""
        self._ready: deque[tuple[int, int, int]] = deque()
        """(who has it, batch, slot) of others' batches that I have to take."""
        self._own_memory = node.own()
        self._read = 0
        self.received = 0
        self._local = threading.local()
        self._stagings: list[Staging] = []

    def run(self, threads: int, *, past_cache: bool) -> ReadStats:
        """Read with so many threads, or with none beside this one."""
        if threads and self._mine:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="ckpt-share")
            try:
                self._loop(pool, past_cache=past_cache)
            finally:
                pool.shutdown(cancel_futures=True)
        else:
            self._loop(None, past_cache=False)
        return ReadStats(self._read + sum(staging.stored_read for staging in self._stagings))

    def _loop(self, pool: ThreadPoolExecutor | None, *, past_cache: bool) -> None:
        running: dict[Future[None], int] = {}
        heard, carried, patience = time.monotonic(), 0, self._node.patience
        while self._mine or running or self._takers or self._due:
            moved = False
            while self._coming and self._free_to_come:
                number, slot = self._coming.popleft(), self._free_to_come.popleft()
                self._let_come(number, slot)
            while self._mine and self._free:
                number, slot = self._mine.popleft(), self._free.popleft()
                self._slot_of[number] = slot
                moved = True
                if pool is None:
                    self._fetch(number, slot, past_cache=False)
                    self._offer(number, slot)
                    break
                future = pool.submit(self._fetch, number, slot, past_cache=past_cache)
                running[future] = number
                future.add_done_callback(lambda _: self._node.wake())
            for future in [future for future in running if future.done()]:
                number = running.pop(future)
                future.result()
                self._offer(number, self._slot_of[number])
                moved = True
            while self._ready:
                owner, number, slot = self._ready.popleft()
                at = slot * self._slot
                self._place(self._batches[number], self._node.mates[owner].shared()[at : at + self._slot])
                del self._due[number]
                self._node.send(owner, _DONE, number)
                moved = True
            if self._lines is not None:
                moved = self._exchange(self._lines) or moved
                moved = moved or self._lines.moved != carried
                carried = self._lines.moved
            if self._hear(0.0 if moved else min(1.0, patience / 4)) or moved:
                heard = time.monotonic()
            elif time.monotonic() - heard > patience and not running:
                raise self._stalled(patience)

    def _stalled(self, patience: float) -> RankError:
        """What to say of those who have passed nothing on for so many seconds."""
        owing = sorted({rank for rank in self._due.values() if rank is not None})
        homes = self._lines.homes if self._lines is not None else {}
        names = [f"rank {rank}" + (f" on node {homes[rank]}" if rank in homes else "") for rank in owing]
        who = ", ".join(names[:_LISTED]) or f"the other ranks of rank {self._rank}'s node"
        return RankError(
            f"rank {self._rank} has got nothing for {patience:g} s of what it shares with {who}: a process is frozen, "
            "or a node is switched off; start the ranks anew",
            rank=owing[0] if owing else None,
        )

    def _let_come(self, number: int, slot: int) -> None:
        batch = self._batches[number]
        if self._lines is None or batch.origin is None:
            raise RuntimeError("there are no lines between the nodes")
        self._slot_of[number] = slot
        at = slot * self._slot
        self._lines.receive(batch.origin, number, self._own_memory[at : at + batch.nbytes])

    def _exchange(self, lines: Lines) -> bool:
        """Take note of what came from other nodes and what went there; whether there was anything."""
        news = lines.news()
        for came, number in news:
            if not came:
                self._taken(number)
                continue
            self._verify(number)
            self.received += self._batches[number].nbytes
            del self._due[number]
            self._offer(number, self._slot_of[number])
        return bool(news)

    def _hear(self, timeout: float) -> bool:
        """Take what others of this node have said; whether they said anything."""
        said = False
        for who, kind, number, more in self._node.listen(timeout):
            said = True
            if kind == _READY:
                self._ready.append((who, number, more))
            elif kind == _DONE:
                self._taken(number)
            elif kind == _BYE:
                self._node.mates[who].finished = True
            else:
                raise ElsewhereError
        return said

    def _offer(self, number: int, slot: int) -> None:
        """Say that a batch of mine can be taken, and take my part."""
        batch = self._batches[number]
        others = [self._place_of[rank] for rank in batch.readers if rank != self._rank]
        at = slot * self._slot
        self._takers[number] = len(others) + 1
        if batch.onward is not None:
            self._takers[number] += 1
            self._to_go.add(number)
            self._pass_on(batch.onward)
        for mate in others:
            self._node.send(mate, _READY, number, slot)
        self._place(batch, self._own_memory[at : at + self._slot])
        self._taken(number)

    def _pass_on(self, to: int) -> None:
        """Send what is next in the queue to a rank, and there; reads may have ended in another order."""
        queue = self._queues[to]
        while queue and queue[0] in self._to_go and self._lines is not None:
            number = queue.popleft()
            self._to_go.remove(number)
            at = self._slot_of[number] * self._slot
            self._lines.send(to, number, self._own_memory[at : at + self._batches[number].nbytes])

    def _taken(self, number: int) -> None:
        self._takers[number] -= 1
        if not self._takers[number]:
            del self._takers[number]
            free = self._free if self._batches[number].origin is None else self._free_to_come
            free.append(self._slot_of.pop(number))

    def _verify(self, number: int) -> None:
        """Check what came from another node."""
        batch = self._batches[number]
        at = self._slot_of[number] * self._slot
        for extent in batch.extents:
            nbytes = extent.last - extent.first
            if not self._reader.fits(self._cut(extent, at), self._own_memory[at : at + nbytes]):
                name = self._piece(extent).meta.name
                raise CorruptionError(
                    f"a part of tensor {name!r} arrived damaged at rank {self._rank}: bytes {extent.first} to "
                    f"{extent.last} of a chunk do not fit their checksum, and did where they were read, before rank "
                    f"{batch.origin} passed them on: look for faults of the network or of memory, and load again",
                    tensor=name,
                )
            at += nbytes

    def _fetch(self, number: int, slot: int, *, past_cache: bool) -> None:
        """Read and verify a batch into a slot of the shared memory."""
        staging = getattr(self._local, "staging", None)
        if staging is None:
            staging = self._local.staging = Staging(past_cache=past_cache)
            self._stagings.append(staging)
        plan = ReadPlan()
        at = slot * self._slot
        for extent in self._batches[number].extents:
            nbytes = extent.last - extent.first
            piece = self._cut(extent, at)
            at += nbytes
            plan.add(piece)
            if not isinstance(piece, EncodedPiece):
                self._read += nbytes
        for task in plan.tasks():
            self._reader.run(task, staging)

    def _cut(self, extent: Extent, at: int) -> Piece:
        """A piece that reads an extent to a position of the shared memory."""
        known = self._piece(extent)
        nbytes = extent.last - extent.first
        start = known.start + extent.first - known.first
        return known._replace(
            start=start,
            stop=start + nbytes,
            first=extent.first,
            wanted=None,
            into=np.frombuffer(self._own_memory[at : at + nbytes], np.uint8),
        )

    def _piece(self, extent: Extent) -> Piece:
        """Any piece of this rank in the chunk of an extent."""
        return self._pieces[extent.page, extent.row][0]

    def _place(self, batch: Batch, data: memoryview) -> None:
        """Put this rank's parts of a batch where they belong."""
        at = 0
        for _page, _row, first, last in batch.extents:
            for piece in self._pieces[_page, _row]:
                low, high = max(first, piece.first), min(last, piece.first + piece.stop - piece.start)
                if low < high:
                    scatter(clip(piece, low, high), data[at + low - first : at + high - first])
            at += last - first

    def left(self) -> ReadPlan:
        """What is not shared."""
        shared: dict[tuple[int, int], list[Extent]] = {}
        for batch in self._shared:
            for extent in batch.extents:
                shared.setdefault((extent.page, extent.row), []).append(extent)
        plan = ReadPlan()
        for chunk, pieces in self._pieces.items():
            extents = sorted(shared.get(chunk, ()))
            for piece in pieces:
                at, end = piece.first, piece.first + piece.stop - piece.start
                for extent in extents:
                    if extent.first >= end:
                        break
                    if extent.first > at:
                        plan.add(clip(piece, at, extent.first))
                    at = max(at, extent.last)
                if at < end:
                    plan.add(clip(piece, at, end))
        plan.sort()
        return plan
