"""An index page that is read in part: the rows that are wanted, verified by the page's leaf digests.

The page lies in memory as it would if it were read whole, but only the leaves that were needed are there; the rest is
address space that was never touched. docs/format.md, "Reading a page in part".
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

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

GAP = 32
"""Leaves that are read from far beside those that are needed, rather than to ask twice."""
MOST = 2048
"""Leaves that are asked for at once, at most."""
THREADS = 16
"""Threads that ask from far at the same time."""

Check = Callable[[IndexRows, TensorMeta, int], None]


class RangedPage:
    """A page of which only some rows are there; `fetch` brings more. Not safe to use from several threads.

    Attributes:
        rows: all rows of the page, of which those that were not fetched are zeros.
    """

    def __init__(self, source: ByteSource, page: PageFile, block_size: int, check: Check, *, far: bool = False) -> None:
        """Read what is needed to read rows: the leaf digests, verified by the root's, and the header of the page.

        Args:
            check: raises FormatError unless rows that were fetched are what they may be.
            far: whether it pays to ask for several ranges at a time, and for few.

        Raises:
            CorruptionError, FormatError: as `load_page`.
        """
        self._source = source
        self._check = check
        self._far = far
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
        if self._far:
            self.bring([(meta, first, last)])
        for name in _COLUMNS:
            start, width = self._starts[name]
            self._need(start + first * width, start + last * width)
        rows = self.rows
        part = IndexRows(
            **{name: getattr(rows, name)[first:last] for name in _COLUMNS},
            block_digest=rows.block_digest,
        )
        require_numbers(part, self._source.name)
        for low, high in self._blocks_of(meta, first, last):
            self._need(low, high)
        self._check(part, meta, first)

    def bring(self, spans: Sequence[tuple[TensorMeta, int, int]]) -> None:
        """Have what `fetch` of each of these (tensor, first, last) needs: neighbours together, several at a time.

        Raises CorruptionError as `fetch`.
        """
        starts = [self._starts[name] for name in _COLUMNS]
        self._need_all(
            (start + first * width, start + last * width) for start, width in starts for _, first, last in spans
        )
        self._need_all(blocks for span in spans for blocks in self._blocks_of(*span))

    def _blocks_of(self, meta: TensorMeta, first: int, last: int) -> Iterable[tuple[int, int]]:
        """Where the block digests of some rows lie in the page, as many for each as its box has blocks."""
        start, width = self._starts["block_digest"]
        count = len(self.rows.block_digest)
        block = self.rows.block[first:last]
        if not (block >= 0).any():
            return
        # in floating point: whether the numbers can be is checked later
        nbytes = np.prod(self.rows.size[first:last].astype(np.float64), axis=1) * meta.dtype.itemsize
        for row in np.flatnonzero(block >= 0).tolist():
            low = int(block[row])
            high = int(min(low + nbytes[row] // self._block_size + 1, count))
            if low < high:
                yield start + low * width, start + high * width

    def _need_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the leaves of ranges of bytes, by few requests, several at a time."""
        there = self._there
        parts = [(start // LEAF, -(-stop // LEAF)) for start, stop in ranges if start < stop]
        parts = [(low, high) for low, high in set(parts) if there.find(0, low, high) >= 0]
        if not parts:
            return
        leaves = np.unique(np.concatenate([np.arange(low, high) for low, high in parts]))
        runs: list[list[int]] = []
        for leaf in leaves[np.frombuffer(there, np.uint8)[leaves] == 0].tolist():
            low, high = runs[-1] if runs else (0, -GAP - 1)
            # what is there is not read again: others may look at it
            if leaf <= high + GAP and leaf - low < MOST and there.find(1, high, leaf) < 0:
                runs[-1][1] = leaf + 1
            else:
                runs.append([leaf, leaf + 1])
        if len(runs) < 2:
            for low, high in runs:
                self._need(low * LEAF, high * LEAF)
            return
        with ThreadPoolExecutor(min(THREADS, len(runs)), thread_name_prefix="ckpt-index") as pool:
            list(pool.map(lambda run: self._need(run[0] * LEAF, run[1] * LEAF), runs))

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
