"""Compressing chunks on their way to a file: block by block, several at once, handed on in order.

Knows chunks and codecs, but neither the file nor where in it anything lies.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

from ckpt_formats.arrays import Buffer
from ckpt_formats.codecs import encode_block, word_size
from ckpt_formats.digest import BLOCK_SIZE, digest
from ckpt_formats.dtypes import DType
from ckpt_formats.errors import ConfigurationError

SMALL = 16 << 10
"""Chunks of fewer bytes are stored as they are: there is little to gain, and each costs its own call."""
COMPRESSORS = 4
"""Threads that compress, at most; one per CPU."""


Compress = bool | Literal["auto"]


def require_compress(compress: object, *, auto: bool) -> Compress:
    """Whether to compress; with `auto`, that may be left to the link. Raises ConfigurationError for what is neither."""
    if auto and isinstance(compress, str) and compress == "auto":
        return "auto"
    if isinstance(compress, str) or compress not in (True, False):
        known = 'True, False or "auto"' if auto else "True or False"
        raise ConfigurationError(f"compress={compress!r}: give {known}")
    return bool(compress)


class Readable(Protocol):
    """Where the bytes of a chunk come from: its elements in row-major order."""

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop of the chunk; both are multiples of the element size."""
        ...


class Block(NamedTuple):
    """A block of a chunk, ready to be stored."""

    chunk: int
    """Position of its chunk among those that were given."""
    stored: Buffer
    """Valid until the next one is asked for."""
    digest: bytes
    """Of its bytes before they were encoded."""
    last: bool
    """Whether it is the last one of its chunk."""


def is_compressed(dtype: DType, nbytes: int) -> bool:
    """Whether a chunk is stored with a codec rather than as it is."""
    return nbytes >= SMALL and word_size(dtype) > 0


def blocks_of(chunks: Iterable[tuple[DType, int, Readable]]) -> Generator[Block]:
    """The blocks of chunks (dtype, bytes, source), in order, encoded where the codec is worth it.

    Sources are read from the calling thread, one block after the other. Close the iterator, or exhaust it.
    """
    threads = min(COMPRESSORS, os.cpu_count() or 1)
    free = [memoryview(bytearray(2 * BLOCK_SIZE)) for _ in range(2 * threads)]
    waiting: deque[tuple[memoryview, Future[Block]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-compress") as pool:
        for number, (dtype, nbytes, source) in enumerate(chunks):
            word = word_size(dtype) if is_compressed(dtype, nbytes) else 0
            for start in range(0, nbytes, BLOCK_SIZE):
                stop = min(start + BLOCK_SIZE, nbytes)
                if not free:
                    buffer, encoded = waiting.popleft()
                    yield encoded.result()
                    free.append(buffer)
                buffer = free.pop()
                source.read(start, stop, buffer[: stop - start])
                waiting.append((buffer, pool.submit(_encode, buffer, stop - start, word, number, stop == nbytes)))
        for _, encoded in waiting:
            yield encoded.result()


def _encode(buffer: memoryview, nbytes: int, word: int, chunk: int, last: bool) -> Block:
    """Encode the first bytes of a buffer into its second half; runs in a thread of the pool."""
    data = buffer[:nbytes]
    if not word:
        return Block(chunk, data, digest(data), last)
    into = buffer[BLOCK_SIZE : BLOCK_SIZE + nbytes]
    return Block(chunk, into[: encode_block(data, word, into)], digest(data), last)
