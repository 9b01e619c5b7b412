"""What loading has to fill: a live state matched, by names, with what a checkpoint says it has.

Tensors are filled in place, by the caller, through `Target.tensors`; everything else waits for `Target.apply`. Matching
changes nothing in the state. Knows no files: a checkpoint is known by its names, dtypes, shapes and values alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt import collector
from ckpt.state.containers import is_spread, references, rejoin, replace
from ckpt.state.deepspeed import Masters, groups_of, masters_of
from ckpt.state.deepspeed import drop_gathered as drop_gathered_by_stage3
from ckpt.state.entries import Entry, entries_of
from ckpt.state.flatten import enter_tensors, note_parameters
from ckpt.state.fsdp1 import drop_gathered
from ckpt.state.given import ABSENT, Given, Others
from ckpt.state.inventory import Inventory
from ckpt.state.modules import ModuleState, walk_module
from ckpt.state.optimizers import Parameters, enter_optimizer, name_parameters
from ckpt.state.rng import RNG
from ckpt.state.slots import OptimizerTarget
from ckpt.state.types import Disassembled, LocalTensor, PerRank, SavedState, Shard, TensorRef
from ckpt_formats.errors import MissingTensorError, StateError, StateMismatchError

__all__ = ["Target", "build_target"]

_CHANGED_IN_PLACE = (dict, list, PerRank, RNG, torch.Generator)


class Target:
    """What loading has to fill on this rank.

    Attributes:
        entries: the names of the state's entries.
        tensors: name in the checkpoint -> the boxes that this rank needs of it, and the memory they go to.
        missing: names that the state has and the checkpoint does not.
        unexpected: names that the checkpoint has below the entries of the state, and the state of this rank does not.
            Another rank may have them (a pipeline stage): what no rank has is what is in this list on every rank.
        retied: name -> name: tensors that are stored apart but tied here; only the second is loaded.
        per_rank_skipped: after `apply`: paths of per-rank values that were left as they are, since none was given.
        per_rank_derived: after `apply`: paths of those that were made of what another number of ranks had saved.
    """

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.tensors: dict[str, LocalTensor] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.retied: dict[str, str] = {}
        self.per_rank_skipped: list[str] = []
        self.per_rank_derived: list[str] = []
        self._live: Mapping[str, torch.Tensor] = {}
        self._replaced: list[torch.Tensor] = []
        self._parts: list[_Module | OptimizerTarget | _Stateful | _Value] = []
        self._deepspeed = _DeepSpeed([], [])

    def apply(
        self, values: Mapping[str, Any], per_rank: Mapping[str, Any] | None, others: Others | None = None
    ) -> None:
        """Attach what was made and restore all values; call it once, when the bytes of all tensors have arrived, and
        `refresh` after it.

        Args:
            values: path -> decoded value, as in the `SavedState`.
            per_rank: path -> decoded value of this rank, or None if the checkpoint has none for it.
            others: those of the ranks that saved, if they were another number.
        """
        given = Given(self._live, values, per_rank or {}, others)
        # Random generators last: what restores the rest may draw numbers
        for part in sorted(self._parts, key=_restores_generators):
            part.apply(given)
        self.per_rank_skipped = given.skipped
        self.per_rank_derived = given.derived

    def filled(self) -> Iterator[torch.Tensor]:
        """Live tensors that get values: what is filled, and what `apply` gives other tensors for to whoever has it."""
        for local in self.tensors.values():
            for piece in local.pieces:
                yield piece.view
        yield from self._replaced

    def refresh(self) -> None:
        """Have DeepSpeed make what it computes with anew: collective, so first `apply` has to succeed on all ranks."""
        self._deepspeed.refresh()


@collector.paused()
@torch.no_grad()
def build_target(state: Mapping[str, object], saved: SavedState) -> Target:
    """Match a state with a checkpoint.

    Entries of the checkpoint that the state doesn't have are left alone. Slots that an optimizer lacks are made, of the
    shapes that the checkpoint says, and stay apart from it until `Target.apply`. Whether names, shapes and dtypes fit
    closely enough is for the caller to decide, before anything is read.

    Raises:
        StateError: as `flatten` does.
        StateMismatchError: parameters of one live group were saved with different hyperparameters.
        MissingTensorError: a saved value refers to a tensor that is not there.
    """
    entries = entries_of(state)
    index = _Index(saved, [entry.key for entry in entries])
    optimizers = [entry.value for entry in entries if entry.kind == "optimizer"]
    owned = {id(p) for optimizer in optimizers for group in groups_of(optimizer) for p in group["params"]}
    matching = _Matching(saved, index, masters_of(entry.value for entry in entries), owned)
    parameters = Parameters()
    for entry in entries:
        if entry.kind == "module":
            matching.module(entry, parameters)
        elif entry.kind == "stateful":
            matching.stateful(entry)
        elif entry.kind != "optimizer":
            if optimizers:
                note_parameters(parameters, entry.key, entry.value)
            matching.container(entry)
    for entry in entries:
        if entry.kind == "optimizer":
            matching.optimizer(entry, parameters)
    return matching.finish()


class _Index:
    """Which names of a checkpoint belong to which entry: the longest one that they begin with."""

    def __init__(self, saved: SavedState, keys: Iterable[str]) -> None:
        self._tops = frozenset(keys) | saved.entries.keys()
        # when no entry has a dot in its name, the first part of a name says it all
        self._simple = not any("." in top for top in self._tops)
        self.tensors: dict[str, list[str]] = {}
        self.values: dict[str, list[str]] = {}
        for names in (saved.tensors, saved.aliases):
            for name in names:
                self.tensors.setdefault(self._top(name), []).append(name)
        for path in saved.values:
            self.values.setdefault(self._top(path), []).append(path)

        self._sorted: list[str] | None = None

    def below(self, path: str) -> list[str]:
        """All names that begin with `<path>.`, of tensors and of values."""
        if self._sorted is None:
            groups = (*self.tensors.values(), *self.values.values())
            self._sorted = sorted({name for group in groups for name in group})
        start = bisect_left(self._sorted, path + ".")
        return self._sorted[start : bisect_left(self._sorted, path + "/", start)]  # the character after the dot

    def _top(self, name: str) -> str:
        if self._simple:
            first = name.partition(".")[0]
            return first if first in self._tops else name
        at = len(name)
        while at > 0:
            if name[:at] in self._tops:
                return name[:at]
            at = name.rfind(".", 0, at)
        return name


class _Module:
    """A module: what has to be given back beside its tensors."""

    def __init__(self, key: str, found: ModuleState) -> None:
        self.prefix = key + "."
        self.found = found
        self.extra: dict[str, Any] = {}
        self.custom: list[dict[str, Any]] = []

    def apply(self, given: Given) -> None:
        for module in self.found.fsdp:
            module.reshard()  # a gathered copy would be of the parameters before
        for wrapper in self.found.fsdp1:
            drop_gathered(wrapper)
        for custom, marked in zip(self.found.custom, self.custom, strict=True):
            custom.restore(given.fill_state(marked, custom.state))
        for name, module in self.found.extra:
            if name in self.extra:
                state = given.fill_state(self.extra[name], module.get_extra_state)
                if state is not ABSENT:
                    module.set_extra_state(state)


class _DeepSpeed:
    """What DeepSpeed makes of the master weights that were loaded, and of the other parameters that it has cut."""

    def __init__(self, masters: list[Masters], stage3: list[torch.nn.Parameter]) -> None:
        self.masters = masters
        self.stage3 = stage3

    def refresh(self) -> None:
        for masters in self.masters:
            masters.refresh()
        drop_gathered_by_stage3(self.stage3)


class _Stateful:
    """A stateful object."""

    def __init__(self, key: str, value: Any, marked: Any) -> None:
        self.key = key
        self.value = value
        self.marked = marked

    def apply(self, given: Given) -> None:
        filled = given.fill_state(self.marked, self.value.state_dict)
        if filled is not ABSENT:
            self.value.load_state_dict(filled)


class _Value:
    """A value, or a container with tensors in it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.new: list[tuple[str, Any, Any, Any]] = []  # (path, container, key in it, marked value)

    def apply(self, given: Given) -> None:
        for path, parent, slot, marked in self.new:
            current = parent[slot]
            filled = given.fill(marked, current, wrap=True)
            if isinstance(current, PerRank) and not isinstance(filled, PerRank):
                given.one_for_all(path, current, filled)
            elif filled is not ABSENT and filled is not current:
                replace(parent, slot, filled)


class _Matching:
    """The work of build_target."""

    def __init__(self, saved: SavedState, index: _Index, masters: list[Masters], owned: set[int]) -> None:
        self._saved = saved
        self._owned = owned
        self._masters = masters
        self._stage3: list[torch.nn.Parameter] = []
        self._index = index
        self._inventory = Inventory()
        self._target = Target()
        self._wanted: set[str] = set()

    def module(self, entry: Entry, parameters: Parameters) -> None:
        key = entry.key
        self._target.entries.append(key)
        found = walk_module(entry.value, loading=True, masters=self._masters)
        self._stage3 += found.stage3
        parameters.add(key, found)
        enter_tensors(self._inventory, key, found)
        part = _Module(key, found)
        for custom in found.custom:
            marks = {fqn: self._tree(f"{key}.{fqn}", value) for fqn, value in custom.state().items()}
            part.custom.append({fqn: marked for fqn, marked in marks.items() if marked is not ABSENT})
        for fqn, module in found.extra:
            marked = self._tree(f"{key}.{fqn}", module.get_extra_state())
            if marked is not ABSENT:
                part.extra[fqn] = marked
        self._target._parts.append(part)

    def stateful(self, entry: Entry) -> None:
        self._target.entries.append(entry.key)
        marked = self._tree(entry.key, entry.value.state_dict())
        if marked is not ABSENT:
            self._target._parts.append(_Stateful(entry.key, entry.value, marked))

    def optimizer(self, entry: Entry, parameters: Parameters) -> None:
        key = entry.key
        self._target.entries.append(key)
        live = Inventory()
        modules = self._saved.entries.get(key, {}).get("modules")
        naming = name_parameters(key, entry.value, parameters, modules)
        enter_optimizer(live, key, entry.value, parameters, naming)
        part = OptimizerTarget(key, entry.value)
        tensors, values = self._index.tensors.get(key, ()), self._index.values.get(key, ())
        part.plan(self._inventory, live, naming, parameters, self._saved, tensors, values)
        self._target.missing += part.missing
        self._wanted |= part.wanted
        self._target._parts.append(part)

    def container(self, entry: Entry) -> None:
        self._target.entries.append(entry.key)
        part = _Value(entry)
        self._spread(part, entry.key, entry.value, entry.parent, entry.slot, top=True)
        self._target._parts.append(part)

    def _spread(self, part: _Value, path: str, value: Any, parent: Any, slot: Any, *, top: bool = False) -> None:
        """Match a value, by the paths that it is spread over if it is."""
        if isinstance(value, dict) and is_spread(value) and path not in self._saved.values:
            for key, item in value.items():
                self._spread(part, f"{path}.{key}", item, value, key)
        elif isinstance(value, Shard):
            self._inventory.shard(path, value)
        elif isinstance(value, torch.Tensor) and (top or self._is_kept(value) or self._fits(path, value)):
            self._inventory.tensor(path, value)
        else:
            marked = self._tree(path, value, container=True)
            if marked is ABSENT:
                return
            if not hasattr(parent, "__setitem__") and not isinstance(value, _CHANGED_IN_PLACE):
                raise StateError(
                    f"{path!r} can't be replaced in a {type(parent).__qualname__}; put it into a dict or a list",
                    tensor=path,
                )
            part.new.append((path, parent, slot, marked))

    def _is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor in a container has others who know it, so that no new one can take its place."""
        return isinstance(tensor, torch.nn.Parameter | DTensor) or id(tensor) in self._owned

    def _fits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor can be filled in place (one that the checkpoint doesn't have is as good as that)."""
        found = self._saved.find(name)
        return found is None or (found.dtype == tensor.dtype and found.shape == tuple(tensor.shape))

    def _tree(self, path: str, value: Any, *, container: bool = False) -> Any:
        """Match a value that is taken as the checkpoint has it; ABSENT, and noted as missing, if it has none.

        Tensors that the live value has under the same names are filled in place, if they fit; others are made. In a
        container of the state itself, parameters are filled in any case.
        """
        marked = self._saved_tree(path)
        if marked is ABSENT:
            self._target.missing.append(path)
            return ABSENT
        live = Inventory()
        live.mark(path, value)
        for mark in references(marked):
            if isinstance(mark, TensorRef):
                self._tensor(mark.name, live, path, container=container)
        return marked

    def _saved_tree(self, path: str) -> Any:
        saved = self._saved
        if path in saved.values:
            self._wanted.add(path)
            value = saved.values[path]
            return TensorRef(path) if isinstance(value, Disassembled) else value
        if saved.find(path) is not None:
            return TensorRef(path)
        # A dict that was spread, where there is something else now
        leaves: dict[str, Any] = {}
        inner: set[str] = set()
        for name in self._index.below(path):
            if name not in saved.values:
                leaves[name] = TensorRef(name)
                continue
            self._wanted.add(name)
            value = saved.values[name]
            if isinstance(value, Disassembled):
                leaves[name] = TensorRef(name)
                inner.update(f"{name}.{part}" for part in value.parts)
            else:
                leaves[name] = value
                inner.update(mark.name for mark in references(value) if isinstance(mark, TensorRef))
        leaves = {name: value for name, value in leaves.items() if name not in inner}
        if not leaves:
            return ABSENT
        flat = next((entry.get("flat", ()) for key, entry in saved.entries.items() if _within(path, key)), ())
        return rejoin(path, leaves, flat)

    def _tensor(self, name: str, live: Inventory, path: str, *, container: bool) -> None:
        """Enter a tensor that a value refers to: the live one if it fits, else a new one on the CPU."""
        self._wanted.add(name)
        described = self._saved.values.get(name)
        if isinstance(described, Disassembled):
            if name not in live.live:
                raise StateError(
                    f"{name!r} was a {described.kind}, and no class is imported because a file names it; put one of "
                    f"the same class into the state before loading",
                    tensor=name,
                )
            self._inventory.tensor(name, live.live[name])
            return
        found = self._saved.find(name)
        if found is None:
            raise MissingTensorError(
                f"the value {path!r} refers to a tensor {name!r} that the checkpoint doesn't have; it is damaged or "
                "was written wrongly",
                tensor=name,
            )
        there = live.local.tensors.get(live.local.aliases.get(name, name))
        kept = container and there is not None and self._is_kept(live.live[name])
        if there is not None and (kept or there.takes(found.dtype, found.shape)):
            self._inventory.adopt(name, live)
        else:
            device: torch.device | str = "cpu"
            if name in live.live:
                device = live.live[name].device
                self._target._replaced.append(live.live[name])
            self._saved.require(name)
            self._inventory.tensor(name, torch.empty(found.shape, dtype=found.dtype, device=device))

    def finish(self) -> Target:
        """What was matched, as a target."""
        target, saved, inventory = self._target, self._saved, self._inventory
        target._deepspeed = _DeepSpeed(self._masters, self._stage3)
        tied: dict[str, list[str]] = {}
        for alias, name in inventory.local.aliases.items():
            tied.setdefault(name, []).append(alias)
        for name, local in inventory.local.tensors.items():
            if name in saved.tensors and name not in tied:
                target.tensors[name] = local
                continue
            # A tied tensor is as good under another of its names
            at = next((known for known in (name, *tied.get(name, ())) if saved.find(known) is not None), None)
            if at is None:
                target.missing.append(name)
                continue
            local.name = at
            target.tensors[at] = local
            stored = saved.aliases.get(at, at)
            for alias in tied.get(name, ()):
                if alias in saved.tensors and alias != stored:
                    target.retied[alias] = at
        for name, value in inventory.local.values.items():
            self._wanted.add(name)
            self._compare(name, value)
        for key in target.entries:
            target.unexpected += [
                name
                for name in self._index.tensors.get(key, ())
                if name not in inventory.live and name not in self._wanted
            ]
            target.unexpected += [path for path in self._index.values.get(key, ()) if path not in self._wanted]
        target._live = inventory.live
        return target

    def _compare(self, name: str, value: Any) -> None:
        """Check that a tensor subclass was saved by its like."""
        was = self._saved.values.get(name)
        if was is None:
            return  # then its parts are missing too
        if not isinstance(was, Disassembled) or (was.kind, was.parts) != (value.kind, value.parts):
            raise StateMismatchError(
                f"{name!r} is a {value.kind} here, but was saved as {getattr(was, 'kind', 'another kind of value')}; "
                "build the state as it was saved",
                tensor=name,
            )
        if None not in (was.context, value.context) and was.context != value.context:
            raise StateMismatchError(
                f"{name!r}, a {value.kind}, was saved with {was.context!r}, but has {value.context!r} here; "
                "build the state as it was saved",
                tensor=name,
            )


def _restores_generators(part: object) -> bool:
    return isinstance(part, _Value) and isinstance(part.entry.value, RNG)


def _within(path: str, key: str) -> bool:
    return path == key or path.startswith(key + ".")
