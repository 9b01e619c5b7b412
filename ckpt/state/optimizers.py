"""Optimizers: their slots and parameter groups, by the names of parameters instead of by position.

A parameter is known by identity. If one module of the state has all parameters of an optimizer, they are called by
their names in it, as by `torch.distributed.checkpoint.state_dict`; else by the name of the entry and their name in it.
The optimizer's own tables are read as they are: no step is run, no hook called, no state made. A flat parameter, as
FSDP1 and DeepSpeed make them, stands for all parameters that are in it: each has its own part of each slot. Of a
ZeroRedundancyOptimizer each rank has the state of some parameters, which is read where it is. This module knows no
files, and not how what it finds is loaded again; slots.py does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ckpt.state.deepspeed import counts_in_ints, groups_of, is_deepspeed_optimizer, steps_by
from ckpt.state.dtensor import lower
from ckpt.state.inventory import Inventory
from ckpt.state.modules import ModuleState
from ckpt.state.tensor_values import copied
from ckpt.state.types import FLAT, Lowered
from ckpt_formats.errors import StateError
from ckpt_formats.geometry import Box

__all__ = [
    "Cut",
    "Naming",
    "Parameters",
    "cut_of",
    "enter_optimizer",
    "flat_numel",
    "hyperparameters",
    "is_zero",
    "keeps",
    "name_parameters",
    "own_extras",
    "state_of",
]

_SCALAR: Final = Box((), ())

_POSITIONAL = frozenset(("params", "param_names"))  # lists that run along the parameters of a group


@dataclass(slots=True)
class Parameters:
    """Everything in a state that an optimizer may own."""

    modules: dict[str, dict[int, str]] = field(default_factory=dict)
    """Name of an entry -> (id of a parameter -> its name within the entry)."""
    tensors: dict[int, str] = field(default_factory=dict)
    """id of a tensor that is in the state itself -> its name."""
    cuts: dict[int, Lowered] = field(default_factory=dict)
    """id of a parameter in plain memory of which this rank has a part -> which part that is."""
    absent: set[int] = field(default_factory=set)
    """ids of parameters that are elsewhere altogether, and so have no state here."""
    flats: dict[int, list[tuple[str, Lowered]]] = field(default_factory=dict)
    """id of a flat parameter -> the names, within the entry, of those in it, and where in it their elements are."""

    def add(self, entry: str, found: ModuleState) -> None:
        """Note what a module has."""
        self.modules[entry] = found.parameters
        self.cuts |= found.cuts
        self.flats |= found.flats
        self.absent |= found.absent


@dataclass(slots=True)
class Naming:
    """What the parameters of one optimizer are called."""

    modules: dict[str, str]
    """First part of a parameter's name -> the entry that has it. `{"": "model"}` if names are those within "model",
    whose tensors are `model.<name>`; `{"model": "model", …}` if names begin with the entry's, as tensors' do."""
    names: dict[int, str]
    """id of a parameter -> its name."""
    flats: dict[int, list[tuple[str, Lowered]]] = field(default_factory=dict)
    """id of a flat parameter -> the names of those in it, and where in it their elements are."""

    def of(self, parameter: torch.Tensor) -> list[str]:
        """The name of a parameter, or the names of those that a flat one stands for."""
        flat = self.flats.get(id(parameter))
        return [self.names[id(parameter)]] if flat is None else [name for name, _ in flat]

    def tensor(self, name: str) -> str:
        """The name of the tensor of a parameter."""
        if "" not in self.modules:
            return name
        return name[1:] if name.startswith(".") else f"{self.modules['']}.{name}"

    def name(self, tensor: str) -> str:
        """The inverse: the name of the parameter whose tensor has that name.

        One outside the module within which names are has a name that begins with a dot, as none within it does.
        """
        if "" not in self.modules:
            return tensor
        inner = f"{self.modules['']}."
        return tensor.removeprefix(inner) if tensor.startswith(inner) else f".{tensor}"


def name_parameters(
    key: str, optimizer: torch.optim.Optimizer, parameters: Parameters, saved: Mapping[str, str] | None = None
) -> Naming:
    """Name the parameters of an optimizer.

    With `saved`, the `modules` of a checkpoint's `Naming`, they are named as they are there, if possible.

    Raises StateError for a parameter that belongs to nothing in the state, and for optimizers that keep their state
    elsewhere.
    """
    _refuse_unknown(key, optimizer)
    wanted = [parameter for group in groups_of(optimizer) for parameter in group["params"]]
    sole = None
    if wanted:
        holding = (entry for entry, names in parameters.modules.items() if id(wanted[0]) in names)
        sole = next((entry for entry in holding if parameters.modules[entry].keys() >= {id(p) for p in wanted}), None)
    if sole is not None and (not saved or saved.get("") == sole):
        known = parameters.modules[sole]
        flats = {id(p): parameters.flats[id(p)] for p in wanted if id(p) in parameters.flats}
        return Naming({"": sole}, {id(parameter): known[id(parameter)] for parameter in wanted}, flats)

    naming = Naming({}, {})
    order = list(parameters.modules)
    order.sort(key=lambda entry: entry != sole)
    if saved and "" in saved:
        # There, all were in one module and called by their names in it
        inner = f"{saved['']}."
        order.sort(key=lambda entry: not f"{entry}.".startswith(inner))
    for group_index, index, parameter in _positions(optimizer):
        for entry in order:
            fqn = parameters.modules[entry].get(id(parameter))
            if fqn is not None:
                naming.names[id(parameter)] = f"{entry}.{fqn}"
                naming.modules[entry] = entry
                if id(parameter) in parameters.flats:
                    naming.flats[id(parameter)] = [
                        (f"{entry}.{name}", within) for name, within in parameters.flats[id(parameter)]
                    ]
                break
        else:
            name = parameters.tensors.get(id(parameter))
            if name is None:
                raise _unowned(key, group_index, index, parameter)
            naming.names[id(parameter)] = name
            naming.modules[name] = name
    if saved and "" in saved:
        there = Naming(dict(saved), {})
        naming.names = {known: there.name(name) for known, name in naming.names.items()}
        naming.flats = {
            known: [(there.name(name), within) for name, within in flat] for known, flat in naming.flats.items()
        }
    return naming


def _positions(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, torch.Tensor]]:
    for group_index, group in enumerate(groups_of(optimizer)):
        for index, parameter in enumerate(group["params"]):
            yield group_index, index, parameter


def _unowned(key: str, group: int, index: int, parameter: torch.Tensor) -> StateError:
    return StateError(
        f"the optimizer {key!r} has a parameter that nothing in the state has: number {index} of its group {group}, of "
        f"shape {list(parameter.shape)} and {parameter.dtype}. Put the module (or the tensor) it belongs to into the "
        "state as well; if the module was changed after the optimizer was made, make the optimizer anew",
        tensor=key,
    )


def enter_optimizer(
    inventory: Inventory, key: str, optimizer: torch.optim.Optimizer, parameters: Parameters, naming: Naming
) -> dict[str, Any]:
    """Enter slots as `<key>.state.<parameter>.<slot>` and groups as the value `<key>.param_groups`; return the entry.

    Raises StateError for slots of which it can't be told what part of the whole they are.
    """
    names, state = naming.names, state_of(optimizer)
    local_slots: dict[str, bool] = {}
    groups = []
    known = 0
    for group in groups_of(optimizer):
        group_names = [name for parameter in group["params"] for name in naming.of(parameter)]
        groups.append({"params": group_names, **hyperparameters(group)})
        for parameter in group["params"]:
            slots = state.get(parameter)
            if slots is None:
                continue
            known += 1
            if not slots:
                continue
            prefix = f"{key}.state."
            odd = next((slot for slot in slots if type(slot) is not str), None)
            if odd is not None:
                where = f"{prefix}{names[id(parameter)]}.{odd!r}"
                raise StateError(f"{where} is a slot whose name is no string; name it by one", tensor=key)
            if id(parameter) in naming.flats:
                if counts_in_ints(optimizer) and "step" in slots:
                    slots = {**slots, "step": torch.tensor(float(slots["step"]))}  # as torch's own optimizers do
                _enter_flat(inventory, prefix, parameter, naming.flats[id(parameter)], slots)
                continue
            prefix += f"{names[id(parameter)]}."
            cut = cut_of(parameter, parameters)
            for slot, value in slots.items():
                if not isinstance(value, torch.Tensor):
                    inventory.value(prefix + slot, value)
                elif cut is not None and value.ndim and not isinstance(value, DTensor):
                    tells = partial(_like_parameters, optimizer, slot, parameters)
                    likewise = _enter_local(inventory, prefix + slot, value, parameter, cut, tells)
                    if likewise and isinstance(parameter, DTensor):
                        local_slots[slot] = True
                else:
                    inventory.tensor(prefix + slot, value)
    if known != len(state):
        _enter_strays(inventory, key, optimizer, state)
    inventory.local.values[f"{key}.param_groups"] = groups  # not looked into: its tensors stay values
    for name, value in own_extras(optimizer).items():
        inventory.value(f"{key}.{name}", value)
    entry: dict[str, Any] = {"kind": "optimizer", "modules": naming.modules}
    if local_slots:
        entry["local"] = local_slots
    return entry


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group says beside its parameters. Tensors in it (a learning rate) are copied."""
    return {name: copied(value) for name, value in group.items() if name not in _POSITIONAL}


def own_extras(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer with a `state_dict` of its own saves beside `state` and `param_groups`."""
    if is_deepspeed_optimizer(optimizer):
        return {}  # how the masters lie in memory
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict or is_zero(optimizer):
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's ZeroRedundancyOptimizer."""
    kind = type(optimizer)
    return kind.__qualname__ == "ZeroRedundancyOptimizer" and kind.__module__.startswith("torch.distributed.optim")


def state_of(optimizer: Any) -> Any:
    """Parameter -> slots, where the optimizer has them: a ZeroRedundancyOptimizer, in the one that it has made, and one
    of DeepSpeed's in the one that it was given.
    """
    inner = getattr(optimizer, "optim", None) if is_zero(optimizer) else None
    return steps_by(optimizer).state if inner is None else inner.state


def keeps(optimizer: Any, parameter: torch.Tensor, parameters: Parameters) -> bool:
    """Whether this rank keeps slots of a parameter of an optimizer.

    Not of one that ZeroRedundancyOptimizer has given to another rank, nor of one that FSDP1 has cut so that nothing of
    it is here.
    """
    if is_zero(optimizer):
        return bool(optimizer._param_to_rank[parameter] == optimizer.rank)
    return id(parameter) not in parameters.absent


class Cut(NamedTuple):
    """What a rank has of a parameter, if it is not all of it."""

    lowered: Lowered
    local: tuple[int, ...]
    """Shape of what it has."""


def cut_of(parameter: torch.Tensor, parameters: Parameters) -> Cut | None:
    """How a parameter is cut; None if it is whole on this rank. Raises what `lower` raises."""
    if isinstance(parameter, DTensor):
        local = parameter._local_tensor.shape
        return None if local == parameter.shape else Cut(lower(parameter), tuple(local))
    lowered = parameters.cuts.get(id(parameter))
    if lowered is None:
        return None
    # what FSDP1 cuts may be gathered for a while
    flat = lowered.cut == FLAT
    return Cut(lowered, (sum(box.numel for box, _ in lowered.pieces),) if flat else tuple(parameter.shape))


def _enter_local(
    inventory: Inventory,
    name: str,
    value: torch.Tensor,
    parameter: torch.Tensor,
    cut: Cut,
    tells: Callable[[], bool | None],
) -> bool:
    """Enter a plain slot of a parameter that is cut; whether it is cut likewise, rather than equal on all ranks."""
    whole = cut.lowered.shape
    if tuple(value.shape) == cut.local:
        alike: bool | None = True
        if value.numel() == 1 and math.prod(whole) > 1:  # which a number has, too
            alike = tells()
        if alike is None and isinstance(parameter, DTensor):
            raise StateError(
                f"the slot {name!r} is a plain tensor of one element, while its parameter is cut: one element of "
                f"{list(whole)} is on this rank. It can't be told whether the slot is a part or a number that is equal "
                "on all ranks; make it a DTensor, or a tensor without dimensions",
                tensor=name,
            )
        if alike is not False:
            inventory.part(name, value, cut.lowered)
            return True
    elif tuple(value.shape) != whole and value.numel() != 1:
        raise StateError(
            f"the slot {name!r} is a plain tensor of shape {list(value.shape)}, while its parameter is cut: "
            f"{list(cut.local)} of {list(whole)} on this rank. It can't be told whether it is equal on all ranks; "
            "make it a DTensor",
            tensor=name,
        )
    inventory.tensor(name, value)
    return False


def _like_parameters(optimizer: torch.optim.Optimizer, slot: str, parameters: Parameters) -> bool | None:
    """Whether plain slots of that name are like what this rank has of their parameters, rather than of one element.

    None if no parameter of another size tells.
    """
    told = set()
    for parameter, slots in state_of(optimizer).items():
        value = slots.get(slot) if isinstance(parameter, torch.Tensor) else None
        if not isinstance(value, torch.Tensor) or isinstance(value, DTensor) or not value.ndim:
            continue
        cut = cut_of(parameter, parameters)
        local = tuple(parameter.shape) if cut is None else cut.local
        if tuple(value.shape) != local:
            told.add(False)
        elif value.numel() != 1:
            told.add(True)
    return told.pop() if len(told) == 1 else None


def _enter_flat(
    inventory: Inventory,
    prefix: str,
    parameter: torch.Tensor,
    members: list[tuple[str, Lowered]],
    slots: Mapping[str, Any],
) -> None:
    """Enter the slots of a flat parameter, for each that is in it."""
    for slot, value in slots.items():
        for name, within in members:
            path = f"{prefix}{name}.{slot}"
            if not isinstance(value, torch.Tensor):
                inventory.value(path, value)
            elif value.ndim == 1 and value.numel() == flat_numel(parameter):
                inventory.part(path, value, within)
            elif value.ndim == 0:
                # by itself for each: elsewhere they are not one
                inventory.part(path, value, Lowered((), ((_SCALAR, _SCALAR),)))
            else:
                raise StateError(
                    f"the slot {slot!r} of a flat parameter, in which {name!r} is, has the shape {list(value.shape)}: "
                    "it can't be told what of it belongs to which parameter; wrap with use_orig_params=True, or use "
                    "fully_shard",
                    tensor=path,
                )


def flat_numel(parameter: Any) -> int:
    """Elements of a flat parameter on this rank, also while all of it is gathered."""
    shard = getattr(parameter, "_local_shard", None)
    return int((parameter if shard is None else shard).numel())


def _enter_strays(inventory: Inventory, key: str, optimizer: torch.optim.Optimizer, state: Mapping[Any, Any]) -> None:
    """Enter state that belongs to no parameter. State of tensors that are no parameters any more is refused."""
    owned = {id(parameter) for _, _, parameter in _positions(optimizer)}
    strays: list[tuple[Any, Any]] = [(name, value) for name, value in state.items() if id(name) not in owned]
    for name, value in strays:
        if isinstance(name, torch.Tensor):
            if value:
                raise StateError(
                    f"the optimizer {key!r} has state of a tensor of shape {list(name.shape)} that is in none of its "
                    "groups; delete it from optimizer.state, or put the tensor back into a group",
                    tensor=key,
                )
        elif not isinstance(name, str):
            raise StateError(
                f"the optimizer {key!r} has state under {name!r}, which is neither a parameter nor a string; keep it "
                "under a string",
                tensor=key,
            )
        else:
            inventory.value(f"{key}.state.{name}", value)


def _refuse_unknown(key: str, optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if is_zero(optimizer):
        if optimizer._overlap_with_ddp:  # type: ignore[attr-defined]
            raise StateError(
                f"the optimizer {key!r} is a ZeroRedundancyOptimizer with overlap_with_ddp, which steps in hooks of "
                "DistributedDataParallel; make it without that",
                tensor=key,
            )
    elif kind.__module__.startswith("torch.distributed.optim."):
        raise StateError(
            f"the optimizer {key!r} is a {kind.__qualname__}, which keeps the parts of its state elsewhere; "
            "use torch.optim with fully_shard in its place",
            tensor=key,
        )
