"""Elements of a checkpoint on their way into files of another one: read in order, in windows, cast if that is asked.

Casts are those of torch's `Tensor.to`: to nearest, ties to even. Knows neither what is written nor where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ckpt.state.torch_dtypes import as_carrier, can_cast, from_carrier, torch_dtype
from ckpt.storage.data_file import Chunk
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import Checkpoint
from ckpt_formats.dtypes import DType, dtype
from ckpt_formats.errors import DtypeMismatchError, LayoutError, MissingTensorError, UnknownDtypeError
from ckpt_formats.geometry import Box, flat_boxes
from ckpt_formats.layout.patterns import Pattern
from ckpt_formats.manifest import Manifest, TensorMeta
from ckpt_formats.reading import Request

__all__ = ["Casts", "Feed", "Item", "Progress", "Tally", "casts_of"]

WINDOW = 16 << 20
"""Bytes that are read from the source at once."""
CAST = 1 << 18
"""Elements that are cast at once."""
FLOATS = ("float64", "float32", "float16", "bfloat16")
"""What a dtype for everything is for; smaller floats are scaled, as a rule, by something beside them."""


Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Item(NamedTuple):
    """A box of a tensor that goes to a file."""

    name: str
    meta: TensorMeta
    dtype: DType
    """As it is written."""
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


Casts = Mapping[str, DType]
"""Name of a tensor -> what it is converted to; others stay as they are."""


def casts_of(manifest: Manifest, asked: str | Mapping[str, str] | None) -> Casts:
    """Which tensors are converted.

    Args:
        asked: a dtype for all tensors of float64, float32, float16 and bfloat16, but for what optimizers keep as
            scalars (their counts of steps); or dtypes by pattern of names, the first that matches, for tensors of any
            dtype.

    Raises:
        UnknownDtypeError: no such dtype.
        LayoutError: no pattern.
        MissingTensorError: a pattern matches no tensor.
        DtypeMismatchError: not every value of a tensor's dtype, other than floats, has its like in the one asked for.
    """
    if asked is None:
        return {}
    metas = manifest.model_tensors
    if isinstance(asked, str):
        to = dtype(asked)
        if asked not in FLOATS and not asked.startswith("float8"):
            raise DtypeMismatchError(
                f"{asked} is no floating-point dtype, so it can't be that of all tensors; say by pattern which are to "
                "have it"
            )
        return {
            name: to
            for name, meta in metas.items()
            if meta.dtype.name in FLOATS and meta.dtype is not to and (meta.shape or not _is_slot(manifest, name))
        }
    casts: dict[str, DType] = {}
    decided: set[str] = set()
    for text, kind in asked.items():
        try:
            pattern, to = Pattern(text), dtype(kind)
        except UnknownDtypeError:
            raise
        except ValueError as error:
            raise LayoutError(str(error)) from None
        matching = [name for name in metas if pattern.match(name) is not None]
        if not matching:
            raise MissingTensorError(
                f"{manifest.path} has no tensor whose name matches {text!r}, which is to be {kind}; `ckpt show` lists "
                "what it has",
                path=manifest.path,
            )
        for name in matching:
            if name in decided:
                continue
            decided.add(name)
            if metas[name].dtype is to:
                continue
            if not can_cast(metas[name].dtype, to):
                raise DtypeMismatchError(
                    f"the tensor {name!r} is {metas[name].dtype}, not all of whose values there are in {to}; leave it "
                    f"out of {text!r}, or choose another dtype for it",
                    tensor=name,
                )
            casts[name] = to
    return casts


def _is_slot(manifest: Manifest, name: str) -> bool:
    top = name
    while top and top not in manifest.entries:
        top = top.rpartition(".")[0]
    return manifest.entries.get(top, {}).get("kind") == "optimizer"


class Tally:
    """Adds up bytes that are handed on, and tells of them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class Feed:
    """The elements of one file's chunks, read from the source in the order in which they are written.

    They are read a window at a time, small chunks many together.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[Item], count: Tally) -> None:
        """`count` is told of bytes that were handed on."""
        self._checkpoint = checkpoint
        self._parts = parts
        self._count = count
        self._window: dict[int, tuple[int, memoryview]] = {}
        self.overflowed: set[str] = set()
        """Tensors with finite elements beyond the largest of the dtype that they were cast to."""

    def chunks(self) -> list[Chunk]:
        """The chunks, with this as the source of their bytes."""
        return [
            Chunk(part.name, part.dtype, part.meta.shape, part.box, _Fed(self, position))
            for position, part in enumerate(self._parts)
        ]

    def read(self, position: int, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop of a chunk."""
        begin, data = self._window.get(position, (0, memoryview(b"")))
        if start < begin or stop > begin + len(data):
            self._fetch(position, start)
            begin, data = self._window[position]
        into[:] = data[start - begin : stop - begin]
        self._count(stop - start)

    def _fetch(self, position: int, start: int) -> None:
        self._window = {}
        requests: list[Request] = []
        read: list[tuple[int, int, AnyArray]] = []
        room = WINDOW
        while room and position < len(self._parts):
            name, meta, to, box = self._parts[position]
            first = start // to.itemsize
            count = min(box.numel - first, room // max(meta.dtype.itemsize, to.itemsize))
            if count <= 0:
                break
            flat: AnyArray = np.empty(count, dtype=meta.dtype.carrier)
            if count == box.numel:
                requests.append(Request(name, box, flat.reshape(box.sizes)))
            else:
                at = 0
                for run in flat_boxes(box.sizes, first, first + count):
                    place = Box(tuple(o + b for o, b in zip(run.offsets, box.offsets, strict=True)), run.sizes)
                    requests.append(Request(name, place, flat[at : at + run.numel].reshape(run.sizes)))
                    at += run.numel
            read.append((position, start, flat))
            room -= count * max(meta.dtype.itemsize, to.itemsize)
            position += 1
            start = 0
        self._checkpoint.read(requests)
        for number, begin, flat in read:
            part = self._parts[number]
            cast = flat if part.meta.dtype is part.dtype else self._cast(part, flat)
            self._window[number] = (begin, cast.view(np.uint8).data)

    def _cast(self, part: Item, flat: AnyArray) -> AnyArray:
        source = from_carrier(flat, torch_dtype(part.meta.dtype.name))
        made = torch.empty(source.shape, dtype=torch_dtype(part.dtype.name))
        target = made
        if source.is_complex() and made.is_complex():
            source, target = torch.view_as_real(source), torch.view_as_real(made)
        largest = None
        if source.is_floating_point() and torch.finfo(made.dtype).max < torch.finfo(source.dtype).max:
            largest = torch.finfo(made.dtype).max
        for at in range(0, len(source), CAST):
            some = source[at : at + CAST]
            target[at : at + CAST] = some
            if largest is not None and part.name not in self.overflowed:
                # float8 has neither abs nor comparisons
                size = (some if some.itemsize > 1 else some.float()).abs()
                if bool(((size > largest) & ~size.isinf()).any()):
                    self.overflowed.add(part.name)
        return as_carrier(made)


class _Fed:
    """One chunk of a feed."""

    __slots__ = ("_feed", "_position")

    def __init__(self, feed: Feed, position: int) -> None:
        self._feed = feed
        self._position = position

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop of the chunk."""
        self._feed.read(self._position, start, stop, into)
