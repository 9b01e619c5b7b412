"""What is done after commits is done by the agent, for every checkpoint, although the trainers died."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import torch

from ckpt.agent.client import launch
from ckpt.agent.saver import AsyncSaver
from tests.agent.test_async_save import agents_below, until
from tests.ranks import run_ranks


def save_and_die(rank: int, world_size: int, folder: str) -> None:
    agents_below(folder)
    arguments = ["--record", f"{folder}/record", "--seconds", "0.2"]
    saver = AsyncSaver(launcher=partial(launch, "tests.agent.recording_agent", arguments))
    for step in range(4):
        saver.save({"w": torch.zeros(3)}, f"{folder}/step_{step}").captured()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_follows_commits_is_done_although_the_trainers_died(tmp_path: Path) -> None:
    run_ranks(save_and_die, 2, str(tmp_path), allow_death=True)
    until(lambda: not os.listdir(tmp_path / "agents"), "the agent to end")
    # one that failed did not keep the next from being done
    assert sorted((tmp_path / "record").read_text().split()) == ["0", "1", "2", "3"]
