"""The top level of a state: which of its things are of which kind, and where each is to be put back.

Containers that hold modules, optimizers or other stateful objects (a list of pipeline chunks, say) are opened, and what
is in them becomes entries of its own, named by the path to it. torchdata's loaders, whose states speak of one rank's
part of the data, are per-rank values. Knows nothing of tensors' memory or of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ckpt.state.deepspeed import kind_is_deepspeed_optimizer
from ckpt.state.rng import RNG
from ckpt.state.types import PerRank, Shard
from ckpt_formats.errors import StateError
from ckpt_formats.manifest import RESERVED_PREFIX

__all__ = ["Entry", "entries_of", "python_paths"]


class Entry(NamedTuple):
    """One thing of a state that has a name of its own."""

    key: str
    kind: str
    """module, optimizer, stateful, tensor, value or per_rank."""
    value: Any
    parent: Any
    """The container it lies in, which a new value is put into."""
    slot: Any
    """Its key or index there."""


def entries_of(state: Mapping[str, object]) -> list[Entry]:
    """All entries, in the order of the state.

    Raises StateError for names that are no strings, empty, or the format's own.
    """
    found: list[Entry] = []
    for key, value in state.items():
        if type(key) is not str or not key:
            raise StateError(f"the state has the key {key!r}; it is the first part of names, so use a non-empty string")
        if key.startswith(RESERVED_PREFIX.rstrip(".")):
            raise StateError(
                f"names that begin like {key!r} are the format's own; rename that key of the state", tensor=key
            )
        found += _open(key, value, state, key)
    return found


def _open(key: str, value: Any, parent: Any, slot: Any) -> Iterator[Entry]:
    kind = _kind(value)
    if kind == "loader":
        own = [PerRank(value)]
        yield Entry(key, "per_rank", own[0], own, 0)
        return
    if kind != "value" or not _holds_stateful(value):
        yield Entry(key, kind, value, parent, slot)
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _open(f"{key}.{name}", item, value, name)


_known: dict[type, str] = {}
_STATEFUL = ("module", "optimizer", "stateful", "loader")
_LOADERS = ("StatefulDataLoader", "StatefulDistributedSampler", "Loader")  # by name: torchdata may not be there
_CONTAINERS = (dict, list, tuple)


def _kind(value: object) -> str:
    return _kind_of_type(type(value))


def _kind_of_type(kind: type) -> str:
    name = _known.get(kind)
    if name is None:
        name = _known[kind] = _kind_of(kind)
    return name


def _kind_of(kind: type) -> str:
    if issubclass(kind, torch.nn.Module):
        return "module"
    if issubclass(kind, torch.optim.Optimizer) or kind_is_deepspeed_optimizer(kind):
        return "optimizer"
    if issubclass(kind, torch.Tensor | Shard):
        return "tensor"
    if issubclass(kind, PerRank | RNG):
        return "per_rank"
    if callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None)):
        known = (base for base in kind.__mro__ if base.__module__.startswith("torchdata."))
        return "loader" if any(base.__qualname__ in _LOADERS for base in known) else "stateful"
    return "value"


def _holds_stateful(value: object) -> bool:
    if not isinstance(value, _CONTAINERS):
        return _kind(value) in _STATEFUL
    items = value.values() if isinstance(value, dict) else value
    # a container may hold very many things, but they are of few types
    kinds = set(map(type, items))
    if any(_kind_of_type(kind) in _STATEFUL for kind in kinds):
        return True
    deeper = tuple(kind for kind in kinds if issubclass(kind, _CONTAINERS))
    return bool(deeper) and any(_holds_stateful(item) for item in items if isinstance(item, deeper))


def python_paths(value: object, name: str, path: str) -> Iterator[tuple[str, str]]:
    """(name, Python expression) of everything in containers, to tell apart two things that have the same name."""
    yield name, path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from python_paths(item, f"{name}.{key}", f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from python_paths(item, f"{name}.{index}", f"{path}[{index}]")
