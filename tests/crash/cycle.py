"""The life of a checkpoint, save -> commit -> copy -> prune, and what must be true whatever failed or died in it.

A run has steps 1 and 2, and a copy of step 1 in another place, as on a slower disk. A cycle saves step 3, copies it
there, and keeps two steps here and one there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ckpt.levels.prune import prune
from ckpt.saving.save import Saver
from ckpt.storage.data_file import Staging
from ckpt.storage.files import Files
from ckpt.transfer.copy import copy
from ckpt_formats.errors import CheckpointError
from ckpt_formats.runs import State, find_checkpoints
from tests.crash.operations import Faulty, Watch
from tests.crash.runs import WINDOW, debris, loads, saver, state

RUN, FAR = "run", "far"
NEW = 3
_GOOD_REASONS = ("newest", "by the rule")


def begin(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Make the run as it is before a cycle."""
    for step in (1, 2):
        saver().save(state(step, rank, world_size), folder / RUN / f"step_{step}")
    if rank == 0:
        copy(folder / RUN / "step_1", folder / FAR / "step_1")


def restore(original: Path, folder: Path) -> None:
    """Have the run as it was. Files of checkpoints never change, so they need not be copied."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(original, folder, copy_function=os.link)


def cycle(folder: Path, by: Saver, rank: int = 0, world_size: int = 1) -> list[str]:
    """One cycle by live ranks, rank 0 copies and prunes; returns what went wrong."""
    wrong: list[str] = []
    _told(lambda: by.save(state(NEW, rank, world_size), folder / RUN / f"step_{NEW}"), wrong)
    if rank == 0:
        after_save(folder, wrong)
    return wrong


def after_save(folder: Path, wrong: list[str]) -> None:
    """What the cycle does with a checkpoint that is committed."""
    new = folder / RUN / f"step_{NEW}"
    if (new / "manifest.json").exists():
        _told(lambda: copy(new, folder / FAR / f"step_{NEW}", staging=Staging(3, WINDOW)), wrong)
    for place, keep in ((RUN, 2), (FAR, 1)):

        def tidy(place: str = place, keep: int = keep) -> None:
            report = prune(folder / place, keep, files=Files())
            wrong.extend(f"prune: {path}: {why}" for path, why in report.failed)
            wrong.extend(f"kept: {item.path}: {item.why}" for item in report.kept if item.why not in _GOOD_REASONS)

        _told(tidy, wrong)


def _told(act: Callable[[], object], wrong: list[str]) -> None:
    try:
        act()
    except (CheckpointError, OSError) as error:
        # the operating system's own errors come from files that are only read, and name them
        wrong.append(f"{type(error).__name__}: {error}")


def judge(folder: Path, world_size: int = 1) -> str:
    """Look at what is there after a cycle that may have been cut short. Returns how far it got."""
    found = {}
    for place in (RUN, FAR):
        for step in (1, 2, NEW):
            path = folder / place / f"step_{step}"
            found[place, step] = loads(path, step, world_size, thoroughly=False)
        states = {item.state for item in find_checkpoints(folder / place)}
        assert states <= {State.WHOLE, State.NOT_COMMITTED}, states
    assert found[RUN, 2], "the last committed checkpoint is there"
    assert found[RUN, 1] or found[RUN, NEW], "two are kept"
    assert found[FAR, 1] or found[FAR, NEW], "one is kept"
    assert not found[FAR, 2]
    stages = [name for name, there in (("saved", found[RUN, NEW]), ("copied", found[FAR, NEW])) if there]
    if not found[RUN, 1] and not found[FAR, 1]:
        stages.append("pruned")
    return ", ".join(stages) or "nothing"


def end(folder: Path, by: Saver, rank: int = 0, world_size: int = 1) -> None:
    """The next cycle, in which nothing happens: it ends the work, and prune cleans up."""
    if not (folder / RUN / f"step_{NEW}" / "manifest.json").exists():
        by.save(state(NEW, rank, world_size), folder / RUN / f"step_{NEW}")
    if rank:
        return
    still = Faulty(Watch())
    copy(folder / RUN / f"step_{NEW}", folder / FAR / f"step_{NEW}", files=still)
    for place, keep, steps in ((RUN, 2, [2, NEW]), (FAR, 1, [NEW])):
        report = prune(folder / place, keep, grace=-1.0, files=still)
        assert not report.failed, report.failed
        assert sorted(os.listdir(folder / place)) == [f"step_{step}" for step in steps], place
        for step in steps:
            assert loads(folder / place / f"step_{step}", step, world_size, thoroughly=False), (place, step)
        assert not debris(folder / place / f"step_{NEW}"), place
