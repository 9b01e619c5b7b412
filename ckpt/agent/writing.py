"""Writing a captured slot as a data file: digests over its chunks, direct writes straight from the arena.

The slot holds the file as it will be, header and padding included, so nothing is copied. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ckpt.storage.data_file import BUFFER, WRITERS, WrittenFile
from ckpt.storage.files import ALIGNMENT, Files
from ckpt_formats.digest import BLOCK_SIZE, block_digests, combine, digest, hexdigest
from ckpt_formats.geometry import Box
from ckpt_formats.native import index
from ckpt_formats.native.index import IndexRows


class CapturedChunk(NamedTuple):
    """A chunk as it lies in a slot."""

    name: str
    box: Box
    start: int
    """From the beginning of the slot, which is the beginning of the file."""
    nbytes: int


class CapturedFile(NamedTuple):
    """A data file as it lies in a slot."""

    path: str
    """Relative to the checkpoint's folder."""
    header: int
    """Bytes of its header."""
    size: int
    """Bytes of the whole."""
    chunks: Sequence[CapturedChunk]


def write_captured(files: Files, folder: str, captured: CapturedFile, slot: memoryview) -> WrittenFile:
    """Write a captured file and sync it.

    Raises:
        OSError: writing failed; the file may be there in part, and nothing refers to it.
    """
    size = captured.size
    with (
        files.create(f"{folder}/{captured.path}", direct=size >= ALIGNMENT) as file,
        ThreadPoolExecutor(WRITERS, thread_name_prefix="ckpt-write") as pool,
    ):
        end = -(-size // ALIGNMENT) * ALIGNMENT if file.direct else size
        writes = [pool.submit(file.write, slot[at : min(at + BUFFER, end)], at) for at in range(0, end, BUFFER)]
        rows = _rows(captured.chunks, slot)
        for write in writes:
            write.result()
        if end != size:
            file.truncate(size)
        file.sync()
    return WrittenFile(captured.path, size, captured.header, hexdigest(slot[: captured.header]), rows)


def _rows(chunks: Sequence[CapturedChunk], slot: memoryview) -> IndexRows:
    digests: list[bytes] = []
    block: list[int] = []
    more: list[bytes] = []
    for chunk in chunks:
        data = slot[chunk.start : chunk.start + chunk.nbytes]
        if chunk.nbytes <= BLOCK_SIZE:
            digests.append(digest(data))
            block.append(-1)
        else:
            parts = block_digests(data, BLOCK_SIZE)
            digests.append(combine(parts))
            block.append(len(more))
            more.extend(parts)
    return index.build(
        [chunk.box for chunk in chunks],
        [chunk.start for chunk in chunks],
        [chunk.nbytes for chunk in chunks],
        digests,
        block,
        more,
    )
