"""What prune removes and what it never does: by policy, by facts, by use, and whatever fails or dies on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from torch import distributed

import ckpt
from ckpt.levels.policies import BestN, EveryN, LatestN
from ckpt.levels.prune import prune
from ckpt.levels.report import PruneReport
from ckpt.storage.facts import update_facts
from ckpt.storage.files import Files
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError
from ckpt_formats.locks import held
from ckpt_formats.verify import verify
from tests.crash.disk import Disk, Recorder, losses, restore
from tests.crash.operations import Faulty, Watch, errors, kills
from tests.crash.runs import loads, saver, state
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    for step in (1, 2, 3, 4):
        saver().save(state(step), folder / f"step_{step}")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def _prune(run: Path, keep: object = None, *, grace: float = 3600.0, files: Files | None = None) -> PruneReport:
    return prune(run, keep, grace=grace, files=files or Faulty(Watch()))  # type: ignore[arg-type]


def _steps(run: Path) -> set[int]:
    """Steps of the checkpoints that are there, each looked into."""
    return {step for step in range(1, 9) if loads(run / f"step_{step}", step)}


def _age(path: Path, seconds: float = 7200.0) -> None:
    """Make everything in a folder as old as if nobody had touched it for so long."""
    then = time.time() - seconds
    for at in (path, *path.rglob("*")):
        os.utime(at, (then, then), follow_symlinks=False)


def test_what_the_policy_does_not_keep_goes(run: Path) -> None:
    freed = sum(file.stat().st_size for step in (1, 2) for file in (run / f"step_{step}").rglob("*") if file.is_file())
    report = _prune(run, LatestN(2))
    assert sorted(os.listdir(run)) == ["step_3", "step_4"]
    assert _steps(run) == {3, 4}
    assert [item.step for item in report.removed] == [1, 2]
    assert report.bytes == freed
    assert [(item.step, item.why) for item in report.kept] == [(3, "by the rule"), (4, "newest")]
    assert not report.debris
    assert not report.failed


def test_the_newest_stays_whatever_the_policy(run: Path) -> None:
    _prune(run, EveryN(1000))
    assert _steps(run) == {4}


def test_metrics_that_were_recorded_decide(run: Path) -> None:
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
        update_facts(run / f"step_{step}", lambda facts, loss=loss: facts.changed(metrics={"loss": loss}))
    _prune(run, BestN(1, "loss"))
    assert _steps(run) == {2, 4}


def test_pinned_tagged_and_linked_ones_stay(run: Path) -> None:
    update_facts(run / "step_1", lambda facts: facts.changed(pinned=True))
    update_facts(run / "step_2", lambda facts: facts.changed(tags=["good"]))
    (run / "best").symlink_to("step_3")
    report = _prune(run, 1)
    assert [item.why for item in report.kept] == ["pinned", "tagged good", "linked as best", "newest"]
    assert _steps(run) == {1, 2, 3, 4}
    update_facts(run / "step_1", lambda facts: facts.changed(pinned=False))
    (run / "best").unlink()
    _prune(run, 1)
    assert _steps(run) == {2, 4}


def test_a_checkpoint_whose_facts_are_damaged_stays(run: Path) -> None:
    """It may be pinned."""
    (run / "step_1/facts.json").write_bytes(b"{}")
    report = _prune(run, 1)
    assert _steps(run) == {1, 4}
    assert "facts can't be read" in report.kept[0].why


def test_what_somebody_uses_stays_and_is_told(run: Path) -> None:
    with held(str(run / "step_1")):
        report = _prune(run, 1)
    assert _steps(run) == {1, 4}
    assert report.kept[0].why == "in use"
    _prune(run, 1)
    assert _steps(run) == {4}


def test_a_dry_run_removes_nothing_and_tells_the_same(run: Path) -> None:
    for name in ("data", "index"):
        (run / "step_8" / name).mkdir(parents=True)
    _age(run / "step_8")
    before = sorted(run.rglob("*"))
    watch = Watch()
    dry = prune(run, 1, dry_run=True, files=Faulty(watch))
    assert sorted(run.rglob("*")) == before
    assert not watch.seen
    wet = _prune(run, 1)
    assert (dry.removed, dry.kept, dry.debris) == (wet.removed, wet.kept, wet.debris)
    assert not (run / "step_8").exists()


def test_without_a_policy_checkpoints_stay(run: Path) -> None:
    report = _prune(run)
    assert not report.removed
    assert _steps(run) == {1, 2, 3, 4}


def test_what_is_not_whole_stays_and_does_not_count(run: Path) -> None:
    next((run / "step_4/data").iterdir()).unlink()
    (run / "step_3/manifest.json").write_bytes(b"{}")
    report = _prune(run, 1)
    assert [(item.step, item.why) for item in report.kept] == [(2, "newest"), (3, "damaged"), (4, "partial")]
    assert sorted(os.listdir(run)) == ["step_2", "step_3", "step_4"]


def test_a_pin_that_is_set_while_others_are_removed_is_heeded(run: Path) -> None:
    class Pinning(Watch):
        def step(self, kind: str, path: str, act: Callable[[], None], half: Callable[[], None] | None = None) -> None:
            if not self.seen:
                update_facts(run / "step_2", lambda facts: facts.changed(pinned=True))
            super().step(kind, path, act, half)

    _prune(run, 1, files=Faulty(Pinning()))
    assert _steps(run) == {2, 4}


@pytest.mark.parametrize("name", ["step_1", "step_1/data", "nowhere"])
def test_a_run_that_is_none(run: Path, name: str) -> None:
    if name == "step_1/data":
        (run / "step_1/manifest.json").unlink()
        name = "step_1"
    with pytest.raises(CheckpointNotFoundError):
        _prune(run / name, 1)


# debris


def _attempt_that_died(path: Path) -> None:
    (path / "data").mkdir(parents=True, exist_ok=True)
    (path / "index").mkdir(exist_ok=True)
    (path / "data/00000-00112233445566aa.safetensors").write_bytes(bytes(1000))
    (path / "data/.copy-00112233445566ab.tmp").write_bytes(bytes(500))
    (path / "index/000-00112233445566aa.safetensors").write_bytes(bytes(100))
    (path / ".manifest-00112233445566aa.tmp").write_bytes(b"{")
    (path / ".facts-00112233445566aa.tmp").write_bytes(b"{")


def test_debris_goes_when_nobody_has_touched_it_for_long(run: Path) -> None:
    _attempt_that_died(run / "step_8")
    _attempt_that_died(run / "step_2")
    report = _prune(run)
    assert (run / "step_8").exists(), "a save may be under way"
    assert str(run / "step_8") in report.recent
    _age(run / "step_8")
    _age(run / "step_2")
    report = _prune(run)
    assert not (run / "step_8").exists()
    assert not verify(run / "step_2").debris
    assert _steps(run) == {1, 2, 3, 4}
    assert sum(item.bytes for item in report.debris) == 2 * 1602


def test_one_fresh_file_keeps_the_folder_of_a_save(run: Path) -> None:
    """A large save writes for longer than the grace time: its first files are old, the last is not."""
    _attempt_that_died(run / "step_8")
    _age(run / "step_8")
    (run / "step_8/data/00001-00112233445566aa.safetensors").write_bytes(b"x")
    before = sorted((run / "step_8").rglob("*"))
    _prune(run)
    assert sorted((run / "step_8").rglob("*")) == before


def test_what_is_not_ours_is_never_touched(run: Path) -> None:
    foreign = [
        run / "logs/data/train.txt",
        run / "logs/index/x",
        run / "notes.txt",
        run / "step_8/mine.txt",
        run / "step_8/data/model.safetensors",
        run / "step_1/notes.txt",
        run / "step_2/data/extra.bin",
    ]
    _attempt_that_died(run / "step_8")
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (run / "plots").mkdir()
    _age(run)
    _prune(run, 1)
    assert all(file.read_text() == "mine" for file in foreign)
    assert (run / "plots").is_dir()
    assert sorted(os.listdir(run / "step_8")) == ["data", "mine.txt"]


def test_a_link_to_a_folder_elsewhere_is_not_followed(run: Path, tmp_path: Path) -> None:
    saver().save(state(5), tmp_path / "elsewhere/step_1")
    _attempt_that_died(tmp_path / "elsewhere/step_8")
    _age(tmp_path / "elsewhere")
    (run / "step_0").symlink_to(tmp_path / "elsewhere/step_1")
    (run / "step_8").symlink_to(tmp_path / "elsewhere/step_8")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    _prune(run, 1, grace=0)
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


# whatever fails or dies


def _fresh(original: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(original, run)
    shutil.rmtree(run / "step_1")
    _attempt_that_died(run / "step_8")
    update_facts(run / "step_2", lambda facts: facts.changed(metrics={"loss": 1}))
    for step in (2, 3, 4, 8):
        _age(run / f"step_{step}")


def _whole_or_gone(run: Path, *, to_go: Collection[int] = (2, 3)) -> None:
    """What stays is there, what goes is whole or no checkpoint, and a save to its place is no different from others."""
    there = _steps(run)
    assert 4 in there
    assert there <= {4, *to_go}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_each_operation_fails_and_the_next_prune_ends_the_work(original: Path, tmp_path: Path, code: int) -> None:
    run = tmp_path / "run"
    _fresh(original, run)
    counting = Watch()
    assert not _prune(run, 1, files=Faulty(counting)).failed
    assert os.listdir(run) == ["step_4"]
    tried = 0
    for fault in errors(counting.seen, code):
        _fresh(original, run)
        watch = Watch(fault)
        report = _prune(run, 1, files=Faulty(watch))
        assert watch.happened
        assert report.failed, fault
        assert os.strerror(code) in report.failed[0][1]
        _whole_or_gone(run)
        again = _prune(run, 1, grace=0)
        assert not again.failed, fault
        assert os.listdir(run) == ["step_4"], fault
        tried += 1
    print(f"{tried} failures ({os.strerror(code)})")
    assert tried > 40


def _killed_at_each_point(rank: int, world_size: int, original: str, folder: str) -> dict[str, int]:
    """Runs in a process without threads: its forks are killed, and it looks at what they leave."""
    distributed.destroy_process_group()
    run = Path(folder, "run")
    _fresh(Path(original), run)
    counting = Watch()
    _prune(run, 1, files=Faulty(counting))
    counts = {"killed": 0, "left": 0}
    for fault in kills(counting.seen):
        _fresh(Path(original), run)
        child = os.fork()
        if not child:
            try:
                _prune(run, 1, files=Faulty(Watch(fault)))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fault
        _whole_or_gone(run)
        counts["killed"] += 1
        counts["left"] += len(os.listdir(run)) > 1
        assert not _prune(run, 1, grace=0).failed
        assert os.listdir(run) == ["step_4"], fault
    return counts


def test_killed_at_any_point_leaves_each_checkpoint_whole_or_gone_and_the_next_prune_cleans(
    original: Path, tmp_path: Path
) -> None:
    (counts,) = run_ranks(_killed_at_each_point, 1, str(original), str(tmp_path))
    print(counts)
    assert counts["killed"] > 20
    assert counts["left"] > 15


def test_power_cut_at_any_point_leaves_each_checkpoint_whole_or_gone(tmp_path: Path) -> None:
    root, after = tmp_path / "disk", tmp_path / "after"
    root.mkdir()
    files = Recorder(root)
    for step in (3, 4):
        saver(files).save(state(step), root / f"run/step_{step}")
    past = len(files.trace)
    _prune(root / "run", 1, files=files)
    disk = Disk()
    for operation in files.trace[:past]:
        disk.do(operation)
    disk.sync_all()
    tried = 0
    for point in range(past, len(files.trace) + 1):
        if point > past:
            disk.do(files.trace[point - 1])
        for loss in losses(disk, range(4)):
            restore(disk.after(loss), after)
            _whole_or_gone(after / "run")
            _prune(after / "run", 1, grace=0)
            assert os.listdir(after / "run") == ["step_4"]
            shutil.rmtree(after)
            tried += 1
    print(f"{tried} disks after a power cut at {len(files.trace) - past + 1} points")
    assert tried > 30


class _Rival(Watch):
    """Saves step 2 anew before one of the operations."""

    def __init__(self, run: Path, point: int) -> None:
        super().__init__()
        self.run = run
        self.point = point
        self.saved = False

    def step(self, kind: str, path: str, act: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        if len(self.seen) == self.point:
            self.point = -1
            with contextlib.suppress(CheckpointError):
                saver().save(state(2), self.run / "step_2")
                self.saved = True
        super().step(kind, path, act, half)


def test_a_save_to_the_place_of_a_checkpoint_that_is_being_removed_is_not_harmed(
    original: Path, tmp_path: Path
) -> None:
    """Between any two operations of the prune; while the old one is there, the save is refused."""
    run = tmp_path / "run"
    _fresh(original, run)
    counting = Watch()
    _prune(run, 1, files=Faulty(counting))
    saved = 0
    for point in range(len(counting.seen)):
        _fresh(original, run)
        rival = _Rival(run, point)
        _prune(run, 1, files=Faulty(rival))
        assert loads(run / "step_2", 2) == rival.saved, point
        saved += rival.saved
    assert saved == len(counting.seen) - 1


def test_a_node_that_has_no_manifest_keeps_its_part_for_as_long_as_the_rule_would(tmp_path: Path) -> None:
    """Another node has it: what this one could not publish, or was killed before it did, is committed all the same."""
    run = tmp_path / "b" / "run"
    for step in (1, 2, 3, 4):
        ckpt.save({"w": torch.ones(3)}, run / f"step_{step}")
    for step in (2, 3):
        (run / f"step_{step}" / "manifest.json").unlink()
    report = prune(tmp_path / "{node}" / "run", 2, grace=-1.0)
    # of the committed ones, two stay; of all that may be, those that would
    assert [(item.step, item.why) for item in sorted(report.kept, key=lambda item: item.step or 0)] == [
        (1, "by the rule"),
        (3, "other nodes may have its manifest"),
        (4, "newest"),
    ]
    assert [item.step for item in report.debris] == [2]
    assert sorted(os.listdir(run)) == ["step_1", "step_3", "step_4"]
    assert sorted(os.listdir(run / "step_3")) == ["data", "index"]
