"""Saving changes nothing: not a bit, not an optimizer's step, not a hook."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ckpt.state import RNG, flatten
from tests.state.in_memory import same_bits

OPTIMIZERS = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1), capturable=False, amsgrad=True),
    torch.optim.Adafactor,
    torch.optim.LBFGS,
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def everything(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a save could have changed, copied."""
    return copy.deepcopy(
        {
            "model": module.state_dict(),
            "grads": [parameter.grad for parameter in module.parameters()],
            "state": list(optimizer.state.values()),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "random": [random.getstate(), str(np.random.get_state()), torch.get_rng_state()],  # noqa: NPY002
        }
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return same_bits(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_fresh_optimizer_stays_fresh(make: Any) -> None:
    module = model()
    optimizer = make(module.parameters())
    before = everything(module, optimizer)

    local = flatten({"model": module, "optimizer": optimizer, "rng": RNG()})

    assert not optimizer.state, "absent state must stay absent"
    assert not any(name.startswith("optimizer.") for name in local.tensors)
    assert equal(everything(module, optimizer), before)


def test_torch_itself_steps_a_fresh_optimizer() -> None:
    """What the test above would find, were flatten built upon it."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    get_optimizer_state_dict(module, optimizer)
    assert optimizer.state


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_step_is_run_and_no_hook_called(make: Any) -> None:
    module = model()
    optimizer = make(module.parameters())
    optimizer.zero_grad()
    module(torch.rand(4, 3)).sum().backward()
    optimizer.step(lambda: torch.tensor(1.0))
    called: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("step")),
        optimizer.register_state_dict_pre_hook(lambda *_: called.append("state_dict")),
        module.register_forward_pre_hook(lambda *_: called.append("forward")),
        register_optimizer_step_pre_hook(lambda *_: called.append("any step")),
        register_optimizer_step_post_hook(lambda *_: called.append("any step")),
    ]
    before = everything(module, optimizer)
    try:
        flatten({"model": module, "optimizer": optimizer, "rng": RNG()})
    finally:
        for handle in handles:
            handle.remove()
    assert not called
    assert equal(everything(module, optimizer), before)


def test_views_share_the_live_memory_and_need_no_gradient() -> None:
    module = model()
    local = flatten({"model": module})
    view = local.tensors["model.0.weight"].pieces[0].view
    assert view.data_ptr() == module[0].weight.data_ptr()
    assert not view.requires_grad
    with torch.no_grad():
        module[0].weight.fill_(7)
    assert view[0, 0] == 7


def test_what_changed_between_saves_is_seen() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    state: dict[str, Any] = {"model": module, "optimizer": optimizer}
    before = flatten(state)

    module.append(nn.Linear(2, 2))  # grown
    module[2] = nn.Linear(5, 2, bias=False)  # replaced, and lost its bias
    module[0].weight.data = torch.ones(5, 3, dtype=torch.float64)  # other memory in the same parameter
    state["optimizer"] = torch.optim.SGD(module.parameters(), lr=0.1)

    after = flatten(state)
    assert set(after.tensors) - set(before.tensors) == {"model.3.weight", "model.3.bias"}
    assert set(before.tensors) - set(after.tensors) == {"model.2.bias"}
    assert after.tensors["model.2.weight"].pieces[0].view.data_ptr() == module[2].weight.data_ptr()
    assert after.tensors["model.0.weight"].dtype == torch.float64
    assert "3.weight" in after.values["optimizer.param_groups"][0]["params"]
