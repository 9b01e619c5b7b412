"""Writing one data file: chunks laid out, copied through aligned buffers, digested on the way, written directly.

The bytes are hashed block by block right after they were copied, while the cache has them; full buffers are written by
threads in the meantime. Knows no ranks and no manifest: it returns the rows that go to the index.

With `compress`, chunks are encoded on the way (compressing.py). What they come to is known only then, so the header is
written last, into room that was left for the longest that it can be.

Aligned direct writes were three times as fast as buffered ones plus fsync on the disks that we measured, at a tenth of
the CPU time (benchmarks/save_load.py prints both).
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from ckpt.storage.compressing import Readable, blocks_of, is_compressed
from ckpt.storage.files import ALIGNMENT, File, Files
from ckpt_formats.arrays import Buffer
from ckpt_formats.codecs import EXPONENT_ZSTD, KNOWN, RAW, table_row, table_size
from ckpt_formats.digest import BLOCK_SIZE, Hasher, combine, digest, hexdigest
from ckpt_formats.dtypes import DType
from ckpt_formats.geometry import Box
from ckpt_formats.memory import scratch
from ckpt_formats.native import index
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.names import chunk_key
from ckpt_formats.safetensors_file import LARGE, FileLayout, header_bound, lay_out

BUFFER = 8 << 20
"""Bytes of one staging buffer, and of one write."""
BUFFERS = 4
"""Staging buffers of one process; they bound how far copying runs ahead of writing."""
WRITERS = 2
"""Threads that write directly; more were not faster on the disks that we measured."""


def writers(file: File) -> int:
    """How many threads write to a file: file systems let one writer at a time into a file's cached pages."""
    return WRITERS if file.direct else 1


class Chunk(NamedTuple):
    """A chunk to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    """Global shape of its tensor."""
    box: Box
    source: Readable

    @property
    def nbytes(self) -> int:
        return math.prod(self.box.sizes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file that is on stable storage: what the root and the index say of it.

    `rows.file` is 0 throughout; whoever merges the rows of several files raises it.
    """

    path: str
    size: int
    header: int
    digest: str
    rows: IndexRows


class Staging:
    """Page-aligned buffers that are made once and used for one save after the other.

    Copying into memory that was never touched costs about four times as much as into memory that was.
    """

    def __init__(self, count: int = BUFFERS, size: int = BUFFER) -> None:
        self.size = size
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unmade = count

    def acquire(self) -> memoryview:
        """A buffer; waits for one to be released when all are in use."""
        with self._lock:
            makes = self._unmade > 0 and self._free.empty()
            self._unmade -= makes
        return scratch(self.size) if makes else self._free.get()

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        self._free.put(buffer)


def layout_of(chunks: Sequence[Chunk]) -> FileLayout:
    """Where each chunk will lie in a file that holds them in this order."""

    def entries() -> list[tuple[str, str, Sequence[int], int, int]]:
        result: list[tuple[str, str, Sequence[int], int, int]] = []
        for name, dtype, shape, box, _ in chunks:
            nbytes = box.numel * dtype.itemsize
            key = chunk_key(name, box, shape)
            if dtype.safetensors is None:
                result.append((key, "U8", (nbytes,), nbytes, dtype.itemsize))
            else:
                result.append((key, dtype.safetensors, box.sizes, nbytes, dtype.itemsize))
        return result

    return lay_out(entries())


def write_data_file(
    files: Files,
    folder: str,
    path: str,
    chunks: Sequence[Chunk],
    staging: Staging,
    *,
    compress: bool = False,
    layout: FileLayout | None = None,
) -> WrittenFile:
    """Write chunks as the file `path` in a checkpoint's `folder` and sync it; the folder is the caller's to sync.

    Args:
        compress: store chunks with the codec `exponent-zstd` where it can be used; `rows.codec` counts in codecs.KNOWN.
        layout: what `layout_of` said of these chunks, if it was asked before; of no use to `compress`.

    Raises:
        OSError: writing failed; the file may be there in part, and nothing refers to it.
    """
    if compress:
        return _write_compressed(files, folder, path, chunks, staging)
    layout = layout or layout_of(chunks)
    with files.create(f"{folder}/{path}", direct=layout.size >= ALIGNMENT) as file:
        stream = _Stream(file, staging)
        try:
            rows = _write_chunks(stream, layout, chunks)
            stream.finish(layout.size)
        finally:
            stream.close()
        file.sync()
    return WrittenFile(path, layout.size, len(layout.header), hexdigest(layout.header), rows)


class _Stream:
    """The file as one long run of bytes, of which a window, the current buffer, can be filled."""

    def __init__(self, file: File, staging: Staging, base: int = 0) -> None:
        """`base`: where in the file it begins, a multiple of ALIGNMENT."""
        self._file = file
        self._staging = staging
        self._pool: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []
        self._base = base
        self._buffer = staging.acquire()
        self._held = True
        self.window = self._buffer
        self.at = 0
        """Bytes of the window that are filled."""

    def room(self) -> int:
        """Bytes that can be filled now; never 0."""
        if self.at == len(self.window):
            self._flush()
        return len(self.window) - self.at

    def fill(self, data: Buffer) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            count = min(self.room(), len(view))
            self.window[self.at : self.at + count] = view[:count]
            self.at += count
            view = view[count:]

    def _flush(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(writers(self._file), thread_name_prefix="ckpt-write")
        self._writes.append(self._pool.submit(self._write, self._buffer, self._base, self.at))
        self._held = False  # the writer has it now, and gives it back
        for write in [write for write in self._writes if write.done()]:
            self._writes.remove(write)
            write.result()
        self._base += self.at
        self._buffer = self._staging.acquire()
        self._held = True
        self.window = self._buffer
        self.at = 0

    def _write(self, buffer: memoryview, base: int, length: int) -> None:
        try:
            self._file.write(buffer[:length], base)
        finally:
            self._staging.release(buffer)

    def finish(self, size: int) -> None:
        """Write the rest and wait for all of it; the file then has `size` bytes."""
        length = self.at
        if self._file.direct:
            length = -(-length // ALIGNMENT) * ALIGNMENT
            self.window[self.at : length] = bytes(length - self.at)
        if length:
            self._file.write(self.window[:length], self._base)
        for write in self._writes:
            write.result()
        self._writes.clear()
        if length != self.at:
            self._file.truncate(size)

    def begin(self, header: bytes) -> None:
        """Write what lies before `base`, once all the rest is written; its length is a multiple of ALIGNMENT."""
        size = len(self.window)
        for at in range(0, len(header), size):
            part = header[at : at + size]
            self.window[: len(part)] = part
            self._file.write(self.window[: len(part)], at)

    def close(self) -> None:
        """Wait for the threads and give the buffers back, whatever happened."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self._held:
            self._staging.release(self._buffer)
            self._held = False


def _write_chunks(stream: _Stream, layout: FileLayout, chunks: Sequence[Chunk]) -> IndexRows:
    stream.fill(layout.header)
    at = len(layout.header)
    digests: list[bytes] = []
    block: list[int] = []
    block_digests: list[bytes] = []
    lengths: list[int] = []
    for chunk, start in zip(chunks, layout.starts, strict=True):
        if start > at:
            stream.fill(bytes(start - at))
        nbytes = chunk.nbytes
        if nbytes <= BLOCK_SIZE and nbytes <= stream.room():
            filled = stream.at
            stream.at = filled + nbytes
            part = stream.window[filled : filled + nbytes]
            chunk.source.read(0, nbytes, part)
            digests.append(digest(part))
            block.append(-1)
        else:
            parts = _write_blocks(stream, chunk, nbytes)
            if len(parts) == 1:
                digests.append(parts[0])
                block.append(-1)
            else:
                digests.append(combine(parts))
                block.append(len(block_digests))
                block_digests.extend(parts)
        lengths.append(nbytes)
        at = start + nbytes
    return index.build([chunk.box for chunk in chunks], layout.starts, lengths, digests, block, block_digests)


def _write_blocks(stream: _Stream, chunk: Chunk, nbytes: int) -> list[bytes]:
    """Copy a chunk block by block, a block possibly in two windows; returns the digests of its blocks."""
    result: list[bytes] = []
    itemsize = chunk.dtype.itemsize
    for first in range(0, nbytes, BLOCK_SIZE):
        last = min(first + BLOCK_SIZE, nbytes)
        hasher = Hasher()
        at = first
        while at < last:
            count = min(stream.room(), last - at)
            if count % itemsize and count < last - at:
                # chunks begin at multiples of the element size and windows end at one, so this can't be
                raise AssertionError(f"element of {chunk.name!r} parted between two windows")
            part = stream.window[stream.at : stream.at + count]
            chunk.source.read(at, at + count, part)
            hasher.update(part)
            stream.at += count
            at += count
        result.append(hasher.digest())
    return result


def _write_compressed(files: Files, folder: str, path: str, chunks: Sequence[Chunk], staging: Staging) -> WrittenFile:
    header = header_bound(_entry(chunk, chunk.nbytes + table_size(chunk.nbytes, BLOCK_SIZE)) for chunk in chunks)
    with files.create(f"{folder}/{path}", direct=True) as file:
        stream = _Stream(file, staging, header)
        try:
            layout, rows = _write_encoded(stream, header, chunks)
            stream.finish(layout.size)
            stream.begin(layout.header)
        finally:
            stream.close()
        file.sync()
    return WrittenFile(path, layout.size, len(layout.header), hexdigest(layout.header), rows)


def _write_encoded(stream: _Stream, header: int, chunks: Sequence[Chunk]) -> tuple[FileLayout, IndexRows]:
    at = header
    starts: list[int] = []
    lengths: list[int] = []
    digests: list[bytes] = []
    block: list[int] = []
    block_digests: list[bytes] = []
    parts: list[bytes] = []
    table: list[bytes] = []
    codecs = [KNOWN.index(EXPONENT_ZSTD if is_compressed(chunk.dtype, chunk.nbytes) else RAW) for chunk in chunks]
    blocks = blocks_of((chunk.dtype, chunk.nbytes, chunk.source) for chunk in chunks)
    try:
        for number, stored, block_digest, last in blocks:
            if not parts:
                gap = -(at - header) % _alignment(chunks[number])
                stream.fill(bytes(gap))
                at += gap
                starts.append(at)
            stream.fill(stored)
            at += len(stored)
            parts.append(block_digest)
            if codecs[number]:
                table.append(table_row(stored))
            if not last:
                continue
            stream.fill(b"".join(table))
            at += sum(map(len, table))
            lengths.append(at - starts[-1])
            if len(parts) == 1:
                digests.append(parts[0])
                block.append(-1)
            else:
                digests.append(combine(parts))
                block.append(len(block_digests))
                block_digests.extend(parts)
            parts, table = [], []
    finally:
        blocks.close()
    entries = [_entry(chunk, length) for chunk, length in zip(chunks, lengths, strict=True)]
    layout = lay_out(entries, header)
    if layout.starts != starts or layout.size != at:
        raise AssertionError("the header says that chunks lie elsewhere than they were written")
    return layout, index.build([chunk.box for chunk in chunks], starts, lengths, digests, block, block_digests, codecs)


def _alignment(chunk: Chunk) -> int:
    return ALIGNMENT if chunk.nbytes >= LARGE else chunk.dtype.itemsize


def _entry(chunk: Chunk, stored: int) -> tuple[str, str, Sequence[int], int, int]:
    """What lay_out needs to know of a chunk with so many stored bytes."""
    key = chunk_key(chunk.name, chunk.box, chunk.shape)
    if chunk.dtype.safetensors is None or is_compressed(chunk.dtype, chunk.nbytes):
        return key, "U8", (stored,), stored, _alignment(chunk)
    return key, chunk.dtype.safetensors, chunk.box.sizes, stored, _alignment(chunk)
