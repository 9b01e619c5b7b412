"""What has arrived when a checkpoint was read: tensors, values and per-rank values, to be put where marks stand.

Knows nothing of where the results go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt.state.rng import RNG
from ckpt.state.types import PerRank, PerRankRef, TensorRef

__all__ = ["ABSENT", "Given"]

ABSENT: Any = object()
"""Stands for a value that is not there, since None is one."""


class Given:
    """Resolves marks.

    Attributes:
        values: path -> marked value.
        per_rank: path -> value of this rank; empty if the checkpoint was written by another number of ranks.
        skipped: paths of per-rank values that were not there, and so were left as they are.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], per_rank: Mapping[str, Any]
    ) -> None:
        self._tensors = tensors
        self.values = values
        self.per_rank = per_rank
        self.skipped: list[str] = []

    def fill(self, marked: Any, current: Any = ABSENT, *, wrap: bool = False) -> Any:
        """The value with tensors and per-rank values in the place of marks; dicts, lists and tuples are new ones.

        `current` is what is there now: what it has stays where a per-rank value is not given. With `wrap`, a per-rank
        value is put into the `PerRank` or `RNG` it came from, so that it will be saved as one again.
        """
        kind = type(marked)
        if kind is TensorRef:
            return self._tensors[marked.name]
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

    def own(self, path: str, current: Any, *, wrap: bool) -> Any:
        """This rank's value, or what it has now if none was saved for it."""
        if path not in self.per_rank:
            self.skipped.append(path)
            return current
        value = self.fill(self.per_rank[path])
        if isinstance(current, RNG) and wrap:
            current.load_state_dict(value)
            return current
        if isinstance(current, PerRank) and wrap:
            current.value = value
            return current
        return PerRank(value) if wrap else value
