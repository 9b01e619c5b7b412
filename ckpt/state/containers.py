"""Dicts and lists of a state: how they become paths and marked values, and how they are filled again, in place.

A dict that holds tensors is spread over paths, `<path>.<key>`, so that ranks with different parts of a model can each
have their own keys of it. What can't be spread that way (lists, other keys than strings) is one value with marks in it.
Keys may have dots in them: a dict that has such keys, and holds nothing deeper, is noted as *flat*, so that it is known
where a path ends and the key begins. This module does not know checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch

from ckpt.state.inventory import Inventory
from ckpt.state.rng import RNG
from ckpt.state.types import PerRank, PerRankRef, Shard, TensorRef

__all__ = ["holds_tensors", "is_spread", "references", "rejoin", "replace", "spread"]

_HELD = (torch.Tensor, Shard, PerRank, RNG)


def holds_tensors(value: object) -> bool:
    """Whether there is a tensor, or anything else that is kept apart, in a value."""
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_tensors, value))
    return isinstance(value, _HELD)


def is_spread(value: object) -> bool:
    """Whether a value is spread over paths rather than kept as one value."""
    return (
        isinstance(value, dict)
        and set(map(type, value)) == {str}
        and holds_tensors(value)
        and not (_is_flat(value) and any(map(_is_deep, value.values())))
    )


def _is_flat(value: dict[str, Any]) -> bool:
    return any("." in key for key in value)


def _is_deep(value: object) -> bool:
    return isinstance(value, dict | list | tuple) and holds_tensors(value)


def spread(inventory: Inventory, path: str, value: Any, flat: dict[str, bool]) -> None:
    """Enter a value and all that is in it; note the paths of its flat dicts."""
    if not is_spread(value):
        inventory.value(path, value)
        return
    if _is_flat(value):
        flat[path] = True
    for key, item in value.items():
        spread(inventory, f"{path}.{key}", item, flat)


def rejoin(path: str, leaves: Mapping[str, Any], flat: Iterable[str]) -> dict[str, Any]:
    """The dict that was spread over these paths, all of which begin with `<path>.`."""
    flat = frozenset(flat)
    whole: dict[str, Any] = {}
    for leaf, value in leaves.items():
        place, at = whole, path
        rest = leaf[len(path) + 1 :]
        while at not in flat and "." in rest:
            key, _, rest = rest.partition(".")
            place, at = place.setdefault(key, {}), f"{at}.{key}"
        place[rest] = value
    return whole


def references(value: Any) -> Iterable[TensorRef | PerRankRef]:
    """The marks in a value."""
    if isinstance(value, TensorRef | PerRankRef):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def replace(parent: Any, key: Any, new: object) -> None:
    """Make `parent[key]` equal to `new`, keeping the dicts, lists and generators that are there already."""
    live = parent[key] if isinstance(parent, list | tuple) or key in parent else None
    if isinstance(live, MutableMapping) and isinstance(new, dict):
        for gone in [key for key in live if key not in new]:
            del live[gone]
        for name, item in new.items():
            replace(live, name, item)
    elif isinstance(live, list) and isinstance(new, list):
        live[:] = new
    elif isinstance(live, torch.Generator) and isinstance(new, torch.Generator):
        live.set_state(new.get_state())
    else:
        parent[key] = new
