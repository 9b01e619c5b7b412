"""FSDP1: what a rank's flat shard has of each of the parameters that were flattened into it.

`FullyShardedDataParallel` concatenates the parameters of its module, flattened and padded, and gives each rank an equal
interval of that, wherever it falls. What lies where is in the metadata of the flat parameter; nothing is gathered. This
is the same whatever `state_dict_type` was chosen, with `use_orig_params` or without, and while a forward pass has left
the full parameters there. Knows torch's class by its attributes alone, so that it need not be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ckpt.state.types import Lowered, flat_interval
from ckpt_formats.errors import StateError

__all__ = ["FlatMember", "drop_gathered", "flat_parameter", "members_of"]


class FlatMember(NamedTuple):
    """One parameter of the model within a flat parameter."""

    module: torch.nn.Module
    """The module that has it."""
    name: str
    """What it is called there."""
    first: tuple[torch.nn.Module, str] | None
    """The parameter that it is tied to, if it is; then the rest is that one's."""
    local: torch.Tensor
    """The elements that this rank has of it, in one dimension; or all of it, if the flat parameter is not cut."""
    lowered: Lowered | None
    """Which elements these are, in `local`; None if they are all."""
    within: Lowered
    """Which elements these are, in the flat parameter of this rank."""
    parameter: torch.nn.Parameter | None
    """With `use_orig_params`, what optimizers have in its place."""


def flat_parameter(wrapper: Any) -> torch.nn.Parameter | None:
    """The flat parameter of a FullyShardedDataParallel; None if its module has no parameters of its own."""
    handle = wrapper._handle
    return None if handle is None else handle.flat_param


def members_of(wrapper: Any, name: str) -> Iterator[FlatMember]:
    """The parameters in the flat parameter of a FullyShardedDataParallel, which messages call `name`.

    StateError when its full parameters are in use (within `summon_full_params`, or in a forward pass), when it was
    flattened in another way than row by row, or on top of tensor parallelism, and when the memory of a parameter was
    replaced.
    """
    handle = wrapper._handle
    if handle is None:
        return
    flat = handle.flat_param
    if handle._training_state.name != "IDLE":
        raise StateError(
            f"{name}, a FullyShardedDataParallel, has its full parameters in use; save and load outside of "
            "summon_full_params, and neither in a forward nor in a backward pass"
        )
    if any(extension is not None for extension in flat._param_extensions):
        raise StateError(
            f"{name} is a FullyShardedDataParallel over tensor parallelism, whose flat parameter can't be taken apart; "
            "use torch.distributed.fsdp.fully_shard"
        )
    # while the full parameters are there, the flat one stands for them; this rank's own part is kept beside
    shard = getattr(flat, "_local_shard", None)
    shard = flat.data if shard is None else shard
    cut = handle.uses_sharded_strategy
    originals = flat._params if handle._use_orig_params else [None] * flat._num_params
    exposed = cut and not handle._skipped_use_sharded_views and flat.data_ptr() == shard.data_ptr()
    made: dict[tuple[int, str], FlatMember] = {}
    for info, shape, contiguous, place, original in zip(
        flat._param_infos, flat._shapes, flat._contiguities, flat._shard_param_infos, originals, strict=True
    ):
        if not contiguous:
            raise StateError(
                f"the parameter {info.param_name!r} below {name}, a FullyShardedDataParallel, was not contiguous when "
                "it was flattened; call .contiguous() on it before wrapping, or use fully_shard"
            )
        at, count = (place.offset_in_shard, place.numel_in_shard) if place.in_shard else (0, 0)
        first = place.intra_param_start_idx if place.in_shard else 0
        local = shard[at : at + count]
        if exposed and original is not None and count and original.data_ptr() != local.data_ptr():
            raise StateError(
                f"the parameter {info.param_name!r} below {name} was given other memory than its "
                "FullyShardedDataParallel has; copy into it in place, or run the model once",
            )
        made[id(info.module), info.param_name] = member = FlatMember(
            module=info.module,
            name=info.param_name,
            first=None,
            local=local if cut else local.view(shape),
            lowered=flat_interval(tuple(shape), first, first + count) if cut else None,
            within=flat_interval(tuple(shape), first, first + count, at),
            parameter=original,
        )
        yield member
    shared = flat._shared_params if handle._use_orig_params else [None] * len(flat._shared_param_infos)
    for info, original in zip(flat._shared_param_infos, shared, strict=True):
        twin = made[id(info.prim_module), info.prim_param_name]
        yield twin._replace(
            module=info.module, name=info.param_name, first=(twin.module, twin.name), parameter=original
        )


def drop_gathered(wrapper: Any) -> None:
    """Free the full parameters that a forward pass has left: the next one gathers them anew."""
    handle = wrapper._handle
    if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
        handle.reshard(True)
        handle.post_reshard()
