"""A state saved in one parallelism fills the same model in any other, optimizer included, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate

from ckpt.state import build_target
from tests.ranks import run_ranks
from tests.state.in_memory import gathered, load, same_bits, save, saved_state
from tests.state.test_names import Model, ddp, fsdp2, fsdp2_over_tp, hsdp, plain, step, tp

WRAPS = {wrap.__name__: wrap for wrap in (plain, ddp, fsdp2, hsdp, tp, fsdp2_over_tp)}


class Odd(torch.optim.Optimizer):
    """Slots of all kinds: of a row of the parameter, whole on every rank; of the local part; numbers; nested ones."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                row = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                while row.ndim > 1:
                    row = row.mean(0)
                if isinstance(p, DTensor):
                    row = DTensor.from_local(row, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
                state["row"] = row
                state["part"] = (p.grad._local_tensor if isinstance(p.grad, DTensor) else p.grad).clone()
                state["count"] = state.get("count", 0) + 1
                state["nested"] = {"mean": p.grad * 0.5, "sizes": [1, torch.tensor([2.0])], 3: None}
                p.sub_(p.grad, alpha=group["lr"])


def optimizer_of(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "odd":
        return Odd(parameters)
    return torch.optim.AdamW(parameters, foreach=False, amsgrad=True)


def from_one_into_all(rank: int, world: int, source: str, kind: str) -> None:
    torch.manual_seed(0)
    model = WRAPS[source](rank)
    optimizer = optimizer_of(model, kind)
    for seed in range(2):
        step(model, optimizer, seed)
    saved = save({"model": model, "optimizer": optimizer})
    if rank == 0:
        assert saved.aliases == {"model.head.weight": "model.embed.weight"}
    for name, wrap in WRAPS.items():
        torch.manual_seed(1)
        other = wrap(rank)
        fresh = optimizer_of(other, kind)
        target = load({"model": other, "optimizer": fresh}, saved, rank=rank)
        assert (target.missing, target.unexpected) == ([], []), name
        again = save({"model": other, "optimizer": fresh})
        assert again.tensors == saved.tensors, name
        assert again.values == saved.values, name
        for tensor in saved.tensors:
            assert same_bits(again.whole(tensor), saved.whole(tensor)), f"{source} -> {name}: {tensor}"
        step(other, fresh, 2)  # what was made must be what the optimizer works with


@pytest.mark.parametrize("source", ["plain", "fsdp2", "fsdp2_over_tp"])
def test_from_one_parallelism_into_any(source: str) -> None:
    run_ranks(from_one_into_all, 4, source, "adamw")


@pytest.mark.parametrize("source", ["ddp", "fsdp2"])
def test_slots_of_any_kind_and_shape(source: str) -> None:
    run_ranks(from_one_into_all, 4, source, "odd")


def same_mesh_goes_on(rank: int, world: int, name: str) -> None:
    torch.manual_seed(0)
    model = WRAPS[name](rank)
    optimizer = optimizer_of(model, "adamw")
    for seed in range(2):
        step(model, optimizer, seed)
    saved = save({"model": model, "optimizer": optimizer})
    torch.manual_seed(1)
    other = WRAPS[name](rank)
    fresh = optimizer_of(other, "adamw")
    other(torch.arange(8))  # FSDP2 holds parameters gathered now; what is loaded must not be hidden by them
    load({"model": other, "optimizer": fresh}, saved, rank=rank)
    for seed in range(2, 4):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    one, two = save({"model": model, "optimizer": optimizer}), save({"model": other, "optimizer": fresh})
    assert one.values == two.values
    for tensor in one.tensors:
        assert same_bits(one.whole(tensor), two.whole(tensor)), tensor


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_over_tp"])
def test_training_goes_on_bit_for_bit_on_the_same_mesh(name: str) -> None:
    run_ranks(same_mesh_goes_on, 4, name)


def stages(rank: int, world: int) -> tuple[list[str], list[str]]:
    """Saved whole, loaded by a stage per rank."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(whole.parameters())
    whole(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = save({"model": whole, "optimizer": optimizer})
    mine = torch.nn.Sequential()
    for index, part in list(whole.named_children())[2 * rank : 2 * rank + 2]:
        mine.add_module(index, part)
    fresh = torch.optim.AdamW(mine.parameters())
    target = build_target({"model": mine, "optimizer": fresh}, saved_state(saved))
    unexpected = gathered(target.unexpected)  # type: ignore[arg-type]
    nowhere = set.intersection(*map(set, unexpected))  # type: ignore[arg-type]
    load({"model": mine, "optimizer": fresh}, saved, rank=rank)
    assert len(fresh.state) == 2
    return target.missing, sorted(nowhere)


def test_what_only_another_stage_has_is_unexpected_here_but_not_everywhere() -> None:
    for missing, nowhere in run_ranks(stages, 2):
        assert missing == []
        assert nowhere == []


def test_a_model_of_one_process_is_the_same_without_a_process_group() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = optimizer_of(model, "adamw")
    step(model, optimizer)
    saved = save({"model": model, "optimizer": optimizer})
    torch.manual_seed(1)
    other = Model()
    fresh = optimizer_of(other, "adamw")
    load({"model": other, "optimizer": fresh}, saved)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(one, two)
