"""What is promised of processes that a trainer forks off, as data loaders do: they hold nothing of the agent's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

import ckpt
from ckpt.agent.saver import AsyncSaver
from tests.agent.test_async_save import agents, until
from tests.ranks import Killed, run_ranks


def train_and_fork(rank: int, world_size: int, folder: str) -> None:
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    saver = AsyncSaver()
    pid = 0
    for k in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        saver.save(state, f"{folder}/{k}")
        if k == 1:
            pid = os.fork()
            if not pid:
                # it has the optimizer, in the middle of a capture, and the saver, and ends in good order
                optimizer.step()
                saver.close()
                time.sleep(1000)
    saver.save(state, f"{folder}/last").wait(60)
    os.kill(pid, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_worker_neither_disturbs_the_saves_nor_keeps_the_agent(tmp_path: Path) -> None:
    before = agents()
    (result,) = run_ranks(train_and_fork, 1, str(tmp_path), allow_death=True)
    assert isinstance(result, Killed)
    for name in ("0", "1", "2", "3", "last"):
        with ckpt.open(tmp_path / name) as checkpoint:
            assert checkpoint["model.weight"].shape == (1000, 1000)
    until(lambda: agents() <= before, "the agent to end though the worker holds on")
