"""Writing a captured slot as a data file: digests over its chunks, direct writes by threads.

The slot holds the file as it will be, header and padding included. Direct writes go by way of staging buffers, which
are in huge pages: from the small pages of shared memory they took 1.4 times as long on the disk that we measured. What
is copied there is hashed while the cache has it, and written by threads. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from ckpt.storage.data_file import BUFFER, Staging, WrittenFile, writers
from ckpt.storage.files import ALIGNMENT, Files
from ckpt_formats.digest import BLOCK_SIZE, Hasher, combine, digest
from ckpt_formats.geometry import Box
from ckpt_formats.native import index
from ckpt_formats.native.index import IndexRows


class CapturedChunk(NamedTuple):
    """A chunk as it lies in a slot."""

    name: str
    box: Box
    start: int
    """From the beginning of the file."""
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    """Global shape of its tensor."""


class CapturedFile(NamedTuple):
    """A data file as it lies in a slot."""

    path: str
    """Relative to the checkpoint's folder."""
    header: int
    """Bytes of its header."""
    size: int
    """Bytes of the whole."""
    chunks: Sequence[CapturedChunk]


class Captured:
    """The bytes of a chunk in a slot."""

    def __init__(self, memory: memoryview, start: int) -> None:
        self._memory = memory
        self._start = start

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop."""
        source = self._memory[self._start + start : self._start + stop]
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))


class FileWriter:
    """Writes one captured file, in one piece or in several, from the first byte to the last; a `with` block."""

    def __init__(self, files: Files, folder: str, captured: CapturedFile, staging: Staging) -> None:
        """Create the file. Raises OSError."""
        self._captured = captured
        self._staging = staging
        self._digests = _Digests(captured)
        self._file = files.create(f"{folder}/{captured.path}", direct=captured.size >= ALIGNMENT)
        self._pool = ThreadPoolExecutor(writers(self._file), thread_name_prefix="ckpt-write")
        self._writes: list[Future[None]] = []
        self._at = 0

    def write(self, memory: memoryview, nbytes: int, *, keeps: bool = False) -> None:
        """Write the next bytes: those of `memory`, which goes on to the end of its last page.

        Every piece but the last is a multiple of ALIGNMENT. With `keeps`, the memory keeps them until a call without
        it has returned, and they may be written until then. Raises OSError, also for what came before.
        """
        if self._file.direct:
            self._write_staged(memory, nbytes)
        else:
            self._write_as_it_lies(memory, nbytes)
        self._at += nbytes
        self._reap(wait=not keeps and not self._file.direct)

    def _write_staged(self, memory: memoryview, nbytes: int) -> None:
        """When this returns, the memory is not needed any more."""
        end = -(-nbytes // ALIGNMENT) * ALIGNMENT
        for low in range(0, end, self._staging.size):
            data = np.frombuffer(memory[low : min(low + self._staging.size, end)], np.uint8)
            at = self._at + low
            buffer = self._staging.acquire()
            try:
                staged = buffer[: len(data)]
                room = np.frombuffer(staged, np.uint8)
                for start in range(0, len(data), BLOCK_SIZE):
                    stop = min(start + BLOCK_SIZE, len(data))
                    # numpy copies without the interpreter lock
                    np.copyto(room[start:stop], data[start:stop])
                    self._digests.feed(at + start, staged[start : min(stop, nbytes - low)])
                write = self._pool.submit(self._write_buffer, buffer, staged, at)
            except BaseException:
                self._staging.release(buffer)
                raise
            self._writes.append(write)
            self._reap()

    def _write_buffer(self, buffer: memoryview, staged: memoryview, at: int) -> None:
        """On a thread of the pool."""
        try:
            self._file.write(staged, at)
        finally:
            self._staging.release(buffer)

    def _write_as_it_lies(self, memory: memoryview, nbytes: int) -> None:
        self._writes += [
            self._pool.submit(self._file.write, memory[low : min(low + BUFFER, nbytes)], self._at + low)
            for low in range(0, nbytes, BUFFER)
        ]
        self._digests.feed(self._at, memory[:nbytes])

    def _reap(self, *, wait: bool = False) -> None:
        """Raise what a write has raised; of all of them with `wait`, else of those that have ended."""
        left = []
        for write in self._writes:
            if wait or write.done():
                write.result()
            else:
                left.append(write)
        self._writes = left

    def finish(self) -> WrittenFile:
        """Sync the file, and say what is in it. Raises OSError."""
        captured = self._captured
        self._reap(wait=True)
        if self._at != captured.size:
            raise AssertionError(f"{captured.path}: {self._at} of {captured.size} bytes were written")
        if self._file.direct and captured.size % ALIGNMENT:
            self._file.truncate(captured.size)
        self._file.sync()
        header, rows = self._digests.finish()
        return WrittenFile(captured.path, captured.size, captured.header, header, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # nothing is cancelled: a write gives its buffer back, and there are few
        self._pool.shutdown(wait=True)
        self._file.close()


class _Digests:
    """Digests of a file's header, chunks and blocks, of bytes that come in order, in pieces that may part a block."""

    def __init__(self, captured: CapturedFile) -> None:
        self._captured = captured
        self._header = Hasher()
        self._next = 0
        """The first chunk that is not complete."""
        self._blocks: list[bytes] = []
        """Of that chunk."""
        self._block: Hasher | None = None
        """The part of its next block that was there."""
        self._digests: list[bytes] = []
        self._first: list[int] = []
        self._more: list[bytes] = []

    def feed(self, at: int, data: memoryview) -> None:
        """Take the bytes from position `at` on."""
        end = at + len(data)
        header, chunks = self._captured.header, self._captured.chunks
        if at < header:
            self._header.update(data[: min(end, header) - at])
        while self._next < len(chunks):
            chunk = chunks[self._next]
            stop = chunk.start + chunk.nbytes
            if chunk.start > end or (chunk.start == end and chunk.nbytes):
                break
            self._feed_chunk(chunk, at, data, max(chunk.start, at), min(stop, end))
            if stop > end:
                break
            self._close()

    def _feed_chunk(self, chunk: CapturedChunk, at: int, data: memoryview, low: int, high: int) -> None:
        """Take the part low..high of a chunk."""
        stop = chunk.start + chunk.nbytes
        while low < high:
            block_stop = min(low - (low - chunk.start) % BLOCK_SIZE + BLOCK_SIZE, stop)
            part_stop = min(block_stop, high)
            part = data[low - at : part_stop - at]
            if self._block is None and part_stop == block_stop:
                self._blocks.append(digest(part))
            else:
                self._block = self._block or Hasher()
                self._block.update(part)
                if part_stop == block_stop:
                    self._blocks.append(self._block.digest())
                    self._block = None
            low = part_stop

    def _close(self) -> None:
        """The chunk is complete."""
        blocks = self._blocks
        if len(blocks) <= 1:
            self._digests.append(blocks[0] if blocks else digest(b""))
            self._first.append(-1)
        else:
            self._digests.append(combine(blocks))
            self._first.append(len(self._more))
            self._more.extend(blocks)
        self._blocks = []
        self._next += 1

    def finish(self) -> tuple[str, IndexRows]:
        """The header's digest, and the rows of the index."""
        chunks = self._captured.chunks
        rows = index.build(
            [chunk.box for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.nbytes for chunk in chunks],
            self._digests,
            self._first,
            self._more,
        )
        return self._header.hexdigest(), rows
