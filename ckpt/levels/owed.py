"""What is owed to a further level: due there, not there yet, and not what its own rule would remove at once.

One rule for the flow, which brings it, and for whoever prunes the first level, who has to leave it there meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckpt.levels.note import Note, note_of
from ckpt.levels.policies import Saved, kept
from ckpt.levels.record import read_levels
from ckpt.levels.tiers import Level
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError
from ckpt_formats.native.reader import read_root
from ckpt_formats.runs import Found, State, find_checkpoints

__all__ = ["OnDisk", "owed", "owed_elsewhere", "steps_in"]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A checkpoint on the first level."""

    path: str
    step: int
    note: Note


def owed(
    level: Level, disk: Sequence[OnDisk], present: AbstractSet[int], done: AbstractSet[int] = frozenset()
) -> list[OnDisk]:
    """Which of the checkpoints on disk are still to go to a level, in their order.

    Args:
        present: the steps that are there.
        done: others that are not to go there again.
    """
    due = [item for item in disk if item.step not in present | done and _is_due(level, item)]
    if level.keep is None:
        return due
    metrics = {item.step: item.note.metrics for item in disk}
    steps = present | {item.step for item in due}
    stay = kept(level.keep, [Saved(step, metrics.get(step, {})) for step in steps])
    return [item for item in due if item.step in stay]


def _is_due(level: Level, item: OnDisk) -> bool:
    """Whether a checkpoint is to be on a level: as was decided when it was saved, else by the level's rule."""
    for known in (level.place, level.name):
        if known in item.note.levels:
            return item.note.levels[known]
    return level.every is None or level.every.due(item.step)


def owed_elsewhere(run: str, found: Sequence[Found]) -> dict[int, str]:
    """Of what lies in a run's folder, the steps that are owed to further levels, and why, for people.

    Where a level can't be looked at, what is due there counts as owed.

    Raises:
        FormatError: which levels the run has can't be read.
    """
    levels = read_levels(run) or []
    if len(levels) < 2 or levels[0].place != run:
        return {}
    disk: list[OnDisk] = []
    for item in found:
        if item.of_loop and item.step is not None and item.state is State.WHOLE:
            try:
                disk.append(OnDisk(item.path, item.step, note_of(read_root(item.path).values)))
            except (CheckpointError, OSError):
                continue  # not whole after all, so nobody prunes it
    why: dict[int, str] = {}
    for level in levels[1:]:
        reason = f"not on {level.name} yet"
        present: AbstractSet[int] = frozenset()
        try:
            present = steps_in(level.place)
        except (CheckpointError, OSError) as error:
            reason = f"perhaps not on {level.name} yet, which can't be looked at: {error}"
        for owing in owed(level, disk, present):
            why.setdefault(owing.step, reason)
    return why


def steps_in(place: str) -> set[int]:
    """The steps that are on a further level. Raises CheckpointError, OSError."""
    try:
        found = find_checkpoints(place)
    except CheckpointNotFoundError:
        return set()
    return {
        item.step for item in found if item.of_loop and item.step is not None and item.state is not State.NOT_COMMITTED
    }
