"""Trainers killed at each message and system call of a save that does not stop them: a captured one is committed.

One rank, or all of them at once. Their agent is left alone, and is the only one that can end the save.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckpt
from ckpt.agent.saver import AsyncSaver
from ckpt.levels.prune import prune
from ckpt_formats.errors import CheckpointError
from tests.crash.agents import Agents
from tests.crash.operations import Fault, Spot, Watch, watch_messages
from tests.crash.runs import debris, loads, quick_folder, saver, state
from tests.crash.syscalls import watch_channels, watch_process
from tests.ranks import Killed, run_ranks

PATIENCE = 20.0
WORLD = 2


@dataclass
class _Watch(Watch):
    """Kills others before this process."""

    others: list[int] = field(default_factory=list)

    def _harm(self, *args: Any) -> Any:
        for pid in self.others:
            os.kill(pid, signal.SIGKILL)
        return super()._harm(*args)


def _layer(step: int) -> torch.nn.Linear:
    torch.manual_seed(step)
    return torch.nn.Linear(300, 200)


def _train(
    rank: int, world_size: int, folder: str, victim: int, together: bool, fault: Fault | None, first: bool
) -> list[Spot] | str:
    """Save step 2 with a fault, and go on training; the parameters are captured meanwhile. It is the `first` save of
    the process, or one that its agent and the other ranks know already.
    """
    run = Path(folder)
    agents = Agents(folder, homes=str(run / "homes"))
    agents.install()
    pids: list[int] = [0] * world_size
    distributed.all_gather_object(pids, os.getpid())
    by = AsyncSaver(saver())
    layer = _layer(1)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    training = {"layer": layer, "optimizer": optimizer}
    try:
        if not first:
            by.save(state(1, rank, world_size) | training, run / "other" / str(pids[0])).wait(PATIENCE)
        layer.load_state_dict(_layer(2).state_dict())
        distributed.barrier()
        watch = _Watch(fault if rank == victim else None, root=folder)
        watch.others = [pid for pid in pids if pid != os.getpid()] if together else []
        watch_messages(watch)
        watch_channels(watch)
        watch_process(watch)
        pending = by.save(state(2, rank, world_size) | training, run / "run" / "step_2")
        layer(torch.ones(300)).sum().backward()
        optimizer.step()
        pending.captured(PATIENCE)
        (run / f"captured-{rank}").touch()
        pending.wait(PATIENCE)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        by.close()
    return list(watch.spots)


def _until_gone(home: str) -> None:
    deadline = time.monotonic() + 30
    while os.path.exists(home):
        assert time.monotonic() < deadline, f"the agent in {home} does not end"
        time.sleep(0.01)


def _look(run: Path, fault: Fault, results: list[Any], counts: Counter[str]) -> None:
    new = run / "run" / "step_2"
    captured = list(run.glob("captured-*"))
    whole = loads(new, 2, WORLD)
    assert whole or not captured, (fault, "captured, and yet not committed")
    assert whole or not any(isinstance(result, list) for result in results), (fault, results)
    assert loads(run / "run" / "step_1", 1, WORLD), fault
    if whole:
        with ckpt.open(new) as checkpoint:
            assert torch.equal(checkpoint["layer.weight"][...], _layer(2).weight), fault
    else:
        # whoever dies between making the folder and opening the save leaves it empty
        assert set(debris(new)) <= {"data", "index", "."}, (fault, debris(new))
    assert not prune(run / "run", grace=-1.0).failed
    assert loads(new, 2, WORLD) == whole
    assert whole or not new.exists()
    counts.update(["points", "captured" if captured else "not captured", "whole" if whole else "absent"])


def _killed(place: Path, victim: int, together: bool, first: bool, every: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    original = place / "original"
    run_ranks(_first, WORLD, str(original))
    folder = place / "tried"

    def train(fault: Fault | None) -> list[Any]:
        results = run_ranks(_train, WORLD, str(folder), victim, together, fault, first, allow_death=True)
        homes = folder / "homes"
        for home in homes.read_text().splitlines() if homes.exists() else ():
            _until_gone(home)
        return results

    def restore() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder / "run", copy_function=os.link)

    restore()
    trace: list[Spot] = train(None)[victim]
    for spot in trace[every // 2 :: every]:
        restore()
        results = train(fault := Fault(spot, "before", None))
        died = [result for result in results if isinstance(result, Killed)]
        # how often is asked differs from run to run
        assert died or "wait" in spot.name, (fault, results)
        _look(folder, fault, results, counts)
        if not (folder / "run" / "step_2").exists():
            assert all(isinstance(result, list) for result in train(None)), fault
            assert loads(folder / "run" / "step_2", 2, WORLD), fault
    return counts


def _first(rank: int, world_size: int, folder: str) -> None:
    saver().save(state(1, rank, world_size), Path(folder, "step_1"))


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("first", [False, True], ids=["known", "first save"])
@pytest.mark.parametrize(("victim", "together"), [(0, False), (1, False), (1, True)], ids=["rank 0", "rank 1", "all"])
def test_trainer_killed_at_any_point_loses_nothing_that_was_captured(
    tmp_path: Path, victim: int, together: bool, first: bool, every: int
) -> None:
    with quick_folder(tmp_path) as place:
        counts = _killed(place, victim, together, first, every)
    print(f"{'all trainers' if together else f'trainer {victim}'} killed: {dict(counts)}")
    assert counts["points"] * every >= 8
    if every == 1:
        assert counts["captured"] >= 1
        assert counts["absent"] >= 1
