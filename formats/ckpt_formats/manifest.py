"""The manifest: the tensors of a global model, the chunks that cover them, and the plain values. Immutable.

Says what the bytes are, not where they lie (locations.py), nor in which file format they came (native/, later foreign
ones). Chunks are kept by the page, column by column, and pages are fetched when they are first needed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckpt_formats.arrays import Int64Array, UInt8Array
from ckpt_formats.dtypes import DType
from ckpt_formats.errors import CoverageError, MissingTensorError
from ckpt_formats.geometry import Box, check_cover, intersect_rows
from ckpt_formats.grid import Runs, grid_of

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
    grid: Runs | None = None
    """Of what grid its chunks are the cells, in order; None where that is not known."""

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
    fetch: Callable[[TensorMeta, int, int], None] | None = None
    """Brings rows of a tensor, from the first up to the last, numbered within the page; None if all are there."""
    bring: Callable[[Sequence[tuple[TensorMeta, int, int]]], None] | None = None
    """Does the slow part of many such fetches at once; None where that is no faster."""


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
        owned: path of a per-rank value in what ranks saved -> its path here, None for what is left out. Empty unless
            the manifest is derived from another one.
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
        of_page: Callable[[int], Sequence[TensorMeta]],
        load_page: Callable[[int, bool], ChunkRows],
    ) -> None:
        """`of_page` gives the tensors whose chunks are on a page, and `load_page` a page, whole if so asked."""
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
        self.owned: Mapping[str, str | None] = {}
        self.page_count = page_count
        self._of_page = of_page
        self._load_page = load_page
        self._pages: dict[int, ChunkRows] = {}
        self._covered: set[str] = set()
        self._lock = threading.Lock()

    def derived(
        self,
        *,
        tensors: Mapping[str, TensorMeta],
        aliases: Mapping[str, str],
        values: Mapping[str, Any],
        entries: Mapping[str, Mapping[str, Any]],
        owned: Mapping[str, str | None],
    ) -> Manifest:
        """A manifest of the same chunks under other names. A tensor's `TensorMeta.name` stays that of this manifest."""
        made = Manifest(
            path=self.path,
            step=self.step,
            attempt=self.attempt,
            tensors=tensors,
            aliases=aliases,
            values=values,
            entries=entries,
            layout=self.layout,
            provenance=self.provenance,
            block_size=self.block_size,
            page_count=self.page_count,
            of_page=self._of_page,
            load_page=self._load_page,
        )
        before = {path: None if now is None else owned.get(now, now) for path, now in self.owned.items()}
        made.owned = {**owned, **before}
        return made

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
        """The chunks of a page, all of them, fetched and checked at the first use."""
        page = self.ranged_page(number)
        if page.fetch is None:
            return page
        with self._lock:
            page = self._pages[number] = self._load_page(number, True)
            return page

    def ranged_page(self, number: int) -> ChunkRows:
        """The chunks of a page, of which only those that were fetched may be there; see `fetch`."""
        with self._lock:
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = self._load_page(number, False)
                if page.fetch is None:
                    metas = self._of_page(number)
                    covered = plainly_covered(metas, page.offset, page.size)
                    self._covered.update(meta.name for meta in itertools.compress(metas, covered))
            return page

    def fetch(self, meta: TensorMeta, first: int, last: int) -> None:
        """Have the rows `first` up to `last` of the tensor's page, which are all the tensor's."""
        page = self.ranged_page(meta.page)
        if page.fetch is not None:
            with self._lock:
                page.fetch(meta, first, last)

    def bring(self, wanted: Iterable[tuple[TensorMeta, Box | Int64Array]]) -> None:
        """Prepare for the fetches of many rows, where that is faster together: of a box's chunks, or given by number.

        Raises CorruptionError: the index is damaged there.
        """
        spans: dict[int, list[tuple[TensorMeta, int, int]]] = {}
        for meta, what in wanted:
            if not meta.rows or self.ranged_page(meta.page).bring is None:
                continue
            if not isinstance(what, Box):
                rows = what
            elif meta.grid is not None:
                rows = grid_of(meta.grid).meeting(what) + meta.row
            else:
                rows = np.arange(meta.row, meta.row + meta.rows)
            spans.setdefault(meta.page, []).extend((meta, first, last) for first, last in _runs(rows))
        for number, some in spans.items():
            bring = self.ranged_page(number).bring
            if bring is not None:
                with self._lock:
                    bring(some)

    def chunks_in(self, meta: TensorMeta, box: Box) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The chunks that meet a box with elements: their rows [n] in the page, offsets and sizes [n, ndim].

        Their rows are fetched. Raises CoverageError as `chunks`.
        """
        self.require_cover(meta)
        page = self.ranged_page(meta.page)
        ndim = len(meta.shape)
        if page.fetch is None or meta.grid is None:
            offsets, sizes = self._boxes(meta)
            rows, _, _ = intersect_rows(offsets, sizes, box)
            return rows + meta.row, offsets[rows], sizes[rows]
        rows = grid_of(meta.grid).meeting(box) + meta.row
        for first, last in _runs(rows):
            self.fetch(meta, first, last)
        return rows, page.offset[rows, :ndim], page.size[rows, :ndim]

    def chunks(self, meta: TensorMeta) -> tuple[Int64Array, Int64Array]:
        """Offsets and sizes, each int64 [rows, ndim], of the chunks of a tensor, checked to cover it exactly.

        Raises:
            CoverageError: they overlap, leave a hole, or leave the tensor's shape.
        """
        self.require_cover(meta)
        return self._boxes(meta)

    def differ(self, name: str, other: str) -> bool:
        """Whether the index alone shows that two tensors are not equal: shapes, dtypes, two checksums of one box.

        Raises MissingTensorError and CoverageError as `meta` and `chunks`.
        """
        one, twin = self.meta(name), self.meta(other)
        if (one.shape, one.dtype) != (twin.shape, twin.dtype):
            return True
        known = self._checksums(one)
        return any(known.get(box, found) != found for box, found in self._checksums(twin).items())

    def _checksums(self, meta: TensorMeta) -> dict[bytes, bytes]:
        """The digests of a tensor's chunks, by their boxes; none where there are none."""
        boxes = np.hstack(self.chunks(meta))
        digests = self.ranged_page(meta.page).digest if meta.rows else None
        if digests is None:
            return {}
        rows = digests[meta.row : meta.row + meta.rows]
        return {box.tobytes(): found.tobytes() for box, found in zip(boxes, rows, strict=True)}

    def require_cover(self, meta: TensorMeta) -> None:
        """Raise CoverageError unless the chunks of a tensor cover it exactly."""
        if meta.name in self._covered:
            return
        if meta.rows:
            page = self.ranged_page(meta.page)
            # cells of a grid cover it, and rows that are fetched are held to theirs
            if meta.name in self._covered or (page.fetch is not None and meta.grid is not None):
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
        page = self.ranged_page(meta.page)
        self.fetch(meta, meta.row, meta.row + meta.rows)
        rows = slice(meta.row, meta.row + meta.rows)
        return page.offset[rows, :ndim], page.size[rows, :ndim]


def _runs(rows: Int64Array) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs, each from its first up to its last."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for low, high in itertools.pairwise([0, *breaks.tolist(), len(rows)]):
        if low < high:
            yield int(rows[low]), int(rows[high - 1]) + 1


def plainly_covered(metas: Sequence[TensorMeta], offset: Int64Array, size: Int64Array) -> list[bool]:
    """Which tensors are covered exactly for a simple reason, found for all of them at once.

    The reason: they are cut along one dimension at most, and each chunk begins where the one before it ends. Whether
    others are is a matter for check_cover.

    Args:
        metas: tensors that have chunks, in order.
        offset: [n, D], of the chunks of all of them, one tensor after the other, sorted; and so `size`.
    """
    if not metas:
        return []
    # column by column: what is done for each tensor counts where there are many
    _, _, of_tensor, _, _, count, _, _ = zip(*metas, strict=True)
    width = size.shape[1]
    ndim = np.fromiter(map(len, of_tensor), np.int64, len(metas))
    shapes = np.ones((len(metas), width), np.int64)
    shapes[np.arange(width) < ndim[:, None]] = np.fromiter(itertools.chain.from_iterable(of_tensor), np.int64)
    rows_of = np.array(count, np.int64)
    first = np.cumsum(rows_of) - rows_of
    last = first + rows_of - 1
    tensor = np.repeat(np.arange(len(metas)), rows_of)
    cut = np.logical_or.reduceat((offset != 0) | (size != shapes[tensor]), first, axis=0)
    dim = cut.argmax(axis=1)
    rows = np.arange(len(tensor))
    start = offset[rows, dim[tensor]]
    stop = start + size[rows, dim[tensor]]
    follows = np.empty(len(rows), dtype=bool)
    follows[1:] = start[1:] == stop[:-1]
    follows[first] = start[first] == 0
    plain = np.logical_and.reduceat(follows, first) & (stop[last] == shapes[np.arange(len(metas)), dim])
    covered: list[bool] = (plain & (cut.sum(axis=1) <= 1)).tolist()
    return covered
