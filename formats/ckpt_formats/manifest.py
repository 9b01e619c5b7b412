"""The manifest: the tensors of a global model, the chunks that cover them, and the plain values. Immutable.

Says what the bytes are, not where they lie (locations.py), nor in which file format they came (native/, later foreign
ones). Chunks are kept by the page, column by column, and pages are fetched when they are first needed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckpt_formats.arrays import Int64Array, UInt8Array
from ckpt_formats.dtypes import DType
from ckpt_formats.errors import CoverageError, MissingTensorError
from ckpt_formats.geometry import check_cover

RESERVED_PREFIX = "__ckpt__."
"""Names that are the format's own: stored like tensors, but not tensors of the model."""
BLOB_PREFIX = RESERVED_PREFIX + "blob."
RANK_PREFIX = RESERVED_PREFIX + "rank."


def rank_blob(rank: int) -> str:
    """Name of the bytes that hold one rank's per-rank values."""
    return f"{RANK_PREFIX}{rank:05d}"


class TensorMeta(NamedTuple):
    """What the manifest says of one tensor; its chunks are rows `row … row + rows - 1` of page `page`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    page: int
    row: int
    rows: int
    cut: int | None

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The chunks of one page: boxes and digests, column by column."""

    offset: Int64Array
    """[n, D], elements; dimensions that a tensor lacks have offset 0."""
    size: Int64Array
    """[n, D], elements; dimensions that a tensor lacks have size 1."""
    digest: UInt8Array | None
    """[n, 16]; None where the source has no checksums."""
    block: Int64Array | None
    """[n]: first row in block_digest, -1 for chunks of at most one block."""
    block_digest: UInt8Array | None
    """[m, 16]."""


class Manifest:
    """Tensors, aliases, values and chunks of one checkpoint.

    Attributes:
        path: where it was read from, for messages.
        step: the training step, if there is one.
        attempt: the id of the attempt that wrote it.
        tensors: name -> TensorMeta, the format's own names included; see `model_tensors`.
        aliases: name of a tied tensor -> name under which it is stored.
        values: path -> encoded value (values.decode turns it into the value).
        entries: top-level name -> what kind of thing it was.
        layout: world size, meshes and cuts of whoever wrote it.
        provenance: facts for people.
        block_size: bytes per block digest.
    """

    def __init__(
        self,
        *,
        path: str,
        step: int | None,
        attempt: str,
        tensors: Mapping[str, TensorMeta],
        aliases: Mapping[str, str],
        values: Mapping[str, Any],
        entries: Mapping[str, Mapping[str, Any]],
        layout: Mapping[str, Any],
        provenance: Mapping[str, Any],
        block_size: int,
        page_count: int,
        load_page: Callable[[int], ChunkRows],
    ) -> None:
        self.path = path
        self.step = step
        self.attempt = attempt
        self.tensors = tensors
        self.aliases = aliases
        self.values = values
        self.entries = entries
        self.layout = layout
        self.provenance = provenance
        self.block_size = block_size
        self.page_count = page_count
        self._load_page = load_page
        self._pages: dict[int, ChunkRows] = {}
        self._covered: set[str] = set()
        self._lock = threading.Lock()

    @property
    def model_tensors(self) -> dict[str, TensorMeta]:
        """The tensors of the model: those whose names are not the format's own."""
        return {name: meta for name, meta in self.tensors.items() if not name.startswith(RESERVED_PREFIX)}

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return int(self.layout.get("world_size", 1))

    @property
    def per_rank_world_size(self) -> int:
        """How many ranks saved values of their own; a checkpoint that was resharded keeps those of its source."""
        return sum(name.startswith(RANK_PREFIX) for name in self.tensors)

    def meta(self, name: str) -> TensorMeta:
        """The tensor of that name, or the one that it is tied to.

        Raises:
            MissingTensorError: there is none; the message suggests names that look like it.
        """
        meta = self.tensors.get(self.aliases.get(name, name))
        if meta is None:
            why = f"{self.path} has no tensor {name!r}{self._hint(name)}"
            raise MissingTensorError(why, path=self.path, tensor=name)
        return meta

    def _hint(self, name: str) -> str:
        from difflib import get_close_matches

        # get_close_matches is quadratic in the length of names, so only a bounded number is tried
        close = get_close_matches(name, list(self.model_tensors)[:5000], n=3)
        return f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `ckpt show` lists what it has"

    def page(self, number: int) -> ChunkRows:
        """The chunks of a page, fetched and checked at the first use."""
        with self._lock:
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = self._load_page(number)
                self._covered.update(self._plainly_covered(number, page))
            return page

    def chunks(self, meta: TensorMeta) -> tuple[Int64Array, Int64Array]:
        """Offsets and sizes, each int64 [rows, ndim], of the chunks of a tensor, checked to cover it exactly.

        Raises:
            CoverageError: they overlap, leave a hole, or leave the tensor's shape.
        """
        self.require_cover(meta)
        return self._boxes(meta)

    def require_cover(self, meta: TensorMeta) -> None:
        """Raise CoverageError unless the chunks of a tensor cover it exactly."""
        if meta.name in self._covered:
            return
        if meta.rows:
            self.page(meta.page)
            if meta.name in self._covered:
                return
        try:
            check_cover(meta.shape, *self._boxes(meta))
        except CoverageError as error:
            raise CoverageError(
                f"{self.path}: tensor {meta.name!r}: {error}; the checkpoint is damaged or was written wrongly",
                path=self.path,
                tensor=meta.name,
            ) from None
        self._covered.add(meta.name)

    def _boxes(self, meta: TensorMeta) -> tuple[Int64Array, Int64Array]:
        ndim = len(meta.shape)
        if not meta.rows:
            none = np.empty((0, ndim), dtype=np.int64)
            return none, none
        page = self.page(meta.page)
        rows = slice(meta.row, meta.row + meta.rows)
        return page.offset[rows, :ndim], page.size[rows, :ndim]

    def _plainly_covered(self, number: int, page: ChunkRows) -> Iterable[str]:
        """Tensors of a page that are covered exactly for a simple reason, found for all of them at once.

        The reason: they are cut along one dimension at most, and each chunk begins where the one before it ends. Others
        are left to check_cover, one by one, when they are needed.
        """
        metas = [meta for meta in self.tensors.values() if meta.rows and meta.page == number]
        if not metas:
            return ()
        # column by column: what is done for each tensor counts where there are many
        names, _, of_tensor, _, row, count, _ = zip(*metas, strict=True)
        width = page.size.shape[1]
        ndim = np.fromiter(map(len, of_tensor), np.int64, len(metas))
        shapes = np.ones((len(metas), width), np.int64)
        shapes[np.arange(width) < ndim[:, None]] = np.fromiter(itertools.chain.from_iterable(of_tensor), np.int64)
        first = np.array(row, np.int64)
        rows_of = np.array(count, np.int64)
        last = first + rows_of - 1
        tensor = np.repeat(np.arange(len(metas)), rows_of)
        cut = np.logical_or.reduceat((page.offset != 0) | (page.size != shapes[tensor]), first, axis=0)
        dim = cut.argmax(axis=1)
        rows = np.arange(len(tensor))
        start = page.offset[rows, dim[tensor]]
        stop = start + page.size[rows, dim[tensor]]
        follows = np.empty(len(rows), dtype=bool)
        follows[1:] = start[1:] == stop[:-1]
        follows[first] = start[first] == 0
        plain = np.logical_and.reduceat(follows, first) & (stop[last] == shapes[np.arange(len(metas)), dim])
        return itertools.compress(names, (plain & (cut.sum(axis=1) <= 1)).tolist())
