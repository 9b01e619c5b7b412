"""Ranks agree on what to do after a step, though only some of them were told, and nobody waits.

What was raised on any rank at the end of a step is reduced in the background during the next one, and read by all at
its end. The reduction runs on a process group of our own, so that it never gets between the training's collectives.
Each says what its rank is doing, too: ranks of a program in which only some leave a loop, or ask for a save, hear of it
instead of waiting for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import TracebackType

import torch
import torch.distributed as dist

from ckpt.collective import Collective, ProcessGroup
from ckpt_formats.errors import ConfigurationError, RankError

__all__ = ["Act", "Agreement", "require_alike"]


class Act(IntEnum):
    """What a rank is doing when it announces something."""

    BEGINS = 0
    COMPLETES = 1
    SAVES = 2
    LEAVES = 3


_WORDS = {
    Act.BEGINS: "begins a loop",
    Act.COMPLETES: "goes on with its loop",
    Act.SAVES: "has called save()",
    Act.LEAVES: "leaves the block",
}


class Agreement:
    """Flags that travel: small non-negative integers, of which the largest that any rank raised holds for all.

    Attributes:
        group: the process group, of the CPU; None for a process alone.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        """Make the group. Collective."""
        self.group: ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._flags = torch.empty(0)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
            return
        if process_group is None:
            self.group = dist.new_group(backend="gloo")
        else:
            ranks = dist.get_process_group_ranks(process_group)
            self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def read(self, mine: Sequence[int]) -> list[int]:
        """What holds at the end of this step: what was raised a step ago anywhere; alone, what is raised now.

        Raises:
            RankError: a rank died, left the block with an error, did not get there within the process group's time
                limit, or does something else than this one.
            ConfigurationError: ranks are given loops of different lengths.
        """
        if self.group is None:
            return list(mine)
        if self._work is not None:
            work, self._work = self._work, None
            Collective(self.group).wait(work)
            self._require_same()
        flags: list[int] = self._flags[len(Act) + 2 :].tolist()
        return flags or [0] * len(mine)

    def announce(self, mine: Sequence[int], act: Act, step: int) -> None:
        """Begin to tell the others, who read it at the end of the next step. Every rank does, at every step.

        Args:
            mine: what this rank raises.
            act: what it is doing, at which step; to begin, up to which step.
        """
        if self.group is None:
            return
        acts = [0] * len(Act)
        acts[act] = 1 + dist.get_rank(self.group)
        self._flags = torch.tensor([*acts, step, -step, *mine], dtype=torch.int64)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def meet(self, mine: Sequence[int], act: Act, step: int) -> None:
        """Wait until all ranks do this. Raises as `read` does."""
        self.read(mine)
        self.announce(mine, act, step)
        self.read(mine)

    def _require_same(self) -> None:
        """Raise if it was not the same that all ranks did."""
        *acts, high, low = self._flags[: len(Act) + 2].tolist()
        does = [f"rank {rank - 1} {_WORDS[act]}" for act, rank in zip(Act, acts, strict=True) if rank]
        why: RankError | ConfigurationError
        if len(does) > 1:
            why = RankError(
                f"{' and '.join(does)}: all ranks call save() in the same steps, and leave the loop after the same "
                "one; stop() on one rank ends it on all"
            )
        elif acts[Act.BEGINS] and high != -low:
            why = ConfigurationError(f"ranks loop up to different steps, {-low} and {high}; give all the same number")
        else:
            return
        self.fail(type(why), why, None)
        raise why

    def fail(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Have those fail too that wait for this rank, which leaves with an error: as the end of a `with` block."""
        del trace
        if kind is None or self.group is None:
            return
        group = Collective(self.group)
        why = error
        if not isinstance(why, RankError):
            text = f"{kind.__name__}: {error}".removesuffix(": ")
            why = RankError(
                f"rank {group.rank} has left the training's block ({text}); start the ranks anew, and go on from the "
                "last committed checkpoint",
                rank=group.rank,
            )
        group.give_up(why)

    def close(self) -> None:
        """Give the group back, after what is still under way. Collective."""
        if self.group is not None:
            self.read([])
            dist.destroy_process_group(self.group)
            self.group = None


def require_alike(options: Sequence[Mapping[str, str]]) -> None:
    """Raise ConfigurationError if ranks, in whose order these are, were given different options."""
    for rank, theirs in enumerate(options):
        for name in sorted(theirs.keys() | options[0].keys()):
            ours, other = options[0].get(name), theirs.get(name)
            if ours != other:
                raise ConfigurationError(
                    f"ranks were given different options: {name} is {ours} on rank 0, and {other} on rank {rank}; give "
                    "all the same"
                )
