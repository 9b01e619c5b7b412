"""`ckpt.save(…, compress=True)`: the same state in fewer bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.transfer.reshard import reshard
from ckpt_formats.diff import diff
from ckpt_formats.errors import SaveFailedError
from ckpt_formats.layout import Mesh
from ckpt_formats.verify import verify
from tests.ranks import run_ranks


def _training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 700), torch.nn.GELU(), torch.nn.Linear(700, 300)).to(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "data").iterdir())


def test_a_compressed_training_state_is_smaller_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = _training()
    state = {"model": model, "optimizer": optimizer, "epoch": 3, "rng": ckpt.RNG()}
    plain = ckpt.save(state, tmp_path / "plain")
    compressed = ckpt.save(state, tmp_path / "compressed", compress=True)
    assert compressed.bytes < 0.9 * plain.bytes
    assert _bytes_on_disk(tmp_path / "compressed") < 0.9 * _bytes_on_disk(tmp_path / "plain")
    assert verify(tmp_path / "compressed").intact
    assert [d for d in diff(tmp_path / "plain", tmp_path / "compressed").differences if "rng" not in d.name] == []
    other = torch.nn.Sequential(torch.nn.Linear(300, 700), torch.nn.GELU(), torch.nn.Linear(700, 300))
    result = ckpt.load({"model": other}, tmp_path / "compressed")
    assert result.bytes_read < result.bytes_needed
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_uncompressed_is_the_default_and_names_no_codec(tmp_path: Path) -> None:
    ckpt.save({"w": torch.randn(500, 500)}, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "manifest.json").read_bytes())["codecs"] == ["raw"]


def _save_cut(rank: int, world_size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    whole = torch.arange(700_000, dtype=torch.float32).reshape(700, 1000).sin()
    # each rank decides for itself: chunks of both kinds in one tensor
    ckpt.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, folder, compress=rank != 1)


def test_ranks_may_differ_and_any_cut_loads(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    run_ranks(_save_cut, 3, str(folder))
    whole = torch.arange(700_000, dtype=torch.float32).reshape(700, 1000).sin()
    target = torch.zeros(700, 1000)
    ckpt.load({"w": target}, folder)
    assert torch.equal(target, whole)
    column = ckpt.Shard(torch.zeros(700, 10), (700, 1000), (0, 500))
    ckpt.load({"w": column}, folder, strict=False)
    reshard(folder, tmp_path / "two", Mesh.parse("dp=2"))
    assert diff(folder, tmp_path / "two").equal
    assert _bytes_on_disk(tmp_path / "two") < 0.95 * whole.nbytes


def test_a_failed_compressed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckpt.storage.files.File.write", full)
    with pytest.raises(SaveFailedError, match="No space left"):
        ckpt.save({"w": torch.randn(900, 900)}, tmp_path / "a", compress=True)
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    ckpt.save({"w": torch.randn(900, 900)}, tmp_path / "a", compress=True)
