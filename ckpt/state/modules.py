"""Modules: which tensors a module saves, under which names.

A walk of our own instead of `state_dict()`, which costs tens of microseconds a tensor. It follows the modules' own
tables on every save, so it can't be out of date; only what a class means for its state is remembered. The names are
those of `torch.distributed.checkpoint.state_dict`: fully qualified names without the wrappers of DDP, torch.compile and
activation checkpointing. Parameters of FSDP2 are taken in their sharded form even while a forward pass has left them
gathered, and stay gathered; so are those of FSDP1 (fsdp1.py), each for itself out of its flat parameter. Of what a
DeepSpeed optimizer trains, the master weights are taken (deepspeed.py).

A module with ways of its own (an overridden `state_dict`, or hooks on saving or loading other than torch.distributed's)
is asked by `state_dict()` and given back its state by `load_state_dict()`; the model around it is not. This module
knows nothing of optimizers, boxes or checkpoints.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ckpt.state.deepspeed import Held, Masters, cut_by_stage3, held_of_stage3
from ckpt.state.fsdp1 import FlatMember, flat_parameter, members_of
from ckpt.state.types import Lowered, by_hand
from ckpt_formats.errors import StateError

__all__ = [
    "CustomModule",
    "ModuleState",
    "Stages",
    "fsdp_groups",
    "mark",
    "modules_in",
    "note_mark",
    "padded",
    "walk_module",
]

_EXTRA_STATE = "_extra_state"  # nn.Module.state_dict's own suffix

# torch's classes, and DeepSpeed's, are known by name, so that none has to be imported by those who don't use it.
_TRANSPARENT = {
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",
}
_MARKS = "_ckpt_marks"
_FSDP1 = "FullyShardedDataParallel"
_FSDP2 = "FSDPModule"


class Stages(nn.ModuleList):
    """Several parts of one model, such as the pipeline stages of a rank, as one module.

    Its tensors are called by their names in the whole model, which the parts have to use: a stage with the layers 4 and
    5 has them under the names `layers.4` and `layers.5`, in a ModuleDict for example. What two parts both have under
    one name is one tensor.
    """


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a class of modules means for its state."""

    inner: str | None
    """The child that a wrapper is only a wrapper of."""
    stages: bool
    fsdp: bool
    fsdp1: bool
    extra_state: bool
    saves_itself: bool
    loads_itself: bool


_known: dict[type, _Traits] = {}


def _traits(module: nn.Module) -> _Traits:
    kind = type(module)
    traits = _known.get(kind)
    if traits is None:
        traits = _known[kind] = _traits_of(kind)
    return traits


def _traits_of(kind: type[nn.Module]) -> _Traits:
    names = [base.__qualname__ for base in kind.__mro__ if base.__module__.startswith(("torch.", "deepspeed."))]
    return _Traits(
        inner=next((_TRANSPARENT[name] for name in names if name in _TRANSPARENT), None),
        stages=issubclass(kind, Stages),
        fsdp=_FSDP2 in names,
        fsdp1=_FSDP1 in names,
        extra_state=kind.get_extra_state is not nn.Module.get_extra_state,
        saves_itself=(
            kind.state_dict is not nn.Module.state_dict or kind._save_to_state_dict is not nn.Module._save_to_state_dict
        ),
        # torch.nn's own overrides (BatchNorm's) only read the files of old releases
        loads_itself=any(
            getattr(kind, method) is not getattr(nn.Module, method)
            and not getattr(kind, method).__module__.startswith("torch.nn.")
            for method in ("load_state_dict", "_load_from_state_dict")
        ),
    )


def _foreign(hooks: dict[int, Any]) -> bool:
    """Whether any of the hooks is not one of torch.distributed's, all of which this walk does the work of."""
    for hook in hooks.values():
        if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
            return True
    return False


def _patched(module: nn.Module, method: str) -> bool:
    """Whether the method was replaced on this one object, by other hands than torch.distributed.checkpoint's."""
    own = module.__dict__.get(method)
    return own is not None and not getattr(getattr(own, "func", own), "__module__", "").startswith("torch.distributed.")


class CustomModule:
    """A module that makes and takes its state by its own code.

    Attributes:
        prefix: its place in the model: empty, or a name that ends with a dot.
        module: the module.
    """

    __slots__ = ("_keys", "_metadata", "module", "prefix")

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.prefix = prefix
        self.module = module
        self._keys: dict[str, str] = {}
        self._metadata: Any = None

    def state(self) -> dict[str, Any]:
        """Fully qualified name in the model -> tensor or value, as its `state_dict()` gives them now."""
        if self.prefix:
            # as its parent's state_dict() would call it; what the call returns is dropped there too
            made: Any = OrderedDict()
            made._metadata = OrderedDict()
            self.module.state_dict(destination=made, prefix="", keep_vars=False)
        else:
            made = self.module.state_dict()
        self._metadata = getattr(made, "_metadata", None)
        self._keys = {self.prefix + _without_wrappers(self.module, key): key for key in made}
        return {name: made[key] for name, key in self._keys.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Give back what `state` gave, by the same names, through `load_state_dict()`."""
        at = len(self.prefix)
        given: Any = OrderedDict((self._keys.get(name, name[at:]), value) for name, value in state.items())
        given._metadata = self._metadata
        self.module.load_state_dict(given, strict=False)  # names were compared before


@dataclass(slots=True)
class ModuleState:
    """What a walk over a module found. Names are fully qualified names within the module."""

    members: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """Parameters and persistent buffers, a tied one under each of its names, in the order of `state_dict()`."""
    parameters: dict[int, str] = field(default_factory=dict)
    """id of a parameter -> the first of its names."""
    extra: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Name of an extra state -> the module that has it."""
    custom: list[CustomModule] = field(default_factory=list)
    sharded: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)
    """(id of a module, name in it) -> the sharded form of a parameter that FSDP2 holds gathered now."""
    fsdp: list[Any] = field(default_factory=list)
    fsdp1: list[Any] = field(default_factory=list)
    parts: list[tuple[str, torch.Tensor, Lowered, object]] = field(default_factory=list)
    """Parameters and buffers of which this rank has a part, in plain memory: name, that part, what it is of the whole,
    and what is the same for two names of one tensor."""
    ties: list[tuple[str, str]] = field(default_factory=list)
    """A second name of a parameter of FSDP1, and the first."""
    cuts: dict[int, Lowered] = field(default_factory=dict)
    """id of a parameter in plain memory -> what it is of the whole."""
    absent: set[int] = field(default_factory=set)
    """ids of parameters of FSDP1 of which this rank has nothing: they get no gradient, hence no optimizer state."""
    flats: dict[int, list[tuple[str, Lowered]]] = field(default_factory=dict)
    """id of a flat parameter -> the names of those in it, and where in it their elements are."""
    stage3: list[nn.Parameter] = field(default_factory=list)
    """Parameters that DeepSpeed's stage 3 has cut."""


def walk_module(module: nn.Module, *, loading: bool = False, masters: Sequence[Masters] = ()) -> ModuleState:
    """Find the tensors of a module and of all modules in it. Changes nothing.

    With `loading`, modules that only load by their own code are among the custom ones too. What DeepSpeed optimizers
    have `masters` of is found there.

    Raises StateError for FSDP1 while its full parameters are in use, and for parts that don't fit (`ckpt.mark`).
    """
    found = ModuleState()
    flats = _Flats(masters)
    _visit(module, "", found, flats, loading, members=True)
    flats.resolve(found)
    return found


class _Flats:
    """The parameters that FSDP1 has flattened: they are met before the modules that they belong to. And those that
    DeepSpeed optimizers have flattened, which are known by themselves.
    """

    def __init__(self, masters: Sequence[Masters]) -> None:
        self.masters = masters
        self.held = {known: held for one in masters for known, held in one.held.items()}
        self.of: dict[int, dict[str, FlatMember]] = {}
        """id of a module -> its parameters that were flattened."""
        self.flat: dict[int, list[FlatMember]] = {}
        """id of a flat parameter -> what is in it."""
        self.names: dict[tuple[int, str], str] = {}
        """(id of a module, name in it) -> fully qualified name."""
        self.ties: list[tuple[str, tuple[int, str]]] = []

    def note(self, wrapper: Any, where: str, found: ModuleState) -> None:
        """Take a FullyShardedDataParallel apart."""
        found.fsdp1.append(wrapper)
        flat = flat_parameter(wrapper)
        if flat is None:
            return
        members = self.flat[id(flat)] = list(members_of(wrapper, where))
        for member in members:
            self.of.setdefault(id(member.module), {})[member.name] = member

    def enter(self, module: nn.Module, prefix: str, found: ModuleState, *, members: bool) -> None:
        """Enter the parameters that a module had before they were flattened."""
        for name, member in self.of.get(id(module), {}).items():
            fqn = self.names[id(module), name] = prefix + name
            if member.parameter is not None:
                found.parameters.setdefault(id(member.parameter), fqn)
                if member.lowered is not None:
                    found.cuts[id(member.parameter)] = member.lowered
                    if not member.lowered.pieces:
                        found.absent.add(id(member.parameter))
            if not members:
                continue
            if member.first is not None:
                self.ties.append((fqn, (id(member.first[0]), member.first[1])))
            elif member.lowered is None:
                found.members.append((fqn, member.local))
            else:
                found.parts.append((fqn, member.local, member.lowered, None))

    def resolve(self, found: ModuleState) -> None:
        """Now that all names are known: what is tied to what, and what is in the flat parameters."""
        found.ties += [(fqn, self.names[first]) for fqn, first in self.ties]
        for key, members in self.flat.items():
            found.flats[key] = [
                (self.names[id(member.module), member.name], member.within)
                for member in members
                if member.first is None
            ]
        for master, alone in (pair for one in self.masters for pair in one.alone):
            if id(alone.parameter) in found.parameters:
                found.parameters[id(master)] = found.parameters[id(alone.parameter)]
        for flat, held in (pair for one in self.masters for pair in one.flats):
            names = [found.parameters.get(id(member.parameter)) for member in held]
            if all(name is not None for name in names):
                found.parameters[id(flat)] = names[0] or ""
                found.flats[id(flat)] = [(name or "", member.within) for name, member in zip(names, held, strict=True)]


def _visit(module: nn.Module, prefix: str, found: ModuleState, flats: _Flats, loading: bool, *, members: bool) -> None:
    traits = _traits(module)
    if traits.fsdp:
        _note_fsdp(module, found)
    elif traits.fsdp1:
        flats.note(module, prefix[:-1] or "the model", found)
    if members and _is_custom(module, traits, loading):
        found.custom.append(CustomModule(prefix, module))
        members = False  # below here only the parameters' names are of interest, for optimizers

    _enter_parameters(module, prefix, found, flats, members=members)
    if members:
        _enter_buffers(module, prefix, found)
        if traits.extra_state:
            found.extra.append((prefix + _EXTRA_STATE, module))

    for inner, child in _children(module, prefix, traits):
        _visit(child, inner, found, flats, loading, members=members)


def modules_in(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and all modules in it, each after what the fully qualified names of its own tensors begin with."""
    yield prefix, module
    for inner, child in _children(module, prefix, _traits(module)):
        yield from modules_in(child, inner)


def _children(module: nn.Module, prefix: str, traits: _Traits) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield prefix if traits.stages or name == traits.inner else f"{prefix}{name}.", child


def _enter_parameters(module: nn.Module, prefix: str, found: ModuleState, flats: _Flats, *, members: bool) -> None:
    sharded, flattened = found.sharded, flats.of.get(id(module), {})
    marked = module.__dict__.get(_MARKS)
    for name, parameter in module._parameters.items():
        if parameter is None or name in flattened:
            continue
        if sharded:
            parameter = sharded.get((id(module), name), parameter)  # noqa: PLW2901
        fqn = prefix + name
        found.parameters.setdefault(id(parameter), fqn)
        held = flats.held.get(id(parameter))
        if held is not None or cut_by_stage3(parameter):
            _enter_held(found, fqn, parameter, held, members=members)
        elif hasattr(parameter, "_hp_mapping"):
            raise StateError(
                f"the parameter {fqn!r} is trained by a DeepSpeed engine, which has its master weights; put the engine "
                "into the state in place of its module, or its optimizer beside it",
                tensor=fqn,
            )
        elif marked and name in marked:
            found.cuts[id(parameter)] = _enter_marked(found, fqn, parameter, marked[name], members=members)
        elif members and id(parameter) not in flats.flat:  # which has no name of the model's
            found.members.append((fqn, parameter))
    if flattened:
        flats.enter(module, prefix, found, members=members)


def _enter_held(found: ModuleState, fqn: str, parameter: nn.Parameter, held: Held | None, *, members: bool) -> None:
    """Enter what DeepSpeed has of a parameter."""
    if not members:
        raise StateError(
            f"the parameter {fqn!r} is trained by DeepSpeed, but a module around it makes or takes its state by code "
            "of its own (state_dict or load_state_dict overridden, or hooks), which sees no masters; remove that",
            tensor=fqn,
        )
    if cut_by_stage3(parameter):
        found.stage3.append(parameter)
    _, local, lowered, _ = held or held_of_stage3(parameter, fqn)
    found.parts.append((fqn, local, lowered, parameter))


def _enter_buffers(module: nn.Module, prefix: str, found: ModuleState) -> None:
    passing = module.__dict__.get("_non_persistent_buffers_set", ())
    marked = module.__dict__.get(_MARKS)
    for name, buffer in module._buffers.items():
        if buffer is None or name in passing:
            continue
        if marked and name in marked:
            _enter_marked(found, prefix + name, buffer, marked[name], members=True)
        else:
            found.members.append((prefix + name, buffer))


def mark(
    module: nn.Module,
    name: str,
    global_shape: Sequence[int],
    offsets: Sequence[int] | None = None,
    *,
    parts: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]] | None = None,
) -> None:
    """Say that a parameter or buffer of a module is this rank's part of a larger tensor, which was cut by hand.

    Saving and loading then take it, and what optimizers keep for it, as that part. The mark stays with the module, also
    when it is copied (for an average of the weights, say) or its parameters are replaced; marking again replaces it.

    Args:
        module: the module that has it.
        name: what it is called there: `weight`.
        global_shape: the shape of the whole, in elements, equal on all ranks.
        offsets: where this rank's part begins in the whole, if it is one box.
        parts: in their place, for a part of several boxes: where each begins in the whole, where it begins in this
            rank's tensor, and its sizes. What no box covers is padding, and neither saved nor loaded.

    Raises StateError when there is no such parameter, or a part lies outside of it or of the whole.
    """
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is None or isinstance(tensor, DTensor):
        what = "no parameter or buffer" if tensor is None else "a DTensor, which says itself how it is cut:"
        raise StateError(f"the {type(module).__qualname__} to mark has {what} {name!r}", tensor=name)
    if (offsets is None) == (parts is None):
        raise StateError(f"to mark {name!r}, give either offsets or parts", tensor=name)
    whole = tuple(int(size) for size in global_shape)
    shape = tuple(tensor.shape)
    given = [(offsets, (0,) * len(shape), shape)] if offsets is not None else list(parts or ())
    note_mark(module, name, by_hand(shape, whole, given))


def note_mark(module: nn.Module, name: str, lowered: Lowered) -> None:
    """Keep a mark of a parameter or buffer that the module has, of the shape that it has now."""
    tensor: Any = module._parameters.get(name, module._buffers.get(name))
    module.__dict__.setdefault(_MARKS, {})[name] = tuple(tensor.shape), lowered


def padded(module: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer is marked as parts of a larger one which do not cover it."""
    shape, lowered = module.__dict__.get(_MARKS, {}).get(name, ((), None))
    return lowered is not None and sum(within.numel for _, within in lowered.pieces) < math.prod(shape)


def _enter_marked(
    found: ModuleState, fqn: str, tensor: torch.Tensor, marked: tuple[tuple[int, ...], Lowered], *, members: bool
) -> Lowered:
    shape, lowered = marked
    if tuple(tensor.shape) != shape or isinstance(tensor, DTensor):
        raise StateError(
            f"the tensor {fqn!r} was marked as a part of shape {list(shape)} of a larger one, but now has the shape "
            f"{list(tensor.shape)}; mark it anew with ckpt.mark",
            tensor=fqn,
        )
    if members:
        found.parts.append((fqn, tensor, lowered, tensor))
    return lowered


def _is_custom(module: nn.Module, traits: _Traits, loading: bool) -> bool:
    own = module.__dict__
    if (
        traits.saves_itself
        or _foreign(own["_state_dict_hooks"])
        or _foreign(own["_state_dict_pre_hooks"])
        or _patched(module, "state_dict")
    ):
        return True
    return loading and (
        traits.loads_itself
        or _foreign(own["_load_state_dict_pre_hooks"])
        or _foreign(own["_load_state_dict_post_hooks"])
        or _patched(module, "load_state_dict")
    )


def fsdp_groups(module: nn.Module) -> list[Any]:
    """The groups in which FSDP2 shards the parameters of a module; none if it is no module of FSDP2."""
    if not _traits(module).fsdp:
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    # older releases of torch have one group or none
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _note_fsdp(module: Any, found: ModuleState) -> None:
    """Find the sharded form of the parameters that this FSDP2 module, or one that shares its group, holds gathered."""
    found.fsdp.append(module)
    for group in fsdp_groups(module):
        if group.is_sharded:
            continue
        for parameter in group.fsdp_params:
            where = parameter._module_info
            for owner, name in _places(where):
                found.sharded[id(owner), name] = parameter.sharded_param


def _places(where: Any) -> Iterable[tuple[nn.Module, str]]:
    yield where.module, where.param_name
    yield from zip(where.shared_modules, where.shared_param_names, strict=True)


def _without_wrappers(module: nn.Module, key: str) -> str:
    """A key of `module.state_dict()` as a fully qualified name within the module."""
    kept = []
    current: nn.Module | None = module
    for part in key.split("."):
        if current is not None and _traits(current).inner == part:
            current = current._modules[part]
            continue
        while current is not None and (inner := _traits(current).inner):
            current = current._modules[inner]  # a wrapper whose own hook has dropped its name
        kept.append(part)
        current = current._modules.get(part) if current is not None else None
    return ".".join(kept)
