"""Whatever is changed as soon as it may be, a checkpoint has the values of its step: hundreds of timings by chance.

What no optimizer owns is changed right after `save` returns; parameters and slots right after the fence, which is the
optimizer's own step, or after `captured`. Captures are held up by chance, and so are the ranks against each other.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckpt
from ckpt.agent.pending import PendingSave
from ckpt.agent.saver import AsyncSaver
from tests.crash.agents import Agents
from tests.crash.runs import quick_folder, saver
from tests.ranks import run_ranks

_SIZES = (1, 7, 33, 200, 1000)
Values = dict[str, torch.Tensor]


class _Net(torch.nn.Module):
    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(dice.choice(_SIZES), dice.choice(_SIZES)) for _ in range(dice.randrange(1, 9))]
        )
        self.register_buffer("seen", torch.zeros(dice.choice(_SIZES), 50))


def _optimizers(net: _Net, dice: random.Random) -> list[torch.optim.Optimizer]:
    parameters = list(net.parameters())
    cut = dice.randrange(1, len(parameters))
    kind: dict[str, Any] = dice.choice([{"fused": True}, {"foreach": True}, {"foreach": False}])
    if dice.random() < 0.5:
        return [torch.optim.AdamW(parameters, **kind)]
    return [torch.optim.Adam(parameters[:cut], **kind), torch.optim.SGD(parameters[cut:], momentum=0.9, **kind)]


def _values(net: _Net, optimizers: list[torch.optim.Optimizer], average: torch.Tensor) -> Values:
    """What the checkpoint must have, under its names."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    values = {f"net.{name}": value for name, value in net.state_dict().items()} | {"average": average}
    for number, optimizer in enumerate(optimizers):
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor):
                    values[f"optimizers.{number}.state.{names[parameter]}.{slot}"] = value
    return {name: value.detach().clone() for name, value in values.items()}


class _HoldUp:
    """Has captures take longer: by chance, and surely where a test waits for it."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._copy = torch._foreach_copy_
        self._held = threading.Event()
        self._next = False
        self.count = 0
        setattr(torch, "_foreach_copy_", self._late)  # noqa: B010

    def _late(self, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and (self._next or self._dice.random() < 0.5):
            self._next = False
            self.count += 1
            self._held.set()
            time.sleep(self._dice.random() ** 3 / 50)
        return self._copy(*arguments)

    def surely(self, sure: bool) -> None:
        """Whether the thread that copies is held up the next time in any case."""
        self._held.clear()
        self._next = sure

    def began(self, save: PendingSave) -> None:
        """If so, wait until it is: a busy machine may leave all copying to the training. With two ranks, one may have
        nothing to copy there.
        """
        deadline = time.monotonic() + 60
        while self._next and not self._held.wait(0.01) and not save.handed.is_set():
            assert time.monotonic() < deadline, "captures are not where this test holds them up"


def _train(rank: int, world_size: int, folder: str, seed: int, steps: int) -> int:
    agents = Agents(folder)
    agents.install()
    dice = random.Random(seed)  # the same on all ranks, whose state is the same
    mine = random.Random(f"{seed} {rank}")
    hold_up = _HoldUp(mine)
    torch.manual_seed(seed)
    by = AsyncSaver(saver())
    pending: list[tuple[int, PendingSave, Values]] = []
    net = _Net(dice)
    optimizers = _optimizers(net, dice)
    average = torch.zeros(300, 40)
    for step in range(steps):
        if step % 60 == 59:
            # another model, of other sizes, in the place of this one
            net = _Net(dice)
            optimizers = _optimizers(net, dice)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        state = {"net": net, "optimizers": optimizers, "average": average}
        expected = _values(net, optimizers, average)
        hold_up.surely(step % 3 == 0)
        pending.append((step, by.save(state, Path(folder, f"step_{step}")), expected))
        average += 1
        net.seen.add_(1)
        hold_up.began(pending[-1][1])
        if mine.random() < 0.5:
            time.sleep(mine.random() ** 3 / 50)
        if dice.random() < 0.3:
            pending[-1][1].captured(60)
        else:
            for optimizer in optimizers:
                optimizer.step()
        with torch.no_grad():
            for optimizer in optimizers:
                for parameter, slots in optimizer.state.items():
                    parameter.add_(1)
                    for value in slots.values():
                        if isinstance(value, torch.Tensor):
                            value.add_(1)
    for step, save, expected in pending:
        save.wait(60)
        if step % world_size == rank:
            _compare(Path(folder, f"step_{step}"), expected)
    distributed.barrier()
    by.close()
    return hold_up.count


def _compare(path: Path, expected: Values) -> None:
    with ckpt.open(path) as checkpoint:
        stored = {name for name in checkpoint.tensors if "param_groups" not in name}
        assert stored == set(expected), path
        for name, value in expected.items():
            assert torch.equal(checkpoint[name][...], value), f"{path.name}: {name}"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("steps", [70, pytest.param(700, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoint_has_the_values_of_its_step_whatever_is_changed_when(
    tmp_path: Path, world_size: int, steps: int, seed: int
) -> None:
    with quick_folder(tmp_path) as folder:
        held = run_ranks(_train, world_size, str(folder), seed, steps, timeout=steps)
    print(f"{steps} saves by {world_size} ranks, captures held up {held} times")
    assert sum(held) >= steps // 3
