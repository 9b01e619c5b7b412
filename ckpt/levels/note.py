"""What the loop around a training notes in each checkpoint that it saves: an entry of plain values beside the state.

So it is committed with the checkpoint, and known to whoever finds it later: on which levels it is to be, and what was
measured at its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_formats.errors import CheckpointError
from ckpt_formats.values import decode

__all__ = ["ENTRY", "Note", "note_of"]

ENTRY = "checkpointer"
"""The entry's name in the state."""


@dataclass(frozen=True, slots=True)
class Note:
    """What was noted."""

    levels: Mapping[str, bool] = field(default_factory=dict)
    """Place of each further level -> whether the checkpoint is to be there. In notes of before places were noted, the
    names of those where it is to be."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """It as the entry's value."""
        return {"levels": dict(self.levels), "metrics": dict(self.metrics)}


def note_of(values: Mapping[str, Any]) -> Note:
    """The note among the encoded values of a checkpoint; an empty one where there is none, or another thing."""
    try:
        tree = decode(values[ENTRY], ENTRY, lenient=True)
        levels, metrics = tree["levels"], tree["metrics"]
        if isinstance(levels, list):
            levels = dict.fromkeys((name for name in levels if isinstance(name, str)), True)
        return Note(
            {place: due for place, due in levels.items() if isinstance(place, str) and isinstance(due, bool)},
            {name: value for name, value in metrics.items() if isinstance(name, str) and isinstance(value, float)},
        )
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return Note()
