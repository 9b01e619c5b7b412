"""Save and load a state without files: what `flatten` gives is copied, and `build_target` is filled from the copy.

Values go through their encoding, so that what is loaded shares nothing with what was saved. Ranks gather all pieces, so
that each can load into whatever it holds now. Stands in for the engine in tests of ckpt.state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ckpt.state import LocalState, SavedState, SavedTensor, Target, build_target, flatten
from ckpt.state.references import LEAVES, encode_leaf
from ckpt_formats.geometry import Box
from ckpt_formats.values import decode, encode


@dataclass
class Saved:
    """A checkpoint in memory."""

    tensors: dict[str, SavedTensor]
    pieces: dict[str, dict[Box, torch.Tensor]]
    aliases: dict[str, str]
    values: dict[str, str]
    """Path -> JSON."""
    per_rank: list[dict[str, str]]
    entries: dict[str, Any]

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        name = self.aliases.get(name, name)
        dtype, shape = self.tensors[name]
        full = torch.empty(shape, dtype=dtype)
        for box, data in self.pieces[name].items():
            full[box.slices()] = data
        return full


def encoded(values: dict[str, Any]) -> dict[str, str]:
    return {path: json.dumps(encode(value, path, leaf=encode_leaf)) for path, value in values.items()}


def decoded(values: dict[str, str]) -> dict[str, Any]:
    return {path: decode(json.loads(value), path, leaf=LEAVES) for path, value in values.items()}


def save(state: Any) -> Saved:
    """Copy all that the ranks hold of a state."""
    return joined(gathered(copied(flatten(state))))


def copied(local: LocalState) -> Saved:
    """A copy of what this rank holds."""
    return Saved(
        {name: SavedTensor(tensor.dtype, tensor.shape) for name, tensor in local.tensors.items()},
        {name: {piece.box: piece.view.clone() for piece in tensor.pieces} for name, tensor in local.tensors.items()},
        dict(local.aliases),
        encoded(local.values),
        [encoded(local.per_rank)],
        json.loads(json.dumps(local.entries)),
    )


def gathered(mine: Saved) -> list[Saved]:
    if not distributed.is_initialized():
        return [mine]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return parts


def joined(parts: list[Saved]) -> Saved:
    """What all ranks hold, made one. Boxes that several hold must be equal bit for bit."""
    whole = Saved({}, {}, {}, {}, [], parts[0].entries)
    for part in parts:
        whole.aliases |= part.aliases
        whole.per_rank += part.per_rank
        for path, value in part.values.items():
            assert whole.values.setdefault(path, value) == value, path
        for name, tensor in part.tensors.items():
            assert whole.tensors.setdefault(name, tensor) == tensor, name
            for box, data in part.pieces[name].items():
                there = whole.pieces.setdefault(name, {}).setdefault(box, data)
                assert same_bits(there, data), f"ranks hold different values of {name}{box}"
            whole.pieces.setdefault(name, {})
    return whole


def saved_state(saved: Saved) -> SavedState:
    """What a manifest would say of it."""
    return SavedState(tensors=saved.tensors, aliases=saved.aliases, values=decoded(saved.values), entries=saved.entries)


def load(state: Any, saved: Saved, *, rank: int = 0, same_world: bool = True) -> Target:
    """Fill a state, as far as names go; return what it was filled through."""
    known = saved_state(saved)
    target = build_target(state, known)
    fill(target, saved)
    target.apply(known.values, decoded(saved.per_rank[rank]) if same_world else None)
    return target


def fill(target: Target, saved: Saved) -> None:
    """Copy the bytes of every tensor that a target needs."""
    with torch.no_grad():
        for name, local in target.tensors.items():
            full = saved.whole(name)
            for piece in local.pieces:
                piece.view.copy_(full[piece.box.slices()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, nan included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.ndim == 0:
        one, other = one[None], other[None]
    one, other = one.detach().contiguous(), other.detach().contiguous()
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
