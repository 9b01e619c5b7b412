"""FSDP1 in all of its states: whatever it shows, its own flat shards are what is saved and loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt_formats.errors import StateError, StateMismatchError
from tests.loading.test_every_cut import contents
from tests.ranks import run_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(tokens)))


def wrapped(seed: int, *, original: bool, strategy: str = "FULL_SHARD") -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    return FullyShardedDataParallel(
        Tied(),
        use_orig_params=original,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )


TOKENS = torch.arange(6).reshape(2, 3)


def in_all_states(rank: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    torch.manual_seed(1)
    plain = Tied()
    ckpt.save({"model": plain}, f"{folder}/plain")
    for original in (True, False):
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
            name = f"{folder}/{strategy}_{original}"
            model = wrapped(1, original=original, strategy=strategy)
            ckpt.save({"model": model}, f"{name}_made")
            for kind in StateDictType:
                FullyShardedDataParallel.set_state_dict_type(model, kind)
                ckpt.save({"model": model}, f"{name}_{kind.name}")
            loss = model(TOKENS).sum()
            ckpt.save({"model": model}, f"{name}_gathered")
            loss.backward()
            ckpt.save({"model": model}, f"{name}_backward")

            other = wrapped(2, original=original, strategy=strategy)
            with torch.no_grad():
                other(TOKENS)  # leaves the full parameters there
                ckpt.load({"model": other}, f"{folder}/plain")
                assert torch.equal(other(TOKENS), plain(TOKENS)), "a gathered copy of the parameters before was used"
            with (
                FullyShardedDataParallel.summon_full_params(other),
                pytest.raises(StateError, match="outside of summon_full_params"),
            ):
                ckpt.save({"model": other}, f"{folder}/never")


def test_fsdp1_saves_and_loads_its_own_shards_whatever_it_shows(tmp_path: Path) -> None:
    run_ranks(in_all_states, 2, str(tmp_path))
    truth = contents(tmp_path / "plain")
    saved = [path for path in tmp_path.iterdir() if path.name != "plain"]
    assert len(saved) == 4 * 6
    for path in saved:
        found = contents(path)
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth), path.name
        with ckpt.open(path) as checkpoint:
            assert checkpoint.manifest.aliases == {"model.head.weight": "model.embed.weight"}


def into_one_group(rank: int, world: int, path: str) -> None:
    model = wrapped(1, original=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(StateMismatchError, match=r"in one group.*weight_decay"):
        ckpt.load({"model": model, "optimizer": optimizer}, path)


def test_a_flat_parameter_can_not_have_two_groups(tmp_path: Path) -> None:
    model = Tied()
    weights, biases = [model.embed.weight, model.inner.weight], [model.inner.bias]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])
    model(TOKENS).sum().backward()
    optimizer.step()
    ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "a")
    run_ranks(into_one_group, 2, str(tmp_path / "a"))
