"""What is promised of processes that a trainer forks off, as data loaders do: they hold nothing of the agent's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

import ckpt
from ckpt.agent.saver import AsyncSaver
from tests.agent.test_async_save import until
from tests.ranks import Killed, run_ranks


def train_and_fork(rank: int, world_size: int, folder: str) -> None:
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    saver = AsyncSaver()
    for k in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        saver.save(state, f"{folder}/{k}")
        if k == 1:
            pid = os.fork()
            if not pid:
                # nobody who ends the rank ends this one, but the test does
                os.setsid()
                # it has the optimizer, in the middle of a capture, and the saver, which it closes
                optimizer.step()
                saver.close()
                time.sleep(1000)
            (Path(folder) / "pid").write_text(str(pid))
    saver.save(state, f"{folder}/last").wait(60)
    (Path(folder) / "agent").write_text(os.path.dirname(saver.agent.address if saver.agent else ""))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_worker_neither_disturbs_the_saves_nor_keeps_the_agent(tmp_path: Path) -> None:
    try:
        (result,) = run_ranks(train_and_fork, 1, str(tmp_path), allow_death=True)
        assert isinstance(result, Killed)
        for name in ("0", "1", "2", "3", "last"):
            with ckpt.open(tmp_path / name) as checkpoint:
                assert checkpoint["model.weight"].shape == (1000, 1000)
        home = Path((tmp_path / "agent").read_text())
        until(lambda: not home.exists(), "the agent to end")
        os.kill(worker(tmp_path), 0)
    finally:
        os.kill(worker(tmp_path), signal.SIGKILL)


def worker(folder: Path) -> int:
    return int((folder / "pid").read_text())
