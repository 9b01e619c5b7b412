"""Ranks agree on what to do after a step, though only some of them were told, and nobody waits.

What was raised on any rank at the end of a step is reduced in the background during the next one, and read by all at
its end. The reduction runs on a process group of our own, so that it never gets between the training's collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ckpt.collective import ProcessGroup
from ckpt_formats.errors import RankError

__all__ = ["Agreement"]


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
            RankError: a rank died, or did not get there within the process group's time limit.
        """
        if self.group is None:
            return list(mine)
        if self._work is None:
            return [0] * len(mine)
        work, self._work = self._work, None
        try:
            work.wait()
        except RuntimeError as error:
            raise RankError(
                "another rank died, or did not end its step within the process group's time limit; start the ranks "
                "anew, and go on from the last committed checkpoint"
            ) from error
        flags: list[int] = self._flags.tolist()
        return flags

    def announce(self, mine: Sequence[int]) -> None:
        """Begin to tell the others, who read it at the end of the next step. Every rank does, at every step."""
        if self.group is None:
            return
        self._flags = torch.tensor(list(mine), dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def close(self) -> None:
        """Give the group back, after what is still under way. Collective."""
        if self.group is not None:
            self.read([])
            dist.destroy_process_group(self.group)
            self.group = None
