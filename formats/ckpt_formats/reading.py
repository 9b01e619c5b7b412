"""Reading boxes of tensors into memory: only the ranges that are needed, every byte verified.

The one read path, for `ckpt.open` and for loading into live state alike. Works on numpy arrays of carrier dtypes, so it
needs no torch; knows no ranks. Given a manifest (what) and a location map (where), it

1. intersects each wanted box with the chunks that cover its tensor,
2. turns every overlap into a byte range of a chunk, widened to the blocks that its digests cover,
3. reads the ranges, neighbours together, several at once, and verifies each block while it is in the cache,
4. puts the elements where they belong; a whole chunk that goes to contiguous memory is read straight into it.

Chunks that are stored with a codec take a path of their own: their blocks are found by the chunk's table, decoded into
the same places and verified there.

When a place fails (unreadable, or bytes that do not fit their digest) the next place in the location map serves.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.codecs import KNOWN, RAW, BlockError, decode_block, require_known, word_size
from ckpt_formats.digest import DIGEST_SIZE, digest
from ckpt_formats.encoded import EncodedChunk, Tables
from ckpt_formats.errors import CorruptionError
from ckpt_formats.geometry import Box, flat_boxes, flat_hull, intersect_rows
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.manifest import ChunkRows, Manifest, TensorMeta
from ckpt_formats.memory import scratch

SPAN = 8 << 20
"""Bytes read at once, and the size of each thread's staging buffer."""
DIRECT = 256 << 10
"""Whole chunks of at least so many bytes are read straight into contiguous destinations; smaller ones go through the
staging buffer, many at a time."""
SMALL = 16 << 10
"""Pieces smaller than this on average are read by one thread."""
FAR_THREADS = 16
"""Threads that read from far (LocationMap.far), where they wait for answers."""
OVERREAD = 20
"""Ranges are read together with what lies between them as long as that is at most one byte in so many."""


class Request(NamedTuple):
    """A box of a tensor that is wanted in memory.

    `into` has the box's shape and the tensor's carrier dtype, any strides, and is writable.
    """

    name: str
    box: Box
    into: AnyArray


@dataclass(slots=True)
class ReadStats:
    """What a read cost.

    `bytes_needed` are the bytes of the wanted elements, `bytes_read` what was read to get and verify them.
    """

    bytes_read: int = 0
    bytes_needed: int = 0


class _Piece(NamedTuple):
    """A range of blocks of one chunk, and the part of a request that lies in it.

    `start` and `stop` are positions in the source; of a chunk with a codec, where they would be if it were raw.
    """

    source: int
    start: int
    stop: int
    meta: TensorMeta
    row: int
    first: int
    """Position of `start` within the chunk, in bytes; a multiple of the block size."""
    chunk: Box
    wanted: Box | None
    """The wanted part of the chunk in global coordinates; None for all of it, and then `into` has the chunk's shape."""
    into: AnyArray
    origin: tuple[int, ...]
    """Global coordinates of into[0, …, 0]."""


class _EncodedPiece(_Piece):
    """A piece of a chunk whose preferred place has a codec."""

    __slots__ = ()


class Reader:
    """Reads boxes of one checkpoint. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, locations: LocationMap) -> None:
        self._manifest = manifest
        self._locations = locations
        self._places: dict[int, _PageTable] = {}
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
        stats = ReadStats()
        direct: list[_Piece] = []
        staged: list[_Piece] = []
        encoded: list[_EncodedPiece] = []
        for request in requests:
            self._plan(request, direct, staged, encoded)
            stats.bytes_needed += request.into.nbytes
        staged.sort(key=_position)
        direct.sort(key=_position)
        encoded.sort(key=_position)
        tasks: list[list[_Piece]] = [[piece] for piece in direct] + _spans(staged)
        stats.bytes_read = sum(max(map(_stop, task)) - task[0].start for task in tasks)
        work = stats.bytes_read + sum(piece.stop - piece.start for piece in encoded)
        tasks += [[piece] for piece in encoded]
        far = self._locations.far
        count = min(FAR_THREADS if far else threads or min(4, os.cpu_count() or 1), len(tasks))
        stagings = [_Staging()]
        # threads that handle many small pieces would only wait for each other's interpreter lock
        if count <= 1 or (not far and work < max(SPAN, SMALL * (len(direct) + len(staged) + len(encoded)))):
            for task in tasks:
                self._run(task, stagings[0])
        else:
            local = threading.local()

            def run(task: list[_Piece]) -> None:
                staging = getattr(local, "staging", None)
                if staging is None:
                    staging = local.staging = _Staging()
                    stagings.append(staging)
                self._run(task, staging)

            with ThreadPoolExecutor(count, thread_name_prefix="ckpt-read") as pool:
                futures = [pool.submit(run, task) for task in tasks]
                done, pending = wait(futures, return_when=FIRST_EXCEPTION)
                for future in pending:
                    future.cancel()
                for future in done:
                    future.result()
        stats.bytes_read += sum(staging.stored_read for staging in stagings)
        return stats

    def require(self, name: str) -> TensorMeta:
        """Check what a tensor claims before anybody allocates for it: its chunks cover it, in files that large.

        Raises:
            MissingTensorError, CoverageError, CorruptionError: as their names say.
        """
        meta = self._manifest.meta(name)
        self._manifest.chunks(meta)
        if meta.rows:
            for source in set(self._table(meta.page).source[meta.row : meta.row + meta.rows]) - {-1}:
                self._locations.sources[source].size()
        return meta

    # planning

    def _table(self, page: int) -> _PageTable:
        table = self._places.get(page)
        if table is None:
            table = self._places[page] = _PageTable(self._manifest.page(page), self._locations.places(page))
        return table

    def _plan(self, request: Request, direct: list[_Piece], staged: list[_Piece], encoded: list[_EncodedPiece]) -> None:
        name, box, into = request
        manifest = self._manifest
        meta = manifest.tensors.get(name) or manifest.meta(name)
        manifest.require_cover(meta)
        if meta.rows == 1 and box.sizes == meta.shape and not any(box.offsets):
            # whole tensors in one chunk: when there are many, what is done for each counts
            table = self._places.get(meta.page) or self._table(meta.page)
            at = meta.row
            length = table.length[at]
            if length < DIRECT and length <= manifest.block_size and self._locations.codecs[table.codec[at]] == RAW:
                start = table.start[at]
                staged.append(
                    _Piece(table.source[at], start, start + length, meta, at, 0, box, None, into, box.offsets)
                )
                return
        whole = Box.whole(meta.shape)
        if box != whole and not whole.contains(box):
            raise ValueError(f"{name!r}: the box {box} leaves the tensor's shape {list(meta.shape)}")
        if not into.size:
            return
        table = self._table(meta.page)
        if meta.rows == 1:
            # most tensors of most checkpoints; covered by one chunk, which is then the whole
            self._plan_chunk(table, meta, meta.row, whole, box, into, box.offsets, direct, staged, encoded)
            return
        row = table.find(meta, box)
        if row is not None:
            # what most loads want: exactly what was stored
            self._plan_chunk(table, meta, row, box, box, into, box.offsets, direct, staged, encoded)
            return
        offsets, sizes = self._manifest.chunks(meta)
        rows, starts, extents = intersect_rows(offsets, sizes, box)
        for row, start, extent in zip(rows.tolist(), starts.tolist(), extents.tolist(), strict=True):
            chunk = Box(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))
            part = Box(tuple(start), tuple(extent))
            self._plan_chunk(table, meta, meta.row + row, chunk, part, into, box.offsets, direct, staged, encoded)

    def _plan_chunk(
        self,
        table: _PageTable,
        meta: TensorMeta,
        row: int,
        chunk: Box,
        part: Box,
        into: AnyArray,
        origin: tuple[int, ...],
        direct: list[_Piece],
        staged: list[_Piece],
        encoded: list[_EncodedPiece],
    ) -> None:
        source, start, length = table.source[row], table.start[row], table.length[row]
        codec = self._locations.codecs[table.codec[row]]
        if codec != RAW:
            require_known(codec, where=f"chunk {chunk} of tensor {meta.name!r}", path=self._manifest.path)
            encoded.extend(self._encoded_pieces(source, start, meta, row, chunk, part, into, origin))
            return
        block_size = self._manifest.block_size
        if part == chunk:
            target = into if into.shape == chunk.sizes else into[part.relative_to(origin).slices()]
            if length <= block_size and length < DIRECT:
                staged.append(_Piece(source, start, start + length, meta, row, 0, chunk, None, target, origin))
                return
            if target.flags.c_contiguous:
                flat = target.reshape(-1)
                itemsize = meta.dtype.itemsize
                # whole blocks, whatever their size
                span = max(SPAN - SPAN % block_size, block_size)
                for first in range(0, length, span):
                    last = min(first + span, length)
                    run = flat[first // itemsize : last // itemsize]
                    direct.append(
                        _Piece(source, start + first, start + last, meta, row, first, chunk, None, run, origin)
                    )
                return
        for first, last in _needed(meta, chunk, part, length, block_size):
            staged.append(_Piece(source, start + first, start + last, meta, row, first, chunk, part, into, origin))

    def _encoded_pieces(
        self,
        source: int,
        start: int,
        meta: TensorMeta,
        row: int,
        chunk: Box,
        part: Box,
        into: AnyArray,
        origin: tuple[int, ...],
    ) -> Iterable[_EncodedPiece]:
        block_size, itemsize = self._manifest.block_size, meta.dtype.itemsize
        nbytes = chunk.numel * itemsize
        target = into if into.shape == part.sizes else into[part.relative_to(origin).slices()]
        if part == chunk and target.flags.c_contiguous:
            flat = target.reshape(-1)
            span = max(SPAN - SPAN % block_size, block_size)
            for first in range(0, nbytes, span):
                last = min(first + span, nbytes)
                run = flat[first // itemsize : last // itemsize]
                yield _EncodedPiece(source, start + first, start + last, meta, row, first, chunk, None, run, origin)
            return
        for first, last in _needed(meta, chunk, part, nbytes, block_size):
            yield _EncodedPiece(source, start + first, start + last, meta, row, first, chunk, part, into, origin)

    # running

    def _run(self, task: list[_Piece], staging: _Staging) -> None:
        first = task[0]
        if first.source < 0:
            # the preferred place does not have it at all
            for piece in task:
                self._alternatives(piece, staging)
            return
        if isinstance(first, _EncodedPiece):
            self._run_encoded(first, staging)
            return
        if len(task) == 1 and first.wanted is None and first.into.nbytes >= DIRECT and first.into.flags.c_contiguous:
            self._run_direct(first)
            return
        start, stop = first.start, max(map(_stop, task))
        view = staging.view(stop - start)
        try:
            self._locations.sources[first.source].read(start, stop, view)
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
                table = self._table(page)
            try:
                self._verify(piece, data, piece.source, table=table)
            except CorruptionError:
                self._alternatives(piece, _Staging())
                continue
            dtype = into.dtype
            if wanted is not None or begin % dtype.itemsize:
                _scatter(piece, data)
                continue
            # the same as _scatter, many times as fast when pieces are small and many
            whole = elements.get(dtype)
            if whole is None:
                whole = elements[dtype] = np.frombuffer(view, dtype, len(view) // dtype.itemsize)
            part = whole[begin // dtype.itemsize : end // dtype.itemsize]
            into[...] = part if into.ndim == 1 else part.reshape(into.shape)

    def _run_direct(self, piece: _Piece) -> None:
        view = _bytes_of(piece.into)
        source = self._locations.sources[piece.source]
        # read and verified block by block: the block is in the cache when it is hashed
        step = self._manifest.block_size if not self._locations.far else len(view)
        try:
            for at in range(0, piece.stop - piece.start, step):
                data = view[at : at + step]
                source.read(piece.start + at, piece.start + at + len(data), data)
                self._verify(piece, data, piece.source, at)
        except CorruptionError:
            self._alternatives(piece, _Staging())

    def _run_encoded(self, piece: _EncodedPiece, staging: _Staging) -> None:
        view = _bytes_of(piece.into) if piece.wanted is None else staging.view(piece.stop - piece.start)
        places = self._locations.places(piece.meta.page)[0]
        try:
            self._decode(piece, view, 0, places, staging)
        except CorruptionError:
            self._alternatives(piece, _Staging())
            return
        if piece.wanted is not None:
            _scatter(piece, view)

    def _decode(self, piece: _Piece, view: memoryview, at: int, places: Places, staging: _Staging) -> None:
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

    def _alternatives(self, piece: _Piece, staging: _Staging) -> None:
        """Get a piece block by block, each from the first place that has it whole."""
        view = staging.view(piece.stop - piece.start)
        for at in range(0, len(view), self._manifest.block_size):
            self._any_place(piece, view[at : at + self._manifest.block_size], at, staging)
        _scatter(piece, view)

    def _any_place(self, piece: _Piece, block: memoryview, at: int, staging: _Staging) -> None:
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
        self, piece: _Piece, data: memoryview, source: int, skip: int = 0, *, table: _PageTable | None = None
    ) -> None:
        table = table or self._table(piece.meta.page)
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

    def _damaged(self, piece: _Piece, source: int, start: int, length: int) -> CorruptionError:
        name = self._locations.sources[source].name
        at = piece.start - piece.first + start
        return CorruptionError(
            f"{name}: bytes {at} to {at + length}, in tensor {piece.meta.name!r} {piece.chunk}, do not fit their "
            "checksum: the file is damaged; restore it or use another checkpoint (`ckpt verify` lists all damage)",
            path=name,
            tensor=piece.meta.name,
        )


class _PageTable:
    """A page's chunks and their first places as plain lists and bytes: a tenth of what indexing arrays costs."""

    def __init__(self, chunks: ChunkRows, alternatives: Sequence[Places]) -> None:
        places = alternatives[0]
        self.source: list[int] = places.source.tolist()
        self.start: list[int] = places.start.tolist()
        self.length: list[int] = places.length.tolist()
        self.codec: list[int] = places.codec.tolist()
        self.sizes: list[list[int]] = chunks.size.tolist()
        self.offsets: list[list[int]] = chunks.offset.tolist()
        self.digests = b"" if chunks.digest is None else chunks.digest.tobytes()
        self.block: list[int] = [] if chunks.block is None else chunks.block.tolist()
        self.block_digests = b"" if chunks.block_digest is None else chunks.block_digest.tobytes()

    def find(self, meta: TensorMeta, box: Box) -> int | None:
        """The row of the chunk that is exactly that box, if there is one. Rows are sorted by offset."""
        more = len(self.offsets[meta.row]) - len(box.sizes)
        offset = [*box.offsets, *(0,) * more]
        row = bisect_left(self.offsets, offset, meta.row, meta.row + meta.rows)
        if row == meta.row + meta.rows or self.offsets[row] != offset or self.sizes[row] != [*box.sizes, *(1,) * more]:
            return None
        return row


class _Staging:
    """A page-aligned buffer that is made when it is first needed and kept for the next span."""

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._stored: mmap.mmap | None = None
        self.stored_read = 0
        """Stored bytes of encoded chunks that went through it."""

    def view(self, size: int) -> memoryview:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = scratch(size)
        return memoryview(self._buffer)[:size]

    def stored(self, size: int) -> memoryview:
        """A second buffer, for what has yet to be decoded."""
        if self._stored is None or len(self._stored) < size:
            self._stored = scratch(size)
        return memoryview(self._stored)[:size]


_position = itemgetter(_Piece._fields.index("source"), _Piece._fields.index("start"))
_stop = itemgetter(_Piece._fields.index("stop"))


def _spans(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Group sorted pieces that are close together into tasks of at most SPAN bytes, little of which is not wanted."""
    tasks: list[list[_Piece]] = []
    source = begin = end = -1
    wasted = 0
    for piece in pieces:
        gap = max(0, piece.start - end)
        if (
            piece.source == source
            and piece.stop - begin <= SPAN
            and (wasted + gap) * OVERREAD <= piece.stop - begin - wasted - gap
        ):
            tasks[-1].append(piece)
            end = max(end, piece.stop)
            wasted += gap
        else:
            tasks.append([piece])
            source, begin, end, wasted = piece.source, piece.start, piece.stop, 0
    return tasks


def _needed(meta: TensorMeta, chunk: Box, part: Box, length: int, block_size: int) -> Iterable[tuple[int, int]]:
    """Ranges of whole blocks of a chunk, each at most SPAN bytes, that together hold its wanted part."""
    itemsize = meta.dtype.itemsize
    local = part.relative_to(chunk.offsets)
    low, high = flat_hull(chunk.sizes, local)
    first = low * itemsize // block_size * block_size
    last = min(length, -(-high * itemsize // block_size) * block_size)
    if last - first <= block_size:
        return [(first, last)]
    per_block = block_size // itemsize
    runs: list[tuple[int, int]] = []
    for at in range(first, last, block_size):
        stop = min(at + block_size, last)
        boxes = flat_boxes(chunk.sizes, at // itemsize, min(at // itemsize + per_block, stop // itemsize))
        if not any(box.intersect(local) for box in boxes):
            continue
        if runs and runs[-1][1] == at and stop - runs[-1][0] <= SPAN:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((at, stop))
    return runs


def _bytes_of(array: AnyArray) -> memoryview:
    """The bytes of a contiguous array, writable."""
    return array.reshape(-1).view(np.uint8).data


def _scatter(piece: _Piece, data: memoryview) -> None:
    """Put the verified bytes of a piece where they belong."""
    into = piece.into
    elements = np.frombuffer(data, dtype=into.dtype)
    if piece.wanted is None:
        into[...] = elements.reshape(into.shape)
        return
    local = piece.wanted.relative_to(piece.chunk.offsets)
    begin = piece.first // into.dtype.itemsize
    shift = tuple(c - o for c, o in zip(piece.chunk.offsets, piece.origin, strict=True))
    at = 0
    for box in flat_boxes(piece.chunk.sizes, begin, begin + len(elements)):
        common = box.intersect(local)
        if common is not None:
            run = elements[at : at + box.numel].reshape(box.sizes)
            target = Box(tuple(o + s for o, s in zip(common.offsets, shift, strict=True)), common.sizes)
            into[target.slices()] = run[common.relative_to(box.offsets).slices()]
        at += box.numel
