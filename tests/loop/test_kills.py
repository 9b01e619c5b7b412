"""A job that is killed again and again, at any moment and on other numbers of ranks each time, ends where an unbroken
one ends.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

import ckpt
from ckpt_formats.errors import RankError
from ckpt_formats.verify import verify
from tests.loop.test_levels import saved
from tests.loop.test_loop import Training, after, same
from tests.ranks import Killed, run_ranks

STEPS = 400


def live(rank: int, world_size: int, folder: str, seconds: float) -> bool:
    """Train until done, or until everybody is killed some time after the first step of this life."""
    training = Training(sharded=world_size)
    try:
        return trained(training, folder, seconds)
    except RuntimeError as error:
        if seconds and (isinstance(error, RankError) or "by peer" in str(error) or "Broken pipe" in str(error)):
            # the others were killed a moment before this one
            os.kill(os.getpid(), signal.SIGKILL)
        raise


def trained(training: Training, folder: str, seconds: float) -> bool:
    tiers = [ckpt.Disk(every=3, keep=2), ckpt.Disk(f"{folder}/far", every=12, keep=3)]
    with ckpt.Checkpointer(f"{folder}/run", training.state, tiers=tiers) as loop:
        for step in loop.steps(STEPS):
            if step == loop.step + 1 and seconds:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
                seconds = 0
            assert step == int(str(training.state["count"])) + 1
            training.step(step)
    return same(training.weights(), after(STEPS))


def ends_where_an_unbroken_one_ends(folder: Path, seed: int, kills: int) -> list[int]:
    chance = random.Random(seed)
    newest = []
    for _ in range(kills):
        results = run_ranks(live, chance.choice([1, 2, 4]), str(folder), chance.uniform(0.01, 1.0), allow_death=True)
        if not any(isinstance(result, Killed) for result in results):
            break
        newest.append(max([0, *saved(folder / "run"), *saved(folder / "far")]))
    assert all(run_ranks(live, 2, str(folder), 0.0))
    assert newest == sorted(newest)
    assert saved(folder / "run")[-1] == saved(folder / "far")[-1] == STEPS
    for level in ("run", "far"):
        for step in saved(folder / level):
            assert verify(folder / level / f"step_{step:08d}").intact
    return newest


def test_a_job_that_is_killed_at_any_moment_ends_where_an_unbroken_one_ends(tmp_path: Path) -> None:
    ends_where_an_unbroken_one_ends(tmp_path, seed=1, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_job_that_is_killed_dozens_of_times_ends_where_an_unbroken_one_ends(seed: int, tmp_path: Path) -> None:
    print(ends_where_an_unbroken_one_ends(tmp_path, seed, kills=20))
