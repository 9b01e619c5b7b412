"""What flows from level to level is not pruned before it has arrived."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.levels import flow
from ckpt.levels.flow import Flow
from ckpt.levels.tiers import settle
from ckpt_formats.native import names


def test_what_is_committed_while_the_first_level_is_pruned_stays_until_it_is_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # saves that are written at the same time are not always committed in the order of their steps
    run, other = tmp_path / "run", tmp_path / "other"

    def save(step: int) -> None:
        ckpt.save({"w": torch.ones(3)}, run / names.step_folder(step))

    levels = settle(str(run), [ckpt.Disk(every=1, keep=1), ckpt.Disk(other, every=1)], None, None)
    looking = Flow(str(run), levels, str(tmp_path), None)
    looking._places[0].present = {1}
    for step in (1, 3):
        save(step)
    prune = flow.prune

    def late(*args: Any) -> Any:
        save(2)
        return prune(*args)

    monkeypatch.setattr(flow, "prune", late)
    looking._keep_first()
    assert sorted(path.name for path in run.glob("step_*")) == [names.step_folder(2), names.step_folder(3)]


def test_an_agent_stays_for_what_is_due_but_not_for_a_run_that_was_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    looking = Flow(str(run), settle(str(run), [ckpt.Disk(every=1)], None, None), str(tmp_path), None)
    looking._done = {"disk": -1}
    assert not looking.finished()
    shutil.rmtree(run)
    assert looking.finished()
