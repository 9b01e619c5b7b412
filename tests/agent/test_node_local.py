"""Node-local disks: each node writes to its own, they commit together, and all disks are one whole."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ckpt
from ckpt.collective import Collective
from ckpt.levels.prune import prune
from ckpt.loop.roots import share_roots
from ckpt.storage.facts import update_facts
from ckpt.transfer.copy import copy, copy_part
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    SaveFailedError,
    StateError,
)
from ckpt_formats.facts import read_facts
from ckpt_formats.geometry import Box
from ckpt_formats.reading import Request
from ckpt_formats.runs import State, find_checkpoints
from ckpt_formats.verify import verify
from tests.agent.test_async_save import until
from tests.agent.test_nodes import NODES, agent_pids, assert_agents_end, assert_saved, failure_of, saver_on, state_of
from tests.ranks import run_ranks


def save_twice(rank: int, world_size: int, folder: str) -> str:
    saver = saver_on(rank, folder)
    for step in (1, 2):
        result = saver.save(state_of(rank, step), f"{folder}/{{node}}/run/step_{step}").wait(30)
    # the same ranks on the same nodes read what they need from their own disks
    state = state_of(rank, 0)
    ckpt.load(state, f"{folder}/{{node}}/run/step_2")
    shard = state["w"]
    assert isinstance(shard, ckpt.Shard)
    assert shard.local[0, 0] == 200 + rank
    saver.close()
    return result.path


def names_in(folder: Path) -> set[str]:
    return {path.name[:5] for path in (folder / "data").iterdir()}


def test_each_node_keeps_its_part_and_the_whole_is_read_from_all_folders(tmp_path: Path) -> None:
    paths = run_ranks(save_twice, 4, str(tmp_path))
    assert paths == [str(tmp_path / node / "run" / "step_2") for node in "aabb"]
    a, b = (tmp_path / node / "run" / "step_1" for node in "ab")
    assert names_in(a) == {"00000", "00001"}
    assert names_in(b) == {"00002", "00003"}
    assert (a / "manifest.json").read_bytes() == (b / "manifest.json").read_bytes()
    everywhere = tmp_path / "{node}" / "run"
    # named as it was saved, or by any node's folder
    for path in (everywhere / "step_1", a, b):
        assert_saved(path, 4, 1)
        assert verify(path).damage == []
    assert [item.state for item in find_checkpoints(everywhere)] == [State.WHOLE, State.WHOLE]
    assert [item.step for item in find_checkpoints(tmp_path / "b" / "run")] == [1, 2]


def test_of_a_node_that_is_gone_everybody_says_what_is_missing(tmp_path: Path) -> None:
    run_ranks(save_twice, 4, str(tmp_path))
    shutil.rmtree(tmp_path / "b")
    for path in (tmp_path / "{node}" / "run" / "step_1", tmp_path / "a" / "run" / "step_1"):
        with (
            ckpt.open(path) as checkpoint,
            pytest.raises(CorruptionError, match="node b's files are missing: data/00002"),
        ):
            checkpoint["w"][:]
        (item,) = find_checkpoints(path)
        assert item.state is State.PARTIAL
        assert "node b's files are missing: data/00002" in str(item.problem)
        assert "data/00003" in str(item.problem)
        assert "which lies on node b" in " ".join(damage.what for damage in verify(path).damage)
    # the other node's part is still there
    rows = np.empty((20, 300), np.float32)
    with ckpt.open(tmp_path / "{node}" / "run" / "step_1") as checkpoint:
        checkpoint.read([Request("w", Box((0, 0), (20, 300)), rows)])
    assert rows[:, 0].tolist() == [100.0] * 10 + [101.0] * 10


def test_a_checkpoint_that_was_moved_is_found_by_where_it_is_not_by_what_it_says(tmp_path: Path) -> None:
    run_ranks(save_twice, 4, str(tmp_path))
    for node in "ab":
        shutil.move(tmp_path / node, tmp_path / "moved" / node)
    assert_saved(tmp_path / "moved" / "{node}" / "run" / "step_1", 4, 1)
    # other nodes' folders are not looked for where the manifest says they were
    shutil.copytree(tmp_path / "moved" / "b", tmp_path / "b")
    with ckpt.open(tmp_path / "moved" / "a" / "run" / "step_1") as checkpoint, pytest.raises(CorruptionError):
        checkpoint["w"][:]


def lose_a_node(rank: int, world_size: int, folder: str) -> str:
    saver = saver_on(rank, folder)
    saver.save(state_of(rank, 1), f"{folder}/{{node}}/run/step_1").wait(30)
    pids = agent_pids(saver)
    if rank == 0:
        Path(folder, "hold-b").touch()
    dist.barrier()
    pending = saver.save(state_of(rank, 2), f"{folder}/{{node}}/run/step_2")
    pending.captured(30)
    dist.barrier()
    if rank == 0:
        os.kill(pids["b"], signal.SIGKILL)
    text = failure_of(pending)
    dist.barrier()
    if rank == 0:
        Path(folder, "hold-b").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError):
        saver.save(state_of(rank, 3), f"{folder}/{{node}}/run/step_3")
    saver.save(state_of(rank, 3), f"{folder}/{{node}}/run/step_3").wait(30)
    saver.close()
    return text


def test_a_node_that_is_lost_before_it_has_written_fails_the_save_on_all_disks(tmp_path: Path) -> None:
    texts = run_ranks(lose_a_node, 4, str(tmp_path))
    assert all("node b" in text for text in texts)
    for step in (1, 3):
        assert_saved(tmp_path / "{node}" / "run" / f"step_{step}", 4, step)
    with pytest.raises(CheckpointNotFoundError, match=r"none of the nodes"):
        ckpt.open(tmp_path / "{node}" / "run" / "step_2")
    until(lambda: not (tmp_path / "a" / "run" / "step_2").exists(), "the other node's part to be removed")
    assert_agents_end(tmp_path)


def test_a_synchronous_save_to_node_local_disks_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"for ckpt\.async_save"):
        ckpt.save({"w": torch.zeros(3)}, tmp_path / "{node}" / "step_1")
    assert list(tmp_path.iterdir()) == []


def test_one_node_alone_may_name_its_disk_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(save_alone, 1, str(tmp_path))
    with ckpt.open(tmp_path / "{node}" / "step_1") as checkpoint:
        assert torch.equal(checkpoint["w"][:], torch.arange(3))
    assert os.listdir(tmp_path) == ["only"]


def save_alone(rank: int, world_size: int, folder: str) -> None:
    os.environ["CKPT_NODE"] = "only"
    ckpt.async_save({"w": torch.arange(3)}, f"{folder}/{{node}}/step_1").wait(30)


def test_facts_and_pruning_reach_every_disk(tmp_path: Path) -> None:
    run_ranks(save_twice, 4, str(tmp_path))
    everywhere = tmp_path / "{node}" / "run"
    update_facts(everywhere / "step_1", lambda facts: facts.changed(tags=["good"]))
    assert all(read_facts(path).tags for path in (everywhere / "step_1", *(tmp_path / n / "run/step_1" for n in "ab")))
    assert prune(everywhere, 1).removed == []
    update_facts(everywhere / "step_1", lambda facts: facts.changed(untag=["good"]))
    assert len(prune(everywhere, 1).removed) == 2
    for node in "ab":
        assert os.listdir(tmp_path / node / "run") == ["step_2"]
    # what a node sees when the others' disks are out of reach is as whole as it can be, and goes by the same rule
    shutil.rmtree(tmp_path / "a")
    (item,) = find_checkpoints(tmp_path / "b" / "run")
    assert (item.state, item.elsewhere) == (State.PARTIAL, True)
    assert [kept.why for kept in prune(tmp_path / "b" / "run", 1).kept] == ["newest"]


# --- a node that has no manifest of what is committed


def go_on(rank: int, world_size: int, folder: str) -> None:
    """Each rank reaches its own node's disk alone."""
    share_roots(f"{folder}/reached-{NODES[rank]}/{{node}}/run", Collective())


def test_a_node_without_the_manifest_of_what_it_has_a_part_of_gets_it_from_another(tmp_path: Path) -> None:
    run_ranks(save_twice, 4, str(tmp_path))
    b = tmp_path / "b" / "run"
    (b / "step_2" / "manifest.json").unlink()
    shutil.rmtree(b / "step_2" / "index")
    # of a save that failed, and of what is damaged, nothing is made a checkpoint
    (b / "step_1" / "manifest.json").unlink()
    next((b / "step_1" / "data").glob("00002-*")).unlink()
    (b / "step_9" / "data").mkdir(parents=True)
    for node in "ab":
        (tmp_path / f"reached-{node}").mkdir()
        (tmp_path / f"reached-{node}" / node).symlink_to(tmp_path / node)
    for _ in range(2):
        run_ranks(go_on, 4, str(tmp_path))
        assert sorted(path.parent.name for path in b.glob("*/manifest.json")) == ["step_2"]
    assert_saved(tmp_path / "{node}" / "run" / "step_2", 4, 2)
    shutil.rmtree(tmp_path / "a")
    (item,) = (item for item in find_checkpoints(b) if item.state is not State.NOT_COMMITTED)
    assert (item.step, item.state, item.elsewhere) == (2, State.PARTIAL, True)
    assert "node a's files are missing" in str(item.problem)


# --- from node-local disks to what all nodes share


def train(rank: int, world_size: int, folder: str, last: int) -> None:
    os.environ["CKPT_NODE"] = NODES[rank]
    weight = torch.zeros(10, 300)
    state: dict[str, object] = {"w": ckpt.Shard(weight, (10 * world_size, 300), (10 * rank, 0))}
    tiers = [ckpt.Disk(f"{folder}/{{node}}/run", keep=2), ckpt.Disk(f"{folder}/shared")]
    with ckpt.Checkpointer(f"{folder}/run", state, every=1, tiers=tiers) as run:
        for step in run.steps(last):
            weight.fill_(100 * step + rank)


def test_node_local_checkpoints_flow_to_a_further_level_part_by_part_and_are_pruned_on_each_node(
    tmp_path: Path,
) -> None:
    run_ranks(train, 4, str(tmp_path), 5, timeout=120)
    shared = tmp_path / "shared"
    until(lambda: len(find_checkpoints(shared)) == 5, "all to be there")
    for item in find_checkpoints(shared):
        assert item.state is State.WHOLE
        assert item.step is not None
        assert_saved(Path(item.path), 4, item.step)
    for node in "ab":
        until(lambda node=node: len(os.listdir(tmp_path / node / "run")) == 2, f"node {node} to be pruned")
        assert sorted(os.listdir(tmp_path / node / "run")) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize("store", ["folder", "memory"])
def test_a_copy_waits_for_the_parts_of_nodes_that_it_can_not_reach(store: str, tmp_path: Path) -> None:
    run_ranks(save_twice, 4, str(tmp_path))
    # from now on this is what node a sees: its own folder; node b's is elsewhere
    shutil.move(tmp_path / "b", tmp_path / "elsewhere" / "b")
    a, b = tmp_path / "a" / "run" / "step_1", tmp_path / "elsewhere" / "b" / "run" / "step_1"
    target = f"memory://parts-{os.getpid()}/step_1" if store == "memory" else str(tmp_path / "target" / "step_1")
    with pytest.raises(SaveFailedError, match="not all is there yet: node b's files are missing"):
        copy(a, target)
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(target)
    assert copy_part(b, target) > 2 * 12_000
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(target)
    copy(a, target)
    assert_saved(target, 4, 1)
    assert verify(target).damage == []
    # it is there: nobody brings anything again
    assert copy_part(b, target) == 0
