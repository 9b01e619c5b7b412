"""What a training may come to from outside: signals at any time, forks, folders and memory that are not there."""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.agent import client
from ckpt.agent.client import AgentClient
from ckpt.loop import interruption
from ckpt_formats.errors import SaveFailedError
from tests.crash.test_full_disk import _mount, _own_disk
from tests.loop.test_loop import Training, heard, no_agent_stays, saved, train, until
from tests.ranks import run_ranks

__all__ = ["heard", "no_agent_stays"]


class Alarm:
    """An entry of a state that sends its process a signal when it is loaded."""

    def __init__(self, number: signal.Signals | None) -> None:
        self.number = number

    def state_dict(self) -> dict[str, object]:
        return {"rings": True}

    def load_state_dict(self, _: dict[str, object]) -> None:
        if self.number is not None:
            os.kill(os.getpid(), self.number)


def told_while_loading(rank: int, world_size: int, folder: str, number: signal.Signals | None) -> Any:
    training = Training(sharded=world_size)
    training.state["alarm"] = Alarm(number if rank == world_size - 1 else None)
    with ckpt.Checkpointer(folder, training.state, every=2) as loop:
        made = list(loop.steps(4 if number is None else 9))
    return made, loop.step, loop.stopped


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_who_is_told_to_stop_while_the_run_is_loaded_leaves_in_good_order(
    number: signal.Signals, world_size: int, tmp_path: Path
) -> None:
    run_ranks(told_while_loading, world_size, str(tmp_path), None)
    assert run_ranks(told_while_loading, world_size, str(tmp_path), number) == [([], 4, number.name)] * world_size
    assert saved(tmp_path) == [2, 4]


def handled_by_others(rank: int, world_size: int, folder: str) -> list[tuple[str | None, bool]]:
    """Whether the stacks were dumped in the block, and after it."""
    seen = []
    with open(Path(folder, "stacks"), "w+") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        for total in (9, 18):
            training = Training()
            with ckpt.Checkpointer(Path(folder, "run"), training.state, every=100) as loop:
                for step in loop.steps(total):
                    if step == total - 5:
                        os.kill(os.getpid(), signal.SIGUSR1)
            seen.append((loop.stopped, bool(os.stat(stacks.fileno()).st_size)))
            os.kill(os.getpid(), signal.SIGUSR1)
            assert "handled_by_others" in Path(folder, "stacks").read_text()
            os.truncate(stacks.fileno(), 0)
    return seen


def test_after_the_block_a_signal_does_what_it_did_before_although_python_did_not_set_that(tmp_path: Path) -> None:
    assert run_ranks(handled_by_others, 1, str(tmp_path)) == [[("SIGUSR1", False)] * 2]


def test_who_trains_two_runs_at_once_is_told_for_both(tmp_path: Path) -> None:
    outer, inner = (ckpt.Checkpointer(tmp_path / name, {"x": torch.zeros(3)}, every=100) for name in ("a", "b"))
    with outer, inner:
        for step in outer.steps(50):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        assert list(inner.steps(50)) == [1]
    assert (outer.stopped, inner.stopped) == ("SIGTERM", "SIGTERM")
    assert (saved(tmp_path / "a"), saved(tmp_path / "b")) == ([5], [1])


def made_before_a_fork(rank: int, world_size: int, folder: str) -> int:
    training = Training()
    loop = ckpt.Checkpointer(folder, training.state, every=100)
    child = os.fork()
    if not child:
        with loop:
            for step in loop.steps(50):
                training.step(step)
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
        os._exit(loop.step)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_was_forked_before_it_entered_the_block_is_told_to_stop(tmp_path: Path) -> None:
    assert run_ranks(made_before_a_fork, 1, str(tmp_path)) == [3]
    assert saved(tmp_path) == [3]


def forks_and_both_leave(rank: int, world_size: int, folder: str) -> list[str]:
    training = Training()
    lock, parent, held = Path(folder, ".lock"), os.getpid(), []
    try:
        with ckpt.Checkpointer(folder, training.state, every=1) as loop:
            for step in loop.steps(4):
                training.step(step)
                if step == 2:
                    child = os.fork()
                    if not child:
                        raise SystemExit
                    assert os.waitpid(child, 0)[1] == 0
                held.append(lock.read_text())
    finally:
        if os.getpid() != parent:
            os._exit(0)
    return held


def test_a_forked_process_that_leaves_the_block_ends_nothing_of_the_training_s(tmp_path: Path) -> None:
    (held,) = run_ranks(forks_and_both_leave, 1, str(tmp_path))
    assert len(set(held)) == 1
    assert held[0]
    assert saved(tmp_path) == [1, 2, 3, 4]


def test_a_notice_is_looked_for_where_the_training_was_when_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "POLL_S", 0.02)
    monkeypatch.chdir(tmp_path)
    loop = ckpt.Checkpointer("run", Training().state, every=10_000_000, preemption="notice")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with loop:
        for step in loop.steps(10_000):
            if step == 2:
                (tmp_path / "notice").touch()
            time.sleep(0.002)
    assert loop.stopped == "preemption notice"
    assert saved(tmp_path / "run") == [loop.step]


def test_the_agent_takes_no_module_from_the_folder_in_which_a_training_happens_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ckpt", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('it is another module of that name')")
    monkeypatch.chdir(tmp_path)
    train(Path("run"), 2, every=1)
    assert saved(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_a_state_without_a_single_element_is_saved_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, {"nothing": torch.zeros(shape)}, every=1) as loop:
        assert list(loop.steps(2)) == [1, 2]
    with ckpt.open(tmp_path / "step_00000002") as checkpoint:
        assert checkpoint["nothing"].shape == shape


def test_an_agent_whose_folder_was_removed_is_replaced(tmp_path: Path) -> None:
    def remove(loop: Any, step: int) -> None:
        if step == 3:
            until(lambda: loop._lead.committed == 2, "step 2 to be committed")
            shutil.rmtree(os.path.dirname(loop._saver.agent.address))

    train(tmp_path, 6, remove, every=1)
    assert saved(tmp_path)[-3:] == [4, 5, 6]


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """No file gets larger, an arena neither: there is no more room in a memory file system than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_there_is_room_for_one_capture_only_saves_wait_for_each_other(tmp_path: Path) -> None:
    state: dict[str, object] = {"large": torch.zeros(3 << 18)}  # 3 MiB
    with files_of_at_most(5 << 20), ckpt.Checkpointer(tmp_path, state, every=1) as loop:
        for step in loop.steps(5):
            state["large"] = torch.full((3 << 18,), float(step))
    assert saved(tmp_path) == [1, 2, 3, 4, 5]
    for step in range(1, 6):
        with ckpt.open(tmp_path / f"step_{step:08d}") as checkpoint:
            assert torch.equal(checkpoint["large"][:], torch.full((3 << 18,), float(step)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_whose_saves_have_no_memory_is_refused_before_it_begins(world_size: int, tmp_path: Path) -> None:
    run_ranks(without_memory, world_size, str(tmp_path))


def without_memory(rank: int, world_size: int, folder: str) -> None:
    state: dict[str, object] = {"large": torch.zeros(1 << 21)}
    with (
        files_of_at_most(1 << 21),
        pytest.raises(SaveFailedError, match=r"no room for .* of captures .*memory="),
        ckpt.Checkpointer(folder, state),
    ):
        raise AssertionError("it has begun")
    # less was declared
    with files_of_at_most(1 << 21), ckpt.Checkpointer(folder, {}, every=1, memory=1 << 20) as loop:
        assert list(loop.steps(1)) == [1]


def fills_the_memory(rank: int, world_size: int, folder: str) -> str:
    """Train while others fill the memory file system, which is a small one of this process's own."""
    try:
        _own_disk(Path(folder, "unused"))
        _mount(Path("/dev/shm"), "size=16m")
    except OSError as error:
        return str(error)
    logging.getLogger("ckpt").setLevel(logging.ERROR)

    def fill(loop: Any, step: int) -> None:
        if step == 2:
            with suppress(OSError), open("/dev/shm/others", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            assert os.statvfs("/dev/shm").f_bfree == 0

    begin = time.monotonic()
    train(Path(folder, "run"), 4, fill, every=1, tiers=[ckpt.Disk(), ckpt.Disk(Path(folder, "far"))])
    assert time.monotonic() - begin < 60
    assert saved(Path(folder, "run")) == saved(Path(folder, "far")) == [1, 2, 3, 4]
    return ""


def test_memory_that_others_fill_keeps_no_training_from_ending(tmp_path: Path) -> None:
    (why,) = run_ranks(fills_the_memory, 1, str(tmp_path), timeout=120)
    if why:
        pytest.skip(why)


def test_a_question_that_was_interrupted_does_not_get_the_next_one_s_answer(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    agent = AgentClient(client.launch(), 0)
    try:
        os.kill(agent.pid, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            agent.slot(4096, None, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(agent.pid, signal.SIGCONT)
    # so that the next save starts another one
    assert not agent.alive()
    agent.close()


def forked_workers(rank: int, world_size: int, folder: str) -> list[int]:
    """A loader whose workers outlive the Checkpointer, and a second Checkpointer of the same run."""
    del rank, world_size
    training = Training()
    loader = iter(torch.utils.data.DataLoader(list(range(10_000)), num_workers=2, multiprocessing_context="fork"))
    made = []
    for total in (3, 6):
        with ckpt.Checkpointer(folder, training.state, every=1) as loop:
            for step in loop.steps(total):
                next(loader)
                if step == 2:
                    loader = iter(
                        torch.utils.data.DataLoader(list(range(10_000)), num_workers=2, multiprocessing_context="fork")
                    )
                training.step(step)
                made.append(step)
    return made


def test_a_run_is_free_again_although_workers_of_a_loader_live_on(tmp_path: Path) -> None:
    assert run_ranks(forked_workers, 1, str(tmp_path)) == [[1, 2, 3, 4, 5, 6]]


ENDS = """
import sys, torch, ckpt
state = {"large": torch.zeros(1 << 23), "model": (model := torch.nn.Linear(1000, 1000))}
state["optimizer"] = torch.optim.AdamW(model.parameters())
run = ckpt.Checkpointer(sys.argv[1], state, every=1)
run.__enter__()
assert list(run.steps(2)) == [1, 2]
"""


def test_a_program_that_ends_without_leaving_the_block_finishes_its_captures(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], check=True, timeout=120)
    until(lambda: saved(tmp_path) == [1, 2], "the agent to commit what was captured")
