"""Digests of chunks and blocks: XXH3-128, canonical form.

They find damage; they do not authenticate. Knows nothing of files or tensors. XXH3 is the fastest of the hashes that
were considered and releases the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from ckpt_formats.arrays import Buffer, UInt8Array

DIGEST_SIZE = 16
BLOCK_SIZE = 1 << 20
"""Bytes per block digest in checkpoints that this release writes."""

digest = xxhash.xxh3_128_digest
"""digest(buffer) -> 16 bytes."""

hexdigest = xxhash.xxh3_128_hexdigest
"""hexdigest(buffer) -> 32 lower-case hexadecimal digits."""

Hasher = xxhash.xxh3_128
"""Incremental form, for a block that arrives in parts."""


def combine(block_digests: Iterable[bytes]) -> bytes:
    """The digest of a chunk of several blocks: the digest of its blocks' digests."""
    return digest(b"".join(block_digests))


def block_digests(data: Buffer, block_size: int) -> list[bytes]:
    """Digests of each block of `block_size` bytes of data; the last block may be shorter. Empty data has none."""
    view = memoryview(data).cast("B")
    return [digest(view[at : at + block_size]) for at in range(0, len(view), block_size)]


def as_rows(digests: Iterable[bytes]) -> UInt8Array:
    """Digests as a uint8 array of shape [n, 16]."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_SIZE)
