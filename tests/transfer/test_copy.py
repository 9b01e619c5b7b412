"""What copying promises: the same bytes, all of them verified, whole or absent, and going on where it was cut short."""

from __future__ import annotations

import errno
import filecmp
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

import ckpt
from ckpt.storage.data_file import Staging
from ckpt.storage.facts import update_facts
from ckpt.storage.files import Files
from ckpt.transfer.copy import CopyResult, copy, copy_run
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    SaveFailedError,
)
from ckpt_formats.facts import Facts, read_facts
from ckpt_formats.locks import alone
from ckpt_formats.native.reader import load_page, read_root
from ckpt_formats.native.regions import ChunkAt, ChunkTable
from ckpt_formats.verify import verify
from tests.crash.disk import Disk, Recorder, losses, restore
from tests.crash.operations import Faulty, Operation, Watch, errors, kills
from tests.crash.runs import debris, loads, saver, state
from tests.formats.native.whole import files_of, write_whole
from tests.ranks import run_ranks

WINDOW = 1 << 14
"""Bytes of a buffer, so small that a file takes several and chunks straddle them."""


def _copy(source: Path, target: Path, files: Files | None = None) -> CopyResult:
    return copy(source, target, files=files or Faulty(Watch()), staging=Staging(3, WINDOW))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "step_3"
    write_whole(folder)
    return folder


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A checkpoint, to be damaged at will."""
    return Path(shutil.copytree(original, tmp_path / "source/step_3"))


def _same(a: Path, b: Path) -> bool:
    names = [str(file.relative_to(a)) for file in files_of(a)]
    assert names == [str(file.relative_to(b)) for file in files_of(b)]
    return not any(filecmp.cmpfiles(a, b, names, shallow=False)[1:])


def test_a_copy_is_the_same_byte_for_byte(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    result = copy(source, tmp_path / "a/b/copy", progress=lambda done, total: told.append((done, total)))
    assert _same(source, tmp_path / "a/b/copy")
    assert verify(tmp_path / "a/b/copy").intact
    size = sum(file.stat().st_size for file in files_of(source))
    assert (result.bytes, result.copied, result.verified, result.present) == (size, size, 0, False)
    assert (result.step, result.path, result.note) == (3, str(tmp_path / "a/b/copy"), None)
    assert told == sorted(told)
    assert told[-1] == (size, size)


def test_a_copy_loads(tmp_path: Path) -> None:
    saver().save(state(1), tmp_path / "step_1")
    _copy(tmp_path / "step_1", tmp_path / "copy")
    assert loads(tmp_path / "copy", 1)
    assert not debris(tmp_path / "copy")


def test_an_empty_checkpoint_is_copied(tmp_path: Path) -> None:
    ckpt.save({"epoch": 3}, tmp_path / "step_1")
    _copy(tmp_path / "step_1", tmp_path / "copy")
    assert _same(tmp_path / "step_1", tmp_path / "copy")


def test_metrics_tags_and_pin_go_with_it(source: Path, tmp_path: Path) -> None:
    update_facts(source, lambda facts: facts.changed(tags=["best"], metrics={"loss": 1.5}, pinned=True))
    _copy(source, tmp_path / "copy")
    assert read_facts(tmp_path / "copy") == Facts(tags=("best",), metrics={"loss": 1.5}, pinned=True)


def test_damaged_facts_stay_behind_and_are_told(source: Path, tmp_path: Path) -> None:
    (source / "facts.json").write_bytes(b"{}")
    result = _copy(source, tmp_path / "copy")
    assert result.note is not None
    assert str(source / "facts.json") in result.note
    assert verify(tmp_path / "copy").intact
    assert read_facts(tmp_path / "copy") == Facts()


def test_debris_is_not_copied(source: Path, tmp_path: Path) -> None:
    (source / "data/00000-ffffffffffffffff.safetensors").write_bytes(b"x")
    (source / "notes.txt").write_text("x")
    _copy(source, tmp_path / "copy")
    assert not debris(tmp_path / "copy")


def test_a_copy_that_is_there_is_left_alone(source: Path, tmp_path: Path) -> None:
    _copy(source, tmp_path / "copy")
    watch = Watch()
    result = _copy(source, tmp_path / "copy", Faulty(watch))
    assert result.present
    assert result.copied == 0
    assert not watch.seen


def test_another_checkpoint_at_the_target_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    saver().save(state(1), tmp_path / "other")
    with pytest.raises(CheckpointExistsError, match="never overwritten"):
        _copy(source, tmp_path / "other")
    assert loads(tmp_path / "other", 1)


def test_a_run_at_the_target_is_not_made_a_checkpoint(source: Path, tmp_path: Path) -> None:
    saver().save(state(1), tmp_path / "run/step_1")
    with pytest.raises(CheckpointExistsError, match=r"such as .*run/step_3"):
        _copy(source, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["step_1"]


def test_a_source_that_is_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        _copy(tmp_path / "nowhere", tmp_path / "copy")
    (source / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="never committed"):
        _copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_any_damage_of_the_source_is_found_and_nothing_is_committed(
    source: Path, tmp_path: Path, original: Path
) -> None:
    """A bit in each block of each file: headers, chunks, paddings, index pages and the root."""
    rng = np.random.default_rng(0)
    tried = 0
    for file in files_of(source):
        data = file.read_bytes()
        for start in range(0, len(data), 100_000):
            position = int(rng.integers(start, min(start + 100_000, len(data))))
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CorruptionError) as caught:
                _copy(source, tmp_path / "copy")
            assert str(file) in str(caught.value)
            assert not (tmp_path / "copy/manifest.json").exists()
            tried += 1
        file.write_bytes(data[:-1])
        with pytest.raises(CorruptionError):
            _copy(source, tmp_path / "copy")
        file.write_bytes(data)
    assert tried > 12
    # what was whole of it is used again
    result = _copy(source, tmp_path / "copy")
    assert result.verified > 0
    assert _same(original, tmp_path / "copy")


def test_damage_of_a_chunk_names_its_tensor(source: Path, tmp_path: Path) -> None:
    root = read_root(str(source))
    file = source / root.files[0].path
    data = bytearray(file.read_bytes())
    data[root.files[0].header + 600_000] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"tensor 'model\.big' .*do not fit their checksum") as caught:
        _copy(source, tmp_path / "copy")
    assert caught.value.tensor == "model.big"


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of several blocks and of one, encoded and not."""
    folder = tmp_path_factory.mktemp("compressed") / "step_1"
    trained = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    ckpt.save({"a": trained, "b": trained[:300].bfloat16(), "c": torch.arange(9)}, folder, compress=True)
    assert "exponent-zstd" in {chunk.codec for chunk in _chunks(folder)}
    return folder


def _chunks(folder: Path) -> list[ChunkAt]:
    root = read_root(str(folder))
    table = ChunkTable(root, [load_page(str(folder), root, number) for number in range(len(root.pages))])
    return [chunk for number in range(len(root.files)) for chunk in table.of_file(number)]


@pytest.mark.parametrize("window", [1 << 14, 8 << 20])
def test_compressed_chunks_are_copied_as_they_are(compressed: Path, tmp_path: Path, window: int) -> None:
    copy(compressed, tmp_path / "copy", staging=Staging(3, window))
    assert _same(compressed, tmp_path / "copy")
    (tmp_path / "copy/manifest.json").unlink()
    assert copy(compressed, tmp_path / "copy", staging=Staging(3, window)).verified > 2 << 20


def test_damage_of_compressed_chunks_is_found(compressed: Path, tmp_path: Path) -> None:
    """In each region of what is stored: blocks and their table."""
    source = Path(shutil.copytree(compressed, tmp_path / "step_1"))
    (file,) = (source / "data").iterdir()
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for chunk in _chunks(source):
        inside = rng.integers(chunk.start, chunk.stop, 6).tolist()
        for position in {*inside, chunk.start, chunk.stop - 1, max(chunk.start, chunk.stop - 8)}:
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CorruptionError, match="do not fit their checksum") as caught:
                copy(source, tmp_path / "copy")
            assert caught.value.tensor == chunk.meta.name
            assert not (tmp_path / "copy/manifest.json").exists()


@pytest.mark.parametrize("damage", ["none", "flipped", "short", "folder"])
def test_what_an_earlier_copy_left_is_used_if_it_is_whole(source: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "copy"
    shutil.copytree(source, target)
    (target / "manifest.json").unlink()
    big = max(files_of(target), key=lambda file: file.stat().st_size)
    size = big.stat().st_size
    if damage == "flipped":
        data = bytearray(big.read_bytes())
        data[-5] ^= 1
        big.write_bytes(data)
    elif damage == "short":
        os.truncate(big, 5000)
    elif damage == "folder":
        big.unlink()
        big.mkdir()
        with pytest.raises(SaveFailedError):
            _copy(source, target)
        return
    result = _copy(source, target)
    assert _same(source, target)
    manifest = (source / "manifest.json").stat().st_size
    assert result.copied == manifest + (0 if damage == "none" else size)
    assert result.verified == result.bytes - result.copied


def _grown(rank: int, world_size: int, folder: str) -> int:
    copy(f"{folder}/small", f"{folder}/warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copy(f"{folder}/step_1", f"{folder}/copy")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    ckpt.save({"w": torch.zeros(200)}, tmp_path / "small")
    ckpt.save({"w": torch.zeros(24 << 20)}, tmp_path / "step_1")
    (grown,) = run_ranks(_grown, 1, str(tmp_path))
    assert grown < 50 << 20, "96 MiB were copied"


# runs


def _run(folder: Path) -> Path:
    for step in (1, 2, 3):
        saver().save(state(step), folder / f"step_{step}")
    return folder


def test_a_run_is_copied_checkpoint_by_checkpoint(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    (run / "latest").symlink_to("step_3")
    told: list[tuple[int, int]] = []
    result = copy_run(run, tmp_path / "copy", progress=lambda done, total: told.append((done, total)))
    assert [item.step for item in result.copies] == [1, 2, 3]
    assert all(loads(tmp_path / f"copy/step_{step}", step) for step in (1, 2, 3))
    assert sorted(os.listdir(tmp_path / "copy")) == ["step_1", "step_2", "step_3"]
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    saver().save(state(4), run / "step_4")
    again = copy_run(run, tmp_path / "copy")
    assert [item.present for item in again.copies] == [True, True, True, False]


def test_some_steps_of_a_run(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    copy_run(run, tmp_path / "copy", steps={1, 3})
    assert sorted(os.listdir(tmp_path / "copy")) == ["step_1", "step_3"]
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 7"):
        copy_run(run, tmp_path / "copy", steps={1, 7})


def test_a_damaged_checkpoint_of_a_run_does_not_keep_the_others(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    page = next((run / "step_1/index").iterdir())
    page.write_bytes(page.read_bytes()[:-1] + b"\xff")
    next((run / "step_2/data").iterdir()).unlink()
    for name in ("data", "index"):
        (run / "step_9" / name).mkdir(parents=True)
    result = copy_run(run, tmp_path / "copy")
    assert [item.step for item in result.copies] == [3]
    assert [path for path, _ in result.failed] == [str(run / "step_1"), str(run / "step_2")]
    assert result.uncommitted == [str(run / "step_9")]
    assert loads(tmp_path / "copy/step_3", 3)
    assert not (tmp_path / "copy/step_2").exists()


# whatever comes between


class _Meanwhile(Watch):
    """Lets something happen before each operation, or before one."""

    def __init__(self, meanwhile: Callable[[], None], point: int | None = None) -> None:
        super().__init__()
        self.meanwhile = meanwhile
        self.point = point

    def step(self, kind: str, path: str, act: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        if self.point in (None, len(self.seen)):
            self.meanwhile()
        super().step(kind, path, act, half)


def test_the_source_is_held_from_beginning_to_end(source: Path, tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        with alone(str(source)) as free:
            seen.append(free)

    _copy(source, tmp_path / "copy", Faulty(_Meanwhile(look)))
    assert len(seen) > 20
    assert not any(seen)
    with alone(str(source)) as free:
        assert free


def test_of_two_copies_to_one_place_both_are_told_the_truth(tmp_path: Path) -> None:
    """The second runs from beginning to end between any two operations of the first."""
    saver().save(state(1), tmp_path / "step_1")
    counting = Watch()
    _copy(tmp_path / "step_1", tmp_path / "counted", Faulty(counting))
    won = 0
    for point in range(len(counting.seen)):
        target = tmp_path / f"copy_{point}"
        rival: list[CopyResult] = []

        def meanwhile(target: Path = target, rival: list[CopyResult] = rival) -> None:
            rival.append(_copy(tmp_path / "step_1", target))

        try:
            _copy(tmp_path / "step_1", target, Faulty(_Meanwhile(meanwhile, point)))
            won += 1
        except CheckpointExistsError:
            assert not rival[0].present
        assert loads(target, 1), point
        assert not debris(target), point
    assert 0 < won < len(counting.seen)


# whatever fails or dies


def _counted(source: Path, folder: Path) -> list[Operation]:
    watch = Watch()
    _copy(source, folder / "counted", Faulty(watch))
    return watch.seen


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_each_operation_fails_and_the_same_copy_goes_on(tmp_path: Path, code: int) -> None:
    saver().save(state(1), tmp_path / "step_1")
    tried = 0
    for fault in errors(_counted(tmp_path / "step_1", tmp_path), code):
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        watch = Watch(fault)
        error: CheckpointError | None = None
        try:
            _copy(tmp_path / "step_1", target, Faulty(watch))
        except SaveFailedError as caught:
            error = caught
        operation = watch.seen[fault.point]
        assert watch.happened
        assert error is not None or operation.kind in ("remove", "link"), (fault, operation)
        if error is not None:
            assert str(target) in str(error)
            assert os.strerror(code) in str(error)
            assert loads(target, 1) == ("is committed" in str(error)), (fault, operation)
            left = [name for name in debris(target) if name.endswith(".tmp")]
            assert not left, (fault, operation)
        result = _copy(tmp_path / "step_1", target)
        assert result.present == (error is None or "is committed" in str(error))
        assert loads(target, 1), (fault, operation)
        assert loads(tmp_path / "step_1", 1)
        tried += 1
    print(f"{tried} failures ({os.strerror(code)})")
    assert tried > 40


def _killed_at_each_point(rank: int, world_size: int, folder: str) -> dict[str, int]:
    """Runs in a process without threads: its forks are killed, and it looks at what they leave."""
    distributed.destroy_process_group()
    source, target = Path(folder, "step_1"), Path(folder, "copy")
    saver().save(state(1), source)
    counts = {"absent": 0, "whole": 0, "verified": 0}
    for fault in kills(_counted(source, Path(folder))):
        shutil.rmtree(target, ignore_errors=True)
        child = os.fork()
        if not child:
            try:
                _copy(source, target, Faulty(Watch(fault)))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fault
        assert loads(source, 1), fault
        whole = loads(target, 1)
        counts["whole" if whole else "absent"] += 1
        result = _copy(source, target)
        assert result.present == whole, fault
        counts["verified"] += result.verified > 0
        assert loads(target, 1), fault
        with alone(str(source)) as free:
            assert free, "the dead hold nothing"
    return counts


def test_killed_at_any_point_leaves_the_copy_whole_or_absent_and_the_next_goes_on(tmp_path: Path) -> None:
    (counts,) = run_ranks(_killed_at_each_point, 1, str(tmp_path))
    print(f"killed at {counts['absent'] + counts['whole']} points: {counts}")
    assert counts["absent"] > 25
    assert counts["whole"] >= 2
    assert counts["verified"] > 5


def _disks_after_a_power_cut(folder: Path, place: Path) -> Iterator[tuple[Path, bool, str]]:
    """Each disk that a power cut during a copy can leave, and whether the copy had returned."""
    root = folder / "disk"
    root.mkdir()
    files = Recorder(root)
    saver(files).save(state(1), root / "a/step_1")
    past = len(files.trace)
    _copy(root / "a/step_1", root / "b/copy", files)
    disk = Disk()
    for operation in files.trace[:past]:
        disk.do(operation)
    disk.sync_all()
    for point in range(past, len(files.trace) + 1):
        if point > past:
            disk.do(files.trace[point - 1])
        for loss in losses(disk, ()):
            restore(disk.after(loss), place)
            yield place, point == len(files.trace), f"after {files.trace[point - 1]}, {loss.name}"
            shutil.rmtree(place)


def test_power_cut_at_any_point_leaves_the_copy_whole_or_absent_and_the_next_goes_on(tmp_path: Path) -> None:
    tried = 0
    for place, done, when in _disks_after_a_power_cut(tmp_path, tmp_path / "after"):
        assert loads(place / "a/step_1", 1), when
        assert loads(place / "b/copy", 1) or not done, when
        _copy(place / "a/step_1", place / "b/copy")
        assert loads(place / "b/copy", 1), when
        tried += 1
    print(f"{tried} disks after a power cut")
    assert tried > 60
