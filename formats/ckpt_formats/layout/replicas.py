"""A tensor out of what ranks hold of it, and what becomes of replicas that disagree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.errors import LayoutError, ValuesDifferError
from ckpt_formats.layout.resolved import Holder, Resolved

__all__ = ["assemble"]

Local = Callable[[int, str], AnyArray]
"""Rank and name -> what the rank's tensor of that name has, contiguous."""


def assemble(resolved: Resolved, name: str, local: Local) -> AnyArray:
    """Make a whole tensor out of what the ranks hold.

    Every replica is looked at. Where they disagree, the tensor's rule says what holds: it is an error, unless the rule
    asks for the first, which is the lowest rank's, or for the average, which is computed in float64.

    Raises:
        ValuesDifferError: replicas are not the same, bit for bit, and the rule does not say that they may.
        LayoutError: an average of what is no floating-point tensor is asked for.
        KeyError: there is no such tensor.
    """
    name = resolved.aliases.get(name, name)
    holders = list(resolved.holders(name))
    shape = resolved.tensors[name]
    how = resolved.rule_of(name).replicas
    whole: AnyArray | None = None
    for holder in holders:
        if not holder.piece.copy:
            found = holder.piece.view(local(resolved.mesh.first_rank(holder.where), holder.local))
            if whole is None:
                whole = np.empty(shape, dtype=found.dtype)
            whole[holder.piece.box.slices()] = found
    if whole is None:
        raise LayoutError(f"the tensor {name!r} of shape {list(shape)} has no elements on any rank", tensor=name)
    if how == "average":
        return _average(resolved, name, holders, local, whole)
    if how == "equal":
        for holder in holders:
            here = np.ascontiguousarray(whole[holder.piece.box.slices()])
            for rank in resolved.mesh.ranks(holder.where):
                there = np.ascontiguousarray(holder.piece.view(local(rank, holder.local)))
                if here.tobytes() != there.tobytes():
                    raise ValuesDifferError(
                        f"the tensor {name!r} should be the same on all ranks that hold {holder.piece.box} of it, and"
                        f" {holder.local!r} of rank {rank} differs; if it may, {resolved.rule(name)} has to say"
                        ' replicas = "first" or "average"',
                        tensor=name,
                        rank=rank,
                    )
    return whole


def _average(resolved: Resolved, name: str, holders: list[Holder], local: Local, whole: AnyArray) -> AnyArray:
    if whole.dtype.kind in "biuc":
        raise LayoutError(
            f"{resolved.rule(name)} asks for the average of replicas, and the tensor {name!r} is {whole.dtype}",
            tensor=name,
        )
    total = np.zeros(whole.shape, np.float64)
    count = np.zeros(whole.shape, np.int64)
    for holder in holders:
        box = holder.piece.box.slices()
        for rank in resolved.mesh.ranks(holder.where):
            total[box] += holder.piece.view(local(rank, holder.local)).astype(np.float64)
            count[box] += 1
    return (total / count).astype(whole.dtype)
