"""An optimizer's saved state -> slots and parameter groups of a live optimizer, which may not have made any step yet.

What a checkpoint says of its slots decides which there will be: slots that the live optimizer lacks are made, and those
that the checkpoint lacks are dropped. Nothing is attached before all bytes have arrived. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt.state.containers import references
from ckpt.state.dtensor import replicated, zeros_like
from ckpt.state.given import Given
from ckpt.state.inventory import Inventory
from ckpt.state.optimizers import Naming, Parameters, hyperparameters, own_extras
from ckpt.state.types import Disassembled, PerRankRef, SavedState, SavedTensor, TensorRef
from ckpt_formats.errors import FormatError, MissingTensorError, StateError, StateMismatchError

__all__ = ["OptimizerTarget"]

_Slots = dict[str, Any]
"""Slot -> marked value."""


@dataclass(slots=True)
class OptimizerTarget:
    """What loading has to fill in one optimizer. `missing` and `wanted` are names as in the checkpoint."""

    key: str
    optimizer: torch.optim.Optimizer
    missing: list[str] = field(default_factory=list)
    wanted: set[str] = field(default_factory=set)
    _slots: list[tuple[torch.Tensor, _Slots]] = field(default_factory=list)
    _groups: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    _free: _Slots = field(default_factory=dict)
    _extras: _Slots = field(default_factory=dict)

    def plan(
        self,
        inventory: Inventory,
        live: Inventory,
        naming: Naming,
        parameters: Parameters,
        saved: SavedState,
        tensors: Iterable[str],
        values: Iterable[str],
    ) -> None:
        """Enter every slot tensor that is to be filled; make those that are not there. The optimizer stays as it is.

        Args:
            inventory: what to enter them in.
            live: the optimizer as it is now.
            naming: what its parameters are called there.
            parameters: what the state has.
            saved: the checkpoint.
            tensors: names of its tensors, aliases included, that begin with the optimizer's.
            values: paths of its values that do.

        Raises StateError for a slot that can't be made, StateMismatchError for a group with two kinds of parameters.
        """
        key = self.key
        entry = saved.entries.get(key, {})
        modules = entry.get("modules", {})
        then = Naming(modules, {}) if modules else naming
        groups = _groups(f"{key}.param_groups", saved)
        if groups is None:
            groups = []
            self.missing.append(f"{key}.param_groups")
        self.wanted.add(f"{key}.param_groups")
        group_of = {name: index for index, group in enumerate(groups) for name in group["params"]}
        found = _by_parameter(key, group_of.keys() | set(naming.names.values()), tensors, values, saved)
        maker = _Maker(inventory, live, parameters, saved, then, f"{key}.state.", entry.get("local", {}))
        for index, group in enumerate(self.optimizer.param_groups):
            names = {}
            for parameter in group["params"]:
                name = _saved_name(naming.names[id(parameter)], group_of, then, saved)
                slots = found.slots.get(name)
                if name not in group_of:
                    self.missing.append(f"{key}.param_groups.{name}")
                    if slots is None:
                        continue  # unknown to the checkpoint: stays as it is
                else:
                    names[name] = group_of[name]
                own = groups[group_of[name]] if name in group_of else group
                made = {}
                for slot, marked in (slots or {}).items():
                    made[slot] = maker.slot(parameter, name, slot, marked, own)
                    self.wanted.add(f"{key}.state.{name}.{slot}")
                self.wanted |= maker.used
                maker.used.clear()
                self._slots.append((parameter, made))
            hyper = _agreed(key, names, groups)
            if hyper is None and not group["params"] and index < len(groups) and not groups[index]["params"]:
                hyper = groups[index]
            if hyper is not None:
                self._groups.append((index, hyperparameters(hyper)))
        for path, marked in found.free.items():
            maker.value(marked, torch.empty(0, device="cpu"), "", path, {})
            self._free[path[len(key) + len(".state.") :]] = marked
            self.wanted.add(path)
        for name in own_extras(self.optimizer):
            path = f"{key}.{name}"
            marked = saved.values.get(path, TensorRef(path) if saved.find(path) else None)
            if marked is None and path not in saved.values:
                self.missing.append(path)
                continue
            maker.value(marked, torch.empty(0, device="cpu"), "", path, {})
            self._extras[name] = marked
            self.wanted.add(path)
        self.wanted |= maker.used

    def apply(self, given: Given) -> None:
        """Attach the slots, and set the hyperparameters; a parameter without saved state has none afterwards."""
        optimizer = self.optimizer
        slots = [(parameter, given.fill(made)) for parameter, made in self._slots]
        if self._extras:
            self._load_by_itself(slots, {name: given.fill(marked) for name, marked in self._extras.items()})
        for parameter, made in slots:
            if made:
                optimizer.state[parameter] = made
            else:
                optimizer.state.pop(parameter, None)
        for name, marked in self._free.items():
            optimizer.state[name] = given.fill(marked)  # type: ignore[index]
        for index, hyper in self._groups:
            live = optimizer.param_groups[index]
            live.update(_placed(live, hyper))

    def _load_by_itself(self, slots: list[tuple[torch.Tensor, _Slots]], extras: dict[str, Any]) -> None:
        """Let an optimizer with a `load_state_dict` of its own take what only it knows of."""
        index: dict[int, int] = {}
        groups = []
        for group in self.optimizer.param_groups:
            numbers = [index.setdefault(id(parameter), len(index)) for parameter in group["params"]]
            groups.append({**hyperparameters(group), "params": numbers})
        state = {index[id(parameter)]: dict(made) for parameter, made in slots if made}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups, **extras})


# --- names


@dataclass(slots=True)
class _Found:
    slots: dict[str, _Slots]
    """Parameter -> its slots."""
    free: _Slots
    """Path -> value that belongs to no parameter."""


def _groups(path: str, saved: SavedState) -> list[Mapping[str, Any]] | None:
    """The saved parameter groups, None if there are none. Raises FormatError for what can't be any."""
    groups: Any = saved.values.get(path)
    if groups is None:
        return None
    if not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise FormatError(
            f"the value {path!r} is not a list of parameter groups; the checkpoint was written wrongly", tensor=path
        )
    return groups


def _is_group(item: object) -> bool:
    names = item.get("params") if isinstance(item, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _by_parameter(
    key: str, names: Iterable[str], tensors: Iterable[str], values: Iterable[str], saved: SavedState
) -> _Found:
    """Sort what was saved under `<key>.state.` by parameter and slot."""
    known = frozenset(names)
    prefix = f"{key}.state."
    found = _Found({}, {})
    for path in values:
        if path.startswith(prefix):
            parameter, slot = _split(path[len(prefix) :], known)
            marked = saved.values[path]
            if parameter is None:
                found.free[path] = marked
            else:
                taken_apart = type(marked) is Disassembled
                found.slots.setdefault(parameter, {})[slot] = TensorRef(path) if taken_apart else marked
    for name in tensors:
        if name.startswith(prefix):
            parameter, slot = _split(name[len(prefix) :], known)
            if parameter is None:
                if "." not in slot:
                    found.free[name] = TensorRef(name)
            else:
                slots = found.slots.setdefault(parameter, {})
                # a tensor within a slot that is a container comes with its container
                if not any(slot.startswith(f"{other}.") for other in slots if other in slot):
                    slots.setdefault(slot, TensorRef(name))
    return found


def _split(rest: str, known: frozenset[str]) -> tuple[str | None, str]:
    """`layer.weight.exp_avg` -> (`layer.weight`, `exp_avg`): the longest parameter that it begins with."""
    at = rest.rfind(".")
    while at > 0:
        if rest[:at] in known:
            return rest[:at], rest[at + 1 :]
        at = rest.rfind(".", 0, at)
    return None, rest


def _saved_name(name: str, group_of: Mapping[str, int], naming: Naming, saved: SavedState) -> str:
    """What the checkpoint calls a parameter: by another of its names if it is a tied one."""
    if name in group_of:
        return name
    stored = saved.aliases.get(naming.tensor(name))
    if stored is None:
        return name
    twin = stored.removeprefix(f"{naming.modules['']}.") if "" in naming.modules else stored
    return twin if twin in group_of else name


def _agreed(key: str, names: Mapping[str, int], groups: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The hyperparameters that all these parameters were saved with."""
    agreed: tuple[str, Mapping[str, Any]] | None = None
    seen = set()
    for name, index in names.items():
        if index in seen:
            continue
        seen.add(index)
        group = groups[index]
        if agreed is None:
            agreed = name, group
            continue
        for hyper in (agreed[1].keys() | group.keys()) - {"params"}:
            one, other = agreed[1].get(hyper), group.get(hyper)
            if not _equal(one, other):
                raise StateMismatchError(
                    f"the optimizer {key!r} has {agreed[0]!r} and {name!r} in one group, but they were saved with "
                    f"{hyper} = {one!r} and {other!r}; make the groups as they were when it was saved",
                    tensor=f"{key}.param_groups",
                )
    return agreed and agreed[1]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other or one != one)  # noqa: PLR0124 - nan is itself


def _placed(group: Mapping[str, Any], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with their tensors where the live ones are, in the very tensors if they fit."""
    device = None
    if group["params"] and hyper.get("capturable"):
        device = group["params"][0].device
    placed = {}
    for name, value in hyper.items():
        live = group.get(name)
        if isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor):
            if live.shape == value.shape and live.dtype == value.dtype:
                with torch.no_grad():
                    live.copy_(value)
                placed[name] = live
            else:
                placed[name] = value.to(live.device)
        elif isinstance(value, torch.Tensor):
            placed[name] = value if device is None else value.to(device)
        else:
            placed[name] = value
    return placed


# --- slots


class _Maker:
    """Makes slots, or takes those that are there."""

    def __init__(
        self,
        inventory: Inventory,
        live: Inventory,
        parameters: Parameters,
        saved: SavedState,
        naming: Naming,
        prefix: str,
        local: Mapping[str, bool],
    ) -> None:
        self._inventory = inventory
        self._live = live
        self._parameters = parameters
        self._saved = saved
        self._naming = naming
        self._prefix = prefix
        self._local = local
        self._made: dict[str, torch.Tensor] = {}
        self.used: set[str] = set()

    def slot(self, parameter: torch.Tensor, name: str, slot: str, marked: Any, hyper: Mapping[str, Any]) -> Any:
        """Enter the tensors of one slot and return its marked value."""
        self.value(marked, parameter, name, slot, hyper)
        return marked

    def value(self, marked: Any, parameter: torch.Tensor, name: str, slot: str, hyper: Mapping[str, Any]) -> None:
        """Enter the tensors that a value refers to."""
        for mark in references(marked):
            if isinstance(mark, PerRankRef):
                continue
            if type(self._saved.values.get(mark.name)) is Disassembled:
                self._subclass(mark.name)
                continue
            found = self._saved.find(mark.name)
            if found is None:
                raise MissingTensorError(
                    f"the checkpoint refers to a tensor {mark.name!r} that it doesn't have: it is damaged",
                    tensor=mark.name,
                )
            self.used.add(mark.name)
            stored = self._saved.aliases.get(mark.name, mark.name)
            twin = self._made.get(stored)
            if twin is not None:
                self._inventory.tensor(mark.name, twin)
                continue
            self._made[stored] = self._tensor(mark.name, found, parameter, name, slot, hyper)

    def _subclass(self, name: str) -> None:
        """A slot of a class that can't be made from a file: the live one is filled."""
        live = self._live.live.get(name)
        described = self._live.local.values.get(name)
        saved = self._saved.values[name]
        if live is None or not isinstance(described, Disassembled):
            raise StateError(
                f"the slot {name!r} was a {saved.kind}, and no class is imported because a file names it; "
                "let the optimizer make its state (one step on zero gradients) before loading",
                tensor=name,
            )
        self.used |= {name, *(f"{name}.{part}" for part in saved.parts)}
        self._inventory.tensor(name, live)

    def _tensor(
        self,
        full: str,
        found: SavedTensor,
        parameter: torch.Tensor,
        name: str,
        slot: str,
        hyper: Mapping[str, Any],
    ) -> torch.Tensor:
        dtype, shape = found
        shard = self._parameters.shards.get(id(parameter))
        whole = shard.global_shape if shard is not None else tuple(parameter.shape)
        then = self._saved.find(self._naming.tensor(name)) if name else None
        if then is not None and slot != "step" and dtype == then.dtype != parameter.dtype:
            dtype = parameter.dtype  # a slot of its parameter's dtype follows it to another
        alike = bool(name) and slot != "step" and shape == (whole if then is None else then.shape)
        if alike:
            shape = whole
        there = self._live.live.get(full)
        if there is not None and self._fits(full, there, dtype, shape):
            self._inventory.adopt(full, self._live)
            return there
        return self._new(full, dtype, shape, parameter, slot, hyper, alike=alike)

    def _fits(self, full: str, there: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        described = self._live.local.tensors.get(self._live.local.aliases.get(full, full))
        return described is not None and described.shape == shape and there.dtype == dtype

    def _new(
        self,
        full: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        parameter: torch.Tensor,
        slot: str,
        hyper: Mapping[str, Any],
        *,
        alike: bool,
    ) -> torch.Tensor:
        shard = self._parameters.shards.get(id(parameter))
        if alike:
            if isinstance(parameter, DTensor) and self._local.get(slot):
                made = torch.empty_like(parameter._local_tensor, dtype=dtype)
                self._inventory.like(full, made, parameter)
                return made
            if isinstance(parameter, DTensor):
                made = zeros_like(parameter, dtype)
            else:
                made = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            if shard is not None:
                self._inventory.like(full, made, shard)
                return made
        elif not shape:
            # Where torch.optim's own load_state_dict puts it: only `step` may stay on the CPU
            moves = slot != "step" or hyper.get("capturable") or hyper.get("fused")
            made = torch.empty((), dtype=dtype, device=parameter.device if moves else "cpu")
        elif isinstance(parameter, DTensor):
            self._saved.require(full)
            made = replicated(parameter, shape, dtype)
        else:
            self._saved.require(full)
            made = torch.empty(shape, dtype=dtype, device=parameter.device)
        self._inventory.tensor(full, made)
        return made
