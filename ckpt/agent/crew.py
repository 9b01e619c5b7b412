"""The agents of a run, one per node, and what each of them does for a save beyond writing its own ranks' parts.

The agent of rank 0's node leads: it merges the parts and commits (leading.py). The others tell it what they captured,
wrote, or could not, and learn from it what became of the save (following.py). Knows no sockets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ckpt.agent.wire import Message
from ckpt.events import Phase
from ckpt.saving.commit import Part

KEPT = 256
"""Finished saves of which everything is known."""
REMEMBERED = 10_000
"""Finished saves of which it is known what became of them."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Which agent this is, of which.

    Attributes:
        node: the name of this agent's node.
        nodes: for each rank, the name of its node.
    """

    node: str
    nodes: Sequence[str]

    @property
    def leader(self) -> str:
        """The node whose agent commits."""
        return self.nodes[0]

    @property
    def others(self) -> list[str]:
        """The other nodes."""
        return [node for node in dict.fromkeys(self.nodes) if node != self.node]

    def ranks(self, node: str) -> list[int]:
        """The ranks on a node."""
        return [rank for rank, name in enumerate(self.nodes) if name == node]

    def where(self, rank: int) -> str:
        """` on node b`, when there are several and it is known."""
        return f" on node {self.nodes[rank]}" if rank < len(self.nodes) and len(set(self.nodes)) > 1 else ""

    def ended(self, ranks: Iterable[int]) -> str:
        """`ranks 2, 3 on node b ended`."""
        where = sorted({self.where(rank) for rank in ranks})
        return f"{ranks_text(ranks)}{','.join(where)} ended"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0 to 3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" if b > a + 1 else f"{a}, {b}" for a, b in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


class Known(Protocol):
    """A save, as far as an agent knows it."""

    committed: bool
    error: str | None
    kind: str
    """The error's class."""
    bytes: int
    seconds: float

    @property
    def over(self) -> bool: ...


Kept = TypeVar("Kept", bound=Known)


class Past:
    """What became of the saves that are over, when everything else about them is forgotten: a trainer may keep a handle
    for long before it asks.
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[str, tuple[bool, str | None, str, int, float]] = OrderedDict()

    def forget(self, saves: OrderedDict[str, Kept]) -> None:
        """Forget all but the outcome of what has been over for long."""
        over = [attempt for attempt, save in saves.items() if save.over]
        for attempt in over[:-KEPT]:
            save = saves.pop(attempt)
            self._ends[attempt] = (save.committed, save.error, save.kind, save.bytes, save.seconds)
        while len(self._ends) > REMEMBERED:
            self._ends.popitem(last=False)

    def status(self, attempt: str) -> Message | None:
        """What `Committer.wait` answers about a save that was forgotten; None if it was not, or for too long."""
        end = self._ends.get(attempt)
        if end is None:
            return None
        committed, error, kind, nbytes, seconds = end
        known = {"captured": committed, "committed": committed, "error": error, "kind": kind}
        return {**known, "bytes": nbytes, "seconds": seconds, "waits_for": [], "writes": []}


class Committer(Protocol):
    """What an agent needs to be done about saves, whether it leads or follows."""

    def begin(self, message: Message) -> None:
        """Rank 0 opens a save, before any rank captures for it. Raises RankError if it can't be committed."""
        ...

    def expect(self, attempt: str, path: str, step: int | None) -> None:
        """Something of a save is to be written on this node, to folder `path`. Raises RankError if nobody opened it."""
        ...

    def captured(self, attempt: str, rank: int, path: str, step: int | None) -> None:
        """The rank's part lies in its slot: it is not needed any more. `path` is the folder of its node."""
        ...

    def phase(self, attempt: str, rank: int) -> Phase:
        """The phase in which this agent writes a rank's part."""
        ...

    def prepared(self, attempt: str, rank: int, part: Part) -> None:
        """The rank's part is on stable storage."""
        ...

    def failed(self, attempt: str, why: str, kind: str) -> None:
        """The save can't be done; `kind` is the error's class."""
        ...

    def failing(self, attempt: str) -> bool:
        """Whether the save has failed: what is still written for it is to be removed."""
        ...

    def discard(self, attempt: str) -> None:
        """Remove what this agent has written for a save."""
        ...

    def left(self, rank: int) -> None:
        """A trainer of this node is gone: what it has not captured will never be."""
        ...

    def wait(self, attempt: str, until: str, timeout: float) -> Message:
        """The state of a save when it is captured by all (until "captured") or over, or when the time is up."""
        ...

    def busy(self) -> bool:
        """Whether a save is under way, or something is left to tell the other agents."""
        ...

    def close(self) -> None:
        """Leave the other agents."""
        ...
