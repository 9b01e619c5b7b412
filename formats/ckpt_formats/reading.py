"""Reading boxes of tensors into memory: only the ranges that are needed, every byte verified.

The one read path, for `ckpt.open` and for loading into live state alike. Works on numpy arrays of carrier dtypes, so it
needs no torch; knows no ranks. Given a manifest (what) and a location map (where), it

1. plans: intersects each wanted box with the chunks that cover its tensor, which gives byte ranges (read_plan.py),
2. reads the ranges, neighbours together, several at once, and verifies each block while it is in the cache,
3. puts the elements where they belong; a whole chunk that goes to contiguous memory is read straight into it.

Chunks that are stored with a codec take a path of their own: their blocks are found by the chunk's table, decoded into
the same places and verified there.

When a place fails (unreadable, or bytes that do not fit their digest) the next place in the location map serves.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.codecs import KNOWN, RAW, BlockError, decode_block, word_size
from ckpt_formats.digest import DIGEST_SIZE, digest
from ckpt_formats.encoded import EncodedChunk, Tables
from ckpt_formats.errors import CorruptionError
from ckpt_formats.geometry import Box
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.manifest import Manifest, TensorMeta
from ckpt_formats.memory import scratch
from ckpt_formats.pieces import EncodedPiece, Piece, Request, bytes_of, in_one_piece, scatter, stop_of
from ckpt_formats.read_plan import DIRECT, SPAN, Pages, PageTable, Planner, ReadPlan
from ckpt_formats.sources import PAGE, ByteSource, on_device

__all__ = ["BUFFERS", "ReadPlan", "ReadStats", "Reader", "Request", "Staging"]

BUFFERS = 256 << 20
"""Bytes of memory that a read may take beside what it fills, if its caller says nothing else."""
SMALL = 16 << 10
"""Pieces smaller than this on average are read by one thread."""
FAR_THREADS = 16
"""Threads that read from far (LocationMap.far), where they wait for answers."""
DEVICE_THREADS = 4
"""Threads that read past the page cache, where they wait for the device."""
SAMPLE = 64
"""Chunks of a tensor in more of them that are looked at before memory for all of it is allocated."""
_SAMPLES = 64
"""Pages of a file that are looked up in the page cache, to see whether it lies there."""


@dataclass(slots=True)
class ReadStats:
    """What a read cost.

    `bytes_needed` are the bytes of the wanted elements, `bytes_read` what was read to get and verify them.
    """

    bytes_read: int = 0
    bytes_needed: int = 0


class Reader:
    """Reads boxes of one checkpoint. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, locations: LocationMap) -> None:
        self._manifest = manifest
        self._locations = locations
        self._pages = Pages(manifest, locations)
        self._planner = Planner(manifest, locations, self._pages)
        self._tables = Tables()

    def read(self, requests: Iterable[Request], *, threads: int | None = None) -> ReadStats:
        """Fill every request's array.

        Args:
            requests: what is wanted; boxes must lie within their tensors.
            threads: how many to read with; default one per CPU, at most 4. From far it is FAR_THREADS.

        Raises:
            MissingTensorError, CoverageError, CorruptionError, UnknownCodecError: as their names say. Arrays may have
                been filled in part by then.
        """
        return self.execute(self.plan(requests), threads=threads)

    def plan(self, requests: Iterable[Request]) -> ReadPlan:
        """Where the bytes of every request lie; reads and touches nothing but the index. See Planner.plan."""
        return self._planner.plan(requests)

    def execute(
        self, plan: ReadPlan, *, threads: int | None = None, buffers: int = BUFFERS, past_cache: bool = False
    ) -> ReadStats:
        """Fill the arrays of a plan's requests.

        Args:
            plan: of this reader.
            threads: as for `read`.
            buffers: bytes of memory to read through, at least those of one block for one thread.
            past_cache: what is not in the page cache is read past it where that can be done, which is faster; nobody
                finds it there afterwards.

        Raises:
            CorruptionError: as `read` does.
        """
        stats = ReadStats(bytes_needed=plan.bytes_needed)
        tasks = plan.tasks()
        stats.bytes_read = sum(
            max(map(stop_of, task)) - task[0].start for task in tasks if not isinstance(task[0], EncodedPiece)
        )
        work = stats.bytes_read + sum(piece.stop - piece.start for piece in plan.encoded)
        far = self._locations.far
        past_cache = past_cache and work >= SPAN and self.is_cold(task[0] for task in tasks)
        count = FAR_THREADS if far else DEVICE_THREADS if past_cache else threads or min(4, os.cpu_count() or 1)
        count = min(count, len(tasks), max(1, buffers // (2 * max(SPAN, self._manifest.block_size))))
        stagings = [Staging(past_cache=past_cache)]
        # threads that handle many small pieces would only wait for each other's interpreter lock
        if count <= 1 or (not far and work < max(SPAN, SMALL * sum(map(len, tasks)))):
            for task in tasks:
                self.run(task, stagings[0])
        else:
            local = threading.local()

            def run(task: list[Piece]) -> None:
                staging = getattr(local, "staging", None)
                if staging is None:
                    staging = local.staging = Staging(past_cache=past_cache)
                    stagings.append(staging)
                self.run(task, staging)

            with ThreadPoolExecutor(count, thread_name_prefix="ckpt-read") as pool:
                futures = [pool.submit(run, task) for task in tasks]
                done, pending = wait(futures, return_when=FIRST_EXCEPTION)
                for future in pending:
                    future.cancel()
                for future in done:
                    future.result()
        stats.bytes_read += sum(staging.stored_read for staging in stagings)
        return stats

    def is_cold(self, pieces: Iterable[Piece]) -> bool:
        """Whether most of what these pieces need is in local files, and not in the page cache."""
        # anywhere in them: looking at a page brings it into the cache, where others that look would find it
        anywhere = random.Random()  # noqa: S311 - no secret
        starts: dict[int, list[int]] = {}
        for piece in pieces:
            if piece.source >= 0:
                at = anywhere.randrange(piece.start, max(piece.stop, piece.start + 1))
                starts.setdefault(piece.source, []).append(at)
        cached = asked = 0
        for number, positions in starts.items():
            source = self._locations.sources[number]
            if not on_device(source):
                continue
            sample = positions[:: -(-len(positions) // _SAMPLES)]
            asked += len(sample)
            cached += source.cached(sample)
        return asked > 0 and 2 * cached < asked

    def require(self, name: str, box: Box | None = None) -> TensorMeta:
        """Check what a tensor claims before anybody allocates for it, or for a box of it.

        Which is: its chunks cover it, in files that large; of a tensor in very many chunks, some of the files.

        Raises:
            MissingTensorError, CoverageError, CorruptionError: as their names say.
        """
        meta = self._manifest.meta(name)
        self._manifest.require_cover(meta)
        box = Box.whole(meta.shape) if box is None else box
        if not meta.rows or 0 in box.sizes:
            return meta
        table = self._pages.table(meta.page)
        if table.partial and meta.rows > SAMPLE and box.sizes == meta.shape:
            rows = np.linspace(meta.row, meta.row + meta.rows - 1, SAMPLE, dtype=np.int64)
            self._manifest.bring([(meta, np.unique(rows))])
            for row in rows.tolist():
                self._manifest.fetch(meta, row, row + 1)
        else:
            rows, _, _ = self._manifest.chunks_in(meta, box)
        for source in {table.source[row] for row in rows.tolist()} - {-1}:
            self._locations.sources[source].size()
        return meta

    def run(self, task: list[Piece], staging: Staging) -> None:
        """Read and verify the pieces of one task, and put them where they belong. Raises CorruptionError."""
        first = task[0]
        if first.source < 0:
            # the preferred place does not have it at all
            for piece in task:
                self._alternatives(piece, staging)
            return
        if isinstance(first, EncodedPiece):
            self._run_encoded(first, staging)
            return
        into = first.into
        if len(task) == 1 and first.wanted is None and into.nbytes >= DIRECT and in_one_piece(into):
            self._run_direct(first, into, staging)
            return
        start, stop = first.start, max(map(stop_of, task))
        try:
            view = staging.read(self._locations.sources[first.source], start, stop)
        except CorruptionError:
            # perhaps only a part of the range is gone, or another place has it: piece by piece
            for piece in task:
                self._alternatives(piece, staging)
            return
        elements: dict[np.dtype[Any], AnyArray] = {}
        table = None
        page = -1
        for piece in task:
            _, begin, end, meta, _, _, _, wanted, into, _ = piece
            begin -= start
            end -= start
            data = view[begin:end]
            if meta.page != page:
                page = meta.page
                table = self._pages.table(page)
            try:
                self._verify(piece, data, piece.source, table=table)
            except CorruptionError:
                self._alternatives(piece, Staging())
                continue
            dtype = into.dtype
            if wanted is not None or begin % dtype.itemsize:
                scatter(piece, data)
                continue
            # the same as scatter, many times as fast when pieces are small and many
            whole = elements.get(dtype)
            if whole is None:
                whole = elements[dtype] = np.frombuffer(view, dtype, len(view) // dtype.itemsize)
            part = whole[begin // dtype.itemsize : end // dtype.itemsize]
            into[...] = part if into.ndim == 1 else part.reshape(into.shape)

    def _run_direct(self, piece: Piece, into: AnyArray, staging: Staging) -> None:
        view = bytes_of(into)
        source = self._locations.sources[piece.source]
        step = self._manifest.block_size
        try:
            if staging.past_cache:
                if into.ctypes.data % PAGE == 0 and self._read_straight(piece, view, source):
                    return
                arrived = staging.read(source, piece.start, piece.stop)
                for at in range(0, len(view), step):
                    data = arrived[at : at + step]
                    self._verify(piece, data, piece.source, at)
                    view[at : at + step] = data
                return
            # read and verified block by block: the block is in the CPU's cache when it is hashed
            step = len(view) if self._locations.far else step
            table = self._pages.table(piece.meta.page)
            for at in range(0, len(view), step):
                data = view[at : at + step]
                source.read(piece.start + at, piece.start + at + len(data), data)
                self._verify(piece, data, piece.source, at, table=table)
        except CorruptionError:
            self._alternatives(piece, Staging())

    def _read_straight(self, piece: Piece, view: memoryview, source: ByteSource) -> bool:
        """Read past the page cache into where it belongs, aligned memory, if the file is too; whether it was."""
        if (piece.start | piece.stop) % PAGE or not on_device(source):
            return False
        if source.read_past_cache(piece.start, piece.stop, view) is None:
            return False
        self._verify(piece, view, piece.source)
        return True

    def _run_encoded(self, piece: EncodedPiece, staging: Staging) -> None:
        into = piece.into
        straight = bytes_of(into) if piece.wanted is None and in_one_piece(into) else None
        view = staging.view(piece.stop - piece.start) if straight is None else straight
        places = self._locations.places(piece.meta.page)[0]
        try:
            self._decode(piece, view, 0, places, staging)
        except CorruptionError:
            self._alternatives(piece, Staging())
            return
        if straight is None:
            scatter(piece, view)

    def _decode(self, piece: Piece, view: memoryview, at: int, places: Places, staging: Staging) -> None:
        """Fill `view` with the bytes of a piece from its byte `at` on, whole blocks from a place that has a codec."""
        number = int(places.source[piece.row])
        source = self._locations.sources[number]
        start, length = int(places.start[piece.row]), int(places.length[piece.row])
        block_size = self._manifest.block_size
        meta = piece.meta
        stored = EncodedChunk(start, length, piece.chunk.numel * meta.dtype.itemsize, block_size, word_size(meta.dtype))
        low, high = stored.table, stored.stop
        try:
            first = (piece.first + at) // block_size
            last = first - (-len(view) // block_size)
            if stored.blocks == 1:
                base = start
                data = staging.stored(length)
                source.read(base, stored.stop, data)
                table = stored.parse(data[stored.table - base :])
            else:
                table = self._tables.get(number, source, stored)
                base = start + int(table.ends[first])
                data = staging.stored(start + int(table.ends[last]) - base)
                source.read(base, base + len(data), data)
            staging.stored_read += len(data)
            for block in range(first, last):
                low, high = start + int(table.ends[block]), start + int(table.ends[block + 1])
                skip = (block - first) * block_size
                into = view[skip : skip + block_size]
                decode_block(data[low - base : high - base], table.check(block), stored.word, into)
                try:
                    self._verify(piece, into, number, at + skip)
                except CorruptionError:
                    raise BlockError("what it decodes to does not fit its checksum") from None
        except BlockError as error:
            raise CorruptionError(
                f"{source.name}: bytes {low} to {high}, in tensor {meta.name!r} {piece.chunk}, can't be decoded: "
                f"{error}. The file is damaged: restore it or use another checkpoint (`ckpt verify` lists all damage)",
                path=source.name,
                tensor=meta.name,
            ) from None

    def _alternatives(self, piece: Piece, staging: Staging) -> None:
        """Get a piece block by block, each from the first place that has it whole."""
        view = staging.view(piece.stop - piece.start)
        for at in range(0, len(view), self._manifest.block_size):
            self._any_place(piece, view[at : at + self._manifest.block_size], at, staging)
        scatter(piece, view)

    def _any_place(self, piece: Piece, block: memoryview, at: int, staging: Staging) -> None:
        """Read a block of a piece from any place; the error of the first is what the caller gets if none has it."""
        failure: CorruptionError | None = None
        for places in self._locations.places(piece.meta.page):
            source = int(places.source[piece.row])
            codec = self._locations.codecs[int(places.codec[piece.row])]
            if source < 0 or codec not in KNOWN:
                continue
            start = int(places.start[piece.row]) + piece.first + at
            try:
                if codec == RAW:
                    self._locations.sources[source].read(start, start + len(block), block)
                    self._verify(piece, block, source, at)
                else:
                    self._decode(piece, block, at, places, staging)
            except CorruptionError as error:
                failure = failure or error
            else:
                return
        raise failure or CorruptionError(
            f"{self._manifest.path}: there is no place to read {piece.chunk} of tensor {piece.meta.name!r} from",
            path=self._manifest.path,
            tensor=piece.meta.name,
        )

    def _verify(
        self, piece: Piece, data: memoryview, source: int, skip: int = 0, *, table: PageTable | None = None
    ) -> None:
        table = table or self._pages.table(piece.meta.page)
        if not table.digests:
            return
        block = table.block[piece.row]
        if block < 0:
            at = piece.row * DIGEST_SIZE
            if digest(data) != table.digests[at : at + DIGEST_SIZE]:
                raise self._damaged(piece, source, 0, len(data))
            return
        size = self._manifest.block_size
        number = block + (piece.first + skip) // size
        for at in range(0, len(data), size):
            part = data[at : at + size]
            if digest(part) != table.block_digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]:
                raise self._damaged(piece, source, piece.first + skip + at, len(part))
            number += 1

    def fits(self, piece: Piece, data: memoryview) -> bool:
        """Whether the bytes of a piece, had from elsewhere, fit their checksums."""
        try:
            self._verify(piece, data, piece.source)
        except CorruptionError:
            return False
        return True

    def _damaged(self, piece: Piece, source: int, start: int, length: int) -> CorruptionError:
        name = self._locations.sources[source].name
        at = piece.start - piece.first + start
        return CorruptionError(
            f"{name}: bytes {at} to {at + length}, in tensor {piece.meta.name!r} {piece.chunk}, do not fit their "
            "checksum: the file is damaged; restore it or use another checkpoint (`ckpt verify` lists all damage)",
            path=name,
            tensor=piece.meta.name,
        )


class Staging:
    """Page-aligned memory to read through, made when it is first needed and kept for the next span.

    Attributes:
        past_cache: whether local files are read past the page cache.
        stored_read: stored bytes of encoded chunks that went through it.
    """

    def __init__(self, *, past_cache: bool = False) -> None:
        self._buffer: memoryview | None = None
        self._stored: memoryview | None = None
        self.past_cache = past_cache
        self.stored_read = 0

    def view(self, size: int) -> memoryview:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = scratch(size)
        return self._buffer[:size]

    def stored(self, size: int) -> memoryview:
        """A second buffer, for what has yet to be decoded."""
        if self._stored is None or len(self._stored) < size:
            self._stored = scratch(size)
        return self._stored[:size]

    def read(self, source: ByteSource, start: int, stop: int) -> memoryview:
        """The bytes start..stop of a source, in this memory. Raises CorruptionError."""
        if self.past_cache and on_device(source):
            view = source.read_past_cache(start, stop, self.view(stop - start + 2 * PAGE))
            if view is not None:
                return view
        view = self.view(stop - start)
        source.read(start, stop, view)
        return view
