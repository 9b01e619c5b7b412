"""A run with two checkpoints, as training leaves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ckpt


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 12)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(2)])
        self.head = torch.nn.Linear(12, 100, bias=False)
        self.head.weight = self.embed.weight


def _state(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "rng": ckpt.RNG(),
        "epoch": 3 + seed,
        "config": {"lr": 1e-3, "dtype": torch.bfloat16},
        "big": torch.zeros(700, 500),
    }


@pytest.fixture(scope="session")
def original_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    for seed, step in enumerate((100, 200)):
        ckpt.save(_state(seed), folder / f"step_{step:08d}")
    return folder


@pytest.fixture
def run(original_run: Path, tmp_path: Path) -> Path:
    """The run, to be damaged at will."""
    return Path(shutil.copytree(original_run, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    """Its first checkpoint."""
    return run / "step_00000100"


def flip(file: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def data_file(checkpoint: Path) -> Path:
    """The only data file of a checkpoint."""
    (file,) = (checkpoint / "data").iterdir()
    return file
