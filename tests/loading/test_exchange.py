"""Nodes pass on to each other what several of them need: each byte leaves the store once, and no failure is a hang."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckpt
from benchmarks.two_nodes import enter
from ckpt.loading import exchange, sharing
from ckpt.loading.batches import Batch, make_batches
from ckpt_formats.errors import CheckpointError, ConfigurationError, CorruptionError, RankError
from tests.loading.test_buffers import NOISE, drop, resident
from tests.loading.test_sharing import COLUMNS, ROWS, assert_equal, cut, needs, rows_to_columns, share_everything, whole
from tests.ranks import Killed, run_ranks

Costs = list[tuple[int, int]]
"""By rank: bytes read, bytes that came from other nodes."""


def be_on_a_node(rank: int, ranks_per_node: int) -> None:
    """As if ranks were on several nodes, and what the tests load were large."""
    share_everything()
    os.environ["CKPT_NODE"] = f"node{rank // ranks_per_node}"


def stored(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "data").iterdir())


def columns(rank: int, world: int, path: Path, ranks_per_node: int, how: str = "always") -> tuple[int, int]:
    be_on_a_node(rank, ranks_per_node)
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, path, exchange=how)  # type: ignore[arg-type]
    assert_equal(target, cut(world, 1))
    return result.bytes_read, result.bytes_received


@pytest.mark.parametrize(("ranks_per_node", "compress"), [(1, False), (2, True)])
def test_each_block_leaves_the_store_once(ranks_per_node: int, compress: bool, tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 4, tmp_path / "a", compress)
    costs = run_ranks(columns, 4, tmp_path / "a", ranks_per_node)
    nodes = 4 // ranks_per_node
    assert sum(read for read, _ in costs) <= 1.05 * stored(tmp_path / "a")
    # no rank reads for all
    assert max(read for read, _ in costs) <= 0.6 * stored(tmp_path / "a")
    # and no node gets anything twice: each has all blocks, decoded
    blocks = sum(tensor.nbytes for tensor in cut_whole().values())
    assert sum(came for _, came in costs) == pytest.approx((nodes - 1) * blocks, rel=0.05)


def cut_whole() -> dict[str, torch.Tensor]:
    return {f"{kind}{i}": whole(i) if kind == "w" else whole(i)[:, :77].bfloat16() for i in range(3) for kind in "wh"}


def replicated(rank: int, world: int, path: Path) -> tuple[int, int]:
    be_on_a_node(rank, 2)
    model = {f"w{index}": whole(index) for index in range(4)}
    ckpt.save({"m": model}, path)
    target = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    result = ckpt.load({"m": target}, path, exchange="always")
    assert_equal(target, model)
    return result.bytes_read, result.bytes_received


def test_replicas_on_five_nodes_read_as_much_as_one(tmp_path: Path) -> None:
    # the last node has one rank
    costs: Costs = run_ranks(replicated, 9, tmp_path / "a")
    size = 4 * ROWS * COLUMNS * 4
    assert sum(read for read, _ in costs) <= 1.05 * size
    for first in range(0, 9, 2):
        read, came = (sum(column) for column in zip(*costs[first : first + 2], strict=True))
        assert read <= 0.3 * size
        assert read + came == size


def hybrid(rank: int, world: int, path: Path) -> tuple[int, int]:
    be_on_a_node(rank, 2)
    mesh = init_device_mesh("cpu", (3, 2))
    saved = {f"w{i}": distribute_tensor(whole(i), mesh, [Replicate(), Shard(0)]) for i in range(3)}
    ckpt.save({"m": saved}, path)
    target = {f"w{i}": distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Replicate(), Shard(0)]) for i in range(3)}
    result = ckpt.load({"m": target}, path, exchange="always")
    assert_equal(target, saved)
    return result.bytes_read, result.bytes_received


def test_shards_that_are_replicated_over_nodes_are_read_once(tmp_path: Path) -> None:
    costs: Costs = run_ranks(hybrid, 6, tmp_path / "a")
    size = 3 * ROWS * COLUMNS * 4
    assert sum(read for read, _ in costs) <= 1.05 * size
    assert max(read for read, _ in costs) <= 0.25 * size
    assert sum(came for _, came in costs) == pytest.approx(2 * size, rel=0.05)


def mixed(rank: int, world: int, path: Path) -> None:
    be_on_a_node(rank, 1 + rank % 2)
    mesh = init_device_mesh("cpu", (2, 2))
    saved = {f"w{i}": distribute_tensor(whole(i), mesh, [Shard(0), Shard(1)]) for i in range(3)}
    ckpt.save({"m": saved}, path)
    for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(1), Shard(0)]):
        target = {f"w{i}": distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, placements) for i in range(3)}
        ckpt.load({"m": target}, path, exchange="always", buffers=4 << 20)
        assert_equal(target, {f"w{i}": distribute_tensor(whole(i), mesh, placements) for i in range(3)})


def test_any_cut_is_the_same_through_few_buffers(tmp_path: Path) -> None:
    run_ranks(mixed, 4, tmp_path / "a")


@pytest.mark.parametrize("how", ["auto", "never"])
def test_nodes_read_for_themselves_what_each_has_at_hand(how: str, tmp_path: Path) -> None:
    # tests write to a file system of this machine, so "auto" does not exchange
    run_ranks(rows_to_columns, 4, tmp_path / "a", False)
    costs: Costs = run_ranks(columns, 4, tmp_path / "a", 2, how)
    assert sum(came for _, came in costs) == 0
    for first in (0, 2):
        assert sum(read for read, _ in costs[first : first + 2]) >= 0.9 * stored(tmp_path / "a")


def unreachable(rank: int, world: int, path: Path) -> tuple[int, int]:
    if rank == 1:
        exchange.listen_address = lambda _: b'[["127.0.0.1"], 1, "node1"]'  # type: ignore[assignment]
        sharing.listen_address = exchange.listen_address
    exchange.CONNECT_S = 2.0
    return columns(rank, world, path, 1)


def test_nodes_that_can_not_reach_each_other_read_for_themselves(tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 2, tmp_path / "a", False)
    costs: Costs = run_ranks(unreachable, 2, tmp_path / "a")
    assert sum(came for _, came in costs) == 0


def peak_of_load(rank: int, world: int, path: Path) -> tuple[int, int]:
    be_on_a_node(rank, 1)
    model = {f"w{i}": torch.full((2048, 4096), i + 1.0) for i in range(4)}
    ckpt.save({"m": model}, path)
    ckpt.load({"m": model}, path, exchange="always")  # imports are not counted
    if rank == 0:
        drop(path)
    dist.barrier()
    before = resident()
    result = ckpt.load({"m": model}, path, exchange="always", buffers=32 << 20)
    return resident(peak=True) - before, result.bytes_received


def test_an_exchange_takes_no_more_memory_than_was_declared(tmp_path: Path) -> None:
    for peak, received in run_ranks(peak_of_load, 2, tmp_path / "a"):
        # half of 128 MiB came from the other node
        assert received >= 60 << 20
        assert peak <= (32 << 20) + NOISE, f"{peak / 2**20:.0f} MiB"


def in_namespaces(rank: int, world: int, path: Path, folder: Path) -> tuple[int, int] | str:
    # threads of a group stay in the namespace that they were started in; who leaves too early is missed
    dist.barrier()
    dist.destroy_process_group()
    try:
        enter(rank, folder, 1000)
    except OSError as error:
        return str(error)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    share_everything()
    # nothing but the namespace says that this is another node
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, path, exchange="always")
    assert_equal(target, cut(world, 1))
    return result.bytes_read, result.bytes_received


def test_two_network_namespaces_exchange_over_the_link_between_them(tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 2, tmp_path / "a", False)
    (tmp_path / "link").mkdir()
    costs = run_ranks(in_namespaces, 2, tmp_path / "a", tmp_path / "link")
    refused = [cost for cost in costs if isinstance(cost, str)]
    if refused:
        pytest.skip(f"no network namespaces with a link here: {refused[0]}")
    assert sum(read for read, _ in costs) <= 1.05 * stored(tmp_path / "a")
    assert min(came for _, came in costs) > 0


def damaged(rank: int, world: int, path: Path) -> tuple[str, str, float]:
    be_on_a_node(rank, 2)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        ckpt.load({"m": cut(world, 1, zero=True)}, path, exchange="always")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damage_is_an_error_on_every_rank_that_names_the_file(how: str, tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 6, tmp_path / "a", False)
    file = sorted((tmp_path / "a" / "data").iterdir())[2]
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
    else:
        del data[len(data) // 2 :]
    file.write_bytes(data)
    for kind, text, seconds in run_ranks(damaged, 6, tmp_path / "a"):
        assert kind == CorruptionError.__name__
        assert file.name in text
        assert "overwritten in part" in text
        assert seconds < 20


def corrupted_on_the_way(rank: int, world: int, path: Path) -> tuple[str, str]:
    if rank == 1:
        send = exchange.Lines.send

        def flip(self: Any, to: int, number: int, data: memoryview) -> None:
            altered = bytearray(data)
            altered[len(altered) // 2] ^= 1
            send(self, to, number, memoryview(altered))

        exchange.Lines.send = flip  # type: ignore[method-assign]
    kind, text, _ = damaged(rank, world, path)
    return kind, text


def test_what_is_altered_on_the_way_is_noticed(tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 4, tmp_path / "a", False)
    for kind, text in run_ranks(corrupted_on_the_way, 4, tmp_path / "a"):
        assert kind == CorruptionError.__name__
        assert "rank 1 passed them on" in text


def dies(rank: int, world: int, path: Path, victim: int, when: str) -> tuple[str, float]:
    be_on_a_node(rank, 2)
    target = cut(world, 1, zero=True)
    if rank == victim:
        left = [3]
        kind, name = {"reading": (sharing._Round, "_fetch"), "passing on": (exchange.Lines, "_push")}[when]
        act: Callable[..., Any] = getattr(kind, name)

        def die(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        setattr(kind, name, die)
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        ckpt.load({"m": target}, path, exchange="always")
    seconds = time.monotonic() - began
    dist.destroy_process_group()
    return str(caught.value), seconds


@pytest.mark.parametrize(("victim", "when"), [(0, "reading"), (2, "passing on"), (5, "passing on")])
def test_a_rank_that_dies_is_an_error_on_every_other_rank_within_seconds(
    victim: int, when: str, tmp_path: Path
) -> None:
    run_ranks(rows_to_columns, 6, tmp_path / "a", False)
    answers = run_ranks(dies, 6, tmp_path / "a", victim, when, allow_death=True)
    assert isinstance(answers.pop(victim), Killed)
    for text, seconds in answers:
        assert "overwritten in part" in text
        assert seconds < 30


def freezes(rank: int, world: int, path: Path, when: str) -> str:
    be_on_a_node(rank, 1)
    os.environ["CKPT_PATIENCE_S"] = "3"
    exchange.FLUSH_S = 0.5

    def keep_little(connection: socket.socket) -> None:
        # as if there were more to pass on than kernels take in
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 1 << 16)

    exchange.keep_alive = keep_little
    pid = path.parent / "frozen"
    if rank == 1:
        left = [3]
        kind, name = {"reading": (sharing._Round, "_fetch"), "receiving": (exchange.Lines, "_come")}[when]
        act: Callable[..., Any] = getattr(kind, name)

        def freeze(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                pid.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return act(*arguments, **options)

        setattr(kind, name, freeze)
    target = {f"w{index}": torch.zeros(ROWS, COLUMNS) for index in range(3)}
    with pytest.raises(RankError) as caught:
        ckpt.load({"m": target}, path, exchange="always", strict=False)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    return str(caught.value)


@pytest.mark.parametrize("when", ["reading", "receiving"])
def test_a_frozen_rank_of_another_node_is_an_error_that_names_it_and_its_node(when: str, tmp_path: Path) -> None:
    run_ranks(rows_to_columns, 2, tmp_path / "a", False)
    text, frozen = run_ranks(freezes, 2, tmp_path / "a", when, allow_death=True)
    assert isinstance(frozen, Killed)
    assert "rank 1 on node node1" in text
    assert "for 3 s" in text
    assert "overwritten in part" in text


def test_a_patience_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt.save({"a": torch.zeros(3)}, tmp_path / "a")
    for said in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("CKPT_PATIENCE_S", said)
        with pytest.raises(ConfigurationError, match="CKPT_PATIENCE_S"):
            ckpt.load({"a": torch.zeros(3)}, tmp_path / "a")


@given(needs(), st.integers(1, 3), st.sampled_from([8, 16, 40]))
def test_every_block_gets_to_every_node_that_needs_it_and_nobody_waits_in_a_circle(
    drawn: tuple[list[np.ndarray[Any, np.dtype[np.int64]]], dict[tuple[int, int], list[set[int]]]],
    per_node: int,
    size: int,
) -> None:
    given_needs, blocks_of = drawn
    ranks = list(range(len(given_needs)))
    nodes = [ranks[at : at + per_node] for at in range(0, len(ranks), per_node)]
    plans = [make_batches(given_needs, [[rank] for rank in ranks], nodes, node, size) for node in range(len(nodes))]
    expected = [
        {
            (*chunk, block): ranks & set(node)
            for chunk, blocks in blocks_of.items()
            for block, ranks in enumerate(blocks)
        }
        for node in nodes
    ]
    several = {key: ranks for key, ranks in needing_of(blocks_of).items() if len(ranks) > 1}
    for plan, wanted in zip(plans, expected, strict=True):
        blocks = {block: batch.readers for batch in plan for block in blocks_in(batch)}
        assert blocks == {key: ranks for key, ranks in wanted.items() if ranks and key in several}
    assert delivered(plans) == {(rank, key) for key, ranks in several.items() for rank in ranks}


def needing_of(blocks_of: dict[tuple[int, int], list[set[int]]]) -> dict[tuple[int, int, int], set[int]]:
    return {(*chunk, block): ranks for chunk, blocks in blocks_of.items() for block, ranks in enumerate(blocks)}


def blocks_in(batch: Batch) -> list[tuple[int, int, int]]:
    return [
        (extent.page, extent.row, block)
        for extent in batch.extents
        for block in range(extent.first // 8, -(-extent.last // 8))
    ]


def delivered(plans: list[list[Batch]]) -> set[tuple[int, tuple[int, int, int]]]:
    """Play an exchange in which each rank has a slot for what it reads and one for what comes: what ranks then have."""
    have: set[tuple[int, tuple[int, int, int]]] = set()
    takers = sorted({batch.taker for plan in plans for batch in plan})
    reads = {rank: [b for plan in plans for b in plan if b.taker == rank and b.origin is None] for rank in takers}
    comes = {rank: [b for plan in plans for b in plan if b.taker == rank and b.origin is not None] for rank in takers}
    moved = True
    while moved:
        moved = False
        for rank in takers:
            if reads[rank]:
                moved = give(reads[rank][0], reads, comes, have) or moved
    assert not any(reads.values())
    assert not any(comes.values())
    return have


def give(
    batch: Batch,
    reads: dict[int, list[Batch]],
    comes: dict[int, list[Batch]],
    have: set[tuple[int, tuple[int, int, int]]],
) -> bool:
    """Pass a batch on as far as it gets at once: a whole way, or not at all, which is harder than what lines do."""
    way = [batch]
    while way[-1].onward is not None:
        follower = way[-1].onward
        if not comes[follower] or comes[follower][0].extents != batch.extents:
            return False
        way.append(comes[follower][0])
        assert way[-1].origin == way[-2].taker
    for number, one in enumerate(way):
        (comes if number else reads)[one.taker].pop(0)
        have.update((rank, block) for rank in one.readers for block in blocks_in(one))
    return True
