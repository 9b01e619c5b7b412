"""kill -9 at each point of a save: the previous checkpoint loads, the new one is whole, or absent and saved again."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from ckpt.levels.prune import prune
from ckpt_formats.errors import CheckpointError
from tests.crash.operations import Fault, Faulty, Operation, Watch, kills, watch_messages
from tests.crash.runs import debris, loads, saver, state
from tests.ranks import Killed, run_ranks


def _killed_at_each_point(rank: int, world_size: int, folder: str) -> dict[str, int]:
    """Runs in a process without threads: its forks are killed, and it looks at what they leave."""
    distributed.destroy_process_group()
    run = Path(folder)
    previous, new = run / "step_1", run / "step_2"
    saver().save(state(1), previous)
    watch = Watch()
    saver(Faulty(watch)).save(state(2), run / "counted")
    whole = absent = 0
    for fault in kills(watch.seen):
        shutil.rmtree(new, ignore_errors=True)
        child = os.fork()
        if not child:
            try:
                saver(Faulty(Watch(fault))).save(state(2), new)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fault
        assert loads(previous, 1), fault
        if loads(new, 2):
            whole += 1
        else:
            absent += 1
            saver().save(state(2), new)
            assert loads(new, 2), fault
    return {"operations": len(watch.seen), "absent": absent, "whole": whole}


def test_killed_at_any_point_keeps_the_previous_step_and_leaves_the_new_one_whole_or_absent(tmp_path: Path) -> None:
    (counts,) = run_ranks(_killed_at_each_point, 1, str(tmp_path))
    print(f"killed at {counts['absent'] + counts['whole']} points of {counts['operations']} operations: {counts}")
    assert counts["absent"] > 25
    assert counts["whole"] >= 2


# several ranks


def _save(
    rank: int, world_size: int, folder: str, step: int, victim: int, fault: Fault | None
) -> list[Operation] | str:
    watch = Watch(fault if rank == victim else None)
    watch_messages(watch)
    try:
        saver(Faulty(watch)).save(state(step, rank, world_size), Path(folder, f"step_{step}"))
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return watch.seen


def _killed_in_a_group(world_size: int, folder: Path, victim: int) -> dict[str, int]:
    """Kill one rank at each point of a save of several."""
    previous, new = folder / "step_1", folder / "step_2"
    run_ranks(_save, world_size, str(folder), 1, -1, None)
    counted = run_ranks(_save, world_size, str(folder), 3, -1, None)[victim]
    whole = absent = 0
    for fault in kills(counted):
        shutil.rmtree(new, ignore_errors=True)
        results: list[Any] = run_ranks(_save, world_size, str(folder), 2, victim, fault, allow_death=True)
        assert results[victim] == Killed(signal.SIGKILL), (fault, results)
        assert loads(previous, 1, world_size), fault
        if loads(new, 2, world_size):
            whole += 1
            continue
        absent += 1
        survivors = results[:victim] + results[victim + 1 :]
        assert all(isinstance(answer, str) and "another rank died" in answer for answer in survivors), (
            fault,
            survivors,
        )
        # where others live, one that writes later than rank 0 hears of the death leaves something
        assert not victim or world_size > 2 or not debris(new), "rank 0 clears away what everybody has written"
        assert not prune(folder, grace=-1.0).failed
        assert not debris(new), fault
    shutil.rmtree(new, ignore_errors=True)
    run_ranks(_save, world_size, str(folder), 2, -1, None)
    assert loads(new, 2, world_size)
    print(
        f"rank {victim} of {world_size} killed at {absent + whole} points: {absent} times absent, {whole} times whole"
    )
    return {"absent": absent, "whole": whole}


def test_coordinator_killed_at_any_point_is_an_error_for_the_other_rank(tmp_path: Path) -> None:
    counts = _killed_in_a_group(2, tmp_path, victim=0)
    assert counts["absent"] > 30
    assert counts["whole"] >= 4


def test_writer_killed_at_any_point_is_an_error_for_the_coordinator(tmp_path: Path) -> None:
    counts = _killed_in_a_group(2, tmp_path, victim=1)
    assert counts["absent"] > 12
    assert counts["whole"] >= 1


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_one_of_four_killed_at_any_point(tmp_path: Path, victim: int) -> None:
    assert _killed_in_a_group(4, tmp_path, victim)["whole"] >= 1
