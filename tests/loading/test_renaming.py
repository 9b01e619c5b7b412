"""What a load with other names promises: the same bytes, slots and groups with their parameters, and checked rules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt_formats.errors import RenameError, StateMismatchError
from tests.ranks import run_ranks

Rename = Mapping[str, str | None] | Callable[[str], str | None]


class Coder(torch.nn.Module):
    """A part of a model, with a buffer."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2 + extra))
        self.register_buffer("scale", torch.ones(3))


class Model(torch.nn.Module):
    """What was trained: an encoder, a decoder, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 6)
        self.encoder = Coder()
        self.decoder = Coder()
        self.head = torch.nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight


def trained(folder: Path) -> tuple[Model, torch.optim.AdamW]:
    """Train a step and save, with two groups of parameters."""
    torch.manual_seed(3)
    model = Model()
    groups = [
        {"params": list(model.encoder.parameters()), "lr": 0.1},
        {"params": [*model.embed.parameters(), *model.decoder.parameters()], "lr": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.encoder.scale.mul_(7)
    state = {"model": model, "optimizer": optimizer, "count": 5, "sampler": {"at": torch.arange(4), "seed": 1}}
    ckpt.save(state, folder / "a")
    return model, optimizer


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def assert_same_slots(one: torch.optim.Optimizer, ours: Any, other: torch.optim.Optimizer, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert one.state[a].keys() == other.state[b].keys() != set()
        for slot in one.state[a]:
            assert torch.equal(one.state[a][slot], other.state[b][slot])


@pytest.mark.parametrize(
    ("key", "rename"),
    [
        ("encoder", {"model.encoder": "encoder"}),
        ("part", {"model.encoder.*": "part.*"}),
        ("model", {"model.encoder": "model", "model": None}),
        ("e", {"re:model\\.encoder\\.(?P<rest>.*)": "e.{rest}"}),
        ("e", lambda name: name.replace("model.encoder.", "e.")),
    ],
)
def test_a_part_of_a_model_is_loaded_by_itself(key: str, rename: Rename, tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    part = Coder()
    result = ckpt.load({key: part}, tmp_path / "a", rename=rename)
    assert_equal(part, model.encoder)
    assert result.bytes_needed == sum(t.numel() * 4 for t in part.state_dict().values())


def test_slots_and_groups_of_the_optimizer_follow_their_parameters(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    part = Coder()
    own = torch.optim.AdamW(part.parameters())
    state = {"encoder": part, "opt": own}
    rename = {"model.encoder": "encoder", "model": None, "optimizer": "opt"}
    ckpt.load(state, tmp_path / "a", rename=rename)
    assert_equal(part, model.encoder)
    assert_same_slots(own, part.parameters(), optimizer, model.encoder.parameters())
    assert [group["lr"] for group in own.param_groups] == [0.1]


def test_parameters_of_one_module_may_be_spread_over_several(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    other = Model()
    optimizers = torch.optim.AdamW(
        [
            {"params": list(other.encoder.parameters())},
            {"params": [*other.embed.parameters(), *other.decoder.parameters()]},
        ]
    )
    rest = torch.nn.ModuleDict({"embed": other.embed, "decoder": other.decoder, "head": other.head})
    state = {"first": other.encoder, "rest": rest, "optimizer": optimizers}
    ckpt.load(state, tmp_path / "a", rename={"model.encoder": "first", "model": "rest"})
    assert_equal(other, model)
    assert_same_slots(optimizers, other.parameters(), optimizer, model.parameters())
    assert [group["lr"] for group in optimizers.param_groups] == [0.1, 0.2]
    # and together again
    ckpt.save(state, tmp_path / "b")
    again = Model()
    both = torch.optim.AdamW(
        [
            {"params": list(again.encoder.parameters())},
            {"params": [*again.embed.parameters(), *again.decoder.parameters()]},
        ]
    )
    ckpt.load({"model": again, "optimizer": both}, tmp_path / "b", rename={"first": "model.encoder", "rest": "model"})
    assert_equal(again, model)
    assert_same_slots(both, again.parameters(), optimizer, model.parameters())


def test_a_twin_takes_the_place_of_a_name_that_is_left_out(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    head = torch.nn.Linear(6, 10, bias=False)
    own = torch.optim.AdamW(head.parameters())
    ckpt.load({"head": head, "optimizer": own}, tmp_path / "a", rename={"model.head": "head", "model": None})
    assert torch.equal(head.weight, model.embed.weight)
    assert_same_slots(own, [head.weight], optimizer, [model.embed.weight])
    assert own.param_groups[0]["lr"] == 0.2


def test_values_and_what_is_in_them_are_renamed_together(tmp_path: Path) -> None:
    trained(tmp_path)
    state: dict[str, Any] = {"steps": 0, "data": {"at": torch.zeros(4, dtype=torch.long), "seed": 0}}
    ckpt.load(state, tmp_path / "a", rename={"count": "steps", "sampler": "data"})
    assert state["steps"] == 5
    assert state["data"]["at"].tolist() == [0, 1, 2, 3]
    assert state["data"]["seed"] == 1


def _per_rank(rank: int, world_size: int, folder: str) -> tuple[int, bool]:
    torch.manual_seed(rank)
    ckpt.save({"own": ckpt.PerRank(rank + 10), "rng": ckpt.RNG()}, f"{folder}/a")
    drawn = torch.rand(())
    state = {"mine": ckpt.PerRank(0), "dice": ckpt.RNG()}
    ckpt.load(state, f"{folder}/a", rename={"own": "mine", "rng": "dice"})
    return state["mine"].value, bool(torch.rand(()) == drawn)  # type: ignore[attr-defined]


def test_what_ranks_have_of_their_own_is_renamed_too(tmp_path: Path) -> None:
    assert run_ranks(_per_rank, 2, str(tmp_path)) == [(10, True), (11, True)]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"model.encodr": "encoder"}, r"'model.encodr': 'encoder' renames nothing: no tensor or value"),
        ({"model.decoder": "model.encoder"}, r"both become 'model.encoder.blocks.0.bias'; leave one of them out"),
        ({"model": None, "model.encoder": "encoder"}, r"such as 'model.encoder.*a rule before it has; put it first"),
        ({"optimizer.state.*.exp_avg": "optimizer.*"}, "slots of optimizers are called after their parameters"),
        ({"model.encoder": "e", "e": "f"}, "'e': 'f' renames nothing"),
        ({"model.*.weight": "model.*.*"}, r"has 2 `\*`, but the pattern has 1"),
        ({"model.{a}.*": "model.{b}.*"}, "captures no {b}"),
        ({"model": "__ckpt__.x"}, "can't be a name here"),
        ({"model": ""}, "the new name is empty"),
        ({"model": "optimizer"}, "together with something that is no"),
        ({"re:(": "x"}, "no regular expression"),
    ],
)
def test_rules_are_checked_and_shown(rename: Rename, message: str, tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    before = copy.deepcopy(model)
    with pytest.raises(RenameError, match=message):
        ckpt.load({"model": model}, tmp_path / "a", rename=rename)
    assert_equal(model, before)


def test_what_does_not_fit_is_told_by_its_new_name(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    part = Coder(extra=1)
    rename = {"model.encoder": "part", "model.decoder.blocks.0": "part.lost"}
    with pytest.raises(StateMismatchError, match=r"In the state but not in the checkpoint: part\.blocks\.2"):
        ckpt.load({"part": part}, tmp_path / "a", rename=rename)
    result = ckpt.load({"part": part}, tmp_path / "a", rename=rename, strict=False)
    assert sorted(result.missing) == ["part.blocks.2.bias", "part.blocks.2.weight"]
    assert sorted(result.unexpected) == ["part.lost.bias", "part.lost.weight"]
    assert torch.equal(part.blocks[1].weight, model.encoder.blocks[1].weight)


def test_models_on_the_meta_device_and_casts(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    with torch.device("meta"):
        part = Coder().to(torch.bfloat16)
    ckpt.load({"part": part}, tmp_path / "a", rename={"model.encoder": "part"}, cast=True)
    assert_equal(part, copy.deepcopy(model.encoder).to(torch.bfloat16))


def test_an_open_checkpoint_has_the_new_names(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    with ckpt.open(tmp_path / "a", rename={"model.{part}.blocks.*": "{part}.layers.*", "count": "n"}) as checkpoint:
        found = checkpoint["encoder.layers.1.*"]
        assert sorted(found) == ["encoder.layers.1.bias", "encoder.layers.1.weight"]
        assert torch.equal(found["encoder.layers.1.weight"][2:4], model.encoder.blocks[1].weight[2:4])
        assert "model.encoder.blocks.1.weight" not in checkpoint.tensors
        assert checkpoint.values["n"] == 5
        assert checkpoint.values["optimizer.param_groups"][0]["params"][0] == "encoder.layers.0.weight"
        assert "optimizer.state.model.embed.weight.exp_avg" in checkpoint.tensors


def _sharded(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    part = Coder()
    fully_shard(part, mesh=mesh)
    own = torch.optim.AdamW(part.parameters())
    rename = {"model.encoder": "encoder", "model": None}
    ckpt.load({"encoder": part, "optimizer": own}, f"{folder}/a", rename=rename)
    parameters = list(part.parameters())
    return [t.full_tensor() for p in parameters for t in (p, own.state[p]["exp_avg"])]  # type: ignore[attr-defined]


def test_sharded_parts_take_their_own_rows(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path)
    expected = [t for p in model.encoder.parameters() for t in (p.detach(), optimizer.state[p]["exp_avg"])]
    for found in run_ranks(_sharded, 2, str(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
