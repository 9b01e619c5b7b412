"""What a training state is once it has been taken apart: named tensors as boxes over live memory, and plain values.

Saving reads from these, loading writes into them. This module knows nothing of modules, optimizers, files or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ckpt_formats.errors import StateError
from ckpt_formats.geometry import Box

__all__ = [
    "Disassembled",
    "LocalState",
    "LocalTensor",
    "Mesh",
    "PerRank",
    "PerRankRef",
    "Piece",
    "SavedState",
    "SavedTensor",
    "Shard",
    "TensorRef",
]

Mesh = tuple[tuple[str, ...], tuple[int, ...]]
"""Names and sizes of the axes of the device mesh that a tensor is cut over."""


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
    """A tensor that was cut by hand: this rank's box of a global tensor.

    Args:
        local: the live memory of this rank's part; its shape is the box's.
        global_shape: the shape of the whole, in elements, equal on all ranks.
        offsets: where the part begins in the whole.

    Raises StateError if the part does not lie within the whole.
    """

    __slots__ = ("global_shape", "local", "offsets")

    def __init__(self, local: torch.Tensor, global_shape: Sequence[int], offsets: Sequence[int]) -> None:
        self.local = local
        self.global_shape = tuple(int(size) for size in global_shape)
        self.offsets = tuple(int(offset) for offset in offsets)
        sizes = tuple(local.shape)
        inside = len(sizes) == len(self.global_shape) == len(self.offsets) and all(
            offset >= 0 and offset + size <= whole
            for offset, size, whole in zip(self.offsets, sizes, self.global_shape, strict=True)
        )
        if not inside:
            raise StateError(
                f"a Shard of shape {sizes} at offsets {self.offsets} does not lie within a tensor of shape "
                f"{self.global_shape}; give the shape of the whole tensor and where this rank's part begins in it"
            )

    def __repr__(self) -> str:
        return f"Shard({Box(self.offsets, tuple(self.local.shape))} of {list(self.global_shape)})"


class PerRank:
    """A plain value that differs between ranks; each rank saves and gets its own."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

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
