"""Two saves to one path at the same time, a rank that never comes, and ranks that die while loading."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

import ckpt
from ckpt_formats.errors import CheckpointError, CheckpointExistsError, RankError, SaveFailedError
from tests.crash.operations import Fault, Faulty, Watch, watch_messages
from tests.crash.runs import blank, debris, loads, same, saver, state
from tests.ranks import Killed, run_ranks


class _Interrupted(Watch):
    """Lets something happen before one of the operations."""

    def __init__(self, point: int, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self.point = point
        self.meanwhile = meanwhile

    def step(self, kind: str, path: str, act: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        if len(self.seen) == self.point:
            self.point = -1
            self.meanwhile()
        super().step(kind, path, act, half)


def _attempt(path: Path, step: int, watch: Watch) -> CheckpointError | None:
    try:
        saver(Faulty(watch)).save(state(step), path, step=step)
    except CheckpointError as error:
        return error
    return None


def test_of_two_saves_to_one_path_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    """The second runs from beginning to end between any two operations of the first."""
    counting = Watch()
    assert _attempt(tmp_path / "counted", 1, counting) is None
    for point in range(len(counting.seen)):
        path = tmp_path / f"run_{point}" / "step"
        outcomes: dict[int, CheckpointError | None] = {}

        def rival(path: Path = path, outcomes: dict[int, CheckpointError | None] = outcomes) -> None:
            outcomes[2] = _attempt(path, 2, Watch())

        outcomes[1] = _attempt(path, 1, _Interrupted(point, rival))
        (winner,) = (step for step, error in outcomes.items() if error is None)
        assert isinstance(outcomes[3 - winner], CheckpointExistsError), (point, outcomes)
        assert loads(path, winner), point
        assert all(name.endswith(".tmp") for name in debris(path)), (point, debris(path))


def test_save_that_fails_beside_another_does_it_no_harm(tmp_path: Path) -> None:
    """What the one clears away is its own, or makes the other say so."""
    counting = Watch()
    assert _attempt(tmp_path / "counted", 1, counting) is None
    committed = 0
    for point in range(len(counting.seen)):
        path = tmp_path / f"run_{point}" / "step"

        def fail(path: Path = path) -> None:
            # it begins before the other, as far as folders are concerned, and ends in the middle of it
            error = _attempt(path, 2, Watch(Fault(12, "before", 5)))
            assert isinstance(error, SaveFailedError | CheckpointExistsError)

        error = _attempt(path, 1, _Interrupted(point, fail))
        if error is None:
            committed += 1
            assert loads(path, 1), point
        else:
            assert isinstance(error, SaveFailedError), (point, error)
            assert not loads(path, 1), point
    assert committed > len(counting.seen) - 5


def _come_or_not(rank: int, world_size: int, folder: str) -> str:
    group = distributed.new_group(timeout=timedelta(seconds=1.5))
    if rank == 0:
        with pytest.raises(RankError) as caught:
            ckpt.save(state(1, rank, world_size), folder, process_group=group)
        return str(caught.value)
    distributed.barrier()
    return ""


def _come_or_not_main(rank: int, world_size: int, folder: str) -> str:
    answer = _come_or_not(rank, world_size, folder)
    if rank == 0:
        distributed.barrier()
    return answer


def test_rank_that_never_comes_ends_the_save_at_the_group_s_time_limit(tmp_path: Path) -> None:
    answers = run_ranks(_come_or_not_main, 2, str(tmp_path / "step_1"))
    assert "did not answer within the process group's time limit" in answers[0]
    assert not (tmp_path / "step_1").exists()


def _load(rank: int, world_size: int, path: str, victim: int, fault: Fault | None) -> str | int:
    watch = Watch(fault if rank == victim else None)
    watch_messages(watch)
    live = blank(rank, world_size)
    try:
        ckpt.load(live, path)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    assert same(live, state(1, rank, world_size))
    return len(watch.seen)


def _save(rank: int, world_size: int, path: str) -> None:
    saver().save(state(1, rank, world_size), path)


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_while_loading_is_an_error_for_the_other(tmp_path: Path, victim: int) -> None:
    path = str(tmp_path / "step_1")
    run_ranks(_save, 2, path)
    messages = run_ranks(_load, 2, path, -1, None)[victim]
    assert isinstance(messages, int)
    assert messages >= 2
    for point in range(messages):
        answers: list[Any] = run_ranks(_load, 2, path, victim, Fault(point, "before", None), allow_death=True)
        assert answers[victim] == Killed(signal.SIGKILL)
        assert "RankError: another rank died" in str(answers[1 - victim])
    assert loads(tmp_path / "step_1", 1, 2)
