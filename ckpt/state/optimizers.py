"""Optimizers: their slots and parameter groups, by the names of parameters instead of by position.

A parameter is known by identity. If one module of the state has all parameters of an optimizer, they are called by
their names in it, as by `torch.distributed.checkpoint.state_dict`; else by the name of the entry and their name in it.
The optimizer's own tables are read as they are: no step is run, no hook called, no state made. This module knows no
files, and not how what it finds is loaded again; slots.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt.state.inventory import Inventory
from ckpt.state.tensor_values import copied
from ckpt.state.types import Shard
from ckpt_formats.errors import StateError

__all__ = ["Naming", "Parameters", "enter_optimizer", "hyperparameters", "name_parameters", "own_extras"]

_POSITIONAL = frozenset(("params", "param_names"))  # lists that run along the parameters of a group


@dataclass(slots=True)
class Parameters:
    """Everything in a state that an optimizer may own."""

    modules: dict[str, dict[int, str]] = field(default_factory=dict)
    """Name of an entry -> (id of a parameter -> its name within the entry)."""
    tensors: dict[int, str] = field(default_factory=dict)
    """id of a tensor that is in the state itself -> its name."""
    shards: dict[int, Shard] = field(default_factory=dict)
    """id of a tensor that was cut by hand -> its Shard."""


@dataclass(slots=True)
class Naming:
    """What the parameters of one optimizer are called."""

    modules: dict[str, str]
    """First part of a parameter's name -> the entry that has it. `{"": "model"}` if names are those within "model",
    whose tensors are `model.<name>`; `{"model": "model", …}` if names begin with the entry's, as tensors' do."""
    names: dict[int, str]
    """id of a parameter -> its name."""

    def tensor(self, name: str) -> str:
        """The name of the tensor of a parameter."""
        return f"{self.modules['']}.{name}" if "" in self.modules else name


def name_parameters(
    key: str, optimizer: torch.optim.Optimizer, parameters: Parameters, saved: Mapping[str, str] | None = None
) -> Naming:
    """Name the parameters of an optimizer.

    With `saved`, the `modules` of a checkpoint's `Naming`, they are named as they are there, if possible.

    Raises StateError for a parameter that belongs to nothing in the state, and for optimizers that keep their state
    elsewhere.
    """
    _refuse_unknown(key, optimizer)
    wanted = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sole = None
    if wanted:
        holding = (entry for entry, names in parameters.modules.items() if id(wanted[0]) in names)
        sole = next((entry for entry in holding if parameters.modules[entry].keys() >= {id(p) for p in wanted}), None)
    if sole is not None and (saved is None or "" in saved or not saved):
        known = parameters.modules[sole]
        return Naming({"": sole}, {id(parameter): known[id(parameter)] for parameter in wanted})

    naming = Naming({}, {})
    order = list(parameters.modules)
    if sole is not None:
        order.sort(key=lambda entry: entry != sole)
    for group_index, index, parameter in _positions(optimizer):
        for entry in order:
            fqn = parameters.modules[entry].get(id(parameter))
            if fqn is not None:
                naming.names[id(parameter)] = f"{entry}.{fqn}"
                naming.modules[entry] = entry
                break
        else:
            name = parameters.tensors.get(id(parameter))
            if name is None:
                raise _unowned(key, group_index, index, parameter)
            naming.names[id(parameter)] = name
            naming.modules[name] = name
    if saved and "" in saved:
        # There, all were in one module and called by their names in it
        inner = f"{saved['']}."
        naming.names = {known: name.removeprefix(inner) for known, name in naming.names.items()}
    return naming


def _positions(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, torch.Tensor]]:
    for group_index, group in enumerate(optimizer.param_groups):
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
    names, state = naming.names, optimizer.state
    local_slots: dict[str, bool] = {}
    groups = []
    known = 0
    for group in optimizer.param_groups:
        groups.append({"params": [names[id(parameter)] for parameter in group["params"]], **hyperparameters(group)})
        for parameter in group["params"]:
            slots = state.get(parameter)
            if slots is None:
                continue
            known += 1
            if not slots:
                continue
            prefix = f"{key}.state.{names[id(parameter)]}."
            cut = _cut(parameter, parameters)
            for slot, value in slots.items():
                if type(slot) is not str:
                    raise StateError(f"{prefix}{slot!r} is a slot whose name is no string; name it by one", tensor=key)
                if isinstance(value, torch.Tensor):
                    if cut is not None and value.ndim and not isinstance(value, DTensor):
                        local_slots |= _enter_local(inventory, prefix + slot, value, cut, slot)
                    else:
                        inventory.tensor(prefix + slot, value)
                else:
                    inventory.value(prefix + slot, value)
    if known != len(state):
        _enter_strays(inventory, key, optimizer)
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
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def _cut(parameter: torch.Tensor, parameters: Parameters) -> DTensor | Shard | None:
    """How a parameter is cut, if this rank has only a part of it."""
    if isinstance(parameter, DTensor):
        return None if parameter._local_tensor.shape == parameter.shape else parameter
    return parameters.shards.get(id(parameter))


def _enter_local(
    inventory: Inventory, name: str, value: torch.Tensor, cut: DTensor | Shard, slot: str
) -> dict[str, bool]:
    """Enter a plain slot of a parameter that is cut, which has to be told from one that is equal on all ranks."""
    local, whole = (cut.local, cut.global_shape) if isinstance(cut, Shard) else (cut._local_tensor, tuple(cut.shape))
    if value.shape == local.shape:
        inventory.like(name, value, cut)
        return {slot: True}
    if tuple(value.shape) != whole and value.numel() != 1:
        raise StateError(
            f"the slot {name!r} is a plain tensor of shape {list(value.shape)}, while its parameter is cut: "
            f"{list(local.shape)} of {list(whole)} on this rank. It can't be told whether it is equal on all ranks; "
            "make it a DTensor",
            tensor=name,
        )
    inventory.tensor(name, value)
    return {}


def _enter_strays(inventory: Inventory, key: str, optimizer: torch.optim.Optimizer) -> None:
    """Enter state that belongs to no parameter. State of tensors that are no parameters any more is refused."""
    owned = {id(parameter) for _, _, parameter in _positions(optimizer)}
    strays: list[tuple[Any, Any]] = [(name, value) for name, value in optimizer.state.items() if id(name) not in owned]
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
    if kind.__module__.startswith("torch.distributed.optim."):
        raise StateError(
            f"the optimizer {key!r} is a {kind.__qualname__}, which keeps the parts of its state elsewhere; "
            "use torch.optim with fully_shard in its place",
            tensor=key,
        )
