"""What several nodes promise: each has an agent of its own, they commit together or not at all, and say who failed.

The nodes are this machine, several times: what tells them apart is CKPT_NODE, and their agents are processes that know
each other by TCP alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ckpt
from ckpt.agent import client
from ckpt.agent.homes import make_home
from ckpt.agent.pending import PendingSave
from ckpt.agent.saver import AsyncSaver
from ckpt.collective import Collective
from ckpt.saving import capture as capturing
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, SaveFailedError
from tests.agent.test_async_save import until
from tests.ranks import Killed, run_ranks

NODES = ["a", "a", "b", "b", "c"]


def saver_on(rank: int, folder: str) -> AsyncSaver:
    """A saver whose agents a test can hold (see held_agent.py) and find, and which soon notices that its own hangs."""
    client.ASKED_EVERY, client.SILENCE = 0.5, 2.0
    os.environ["CKPT_NODE"] = NODES[rank]

    def launcher() -> str:
        address = client.launch("tests.agent.held_agent", ["--folder", folder])
        with Path(folder, "homes").open("a") as stream:
            stream.write(f"{os.path.dirname(address)}\n")
        return address

    return AsyncSaver(launcher=launcher)


def assert_agents_end(folder: Path) -> None:
    homes = (folder / "homes").read_text().split()
    until(lambda: not any(map(os.path.exists, homes)), "the agents to end and leave nothing")


def state_of(rank: int, step: int) -> dict[str, object]:
    rows = torch.full((10, 300), float(100 * step + rank))
    return {"w": ckpt.Shard(rows, (10 * dist.get_world_size(), 300), (10 * rank, 0)), "own": ckpt.PerRank(rank)}


def assert_saved(path: str | Path, world_size: int, step: int) -> None:
    with ckpt.open(path) as checkpoint:
        rows = checkpoint["w"][:]
        assert rows.shape == (10 * world_size, 300)
        for rank in range(world_size):
            assert torch.equal(rows[10 * rank : 10 * rank + 10], torch.full((10, 300), float(100 * step + rank)))


def pid_of(saver: AsyncSaver) -> int:
    assert saver._client is not None
    return saver._client.pid


def agent_pids(saver: AsyncSaver) -> dict[str, int]:
    """The process of each node's agent."""
    found: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(found, (os.environ["CKPT_NODE"], pid_of(saver)))
    return dict(found)


def failure_of(pending: PendingSave, seconds: float = 20) -> str:
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        pending.wait(seconds)
    assert time.monotonic() - begin < seconds
    return str(caught.value)


# --- together


def save_three(rank: int, world_size: int, folder: str) -> dict[str, int]:
    saver = saver_on(rank, folder)
    pendings = [saver.save(state_of(rank, step), f"{folder}/step_{step}") for step in range(3)]
    for pending in pendings:
        pending.captured(30)
    results = [pending.wait(30) for pending in pendings]
    assert [result.step for result in results] == [0, 1, 2]
    assert all(result.bytes == results[0].bytes > world_size * 12_000 for result in results)
    assert all(pending.done() for pending in pendings)
    pids = agent_pids(saver)
    saver.close()
    return pids


def test_three_nodes_save_together_each_by_an_agent_of_its_own(tmp_path: Path) -> None:
    pids = run_ranks(save_three, 5, str(tmp_path))
    assert all(found == pids[0] for found in pids)
    assert len(set(pids[0].values())) == 3
    for step in range(3):
        assert_saved(tmp_path / f"step_{step}", 5, step)
    assert_agents_end(tmp_path)


def die_when_captured(rank: int, world_size: int, folder: str) -> None:
    saver = saver_on(rank, folder)
    saver.save(state_of(rank, 1), f"{folder}/run/step_1").captured(30)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_every_rank_captured_is_committed_although_the_trainers_of_all_nodes_are_killed(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    results = run_ranks(die_when_captured, 4, str(tmp_path), allow_death=True)
    assert all(isinstance(result, Killed) for result in results)
    assert not (tmp_path / "run" / "step_1" / "manifest.json").exists()
    (tmp_path / "hold").unlink()
    until((tmp_path / "run" / "step_1" / "manifest.json").exists, "the agents to commit")
    assert_saved(tmp_path / "run" / "step_1", 4, 1)
    assert_agents_end(tmp_path)


# --- who failed


def lose_an_agent(rank: int, world_size: int, folder: str, node: str, how: signal.Signals) -> str:
    saver = saver_on(rank, folder)
    saver.save(state_of(rank, 0), f"{folder}/run/step_0").wait(30)
    pids = agent_pids(saver)
    if rank == 0:
        Path(folder, f"hold-{node}").touch()
    dist.barrier()
    pending = saver.save(state_of(rank, 1), f"{folder}/run/step_1")
    pending.captured(30)
    dist.barrier()
    if rank == 1:
        os.kill(pids[node], how)
    text = failure_of(pending)
    dist.barrier()
    if rank == 0:
        Path(folder, f"hold-{node}").unlink()
    dist.barrier()
    # a failure is raised at the next use as well, on every rank
    with pytest.raises(CheckpointError):
        saver.save(state_of(rank, 2), f"{folder}/run/step_2")
    saver.save(state_of(rank, 2), f"{folder}/run/step_2").wait(30)
    assert agent_pids(saver)[node] != pids[node]
    if rank == 1 and how == signal.SIGSTOP:
        os.kill(pids[node], signal.SIGCONT)
    saver.close()
    return text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_agent_that_is_lost_fails_the_save_by_name_and_the_next_one_works(
    how: signal.Signals, tmp_path: Path
) -> None:
    texts = run_ranks(lose_an_agent, 5, str(tmp_path), "b", how)
    for rank in (0, 1, 4):
        assert re.search(r"node b.*part of ranks 2, 3 on node b", texts[rank]), texts[rank]
    for rank in (2, 3):
        assert f"the agent of node b, which rank {rank} saves through" in texts[rank]
    assert_saved(tmp_path / "run" / "step_0", 5, 0)
    assert_saved(tmp_path / "run" / "step_2", 5, 2)
    if how == signal.SIGSTOP:
        # it wakes up, hears that it was given up, and cleans up after itself
        assert_agents_end(tmp_path)
    until(lambda: sorted(os.listdir(tmp_path / "run")) == ["step_0", "step_2"], "what failed to be removed")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_agent_that_commits_fails_the_save_by_name_and_the_next_one_works(
    how: signal.Signals, tmp_path: Path
) -> None:
    texts = run_ranks(lose_an_agent, 4, str(tmp_path), "a", how)
    for rank in (0, 1):
        assert f"the agent of node a, which rank {rank} saves through" in texts[rank]
    for rank in (2, 3):
        assert "the agent of node a (ranks 0, 1), which commits, is gone" in texts[rank]
    assert_saved(tmp_path / "run" / "step_0", 4, 0)
    assert_saved(tmp_path / "run" / "step_2", 4, 2)
    try:
        assert_saved(tmp_path / "run" / "step_1", 4, 1)
        # one that was only frozen goes on where it was, and commits what everybody had captured; nothing is half done
        assert how == signal.SIGSTOP
    except CheckpointNotFoundError:
        pass


def lose_an_agent_that_is_done(rank: int, world_size: int, folder: str) -> None:
    saver = saver_on(rank, folder)
    if rank == 0:
        Path(folder, "hold-a").touch()
    dist.barrier()
    pending = saver.save(state_of(rank, 1), f"{folder}/run/step_1")
    pending.captured(30)
    pids = agent_pids(saver)
    if rank == 0:
        until(lambda: "still being written: 0 on node a, 1 on node a" in too_early(pending), "node b to have written")
        os.kill(pids["b"], signal.SIGKILL)
        until(lambda: not saver.agent.alive(), "the leading agent to notice")
        Path(folder, "hold-a").unlink()
        pending.wait(30)
    dist.barrier()
    # also where the agent is gone that could have told
    assert pending.wait(30).path == f"{folder}/run/step_1"
    saver.save(state_of(rank, 2), f"{folder}/run/step_2").wait(30)
    saver.close()


def too_early(pending: PendingSave) -> str:
    with pytest.raises(SaveFailedError) as caught:
        pending.wait(0.05)
    return str(caught.value)


def test_an_agent_that_is_lost_after_it_has_written_harms_nothing(tmp_path: Path) -> None:
    run_ranks(lose_an_agent_that_is_done, 4, str(tmp_path))
    for step in (1, 2):
        assert_saved(tmp_path / "run" / f"step_{step}", 4, step)


def lose_a_rank(rank: int, world_size: int, folder: str) -> str:
    saver = saver_on(rank, folder)
    saver.save(state_of(rank, 0), f"{folder}/run/step_0").wait(30)
    if rank == 3:
        capturing._copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return failure_of(saver.save(state_of(rank, 1), f"{folder}/run/step_1"))


def test_a_rank_that_dies_before_its_capture_is_named_with_its_node(tmp_path: Path) -> None:
    texts = run_ranks(lose_a_rank, 4, str(tmp_path), allow_death=True)
    assert isinstance(texts.pop(), Killed)
    assert all("rank 3 on node b ended before" in text for text in texts)
    until(lambda: os.listdir(tmp_path / "run") == ["step_0"], "what failed to be removed")


def save_to_a_full_disk(saver: AsyncSaver, rank: int, path: str, folder: str) -> PendingSave:
    """A save that fails on node b, which is told and over; the disk has room again."""
    if rank == 0:
        Path(folder, "full-b").touch()
    dist.barrier()
    pending = saver.save(state_of(rank, 1), path)
    failure_of(pending)
    dist.barrier()
    if rank == 0:
        Path(folder, "full-b").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="No space left"):
        saver.save(state_of(rank, 2), path)
    return pending


def fill_a_disk(rank: int, world_size: int, folder: str) -> str:
    saver = saver_on(rank, folder)
    failed = save_to_a_full_disk(saver, rank, f"{folder}/run/step_1", folder)
    saver.save(state_of(rank, 2), f"{folder}/run/step_2").wait(30)
    saver.close()
    return failure_of(failed)


def test_what_another_node_can_not_write_fails_on_all_ranks_with_the_reason(tmp_path: Path) -> None:
    texts = run_ranks(fill_a_disk, 4, str(tmp_path))
    assert all(re.search(r"rank [23]'s part could not be written: .*No space left", text) for text in texts)
    assert_saved(tmp_path / "run" / "step_2", 4, 2)
    assert os.listdir(tmp_path / "run") == ["step_2"]


def time_out(rank: int, world_size: int, folder: str) -> None:
    saver = saver_on(rank, folder)
    if rank == 0:
        Path(folder, "hold-b").touch()
    dist.barrier()
    pending = saver.save(state_of(rank, 1), f"{folder}/run/step_1")
    pending.captured(30)
    with pytest.raises(SaveFailedError, match="part is still being written: 2 on node b, 3 on node b"):
        pending.wait(0.5)
    dist.barrier()
    if rank == 0:
        Path(folder, "hold-b").unlink()
    pending.wait(30)
    saver.close()


def test_a_wait_that_is_too_short_names_the_ranks_waited_for_and_harms_nothing(tmp_path: Path) -> None:
    run_ranks(time_out, 4, str(tmp_path))
    assert_saved(tmp_path / "run" / "step_1", 4, 1)


def start_on_a_broken_node(rank: int, world_size: int, folder: str) -> None:
    saver = saver_on(rank, folder)
    if rank == 2:

        def fails() -> str:
            raise SaveFailedError("there is no room for an agent here")

        saver = AsyncSaver(launcher=fails)
    with pytest.raises(SaveFailedError, match="no room for an agent"):
        saver.save(state_of(rank, 1), f"{folder}/run/step_1")
    # nothing is half joined: the next one starts from the beginning
    saver_on(rank, folder).save(state_of(rank, 2), f"{folder}/run/step_2").wait(30)


def test_a_node_where_no_agent_starts_fails_the_save_everywhere_and_leaves_no_other_agent(tmp_path: Path) -> None:
    run_ranks(start_on_a_broken_node, 4, str(tmp_path))
    assert_agents_end(tmp_path)
    assert os.listdir(tmp_path / "run") == ["step_2"]


def bad_name(rank: int, world_size: int, folder: str) -> None:
    os.environ["CKPT_NODE"] = "../up" if rank else "a"
    with pytest.raises(ConfigurationError, match="no name of a node"):
        AsyncSaver().save(state_of(rank, 0), f"{folder}/step_0")


def test_a_node_with_a_name_that_could_leave_a_folder_is_refused(tmp_path: Path) -> None:
    run_ranks(bad_name, 2, str(tmp_path))


# --- handles that are asked long afterwards


def ask_late(rank: int, world_size: int, folder: str) -> None:
    saver = saver_on(rank, folder)
    saves = [saver.save(state_of(rank, step), f"{folder}/run/step_{step}") for step in (0, 1)]
    saves[1].wait(30)
    saves.append(save_to_a_full_disk(saver, rank, f"{folder}/run/step_2", folder))
    saves += [saver.save(state_of(rank, step), f"{folder}/run/step_{step}") for step in (3, 4)]
    saves[-1].wait(30)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"rank [23]'s part could not be written: .*No space left"):
        saves.pop(2).wait(20)
    assert all(save.wait(20).bytes > world_size * 12_000 for save in saves)
    assert time.monotonic() - begin < 20
    saver.close()


def test_what_became_of_a_save_is_known_long_afterwards(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("1")
    run_ranks(ask_late, 4, str(tmp_path))


# --- whoever dies when


def kill_at_random(rank: int, world_size: int, folder: str, rounds: int, seed: int) -> list[str]:
    """Save step after step, killing the agent of a node drawn by chance after a time drawn by chance."""
    chance = random.Random(seed)
    saver = saver_on(rank, folder)
    told = []
    for step in range(1, rounds + 1):
        node, delay, where = chance.choice("abc"), chance.random() / 15, chance.choice(["", "{node}/"])
        saver.start(Collective())
        Path(folder, f"pid-{NODES[rank]}").write_text(str(pid_of(saver)))
        dist.barrier()
        told.append(
            save_or_say_why(saver, rank, step, f"{folder}/{where}run/step_{step}", (Path(folder, f"pid-{node}"), delay))
        )
        dist.barrier()
    lost = torch.ones(())
    while lost.any():
        # what was lost is told once; what comes then works
        why = save_or_say_why(saver, rank, 0, f"{folder}/run/last_{len(told)}")
        told.append(why)
        lost = torch.tensor(float(why != "committed"))
        dist.all_reduce(lost, dist.ReduceOp.MAX)
    assert len(told) <= rounds + 3
    saver.close()
    return told


def kill_agent(pid: Path) -> None:
    """Kill the process that a file names, unless it has ended already."""
    with contextlib.suppress(OSError):
        if b"held_agent" in Path("/proc", pid.read_text(), "cmdline").read_bytes():
            os.kill(int(pid.read_text()), signal.SIGKILL)


def save_or_say_why(saver: AsyncSaver, rank: int, step: int, path: str, kill: tuple[Path, float] | None = None) -> str:
    """Save, and some seconds after that was asked for, kill the process that is named in the file `kill[0]`."""
    killer = None
    if rank == 0 and kill is not None:
        killer = threading.Timer(kill[1], kill_agent, [kill[0]])
        killer.start()
    try:
        saver.save(state_of(rank, step), path).wait(30)
    except CheckpointError as error:
        return str(error)
    finally:
        if killer is not None:
            killer.join()
    return "committed"


@pytest.mark.parametrize(
    ("rounds", "seed"), [(4, 1), *(pytest.param(100, seed, marks=pytest.mark.soak) for seed in range(2, 8))]
)
def test_whichever_agent_dies_when_a_save_is_whole_or_absent_and_the_next_one_works(
    rounds: int, seed: int, tmp_path: Path
) -> None:
    everyone = run_ranks(kill_at_random, 5, str(tmp_path), rounds, seed, timeout=280)
    whole = 0
    for step in range(1, rounds + 1):
        for path in (tmp_path / "run" / f"step_{step}", tmp_path / "{node}" / "run" / f"step_{step}"):
            try:
                assert_saved(path, 5, step)
                whole += 1
            except CheckpointNotFoundError:
                pass
        committed = [told[step - 1] == "committed" for told in everyone]
        if any(committed):
            assert any(
                (tmp_path / where / "run" / f"step_{step}" / "manifest.json").exists() for where in ("", "a", "b", "c")
            )
    print(f"{rounds} agents were killed; {whole} saves were committed, {rounds - whole} were lost")
    assert_agents_end_or_were_killed(tmp_path)


def assert_agents_end_or_were_killed(folder: Path) -> None:
    """The homes of those that were killed last are still there, unlocked; whoever starts an agent removes them."""
    make = make_home()
    shutil.rmtree(make.path)
    os.close(make.lock)
    assert_agents_end(folder)
