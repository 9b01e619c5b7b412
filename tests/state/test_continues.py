"""Training that was saved, and loaded into another replica, goes on bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from tests.state.in_memory import load, same_bits, save

State = dict[str, Any]
AdamW = torch.optim.AdamW


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Dropout(0.2), nn.Linear(13, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scalar = nn.Parameter(torch.rand(()))
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)) * self.scalar)


def one(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Net], State]:
    def build(net: Net) -> State:
        return {"optimizer": make([p for p in net.parameters() if p.requires_grad], **options)}

    return build


def groups(net: Net) -> State:
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    listed = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "lr": 0.02, "betas": (0.8, 0.9)}]
    return {"optimizer": AdamW(listed, lr=0.01)}


def two_optimizers(net: Net) -> State:
    return {
        "matrices": torch.optim.Muon([p for p in net.body.parameters() if p.ndim == 2], lr=0.01),
        "rest": AdamW([p for p in net.parameters() if p.ndim != 2 or p is net.embed.weight], lr=0.01),
    }


def unfrozen_late(net: Net) -> State:
    """Some parameters have no state yet."""
    return {"optimizer": AdamW(net.parameters(), lr=0.01)}


def schedulers(net: Net) -> State:
    optimizer = AdamW(net.parameters(), lr=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])
    return {"optimizer": optimizer, "scheduler": both}


def one_cycle(net: Net) -> State:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)}


def averaged(net: Net) -> State:
    optimizer = AdamW(net.parameters(), lr=0.01)
    averages = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return {"optimizer": optimizer, "ema": averages, "scheduler": SWALR(optimizer, swa_lr=0.05, anneal_epochs=9)}


def scaled(net: Net) -> State:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    return {"optimizer": AdamW(net.parameters(), lr=0.01), "scaler": scaler}


def train(net: Net, state: State, steps: range) -> None:
    optimizers = [thing for thing in state.values() if isinstance(thing, torch.optim.Optimizer)]
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randint(11, (8,), generator=generator)
        torch.manual_seed(seed)

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch), batch)
            scaler = state.get("scaler")
            (scaler.scale(loss) if scaler else loss).backward()
            return loss

        if isinstance(optimizers[0], torch.optim.LBFGS):
            optimizers[0].step(closure)
            continue
        closure()
        for optimizer in optimizers:
            if "scaler" in state:
                state["scaler"].step(optimizer)
                state["scaler"].update()
            elif optimizer.defaults.get("capturable"):
                # on a CPU torch allows that only to what is compiled
                torch.compile(optimizer.step, backend="eager")()
            else:
                optimizer.step()
        if "scheduler" in state:
            state["scheduler"].step()
        if "ema" in state:
            state["ema"].update_parameters(net)


def made(seed: int, build: Callable[[Net], State]) -> tuple[Net, State]:
    torch.manual_seed(seed)
    net = Net()
    return net, {"model": net, **build(net)}


def assert_alike(one: State, other: State) -> None:
    a, b = save(one), save(other)
    assert a.tensors == b.tensors
    assert a.values == b.values
    assert a.aliases == b.aliases
    for name in a.tensors:
        assert same_bits(a.whole(name), b.whole(name)), name


@pytest.mark.parametrize(
    "build",
    [
        one(torch.optim.SGD, lr=0.1),
        one(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        one(AdamW, lr=0.01, foreach=True),
        one(AdamW, lr=0.01, foreach=False),
        one(AdamW, lr=0.01, fused=True),
        one(AdamW, lr=0.01, amsgrad=True),
        one(AdamW, lr=torch.tensor(0.01), foreach=False),
        pytest.param(
            one(AdamW, lr=torch.tensor(0.01), capturable=True),
            marks=pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
        ),
        one(AdamW, lr=torch.tensor(0.01), betas=(torch.tensor(0.8), torch.tensor(0.99)), foreach=False),
        one(torch.optim.Adafactor, lr=0.01),
        one(torch.optim.NAdam, lr=0.01),
        one(torch.optim.ASGD, lr=0.01),
        one(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
        one(torch.optim.Rprop, lr=0.01),
        one(torch.optim.LBFGS, lr=0.01, max_iter=3),
        groups,
        two_optimizers,
        schedulers,
        one_cycle,
        averaged,
        scaled,
    ],
)
@pytest.mark.parametrize("used", [False, True], ids=["into a fresh replica", "into a used one"])
def test_training_goes_on_bit_for_bit(build: Callable[[Net], State], used: bool) -> None:
    net, state = made(0, build)
    train(net, state, range(3))
    saved = save(state)
    other, replica = made(1, build)
    if used:
        train(other, replica, range(50, 52))

    target = load(replica, saved)

    assert (target.missing, target.unexpected) == ([], [])
    assert_alike(replica, state)
    assert other.head.weight is other.embed.weight
    train(net, state, range(3, 7))
    train(other, replica, range(3, 7))
    assert_alike(replica, state)


def test_a_parameter_without_saved_state_has_none_afterwards() -> None:
    net, state = made(0, unfrozen_late)
    net.scalar.requires_grad_(False)
    train(net, state, range(2))
    saved = save(state)
    other, replica = made(1, unfrozen_late)
    train(other, replica, range(2))
    assert other.scalar in replica["optimizer"].state

    load(replica, saved)

    assert other.scalar not in replica["optimizer"].state
    assert other.embed.weight in replica["optimizer"].state


def test_nothing_is_attached_before_apply() -> None:
    from ckpt.state import build_target
    from tests.state.in_memory import saved_state

    net, state = made(0, groups)
    train(net, state, range(2))
    known = saved_state(save(state))
    _, replica = made(1, groups)
    build_target(replica, known)
    assert not replica["optimizer"].state
    assert replica["optimizer"].param_groups[1]["betas"] == (0.8, 0.9)
