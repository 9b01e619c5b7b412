"""DeepSpeed: what a rank has of each parameter that one of its engines trains.

Its optimizers keep master weights, in float32 as a rule, in flat tensors which they let an optimizer of torch's kind
step in the parameters' place: of each parameter an interval of its elements, wherever the cuts fall. What the model
computes with is a copy of them, in another dtype perhaps, which a step makes anew; so the masters are what is saved and
loaded, under the parameters' names. Where they lie is taken from the optimizers' own tables: `_hp_mapping`, which
DeepSpeed has for this, is wrong with round-robin gradients. Stage 3 cuts what no optimizer has, too. Knows DeepSpeed's
classes by name and attributes alone (as of 0.19), so that it need not be imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed

from ckpt.state.types import Lowered, flat_interval
from ckpt_formats.errors import StateError
from ckpt_formats.geometry import Box

__all__ = [
    "Held",
    "Masters",
    "counts_in_ints",
    "cut_by_stage3",
    "drop_gathered",
    "groups_of",
    "held_of_stage3",
    "is_deepspeed_optimizer",
    "kind_is_deepspeed_optimizer",
    "masters_of",
    "steps_by",
]

_OURS = "deepspeed.runtime."
_STAGES_1_AND_2 = "DeepSpeedZeroOptimizer"
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "DeepSpeedEngine"
# where each class has its groups of parameters, these flattened, and this rank's part of that as master weights
_TABLES = {
    _STAGES_1_AND_2: ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
    "FP16_Optimizer": ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat"),
}
# without ZeRO, and with an optimizer that is not fused, each parameter has a master of its own
_APART = "FP16_UnfusedOptimizer"
_KNOWN = frozenset((*_TABLES, _STAGE_3, _APART))
_REMEDY = "save with engine.save_checkpoint"


class Held(NamedTuple):
    """What this rank has of one parameter."""

    parameter: torch.nn.Parameter
    local: torch.Tensor
    """Its elements that are here, as they are saved: [n], or in its shape if they are all."""
    lowered: Lowered
    """Which elements these are, in `local`."""
    within: Lowered
    """Which elements these are, in the flat tensor that they lie in."""


class Masters:
    """The master weights that a DeepSpeed optimizer has on this rank.

    Attributes:
        optimizer: DeepSpeed's.
        flats: its flat tensors, each with what this rank has in it of each of the parameters that it stands for.
        alone: masters of a single parameter, which have its shape.
        held: id of a parameter -> what this rank has of it, which may be nothing.
    """

    def __init__(self, optimizer: Any) -> None:
        """Raises StateError for ways of training that are not known here."""
        _refuse(optimizer)
        self.optimizer = optimizer
        self.flats = [(flat, list(members)) for flat, members in _flats_of(optimizer)]
        self.alone = list(_apart(optimizer)) if _name(optimizer) == _APART else []
        everything = [held for _, members in self.flats for held in members] + [held for _, held in self.alone]
        self.held = {id(held.parameter): held for held in everything}
        for held in self.held.values():
            _refuse_parameter(held.parameter)

    def refresh(self) -> None:
        """Make what the model computes with, and what DeepSpeed knows of the slots, from what was loaded.

        Collective over the optimizer's process groups, for stages 1 and 2.
        """
        optimizer = self.optimizer
        with torch.no_grad():
            if _name(optimizer) == _STAGE_3:
                for low, master in zip(
                    optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
                ):
                    low.data.copy_(master.data)  # in float32, one and the same
            elif self.alone:
                for master, held in self.alone:
                    held.parameter.data.copy_(master.data)
            elif _name(optimizer) == "FP16_Optimizer":
                for low, master in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
                    low.data.copy_(master.data)
            else:
                optimizer.update_lp_params()
                # views of slots, which may be other tensors now
                optimizer._hp_optimizer_states_linked = False
                if all(flat in optimizer.optimizer.state for flat, _ in self.flats):
                    optimizer._lazy_init_hp_params_optimizer_state()


def masters_of(things: Iterable[object]) -> list[Masters]:
    """The master weights of all DeepSpeed optimizers among optimizers and modules: of an engine, its optimizer's.

    Raises StateError for engines and optimizers that are not known here.
    """
    found: dict[int, Masters] = {}
    for thing in things:
        optimizer = _optimizer_behind(thing)
        if optimizer is not None and id(optimizer) not in found:
            found[id(optimizer)] = Masters(optimizer)
    return list(found.values())


def _optimizer_behind(thing: Any) -> Any:
    if is_deepspeed_optimizer(thing):
        return thing
    if not isinstance(thing, torch.nn.Module):
        return None
    if any(base.__qualname__ == "PipelineModule" and _of_deepspeed(base) for base in type(thing).__mro__):
        raise StateError(f"a {_name(thing)} of DeepSpeed is in the state, which is not known here; {_REMEDY}")
    kind = next((base for base in type(thing).__mro__ if base.__qualname__ == _ENGINE and _of_deepspeed(base)), None)
    if kind is not None:
        if type(thing) is not kind:
            raise StateError(f"a {_name(thing)} is in the state, which is not known here; {_REMEDY}")
        for parameter in thing.parameters():
            _refuse_cut(parameter)
        optimizer: Any = thing.optimizer
        return optimizer if is_deepspeed_optimizer(optimizer) else None
    # stage 3 says it itself
    return getattr(next(thing.parameters(), None), "_z3_optimizer", None)


def kind_is_deepspeed_optimizer(kind: type) -> bool:
    """Whether these are optimizers of DeepSpeed's own, around one of torch's kind.

    Raises StateError for those that are not known here.
    """
    if not _of_deepspeed(kind) or not any(base.__qualname__ == "DeepSpeedOptimizer" for base in kind.__mro__):
        return False
    if kind.__qualname__ not in _KNOWN:
        raise StateError(
            f"a {kind.__qualname__} of DeepSpeed is in the state, which keeps its parts in a way that is not known "
            f"here; {_REMEDY}, or give what each rank has of each slot as ckpt.Shard.flat"
        )
    return True


def is_deepspeed_optimizer(value: object) -> bool:
    """Whether it is an optimizer of DeepSpeed's own. Raises what `kind_is_deepspeed_optimizer` raises."""
    return kind_is_deepspeed_optimizer(type(value))


def steps_by(optimizer: Any) -> Any:
    """The optimizer of torch's kind that does the steps, and has the slots."""
    return optimizer.optimizer if is_deepspeed_optimizer(optimizer) else optimizer


def groups_of(optimizer: Any) -> list[Mapping[str, Any]]:
    """The parameter groups of an optimizer; of one of DeepSpeed's with its flat tensors as parameters."""
    if not is_deepspeed_optimizer(optimizer):
        groups: list[Mapping[str, Any]] = optimizer.param_groups
        return groups
    inner: list[Mapping[str, Any]] = optimizer.optimizer.param_groups
    if _name(optimizer) != _STAGE_3:
        return inner
    # which hands them to its optimizer for the length of a step only
    flats: list[list[torch.Tensor]] = [[] for _ in inner]
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        flats[optimizer.sub_group_to_group_id[number]].append(flat)
    return [{**group, "params": own} for group, own in zip(inner, flats, strict=True)]


def counts_in_ints(optimizer: Any) -> bool:
    """Whether it steps by an optimizer of DeepSpeed's own making (FusedAdam, DeepSpeedCPUAdam), whose slot `step` is an
    int where torch's have a tensor.
    """
    return is_deepspeed_optimizer(optimizer) and type(optimizer.optimizer).__module__.startswith("deepspeed.ops.")


# --- stage 3


def cut_by_stage3(parameter: torch.Tensor) -> bool:
    """Whether stage 3 has cut a parameter, gathered or not."""
    return hasattr(parameter, "ds_tensor")


def held_of_stage3(parameter: Any, name: str) -> Held:
    """What this rank has of a parameter that no optimizer has. Raises StateError for one that is elsewhere."""
    tensor = parameter.ds_tensor
    if tensor.status.name != "AVAILABLE" or hasattr(tensor, "ds_quant_scale") or not tensor.numel():
        raise StateError(
            f"the parameter {name!r} is cut by DeepSpeed, and is quantized or not in memory; {_REMEDY}", tensor=name
        )
    _refuse_parameter(parameter)
    start, stop = _share(parameter)
    local = tensor.data[: stop - start]
    lowered = flat_interval(_shape(parameter), start, stop)
    return Held(parameter, local, lowered, lowered)


def drop_gathered(parameters: Sequence[Any]) -> None:
    """Let go of what is gathered of parameters that stage 3 has cut, and gather anew what stays so. Collective."""
    if not parameters:
        return
    optimizer = next((p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")), None)
    if optimizer is not None:
        optimizer.parameter_offload.partition_all_parameters()
    first = parameters[0]
    gathered = [parameter for parameter in parameters if parameter.ds_status.name == "AVAILABLE"]
    if gathered:
        first.partition(gathered)
    for parameter in parameters:
        parameter.ds_secondary_tensor = None
    kept = [parameter for parameter in parameters if parameter.ds_persist]
    if kept:
        first.all_gather(kept)


def _stage3(optimizer: Any) -> Iterator[tuple[torch.Tensor, Iterator[Held]]]:
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        yield flat, _in_sub_group(parameters, flat)


def _in_sub_group(parameters: Iterable[Any], flat: torch.Tensor) -> Iterator[Held]:
    at = 0
    for parameter in parameters:
        start, stop = _share(parameter)
        yield _held(parameter, _shape(parameter), start, stop, flat, at)
        at += parameter.ds_tensor.ds_numel  # padding included


def _share(parameter: Any) -> tuple[int, int]:
    """From which element on to which this rank has a parameter."""
    share = int(parameter.ds_tensor.ds_numel)
    start = min(share * distributed.get_rank(parameter.ds_process_group), int(parameter.ds_numel))
    return start, min(start + share, int(parameter.ds_numel))


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in parameter.ds_shape)


# --- the other stages


def _apart(optimizer: Any) -> Iterator[tuple[torch.Tensor, Held]]:
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            box = Box.whole(tuple(parameter.shape))
            whole = Lowered(box.sizes, ((box, box),) if parameter.numel() else ())
            yield master, Held(parameter, master.detach(), whole, whole)


def _flats_of(optimizer: Any) -> Iterator[tuple[torch.Tensor, Iterator[Held]]]:
    if _name(optimizer) == _APART:
        return iter(())
    return _stage3(optimizer) if _name(optimizer) == _STAGE_3 else _stages12(optimizer)


def _stages12(optimizer: Any) -> Iterator[tuple[torch.Tensor, Iterator[Held]]]:
    groups, wholes, masters = (getattr(optimizer, table) for table in _TABLES[_name(optimizer)])
    for index, (parameters, whole, flat) in enumerate(zip(groups, wholes, masters, strict=True)):
        # without ZeRO, every rank has all of it
        cut = flat.numel() != whole.numel()
        rank = distributed.get_rank(optimizer.real_dp_process_group[index]) if cut else 0
        yield flat, _in_partition(parameters, whole, flat, rank * flat.numel())


def _in_partition(
    parameters: Iterable[torch.nn.Parameter], whole: torch.Tensor, flat: torch.Tensor, first: int
) -> Iterator[Held]:
    """`flat` has the elements of `whole` from `first` on, `whole` those of the parameters, which are views of it."""
    last = first + flat.numel()
    for parameter in parameters:
        count = parameter.numel()
        begins = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size() if count else 0
        if not 0 <= begins <= begins + count <= whole.numel():
            raise StateError(
                f"a parameter of shape {list(parameter.shape)} was given other memory than DeepSpeed's optimizer has; "
                "copy into it in place, or, if its states were offloaded, call engine.reload_states() first"
            )
        start = min(max(first - begins, 0), count)
        stop = max(min(last - begins, count), start)
        yield _held(parameter, tuple(parameter.shape), start, stop, flat, max(begins - first, 0))


def _held(
    parameter: torch.nn.Parameter, shape: tuple[int, ...], start: int, stop: int, flat: torch.Tensor, at: int
) -> Held:
    at = at if stop > start else 0
    return Held(
        parameter,
        flat.detach()[at : at + stop - start],
        flat_interval(shape, start, stop),
        flat_interval(shape, start, stop, at),
    )


# --- what is not known


def _refuse(optimizer: Any) -> None:
    """Raise StateError for ways of training that are not known here."""
    what = next(
        (
            what
            for what, found in (
                ("has experts (MoE)", getattr(optimizer, "has_moe_layers", False)),
                ("keeps its state on NVMe", getattr(optimizer, "swap_optimizer", False)),
                ("keeps its parameters on NVMe", getattr(optimizer, "params_in_nvme_and_cpu", False)),
                ("steps by two optimizers (offload_optimizer.ratio)", hasattr(optimizer, "backup_optimizer")),
                ("uses ZenFlow", getattr(optimizer, "zenflow", False)),
            )
            if found
        ),
        None,
    )
    if what is not None:
        raise StateError(f"a {_name(optimizer)} of DeepSpeed {what}, which is not known here; {_REMEDY}")
    if getattr(optimizer, "offloaded_states", None):
        raise StateError(
            f"a {_name(optimizer)} of DeepSpeed has states offloaded; call engine.reload_states() before saving or "
            "loading"
        )


def _refuse_parameter(parameter: Any) -> None:
    if parameter.dtype is torch.float16:
        raise StateError(f"a DeepSpeed engine trains in float16, whose loss scale is not known here; {_REMEDY}")
    _refuse_cut(parameter)


def _refuse_cut(parameter: Any) -> None:
    # the marks that Megatron and DeepSpeed's own tensor parallelism leave; experts that differ between ranks
    cut = getattr(parameter, "model_parallel", False) or getattr(parameter, "tensor_model_parallel", False)
    if cut or not getattr(parameter, "allreduce", True):
        raise StateError(
            f"a parameter of shape {list(parameter.shape)} of a DeepSpeed engine is cut by tensor or expert "
            f"parallelism, which is not known here; {_REMEDY}"
        )


def _name(thing: object) -> str:
    return type(thing).__qualname__


def _of_deepspeed(kind: type) -> bool:
    return kind.__module__.startswith(_OURS)
