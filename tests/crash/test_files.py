"""File systems that do less than was asked: short writes, no direct I/O, no hard links, folders that are closed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.storage.files import ALIGNMENT, Files
from ckpt_formats.errors import SaveFailedError
from tests.crash.runs import debris, loads, saver, state


@pytest.mark.parametrize("seed", range(5))
def test_writes_that_are_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    dice = random.Random(seed)
    pwrite = os.pwrite
    calls = []

    def short(fd: int, data: memoryview, at: int) -> int:
        calls.append(len(data))
        # a disk writes at least a block
        return pwrite(fd, data[: max(ALIGNMENT, dice.randrange(len(data) + 1) // ALIGNMENT * ALIGNMENT)], at)

    monkeypatch.setattr(os, "pwrite", short)
    saver(Files()).save(state(1), tmp_path / "step_1")
    assert len(calls) > 10
    assert loads(tmp_path / "step_1", 1)


def test_short_write_that_ends_within_a_block_is_continued_from_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def short(fd: int, data: memoryview, at: int) -> int:
        # says less than it did, as a file system does that stops in the middle of a block
        written = pwrite(fd, data, at)
        return written if written <= ALIGNMENT else written - 100

    monkeypatch.setattr(os, "pwrite", short)
    saver(Files()).save(state(1), tmp_path / "step_1")
    assert loads(tmp_path / "step_1", 1)


@pytest.mark.parametrize("count", [0, 100])
def test_disk_that_takes_nothing_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def stuck(_fd: int, data: memoryview, _at: int) -> int:
        return min(count, len(data)) if len(data) > ALIGNMENT else len(data)

    monkeypatch.setattr(os, "pwrite", stuck)
    with pytest.raises(SaveFailedError, match="took"):
        saver(Files()).save(state(1), tmp_path / "step_1")
    assert not debris(tmp_path / "step_1")


@pytest.mark.parametrize("creates", [False, True], ids=["at once", "after it made the file"])
def test_file_system_without_direct_io_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, creates: bool
) -> None:
    real = os.open
    refused = []

    def without(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            if creates:
                os.close(real(path, flags & ~os.O_DIRECT, *args, **options))
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", without)
    saver(Files()).save(state(1), tmp_path / "step_1")
    assert refused
    assert loads(tmp_path / "step_1", 1)


def test_file_system_without_hard_links_is_told_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(SaveFailedError, match="no hard links"):
        saver(Files()).save(state(1), tmp_path / "step_1")
    assert not debris(tmp_path / "step_1")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on a file system in memory, which most machines have."""
    if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine has no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_saves_to_memory(memory: Path) -> None:
    saver(Files()).save(state(1), memory / "run" / "step_1")
    assert loads(memory / "run" / "step_1", 1)


def test_folders_above_that_may_not_be_read_are_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may pass through /home need not be allowed to open it."""
    upper = tmp_path / "home" / "me"
    (upper / "run").mkdir(parents=True)
    real = os.open

    def closed(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path) == str(upper.parent):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", closed)
    saver(Files()).save(state(1), upper / "run" / "step_1")
    assert loads(upper / "run" / "step_1", 1)


@pytest.mark.parametrize("place", ["run", "run/step_1", "run/step_1/data", "run/step_1/index"])
def test_file_in_the_place_of_a_folder_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(SaveFailedError, match="can't be made"):
        saver(Files()).save(state(1), tmp_path / "run" / "step_1")
    assert (tmp_path / place).read_text() == "mine"
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "/".join(place.split("/")[: depth + 1]) for depth in range(place.count("/") + 1)
    ]


def test_folders_are_made_although_another_save_that_fails_removes_those_above(tmp_path: Path) -> None:
    class Rival(Files):
        removed = 0

        def make_folder(self, path: str) -> None:
            if path.endswith("data") and self.removed < 3:
                # what a save that failed does with the folders that it made
                self.removed += 1
                shutil.rmtree(tmp_path / "run")
            super().make_folder(path)

    rival = Rival()
    rival.make_folders(str(tmp_path / "run" / "step_1" / "data"), [])
    assert rival.removed == 3
    assert (tmp_path / "run" / "step_1" / "data").is_dir()
