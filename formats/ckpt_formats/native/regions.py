"""What every byte of a data file is: header, chunk or padding, by the index and by the file's own header.

For whoever walks whole files, as verifying does; loading goes the other way, from tensors to ranges. Knows no bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ckpt_formats.codecs import RAW
from ckpt_formats.geometry import Box
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.native import names
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.root import DataFile, Root
from ckpt_formats.safetensors_file import PAD_PREFIX, Entry


class ChunkAt(NamedTuple):
    """A chunk and where it lies in its file, as the index has it."""

    meta: TensorMeta
    box: Box
    start: int
    stop: int
    rows: IndexRows
    row: int
    codec: str


class Segment(NamedTuple):
    """Consecutive bytes of a file that are checked as one."""

    start: int
    stop: int
    digest: bytes | None
    """None for padding, which must be zero, and for chunks with a codec, whose blocks only their bytes tell."""
    chunk: ChunkAt | None


class Disagreement(NamedTuple):
    """Bytes of which the header of a file says something else than the index."""

    what: str
    start: int
    stop: int
    chunk: ChunkAt | None


class ChunkTable:
    """The chunks of every page that can be trusted, found by file, in order of position.

    Attributes:
        count: how many there are.
        complete: whether all pages can be trusted.
    """

    def __init__(self, root: Root, pages: Sequence[IndexRows | None]) -> None:
        """`pages`: the rows of each page, None where they can't be trusted."""
        self._block_size = root.block_size
        self._codecs = root.codecs
        self._pages = pages
        self._metas: list[list[TensorMeta]] = [[] for _ in pages]
        for meta in root.tensors.values():
            if meta.rows:
                self._metas[meta.page].append(meta)
        self._firsts = [np.array([meta.row for meta in metas], dtype=np.int64) for metas in self._metas]
        self.complete = all(page is not None for page in pages)
        known = [(number, page) for number, page in enumerate(pages) if page is not None]
        empty = np.empty(0, dtype=np.int64)
        file = np.concatenate([empty, *(page.file for _, page in known)])
        start = np.concatenate([empty, *(page.start for _, page in known)])
        order = np.lexsort((start, file))
        self._page = np.concatenate([empty, *(np.full(len(page), number) for number, page in known)])[order]
        self._row = np.concatenate([empty, *(np.arange(len(page)) for _, page in known)])[order]
        self._bounds = np.searchsorted(file[order], np.arange(len(root.files) + 1))
        self.count = len(order)

    def of_file(self, number: int) -> list[ChunkAt]:
        """The chunks of file `number`, in order of position."""
        chunks = []
        low, high = self._bounds[number : number + 2].tolist()
        for page_number, row in zip(self._page[low:high].tolist(), self._row[low:high].tolist(), strict=True):
            page = self._pages[page_number]
            if page is None:
                continue  # never: such pages have no rows in the table
            at = int(np.searchsorted(self._firsts[page_number], row, side="right")) - 1
            meta = self._metas[page_number][at]
            ndim = len(meta.shape)
            box = Box(tuple(page.offset[row, :ndim].tolist()), tuple(page.size[row, :ndim].tolist()))
            start = int(page.start[row])
            codec = self._codecs[int(page.codec[row])]
            chunks.append(ChunkAt(meta, box, start, start + int(page.length[row]), page, row, codec))
        return chunks

    def segments(self, file: DataFile, chunks: Sequence[ChunkAt], entries: Sequence[Entry] | None) -> Iterator[Segment]:
        """Everything of a file after its header that can be checked, in order of position.

        `entries` are those of its header, None when that can't be trusted. When pages are missing, bytes of chunks that
        only they know can't be told from padding but by the header.
        """
        if self.complete:
            paddings = _gaps(file, chunks)
        else:
            paddings = ((e.start, e.stop) for e in entries or [] if e.key.startswith(PAD_PREFIX))
        zeros = (Segment(start, stop, None, None) for start, stop in paddings)
        return heapq.merge(zeros, self._blocks(chunks), key=_start)

    def _blocks(self, chunks: Iterable[ChunkAt]) -> Iterator[Segment]:
        """What has a digest: whole chunks, or their blocks. Chunks with a codec as a whole."""
        size = self._block_size
        for chunk in chunks:
            if chunk.codec != RAW:
                yield Segment(chunk.start, chunk.stop, None, chunk)
                continue
            rows, row = chunk.rows, chunk.row
            block = int(rows.block[row])
            if block < 0:
                yield Segment(chunk.start, chunk.stop, rows.digest[row].tobytes(), chunk)
                continue
            for start in range(chunk.start, chunk.stop, size):
                yield Segment(start, min(start + size, chunk.stop), rows.block_digest[block].tobytes(), chunk)
                block += 1


def disagreements(entries: Iterable[Entry], chunks: Iterable[ChunkAt], *, complete: bool) -> Iterator[Disagreement]:
    """Where a file's header and the index differ about its chunks.

    `complete`: the whole index is known, so that it must list every entry that is not padding.
    """
    by_start = {chunk.start: chunk for chunk in chunks}
    for entry in entries:
        chunk = by_start.pop(entry.start, None) if entry.stop > entry.start else None
        if chunk is None:
            if complete and not entry.key.startswith(PAD_PREFIX):
                what = f"the header has an entry {entry.key!r} that the index does not list"
                yield Disagreement(what, entry.start, entry.stop, None)
            continue
        expected = _entry_of(chunk)
        if entry != expected:
            what = f"the header has {_text(entry)} here, but the index {_text(expected)}"
            yield Disagreement(what, chunk.start, chunk.stop, chunk)
    for chunk in by_start.values():
        yield Disagreement("the header has no entry for this chunk of the index", chunk.start, chunk.stop, chunk)


def _entry_of(chunk: ChunkAt) -> Entry:
    """The header entry that belongs to a chunk."""
    meta, box = chunk.meta, chunk.box
    key = names.chunk_key(meta.name, box, meta.shape)
    if meta.dtype.safetensors is None or chunk.codec != RAW:
        return Entry(key, "U8", (chunk.stop - chunk.start,), chunk.start, chunk.stop)
    return Entry(key, meta.dtype.safetensors, box.sizes, chunk.start, chunk.stop)


def _gaps(file: DataFile, chunks: Iterable[ChunkAt]) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are neither header nor chunk."""
    at = file.header
    for chunk in chunks:
        if chunk.start > at:
            yield at, chunk.start
        at = max(at, chunk.stop)
    if at < file.size:
        yield at, file.size


def _start(segment: Segment) -> int:
    return segment.start


def _text(entry: Entry) -> str:
    return f"{entry.key!r} {entry.dtype} {list(entry.shape)}"
