"""How much a rank will have to write of a state, before it is saved for the first time: a guess, to make room ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt.state import flatten
from ckpt.state.deepspeed import groups_of
from ckpt.state.dtensor import local_tensor
from ckpt.state.entries import entries_of
from ckpt.state.optimizers import state_of

_SLACK = 1 << 20
"""Bytes for headers and plain values."""


def expected_bytes(state: Mapping[str, object], world_size: int) -> int:
    """Bytes that this rank will have to write of a state.

    What several ranks hold is divided between them. An optimizer that has not stepped yet is taken to make the slots
    that its hyperparameters tell of.
    """
    held = share = 0
    for tensor in flatten(state).tensors.values():
        own = sum(piece.view.nbytes for piece in tensor.pieces)
        whole = math.prod(tensor.shape) * tensor.dtype.itemsize
        held += own
        # as if it were cut evenly, or whole on every rank
        share += own * whole // max(whole, own * world_size, 1)
    missing = 0
    for entry in entries_of(state):
        if entry.kind != "optimizer":
            continue
        state = state_of(entry.value)
        for group in groups_of(entry.value):
            slots = _slots(group)
            missing += sum(slots * _nbytes(p) for p in group["params"] if p not in state)
    return share + (missing * share // held if held else 0) + _SLACK


def _slots(group: Mapping[str, Any]) -> int:
    """How many tensors of its size an optimizer keeps for a parameter of this group."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    if "momentum" in group:
        return 1 if group["momentum"] else 0
    return 1


def _nbytes(parameter: torch.Tensor) -> int:
    local = local_tensor(parameter) if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()
