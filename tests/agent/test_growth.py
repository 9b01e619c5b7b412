"""What is promised of memory and open files: what was declared and a little more, and no growth however many saves."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ckpt
from ckpt.agent.parts import BUFFERS
from ckpt.agent.saver import AsyncSaver
from ckpt.collective import Collective
from ckpt.storage.compressing import COMPRESSORS
from ckpt.storage.data_file import BUFFER
from ckpt_formats.digest import BLOCK_SIZE
from tests.ranks import run_ranks

MIB = 1 << 20
STAGING = BUFFERS * BUFFER
"""What the agent writes from; docs/saving.md names it."""
COMPRESSING = COMPRESSORS * 16 * BLOCK_SIZE
"""What it compresses in: for each thread a few blocks, planes of them, and zstd's tables."""
BOOKS = 6 * MIB
"""Of a process: stacks and allocators of its threads, what it knows of saves."""


class Use(NamedTuple):
    """Of the trainer, and of its agent."""

    own: tuple[int, int]
    """Bytes of memory that they share with nobody."""
    files: tuple[int, int]
    """Open files."""
    arenas: int
    """Bytes of shared memory."""


def use(agent: int, home: Path) -> Use:
    pids = (os.getpid(), agent)
    files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
    arenas = sum(path.stat().st_blocks * 512 for path in home.glob("arena*"))
    return Use((own_memory(pids[0]), own_memory(pids[1])), (files[0], files[1]), arenas)


def own_memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} is gone")


class Peak(threading.Thread):
    """The most memory that two processes have for themselves while this runs."""

    def __init__(self, agent: int) -> None:
        super().__init__(daemon=True)
        self._pids = (os.getpid(), agent)
        self._over = threading.Event()
        self.most = [0, 0]

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.most = [max(most, own_memory(pid)) for most, pid in zip(self.most, self._pids, strict=True)]

    def stop(self) -> list[int]:
        self._over.set()
        self.join()
        return self.most


class Owning(torch.optim.SGD):
    """Owns its parameters, and changes them without memory of its own, as a measurement wants it."""

    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - as torch has it
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)


def saves_in(rank: int, world_size: int, folder: str, memory: int, compress: bool) -> list[Any]:
    model = torch.nn.Module()
    for k in range(12):
        model.register_parameter(f"w{k}", torch.nn.Parameter(torch.randn(MIB)))
    optimizer = Owning(model.parameters(), lr=1.0)
    state = {"model": model, "optimizer": optimizer, "average": torch.zeros(MIB)}
    saver = AsyncSaver(memory=memory)
    agent = saver.start(Collective(), state)
    assert saver.prepared(60)
    home = Path(agent.address).parent
    before = use(agent.pid, home)
    peak = Peak(agent.pid)
    peak.start()
    pendings = []
    for step in range(24):
        optimizer.step()
        pendings.append(saver.save(state, f"{folder}/{step}", compress=compress))
        if step >= 3:
            shutil.rmtree(pendings[step - 3].wait(120).path)
    for pending in pendings[-3:]:
        pending.wait(120)
    most = peak.stop()
    after = use(agent.pid, home)
    saver.close()
    return [before, most, after]


@pytest.mark.parametrize(
    ("memory", "compress"),
    [(128 * MIB, False), (16 * MIB, False), (128 * MIB, True)],
    ids=["whole", "in pieces", "compressed"],
)
def test_memory_stays_within_what_was_declared(memory: int, compress: bool, tmp_path: Path) -> None:
    ((before, most, after),) = run_ranks(saves_in, 1, str(tmp_path), memory, compress, timeout=200)
    assert after.arenas == memory
    more = [peak - own for peak, own in zip(most, before.own, strict=True)]
    allowed = memory // 20
    # the trainer needs nothing but the arena
    assert more[0] <= allowed + BOOKS, f"the trainer took {more[0] / MIB:.1f} MiB more"
    own = STAGING + (COMPRESSING if compress else 0)
    assert more[1] <= allowed + own + BOOKS, f"the agent took {more[1] / MIB:.1f} MiB more"


def many_saves(rank: int, world_size: int, folder: str, count: int, looks: list[int]) -> list[Use]:
    torch.manual_seed(rank)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(10)])
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "own": ckpt.PerRank(rank)}
    saver = AsyncSaver()
    agent = saver.start(Collective())
    home = Path(agent.address).parent
    pendings: list[Any] = []
    uses = []
    for step in range(1, count + 1):
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        pendings.append(saver.save(state, f"{folder}/{step}", step=step))
        if len(pendings) > 2 or step in looks:
            path = pendings.pop(0).wait(60).path
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path)
        if step in looks:
            while pendings:
                pendings.pop(0).wait(60)
            dist.barrier()
            uses.append(at_rest(agent.pid, home))
            dist.barrier()
    saver.close()
    return uses


def at_rest(agent: int, home: Path) -> Use:
    """When the agent has closed what it does not need any more: connections of those that waited, say."""
    least, since = use(agent, home), time.monotonic()
    while time.monotonic() - since < 0.5:
        now = use(agent, home)
        if sum(now.files) < sum(least.files):
            least, since = now, time.monotonic()
        time.sleep(0.02)
    return use(agent, home)._replace(files=least.files)


def grown(tmp_path: Path, count: int, looks: list[int]) -> list[tuple[Use, Use]]:
    """Of each rank, how it was at the first and at the last look."""
    return [(uses[0], uses[-1]) for uses in run_ranks(many_saves, 2, str(tmp_path), count, looks, timeout=1500)]


def test_saves_leave_no_open_files_and_no_memory(tmp_path: Path) -> None:
    for first, last in grown(tmp_path, 40, [10, 40]):
        assert last.files == first.files
        assert last.arenas == first.arenas
        for before, after in zip(first.own, last.own, strict=True):
            assert after - before < BOOKS


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_saves_leave_no_open_files_and_no_memory(tmp_path: Path) -> None:
    # the agent knows the last 256 saves, so it takes as many until it takes no more; allocators take some more
    for first, last in grown(tmp_path, 1500, [1000, 1500]):
        assert last.files == first.files
        assert last.arenas == first.arenas
        for before, after in zip(first.own, last.own, strict=True):
            assert after - before < MIB
