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
from ckpt.state.deepspeed import counts_in_ints, groups_of
from ckpt.state.dtensor import replicated, zeros_like
from ckpt.state.flat_slots import FlatSlots, equal, scalar_device
from ckpt.state.given import Given
from ckpt.state.inventory import Inventory
from ckpt.state.optimizers import (
    Naming,
    Parameters,
    cut_of,
    hyperparameters,
    is_zero,
    keeps,
    own_extras,
    state_of,
)
from ckpt.state.types import Disassembled, Lowered, PerRankRef, SavedState, SavedTensor, TensorRef
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
    _flats: list[FlatSlots] = field(default_factory=list)
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
        groups = _groups(key, saved)
        if groups is None:
            groups = []
            self.missing.append(f"{key}.param_groups")
        self.wanted.add(f"{key}.param_groups")
        group_of = {name: index for index, group in enumerate(groups) for name in group["params"]}
        found = _by_parameter(key, group_of.keys() | set(naming.names.values()), tensors, values, saved)
        maker = Maker(inventory, live, parameters, saved, then, f"{key}.state.", entry.get("local", {}))
        self.wanted |= _slots_of_twins(key, inventory, then, found)
        for index, group in enumerate(groups_of(self.optimizer)):
            names = {}
            for parameter in group["params"]:
                parts = []  # one, or what a flat parameter has in it
                for live_name in naming.of(parameter):
                    name = _saved_name(live_name, group_of, then, saved)
                    parts.append(name)
                    if name in group_of:
                        names[name] = group_of[name]
                    elif parameter.requires_grad:  # a frozen one has nothing that could be missing
                        self.missing.append(f"{key}.param_groups.{name.removeprefix('.')}")
                known = [name for name in parts if name in group_of or name in found.slots]
                if not known or not keeps(self.optimizer, parameter, parameters):
                    continue  # unknown to the checkpoint, or elsewhere: stays as it is
                own = groups[group_of[known[0]]] if known[0] in group_of else group
                if id(parameter) in naming.flats:
                    members = list(zip(parts, (within for _, within in naming.flats[id(parameter)]), strict=True))
                    flat = FlatSlots(parameter, members, state_of(self.optimizer).get(parameter, {}))
                    flat.plan(maker, {name: found.slots.get(name, {}) for name in parts}, own)
                    self._flats.append(flat)
                    self.wanted |= {
                        f"{key}.state.{name}.{slot}" for name in parts for slot in found.slots.get(name, ())
                    }
                    continue
                name, made = parts[0], {}
                for slot, marked in found.slots.get(name, {}).items():
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
        state = state_of(optimizer)
        slots = [(parameter, given.fill(made)) for parameter, made in self._slots]
        slots += [(flat.parameter, flat.filled(given)) for flat in self._flats]
        if counts_in_ints(optimizer):
            slots = [(p, {**made, "step": int(made["step"])} if "step" in made else made) for p, made in slots]
        if self._extras:
            self._load_by_itself(slots, {name: given.fill(marked) for name, marked in self._extras.items()})
        for parameter, made in slots:
            if made:
                state[parameter] = made
            else:
                state.pop(parameter, None)
        for name, marked in self._free.items():
            state[name] = given.fill(marked)
        for index, hyper in self._groups:
            live = optimizer.param_groups[index]
            live.update(_placed(live, hyper))
        if is_zero(optimizer):
            zero: Any = optimizer  # it has the groups twice
            zero._sync_param_groups(zero.param_groups, zero.optim.param_groups)

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


def _groups(key: str, saved: SavedState) -> list[Mapping[str, Any]] | None:
    """The saved parameter groups, None if there are none.

    Raises StateMismatchError for those of a `state_dict()`, FormatError for what can't be any.
    """
    path = f"{key}.param_groups"
    whole: Any = saved.values.get(key)  # one without tensors is a single value
    groups: Any = whole.get("param_groups") if isinstance(whole, dict) else saved.values.get(path)
    if groups is None:
        return None
    if not isinstance(groups, list) or not all(map(_is_group, groups)):
        if saved.entries.get(key, {}).get("kind") != "optimizer":
            raise StateMismatchError(
                f"{key!r} is an optimizer here, but was saved as what its state_dict() gives, without the names of "
                f"parameters. Save the optimizer itself; to use this checkpoint, load {{{key!r}: {{}}}} and give what "
                "comes into the dict to the optimizer's load_state_dict()",
                tensor=key,
            )
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
    twin = naming.name(stored)
    return twin if twin in group_of else name


def _slots_of_twins(key: str, inventory: Inventory, naming: Naming, found: _Found) -> set[str]:
    """Slots of parameters that were apart when they were saved and are tied now: those of the first name are taken."""
    twins = map(naming.name, inventory.local.aliases)
    return {f"{key}.state.{twin}.{slot}" for twin in twins for slot in found.slots.get(twin, ())}


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
            if not equal(one, other):
                raise StateMismatchError(
                    f"the optimizer {key!r} has {agreed[0]!r} and {name!r} in one group, but they were saved with "
                    f"{hyper} = {one!r} and {other!r}; make the groups as they were when it was saved",
                    tensor=f"{key}.param_groups",
                )
    return agreed and agreed[1]


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


class Maker:
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

    def saved(self, mark: TensorRef) -> SavedTensor | None:
        """What a mark stands for, if it is one tensor."""
        return self._saved.find(mark.name)

    def enter(self, name: str, tensor: torch.Tensor, lowered: Lowered) -> None:
        """Enter a tensor that was made elsewhere."""
        self.used.add(name)
        self._inventory.part(name, tensor, lowered)

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
        cut = self._parameters.cuts.get(id(parameter))
        whole = cut.shape if cut is not None else tuple(parameter.shape)
        dtype, alike = self.kind(found, parameter.dtype, whole, name, slot)
        shape = whole if alike else found.shape
        there = self._live.live.get(full)
        if there is not None and self._fits(full, dtype, shape):
            self._inventory.adopt(full, self._live)
            return there
        return self._new(full, dtype, shape, parameter, slot, hyper, alike=alike)

    def kind(
        self, found: SavedTensor, parameter: torch.dtype, whole: tuple[int, ...], name: str, slot: str
    ) -> tuple[torch.dtype, bool]:
        """The dtype that a slot is to have, and whether it has the shape of its parameter, which is `whole` now."""
        then = self._saved.find(self._naming.tensor(name)) if name else None
        alike = bool(name) and slot != "step" and found.shape == (whole if then is None else then.shape)
        if then is not None and slot != "step" and found.dtype == then.dtype != parameter:
            return parameter, alike  # a slot of its parameter's dtype follows it to another
        return found.dtype, alike

    def _fits(self, full: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        described = self._live.local.tensors.get(self._live.local.aliases.get(full, full))
        return described is not None and described.takes(dtype, shape)

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
        cut = cut_of(parameter, self._parameters)
        if alike and isinstance(parameter, DTensor) and not (cut is not None and self._local.get(slot)):
            made: torch.Tensor = zeros_like(parameter, dtype)
        elif alike and cut is not None:
            made = torch.zeros(cut.local, dtype=dtype, device=parameter.device)
            self._inventory.part(full, made, cut.lowered)
            return made
        elif alike:
            made = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        elif not shape:
            made = torch.empty((), dtype=dtype, device=scalar_device(parameter, slot, hyper))
        elif isinstance(parameter, DTensor):
            self._saved.require(full)
            made = replicated(parameter, shape, dtype)
        else:
            self._saved.require(full)
            made = torch.empty(shape, dtype=dtype, device=parameter.device)
        self._inventory.tensor(full, made)
        return made
