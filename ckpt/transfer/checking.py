"""Checking the bytes of a checkpoint's file as they stream by: each piece against its digest, decoded if need be.

Verifying reads files to list all damage; this is for whoever passes the bytes on, and stops at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ckpt_formats.codecs import RAW, BlockError, decode_block, word_size
from ckpt_formats.digest import Hasher, digest
from ckpt_formats.encoded import EncodedChunk
from ckpt_formats.errors import CorruptionError, FormatError
from ckpt_formats.native.regions import ChunkAt, Segment
from ckpt_formats.sources import ByteSource

__all__ = ["Check", "Piece", "pieces"]


class Piece(NamedTuple):
    """Consecutive bytes of a file that are checked as one."""

    start: int
    stop: int
    digest: bytes | None
    """None for padding, which must be zero."""
    chunk: ChunkAt | None
    decode: Callable[[memoryview], memoryview] | None = None
    """What the bytes have to go through first, all at once; raises BlockError."""


def pieces(source: ByteSource, segments: Iterable[Segment], block_size: int) -> Iterator[Piece]:
    """The pieces of a file; chunks with a codec block by block, by their tables, which are read from the file first."""
    for start, stop, expected, chunk in segments:
        if chunk is None or chunk.codec == RAW:
            yield Piece(start, stop, expected, chunk)
        else:
            yield from _encoded_pieces(source, chunk, block_size)


def _encoded_pieces(source: ByteSource, chunk: ChunkAt, block_size: int) -> Iterator[Piece]:
    nbytes = chunk.box.numel * chunk.meta.dtype.itemsize
    word = word_size(chunk.meta.dtype)
    stored = EncodedChunk(chunk.start, chunk.stop - chunk.start, nbytes, block_size, word)
    first = int(chunk.rows.block[chunk.row])
    if first < 0:
        digests = chunk.rows.digest[chunk.row : chunk.row + 1]
    else:
        digests = chunk.rows.block_digest[first : first + stored.blocks]
    data = memoryview(bytearray(stored.stop - stored.table))
    source.read(stored.table, stored.stop, data)
    last = Piece(stored.table, stored.stop, digest(data), chunk)
    try:
        table = stored.parse(data)
    except BlockError:
        raise _damage(source.name, last) from None
    ends = table.ends.tolist()
    buffer = memoryview(bytearray(min(block_size, nbytes)))
    for block in range(stored.blocks):

        def decode(data: memoryview, block: int = block) -> memoryview:
            into = buffer[: stored.decoded(block)]
            decode_block(data, table.check(block), word, into)
            return into

        start, stop = stored.start + ends[block], stored.start + ends[block + 1]
        yield Piece(start, stop, digests[block].tobytes(), chunk, decode)
    yield last


class Check:
    """Bytes of a file, as they come, against the digests of its pieces."""

    def __init__(self, name: str, parts: Iterator[Piece]) -> None:
        """`name` is the file's, for messages; the pieces cover it without gaps."""
        self._name = name
        self._pieces = parts
        self._piece: Piece | None = None
        self._hasher = Hasher()
        self._gathered = bytearray()
        self._at = 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes. Raises CorruptionError as soon as a piece is complete and not what it should be."""
        while data:
            piece = self._current()
            part = data[: piece.stop - self._at]
            self._at += len(part)
            data = data[len(part) :]
            if not self._fits(piece, part):
                raise _damage(self._name, piece)
            if self._at == piece.stop:
                self._piece = None
                self._hasher.reset()
                self._gathered = bytearray()

    def _fits(self, piece: Piece, part: memoryview) -> bool:
        """Whether the bytes of a piece are right, as far as they have come; `part` are the last of them."""
        if piece.digest is None:
            return not np.frombuffer(part, np.uint8).any()
        whole = len(part) == piece.stop - piece.start
        if piece.decode is None:
            if whole:
                return digest(part) == piece.digest
            self._hasher.update(part)
            return self._at < piece.stop or self._hasher.digest() == piece.digest
        if not whole:
            self._gathered += part
            if self._at < piece.stop:
                return True
            part = memoryview(self._gathered)
        try:
            return digest(piece.decode(part)) == piece.digest
        except BlockError:
            return False

    def finish(self, size: int) -> None:
        """Raises CorruptionError unless the pieces were all there is."""
        if self._at != size or self._piece is not None:
            raise CorruptionError(f"{self._name}: ends within a chunk; use another checkpoint", path=self._name)

    def _current(self) -> Piece:
        if self._piece is None:
            piece = next(self._pieces, None)
            while piece is not None and piece.stop == piece.start:
                piece = next(self._pieces, None)
            if piece is None or piece.start != self._at:
                raise FormatError(
                    f"{self._name}: the index does not say what byte {self._at} is, or says it twice; the checkpoint "
                    "was written wrongly",
                    path=self._name,
                )
            self._piece = piece
        return self._piece


def _damage(name: str, piece: Piece) -> CorruptionError:
    chunk = piece.chunk
    of = f" of tensor {chunk.meta.name!r} {chunk.box}" if chunk is not None else ""
    what = "are padding, but not all zero" if piece.digest is None else "do not fit their checksum"
    return CorruptionError(
        f"{name}: bytes {piece.start} to {piece.stop}{of} {what}: the file is damaged. Nothing was committed; "
        "`ckpt verify` lists all damage. Restore the file or copy another checkpoint",
        path=name,
        tensor=chunk.meta.name if chunk is not None else None,
    )
