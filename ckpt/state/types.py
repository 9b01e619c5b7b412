"""What a training state is once it has been taken apart: named tensors as boxes over live memory, and plain values.

Saving reads from these, loading writes into them. This module knows nothing of modules, optimizers, files or ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch

from ckpt_formats.errors import StateError
from ckpt_formats.geometry import Box, flat_boxes

__all__ = [
    "Disassembled",
    "LocalState",
    "LocalTensor",
    "Lowered",
    "Mesh",
    "PerRank",
    "PerRankRef",
    "Piece",
    "SavedState",
    "SavedTensor",
    "Shard",
    "TensorRef",
]

FLAT: Final = "flat"
"""Says of a tensor that it is cut into intervals of its flattened form."""

Mesh = tuple[tuple[str, ...], tuple[int, ...]]
"""Names and sizes of the axes of the device mesh that a tensor is cut over."""


class Lowered(NamedTuple):
    """What this rank holds of a tensor."""

    shape: tuple[int, ...]
    """Of the global tensor."""

    pieces: tuple[tuple[Box, Box], ...]
    """(box in the global tensor, box in the local tensor), in row-major order; none when the rank holds nothing.

    The local box has as many elements, in the same order; a flat local tensor has one dimension.
    """

    cut: str = ""
    """How the tensor is cut, a word for each mesh axis, as in `S(0)@dp R@tp`.

    `R` is replicated; `S(d)` cut in dimension d, in order of the mesh's axes; `SS(d,n)` cut in dimension d within each
    of n pieces, which is what FSDP2 over n-fold tensor parallelism of the same dimension does. `flat` alone: intervals
    of the flattened tensor.
    """

    mesh: Mesh | None = None
    """Names and sizes of its axes, outermost first; an axis without a name is called by its number."""

    def pieces_of(self, local: torch.Tensor) -> list[Piece]:
        """The pieces, in a local tensor that has the shape of the one that is cut so."""
        if local.requires_grad:
            local = local.detach()
        made = []
        for box, within in self.pieces:
            view = local if within.sizes == local.shape else local[within.slices()]
            made.append(Piece(box, view if within.sizes == box.sizes else view.view(box.sizes)))
        return made


@dataclass(eq=False, slots=True)
class Piece:
    """A box of a global tensor and the live memory that holds it on this rank."""

    box: Box
    view: torch.Tensor
    """Of the box's shape, on any device, with any strides; never requires a gradient."""


@dataclass(eq=False, slots=True)
class LocalTensor:
    """What this rank holds of a tensor of the global model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """The global shape, in elements."""
    pieces: list[Piece]
    """Disjoint; empty when this rank holds nothing of it, or when there is nothing in it."""
    cut: str = ""
    """How it is cut over the mesh, a word per axis, for people; empty for a tensor that is whole on every rank."""
    mesh: Mesh | None = None

    @property
    def overlaps(self) -> bool:
        """Whether elements of it share memory, as an expanded tensor's do, so that it can't be filled."""
        return any(not piece.view.is_contiguous() and _overlaps(piece.view) for piece in self.pieces)

    def takes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that dtype and global shape can be loaded in place."""
        return self.dtype == dtype and self.shape == shape and not self.overlaps


def _overlaps(view: torch.Tensor) -> bool:
    """Whether two indices lead to one address; dimensions that are interleaved without that count as if they did."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


@dataclass(eq=False, slots=True)
class LocalState:
    """A training state as this rank sees it.

    Values are those of the live objects, not copies: encode them before training goes on.
    """

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Name of a tied tensor -> the name under which its memory is in `tensors`."""
    values: dict[str, Any] = field(default_factory=dict)
    """Path -> value, with a `TensorRef` or `PerRankRef` where it held a tensor or a per-rank value. Equal on all ranks
    that have the path, but for an optimizer's `param_groups`: ranks with other parameters have other groups."""
    per_rank: dict[str, Any] = field(default_factory=dict)
    """Path -> value of this rank alone."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Top-level name -> `{"kind": …}`, one of module, optimizer, stateful, tensor, value, per_rank. An optimizer also
    has `modules` and `local` (see optimizers.py), a value `flat` (see containers.py)."""


class SavedTensor(NamedTuple):
    """What a checkpoint says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _believe(name: str) -> None:
    """Nothing to check a claim against."""


@dataclass(kw_only=True, slots=True)
class SavedState:
    """What a checkpoint says of a whole state: the counterpart of `LocalState`, without a byte of a tensor read."""

    tensors: Mapping[str, SavedTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    """Path -> decoded value, with `TensorRef` and `PerRankRef` in it."""
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    require: Callable[[str], object] = _believe
    """Called with the name of a tensor before memory is made by the shape it claims; raises if the claim is false."""

    def find(self, name: str) -> SavedTensor | None:
        """The tensor of that name, or the one it is tied to."""
        return self.tensors.get(self.aliases.get(name, name) if self.aliases else name)


# --- marks that a user puts into a state


class Shard:
    """A tensor that was cut by hand: what this rank holds of a global tensor.

    `Shard(local, global_shape, offsets)` is one box; `Shard.of_parts` several, with padding if need be; `Shard.flat` an
    interval of the flattened tensor.

    Args:
        local: the live memory of this rank's part; its shape is the box's.
        global_shape: the shape of the whole, in elements, equal on all ranks.
        offsets: where the part begins in the whole.

    Raises StateError if the part does not lie within the whole.
    """

    __slots__ = ("global_shape", "local", "lowered")

    def __init__(self, local: torch.Tensor, global_shape: Sequence[int], offsets: Sequence[int]) -> None:
        self._hold(local, global_shape, [(offsets, (0,) * local.ndim, tuple(local.shape))])

    @classmethod
    def of_parts(
        cls,
        local: torch.Tensor,
        global_shape: Sequence[int],
        parts: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]],
    ) -> Shard:
        """A part made of several boxes, a fused weight for example. What no box covers of `local` is padding.

        Args:
            local: the live memory.
            global_shape: the shape of the whole.
            parts: for each box: where it begins in the whole, where it begins in `local`, and its sizes.

        Raises StateError for a box that lies within neither, and for boxes that overlap in `local`.
        """
        self = cls.__new__(cls)
        self._hold(local, global_shape, list(parts))
        return self

    @classmethod
    def flat(cls, local: torch.Tensor, global_shape: Sequence[int], start: int) -> Shard:
        """An interval of the flattened tensor, as ZeRO cuts: `local` [n] has its elements `start` to `start + n`.

        Raises StateError if `local` has more than one dimension or leaves the tensor.
        """
        self = cls.__new__(cls)
        self.local, self.global_shape = local, tuple(int(size) for size in global_shape)
        if local.ndim != 1 or not 0 <= start <= start + local.numel() <= math.prod(self.global_shape):
            raise StateError(
                f"a flat Shard of shape {tuple(local.shape)} that begins at element {start} is no interval of a "
                f"flattened tensor of shape {self.global_shape}; give a tensor of one dimension, without padding"
            )
        self.lowered = flat_interval(self.global_shape, int(start), int(start) + local.numel())
        return self

    def _hold(
        self,
        local: torch.Tensor,
        global_shape: Sequence[int],
        parts: list[tuple[Sequence[int], Sequence[int], Sequence[int]]],
    ) -> None:
        self.local = local
        self.global_shape = tuple(int(size) for size in global_shape)
        self.lowered = by_hand(tuple(local.shape), self.global_shape, parts)

    def __repr__(self) -> str:
        return f"Shard({', '.join(str(box) for box, _ in self.lowered.pieces)} of {list(self.global_shape)})"


def by_hand(
    local: tuple[int, ...],
    shape: tuple[int, ...],
    parts: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]],
) -> Lowered:
    """What is held in a local tensor of that shape, as somebody says; see Shard.of_parts. Raises StateError."""
    pieces: list[tuple[Box, Box]] = []
    for offsets, begins, sizes in parts:
        extent = tuple(int(size) for size in sizes)
        box, within = (Box(tuple(int(at) for at in corner), extent) for corner in (offsets, begins))
        alike = len({len(box.offsets), len(within.offsets), len(extent), len(shape), len(local)}) == 1
        fits = alike and min(extent, default=0) >= 0
        if not fits or not (Box.whole(shape).contains(box) and Box.whole(local).contains(within)):
            raise StateError(
                f"a Shard of shape {extent} at offsets {tuple(offsets)} does not lie within a tensor of shape "
                f"{shape}, or at {tuple(begins)} not within a local one of shape {local}; give the shape of the whole "
                "tensor and where this rank's part begins in it"
            )
        if 0 in extent:
            continue
        for _, other in pieces:
            if other.intersect(within):
                raise StateError(
                    f"two parts of a Shard are both in {other.intersect(within)} of the local tensor; each element "
                    "of it can be one of the whole only"
                )
        pieces.append((box, within))
    return Lowered(shape, tuple(pieces))


@functools.lru_cache(maxsize=65536)
def flat_interval(shape: tuple[int, ...], start: int, stop: int, at: int = 0) -> Lowered:
    """The elements [start, stop) of a flattened tensor, in a local tensor of one dimension, from its element `at`."""
    pieces = []
    for box in flat_boxes(shape, start, stop):
        pieces.append((box, Box((at,), (box.numel,))))
        at += box.numel
    return Lowered(shape, tuple(pieces), FLAT)


class PerRank:
    """What differs between ranks: a plain value, or an object with `state_dict` and `load_state_dict`; each rank saves
    and gets its own. (torchdata's `StatefulDataLoader` is taken for such a one without this.)

    Args:
        value: the value, or the object.
        resize: what to give a rank when the checkpoint was written by another number of ranks: called with the values
            (or states) of all the ranks that saved, in their order, this rank, and how many there are now. Without
            it the value stays as it is, and a warning says so.
    """

    __slots__ = ("resize", "value")

    def __init__(self, value: Any, resize: Callable[[Sequence[Any], int, int], Any] | None = None) -> None:
        self.value = value
        self.resize = resize

    def take(self) -> Any:
        """What is saved."""
        return self.value.state_dict() if self.stateful else self.value

    def give(self, value: Any) -> None:
        """What was saved, or made by `resize`, is this rank's from now on."""
        if self.stateful:
            self.value.load_state_dict(value)
        else:
            self.value = value

    @property
    def stateful(self) -> bool:
        """Whether it is an object that gives and takes its state."""
        kind = type(self.value)
        return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


# --- what stands in a value for something that is kept elsewhere


@dataclass(slots=True)
class TensorRef:
    """Stands in a value where a tensor was."""

    name: str


@dataclass(slots=True)
class PerRankRef:
    """Stands in a value where a per-rank value was."""

    path: str


@dataclass(slots=True)
class Disassembled:
    """Stands at the name of a tensor subclass whose parts are tensors of their own, `<name>.<part>`."""

    kind: str
    """The class's name, for messages; it is never imported."""
    parts: tuple[str, ...]
    context: Any
    """What `__tensor_flatten__` gave beside the parts; None if it can't be stored."""
