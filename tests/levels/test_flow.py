"""What flows from level to level is not pruned before it has arrived."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.levels import flow
from ckpt.levels.flow import Flow
from ckpt.levels.places import Place
from ckpt.levels.tiers import settle
from ckpt.storage.files import Files
from ckpt_formats import sources
from ckpt_formats.native import names
from ckpt_formats.verify import verify


def test_what_is_committed_while_the_first_level_is_pruned_stays_until_it_is_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # saves that are written at the same time are not always committed in the order of their steps
    run, other = tmp_path / "run", tmp_path / "other"

    def save(step: int) -> None:
        ckpt.save({"w": torch.ones(3)}, run / names.step_folder(step))

    levels = settle(str(run), [ckpt.Disk(every=1, keep=1), ckpt.Disk(other, every=1)], None, None)
    looking = Flow(str(run), levels, None)
    looking._places[0].present = {1}
    for step in (1, 3):
        save(step)
    prune = flow.prune

    def late(*args: Any, **options: Any) -> Any:
        save(2)
        return prune(*args, **options)

    monkeypatch.setattr(flow, "prune", late)
    looking._keep_first()
    assert sorted(path.name for path in run.glob("step_*")) == [names.step_folder(2), names.step_folder(3)]


def test_an_agent_stays_for_what_is_due_but_not_for_a_run_that_was_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    looking = Flow(str(run), settle(str(run), [ckpt.Disk(every=1)], None, None), None)
    looking._done = {"disk": -1}
    assert not looking.finished()
    shutil.rmtree(run)
    assert looking.finished()


def flowing(run: Path, *tiers: ckpt.Disk) -> Flow:
    """What an agent that leads has, without its threads."""
    looking = Flow(str(run), settle(str(run), tiers, None, None), None)
    looking._places = [Place(place.level) for place in looking._places]
    return looking


class _Ailing:
    """Lets the next reads of a path fail, as a disk does for a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, times: int) -> None:
        self.left = times
        open_plain = sources.open_plain

        def failing(one: str) -> int:
            if one == str(path) and self.left:
                self.left -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO), one)
            return open_plain(one)

        monkeypatch.setattr(sources, "open_plain", failing)


@pytest.mark.parametrize("name", [names.MANIFEST, "data"])
def test_what_could_not_be_read_for_a_moment_is_brought_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    ckpt.save({"w": torch.ones(3)}, run / names.step_folder(1))
    path = run / names.step_folder(1) / name
    looking = flowing(run, ckpt.Disk(every=1), ckpt.Disk(other, every=1))
    ailing = _Ailing(monkeypatch, next(path.iterdir()) if path.is_dir() else path, 2)
    for _ in range(2):
        assert looking._bring(looking._places[0]) is not None
        assert not other.exists() or not (other / names.step_folder(1) / names.MANIFEST).exists()
    assert looking._bring(looking._places[0]) is None
    assert not ailing.left
    assert verify(other / names.step_folder(1)).intact


def test_what_never_can_be_read_is_given_up_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2):
        ckpt.save({"w": torch.ones(3)}, run / names.step_folder(step))
    (data,) = (run / names.step_folder(2) / "data").iterdir()
    _Ailing(monkeypatch, data, 1000)
    looking = flowing(run, ckpt.Disk(every=1), ckpt.Disk(other, every=1))
    tries = 0
    while looking._bring(looking._places[0]) is not None:
        tries += 1
    assert 1 < tries < 10
    assert "Input/output error" in looking._states["disk2"].refused[2]
    assert [path.name for path in other.iterdir() if (path / names.MANIFEST).exists()] == [names.step_folder(1)]


def test_what_can_not_be_removed_on_a_further_level_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2):
        ckpt.save({"w": torch.ones(3)}, run / names.step_folder(step))
        ckpt.save({"w": torch.ones(3)}, other / names.step_folder(step))

    def refuse(_: Files, path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(Files, "remove", refuse)
    looking = flowing(run, ckpt.Disk(every=1), ckpt.Disk(other, every=1, keep=1))
    assert looking._bring(looking._places[0]) is None
    told = looking.status()["pruning"]
    assert str(other / names.step_folder(1)) in told
    assert "Permission denied" in told
