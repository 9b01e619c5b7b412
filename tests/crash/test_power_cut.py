"""The power cut at each point of a save, and everything lost that was not synced: what kill -9 never tests.

A save's operations are recorded; for every prefix of them and many ways of losing what was not safe by then, what is
left is written to a fresh folder, and must hold the previous checkpoint and the new one, whole or not at all. Once the
save has returned, it must be whole.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ckpt_formats.errors import CheckpointError
from tests.crash.disk import Disk, Recorded, Recorder, losses, restore
from tests.crash.runs import loads, saver, state
from tests.ranks import run_ranks

NEW = "other/b/step_2"
PREVIOUS = "runs/a/step_1"


class BrokenPromiseError(AssertionError):
    """The promise is broken."""


def _recorded_save(folder: Path) -> tuple[list[Recorded], int]:
    """A run with one checkpoint, and a save in another: the operations of all, and how many of them are long past."""
    root = folder / "disk"
    root.mkdir()
    files = Recorder(root)
    saver(files).save(state(1), root / PREVIOUS)
    past = len(files.trace)
    # whoever starts a run makes its folders, and does not think of syncing them
    files.make_folder(str(root / "other"))
    files.make_folder(str(root / "other/b"))
    saver(files).save(state(2), root / NEW)
    return files.trace, past


def _tried(
    folder: Path, trace: Sequence[Recorded], past: int, look: Callable[[Path, bool], None], *, since: int = 0
) -> int:
    """Cut the power after each operation since number `since`, in every way; returns how many disks were looked at."""
    disk = Disk()
    for operation in trace[:past]:
        disk.do(operation)
    disk.sync_all()
    tried = 0
    for point in range(past, len(trace) + 1):
        if point > past:
            disk.do(trace[point - 1])
        if point < since:
            continue
        done = point == len(trace)
        seen: set[int] = set()
        for loss in losses(disk):
            found = disk.after(loss)
            known = hash(tuple(sorted(found.items(), key=lambda item: item[0])))
            if known in seen:
                continue
            seen.add(known)
            tried += 1
            _look(folder / "after", found, look, done, f"after {trace[point - 1]}, {loss.name}")
    return tried


def _look(
    place: Path, found: dict[str, bytes | None], look: Callable[[Path, bool], None], done: bool, when: str
) -> None:
    restore(found, place)
    try:
        look(place, done)
    except (AssertionError, CheckpointError) as error:
        raise BrokenPromiseError(f"the power was cut {when}: {error}") from error
    finally:
        shutil.rmtree(place)


def _promise(place: Path, done: bool) -> None:
    assert loads(place / PREVIOUS, 1)
    assert loads(place / NEW, 2) or not done, "the save had returned, but its checkpoint is not there"


def _new_alone(place: Path, done: bool) -> None:
    """The same of the new one alone, where there is one: for traces by the dozen."""
    if done or (place / NEW / "manifest.json").exists():
        assert loads(place / NEW, 2), "the save had returned, but its checkpoint is not there"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Recorded], int]:
    return _recorded_save(tmp_path_factory.mktemp("recorded"))


def test_power_cut_at_any_point_leaves_the_new_checkpoint_whole_or_absent(
    tmp_path: Path, recorded: tuple[list[Recorded], int]
) -> None:
    trace, past = recorded
    tried = _tried(tmp_path, trace, past, _promise)
    print(f"{tried} disks after a power cut at {len(trace) - past + 1} points")
    assert tried > 200


def test_save_after_a_power_cut_works(tmp_path: Path, recorded: tuple[list[Recorded], int]) -> None:
    """What the cut left lying about is in nobody's way."""
    trace, past = recorded

    def save_again(place: Path, done: bool) -> None:
        if not (place / NEW / "manifest.json").exists():
            saver().save(state(2), place / NEW)
        assert loads(place / NEW, 2)

    tried = 0
    for point in range(past, len(trace) + 1, 3):
        disk = Disk()
        for number, operation in enumerate(trace[:point]):
            if number == past:
                disk.sync_all()
            disk.do(operation)
        for loss in itertools.islice(losses(disk), 5):
            tried += 1
            _look(tmp_path / "after", disk.after(loss), save_again, False, f"at {point}, {loss.name}")
    assert tried > 20


# that the test can fail


def _linked(trace: Sequence[Recorded], past: int) -> int:
    """Before this operation there is no root to be found, and no promise to be broken."""
    (link,) = (number for number, operation in enumerate(trace) if number >= past and operation.kind == "link")
    return link


def _syncs(trace: Sequence[Recorded], past: int) -> list[int]:
    return [number for number, operation in enumerate(trace) if number >= past and operation.kind.startswith("sync")]


def test_every_sync_is_needed(tmp_path: Path, recorded: tuple[list[Recorded], int]) -> None:
    """Without any one of the syncs of a save, a power cut breaks the promise, and the test above finds it."""
    trace, past = recorded
    left_out = []
    for number in _syncs(trace, past):
        with pytest.raises(BrokenPromiseError):
            _tried(tmp_path, [*trace[:number], *trace[number + 1 :]], past, _new_alone, since=_linked(trace, past))
        left_out.append(str(trace[number]))
    print(f"found to be needed: {', '.join(left_out)}")
    assert len(left_out) >= 9


def test_every_sync_within_the_checkpoint_is_needed_before_the_link(
    tmp_path: Path, recorded: tuple[list[Recorded], int]
) -> None:
    """With any one of them done after the root got its name, likewise. (Folders above are safe in time if they are safe
    when the save returns.)"""
    trace, past = recorded
    link = _linked(trace, past)
    tried = 0
    for number in _syncs(trace, past):
        if number < link and trace[number].path.startswith(NEW):
            overtaken = [*trace[:number], *trace[number + 1 : link + 1], trace[number], *trace[link + 1 :]]
            with pytest.raises(BrokenPromiseError):
                _tried(tmp_path, overtaken, past, _new_alone, since=link)
            tried += 1
    assert tried == 6


# several ranks: who syncs what


def _recorded_group(rank: int, world_size: int, folder: str) -> list[Recorded]:
    files = Recorder(Path(folder))
    saver(files).save(state(2, rank, world_size), Path(folder, NEW))
    return files.trace


def test_power_cut_in_a_save_of_two_ranks(tmp_path: Path) -> None:
    """Rank 1 writes its file between the opening of the folder and the commit, both by rank 0, at any time."""
    root = tmp_path / "disk"
    root.mkdir()
    first, second = run_ranks(_recorded_group, 2, str(root))
    opened = max(number for number, operation in enumerate(first) if operation.kind == "mkdir") + 1
    (committing,) = (
        number
        for number, operation in enumerate(first)
        if operation.kind == "create" and operation.path.startswith(f"{NEW}/index")
    )

    def look(place: Path, done: bool) -> None:
        if done or (place / NEW / "manifest.json").exists():
            assert loads(place / NEW, 2, 2), "the save had returned, but its checkpoint is not there"

    for at in (opened, committing):
        trace = [*first[:at], *second, *first[at:]]
        assert _tried(tmp_path, trace, 0, look) > 100
        for number in _syncs(trace, 0):
            with pytest.raises(BrokenPromiseError):
                _tried(tmp_path, [*trace[:number], *trace[number + 1 :]], 0, look, since=_linked(trace, 0))
