"""Ranks of a program that do not do the same: each hears of it within seconds, and nobody waits in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckpt
from tests.loop.test_loop import heard, no_agent_stays, saved
from tests.ranks import run_ranks

__all__ = ["heard", "no_agent_stays"]

Body = Callable[[ckpt.Checkpointer, int, int], object]


def loop(folder: Path, rank: int, body: Body, total: int = 6, **options: Any) -> str:
    """Train, and return what it ended with. Who fails lives on, as a process does that can't end."""
    state: dict[str, object] = {"x": torch.zeros(3)}
    begin = time.monotonic()
    ended = "well"
    try:
        with ckpt.Checkpointer(folder, state, **{"every": 100} | options) as run:
            for step in run.steps(total):
                if body(run, rank, step):
                    break
    except BaseException as error:  # noqa: BLE001 - whatever it was, it is the answer
        ended = f"{type(error).__name__}: {error}"
    assert time.monotonic() - begin < 30
    dist.barrier()
    return ended


def nothing(*_: object) -> None:
    pass


def fails(_: ckpt.Checkpointer) -> None:
    raise ValueError("boom")


def ends(_: ckpt.Checkpointer) -> None:
    raise SystemExit(0)


def on_0(step: int, act: Callable[[ckpt.Checkpointer], object]) -> Body:
    return lambda run, rank, at: act(run) if (rank, at) == (0, step) else None


def in_turn(rank: int, world_size: int, folder: str, cases: str) -> list[str]:
    runs = (Path(folder, str(number)) for number in range(100))
    if cases == "options":
        return [
            loop(next(runs), rank, nothing, every=2 + rank),
            loop(next(runs), rank, nothing, on_error=("log", "raise", "log")[rank]),
            loop(next(runs) / str(rank // 2), rank, nothing),
            loop(next(runs), rank, nothing, keep=None if rank else 3),
            loop(next(runs), rank, nothing, every=2 if rank else 0),
            loop(next(runs), rank, nothing, 6 + rank),
            loop(next(runs), rank, nothing),
        ]
    leave, save = (lambda _: True), (lambda run: run.save())
    return [
        loop(next(runs), rank, on_0(3, save)),
        loop(next(runs), rank, on_0(6, leave)),
        loop(next(runs), rank, on_0(3, leave)),
        # the others are saving meanwhile
        loop(next(runs), rank, on_0(3, leave), every=3),
        loop(next(runs), rank, on_0(3, fails), every=2),
        loop(next(runs), rank, on_0(3, fails), every=3),
        loop(next(runs), rank, on_0(3, ends), every=2),
        # what is due anyway may be asked for by some
        loop(next(runs), rank, on_0(3, save), every=3),
        loop(next(runs), rank, lambda run, _, step: run.save() if step == 3 else None),
        loop(next(runs), rank, lambda _, __, step: step == 5, every=2),
    ]


def test_ranks_that_were_given_different_options_or_steps_are_told_which(tmp_path: Path) -> None:
    results = run_ranks(in_turn, 3, str(tmp_path), "options", timeout=120)
    run = tmp_path / "2"
    expected = [
        "ranks were given different options: every of disk is every 2 steps on rank 0, and every 3 steps on rank 1",
        "ranks were given different options: on_error is log on rank 0, and raise on rank 1",
        f"ranks were given different options: run is {run}/0 on rank 0, and {run}/1 on rank 2",
        "ranks were given different options: keep of disk is LatestN(n=3) on rank 0, and None on rank 1",
        "every=0: give a positive number of steps",
        "ranks loop up to different steps, 6 and 8",
    ]
    for rank, ended in enumerate(results):
        assert ended[-1] == "well"
        for end, words in zip(ended, expected, strict=False):
            assert end.startswith("ConfigurationError: ")
            assert words in end
            assert "rank 0: " in end or rank == 0 or "loop" in words


def test_ranks_that_leave_or_save_by_themselves_are_told_so_and_none_waits(tmp_path: Path) -> None:
    first, *others = run_ranks(in_turn, 3, str(tmp_path), "steps", timeout=120)
    disagree = "RankError: rank 2 goes on with its loop and rank 0 {}: all ranks call save() in the same steps"
    for end, did in zip(first, ["has called save()", *["leaves the block"] * 3], strict=False):
        assert end.startswith(disagree.format(did))
    assert first[4:7] == ["ValueError: boom", "ValueError: boom", "SystemExit: 0"]
    for other in others:
        assert other[:4] == first[:4]
        for end, why in zip(other[4:7], ["ValueError: boom", "ValueError: boom", "SystemExit: 0"], strict=True):
            assert end.startswith(f"RankError: rank 0 has left the training's block ({why}); start the ranks anew")
        assert other[7:] == first[7:] == ["well"] * 3
    assert [saved(tmp_path / str(number)) for number in (7, 8, 9)] == [[3, 6], [3, 6], [2, 4]]
