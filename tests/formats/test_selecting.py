"""Tensors by pattern, as numpy arrays, in a Python that has no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import MissingTensorError

_WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ckpt"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from ckpt_formats.checkpoint import open_checkpoint

with open_checkpoint(sys.argv[1]) as checkpoint:
    for name, tensor in checkpoint["model.0.*"].items():
        print(name, type(tensor[:1]).__module__, tensor[:1].tolist(), tensor[...].sum().item())
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model of two layers."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.5)
    ckpt.save({"model": model}, tmp_path / "c")
    return tmp_path / "c"


def test_a_pattern_gives_the_tensors_whose_names_fit(saved: Path) -> None:
    with open_checkpoint(saved) as checkpoint:
        assert list(checkpoint["model.0.*"]) == ["model.0.bias", "model.0.weight"]
        assert list(checkpoint["*weight"]) == ["model.0.weight", "model.1.weight"]
        assert list(checkpoint["model.?.bias"]) == ["model.0.bias", "model.1.bias"]
        assert list(checkpoint[re.compile(r"model\.[1-9]\..*")]) == ["model.1.bias", "model.1.weight"]
        with pytest.raises(MissingTensorError, match="no tensor whose name fits"):
            checkpoint["model.7.*"]


def test_numpy_arrays_come_without_torch(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(saved)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["model.0.bias numpy [1.5] 4.5", "model.0.weight numpy [[1.5, 1.5]] 9.0"]
