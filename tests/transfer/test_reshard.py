"""What resharding promises: the same tensors, each target rank's bytes together, bounded memory, clear refusals."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckpt
from ckpt.transfer.reshard import reshard
from ckpt_formats.errors import CheckpointExistsError, CheckpointNotFoundError, CorruptionError, LayoutError
from ckpt_formats.layout import Layout, Mesh
from tests.ranks import run_ranks

TP = Layout({"tp": {"model.up.*": 0, "model.down.weight": 1}})


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(130, 301)
        self.down = torch.nn.Linear(301, 130)
        self.norm = torch.nn.LayerNorm(130)


def build() -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    return model, torch.optim.AdamW(model.parameters())


def saved(path: Path) -> dict[str, object]:
    torch.manual_seed(0)
    model, optimizer = build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state: dict[str, object] = {
        "model": model,
        "optimizer": optimizer,
        "rng": ckpt.RNG(),
        "epoch": 3,
        "long": b"x" * 9999,
    }
    ckpt.save(state, path, step=5)
    return state


def assert_same(a: Path, b: Path) -> None:
    with ckpt.open(a) as one, ckpt.open(b) as other:
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            assert torch.equal(one[name][...], other[name][...]), name
        assert one.manifest.values == other.manifest.values
        assert one.values.keys() == other.values.keys()
        assert one.step == other.step


@pytest.mark.parametrize("mesh", ["dp=1", "dp=3", "dp=2,tp=4", "tp=2", "dp_replicate=2,dp=2", "dp=7,tp=3"])
def test_tensors_and_values_stay_the_same(mesh: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    layout = TP if "tp" in mesh else None
    result = reshard(tmp_path / "a", tmp_path / "b", Mesh.parse(mesh), layout)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert len(os.listdir(tmp_path / "b" / "data")) == Mesh.parse(mesh).size == len(result.bytes_per_rank)


def own_file(rank: int, world_size: int, folder: str) -> tuple[float, list[str]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, _ = build()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    result = ckpt.load({"model": model}, f"{folder}/b")
    with ckpt.open(f"{folder}/b") as checkpoint:
        cuts = [cut["cut"] for cut in checkpoint.manifest.layout["cuts"]]
    return result.bytes_read / result.bytes_needed, cuts


def test_a_target_rank_reads_little_more_than_what_it_needs(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=2,tp=2"), TP)
    for ratio, cuts in run_ranks(own_file, 4, str(tmp_path)):
        assert ratio <= 1.1
        assert "SS(0,2)@dp S(0)@tp" in cuts


def test_slots_of_the_optimizer_are_cut_as_their_parameters(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=1,tp=2"), TP)
    with ckpt.open(tmp_path / "b") as checkpoint:
        manifest = checkpoint.manifest
        for name in ("model.down.weight", "optimizer.state.down.weight.exp_avg"):
            offsets, _ = manifest.chunks(manifest.meta(name))
            assert offsets.tolist() == [[0, 0], [0, 151]]
        assert manifest.chunks(manifest.meta("optimizer.state.down.weight.step"))[0].tolist() == [[]]


def test_an_axis_that_nobody_explains_is_refused_with_an_example(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(LayoutError, match="--layout"):
        reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=2,tp=2"))
    assert not (tmp_path / "b").exists()


def test_a_damaged_source_is_refused_and_nothing_is_committed(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    (file,) = (tmp_path / "a" / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match="checksum"):
        reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=3"))
    assert not (tmp_path / "b").exists()


def test_no_source_and_an_existing_target_are_clear_errors(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(CheckpointNotFoundError):
        reshard(tmp_path / "nowhere", tmp_path / "b", Mesh.parse("dp=3"))
    reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=3"))
    with pytest.raises(CheckpointExistsError):
        reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=2"))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    result = reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=3"), progress=lambda *now: seen.append(now))
    assert seen[-1] == (result.bytes, result.bytes)
    assert seen == sorted(seen)


def reshard_big(rank: int, world_size: int, folder: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reshard(f"{folder}/a", f"{folder}/b", Mesh.parse("dp=2,tp=3"), Layout({"tp": {"w": 1}}))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def test_memory_is_bounded_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    ckpt.save({"w": torch.zeros(100 << 10, 1 << 10)}, tmp_path / "a")
    # 400 MiB go through; buffers of reading, of the window and of writing stay
    assert run_ranks(reshard_big, 1, str(tmp_path), timeout=120)[0] <= 120 << 20
