"""Marking all that a framework has cut in a module, by a layout instead of tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ckpt.state.modules import note_mark, walk_module
from ckpt.state.types import Lowered
from ckpt_formats.errors import LayoutError, StateError
from ckpt_formats.geometry import Box
from ckpt_formats.layout import Layout, Mesh
from ckpt_formats.layout.lowering import strides_of
from ckpt_formats.layout.resolved import LocalTensor, Resolved

__all__ = ["mark_layout"]


def mark_layout(
    module: nn.Module,
    layout: Layout,
    mesh: Mesh,
    shapes: nn.Module | Mapping[str, Sequence[int]],
    *,
    rank: int | None = None,
) -> None:
    """Say of all parameters and buffers of a module what they are of the whole model's, as `mark` does of one.

    Args:
        module: this rank's module, plain tensors in it, not wrapped by DDP or FSDP yet.
        layout: how tensors lie on the ranks; rules in which a tensor of the rank is, or is part of, the one of the same
            name, or of the one that this name is tied to.
        mesh: axes and sizes, such as Mesh.parse("dp=2,tp=4").
        shapes: name within the module -> shape of the whole tensor; or the whole model, on the meta device if need be.
        rank: which rank of the mesh this is; by default that of the default process group.

    Raises:
        LayoutError: the layout is wrong or does not fit the shapes, or says what can't be marked: tensors of which
            several are one on the ranks, or which have other names there.
        StateError: the module has not the tensors, or not the ties, that the layout says, of the shapes that it says.
            Nothing is marked.
    """
    if isinstance(shapes, nn.Module):
        shapes = {name: tuple(tensor.shape) for name, tensor in walk_module(shapes).members}
    wholes = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    resolved = layout.resolve(mesh, wholes)
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    held = resolved.local(rank)
    found: list[tuple[nn.Module, str, Lowered]] = []
    seen: set[str] = set()
    ties: dict[str, tuple[str, torch.Tensor, Lowered]] = {}
    for fqn, owner, name, tensor in _tensors(module):
        if fqn not in wholes and fqn not in resolved.aliases:
            raise StateError(
                f"the module has a tensor {fqn!r} of whose whole nothing is said; its shape has to be among the "
                "shapes, and if the module is wrapped (by DDP, say), mark it before",
                tensor=fqn,
            )
        local = held.get(fqn)
        if local is None:
            raise StateError(
                f"the module has a tensor {fqn!r}, and by {resolved.rule(fqn)} rank {rank} has none of that name",
                tensor=fqn,
            )
        if tuple(tensor.shape) != tuple(local.shape):
            raise StateError(
                f"the tensor {fqn!r} has the shape {list(tensor.shape)}, and by {resolved.rule(fqn)} rank {rank} has "
                f"{list(local.shape)} of it; mend the layout or the mesh",
                tensor=fqn,
            )
        seen.add(fqn)
        lowered = _lowered(resolved, fqn, local)
        _check_tie(resolved, (fqn, tensor, lowered), ties)
        if lowered.pieces != ((Box.whole(lowered.shape),) * 2,) or tuple(tensor.shape) != lowered.shape:
            found.append((owner, name, lowered))
    lacking = next((name for name in held if name not in seen), None)
    if lacking is not None:
        raise StateError(f"by the layout rank {rank} has {lacking!r}, and the module has not", tensor=lacking)
    for owner, name, lowered in found:
        note_mark(owner, name, lowered)


def _check_tie(
    resolved: Resolved, here: tuple[str, torch.Tensor, Lowered], ties: dict[str, tuple[str, torch.Tensor, Lowered]]
) -> None:
    """Refuse names that the layout ties and the module does not, and a tensor of which two rules say two things.

    `ties`: tensor of the checkpoint -> the first that the module has of its names. Where a stage of a pipeline has only
    one of them, there is nothing to compare.
    """
    name, tensor, lowered = here
    first, known, said = ties.setdefault(resolved.aliases.get(name, name), here)
    if known is not tensor:
        raise StateError(
            f"by the layout {name!r} and {first!r} are one tensor, and in the module they are two; tie them there, or "
            "give each a rule without `tied`",
            tensor=name,
        )
    if said.pieces != lowered.pieces:
        raise LayoutError(
            f"{name!r} and {first!r} are one tensor in the module, and {resolved.rule(name)} cuts it in another way "
            f"than {resolved.rule(first)}; give both the same cut",
            tensor=name,
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Fully qualified name, module, name in it, tensor: what is saved of a module, tied tensors under each name."""
    for path, owner in module.named_modules(remove_duplicate=False):
        passing = owner._non_persistent_buffers_set
        buffers = {name: buffer for name, buffer in owner._buffers.items() if name not in passing}
        for name, tensor in {**owner._parameters, **buffers}.items():
            if tensor is not None:
                fqn = f"{path}.{name}" if path else name
                if isinstance(tensor, DTensor):
                    raise StateError(f"{fqn!r} is a DTensor, which says itself how it is cut", tensor=fqn)
                yield fqn, owner, name, tensor


def _lowered(resolved: Resolved, name: str, local: LocalTensor) -> Lowered:
    """What a rank's tensor is of the whole one of the same name, or of the one that this name is tied to."""
    whole = resolved.aliases.get(name, name)
    strides = strides_of(local.shape)
    pieces: list[tuple[Box, Box]] = []
    for piece in local.pieces:
        sizes = piece.box.sizes
        if 0 in sizes:
            continue
        alike = len(sizes) == len(strides) and all(
            size == 1 or here == there for size, here, there in zip(sizes, piece.strides, strides, strict=True)
        )
        if piece.tensor != whole or not alike:
            raise LayoutError(
                f"{resolved.rule(piece.tensor)} puts {piece.tensor!r} {piece.box} into the ranks' tensor {name!r} in a "
                "way that can't be marked: a tensor there has to be, or be part of, the one of the same name; give "
                "what is joined, stacked or flat as ckpt.Shard, or keep it in one tensor of the checkpoint by `parts`",
                tensor=name,
            )
        left, corner = piece.start, []
        for stride in strides:
            at, left = divmod(left, stride) if stride else (0, left)
            corner.append(at)
        pieces.append((piece.box, Box(tuple(corner), sizes)))
    mesh = resolved.mesh
    return Lowered(resolved.tensors[whole], tuple(pieces), resolved.cut(whole), (tuple(mesh.names), tuple(mesh.shape)))
