"""Codecs: how the stored bytes of a chunk become its bytes. docs/format.md, "Codecs".

A codec is found by name in this table and nowhere else; nothing that a file names is imported. Knows no files: blocks
and tables of blocks are bytes here.

`exponent-zstd` is lossless and made for trained floating-point numbers: their exponents are far from evenly spread, and
signs and mantissas noise that no compressor shrinks. So each number is turned by a bit, which brings the sign down and
the exponent into the most significant byte, and only that byte goes through zstd, with settings that spend next to no
time on looking for repetitions (minimum match 7, 64 hash entries), which leaves its entropy coder; the rest is stored
as it is. That splitting pays is ZipNN's observation (arXiv:2411.05239); benchmarks/compression.py prints ratios and
speeds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard

from ckpt_formats.arrays import AnyArray, Buffer, Int64Array
from ckpt_formats.digest import digest
from ckpt_formats.dtypes import DType
from ckpt_formats.errors import UnknownCodecError

RAW = "raw"
EXPONENT_ZSTD = "exponent-zstd"
KNOWN = (RAW, EXPONENT_ZSTD)
"""Codecs that this release reads and writes, in the order in which it numbers them when it writes."""

TABLE_ROW = 8
"""Bytes of a chunk's table for each of its blocks: length and check, 4 bytes each."""

_TABLE_DTYPE = np.dtype([("length", "<u4"), ("check", "V4")])
_WINDOW = 8 << 20
"""The largest zstd window that a reader makes room for."""


def require_known(name: str, *, where: str, path: str) -> None:
    """Raise UnknownCodecError unless this release can decode chunks stored with codec `name`."""
    if name not in KNOWN:
        raise UnknownCodecError(
            f"{path}: {where} is stored with the codec {name!r}, which this release does not know "
            f"(it knows {', '.join(KNOWN)}); a newer release of anyckpt may read it",
            path=path,
        )


def word_size(dtype: DType) -> int:
    """Bytes of the numbers that `exponent-zstd` takes apart: 2, 4 or 8; 0 where it can't be used.

    They are the elements, of complex dtypes their real and imaginary parts.
    """
    size = dtype.itemsize // 2 if dtype.name.startswith("complex") else dtype.itemsize
    return size if size in (2, 4, 8) else 0


class _Contexts(threading.local):
    """Working memory, which threads can't share."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.uint8)
        self.compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters.from_level(
                1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, write_content_size=True
            )
        )
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)

    def scratch(self, nbytes: int, dtype: np.dtype[Any]) -> tuple[AnyArray, AnyArray]:
        """Two arrays of `nbytes` bytes, whatever is in them; memory that was touched before is four times as fast."""
        if len(self._scratch) < 2 * nbytes:
            self._scratch = np.empty(2 * nbytes, np.uint8)
        return self._scratch[:nbytes].view(dtype), self._scratch[nbytes : 2 * nbytes].view(dtype)


_contexts = _Contexts()


class BlockError(ValueError):
    """Stored bytes are not what the codec makes: damage or a lie. Says what is wrong; the caller knows where."""


class BlockTable:
    """Where the blocks of an encoded chunk lie.

    Attributes:
        ends: [n + 1] block k is stored in the bytes ends[k]..ends[k + 1], counted from the chunk's first stored byte.
    """

    def __init__(self, data: Buffer, length: int, nbytes: int, block_size: int, word: int) -> None:
        """Parse and check the table of a chunk.

        Args:
            data: the table, which is the end of the chunk's stored bytes: table_size(nbytes, block_size) bytes.
            length: stored bytes of the chunk, the table included.
            nbytes: bytes of the chunk.
            block_size: bytes of a block.
            word: word_size of its dtype.

        Raises:
            BlockError: a length is impossible for its block, or they do not add up.
        """
        rows = np.frombuffer(data, dtype=_TABLE_DTYPE)
        lengths = rows["length"].astype(np.int64)
        decoded = np.full(len(rows), block_size, dtype=np.int64)
        decoded[-1] = nbytes - (len(rows) - 1) * block_size
        if (lengths > decoded).any() or (lengths <= decoded - decoded // word).any():
            raise BlockError("the table of its blocks has a length that no block can have")
        if int(lengths.sum()) != length - len(data):
            raise BlockError("the lengths in the table of its blocks do not add up")
        self.ends: Int64Array = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._checks = rows["check"].tobytes()

    def runs(self, limit: int) -> Iterator[tuple[int, int]]:
        """All blocks in runs first..last of at most `limit` stored bytes, or of a single block."""
        first = 0
        while first < len(self.ends) - 1:
            last = int(np.searchsorted(self.ends, self.ends[first] + limit, side="right")) - 1
            last = max(last, first + 1)
            yield first, last
            first = last

    def check(self, block: int) -> bytes:
        """What the digest of a block's stored bytes must begin with: 4 bytes."""
        return self._checks[4 * block : 4 * block + 4]


def table_size(nbytes: int, block_size: int) -> int:
    """Bytes of the table of blocks at the end of an encoded chunk of `nbytes` bytes."""
    return -(-nbytes // block_size) * TABLE_ROW


def table_row(stored: Buffer) -> bytes:
    """The row of the table for a block with these stored bytes."""
    return len(stored).to_bytes(4, "little") + digest(stored)[:4]


def stored_bounds(nbytes: Int64Array, word: Int64Array, block_size: int) -> tuple[Int64Array, Int64Array]:
    """The least and the most stored bytes of encoded chunks of `nbytes` bytes: [n] each.

    At least all bytes but one in `word` are stored as they are, so what is claimed never exceeds what is there by much.
    """
    blocks = -(-nbytes // block_size)
    table = blocks * TABLE_ROW
    return nbytes - nbytes // word + blocks + table, nbytes + table


def encode_block(data: Buffer, word: int, into: memoryview) -> int:
    """Encode a block of whole words into `into`, which has room for as many bytes; returns the length stored there.

    A block that does not shrink is stored as it is, which its length tells. Safe to call from several threads.
    """
    nbytes = len(data)
    target = np.frombuffer(into, np.uint8)
    values = np.frombuffer(data, np.dtype(f"<u{word}"))
    turned, shifted = _contexts.scratch(nbytes, values.dtype)
    np.left_shift(values, 1, out=turned)
    np.right_shift(values, 8 * word - 1, out=shifted)
    np.bitwise_or(turned, shifted, out=turned)
    plain = nbytes - nbytes // word
    for skip, unit, at in _parts(nbytes, word):
        # casting to fewer bytes cuts what is above
        part = turned if skip == 0 else np.right_shift(turned, 8 * skip, out=shifted)
        size = len(values) * unit
        np.copyto(target[at : at + size].view(np.dtype(f"<u{unit}")), part, casting="unsafe")
    # the exponents come last, where there is still room for them as they are
    frame = _contexts.compressor.compress(target[plain:nbytes].data)
    if plain + len(frame) < nbytes:
        into[plain : plain + len(frame)] = frame
        return plain + len(frame)
    np.copyto(target[:nbytes], np.frombuffer(data, np.uint8))
    return nbytes


def decode_block(stored: Buffer, check: bytes, word: int, into: memoryview) -> None:
    """Decode the stored bytes of a block into all of `into`, whose length is that of the block.

    Never makes more bytes than that, whatever the stored ones say. Safe to call from several threads.

    Raises:
        BlockError: the stored bytes do not fit their check, or are not what encode_block makes.
    """
    if digest(stored)[:4] != check:
        raise BlockError("the stored bytes do not fit their checksum")
    nbytes = len(into)
    source = np.frombuffer(stored, np.uint8)
    if len(source) == nbytes:
        np.copyto(np.frombuffer(into, np.uint8), source)
        return
    values = np.frombuffer(into, np.dtype(f"<u{word}"))
    turned, shifted = _contexts.scratch(nbytes, values.dtype)
    exponents = np.frombuffer(_decompress(memoryview(stored)[nbytes - nbytes // word :], len(values)), np.uint8)
    for skip, unit, at in _parts(nbytes, word):
        part = exponents if skip == word - 1 else source[at : at + len(values) * unit].view(np.dtype(f"<u{unit}"))
        if skip == 0:
            np.copyto(turned, part)
        else:
            np.copyto(shifted, part)
            np.left_shift(shifted, 8 * skip, out=shifted)
            np.bitwise_or(turned, shifted, out=turned)
    np.left_shift(turned, 8 * word - 1, out=shifted)
    np.right_shift(turned, 1, out=turned)
    np.bitwise_or(turned, shifted, out=values)


def _parts(nbytes: int, word: int) -> list[tuple[int, int, int]]:
    """How words are taken apart: the low half of each, the low half of what is left, …, and the last byte.

    (bytes of the word below the part, bytes of the part, where in an encoded block the parts of all words begin)
    """
    parts = []
    skip, unit = 0, word // 2
    while unit:
        parts.append((skip, unit, nbytes // word * skip))
        skip += unit
        unit //= 2
    return [*parts, (skip, 1, nbytes // word * skip)]


def _decompress(frame: memoryview, size: int) -> bytes:
    """The content of the one zstd frame, which must be `size` bytes. Raises BlockError."""
    try:
        # the library allocates what the frame claims
        if zstandard.get_frame_parameters(frame).content_size != size:
            raise BlockError("its zstd frame is not of the length that the block has")
        content: bytes = _contexts.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BlockError(f"its zstd frame can't be decompressed ({error})") from None
    if len(content) != size:
        raise BlockError("its zstd frame does not have the length that it claims")
    return content
