"""Agents leave nothing in memory, however they end."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import torch

from ckpt.agent import client
from ckpt.agent.homes import make_home
from ckpt.agent.saver import AsyncSaver
from tests.agent.test_async_save import until


def test_what_a_killed_agent_left_in_memory_is_removed(tmp_path: Path) -> None:
    homes = []

    def launcher() -> str:
        homes.append(os.path.dirname(client.launch()))
        return os.path.join(homes[-1], "socket")

    living, killed = AsyncSaver(launcher=launcher), AsyncSaver(launcher=launcher)
    living.save({"w": torch.zeros(3)}, tmp_path / "a").wait()
    killed.save({"w": torch.zeros(3)}, tmp_path / "b").wait()
    assert killed._client is not None
    os.kill(killed._client.pid, signal.SIGKILL)
    until(lambda: not killed._client.alive(), "the agent to be gone")
    # the process that started it lives, and looks after that
    until(lambda: not os.path.exists(homes[1]), "what it has left to be removed")
    # the same saver goes on with another agent
    killed.save({"w": torch.zeros(3)}, tmp_path / "c").wait()
    # and whoever lives is left alone
    living.save({"w": torch.zeros(3)}, tmp_path / "d").wait()
    assert len(homes) == 3
    living.close()
    killed.close()
    until(lambda: not any(map(os.path.exists, homes)), "the agents to end")


def test_what_an_agent_left_that_died_with_its_trainer_is_removed_when_the_next_one_starts() -> None:
    home, lock = make_home()
    Path(home, "arena-0-1").write_bytes(bytes(4096))
    os.close(lock)  # as the kernel does
    other, lock = make_home()
    # perhaps by somebody else's who starts in this moment
    until(lambda: not os.path.exists(home), "what was left to be removed")
    os.close(lock)
    shutil.rmtree(other)


def test_homes_that_are_made_at_the_same_time_leave_each_other_alone() -> None:
    made = []

    def make() -> None:
        made.extend(make_home() for _ in range(50))

    makers = [threading.Thread(target=make) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(made) == 200
    assert all(os.path.isdir(home.path) for home in made)
    for home in made:
        os.close(home.lock)
    # nobody lives there any more
    last = make_home()
    assert not any(os.path.isdir(home.path) for home in made)
    os.close(last.lock)
    shutil.rmtree(last.path)
