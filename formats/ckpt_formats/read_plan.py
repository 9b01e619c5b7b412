"""Planning a read: from boxes that are wanted to ranges of whole blocks, sorted, neighbours together.

Each wanted box is intersected with the chunks that cover its tensor; every overlap becomes a range of its chunk,
widened to the blocks that the chunk's digests cover. Reads nothing but the manifest's pages; knows no ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ckpt_formats.codecs import RAW, require_known
from ckpt_formats.geometry import Box, flat_boxes, flat_hull
from ckpt_formats.grid import grid_of
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.manifest import ChunkRows, Manifest, TensorMeta
from ckpt_formats.pieces import EncodedPiece, Into, Piece, Request, in_one_piece, position

SPAN = 8 << 20
"""Bytes read at once, and the size of each thread's staging buffer."""
DIRECT = 256 << 10
"""Whole chunks of at least so many bytes are read straight into contiguous destinations; smaller ones go through the
staging buffer, many at a time."""
OVERREAD = 20
"""Ranges are read together with what lies between them as long as that is at most one byte in so many."""


@dataclass(slots=True)
class ReadPlan:
    """The pieces of one read. Sorted, as `Planner.plan` returns it."""

    direct: list[Piece] = field(default_factory=list)
    """Go straight into contiguous destinations."""
    staged: list[Piece] = field(default_factory=list)
    """Go through a staging buffer: small ones, and parts."""
    encoded: list[EncodedPiece] = field(default_factory=list)
    """Have to be decoded."""
    bytes_needed: int = 0
    """Bytes of the wanted elements."""

    def tasks(self) -> list[list[Piece]]:
        """Pieces that are read by one call each, encoded ones last."""
        tasks = [[piece] for piece in self.direct] + _spans(self.staged)
        tasks += [[piece] for piece in self.encoded]
        return tasks

    def pieces(self) -> Iterator[Piece]:
        return chain(self.direct, self.staged, self.encoded)

    @property
    def bytes_covered(self) -> int:
        """Bytes of the blocks that are read, decoded."""
        return sum(piece.stop - piece.start for piece in self.pieces())

    def add(self, piece: Piece) -> None:
        """Put a piece with those that are read in the same way."""
        if isinstance(piece, EncodedPiece):
            self.encoded.append(piece)
        elif piece.wanted is None and piece.into.nbytes >= DIRECT and in_one_piece(piece.into):
            self.direct.append(piece)
        else:
            self.staged.append(piece)

    def add_all(self, other: ReadPlan) -> None:
        """Put another plan's pieces with these. Leaves the other as it is."""
        for piece in other.pieces():
            self.add(piece)
        self.bytes_needed += other.bytes_needed
        self.sort()

    def sort(self) -> None:
        for pieces in (self.direct, self.staged, self.encoded):
            pieces.sort(key=position)


class Pages:
    """The tables of a manifest's pages that were needed so far."""

    def __init__(self, manifest: Manifest, locations: LocationMap) -> None:
        self._manifest = manifest
        self._locations = locations
        self._tables: dict[int, PageTable] = {}

    def table(self, page: int) -> PageTable:
        """The table of a page, fetched when it is first needed."""
        table = self._tables.get(page)
        if table is None:
            chunks = self._manifest.ranged_page(page)
            kind = PageTable if chunks.fetch is None else RangedTable
            table = self._tables[page] = kind(chunks, self._locations.places(page))
        return table


class Planner:
    """Makes the plans of reads of one checkpoint."""

    def __init__(self, manifest: Manifest, locations: LocationMap, pages: Pages) -> None:
        self._manifest = manifest
        self._locations = locations
        self._pages = pages

    def plan(self, requests: Iterable[Request]) -> ReadPlan:
        """Where the bytes of every request lie.

        Raises:
            MissingTensorError, CoverageError, UnknownCodecError: as their names say.
        """
        plan = ReadPlan()
        if self._locations.far:
            requests = list(requests)
            self._manifest.bring(self._known(requests))
        for request in requests:
            self._add(request, plan)
            plan.bytes_needed += request.into.nbytes
        plan.sort()
        return plan

    def _known(self, requests: Iterable[Request]) -> Iterator[tuple[TensorMeta, Box]]:
        """The tensors and boxes of requests, but for those that are refused when they are looked at one by one."""
        tensors, aliases = self._manifest.tensors, self._manifest.aliases
        for name, box, _ in requests:
            meta = tensors.get(name) or tensors.get(aliases.get(name, name))
            if meta is not None and box.numel and Box.whole(meta.shape).contains(box):
                yield meta, box

    def _add(self, request: Request, plan: ReadPlan) -> None:
        name, box, into = request
        manifest = self._manifest
        meta = manifest.tensors.get(name) or manifest.meta(name)
        manifest.require_cover(meta)
        if meta.rows == 1 and box.sizes == meta.shape and not any(box.offsets):
            # whole tensors in one chunk: when there are many, what is done for each counts
            table = self._pages.table(meta.page)
            at = meta.row
            length = table.length[at]
            if length < DIRECT and length <= manifest.block_size and self._locations.codecs[table.codec[at]] == RAW:
                start = table.start[at]
                plan.staged.append(
                    Piece(table.source[at], start, start + length, meta, at, 0, box, None, into, box.offsets)
                )
                return
        whole = Box.whole(meta.shape)
        if box != whole and not whole.contains(box):
            raise ValueError(f"{name!r}: the box {box} leaves the tensor's shape {list(meta.shape)}")
        if not into.size:
            return
        table = self._pages.table(meta.page)
        if meta.rows == 1:
            # most tensors of most checkpoints; covered by one chunk, which is then the whole
            self._plan_chunk(table, meta, meta.row, whole, box, into, box.offsets, plan)
            return
        row = table.find(meta, box)
        if row is not None:
            if table.partial:
                manifest.fetch(meta, row, row + 1)
            # what most loads want: exactly what was stored
            self._plan_chunk(table, meta, row, box, box, into, box.offsets, plan)
            return
        rows, offsets, sizes = manifest.chunks_in(meta, box)
        for row, offset, size in zip(rows.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            chunk = Box(tuple(offset), tuple(size))
            part = chunk.intersect(box)
            if part is not None:
                self._plan_chunk(table, meta, row, chunk, part, into, box.offsets, plan)

    def _plan_chunk(
        self,
        table: PageTable,
        meta: TensorMeta,
        row: int,
        chunk: Box,
        part: Box,
        into: Into,
        origin: tuple[int, ...],
        plan: ReadPlan,
    ) -> None:
        source, start, length = table.source[row], table.start[row], table.length[row]
        codec = self._locations.codecs[table.codec[row]]
        if codec != RAW:
            require_known(codec, where=f"chunk {chunk} of tensor {meta.name!r}", path=self._manifest.path)
            plan.encoded.extend(self._encoded_pieces(source, start, meta, row, chunk, part, into, origin))
            return
        block_size = self._manifest.block_size
        if part == chunk:
            target = into if into.shape == chunk.sizes else into[part.relative_to(origin).slices()]
            if length <= block_size and length < DIRECT:
                plan.staged.append(Piece(source, start, start + length, meta, row, 0, chunk, None, target, origin))
                return
            if in_one_piece(target):
                flat = target.reshape(-1)
                itemsize = meta.dtype.itemsize
                # whole blocks, whatever their size
                span = max(SPAN - SPAN % block_size, block_size)
                for first in range(0, length, span):
                    last = min(first + span, length)
                    run = flat[first // itemsize : last // itemsize]
                    plan.direct.append(
                        Piece(source, start + first, start + last, meta, row, first, chunk, None, run, origin)
                    )
                return
        for first, last in _needed(meta, chunk, part, length, block_size):
            plan.staged.append(Piece(source, start + first, start + last, meta, row, first, chunk, part, into, origin))

    def _encoded_pieces(
        self,
        source: int,
        start: int,
        meta: TensorMeta,
        row: int,
        chunk: Box,
        part: Box,
        into: Into,
        origin: tuple[int, ...],
    ) -> Iterable[EncodedPiece]:
        block_size, itemsize = self._manifest.block_size, meta.dtype.itemsize
        nbytes = chunk.numel * itemsize
        target = into if into.shape == part.sizes else into[part.relative_to(origin).slices()]
        if part == chunk and in_one_piece(target):
            flat = target.reshape(-1)
            span = max(SPAN - SPAN % block_size, block_size)
            for first in range(0, nbytes, span):
                last = min(first + span, nbytes)
                run = flat[first // itemsize : last // itemsize]
                yield EncodedPiece(source, start + first, start + last, meta, row, first, chunk, None, run, origin)
            return
        for first, last in _needed(meta, chunk, part, nbytes, block_size):
            yield EncodedPiece(source, start + first, start + last, meta, row, first, chunk, part, into, origin)


class PageTable:
    """A page's chunks and their first places as plain lists and bytes: a tenth of what indexing arrays costs."""

    partial = False
    """Whether rows have to be fetched before they are looked at."""

    def __init__(self, chunks: ChunkRows, alternatives: Sequence[Places]) -> None:
        places = alternatives[0]
        self.source: Sequence[int] = places.source.tolist()
        self.start: Sequence[int] = places.start.tolist()
        self.length: Sequence[int] = places.length.tolist()
        self.codec: Sequence[int] = places.codec.tolist()
        self.sizes: list[list[int]] = chunks.size.tolist()
        self.offsets: list[list[int]] = chunks.offset.tolist()
        self.digests: bytes | memoryview = b"" if chunks.digest is None else chunks.digest.tobytes()
        self.block: Sequence[int] = [] if chunks.block is None else chunks.block.tolist()
        self.block_digests: bytes | memoryview = b"" if chunks.block_digest is None else chunks.block_digest.tobytes()

    def find(self, meta: TensorMeta, box: Box) -> int | None:
        """The row of the chunk that is exactly that box, if there is one. Rows are sorted by offset."""
        more = len(self.offsets[meta.row]) - len(box.sizes)
        offset = [*box.offsets, *(0,) * more]
        row = bisect_left(self.offsets, offset, meta.row, meta.row + meta.rows)
        if row == meta.row + meta.rows or self.offsets[row] != offset or self.sizes[row] != [*box.sizes, *(1,) * more]:
            return None
        return row


class RangedTable(PageTable):
    """The same for a page that is fetched row by row: views, since what is there changes."""

    partial = True

    def __init__(self, chunks: ChunkRows, alternatives: Sequence[Places]) -> None:
        places = alternatives[0]
        self.source = places.source.data
        self.start = places.start.data
        self.length = places.length.data
        self.codec = places.codec.data
        self.digests = b"" if chunks.digest is None else chunks.digest.reshape(-1).data
        self.block = [] if chunks.block is None else chunks.block.data
        self.block_digests = b"" if chunks.block_digest is None else chunks.block_digest.reshape(-1).data

    def find(self, meta: TensorMeta, box: Box) -> int | None:
        if meta.grid is None:
            return None
        cell = grid_of(meta.grid).find(box)
        return None if cell is None else meta.row + cell


def _spans(pieces: list[Piece]) -> list[list[Piece]]:
    """Group sorted pieces that are close together into tasks of at most SPAN bytes, little of which is not wanted."""
    tasks: list[list[Piece]] = []
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
    if _gap(chunk, local) * itemsize <= block_size:
        # no block lies between two wanted elements
        span = max(SPAN - SPAN % block_size, block_size)
        return [(at, min(at + span, last)) for at in range(first, last, span)]
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


def _gap(chunk: Box, local: Box) -> int:
    """Elements at most between two wanted elements that follow each other in a chunk."""
    for dim, size in enumerate(local.sizes):
        if size > 1:
            return math.prod(chunk.sizes[dim + 1 :])
    return 0
