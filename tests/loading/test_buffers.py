"""A load takes no more memory than was declared beside what it fills; past the page cache, bytes are the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.loading.bounce import Bounced, read_bounced
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CorruptionError
from ckpt_formats.geometry import Box
from ckpt_formats.memory import scratch
from ckpt_formats.reading import Request
from ckpt_formats.sources import PAGE, LocalFile
from tests.ranks import run_ranks

MIB = 1 << 20
NOISE = 12 * MIB
"""What Python and torch take for themselves during a load: imports, thread stacks, the manifest."""


def resident(*, peak: bool = False) -> int:
    """Bytes resident in this process now, from when the peak counts; or the peak since then."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def drop(folder: Path) -> None:
    """Have nothing of a checkpoint's data in the page cache."""
    for file in (folder / "data").iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_of_loads(rank: int, world: int, path: Path) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (world,))
    saved = {f"w{i}": distribute_tensor(torch.rand(2048, 4096), mesh, [Shard(0)]) for i in range(4)}
    ckpt.save({"m": saved}, path)
    ckpt.load({"m": saved}, path)  # imports are not counted
    columns = {f"w{i}": distribute_tensor(torch.ones(2048, 4096), mesh, [Shard(1)]) for i in range(4)}
    narrow = {name: tensor.bfloat16() for name, tensor in columns.items()}
    peaks: dict[str, int] = {}
    for name, target, cast, cold in (
        ("columns", columns, False, False),
        ("columns, from the disk", columns, False, True),
        ("cast", narrow, True, False),
        ("rows, from the disk", saved, False, True),
    ):
        torch.distributed.barrier()
        if cold and rank == 0:
            drop(path)
        torch.distributed.barrier()
        before = resident()
        ckpt.load({"m": target}, path, cast=cast, buffers=32 * MIB)
        peaks[name] = resident(peak=True) - before
    return peaks


def test_a_load_takes_no_more_memory_than_was_declared(tmp_path: Path) -> None:
    for peaks in run_ranks(peak_of_loads, 2, tmp_path / "a"):
        for name, peak in peaks.items():
            # the state is 128 MiB, 64 MiB of it here: whoever made a copy of it would be found
            assert peak <= 32 * MIB + NOISE, f"{name}: {peak / MIB:.0f} MiB"


def test_what_is_not_in_the_page_cache_is_read_past_it_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{i}": torch.rand(1000 + i, 3001) for i in range(3)} | {"small": torch.arange(999)}
    ckpt.save(state, tmp_path / "a")
    counted = []
    original = LocalFile.read_past_cache

    def count(self: LocalFile, start: int, stop: int, into: memoryview) -> memoryview | None:
        found = original(self, start, stop, into)
        counted.append(found is not None)
        return found

    monkeypatch.setattr(LocalFile, "read_past_cache", count)
    for cold in (False, True):
        target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        if cold:
            drop(tmp_path / "a")
        else:
            for file in (tmp_path / "a" / "data").iterdir():
                file.read_bytes()
        counted.clear()
        ckpt.load(target, tmp_path / "a")  # type: ignore[arg-type]
        assert all(torch.equal(target[name], state[name]) for name in state)
        if not cold:
            assert not counted
    # what is read past the page cache is verified too
    file = next((tmp_path / "a" / "data").iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    drop(tmp_path / "a")
    with pytest.raises(CorruptionError, match=file.name):
        ckpt.load(target, tmp_path / "a")  # type: ignore[arg-type]


def test_looking_whether_files_are_cached_does_not_make_the_next_one_believe_so(tmp_path: Path) -> None:
    ckpt.save({"w": torch.rand(16, 1 << 20)}, tmp_path / "a")
    drop(tmp_path / "a")
    found = []
    # as ranks of a node do before they read together: each by itself, in the same files
    for _ in range(4):
        with open_checkpoint(str(tmp_path / "a")) as checkpoint:
            target = np.empty((16, 1 << 20), np.float32)
            plan = checkpoint.reader.plan([Request("w", Box.whole(target.shape), target)])
            found.append(checkpoint.reader.is_cold(list(plan.pieces())))
    assert len(set(found)) == 1, found


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, PAGE), (5, PAGE + 5), (PAGE - 1, 3 * PAGE + 1), (9000, 9999)])
def test_any_range_is_read_past_the_page_cache(start: int, stop: int, tmp_path: Path) -> None:
    data = os.urandom(9999)
    (tmp_path / "f").write_bytes(data)
    source = LocalFile(str(tmp_path / "f"))
    found = source.read_past_cache(start, stop, memoryview(scratch(stop - start + 2 * PAGE)))
    assert found is None or found == data[start:stop]
    assert source.read_past_cache(9990, 10_001, memoryview(scratch(3 * PAGE))) is None
    source.close()


def test_larger_tensors_than_buffers_are_cast_in_parts(tmp_path: Path) -> None:
    saved = {"a": torch.rand(700, 1999), "b": torch.rand(3), "c": torch.rand(5, 7, 11), "s": torch.tensor(3.5)}
    ckpt.save({"m": saved}, tmp_path / "a")
    target = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in saved.items()}
    target["a"] = torch.zeros(1999, 700, dtype=torch.float64).t()
    ckpt.load({"m": target}, tmp_path / "a", cast=True, buffers=0)
    for name, tensor in saved.items():
        assert torch.equal(target[name], tensor.double())


def test_what_passes_through_two_buffers_in_parts_is_the_same(tmp_path: Path) -> None:
    saved = {"a": torch.rand(700, 1999), "b": torch.rand(3), "c": torch.rand(5, 7, 11), "s": torch.tensor(3.5)}
    ckpt.save(saved, tmp_path / "a")  # type: ignore[arg-type]
    views = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in saved.items()}
    views["a"] = torch.zeros(1999, 700, dtype=torch.float64).t()
    with open_checkpoint(str(tmp_path / "a")) as checkpoint:
        tensors = checkpoint.manifest.tensors
        items = [Bounced(n, tensors[n].dtype, Box.whole(tensors[n].shape), view) for n, view in views.items()]
        stats = read_bounced(checkpoint.reader, items, threads=2, buffers=0, past_cache=False)
    assert stats.bytes_needed == sum(tensor.nbytes for tensor in saved.values())
    for name, tensor in saved.items():
        assert torch.equal(views[name], tensor.double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_device_are_loaded_through_pinned_buffers(tmp_path: Path) -> None:
    saved = {f"w{i}": torch.rand(3000 + i, 1024) for i in range(5)}
    ckpt.save({"m": saved}, tmp_path / "a")
    for dtype in (torch.float32, torch.bfloat16):
        target = {name: torch.zeros_like(tensor, device="cuda", dtype=dtype) for name, tensor in saved.items()}
        ckpt.load({"m": target}, tmp_path / "a", cast=True, buffers=32 * MIB)
        for name, tensor in saved.items():
            assert torch.equal(target[name].cpu(), tensor.to(dtype))
