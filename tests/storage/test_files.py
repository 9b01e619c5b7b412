"""Files are written in the way that their file system wants."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import ckpt
from ckpt.storage.files import Files
from ckpt_formats.verify import verify
from tests.ranks import run_ranks

MEMORY = "/dev/shm"


def test_memory_is_not_written_past_a_cache_that_it_does_not_have() -> None:
    assert run_ranks(_direct, 1) == [False]


def _direct(_rank: int, _world_size: int) -> bool:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, Files().create(f"{folder}/file", direct=True) as file:
        file.write(memoryview(b"odd"), 5)
        assert Path(folder, "file").read_bytes() == bytes(5) + b"odd"
        return file.direct


def test_checkpoints_in_memory_are_what_was_saved() -> None:
    run_ranks(_saved, 1)


def _saved(_rank: int, _world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {f"t{size}": torch.randn(size, generator=generator) for size in (0, 1, 1023, 300_001, 5_000_011)}
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        ckpt.save({"tensors": state}, f"{folder}/at-once")
        ckpt.async_save({"tensors": state}, f"{folder}/beside").wait(60)
        for name in ("at-once", "beside"):
            assert verify(f"{folder}/{name}").intact
            loaded = {key: torch.full_like(tensor, 7) for key, tensor in state.items()}
            ckpt.load({"tensors": loaded}, f"{folder}/{name}")
            assert all(torch.equal(loaded[key], state[key]) for key in state)
