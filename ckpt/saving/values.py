"""Plain values of all ranks made one: equal where they must be, joined where ranks hold different parts of a model.

Works on encoded values (typed JSON), so that values are compared as they will be stored. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_formats.errors import StateError, ValuesDifferError
from ckpt_formats.values import canonical, first_difference

Encoded = Mapping[str, Any]


def merge_values(parts: Sequence[Encoded], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the values of all ranks, given as path -> encoded value in rank order.

    A path that several ranks have must have the same value on all of them. The parameter groups of an optimizer are
    joined by parameter: ranks that hold different stages of a model have different ones.

    Raises:
        ValuesDifferError: a value differs between two ranks; the message names the path within it.
        StateError: a parameter has other hyperparameters on another rank.
    """
    groups = {f"{name}.param_groups" for name, entry in entries.items() if entry.get("kind") == "optimizer"}
    merged: dict[str, Any] = {}
    seen: dict[str, tuple[int, bytes]] = {}
    for rank, part in enumerate(parts):
        for path, value in part.items():
            text = canonical(value)
            known = seen.setdefault(path, (rank, text))
            if known[0] == rank:
                merged[path] = value
            elif known[1] != text:
                if path in groups:
                    merged[path] = _join_groups(merged[path], value, path, rank)
                    continue
                where = first_difference(merged[path], value, path)
                raise ValuesDifferError(
                    f"the value {where} differs between rank {known[0]} and rank {rank}; "
                    "make it equal on all ranks, or mark it with ckpt.PerRank if each rank has its own",
                    tensor=path,
                    rank=rank,
                )
    return merged


def _join_groups(known: list[dict[str, Any]], more: list[dict[str, Any]], path: str, rank: int) -> list[dict[str, Any]]:
    """Groups with equal hyperparameters become one; a parameter must not have two different ones."""
    joined = [dict(group) for group in known]
    home = {name: _hyper(group) for group in joined for name in group["params"]}
    for group in more:
        hyper = _hyper(group)
        for name in group["params"]:
            if home.setdefault(name, hyper) != hyper:
                raise StateError(
                    f"{path}: parameter {name!r} has other hyperparameters on rank {rank} than on a rank before; "
                    "set up the optimizer alike on every rank",
                    tensor=name,
                    rank=rank,
                )
        twin = next((candidate for candidate in joined if _hyper(candidate) == hyper), None)
        if twin is None:
            joined.append(dict(group))
        else:
            twin["params"] = [*twin["params"], *(name for name in group["params"] if name not in twin["params"])]
    return joined


def _hyper(group: Mapping[str, Any]) -> bytes:
    return canonical({key: value for key, value in group.items() if key != "params"})
