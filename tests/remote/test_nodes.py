"""Ranks of a node load from a store: each byte leaves it once, and memory stays within the buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.transfer.copy import copy
from ckpt_formats.remote import configure
from tests.loading.test_buffers import MIB, NOISE, resident
from tests.loading.test_sharing import assert_equal, cut, share_everything
from tests.ranks import run_ranks
from tests.remote.conftest import options
from tests.remote.proxy import Proxy
from tests.remote.servers import rclone


def rows_to_columns(rank: int, world: int, url: str, port: int) -> int:
    share_everything()
    configure(url, options(port))
    target = cut(world, 1, zero=True)
    result = ckpt.load({"m": target}, url)
    assert_equal(target, cut(world, 1))
    return result.bytes_read


def save_rows(rank: int, world: int, path: Path) -> None:
    ckpt.save({"m": cut(world, 0)}, path)


def test_what_several_ranks_need_leaves_the_store_once(s3: str, proxy: Proxy, tmp_path: Path) -> None:
    run_ranks(save_rows, 4, tmp_path / "step_1")
    copy(tmp_path / "step_1", f"{s3}/step_1")
    proxy.got.clear()
    read = run_ranks(rows_to_columns, 4, f"{s3}/step_1", proxy.port)
    stored = sum(file.stat().st_size for file in (tmp_path / "step_1" / "data").iterdir())
    got = sum(nbytes for path, nbytes in proxy.got.items() if "/data/" in path)
    assert sum(read) <= got <= 1.05 * stored
    assert max(read) <= 0.6 * stored


def large(world: int, dim: int) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    return {f"w{i}": distribute_tensor(torch.full((2048, 4096), 1.0 + i), mesh, [Shard(dim)]) for i in range(4)}


def save_large(rank: int, world: int, path: Path) -> None:
    ckpt.save({"m": large(world, 0)}, path)


def peaks_of_loads(rank: int, world: int, port: int, by_fsspec: bool) -> list[int]:
    # what can't be said in a signed URL goes through fsspec
    configure("s3://shelf", options(port) | {"requester_pays": by_fsspec})
    peaks = []
    for dim in (0, 1):
        target = large(world, dim)
        ckpt.load({"m": target}, "s3://shelf/step_1", buffers=32 * MIB)  # imports are not counted
        torch.distributed.barrier()
        before = resident()
        ckpt.load({"m": target}, "s3://shelf/step_1", buffers=32 * MIB)
        peaks.append(resident(peak=True) - before)
    return peaks


@pytest.mark.parametrize("by_fsspec", [False, True])
def test_a_load_from_a_store_takes_no_more_memory_than_was_declared(by_fsspec: bool, tmp_path: Path) -> None:
    with rclone(tmp_path) as port:
        run_ranks(save_large, 2, tmp_path / "objects" / "shelf" / "step_1")
        for peaks in run_ranks(peaks_of_loads, 2, port, by_fsspec):
            # the state is 128 MiB, 64 MiB of it in each process; fsspec's libraries keep some of what they copied
            assert max(peaks) <= 32 * MIB + (2 * NOISE if by_fsspec else NOISE), [peak >> 20 for peak in peaks]
