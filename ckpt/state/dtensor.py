"""DTensors as boxes of the global tensor, and new DTensors for optimizer slots that a live state lacks.

Knows torch's placements and meshes, and nothing of names of states, of files, or of other ranks: what a rank holds
follows from the placements and its own coordinate.

How a dimension is cut over several mesh axes is ambiguous in torch. FSDP2 over tensor parallelism marks its axis
`_StridedShard`; what a rank then really holds is the tensor-parallel shard, cut once more (cut from right to left), and
this is also how torch's own `full_tensor` reads it. `distribute_tensor` with the same placements cuts from left to
right by the strided rule instead, and gives other rows when sizes are uneven (7 over 3 x 2, say). Both are computed
here where they differ, and the shape of the local tensor decides; where it fits both, FSDP2 does.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt.state.types import Lowered
from ckpt_formats.errors import StateError
from ckpt_formats.geometry import (
    Interval,
    boxes_from_intervals,
    shard_intervals,
    strided_shard_intervals,
)

__all__ = ["Lowered", "local_tensor", "lower", "replicated", "zeros_like"]


def lower(tensor: DTensor, name: str = "") -> Lowered:
    """The boxes of the global tensor that this rank's local tensor consists of.

    Any number of mesh axes, in any placements but `Partial`, with uneven and empty shards. What is found is kept, by
    the tensor's own description and by its shape, placements and mesh: asking again costs less than a microsecond.

    StateError, which names the tensor by `name`, when a placement is `Partial` or unknown, or when the local tensor
    has not the shape that the placements give it.
    """
    spec = tensor._spec
    found = _by_spec.get(id(spec))
    if found is None or found[0]() is not spec:
        found = _remember(spec, name)
    local_shape = tensor._local_tensor.shape
    for expected, lowered in found[1]:
        if expected == local_shape or not (lowered.pieces or local_shape.numel()):
            return lowered
    expected, lowered = found[1][0]
    raise StateError(
        f"the local tensor of the DTensor {name!r} has shape {list(local_shape)}, but {lowered.cut} gives this rank"
        f" {list(expected)} of {list(lowered.shape)}; when it was made by DTensor.from_local from uneven shards, give"
        " that call the global shape and cut as torch.chunk does, else mark the tensor with ckpt.Shard",
        tensor=name or None,
    )


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """This rank's own part, sharing memory with the DTensor; it is complete when this returns."""
    local: torch.Tensor = tensor._local_tensor
    # the result of a collective that may still run
    return local.wait() if hasattr(local, "wait") else local


def zeros_like(tensor: DTensor, dtype: torch.dtype | None = None) -> DTensor:
    """A DTensor of zeros on the same mesh with the same shape and placements, as an optimizer makes its slots."""
    return cast(DTensor, torch.zeros_like(tensor.detach(), dtype=dtype))


def replicated(tensor: DTensor, shape: Sequence[int], dtype: torch.dtype) -> DTensor:
    """A DTensor of zeros of another shape, whole on every rank of the same mesh."""
    mesh = tensor.device_mesh
    local = torch.zeros(tuple(shape), dtype=dtype, device=tensor._local_tensor.device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)


# --- from placements to intervals of each dimension


class _RefusalError(Exception):
    """Why placements can't be lowered, as the end of a sentence about the tensor."""


class _Cut(NamedTuple):
    """One mesh axis that cuts a tensor dimension."""

    dim: int
    split_factor: int
    parts: int
    part: int


_Readings = list[tuple[tuple[int, ...], Lowered]]
"""What a rank may hold, the most credible first, each after the shape that its local tensor then has."""

# The specs of live DTensors that have been lowered. Torch makes one for each DTensor and never changes it; to hash its
# placements takes longer than all the rest.
_by_spec: dict[int, tuple[weakref.ref[DTensorSpec], _Readings]] = {}


def _remember(spec: DTensorSpec, name: str) -> tuple[weakref.ref[DTensorSpec], _Readings]:
    mesh = spec.mesh
    coordinate = mesh.get_coordinate()
    try:
        readings = _lower(
            tuple(spec.shape),
            spec.placements,
            getattr(spec, "shard_order", None),
            mesh.mesh_dim_names,
            tuple(mesh.shape),
            None if coordinate is None else tuple(coordinate),
        )
    except _RefusalError as refusal:
        raise StateError(f"the DTensor {name!r} {refusal}", tensor=name or None) from None
    key = id(spec)

    def forget(_: object, specs: dict[int, Any] = _by_spec) -> None:
        specs.pop(key, None)

    found = _by_spec[key] = (weakref.ref(spec, forget), readings)
    return found


@functools.lru_cache(maxsize=65536)
def _lower(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    shard_order: Sequence[tuple[int, Sequence[int]]] | None,
    names: tuple[str, ...] | None,
    sizes: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
) -> _Readings:
    """What the rank at `coordinate` may hold.

    Raises _RefusalError. `shard_order` is torch's: for each tensor dimension, the mesh axes in the order in which they
    cut it.
    """
    names = names or tuple(str(axis) for axis in range(len(sizes)))
    cuts = _cuts(placements, len(shape), sizes, coordinate or (0,) * len(sizes))
    orders = {dim: [axis for axis, cut in cuts.items() if cut.dim == dim] for dim in {cut.dim for cut in cuts.values()}}
    explicit = {int(dim): list(axes) for dim, axes in shard_order or ()}
    if explicit not in ({}, orders):
        for axes in explicit.values():
            for position, axis in enumerate(axes):
                passed = math.prod(sizes[other] for other in axes[:position] if other > axis)
                cuts[axis] = cuts[axis]._replace(split_factor=passed)
        ways = [_nested(shape, cuts, explicit)]
    else:
        ways = [_strided(shape, cuts, orders)]
        decoded = {dim: _cutting_order(cuts, axes, sizes) for dim, axes in orders.items()}
        known = {dim: axes for dim, axes in decoded.items() if axes is not None}
        if len(known) == len(decoded):
            ways.insert(0, _nested(shape, cuts, known))
    words = []
    for axis, axis_name in enumerate(names):
        if axis in cuts:
            dim, factor, _, _ = cuts[axis]
            words.append(f"SS({dim},{factor})@{axis_name}" if factor > 1 else f"S({dim})@{axis_name}")
        else:
            words.append(f"R@{axis_name}")
    nothing = Lowered(shape, (), " ".join(words), (names, sizes))
    if coordinate is None:  # this rank is not part of the mesh
        return [((0,), nothing)]
    readings = []
    for per_dim in ways:
        extent = tuple(sum(stop - start for start, stop in intervals) for intervals in per_dim)
        readings.append((extent, nothing._replace(pieces=tuple(boxes_from_intervals(per_dim)))))
    return readings[:1] if readings[0] == readings[-1] else readings


def _cuts(
    placements: Sequence[Placement], ndim: int, sizes: Sequence[int], coordinate: Sequence[int]
) -> dict[int, _Cut]:
    """The mesh axes that cut something, in the mesh's order."""
    cuts = {}
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if placement.is_partial() or isinstance(placement, Partial):
            raise _RefusalError(
                f"is {placement} over an axis of its mesh: its ranks hold terms of a sum, not its values; call"
                " .redistribute() with Replicate() or Shard(dim) in its place first"
            )
        if not isinstance(placement, Shard | _StridedShard):
            raise _RefusalError(f"has a placement of a type that is not known: {placement!r}")
        if not 0 <= placement.dim < ndim:
            raise _RefusalError(f"is cut in dimension {placement.dim}, which it does not have")
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        cuts[axis] = _Cut(placement.dim, factor, sizes[axis], coordinate[axis])
    return cuts


def _cutting_order(cuts: dict[int, _Cut], axes: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """In which order these mesh axes cut their dimension, if that is what their split factors say; else None.

    An axis whose factor is the product of axes to its right was cut after those, FSDP2's axis after tensor parallelism.
    """
    order: list[int] = []
    for axis in reversed(axes):
        passed = 1
        position = 0
        while passed != cuts[axis].split_factor and position < len(order):
            passed *= sizes[order[position]]
            position += 1
        if passed != cuts[axis].split_factor:
            return None
        order.insert(position, axis)
    return order


def _nested(shape: Sequence[int], cuts: dict[int, _Cut], orders: dict[int, list[int]]) -> list[list[Interval]]:
    """The intervals of each dimension when its axes cut it one within the other, in these orders."""
    per_dim: list[list[Interval]] = [[(0, extent)] for extent in shape]
    for dim, axes in orders.items():
        for axis in axes:
            per_dim[dim] = shard_intervals(per_dim[dim], cuts[axis].parts, cuts[axis].part)
    return per_dim


def _strided(shape: Sequence[int], cuts: dict[int, _Cut], orders: dict[int, list[int]]) -> list[list[Interval]]:
    """The intervals of each dimension when its axes cut it from left to right, each by its placement's own rule."""
    per_dim: list[list[Interval]] = [[(0, extent)] for extent in shape]
    for dim, axes in orders.items():
        for axis in axes:
            _, factor, parts, part = cuts[axis]
            if factor > 1:
                per_dim[dim] = strided_shard_intervals(per_dim[dim], parts, part, factor)
            else:
                per_dim[dim] = shard_intervals(per_dim[dim], parts, part)
    return per_dim
