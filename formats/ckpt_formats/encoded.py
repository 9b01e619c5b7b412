"""Chunks that are stored with a codec: where in a byte source their blocks lie, and which of them are damaged.

What reading and verifying share. Knows positions and digests, which codecs do not, and no tensors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from ckpt_formats.arrays import UInt8Array
from ckpt_formats.codecs import BlockError, BlockTable, decode_block, table_size
from ckpt_formats.digest import digest
from ckpt_formats.errors import CorruptionError
from ckpt_formats.sources import ByteSource

CACHED = 256
"""Tables of chunks that are kept while parts of these chunks are read."""


class EncodedChunk(NamedTuple):
    """Where an encoded chunk is stored, and what it decodes to."""

    start: int
    """Position of its first stored byte in the source."""
    length: int
    """Bytes stored there."""
    nbytes: int
    """Bytes of the chunk, decoded."""
    block_size: int
    word: int
    """See codecs.word_size."""

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.nbytes // self.block_size)

    def decoded(self, block: int) -> int:
        """Bytes of a block, decoded."""
        return min(self.block_size, self.nbytes - block * self.block_size)

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def table(self) -> int:
        """Position of its table of blocks, which ends where it ends."""
        return self.stop - table_size(self.nbytes, self.block_size)

    def read_table(self, source: ByteSource) -> BlockTable:
        """Its table. Raises CorruptionError if it can't be read, BlockError if it is not one."""
        data = memoryview(bytearray(self.stop - self.table))
        source.read(self.table, self.stop, data)
        return self.parse(data)

    def parse(self, table: memoryview) -> BlockTable:
        """Its table from the table's bytes. Raises BlockError."""
        return BlockTable(table, self.length, self.nbytes, self.block_size, self.word)


class Tables:
    """The tables of the chunks that were read last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int], BlockTable] = OrderedDict()

    def get(self, number: int, source: ByteSource, chunk: EncodedChunk) -> BlockTable:
        """The table of a chunk in the source of that number. Raises CorruptionError, BlockError."""
        key = (number, chunk.start)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = chunk.read_table(source)
            with self._lock:
                self._known[key] = known
                while len(self._known) > CACHED:
                    self._known.popitem(last=False)
        return known


def damaged_blocks(
    source: ByteSource, chunk: EncodedChunk, digests: UInt8Array, span: int
) -> Iterator[tuple[int, int, CorruptionError | BlockError]]:
    """Read and decode all of a chunk; what is wrong, with its first byte and the byte after its last in the source.

    Args:
        source: where it is.
        chunk: what it claims to be.
        digests: [blocks, 16] the digests of its blocks, decoded.
        span: bytes to read at once, if they are not a single block.
    """
    try:
        table = chunk.read_table(source)
    except (CorruptionError, BlockError) as error:
        # without it no block can be found
        yield chunk.start, chunk.stop, error
        return
    decoded = memoryview(bytearray(min(chunk.block_size, chunk.nbytes)))
    buffer = memoryview(b"")
    ends = table.ends.tolist()
    for first, last in table.runs(span):
        start, stop = chunk.start + ends[first], chunk.start + ends[last]
        if len(buffer) < stop - start:
            buffer = memoryview(bytearray(stop - start))
        try:
            source.read(start, stop, buffer[: stop - start])
        except CorruptionError as error:
            yield start, stop, error
            continue
        for block in range(first, last):
            low, high = chunk.start + ends[block], chunk.start + ends[block + 1]
            into = decoded[: chunk.decoded(block)]
            try:
                decode_block(buffer[low - start : high - start], table.check(block), chunk.word, into)
                if digest(into) != digests[block].tobytes():
                    raise BlockError("what it decodes to does not fit its checksum")
            except BlockError as error:
                yield low, high, error
