"""Checking data files span by span: bytes that are read at once, each segment against its digest.

A span is checked by one thread, touches nothing shared, and tells what it found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ckpt_formats.codecs import RAW, word_size
from ckpt_formats.damage import Damage, unreadable
from ckpt_formats.digest import Hasher, digest
from ckpt_formats.encoded import EncodedChunk, damaged_blocks
from ckpt_formats.errors import CorruptionError
from ckpt_formats.native.regions import ChunkAt, Segment
from ckpt_formats.sources import ByteSource, InMemory

SPAN = 8 << 20
"""Bytes that a thread reads at once, and the size of its buffer."""


class Span(NamedTuple):
    """Segments of one file without gaps between them, together no longer than SPAN unless it is a single one."""

    file: str
    """Its path in the checkpoint."""
    source: ByteSource
    available: int
    """Bytes that the file really has."""
    block_size: int
    """Of the checkpoint's digests."""
    segments: list[Segment]

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def stop(self) -> int:
        return self.segments[-1].stop

    @property
    def there(self) -> int:
        """How many of its bytes the file has."""
        return min(self.stop, self.available) - min(self.start, self.available)


def cut(file: str, source: ByteSource, available: int, block_size: int, segments: Iterable[Segment]) -> Iterator[Span]:
    """All segments of a file, which come in order of position."""
    run: list[Segment] = []
    for segment in segments:
        if run and (segment.start != run[-1].stop or segment.stop - run[0].start > SPAN):
            yield Span(file, source, available, block_size, run)
            run = []
        run.append(segment)
    if run:
        yield Span(file, source, available, block_size, run)


def check(span: Span, buffer: memoryview) -> list[Damage]:
    """What is wrong with a span's segments, read into `buffer` of SPAN bytes."""
    start, stop = span.start, span.stop
    together = stop - start <= SPAN and stop <= span.available
    if together:
        try:
            span.source.read(start, stop, buffer[: stop - start])
        except CorruptionError:
            together = False  # perhaps only a part of it can't be read
    found: list[Damage] = []
    for segment in span.segments:
        if segment.chunk is not None and segment.chunk.codec != RAW:
            whole = buffer[segment.start - start : segment.stop - start] if together else None
            found.extend(_check_encoded(span, segment.chunk, whole))
            continue
        if together:
            data = buffer[segment.start - start : segment.stop - start]
            what = None if _fits(data, segment.digest) else _misfit(segment)
        else:
            what = _check_alone(span, segment, buffer)
        if what is not None:
            found.append(damage_at(span.file, what, segment.start, segment.stop, segment.chunk))
    return found


def _check_encoded(span: Span, chunk: ChunkAt, whole: memoryview | None) -> Iterator[Damage]:
    """What is wrong with a chunk that has a codec; `whole` are its stored bytes if they were read before."""
    path = span.file
    if chunk.stop > span.available:
        what = f"is missing: the file ends at byte {span.available}"
        yield damage_at(path, what, chunk.start, chunk.stop, chunk)
        return
    nbytes = chunk.box.numel * chunk.meta.dtype.itemsize
    word = word_size(chunk.meta.dtype)
    stored = EncodedChunk(chunk.start, chunk.stop - chunk.start, nbytes, span.block_size, word)
    first = int(chunk.rows.block[chunk.row])
    if first < 0:
        digests = chunk.rows.digest[chunk.row : chunk.row + 1]
    else:
        digests = chunk.rows.block_digest[first : first + stored.blocks]
    source = span.source if whole is None else InMemory(span.source.name, whole, chunk.start)
    for start, stop, error in damaged_blocks(source, stored, digests, SPAN):
        what = unreadable(error) if isinstance(error, CorruptionError) else f"can't be decoded: {error}"
        yield damage_at(path, what, start, stop, chunk)


def _fits(data: memoryview, expected: bytes | None) -> bool:
    if expected is None:
        return not np.frombuffer(data, np.uint8).any()
    return digest(data) == expected


def _misfit(segment: Segment) -> str:
    return "is padding, but not all zero" if segment.digest is None else "does not fit its checksum"


def _check_alone(span: Span, segment: Segment, buffer: memoryview) -> str | None:
    """What is wrong with a segment that is too large to be read at once, or could not be read with its neighbours."""
    if segment.stop > span.available:
        return None if segment.chunk is None else f"is missing: the file ends at byte {span.available}"
    hasher = Hasher()
    zero = True
    for start in range(segment.start, segment.stop, len(buffer)):
        data = buffer[: min(len(buffer), segment.stop - start)]
        try:
            span.source.read(start, start + len(data), data)
        except CorruptionError as error:
            return unreadable(error)
        if segment.digest is None:
            zero = zero and _fits(data, None)
        else:
            hasher.update(data)
    fits = zero if segment.digest is None else hasher.digest() == segment.digest
    return None if fits else _misfit(segment)


def damage_at(file: str, what: str, start: int, stop: int, chunk: ChunkAt | None) -> Damage:
    """Damage to bytes of a chunk, or of none."""
    if chunk is None:
        return Damage(file, what, start, stop)
    return Damage(file, what, start, stop, chunk.meta.name, chunk.box)
