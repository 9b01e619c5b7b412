"""Events of another process, told to the sinks that were added in code here.

The agent has the sinks that CKPT_EVENTS chooses, as every process has; those that a program adds are its own, and hear
of what the agent did when the program learns what became of a save.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt.events.operation import next_number
from ckpt.events.registry import REGISTRY
from ckpt.events.types import (
    Event,
    OperationEnded,
    OperationStarted,
    PhaseEnded,
    PhaseStarted,
    WaitEnded,
    WaitStarted,
)

__all__ = ["relay"]

_KINDS: dict[str, type[Event]] = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): kind
    for kind in (OperationEnded, OperationStarted, PhaseEnded, PhaseStarted, WaitEnded, WaitStarted)
}


def relay(events: Sequence[Mapping[str, Any]]) -> None:
    """Tell events of one operation, as json_lines.as_json made them, with a number that is this process's."""
    number = next_number()
    for tree in events:
        fields = {**tree, "id": number}
        kind = _KINDS[fields.pop("event")]
        REGISTRY.relay(kind(**fields))
