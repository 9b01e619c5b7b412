"""Reading once per node: a block that several ranks need is read and verified by one of them, and all take their parts.

A rank reads its batches into slots of its memory, in turn, and says so; the others put their parts where they belong,
and say that they are done, which frees the slot. So memory is bounded, and reading goes on while parts are copied. What
only one rank needs it reads by itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ckpt.collective import Collective
from ckpt.loading.batches import MOST, Batch, Extent, make_batches, needs_of
from ckpt.loading.node import STALL_S, Node, meet
from ckpt_formats.errors import CorruptionError, RankError
from ckpt_formats.pieces import EncodedPiece, Piece, clip, scatter
from ckpt_formats.reading import DEVICE_THREADS, FAR_THREADS, Reader, ReadPlan, ReadStats, Staging

SLOT = 2 << 20
"""Bytes of a batch at most, if a block is not larger."""
SLOTS = 2
"""Batches that a rank has read and others have not yet taken, when they come from memory: all ranks' slots together
stay in a CPU's cache. When they come from a device or from far, as many as threads."""
_READY, _DONE, _FAILED, _BYE = 1, 2, 3, 4


class ElsewhereError(Exception):
    """Another rank of this node failed; it says why to all ranks."""


def share(
    group: Collective, reader: Reader, plan: ReadPlan, *, far: bool, block_size: int, buffers: int
) -> tuple[ReadStats, ReadPlan] | None:
    """Read what ranks of a node have in common together. Collective over all ranks.

    Args:
        group: all ranks.
        reader: of the checkpoint.
        plan: what this rank needs.
        far: whether the checkpoint lies behind a network.
        block_size: of the checkpoint.
        buffers: bytes of memory that each rank may take.

    Returns what it cost and what is left for this rank alone; None, and nothing was read, if ranks can't share.

    Raises:
        CorruptionError: as reading does.
        RankError: a rank of this node died.
        ElsewhereError: one of them failed otherwise.
    """
    slot = max(SLOT // block_size * block_size, block_size)
    pieces = list(plan.pieces())
    threads = FAR_THREADS if far else DEVICE_THREADS if _is_cold(reader, pieces) else 0
    slots = max(1, min(threads or SLOTS, buffers // 2 // slot))
    node = meet(group, needs_of(pieces).tobytes(), slot * slots, MOST)
    if node is None:
        return None
    try:
        needs = [np.frombuffer(said, np.int64).reshape(-1, 6) for said in node.said]
        ours = _Round(node, reader, pieces, make_batches(needs, slot), slot, slots)
        done = ours.run(threads, past_cache=not far), ours.left()
    except BaseException:
        # what another has told is told on: a line that closes without a word is a death
        node.tell_all(_FAILED)
        raise
    else:
        node.tell_all(_BYE)
        return done
    finally:
        node.close()


def _is_cold(reader: Reader, pieces: list[Piece]) -> bool:
    try:
        return reader.is_cold(pieces)
    except CorruptionError:
        # whoever reads it says so, when all ranks listen
        return False


class _Round:
    """This rank's part in one sharing."""

    def __init__(
        self, node: Node, reader: Reader, pieces: list[Piece], batches: list[Batch], slot: int, slots: int
    ) -> None:
        self._node = node
        self._reader = reader
        self._slot = slot
        self._batches = batches
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault((piece.meta.page, piece.row), []).append(piece)
        me = 1 << node.index
        self._mine = deque(number for number, batch in enumerate(batches) if batch.owner == node.index)
        self._shared = [batch for batch in batches if batch.readers & me]
        self._expected = sum(batch.owner != node.index for batch in self._shared)
        self._free = deque(range(slots))
        self._slot_of: dict[int, int] = {}
        """Slot of each batch of mine that not everybody has taken yet."""
        self._takers: dict[int, int] = {}
        """How many ranks have yet to take it."""
        self._ready: deque[tuple[int, int, int]] = deque()
        """(owner, batch, slot) of others' batches that I have to take."""
        self._own_memory = node.own()
        self._read = 0
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
        heard = time.monotonic()
        while self._mine or running or self._takers or self._expected:
            moved = False
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
            if self._ready:
                owner, number, slot = self._ready.popleft()
                at = slot * self._slot
                self._place(self._batches[number], self._node.mates[owner].shared()[at : at + self._slot])
                self._expected -= 1
                self._node.send(owner, _DONE, number)
                moved = True
            if self._hear(0.0 if moved else 1.0) or moved:
                heard = time.monotonic()
            elif time.monotonic() - heard > STALL_S and not running:
                raise RankError(
                    f"ranks {[mate.rank for mate in self._node.mates.values()]} of this node did not go on with the "
                    f"load for {STALL_S:.0f} s; start the ranks anew"
                )

    def _hear(self, timeout: float) -> bool:
        """Take what others have said; whether they said anything."""
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
        others = [mate for mate in self._node.mates if batch.readers >> mate & 1]
        self._takers[number] = len(others) + 1
        for mate in others:
            self._node.send(mate, _READY, number, slot)
        at = slot * self._slot
        self._place(batch, self._own_memory[at : at + self._slot])
        self._taken(number)

    def _taken(self, number: int) -> None:
        self._takers[number] -= 1
        if not self._takers[number]:
            del self._takers[number]
            self._free.append(self._slot_of.pop(number))

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
            known = self._piece(extent)
            start = known.start + extent.first - known.first
            piece = known._replace(
                start=start,
                stop=start + nbytes,
                first=extent.first,
                wanted=None,
                into=np.frombuffer(self._own_memory[at : at + nbytes], np.uint8),
            )
            at += nbytes
            plan.add(piece)
            if not isinstance(piece, EncodedPiece):
                self._read += nbytes
        for task in plan.tasks():
            self._reader.run(task, staging)

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
