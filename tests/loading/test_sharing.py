"""Ranks of a node read what they have in common once: the same bytes as each for itself, and no failure is a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckpt
from ckpt.loading import load as loading
from ckpt.loading import node, sharing
from ckpt.loading.batches import make_batches, merged
from ckpt_formats.errors import CheckpointError, CorruptionError, RankError
from tests.ranks import Killed, run_ranks

ROWS, COLUMNS = 1536, 1000


def whole(index: int) -> torch.Tensor:
    """A tensor of 6 MB, the same on every rank."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + index


def cut(world: int, dim: int, *, zero: bool = False) -> dict[str, torch.Tensor]:
    """Three large tensors cut along a dimension, and small ones that every rank has."""
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, torch.Tensor] = {}
    for index in range(3):
        state[f"w{index}"] = distribute_tensor(whole(index), mesh, [Shard(dim)])
        state[f"half{index}"] = distribute_tensor(whole(index)[:, :77].bfloat16(), mesh, [Shard(dim)])
        state[f"norm{index}"] = torch.arange(101.0) + index
    if zero:
        for tensor in state.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    return state


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (tensor, expected[name]))
        assert torch.equal(a, b), name


def share_everything() -> None:
    """As if what the tests load were large."""
    loading.LITTLE = 0
    sharing.SLOT = 1 << 20


def rows_to_columns(rank: int, world: int, path: Path, compress: bool) -> tuple[int, int]:
    share_everything()
    ckpt.save({"m": cut(world, 0)}, path, compress=compress)
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, path)
    assert_equal(target, cut(world, 1))
    return result.bytes_read, result.bytes_needed


@pytest.mark.parametrize("compress", [False, True])
def test_rows_are_loaded_into_columns_and_every_block_is_read_once(compress: bool, tmp_path: Path) -> None:
    costs = run_ranks(rows_to_columns, 4, tmp_path / "a", compress)
    stored = sum(file.stat().st_size for file in (tmp_path / "a" / "data").iterdir())
    assert sum(read for read, _ in costs) <= 1.05 * stored
    # no rank reads for all
    assert max(read for read, _ in costs) <= 0.6 * stored


def casts(rank: int, world: int, path: Path, compress: bool) -> int:
    share_everything()
    ckpt.save({"m": cut(world, 0)}, path, compress=compress)
    dtypes = {"w0": torch.bfloat16, "w1": torch.float64, "half2": torch.float32, "norm1": torch.float16}
    target = {n: t.to(dtypes.get(n, t.dtype)) for n, t in cut(world, 1, zero=True).items()}
    # one that lies otherwise in memory than on disk, and has to be cast too
    target["w2"] = DTensor.from_local(
        torch.zeros(COLUMNS // world, ROWS, dtype=torch.float64).t(), init_device_mesh("cpu", (world,)), [Shard(1)]
    )
    result = ckpt.load({"m": target}, path, cast=True)
    assert_equal(target, {n: t.to(target[n].dtype) for n, t in cut(world, 1).items()})
    return result.bytes_read


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_cast_is_read_once_too(compress: bool, tmp_path: Path) -> None:
    costs = run_ranks(casts, 4, tmp_path / "a", compress)
    stored = sum(file.stat().st_size for file in (tmp_path / "a" / "data").iterdir())
    assert sum(costs) <= 1.05 * stored


def to_device(rank: int, world: int, path: Path) -> int:
    share_everything()
    model = {f"w{index}": whole(index) for index in range(3)}
    ckpt.save({"m": model}, path)
    target = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in model.items()}
    target["w1"] = torch.zeros(COLUMNS, ROWS, device="cuda", dtype=torch.float64).t()
    result = ckpt.load({"m": target}, path, cast=True)
    assert_equal({name: tensor.cpu().float() for name, tensor in target.items()}, model)
    return result.bytes_read


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_every_rank_has_on_a_device_is_read_by_one(tmp_path: Path) -> None:
    assert sum(run_ranks(to_device, 2, tmp_path / "a")) <= 1.05 * 3 * ROWS * COLUMNS * 4


def replicated(rank: int, world: int, path: Path) -> tuple[int, int]:
    share_everything()
    model = {f"w{index}": whole(index) for index in range(4)}
    ckpt.save({"m": model}, path)
    target = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    # one that others do not have, and one in other memory than it has on disk
    target["w1"] = torch.zeros(COLUMNS, ROWS).t()
    if rank == 2:
        del target["w3"]
    result = ckpt.load({"m": target}, path, strict=False)
    assert_equal(target, model)
    return result.bytes_read, result.bytes_needed


def test_what_every_rank_has_is_read_by_one(tmp_path: Path) -> None:
    costs = run_ranks(replicated, 3, tmp_path / "a")
    assert sum(read for read, _ in costs) <= 1.05 * 4 * ROWS * COLUMNS * 4


def mixed(rank: int, world: int, path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    saved = {f"w{i}": distribute_tensor(whole(i), mesh, [Shard(0), Shard(1)]) for i in range(3)}
    ckpt.save({"m": saved}, path)
    share_everything()
    for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(1), Shard(0)]):
        target = {f"w{i}": distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, placements) for i in range(3)}
        ckpt.load({"m": target}, path)
        assert_equal(target, {f"w{i}": distribute_tensor(whole(i), mesh, placements) for i in range(3)})


def test_any_cut_is_the_same_shared(tmp_path: Path) -> None:
    run_ranks(mixed, 4, tmp_path / "a")


def same_cut(rank: int, world: int, path: Path) -> None:
    share_everything()

    def refuse(*_: Any) -> None:
        raise AssertionError("there is nothing to share")

    sharing.Meeting = refuse  # type: ignore[assignment,misc]
    mesh = init_device_mesh("cpu", (world,))
    state = {"w": distribute_tensor(whole(0), mesh, [Shard(0)])}
    ckpt.save({"m": state}, path)
    target = {"w": distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Shard(0)])}
    ckpt.load({"m": target}, path)
    assert_equal(target, state)


def test_ranks_that_have_nothing_in_common_do_not_talk(tmp_path: Path) -> None:
    run_ranks(same_cut, 2, tmp_path / "a")


def other_nodes(rank: int, world: int, path: Path) -> int:
    share_everything()
    os.environ["CKPT_NODE"] = f"node{rank // 2}"
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, path)
    assert_equal(target, cut(world, 1))
    return result.bytes_read


def test_each_node_reads_for_itself(tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 4, tmp_path / "a", False)
    stored = sum(file.stat().st_size for file in (tmp_path / "a" / "data").iterdir())
    read = run_ranks(other_nodes, 4, tmp_path / "a")
    for first in (0, 2):
        assert 0.9 * stored <= read[first] + read[first + 1] <= 1.05 * stored


def damaged(rank: int, world: int, path: Path) -> tuple[str, str, float]:
    share_everything()
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        ckpt.load({"m": cut(world, 1, zero=True)}, path)
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_an_error_on_every_rank_that_names_the_file_and_says_what_was_touched(
    how: str, tmp_path: Path
) -> None:
    run_ranks(rows_to_columns, 4, tmp_path / "a", False)
    file = sorted((tmp_path / "a" / "data").iterdir())[2]
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    for kind, text, seconds in run_ranks(damaged, 4, tmp_path / "a"):
        assert kind == CorruptionError.__name__
        assert file.name in text
        assert "overwritten in part" in text
        assert seconds < 20


def dies(rank: int, world: int, path: Path, victim: int) -> tuple[str, float]:
    share_everything()
    target = cut(world, 1, zero=True)
    if rank == victim:
        fetch = sharing._Round._fetch
        left = [2]

        def die(self: Any, *arguments: Any, **options: Any) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            fetch(self, *arguments, **options)

        sharing._Round._fetch = die  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        ckpt.load({"m": target}, path)
    seconds = time.monotonic() - began
    dist.destroy_process_group()
    return str(caught.value), seconds


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_is_an_error_on_every_other_rank_within_seconds(victim: int, tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 4, tmp_path / "a", False)
    before = set(os.listdir("/dev/shm"))
    answers = run_ranks(dies, 4, tmp_path / "a", victim, allow_death=True)
    assert isinstance(answers.pop(victim), Killed)
    for text, seconds in answers:
        assert "overwritten in part" in text
        assert seconds < 20
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "load" in name}


def not_connected(rank: int, world: int, path: Path) -> int:
    share_everything()
    if rank == 1:

        def refuse(*_: Any) -> None:
            raise PermissionError("no sockets here")

        node._connect = refuse  # type: ignore[assignment]
    node.MEET_S = 2.0
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, path)
    assert_equal(target, cut(world, 1))
    return result.bytes_read


def test_ranks_that_can_not_share_read_for_themselves(tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 2, tmp_path / "a", False)
    run_ranks(not_connected, 2, tmp_path / "a")


@st.composite
def needs(draw: st.DrawFn) -> tuple[list[np.ndarray[Any, np.dtype[np.int64]]], dict[tuple[int, int], list[set[int]]]]:
    """Needs of some ranks in blocks of 8 bytes, and the ranks that need each block of each chunk."""
    chunks = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 9)), max_size=6, unique=True))
    world = draw(st.integers(1, 5))
    lengths = {(page, row): blocks * 8 - draw(st.integers(0, 7)) for page, row, blocks in chunks}
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
    blocks_of = {chunk: [set() for _ in range(-(-length // 8))] for chunk, length in lengths.items()}
    for number, (chunk, length) in enumerate(lengths.items()):
        count = len(blocks_of[chunk])
        for rank in range(world):
            for first in draw(st.lists(st.integers(0, count - 1), max_size=3)):
                last = draw(st.integers(first + 1, count))
                stop = min(last * 8, length)
                rows[rank].append((*chunk, first * 8, stop, number % 2, 1000 * number + first * 8))
                for block in range(first, last):
                    blocks_of[chunk][block].add(rank)
    return [merged(np.array(own, np.int64).reshape(-1, 6)) for own in rows], blocks_of


@given(needs(), st.sampled_from([8, 16, 40]))
def test_every_block_that_several_ranks_need_is_in_one_batch_of_one_of_them(
    drawn: tuple[list[np.ndarray[Any, np.dtype[np.int64]]], dict[tuple[int, int], list[set[int]]]], size: int
) -> None:
    given_needs, blocks_of = drawn
    found: dict[tuple[int, int, int], AbstractSet[int]] = {}
    ranks = list(range(len(given_needs)))
    for batch in make_batches(given_needs, [[rank] for rank in ranks], [ranks], 0, size):
        assert batch.nbytes <= size
        assert batch.taker in batch.readers
        assert (batch.origin, batch.onward) == (None, None)
        for extent in batch.extents:
            assert extent.first % 8 == 0
            for block in range(extent.first // 8, -(-extent.last // 8)):
                key = (extent.page, extent.row, block)
                assert key not in found
                found[key] = batch.readers
    expected = {
        (*chunk, block): ranks
        for chunk, blocks in blocks_of.items()
        for block, ranks in enumerate(blocks)
        if len(ranks) > 1
    }
    assert found == expected
