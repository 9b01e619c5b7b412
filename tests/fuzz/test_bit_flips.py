"""A bit flipped anywhere in a checkpoint is found by verifying, and never loads as if nothing were wrong."""

from __future__ import annotations

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import distributed

import ckpt
from ckpt.saving.save import Saver
from ckpt.state.torch_dtypes import as_carrier
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointError
from ckpt_formats.manifest import RANK_PREFIX
from ckpt_formats.native.reader import load_page, read_root
from ckpt_formats.verify import verify
from tests.ranks import run_ranks

WORLD_SIZE = 3
STAYS = pytest.mark.filterwarnings("ignore:.*has the per-rank values of:UserWarning")
"""One process loads what three saved: their random states stay as they were."""


class Region(NamedTuple):
    """Consecutive bytes of one kind in one file."""

    kind: str
    path: str
    start: int
    stop: int


NOT_NEEDED = frozenset(("header", "padding", "values of a rank"))
"""What loading into another number of ranks does not read. Everything else it must, and refuse if it is damaged."""


def _state(rank: int, world_size: int, rows: int, *, whole: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def cut(tensor: torch.Tensor) -> Any:
        if whole:
            return tensor
        step = -(-len(tensor) // world_size)
        start = min(rank * step, len(tensor))
        return ckpt.Shard(tensor[start : start + step].clone(), tensor.shape, (start, *[0] * (tensor.ndim - 1)))

    def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = torch.empty(shape, dtype=dtype, device="cpu").nbytes
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)

    return {
        "model": {
            "large": cut(random_bits(rows, 250, dtype=torch.float32)),
            "uneven": cut(random_bits(7, 5, dtype=torch.bfloat16)),
            "whole": random_bits(33, 3, dtype=torch.float16),
            "scalar": random_bits(1, dtype=torch.float64).reshape(()),
            "complex": random_bits(9, dtype=torch.complex128),
            "tiny": random_bits(21, dtype=torch.float8_e4m3fn),
            "flags": random_bits(5, dtype=torch.uint8).bitwise_and(1).bool(),
            "empty": torch.empty(0, 3, dtype=torch.int16),
            "count": random_bits(3, dtype=torch.int64),
        },
        "sampler": {"order": np.arange(1500)[::-1].copy(), "epoch": 2, "seen": {1, 2}, "at": (3, 4.5)},
        "step": 11,
        "rng": ckpt.PerRank(random.Random(rank).randbytes(100)),
    }


def _save(rank: int, world_size: int, folder: str, rows: int) -> None:
    Saver().save(_state(rank, world_size, rows), folder)


def _blank(state: dict[str, Any]) -> dict[str, Any]:
    model = {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}
    return {"model": model, "sampler": {}, "step": 0, "rng": ckpt.PerRank(b"")}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["model"].keys() == other["model"].keys()
        and all(
            np.ascontiguousarray(as_carrier(one["model"][name])).tobytes() == as_carrier(tensor).tobytes()
            for name, tensor in other["model"].items()
        )
        and np.array_equal(one["sampler"]["order"], other["sampler"]["order"])
        and all(one["sampler"][name] == other["sampler"][name] for name in ("epoch", "seen", "at"))
        and one["step"] == other["step"]
    )


def _regions(folder: Path) -> list[Region]:
    """What every byte of a checkpoint is."""
    root = read_root(str(folder))
    regions = [Region("manifest", "manifest.json", 0, (folder / "manifest.json").stat().st_size)]
    chunks: dict[int, list[Region]] = {number: [] for number in range(len(root.files))}
    for number, page in enumerate(root.pages):
        regions.append(Region("index", page.path, 0, page.size))
        rows = load_page(str(folder), root, number)
        for meta in root.tensors.values():
            kind = "tensor"
            if meta.name.startswith("__ckpt__."):
                kind = "values of a rank" if meta.name.startswith(RANK_PREFIX) else "value"
            for row in range(meta.row, meta.row + meta.rows):
                file, start = int(rows.file[row]), int(rows.start[row])
                path = root.files[file].path
                chunks[file].append(Region(kind, path, start, start + int(rows.length[row])))
    for number, file in enumerate(root.files):
        regions.append(Region("header", file.path, 0, file.header))
        at = file.header
        for region in sorted(chunks[number], key=lambda region: region.start):
            if region.start > at:
                regions.append(Region("padding", file.path, at, region.start))
            regions.append(region)
            at = region.stop
        assert at == file.size
    return regions


def _flip_and_look(folder: Path, region: Region, at: int, bit: int, expected: dict[str, Any]) -> None:
    """Flip one bit; verifying must find it, and loading refuse it, or not need it. Then flip it back."""
    path = folder / region.path
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))
        stream.flush()
        where = (region, at, bit)
        assert _is_found(folder), where
        refusal, live = _load(folder, expected)
        if region.kind in NOT_NEEDED:
            assert refusal is None, where
            assert _same(live, expected), where
        else:
            assert region.path in str(refusal), where
        if region.kind == "values of a rank":
            with pytest.raises(CheckpointError, match=region.path):
                _read_own(folder)
        stream.seek(at)
        stream.write(bytes([byte]))


def _load(folder: Path, expected: dict[str, Any]) -> tuple[CheckpointError | None, dict[str, Any]]:
    """The error that loading ends in, and the state that was loaded into."""
    live = _blank(expected)
    try:
        ckpt.load(live, folder)
    except CheckpointError as error:
        return error, live
    return None, live


def _read_own(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for rank in range(WORLD_SIZE):
            checkpoint.per_rank(rank)


def _is_found(folder: Path) -> bool:
    try:
        return not verify(folder, threads=1).intact
    except CheckpointError:
        return True


def _positions(regions: list[Region], count: int) -> Iterator[tuple[Region, int, int]]:
    """Random bits: half of them anywhere, half of them of each kind of region in turn, so that small ones get some."""
    generator = random.Random(2024)
    sizes = [region.stop - region.start for region in regions]
    kinds = sorted({region.kind for region in regions})
    for number in range(count):
        if number % 2:
            kind = kinds[number // 2 % len(kinds)]
            region = generator.choice([region for region in regions if region.kind == kind])
        else:
            (region,) = generator.choices(regions, sizes)
        yield region, generator.randrange(region.start, region.stop), generator.randrange(8)


def _flip_share(rank: int, world_size: int, original: Path) -> Counter[str]:
    """Try this process's share of 500 flipped bits, in a copy of its own. Returns how many of each kind."""
    distributed.destroy_process_group()
    warnings.simplefilter("ignore", UserWarning)  # as STAYS says
    folder = Path(shutil.copytree(original, f"{original}_{rank}"))
    expected = _state(0, 1, 3300, whole=True)
    counts: Counter[str] = Counter()
    for number, (region, at, bit) in enumerate(_positions(_regions(folder), 500)):
        if number // 2 % world_size == rank:
            _flip_and_look(folder, region, at, bit, expected)
            counts[region.kind] += 1
    assert verify(folder).intact
    return counts


@STAYS
def test_each_of_500_flipped_bits_is_found_and_none_loads_silently(tmp_path: Path) -> None:
    folder = tmp_path / "step_11"
    run_ranks(_save, WORLD_SIZE, str(folder), 3300)
    expected = _state(0, 1, 3300, whole=True)
    live = _blank(expected)
    ckpt.load(live, folder)
    assert _same(live, expected)
    assert verify(folder).intact

    counts: Counter[str] = sum(run_ranks(_flip_share, 2, folder, timeout=240), Counter())
    print(f"500 flipped bits, all found: {dict(counts)}")
    assert set(counts) == {"manifest", "index", "header", "padding", "tensor", "value", "values of a rank"}
    assert min(counts.values()) > 20
    assert counts.total() == 500


@STAYS
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_bit_of_each_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "step_11"
    run_ranks(_save, WORLD_SIZE, str(folder), 4)
    expected = _state(0, 1, 4, whole=True)
    generator = random.Random(1)
    count = 0
    for region in _regions(folder):
        for at in range(region.start, region.stop):
            _flip_and_look(folder, region, at, generator.randrange(8), expected)
            count += 1
    print(f"{count} flipped bits, all found")
