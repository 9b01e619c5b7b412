"""A further level of a run, as the flow uses it: what is there, bringing a checkpoint, pruning; a folder or a store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from ckpt.levels.owed import steps_in
from ckpt.levels.prune import prune
from ckpt.levels.report import PruneReport
from ckpt.levels.tiers import Level
from ckpt.transfer.copy import copy, copy_part
from ckpt_formats.native import names

__all__ = ["Place"]


class Place:
    """A further level. With `part`, only this node's part of each checkpoint is brought, and committed by others.

    Attributes:
        present: the steps that are there; None before `look`.
        tried: how often those were that could not be read.
        refused: steps that can't be brought.
        brought: steps that were; they are not brought again when they have been pruned there.
    """

    def __init__(self, level: Level, *, part: bool = False) -> None:
        self.level = level
        self._part = part
        self.present: set[int] | None = None
        self.tried: Counter[int] = Counter()
        self.refused: set[int] = set()
        self.brought: set[int] = set()

    def look(self) -> None:
        """See what is there. Raises CheckpointError, OSError."""
        self.present = steps_in(self.level.place)

    def bring(self, path: str, step: int) -> None:
        """Have the checkpoint in folder `path` there, whole and committed.

        Raises:
            CheckpointExistsError: another one is there.
            CorruptionError, FormatError: it is damaged, or can't be read now.
            SaveFailedError, OSError: it can't be brought now.
        """
        target = os.path.join(self.level.place, names.step_folder(step))
        if self._part:
            copy_part(path, target, bandwidth=self.level.bandwidth)
        else:
            copy(path, target, bandwidth=self.level.bandwidth)
        self.brought.add(step)
        if self.present is not None:
            self.present.add(step)

    def prune(self, needed: Mapping[int, str]) -> PruneReport | None:
        """Remove what need not be kept there, if that is up to this node, but for steps that are needed, and why.

        Raises CheckpointError, OSError.
        """
        if self.level.keep is None or self._part:
            return None
        report = prune(self.level.place, self.level.keep, of_loop=True, needed=needed)
        self.look()
        return report
