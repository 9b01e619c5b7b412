"""Modules: which tensors a module saves, under which names.

A walk of our own instead of `state_dict()`, which costs tens of microseconds a tensor. It follows the modules' own
tables on every save, so it can't be out of date; only what a class means for its state is remembered. The names are
those of `torch.distributed.checkpoint.state_dict`: fully qualified names without the wrappers of DDP, torch.compile and
activation checkpointing. Parameters of FSDP2 are taken in their sharded form even while a forward pass has left them
gathered, and stay gathered.

A module with ways of its own (an overridden `state_dict`, or hooks on saving or loading other than torch.distributed's)
is asked by `state_dict()` and given back its state by `load_state_dict()`; the model around it is not. This module
knows nothing of optimizers, boxes or checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckpt_formats.errors import StateError

__all__ = ["CustomModule", "ModuleState", "walk_module"]

_EXTRA_STATE = "_extra_state"  # nn.Module.state_dict's own suffix

# torch's classes are known by name, so that none of these has to be imported by those who don't use it.
_TRANSPARENT = {
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "ActivationWrapper": "_checkpoint_wrapped_module",
}
_FSDP1 = "FullyShardedDataParallel"
_FSDP2 = "FSDPModule"


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a class of modules means for its state."""

    inner: str | None
    """The child that a wrapper is only a wrapper of."""
    fsdp: bool
    refused: bool
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
    names = [base.__qualname__ for base in kind.__mro__ if base.__module__.startswith("torch.")]
    return _Traits(
        inner=next((_TRANSPARENT[name] for name in names if name in _TRANSPARENT), None),
        fsdp=_FSDP2 in names,
        refused=_FSDP1 in names,
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


def walk_module(module: nn.Module, *, loading: bool = False) -> ModuleState:
    """Find the tensors of a module and of all modules in it. Changes nothing.

    With `loading`, modules that only load by their own code are among the custom ones too.

    Raises StateError for FSDP1, whose flat parameters have no names of the model's.
    """
    found = ModuleState()
    _visit(module, "", found, loading, members=True)
    return found


def _visit(module: nn.Module, prefix: str, found: ModuleState, loading: bool, *, members: bool) -> None:
    traits = _traits(module)
    if traits.refused:
        raise StateError(
            f"{prefix[:-1] or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters can't "
            "be saved by name; use torch.distributed.fsdp.fully_shard"
        )
    own = module.__dict__
    if traits.fsdp:
        _note_fsdp(module, found)
    if members and _is_custom(module, traits, loading):
        found.custom.append(CustomModule(prefix, module))
        members = False  # below here only the parameters' names are of interest, for optimizers

    sharded = found.sharded
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if sharded:
                parameter = sharded.get((id(module), name), parameter)  # noqa: PLW2901
            fqn = prefix + name
            found.parameters.setdefault(id(parameter), fqn)
            if members:
                found.members.append((fqn, parameter))
    if members:
        passing = own.get("_non_persistent_buffers_set", ())
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in passing:
                found.members.append((prefix + name, buffer))
        if traits.extra_state:
            found.extra.append((prefix + _EXTRA_STATE, module))

    for name, child in module._modules.items():
        if child is not None:
            inner = prefix if name == traits.inner else f"{prefix}{name}."
            _visit(child, inner, found, loading, members=members)


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


def _note_fsdp(module: Any, found: ModuleState) -> None:
    """Find the sharded form of the parameters that this FSDP2 module, or one that shares its group, holds gathered."""
    found.fsdp.append(module)
    state = module._get_fsdp_state()
    # older releases of torch have one group or none
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in groups:
        if group is None or group.is_sharded:
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
