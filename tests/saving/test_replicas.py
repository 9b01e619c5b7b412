"""What ckpt.check_replicas finds: tensors of which ranks say that they are whole, and that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt_formats.errors import ValuesDifferError
from tests.ranks import run_ranks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8, bias=False)


def _forgotten(rank: int, world_size: int) -> tuple[str, int]:
    whole = Model()
    mine = Model()
    mine.up.weight = nn.Parameter(whole.up.weight.detach()[4 * rank : 4 * rank + 4].clone())
    optimizer = torch.optim.AdamW(mine.parameters())
    for parameter in mine.parameters():
        parameter.grad = torch.sin(parameter.detach())
    optimizer.step()
    state = {"model": mine, "optimizer": optimizer}
    with pytest.raises(ValuesDifferError) as caught:
        ckpt.check_replicas(state)
    ckpt.mark(mine.up, "weight", (8, 6), (4 * rank, 0))
    return str(caught.value), ckpt.check_replicas(state)


def test_what_was_cut_and_not_marked_is_named_on_every_rank() -> None:
    for message, compared in run_ranks(_forgotten, 2):
        assert "model.up.weight [0:4,0:6] (ranks 0 and 1)" in message
        assert "optimizer.state.up.weight.exp_avg [0:4,0:6]" in message
        assert "norm" not in message
        assert "ckpt.mark_layout" in message
        # norm's weight and bias with two slots each; the steps of all three
        assert compared == 4 * (2 * 3 * 6 + 3)


def _sharded(rank: int, world_size: int) -> int:
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    state: dict[str, Any] = {"model": model, "strided": torch.arange(12).reshape(3, 4).t(), "own": ckpt.PerRank(rank)}
    compared = ckpt.check_replicas(state)
    local = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    assert compared == local + 96
    if rank == 3:
        with torch.no_grad():
            model.up.weight.to_local()[0, 0] += 1  # type: ignore[operator]
    with pytest.raises(ValuesDifferError, match=r"model.up.weight \[4:8,0:6\] \(ranks 1 and 3\)\."):
        ckpt.check_replicas(state)
    return dist.get_rank()


def test_replicas_of_shards_are_compared_with_each_other_only() -> None:
    assert run_ranks(_sharded, 4) == [0, 1, 2, 3]


def _broken(rank: int, world_size: int) -> str:
    state = {"w": torch.zeros(2, device="meta" if rank == 1 else "cpu")}
    with pytest.raises(Exception, match="meta device") as caught:
        ckpt.check_replicas(state)
    return type(caught.value).__name__


def test_a_state_that_can_not_be_saved_is_an_error_on_every_rank() -> None:
    assert run_ranks(_broken, 2) == ["StateError", "StateError"]


def test_alone_there_is_nothing_to_compare() -> None:
    assert ckpt.check_replicas({"w": torch.zeros(4)}) == 0
