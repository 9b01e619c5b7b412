"""The events: what can be told of an operation (a save, a load, a reshard) on one rank.

An operation has phases, and within them it waits: each begins and ends with an event of its own, so that of a process
that died or hangs the last thing it began is known. Which operations and phases there are is not known here, nor who
listens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "Event",
    "OperationEnded",
    "OperationStarted",
    "PhaseEnded",
    "PhaseStarted",
    "WaitEnded",
    "WaitStarted",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events say."""

    operation: str
    """What is done: save, load, reshard, copy, or capture, the trainers' part of a save that does not stop them."""
    id: int
    """Number of the operation in its process: what belongs together has the same."""
    path: str
    """The checkpoint's folder: the one that is written, or read by a load."""
    step: int | None
    """The training step; None where there is none, or before a load or reshard has read it in the manifest."""
    rank: int
    """Rank in the process group that takes part."""
    world_size: int
    thread: int
    """The system's number of the thread that it happened on."""
    thread_name: str
    time: float
    """Seconds since 1970, by the machine's clock, which may be set meanwhile."""
    monotonic: float
    """Seconds of the clock that is never set; the same for all processes of a machine since its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationStarted(Event):
    """A save, load or reshard began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationEnded(Event):
    """It ended, by success unless there is an error."""

    seconds: float
    waited: float
    """Seconds of them in waits, on all threads together."""
    bytes: int
    """As in the operation's result: all that a save or reshard wrote on all ranks, or that this rank read in a load."""
    phases: Mapping[str, float]
    """Seconds by phase, in the order in which phases first began."""
    error: str | None
    """Type and message of what ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted(Event):
    """A phase began. One of the same name may follow in the same operation."""

    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnded(Event):
    """A phase ended."""

    phase: str
    seconds: float
    waited: float
    """Seconds of them in waits."""
    bytes: int
    """Bytes that this rank wrote or read in it, with what files have beside tensors."""
    error: str | None
    """Type and message of what went wrong in it on this rank; the operation may end only after the others know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitStarted(Event):
    """Nothing more to do before somebody else did his part."""

    phase: str | None
    """The phase that waits, None outside of one."""
    reason: str
    """Who or what is waited for, such as "other ranks"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitEnded(Event):
    """A wait ended."""

    phase: str | None
    reason: str
    seconds: float
