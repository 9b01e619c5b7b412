"""What lies in a run's folder: told apart without being trusted, and never an error because of what lies there."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ckpt_formats import runs
from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.native.reader import read_root
from ckpt_formats.native.root import Root
from ckpt_formats.runs import State, find_checkpoints
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import files_of, write_whole


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "step_3"
    write_whole(folder)
    return folder


def test_a_whole_checkpoint_is_told_by_its_root(original: Path) -> None:
    (found,) = find_checkpoints(original.parent)
    assert found == find_checkpoints(original)[0]
    assert (found.path, found.state, found.problem, found.step) == (str(original), State.WHOLE, None, 3)
    assert (found.tensors, found.world_size, found.writers) == (7, 2, "2 ranks")
    assert found.bytes == sum(file.stat().st_size for file in files_of(original))


def test_checkpoints_are_sorted_by_step_not_by_name(original: Path, tmp_path: Path) -> None:
    for name, step in {"step_9": 9, "step_10": 10, "a": 100, "z": 1, "none": None}.items():
        copy = Tampered(original)
        copy.root["step"] = step
        copy.write(tmp_path / name)
    assert [item.step for item in find_checkpoints(tmp_path)] == [None, 1, 9, 10, 100]


def test_other_folders_and_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "logs/data").mkdir(parents=True)
    (tmp_path / "step_5").mkdir()
    (tmp_path / "notes.txt").write_text("step_6")
    assert find_checkpoints(tmp_path) == []


def test_what_is_not_whole(original: Path, tmp_path: Path) -> None:
    root = read_root(str(original))
    for step in range(1, 8):
        shutil.copytree(original, tmp_path / f"step_{step}")
    (tmp_path / "step_1/manifest.json").unlink()
    os.truncate(tmp_path / "step_2/manifest.json", 500)
    (tmp_path / "step_3" / root.files[0].path).unlink()
    os.truncate(tmp_path / "step_4" / root.files[1].path, 5)
    (tmp_path / "step_5" / root.pages[0].path).unlink()
    (tmp_path / "step_6/manifest.json").unlink()
    os.mkfifo(tmp_path / "step_6/manifest.json")
    shutil.rmtree(tmp_path / "step_7")
    newer = Tampered(original)
    newer.root["version"] = 9
    newer.write(tmp_path / "step_7")
    states = {Path(item.path).name: item.state for item in find_checkpoints(tmp_path)}
    assert states == {
        "step_1": State.NOT_COMMITTED,
        "step_2": State.DAMAGED,
        "step_3": State.PARTIAL,
        "step_4": State.PARTIAL,
        "step_5": State.PARTIAL,
        "step_6": State.DAMAGED,
        "step_7": State.UNKNOWN_VERSION,
    }
    problems = {Path(item.path).name: item.problem for item in find_checkpoints(tmp_path)}
    assert problems["step_3"] == "1 of 3 files missing"
    assert problems["step_4"] == "1 of 3 files of another size than was written"


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2026-01-02T03:04:05+00:00", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("yesterday", None),
        (7, None),
        (None, None),
    ],
)
def test_when_it_was_saved_is_told_if_that_is_a_time(
    original: Path, tmp_path: Path, created: object, expected: datetime | None
) -> None:
    copy = Tampered(original)
    copy.root["provenance"]["created"] = created
    copy.write(tmp_path / "copy")
    assert find_checkpoints(tmp_path / "copy")[0].created == expected


@pytest.mark.parametrize("when", ["before its root is read", "after its root was read"])
def test_what_is_removed_while_it_is_looked_at_is_not_there(
    when: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        shutil.copytree(original, tmp_path / f"step_{step}")

    def read(folder: str) -> Root:
        if not folder.endswith("step_1"):
            return read_root(folder)
        root = read_root(folder) if when.startswith("after") else None
        shutil.rmtree(folder)
        return root or read_root(folder)

    monkeypatch.setattr(runs, "read_root", read)
    assert [(item.path, item.state) for item in find_checkpoints(tmp_path)] == [(f"{tmp_path}/step_2", State.WHOLE)]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        find_checkpoints(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        find_checkpoints(tmp_path / "file")
