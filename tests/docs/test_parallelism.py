"""The examples of docs/parallelism.md work as they stand there, on two ranks."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ckpt
from tests.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
_ALL = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
EXAMPLES = [example for example in _ALL if "deepspeed" not in example]
DEEPSPEED = [example for example in _ALL if "deepspeed" in example]
"""tests/loading/test_deepspeed.py runs them, whose ranks have it."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 9)
        self.down = nn.Linear(9, 5)
        self.head = nn.Linear(5, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(self.embed(tokens))))


def run_all(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    for number, example in enumerate(EXAMPLES):
        names = {"torch": torch, "dist": dist, "ckpt": ckpt, "model": Model(), "path": f"{folder}/{number}"}
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), names)


def test_the_examples_save_what_they_say(tmp_path: Path) -> None:
    run_ranks(run_all, 2, str(tmp_path))
    whole = Model().state_dict()
    shapes = [
        {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        for checkpoint in (ckpt.open(tmp_path / str(number)) for number in range(len(EXAMPLES)))
    ]
    assert len(EXAMPLES) == 10
    for number in (0, 1, 2, 4, 8):
        assert {name.removeprefix("model."): tuple(shape) for name, shape in shapes[number].items()} == {
            name: tuple(tensor.shape) for name, tensor in whole.items()
        }, EXAMPLES[number]
    assert shapes[3] == {"up": (9, 5)}
    assert shapes[5] == {"model.weight": (24, 5)}
    assert shapes[6] == {"model.weight": (11, 5)}
    assert shapes[7] == {"model.embed.weight": (11, 5), "model.qkv.weight": (24, 5)}
    assert set(shapes[9]) == {f"model.experts.{k}.{part}" for k in range(4) for part in ("weight", "bias")}
