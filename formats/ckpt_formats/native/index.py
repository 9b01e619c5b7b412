"""Index pages: the chunk table of a native checkpoint, columns of fixed width. docs/format.md, "Index pages"."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_formats.arrays import AnyArray, Buffer, Int64Array, UInt8Array
from ckpt_formats.digest import BLOCK_SIZE, DIGEST_SIZE, as_rows, block_digests
from ckpt_formats.errors import FormatError
from ckpt_formats.geometry import Box
from ckpt_formats.safetensors_file import pack_columns, unpack_columns

PAGE_ROWS = 1 << 18
"""A page is closed once it has so many rows; a tensor's rows never straddle pages."""
LEAF = 4096
"""Bytes of a page per leaf digest: the least that is read, and verified, of a page that is read in part."""
PARTLY = 8
"""Chunks per tensor, on the average of a page, from which it pays to read pages in part."""


@dataclass(frozen=True, slots=True)
class IndexRows:
    """Rows of the chunk table: n chunks, boxes padded to D dimensions, and m block digests.

    The columns are those of docs/format.md.
    """

    offset: Int64Array
    size: Int64Array
    file: Int64Array
    start: Int64Array
    length: Int64Array
    codec: UInt8Array
    digest: UInt8Array
    block: Int64Array
    block_digest: UInt8Array

    def __len__(self) -> int:
        return len(self.offset)


def pack(rows: IndexRows) -> bytearray:
    """The rows as the bytes of an index page."""
    return pack_columns(_columns(rows))


def pack_with_leaves(rows: IndexRows) -> bytearray:
    """The same with a digest for each LEAF bytes at its end, for whoever reads it in part."""
    columns: dict[str, AnyArray] = _columns(rows)
    # the header must be as long as if they were there
    columns["leaf_digest"] = np.empty((0, DIGEST_SIZE), np.uint8)
    before = len(pack_columns(columns, header_only=True))
    while True:
        nbytes = before + sum(column.nbytes for column in columns.values()) - columns["leaf_digest"].nbytes
        count = -(-nbytes // LEAF)
        if len(columns["leaf_digest"]) == count:
            break
        columns["leaf_digest"] = np.zeros((count, DIGEST_SIZE), np.uint8)
        before = len(pack_columns(columns, header_only=True))
    data = pack_columns(columns)
    leaves = block_digests(memoryview(data)[:nbytes], LEAF)
    data[nbytes:] = b"".join(leaves)
    return data


def leaves_of(page_size: int) -> tuple[int, int]:
    """How many leaves a page of that size with leaf digests has, and where those digests begin, in bytes."""
    count = -(-page_size // (LEAF + DIGEST_SIZE))
    return count, page_size - count * DIGEST_SIZE


def pays_partly(rows: IndexRows, tensors: int) -> bool:
    """Whether a page of these rows should have leaf digests: where it is large, and mostly little of it is wanted."""
    nbytes = sum(column.nbytes for column in _columns(rows).values())
    return nbytes > BLOCK_SIZE and len(rows) >= PARTLY * tensors


def _columns(rows: IndexRows) -> dict[str, AnyArray]:
    return {
        "offset": rows.offset,
        "size": rows.size,
        "file": rows.file,
        "start": rows.start,
        "length": rows.length,
        "block": rows.block,
        "codec": rows.codec,
        "digest": rows.digest,
        "block_digest": rows.block_digest,
    }


def unpack(data: Buffer, what: str) -> IndexRows:
    """The rows of an index page: views into data.

    Only the form is checked: columns, their dtypes and lengths, non-negative numbers.

    Raises:
        FormatError: data are not an index page.
    """
    rows = rows_of(unpack_columns(data, what), what)
    require_numbers(rows, what)
    return rows


def rows_of(columns: Mapping[str, AnyArray], what: str) -> IndexRows:
    """The rows that these columns of an index page are; the numbers in them are not looked at.

    Raises:
        FormatError: columns are missing, of another type, or do not fit one another.
    """

    def column(name: str, dtype: type, ndim: int) -> AnyArray:
        array = columns.get(name)
        if array is None or array.dtype != np.dtype(dtype) or array.ndim != ndim:
            raise FormatError(f"{what}: column {name!r} is missing or has another type")
        return array

    rows = IndexRows(
        offset=column("offset", np.int64, 2),
        size=column("size", np.int64, 2),
        file=column("file", np.int64, 1),
        start=column("start", np.int64, 1),
        length=column("length", np.int64, 1),
        codec=column("codec", np.uint8, 1),
        digest=column("digest", np.uint8, 2),
        block=column("block", np.int64, 1),
        block_digest=column("block_digest", np.uint8, 2),
    )
    count = len(rows)
    vectors = (rows.size, rows.file, rows.start, rows.length, rows.codec, rows.digest, rows.block)
    if any(len(vector) != count for vector in vectors) or rows.size.shape != rows.offset.shape:
        raise FormatError(f"{what}: its columns differ in length")
    if rows.digest.shape[1] != DIGEST_SIZE or rows.block_digest.shape[1] != DIGEST_SIZE:
        raise FormatError(f"{what}: digests have {DIGEST_SIZE} bytes each")
    return rows


def require_numbers(rows: IndexRows, what: str) -> None:
    """Raise FormatError for numbers that no chunk can have, whatever the checkpoint."""
    if len(rows):
        if min(int(v.min(initial=0)) for v in (rows.offset, rows.file, rows.start, rows.length)) < 0:
            raise FormatError(f"{what}: a negative offset, position or length")
        if int(rows.size.min(initial=1)) < 1:
            raise FormatError(f"{what}: a box without elements")


def build(
    boxes: Sequence[Box],
    starts: Sequence[int],
    lengths: Sequence[int],
    digests: Sequence[bytes],
    block: Sequence[int],
    block_digest: Sequence[bytes],
    codec: Sequence[int] | None = None,
) -> IndexRows:
    """The rows of one data file (file 0), from what was noted while it was written; stored raw without `codec`."""
    ndim = max((len(box.sizes) for box in boxes), default=1) or 1
    counts = np.fromiter((len(box.sizes) for box in boxes), np.int64, len(boxes))
    there = np.arange(ndim) < counts[:, None]
    offset = np.zeros(there.shape, np.int64)
    offset[there] = np.fromiter(itertools.chain.from_iterable(box.offsets for box in boxes), np.int64)
    size = np.ones(there.shape, np.int64)
    size[there] = np.fromiter(itertools.chain.from_iterable(box.sizes for box in boxes), np.int64)
    return IndexRows(
        offset=offset,
        size=size,
        file=np.zeros(len(boxes), np.int64),
        start=np.array(starts, np.int64),
        length=np.array(lengths, np.int64),
        codec=np.zeros(len(boxes), np.uint8) if codec is None else np.array(codec, np.uint8),
        digest=as_rows(digests),
        block=np.array(block, np.int64),
        block_digest=as_rows(block_digest),
    )


def merge(parts: Sequence[IndexRows], file_base: Sequence[int]) -> IndexRows:
    """The rows of several writers one after the other; file numbers of part k are raised by file_base[k]."""
    if not parts:
        return build([], [], [], [], [], [])
    ndim = max((part.offset.shape[1] for part in parts), default=1)
    block_base = 0
    blocks = []
    for part in parts:
        blocks.append(np.where(part.block >= 0, part.block + block_base, -1))
        block_base += len(part.block_digest)

    def widen(array: Int64Array, fill: int) -> Int64Array:
        return np.pad(array, ((0, 0), (0, ndim - array.shape[1])), constant_values=fill)

    return IndexRows(
        offset=np.concatenate([widen(part.offset, 0) for part in parts]),
        size=np.concatenate([widen(part.size, 1) for part in parts]),
        file=np.concatenate([part.file + base for part, base in zip(parts, file_base, strict=True)]),
        start=np.concatenate([part.start for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        codec=np.concatenate([part.codec for part in parts]),
        digest=np.concatenate([part.digest for part in parts]),
        block=np.concatenate(blocks),
        block_digest=np.concatenate([part.block_digest for part in parts]),
    )


def take(rows: IndexRows, order: Int64Array, counts: Int64Array | None = None) -> IndexRows:
    """The rows at the positions `order`, with only the block digests that they need.

    `counts` are those of `block_counts(rows)`, for whoever takes several times.
    """
    block = rows.block[order]
    counts = (block_counts(rows) if counts is None else counts)[order]
    # consecutive block digests of each chosen chunk, one chunk after the other
    firsts = np.cumsum(counts) - counts
    picks = np.repeat(block - firsts, counts) + np.arange(int(counts.sum()))
    return IndexRows(
        offset=rows.offset[order],
        size=rows.size[order],
        file=rows.file[order],
        start=rows.start[order],
        length=rows.length[order],
        codec=rows.codec[order],
        digest=rows.digest[order],
        block=np.where(block >= 0, firsts, -1),
        block_digest=rows.block_digest[picks],
    )


def block_counts(rows: IndexRows) -> Int64Array:
    """How many rows of block_digest each chunk has: up to where the next chunk's begin; for rows that a writer made."""
    has = rows.block >= 0
    counts = np.zeros(len(rows), dtype=np.int64)
    order = np.flatnonzero(has)[np.argsort(rows.block[has], kind="stable")]
    bounds = np.append(rows.block[order], len(rows.block_digest))
    counts[order] = np.diff(bounds)
    return counts
