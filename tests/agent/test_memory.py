"""What is promised of the memory for captures: never more than was declared, made ahead, and waited for aloud."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.agent import client, parcel
from ckpt.agent.arena import PAGE
from ckpt.agent.client import AgentClient
from ckpt.agent.saver import AsyncSaver
from ckpt.collective import Collective
from ckpt.saving import capture as capturing
from ckpt.storage.files import File, Files
from ckpt_formats.errors import CheckpointNotFoundError, ConfigurationError, RankError, SaveFailedError
from ckpt_formats.verify import verify
from tests.agent.test_async_save import Slow, agent_here, agents_below, until
from tests.ranks import Killed, run_ranks

MIB = 1 << 20


def arena_sizes(home: Path) -> list[int]:
    return [path.stat().st_size for path in home.iterdir() if path.name.startswith("arena")]


@contextmanager
def with_memory(folder: Path, files: Files, memory: float) -> Iterator[AsyncSaver]:
    with agent_here(folder, files) as saver:
        saver.declare(memory)
        yield saver


def odd_state() -> dict[str, Any]:
    """Tensors of many sizes and kinds, one of them alone larger than the memory that is declared."""
    torch.manual_seed(0)
    return {
        "huge": torch.randn(3_000_000),
        "strided": torch.randn(700, 900).t(),
        "odd": torch.randn(12_345).to(torch.float8_e8m0fnu),
        "wide": torch.randn(100_001, dtype=torch.complex128),
        "small": [torch.randn(k) for k in range(50)],
        "empty": torch.empty(0, 3),
        "rng": ckpt.RNG(),
        "long": b"x" * 300_000,
    }


def same(one: Path, other: Path) -> None:
    with ckpt.open(one) as a, ckpt.open(other) as b:
        assert set(a.tensors) == set(b.tensors)
        for name in a.tensors:
            assert torch.equal(flat_bytes(a[name][...]), flat_bytes(b[name][...])), name


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8)


@pytest.mark.parametrize("memory", [1 * MIB, 1 * MIB + 12_345, 5 * MIB, 13 * MIB])
def test_a_state_larger_than_the_memory_goes_through_in_pieces(
    memory: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = odd_state()
    ckpt.save(state, tmp_path / "sync")
    with with_memory(tmp_path, Files(), memory) as saver:
        for k in range(3):
            saver.save(state, tmp_path / str(k)).wait(60)
        assert arena_sizes(tmp_path / "home") == [memory // 4096 * 4096]
    assert "go through in pieces" in caplog.text
    for k in range(3):
        same(tmp_path / "sync", tmp_path / str(k))
        assert verify(tmp_path / str(k)).intact


def test_several_saves_fit_the_memory_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Slow()
    with with_memory(tmp_path, disk, 2 * MIB + 64 * 1024) as saver:
        state = {"w": torch.randn(MIB // 4)}
        pendings = [saver.save(state, tmp_path / "0")]
        more = threading.Thread(
            target=lambda: pendings.extend(saver.save(state, tmp_path / str(k)) for k in range(1, 4))
        )
        more.start()
        until(lambda: "arena is full" in caplog.text, "the save that does not fit to say that it waits")
        disk.go.set()
        more.join(60)
        for pending in pendings:
            pending.wait(60)
        assert arena_sizes(tmp_path / "home") == [2 * MIB + 64 * 1024]
    assert "waited" in caplog.text


def test_states_of_different_sizes_take_turns_in_one_memory(tmp_path: Path) -> None:
    with with_memory(tmp_path, Files(), 4 * MIB) as saver:
        pendings = []
        for k in range(24):
            state = {"w": torch.full((100_000 * (1 + k % 7),), float(k))}
            pendings.append(saver.save(state, tmp_path / str(k)))
        for k, pending in enumerate(pendings):
            pending.wait(60)
            with ckpt.open(tmp_path / str(k)) as checkpoint:
                assert (checkpoint["w"][:] == k).all()
        assert arena_sizes(tmp_path / "home") == [4 * MIB]


@pytest.mark.parametrize("memory", [4e6, np.int64(4_000_000), np.float32(4e6)])
def test_memory_is_declared_by_any_kind_of_number(memory: float, tmp_path: Path) -> None:
    with with_memory(tmp_path, Files(), memory) as saver:
        saver.save({"w": torch.zeros(1000)}, tmp_path / "a").wait(60)
        assert arena_sizes(tmp_path / "home") == [4_000_000 // PAGE * PAGE]


@pytest.mark.parametrize(
    ("memory", "why"),
    [(1000, "is too little"), (4e6 + 0.5, "whole number"), (math.inf, "whole number"), ("64e6", "whole number")],
)
def test_what_is_no_memory_for_captures_is_refused_at_once(memory: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=f"memory={memory!r} .*{why}"):
        AsyncSaver(memory=memory)


class FullLater(Files):
    """A disk that takes the first bytes of a data file, and then no more."""

    def create(self, path: str, *, direct: bool) -> File:
        file = super().create(path, direct=direct)
        if "/data/" in path:
            write = file.write

            def failing(data: memoryview, at: int) -> None:
                if at > MIB:
                    raise OSError(28, "No space left on device", path)
                write(data, at)

            file.write = failing  # type: ignore[method-assign]
        return file


def test_a_disk_that_fills_up_between_pieces_fails_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    with with_memory(tmp_path, FullLater(), 1 * MIB) as saver:
        with pytest.raises(SaveFailedError, match="No space left"):
            saver.save({"w": torch.zeros(2_000_000)}, tmp_path / "run" / "a").wait(60)
        assert not (tmp_path / "run").exists()
        # the memory is free again
        saver.save({"w": torch.zeros(100_000)}, tmp_path / "run" / "c").wait(60)


def test_a_tensor_that_cannot_be_read_gives_its_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ckpt.saving.sources.TensorSource.read
    reads = 0

    def failing(self: Any, start: int, stop: int, into: memoryview) -> None:
        nonlocal reads
        reads += 1
        if reads % 3 == 0:
            raise RuntimeError("the device is gone")
        read(self, start, stop, into)

    monkeypatch.setattr(ckpt.saving.sources.TensorSource, "read", failing)
    state = {"w": torch.randn(600_000)}
    with with_memory(tmp_path, Files(), 1 * MIB) as saver:
        # more often than there are pieces
        for k in range(6):
            with pytest.raises(RuntimeError, match="the device is gone"):
                saver.save(state, tmp_path / "run" / str(k))
        monkeypatch.undo()
        saver.save(state, tmp_path / "run" / "a").wait(60)
    assert os.listdir(tmp_path / "run") == ["a"]


def test_memory_that_was_outgrown_is_given_back(tmp_path: Path) -> None:
    with agent_here(tmp_path, Files()) as saver:
        for k, count in enumerate((10_000, 100_000, 1_000_000)):
            model = torch.nn.Linear(1, count)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for again in "ab":
                optimizer.step()
                saver.save({"model": model, "optimizer": optimizer}, tmp_path / f"{k}{again}").wait(60)
        mine = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "home") in line]
        assert mine
        assert [line for line in mine if "deleted" in line] == []


def test_the_agent_writes_while_the_rest_is_still_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "STREAMED", MIB)
    monkeypatch.setattr(capturing, "BATCH", MIB)
    model = torch.nn.Module()
    for k in range(6):
        model.register_parameter(f"w{k}", torch.nn.Parameter(torch.randn(MIB // 4 + 100 * k + 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    ckpt.save(state, tmp_path / "sync")
    data = tmp_path / "a" / "data"
    copy = capturing._copy
    batches = 0

    def slowly(pairs: list[Any]) -> None:
        nonlocal batches
        if threading.current_thread().name == "ckpt-capture":
            batches += 1
            if batches == 5:
                until(lambda: data.is_dir() and any(f.stat().st_size >= MIB for f in data.iterdir()), "some bytes")
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", slowly)
    with agent_here(tmp_path, Files()) as saver:
        saver.save(state, tmp_path / "a").wait(60)
        assert batches >= 5
    same(tmp_path / "sync", tmp_path / "a")
    assert verify(tmp_path / "a").intact


def test_a_change_found_when_a_part_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "STREAMED", MIB)
    monkeypatch.setattr(capturing, "BATCH", MIB)
    model = torch.nn.Module()
    for k in range(6):
        model.register_parameter(f"w{k}", torch.nn.Parameter(torch.zeros(MIB // 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    data = tmp_path / "run" / "0" / "data"
    copy = capturing._copy

    def late(pairs: list[Any]) -> None:
        copy(pairs)
        if pairs and pairs[0][1].data_ptr() == model.w4.data_ptr() and not model.w4[0]:
            until(lambda: data.is_dir() and any(f.stat().st_size >= MIB for f in data.iterdir()), "some bytes")
            with torch.no_grad():
                model.w4 += 1

    monkeypatch.setattr(capturing, "_copy", late)
    with agent_here(tmp_path, Files()) as saver:
        with pytest.raises(SaveFailedError, match="was changed while it was captured"):
            saver.save(state, tmp_path / "run" / "0").wait(60)
        assert not (tmp_path / "run").exists()
        # as often as there is room for captures: no slot was lost
        for k in range(1, 6):
            optimizer.step()
            with contextlib.suppress(SaveFailedError):
                saver.save(state, tmp_path / "run" / str(k)).wait(60)
        same_as = tmp_path / "run" / "5"
        with ckpt.open(same_as) as checkpoint:
            assert (checkpoint["model.w4"][:] == 1).all()


def die_between_pieces(rank: int, world_size: int, folder: str) -> None:
    agents_below(folder)
    saver = AsyncSaver(memory=MIB)
    tensor = torch.zeros(3_000_000)
    original = ckpt.saving.sources.TensorSource.read
    reads = 0

    def read(self: object, start: int, stop: int, into: memoryview) -> None:
        nonlocal reads
        reads += 1
        if reads == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, start, stop, into)

    ckpt.saving.sources.TensorSource.read = read
    saver.save({"w": tensor}, f"{folder}/a")


def test_a_trainer_that_dies_between_pieces_leaves_nothing(tmp_path: Path) -> None:
    results = run_ranks(die_between_pieces, 1, str(tmp_path), allow_death=True)
    assert isinstance(results[0], Killed)
    until(lambda: not os.listdir(tmp_path / "agents"), "the agent to end and leave nothing")
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(tmp_path / "a")
    assert os.listdir(tmp_path) == ["agents"]


def pieces_on_every_rank(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(rank)
    state = {"part": {f"w{rank}": torch.randn(700_000 * (1 + rank))}, "both": torch.arange(9.0)}
    saver = AsyncSaver(memory=3 * MIB)
    try:
        ckpt.save(state, f"{folder}/sync")
        pendings = [saver.save(state, f"{folder}/{k}") for k in range(3)]
        for pending in pendings:
            pending.wait(60)
    finally:
        saver.close()


def test_ranks_in_pieces_and_ranks_in_one_make_one_checkpoint(tmp_path: Path) -> None:
    run_ranks(pieces_on_every_rank, 2, str(tmp_path))
    for k in range(3):
        same(tmp_path / "sync", tmp_path / str(k))


def test_the_memory_is_made_ahead_and_large_enough(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with agent_here(tmp_path, Files()) as saver:
        saver.start(Collective(), state)
        until(lambda: arena_sizes(tmp_path / "home") != [], "the arena")
        made = arena_sizes(tmp_path / "home")
        model(torch.randn(2, 300)).sum().backward()
        optimizer.step()
        saver.save(state, tmp_path / "a").wait(60)
        # the slots that the optimizer did not have yet were counted
        assert arena_sizes(tmp_path / "home") == made


def test_memory_that_takes_long_to_make_is_asked_for_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASKED_EVERY", 0.001)
    agent = AgentClient(client.launch(), 0)
    try:
        agent.reserve(100 * MIB, None)
        slot = agent.slot(110 * MIB, None, 0.0)
        assert slot is not None
        slot.view[-1] = 1
        larger = agent.slot(300 * MIB, None, 0.0)
        assert larger is not None
        assert larger.arena != slot.arena
    finally:
        agent.close()


def test_who_asks_an_agent_that_was_left_opens_nothing() -> None:
    with contextlib.closing(AgentClient(client.launch(), 0)) as stays:
        leaves = AgentClient(stays.address, 0)
        leaves.close()
        before = os.listdir("/proc/self/fd")
        # as a thread that looks after the levels does, while the training's leaves
        assert leaves.aftermath() == {}
        assert os.listdir("/proc/self/fd") == before


def stopped(pid: int) -> bool:
    """Whether each thread of a process stands still."""
    stats = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@pytest.mark.parametrize("asked", ["slot", "full", "new memory"])
def test_an_agent_that_hangs_is_found_out_by_who_waits_for_memory(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASKED_EVERY", 0.2)
    monkeypatch.setattr(client, "SILENCE", 1.0)
    agent = AgentClient(client.launch(), 0)
    try:
        slot = agent.slot(2 * MIB, 2 * MIB, 0.0)
        assert slot is not None
        if asked != "full":
            agent.release(slot)
        os.kill(agent.pid, signal.SIGSTOP)
        until(lambda: stopped(agent.pid), "the agent to stop")
        begin = time.monotonic()
        with pytest.raises(RankError, match="the agent does not answer"):
            agent.slot(MIB, None if asked == "new memory" else 2 * MIB, 600.0)
        assert time.monotonic() - begin < 20
        assert not agent.alive()
    finally:
        os.kill(agent.pid, signal.SIGKILL)
        agent.close()
