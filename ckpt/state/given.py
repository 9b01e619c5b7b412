"""What has arrived when a checkpoint was read: tensors, values and per-rank values, to be put where marks stand.

Knows nothing of where the results go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt.state.containers import references
from ckpt.state.rng import RNG
from ckpt.state.types import PerRank, PerRankRef, Shard, TensorRef

__all__ = ["ABSENT", "Given", "Others"]

ABSENT: Any = object()
"""Stands for a value that is not there, since None is one."""


@dataclass(frozen=True, slots=True)
class Others:
    """The per-rank values of a checkpoint that another number of ranks wrote."""

    saved: Callable[[int], Mapping[str, Any]]
    """Rank that saved -> path -> decoded value."""
    count: int
    """How many ranks saved some."""
    rank: int
    """This rank, of `world_size` now."""
    world_size: int


class Given:
    """Resolves marks.

    Attributes:
        values: path -> marked value.
        per_rank: path -> value of this rank; empty if the checkpoint was written by another number of ranks.
        skipped: paths of per-rank values that were not there, and so were left as they are.
        derived: paths of those that were made of what another number of ranks had saved.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[str, Any],
        per_rank: Mapping[str, Any],
        others: Others | None = None,
    ) -> None:
        self._tensors = tensors
        self._others = others
        self.values = values
        self.per_rank = per_rank
        self.skipped: list[str] = []
        self.derived: list[str] = []

    def fill(self, marked: Any, current: Any = ABSENT, *, wrap: bool = False) -> Any:
        """The value with tensors and per-rank values in the place of marks; dicts, lists and tuples are new ones.

        `current` is what is there now: what it has stays where a per-rank value is not given. With `wrap`, a per-rank
        value is put into the `PerRank` or `RNG` it came from, and a tensor stays the `Shard` that it was filled
        through, so that it will be saved as one again.
        """
        kind = type(marked)
        if kind is TensorRef:
            tensor = self._tensors[marked.name]
            return current if wrap and isinstance(current, Shard) and current.local is tensor else tensor
        if kind is PerRankRef:
            return self.own(marked.path, current, wrap=wrap)
        if kind is dict:
            now = current if isinstance(current, dict) else {}
            filled = {key: self.fill(item, now.get(key, ABSENT), wrap=wrap) for key, item in marked.items()}
            return {key: item for key, item in filled.items() if item is not ABSENT}
        if kind is list or kind is tuple:
            there = current if isinstance(current, list | tuple) else ()
            items = (
                self.fill(item, there[index] if index < len(there) else ABSENT, wrap=wrap)
                for index, item in enumerate(marked)
            )
            return kind(None if item is ABSENT else item for item in items)
        return marked

    def fill_state(self, marked: Any, current: Callable[[], Any]) -> Any:
        """The same for a state that an object gave, and will be given: `current` asks it for what it is now.

        It is asked only if there are per-rank values in the state, whose rules it knows.
        """
        has_own = any(isinstance(mark, PerRankRef) for mark in references(marked))
        return self.fill(marked, current() if has_own else ABSENT)

    def own(self, path: str, current: Any, *, wrap: bool) -> Any:
        """This rank's value, or what it has now if none was saved for it."""
        if path not in self.per_rank:
            return self._of_others(path, current, wrap=wrap)
        value = self.fill(self.per_rank[path])
        if isinstance(current, RNG) and wrap:
            current.load_state_dict(value)
            return current
        if isinstance(current, PerRank) and wrap:
            current.give(value)
            return current
        return PerRank(value) if wrap else value

    def one_for_all(self, path: str, current: PerRank, value: Any) -> None:
        """Give what was saved as equal on all ranks to one for which each rank has its own now.

        A plain value holds for any rank, the state of an object only for one of as many.
        """
        if self._others is not None and current.stateful:
            self.skipped.append(path)
        else:
            current.give(value)

    def _of_others(self, path: str, current: Any, *, wrap: bool) -> Any:
        """A value made by its rule of what another number of ranks had saved, or what is there now."""
        others = self._others
        if others is not None and isinstance(current, RNG):
            near = others.saved(others.rank % others.count).get(path)
            if near is not None:
                current.derive(self.fill(near), others.rank, others.world_size)
                self.derived.append(path)
                return current if wrap else current.state_dict()
        if others is not None and isinstance(current, PerRank) and current.resize is not None:
            states = [others.saved(rank) for rank in range(others.count)]
            if all(path in state for state in states):
                known = [self.fill(state[path]) for state in states]
                made = current.resize(known, others.rank, others.world_size)
                self.derived.append(path)
                if not wrap:
                    return made
                current.give(made)
                return current
        self.skipped.append(path)
        if wrap:
            return current
        # whoever is given its state by load_state_dict gave it with marks, and gets it without
        if isinstance(current, PerRank):
            return current.take()
        return current.state_dict() if isinstance(current, RNG) else current
