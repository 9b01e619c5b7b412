"""What is promised of processes that a trainer forks off, as data loaders do: they hold nothing of the agent's."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import util
from pathlib import Path

import torch
from torch import distributed

import ckpt
from ckpt import api
from ckpt.agent.arena import Arena, MappedArena
from ckpt.agent.pending import PendingSave
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
        home = Path((tmp_path / "agent").read_text())
        # it commits saves as they are written, which need not be in their order
        until(lambda: not home.exists(), "the agent to end")
        for name in ("0", "1", "2", "3", "last"):
            with ckpt.open(tmp_path / name) as checkpoint:
                assert checkpoint["model.weight"].shape == (1000, 1000)
        os.kill(worker(tmp_path), 0)
    finally:
        os.kill(worker(tmp_path), signal.SIGKILL)


def worker(folder: Path) -> int:
    return int((folder / "pid").read_text())


def save_on_both_sides_of_a_fork(rank: int, world_size: int, folder: str) -> int:
    distributed.destroy_process_group()
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}

    def save(name: str) -> PendingSave:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return ckpt.async_save(state, f"{folder}/{name}")

    save("before").wait(60)
    pending = save("meanwhile")
    child = os.fork()
    if not child:
        code = 1
        try:
            ckpt.load(state, f"{folder}/before")
            save("child 1")
            save("child 2").wait(60)
            api._async_saver.close()
            code = 0
        finally:
            os._exit(code)
    save("after").wait(60)
    pending.wait(60)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_was_forked_off_saves_with_an_agent_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(save_on_both_sides_of_a_fork, 1, str(tmp_path)) == [0]
    for name in ("before", "meanwhile", "child 1", "child 2", "after"):
        with ckpt.open(tmp_path / name) as checkpoint:
            assert checkpoint["model.weight"].shape == (1000, 1000)


def save_last(path: str) -> None:
    """Nothing is captured before the process ends."""
    ends = threading.Event()
    api._async_saver._worker.do(lambda: bool(ends.wait(60)))
    util.Finalize(None, ends.set, exitpriority=100)
    ckpt.async_save({"w": torch.arange(1000)}, path)


def save_last_in_processes(rank: int, world_size: int, folder: str) -> None:
    distributed.destroy_process_group()
    child = multiprocessing.get_context("fork").Process(target=save_last, args=(f"{folder}/forked",))
    child.start()
    child.join()
    assert child.exitcode == 0
    # this one was started by a server
    save_last(f"{folder}/served")


def test_processes_of_multiprocessing_that_end_in_good_order_finish_their_captures(tmp_path: Path) -> None:
    """They end without a word to atexit."""
    run_ranks(save_last_in_processes, 1, str(tmp_path))
    for name in ("forked", "served"):
        with ckpt.open(tmp_path / name) as checkpoint:
            assert torch.equal(checkpoint["w"][...], torch.arange(1000))


def drop_an_arena_in_a_fork(rank: int, world_size: int, folder: str) -> int:
    size = 4 << 20
    made = Arena(f"{folder}/arena", size)
    mapped: MappedArena | None = MappedArena(made.path)
    child = os.fork()
    if not child:
        code = 1
        try:
            held = [line for line in Path("/proc/self/maps").read_text().splitlines() if made.path in line]
            # the kernel gives the first addresses that are free
            own = [mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(4)]
            for memory in own:
                memory[:] = b"x" * size
            mapped = None
            gc.collect()
            whole = all(memory[:] == b"x" * size for memory in own)
            # the agent's side, which this process made itself, is not given up
            code = 0 if whole and len(held) == 1 else 2
        finally:
            os._exit(code)
    assert mapped is not None
    mapped.all[:1] = b"y"
    assert bytes(made.view(0, 1)[:1]) == b"y", "it is the parent's still"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_memory_that_a_fork_gives_up_is_not_taken_from_what_it_maps_itself(tmp_path: Path) -> None:
    assert run_ranks(drop_an_arena_in_a_fork, 1, str(tmp_path)) == [0]
