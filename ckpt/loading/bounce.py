"""Tensors that can't be read in place: on another device, or to be cast.

What is in host memory is cast block by block, right after a block was verified, and so is all that several ranks need.
What only one rank needs on a device passes through two buffers: while one is copied to the device, by its own queue of
work, the other is read into; for CUDA devices the buffers are pinned, else such copies would wait. Knows no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch

from ckpt.state.torch_dtypes import from_carrier, torch_dtype
from ckpt_formats.arrays import AnyArray
from ckpt_formats.dtypes import DType
from ckpt_formats.geometry import Box, flat_boxes
from ckpt_formats.pieces import Sink
from ckpt_formats.reading import Reader, ReadStats, Request

LARGEST = 64 << 20
"""Bytes of each of the two buffers at most."""
_ALIGNED = 64


class Bounced(NamedTuple):
    """A part of live state that can't be read in place."""

    name: str
    dtype: DType
    """As it is stored."""
    box: Box
    view: torch.Tensor
    """The part's memory: box.sizes, any strides, dtype and device."""

    @property
    def request(self) -> Request:
        """To read it block by block."""
        return Request(self.name, self.box, _Copied(self.view, self.dtype))


class _Copied(Sink):
    """Elements of a stored dtype that torch copies into a tensor of another dtype, or on another device."""

    def __init__(self, view: torch.Tensor, dtype: DType) -> None:
        self.dtype = dtype.carrier
        self.shape = tuple(view.shape)
        self._view = view
        self._stored = dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> _Copied:
        return _Copied(self._view[part], self._stored)

    def __setitem__(self, part: tuple[slice, ...] | EllipsisType, elements: AnyArray, /) -> None:
        stored = from_carrier(elements if elements.flags.aligned else elements.copy(), torch_dtype(self._stored.name))
        # as no_grad, and tensors that were made in it can't be written outside
        with torch.inference_mode():
            # to devices too, it has read the elements when it returns: they are not in pinned memory
            self._view[part].copy_(stored)


class _Part(NamedTuple):
    of: Bounced
    box: Box
    at: int
    """Where it lies in the buffer."""
    nbytes: int


def read_bounced(
    reader: Reader, items: Sequence[Bounced], *, threads: int, buffers: int, past_cache: bool
) -> ReadStats:
    """Read every item, and copy it where it belongs.

    Args:
        reader: of the checkpoint.
        items: what to read.
        threads, past_cache: as for Reader.execute.
        buffers: bytes of memory to take; half of it is for these two buffers.

    Raises what Reader.execute raises.
    """
    total = ReadStats()
    if not items:
        return total
    needed = sum(item.box.numel * item.dtype.itemsize + _ALIGNED for item in items)
    size = max(1 << 20, min(LARGEST, buffers // 4, needed))
    pinned = any(item.view.is_cuda for item in items)
    memory = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    for number, parts in enumerate(_rounds(items, size)):
        buffer = memory[number % 2].numpy()
        event = copied[number % 2]
        if event is not None:
            event.synchronize()
        arrays = [
            buffer[part.at : part.at + part.nbytes].view(part.of.dtype.carrier).reshape(part.box.sizes)
            for part in parts
        ]
        plan = reader.plan(Request(part.of.name, part.box, array) for part, array in zip(parts, arrays, strict=True))
        stats = reader.execute(plan, threads=threads, buffers=buffers // 2, past_cache=past_cache)
        total.bytes_read += stats.bytes_read
        total.bytes_needed += stats.bytes_needed
        with torch.inference_mode():
            for part, array in zip(parts, arrays, strict=True):
                target = part.of.view[part.box.relative_to(part.of.box.offsets).slices()]
                target.copy_(from_carrier(array, torch_dtype(part.of.dtype.name)), non_blocking=pinned)
        if pinned:
            event = copied[number % 2] = torch.cuda.Event()
            event.record()
    if pinned:
        torch.cuda.synchronize()
    return total


def _rounds(items: Sequence[Bounced], size: int) -> Iterator[list[_Part]]:
    """Parts of the items that fill a buffer, in turn."""
    parts: list[_Part] = []
    at = 0
    for item in items:
        itemsize = item.dtype.itemsize
        for box in _bounded(item.box, max(1, size // itemsize)):
            nbytes = box.numel * itemsize
            if parts and at + nbytes > size:
                yield parts
                parts, at = [], 0
            parts.append(_Part(item, box, at, nbytes))
            at += -(-nbytes // _ALIGNED) * _ALIGNED
    if parts:
        yield parts


def _bounded(box: Box, elements: int) -> Iterator[Box]:
    """A box in parts of at most so many elements."""
    for start in range(0, box.numel, elements):
        for part in flat_boxes(box.sizes, start, min(start + elements, box.numel)):
            yield Box(tuple(o + b for o, b in zip(part.offsets, box.offsets, strict=True)), part.sizes)
