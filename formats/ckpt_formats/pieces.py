"""Pieces: ranges of whole blocks of chunks, and the parts of what is wanted that lie in them.

What planning makes and reading runs: a piece says where its bytes are read, how they are verified, and where their
elements belong. Knows no files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from operator import itemgetter
from types import EllipsisType
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.geometry import Box, flat_boxes
from ckpt_formats.manifest import TensorMeta


class Sink(ABC):
    """What takes elements in the place of memory for them, to cast them or to bring them elsewhere.

    Attributes:
        dtype: the carrier dtype of what it takes.
        shape: of what it takes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @abstractmethod
    def __getitem__(self, part: tuple[slice, ...], /) -> Sink:
        """A part of it."""

    @abstractmethod
    def __setitem__(self, part: tuple[slice, ...] | EllipsisType, elements: AnyArray, /) -> None:
        """Take the elements of a part, which are in memory that has other elements afterwards. In any thread."""


Into = AnyArray | Sink


def in_one_piece(into: Into) -> TypeGuard[AnyArray]:
    """Whether it is contiguous memory."""
    return not isinstance(into, Sink) and into.flags.c_contiguous


class Request(NamedTuple):
    """A box of a tensor that is wanted in memory.

    `into` has the box's shape and the tensor's carrier dtype, any strides, and is writable.
    """

    name: str
    box: Box
    into: Into


class Piece(NamedTuple):
    """A range of blocks of one chunk, and the part of a request that lies in it.

    `start` and `stop` are positions in the source; of a chunk with a codec, where they would be if it were raw.
    """

    source: int
    start: int
    stop: int
    meta: TensorMeta
    row: int
    first: int
    """Position of `start` within the chunk, in bytes; a multiple of the block size."""
    chunk: Box
    wanted: Box | None
    """The wanted part of the chunk in global coordinates; None for all of it, and then `into` has the chunk's shape."""
    into: Into
    origin: tuple[int, ...]
    """Global coordinates of into[0, …, 0]."""


class EncodedPiece(Piece):
    """A piece of a chunk whose preferred place has a codec."""

    __slots__ = ()


position = itemgetter(Piece._fields.index("source"), Piece._fields.index("start"))
stop_of = itemgetter(Piece._fields.index("stop"))


def bytes_of(array: AnyArray) -> memoryview:
    """The bytes of a contiguous array, writable."""
    return array.reshape(-1).view(np.uint8).data


def scatter(piece: Piece, data: memoryview) -> None:
    """Put the verified bytes of a piece where they belong."""
    into = piece.into
    elements = np.frombuffer(data, dtype=into.dtype)
    if piece.wanted is None:
        into[...] = elements.reshape(into.shape)
        return
    begin = piece.first // into.dtype.itemsize
    row, low, high, shift, of_chunk, of_target = _rows(piece.chunk, piece.wanted, piece.origin)
    if begin % row == 0 and len(elements) % row == 0:
        # whole rows of the chunk: one copy
        first, last = begin // row, (begin + len(elements)) // row
        top, bottom = max(first, low), min(last, high)
        if top < bottom:
            rows = elements.reshape(last - first, *piece.chunk.sizes[1:])
            into[slice(top + shift, bottom + shift), *of_target] = rows[slice(top - first, bottom - first), *of_chunk]
        return
    local = piece.wanted.relative_to(piece.chunk.offsets)
    shifts = tuple(c - o for c, o in zip(piece.chunk.offsets, piece.origin, strict=True))
    at = 0
    for box in flat_boxes(piece.chunk.sizes, begin, begin + len(elements)):
        common = box.intersect(local)
        if common is not None:
            run = elements[at : at + box.numel].reshape(box.sizes)
            target = Box(tuple(o + s for o, s in zip(common.offsets, shifts, strict=True)), common.sizes)
            into[target.slices()] = run[common.relative_to(box.offsets).slices()]
        at += box.numel


@lru_cache(maxsize=1024)
def _rows(
    chunk: Box, wanted: Box, origin: tuple[int, ...]
) -> tuple[int, int, int, int, tuple[slice, ...], tuple[slice, ...]]:
    """Elements in a row of a chunk (all with the same first index), which rows are wanted, by how much rows are shifted
    in the target, and what is wanted of each row: in the chunk and in the target."""
    if not chunk.sizes:
        return 1, 0, 1, 0, (), ()
    local = wanted.relative_to(chunk.offsets)
    target = wanted.relative_to(origin)
    low = local.offsets[0]
    return (
        max(1, math.prod(chunk.sizes[1:])),
        low,
        low + local.sizes[0],
        target.offsets[0] - low,
        local.slices()[1:],
        target.slices()[1:],
    )


def clip(piece: Piece, low: int, high: int) -> Piece:
    """A part of a piece: the bytes low..high of its chunk, which begin and end with blocks, or where the piece does."""
    first, last = piece.first, piece.first + piece.stop - piece.start
    if (low, high) == (first, last):
        return piece
    into = piece.into
    if piece.wanted is None and in_one_piece(into):
        # what is not has one block at most
        itemsize = piece.meta.dtype.itemsize
        into = into.reshape(-1).view(piece.meta.dtype.carrier)[(low - first) // itemsize : (high - first) // itemsize]
    shift = low - first
    return piece._replace(start=piece.start + shift, stop=piece.stop - (last - high), first=low, into=into)
