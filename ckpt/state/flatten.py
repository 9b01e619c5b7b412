"""A training state -> what this rank holds of it. Changes nothing, and touches no byte of a tensor.

Knows which kind of thing is entered how, and leaves the how to modules.py, optimizers.py and containers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt import collector
from ckpt.state.containers import spread
from ckpt.state.deepspeed import Masters, masters_of
from ckpt.state.entries import Entry, entries_of, python_paths
from ckpt.state.inventory import Inventory, NameTakenError
from ckpt.state.modules import ModuleState, walk_module
from ckpt.state.optimizers import Parameters, enter_optimizer, name_parameters
from ckpt.state.types import LocalState, Shard

__all__ = ["enter_tensors", "flatten", "note_parameters"]


@collector.paused()
def flatten(state: Mapping[str, object]) -> LocalState:
    """Take a state apart: names, boxes over live memory, and plain values.

    Args:
        state: name -> module (wrapped or not), optimizer, anything with `state_dict` and `load_state_dict`, tensor,
            `Shard`, `PerRank`, `RNG`, plain value, or containers of these.

    Tensors are called `<name>.<fully qualified name>` and `<name>.state.<parameter>.<slot>`, as by
    `torch.distributed.checkpoint.state_dict`. An optimizer without state stays without. Costs a few microseconds a
    tensor; modules and optimizers with a `state_dict` of their own cost what that costs.

    Raises:
        StateError: names collide, a parameter of an optimizer is in no module of the state, or a tensor is on the meta
            device, sparse, or a subclass that can't be taken apart. The message names it and the remedy.
    """
    entries = entries_of(state)
    inventory = Inventory()
    parameters = Parameters()
    made: dict[str, dict[str, Any]] = {entry.key: {"kind": entry.kind} for entry in entries}
    optimizers = any(entry.kind == "optimizer" for entry in entries)
    masters = masters_of(entry.value for entry in entries)
    try:
        for entry in entries:
            if entry.kind != "optimizer":
                made[entry.key] |= _enter(inventory, entry, parameters, optimizers, masters)
        for entry in entries:
            if entry.kind == "optimizer":
                naming = name_parameters(entry.key, entry.value, parameters)
                made[entry.key] |= enter_optimizer(inventory, entry.key, entry.value, parameters, naming)
    except NameTakenError as error:
        raise _explained(error, entries) from None
    inventory.local.entries = made
    return inventory.local


def _enter(
    inventory: Inventory, entry: Entry, parameters: Parameters, optimizers: bool, masters: list[Masters]
) -> dict[str, Any]:
    key, value = entry.key, entry.value
    if entry.kind == "module":
        found = walk_module(value, masters=masters)
        enter_tensors(inventory, key, found)
        _enter_values(inventory, key, found)
        parameters.add(key, found)
        return {}
    if entry.kind == "stateful":
        inventory.value(key, value.state_dict())
        return {}
    if optimizers:
        note_parameters(parameters, key, value)
    flat: dict[str, bool] = {}
    spread(inventory, key, value, flat)
    return {"flat": flat} if flat else {}


def enter_tensors(inventory: Inventory, key: str, found: ModuleState) -> None:
    """Enter the parameters and buffers of a module."""
    enter = inventory.tensor
    prefix = key + "."
    for fqn, tensor in found.members:
        enter(prefix + fqn, tensor)
    for fqn, local, lowered, twin in found.parts:
        inventory.part(prefix + fqn, local, lowered, tied_by=twin)
    for fqn, first in found.ties:
        inventory.tie(prefix + fqn, prefix + first)


def _enter_values(inventory: Inventory, key: str, found: ModuleState) -> None:
    prefix = key + "."
    for custom in found.custom:
        for fqn, value in custom.state().items():
            inventory.value(prefix + fqn, value)
    for fqn, module in found.extra:
        inventory.value(prefix + fqn, module.get_extra_state())


def note_parameters(parameters: Parameters, name: str, value: object) -> None:
    """Note the tensors in a value, since an optimizer may own them."""
    if isinstance(value, torch.Tensor):
        parameters.tensors.setdefault(id(value), name)
    elif isinstance(value, Shard):
        parameters.tensors.setdefault(id(value.local), name)
        parameters.cuts[id(value.local)] = value.lowered
    elif isinstance(value, dict):
        for key, item in value.items():
            note_parameters(parameters, f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            note_parameters(parameters, f"{name}.{index}", item)


def _explained(error: NameTakenError, entries: list[Entry]) -> NameTakenError:
    """The same error, saying where in the state the two things of one name are."""
    name = error.tensor or ""
    places = []
    for entry in entries:
        root = f"state[{entry.key!r}]"
        if entry.kind in ("value", "tensor", "per_rank"):
            places += [path for leaf, path in python_paths(entry.value, entry.key, root) if leaf == name]
        elif name.startswith(entry.key + "."):
            places.append(f"{name[len(entry.key) + 1 :]} of {root}")
    if len(places) < 2:
        return error
    return NameTakenError(f"{' and '.join(places)} have the same name, {name!r}; rename one of them", tensor=name)
