"""An index page that is read in part: the rows that are wanted, verified by the page's leaf digests.

The page lies in memory as it would if it were read whole, but only the leaves that were needed are there; the rest is
address space that was never touched. docs/format.md, "Reading a page in part".
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.digest import DIGEST_SIZE, digest
from ckpt_formats.errors import CorruptionError, FormatError
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.native.index import LEAF, IndexRows, leaves_of, require_numbers, rows_of
from ckpt_formats.native.root import PageFile
from ckpt_formats.safetensors_file import unpack_columns
from ckpt_formats.sources import ByteSource

_COLUMNS = ("offset", "size", "file", "start", "length", "codec", "digest", "block")

Check = Callable[[IndexRows, TensorMeta, int], None]


class RangedPage:
    """A page of which only some rows are there; `fetch` brings more. Not safe to use from several threads.

    Attributes:
        rows: all rows of the page, of which those that were not fetched are zeros.
    """

    def __init__(self, source: ByteSource, page: PageFile, block_size: int, check: Check) -> None:
        """Read what is needed to read rows: the leaf digests, verified by the root's, and the header of the page.

        Args:
            check: raises FormatError unless rows that were fetched are what they may be.

        Raises:
            CorruptionError, FormatError: as `load_page`.
        """
        self._source = source
        self._check = check
        self._block_size = block_size
        count, end = leaves_of(page.size)
        self._end = end
        memory = mmap.mmap(-1, max(page.size, 1))
        self._bytes = memoryview(memory)[: page.size]
        # the blocks of the root's digests that hold the leaf digests
        first = end // block_size * block_size
        tail = memoryview(bytearray(page.size - first))
        source.read(first, page.size, tail)
        for at in range(0, len(tail), block_size):
            if digest(tail[at : at + block_size]).hex() != page.digests[(first + at) // block_size]:
                raise self._damaged(first + at, min(first + at + block_size, page.size))
        self._leaves = bytes(tail[end - first :])
        self._there = bytearray(count)
        self._bytes[first:] = tail
        self._there[-(-first // LEAF) :] = b"\1" * (count - -(-first // LEAF))
        self._need(0, 8)
        self._need(0, min(8 + int.from_bytes(self._bytes[:8], "little"), end))
        self.rows = rows_of(unpack_columns(self._bytes, source.name), source.name)
        if len(self.rows) != page.rows:
            raise FormatError(
                f"{source.name}: has {len(self.rows)} rows, but the manifest says {page.rows}", path=source.name
            )
        base = np.frombuffer(self._bytes, np.uint8).ctypes.data
        self._starts: dict[str, tuple[int, int]] = {}
        for name in (*_COLUMNS, "block_digest"):
            column: AnyArray = getattr(self.rows, name)
            self._starts[name] = (column.ctypes.data - base, column.strides[0] if column.ndim else 0)

    def fetch(self, meta: TensorMeta, first: int, last: int) -> None:
        """Bring the rows `first` up to `last` of the page, all of which are the tensor's, and check them.

        Raises:
            CorruptionError: the page is damaged there.
            FormatError: a row claims what can't be.
        """
        for name in _COLUMNS:
            start, width = self._starts[name]
            self._need(start + first * width, start + last * width)
        rows = self.rows
        part = IndexRows(
            **{name: getattr(rows, name)[first:last] for name in _COLUMNS},
            block_digest=rows.block_digest,
        )
        require_numbers(part, self._source.name)
        if (part.block >= 0).any():
            self._need_blocks(part, meta.dtype.itemsize)
        self._check(part, meta, first)

    def _need_blocks(self, part: IndexRows, itemsize: int) -> None:
        """Bring the block digests of some rows, as many for each as its box has blocks."""
        start, width = self._starts["block_digest"]
        # in floating point: whether the numbers can be is checked later
        nbytes = np.prod(part.size.astype(np.float64), axis=1) * itemsize
        for row in np.flatnonzero(part.block >= 0).tolist():
            low = int(part.block[row])
            high = min(low + nbytes[row] // self._block_size + 1, len(part.block_digest))
            if low < high:
                self._need(start + low * width, start + int(high) * width)

    def _need(self, start: int, stop: int) -> None:
        """Have the leaves of a range of bytes."""
        first, last = start // LEAF, -(-stop // LEAF)
        there = self._there
        while first < last:
            if there[first]:
                first += 1
                continue
            end = there.find(1, first, last)
            end = last if end < 0 else end
            low, high = first * LEAF, min(end * LEAF, self._end)
            data = self._bytes[low:high]
            self._source.read(low, high, data)
            for leaf in range(first, end):
                at = (leaf - first) * LEAF
                if digest(data[at : at + LEAF]) != self._leaves[leaf * DIGEST_SIZE : (leaf + 1) * DIGEST_SIZE]:
                    raise self._damaged(low + at, min(low + at + LEAF, high))
            there[first:end] = b"\1" * (end - first)
            first = end

    def _damaged(self, start: int, stop: int) -> CorruptionError:
        name = self._source.name
        return CorruptionError(
            f"{name}: bytes {start} to {stop} of the index do not fit their checksum: it is damaged; restore the file "
            "or use another checkpoint",
            path=name,
        )
