"""The run whose saves are killed, failed and cut off: its states, and what must be true of it afterwards."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckpt
from ckpt.saving.save import Saver
from ckpt.state.torch_dtypes import as_carrier
from ckpt.storage.data_file import Staging
from ckpt.storage.files import Files
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.verify import verify
from tests.crash.operations import Faulty, Watch

ROWS = 30
"""Rows of each rank."""
WINDOW = 1 << 14
"""Bytes of a staging buffer, so small that a data file takes several writes, by two threads."""


def state(step: int, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """The training state at a step; each rank has a part of it."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(ROWS * world_size, 700, generator=generator)
    part = whole[ROWS * rank : ROWS * (rank + 1)]
    return {
        "weight": ckpt.Shard(part.clone(), tuple(whole.shape), (ROWS * rank, 0)),
        "bias": torch.randn(33, generator=generator).to(torch.bfloat16),
        "step": step,
        "order": random.Random(step).randbytes(5000),
        "seed": ckpt.PerRank([rank, step]),
    }


def blank(rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """A state to load into."""
    fresh = state(0, rank, world_size)
    fresh["weight"].local.zero_()
    fresh["bias"].zero_()
    return fresh | {"step": -1, "order": b"", "seed": ckpt.PerRank(None)}


@contextmanager
def quick_folder(otherwise: Path) -> Iterator[Path]:
    """A folder in memory, where thousands of cycles take little time; `otherwise` where there is none."""
    if not os.access("/dev/shm", os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="crash-") as folder:
        yield Path(folder)


def saver(files: Files | None = None) -> Saver:
    """What saves a state, in small pieces; without syncing them, unless it is given `files` that do."""
    return Saver(files or Faulty(Watch()), Staging(3, WINDOW))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states are bitwise the same."""
    return (
        _bytes(one["weight"].local) == _bytes(other["weight"].local)
        and _bytes(one["bias"]) == _bytes(other["bias"])
        and all(one[name] == other[name] for name in ("step", "order"))
        and one["seed"].value == other["seed"].value
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return np.ascontiguousarray(as_carrier(tensor)).tobytes()


def loads(path: Path, step: int, world_size: int = 1, *, thoroughly: bool = True) -> bool:
    """Whether a checkpoint is there, whole, and that of the step. It must be so, or not be there at all.

    For one rank, loading is loading into a live state; several ranks' parts are read one after the other. `thoroughly`
    verifies what loading does not read, too.
    """
    if world_size == 1:
        live = blank()
        try:
            ckpt.load(live, path)
        except CheckpointNotFoundError:
            return False
        assert same(live, state(step))
    else:
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointNotFoundError:
            return False
        with checkpoint:
            for rank in range(world_size):
                _is_part(checkpoint, step, rank, world_size)
    if thoroughly:
        report = verify(path)
        assert report.intact, report.damage
    return True


def _is_part(checkpoint: Any, step: int, rank: int, world_size: int) -> None:
    expected = state(step, rank, world_size)
    shard = expected["weight"]
    ((box, _),) = shard.lowered.pieces
    rows = box.slices()[0]
    assert checkpoint["weight"][rows].tobytes() == _bytes(shard.local)
    assert checkpoint["bias"][...].tobytes() == _bytes(expected["bias"])
    assert checkpoint.values["step"] == step
    assert checkpoint.values["order"] == expected["order"]
    assert checkpoint.decode(checkpoint.per_rank(rank)["seed"], "seed") == expected["seed"].value


def debris(path: Path) -> list[str]:
    """Everything at a checkpoint's path, if it is not a checkpoint; what the checkpoint does not list, if it is one."""
    if not path.exists():
        return []
    if (path / "manifest.json").exists():
        return [found.path for found in verify(path).debris]
    return [os.path.relpath(found, path) for found in path.rglob("*")] or ["."]
