"""What the rows of an index page may claim: held against the root, all of a page or some rows of it.

Knows no files: rows in, FormatError out. docs/format.md, "What a reader must refuse".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckpt_formats.codecs import EXPONENT_ZSTD, RAW, stored_bounds, word_size
from ckpt_formats.digest import digest
from ckpt_formats.errors import FormatError
from ckpt_formats.grid import grid_of
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.root import Root


class RowChecks:
    """Checks rows against one root, of which it keeps the facts as arrays."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._sizes = np.array([file.size for file in root.files], dtype=np.int64)
        self._headers = np.array([file.header for file in root.files], dtype=np.int64)
        self._raw = np.array([codec == RAW for codec in root.codecs], dtype=bool)
        self._encoded = np.array([codec == EXPONENT_ZSTD for codec in root.codecs], dtype=bool)

    def check(self, rows: IndexRows, metas: Sequence[TensorMeta], what: str, first: int = 0) -> None:
        """Raise FormatError unless every row lies in its file and has the length of its box.

        Args:
            rows: those of `metas`, all of them and one tensor after the other; or some rows of a single tensor.
            first: the number of the first row, in its page; that of the tensor's first row is `row`.
        """
        root = self._root

        def fail(why: str, bad: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
            if bad.any():
                row = first + int(np.flatnonzero(bad)[0])
                raise FormatError(f"{what}: row {row}: {why}; the checkpoint was written wrongly", path=what)

        if not len(rows):
            return
        fail("its file is not in the manifest", rows.file >= len(root.files))
        fail("its codec is not in the manifest", rows.codec >= len(root.codecs))
        sizes = self._sizes[rows.file]
        fail("it begins inside the header of its file", rows.start < self._headers[rows.file])
        fail("it ends past the end of its file", rows.length > sizes)
        fail("it ends past the end of its file", rows.start > sizes - rows.length)

        counts = np.array([meta.rows for meta in metas] if len(metas) > 1 else [len(rows)], dtype=np.int64)
        itemsize = np.repeat(np.array([meta.dtype.itemsize for meta in metas], dtype=np.int64), counts)
        ndim = np.repeat(np.array([len(meta.shape) for meta in metas], dtype=np.int64), counts)
        width = rows.size.shape[1]
        fail("its tensor has more dimensions than the page", ndim > width)
        beyond = np.arange(width)[None, :] >= ndim[:, None]
        fail(
            "its box has more dimensions than its tensor",
            (beyond & ((rows.size != 1) | (rows.offset != 0))).any(axis=1),
        )
        # products in floating point first: claims of 2**62 elements must not wrap around
        fail("its box is larger than any file", np.prod(rows.size.astype(np.float64), axis=1) * itemsize >= 2.0**62)
        nbytes = np.prod(rows.size, axis=1) * itemsize
        fail("its length is not that of its box", self._raw[rows.codec] & (rows.length != nbytes))
        encoded = self._encoded[rows.codec]
        if encoded.any():
            word = np.repeat(np.array([word_size(meta.dtype) for meta in metas], dtype=np.int64), counts)
            fail(f"its dtype can't be stored with the codec {EXPONENT_ZSTD!r}", encoded & (word == 0))
            least, most = stored_bounds(nbytes, np.maximum(word, 1), root.block_size)
            fail(
                "its length is not one that its box can have", encoded & ((rows.length < least) | (rows.length > most))
            )
        order = np.lexsort((rows.start, rows.file))
        follows = rows.file[order][1:] == rows.file[order][:-1]
        shared = follows & (rows.start[order][1:] < (rows.start + rows.length)[order][:-1])
        fail("its bytes are another chunk's too", np.isin(np.arange(len(rows)), order[1:][shared]))
        self._check_blocks(rows, nbytes, what, first)
        self._check_grids(rows, metas, what, first)

    def _check_blocks(
        self, rows: IndexRows, nbytes: np.ndarray[tuple[int], np.dtype[np.int64]], what: str, first: int
    ) -> None:
        root = self._root
        blocks = np.where(nbytes > root.block_size, -(-nbytes // root.block_size), 0)
        bad = ((blocks > 0) != (rows.block >= 0)) | (rows.block > len(rows.block_digest) - blocks)
        if bad.any():
            row = first + int(np.flatnonzero(bad)[0])
            raise FormatError(
                f"{what}: row {row}: its block digests are not in the index; the checkpoint was written wrongly",
                path=what,
            )
        if int(blocks.sum()) > len(rows.block_digest):
            # also keeps the work below in proportion to the size of the page
            raise FormatError(f"{what}: chunks share block digests; the checkpoint was written wrongly", path=what)
        for row in np.flatnonzero(blocks).tolist():
            begin = int(rows.block[row])
            if digest(rows.block_digest[begin : begin + int(blocks[row])].tobytes()) != rows.digest[row].tobytes():
                raise FormatError(f"{what}: row {first + row}: its digest is not that of its blocks", path=what)

    def _check_grids(self, rows: IndexRows, metas: Sequence[TensorMeta], what: str, first: int) -> None:
        for meta in metas:
            if meta.grid is None:
                continue
            begin = max(meta.row, first)
            end = min(meta.row + meta.rows, first + len(rows))
            expected = grid_of(meta.grid).boxes(begin - meta.row, end - meta.row)
            ndim = len(meta.shape)
            found = (rows.offset[begin - first : end - first, :ndim], rows.size[begin - first : end - first, :ndim])
            if not all(map(np.array_equal, found, expected)):
                raise FormatError(
                    f"{what}: the chunks of tensor {meta.name!r} are not those of its grid in the manifest; the "
                    "checkpoint was written wrongly",
                    path=what,
                    tensor=meta.name,
                )
