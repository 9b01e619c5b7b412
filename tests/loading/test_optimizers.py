"""Optimizers beyond Adam, on FSDP2 and in one process: saved in one, loaded into the other, trained on bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import ckpt
from ckpt_formats.errors import StateError
from tests.loading.cuts import Run, data_parallel, made
from tests.loading.test_every_cut import contents
from tests.ranks import run_ranks


class Blockwise(torch.optim.Optimizer):
    """Momentum in eight bits, with a scale for each block of 4 elements of this rank's part, as 8-bit Adam has."""

    def __init__(self, params: Iterable[Any], lr: float = 0.0625) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad, whole = parameter.grad, parameter
                if isinstance(parameter, DTensor):
                    grad, whole = grad.to_local(), parameter.to_local()
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
                    state["largest"] = torch.zeros_like(parameter, dtype=torch.float32)
                codes, largest = (
                    slot.to_local() if isinstance(slot, DTensor) else slot
                    for slot in (state["codes"], state["largest"])
                )
                momentum = (codes.to(grad.dtype) - 128) / 127 * largest + grad
                largest.copy_(momentum.abs().clamp(min=1e-3))
                codes.copy_((momentum / largest * 127 + 128).clamp(0, 255))
                state["step"] += 1
                whole.sub_(group["lr"] * momentum)


class Factored(torch.optim.Optimizer):
    """Second moments of a matrix as factors, one of its rows and one of its columns, equal on all ranks."""

    def __init__(self, params: Iterable[Any], lr: float = 0.0625) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                squares = (grad.full_tensor() if isinstance(grad, DTensor) else grad).square().flatten(1)
                state = self.state[parameter]
                for slot, dim in (("row", 1), ("col", 0)):
                    new = squares.mean(dim)
                    if isinstance(parameter, DTensor):
                        new = DTensor.from_local(new, parameter.device_mesh, [Replicate()], run_check=False)
                    if slot not in state:
                        state[slot] = torch.zeros_like(new)
                    state[slot].mul_(0.5).add_(new)
                row, col = (
                    slot.to_local() if isinstance(slot, DTensor) else slot for slot in (state["row"], state["col"])
                )
                update = (row[:, None] * col / (row.mean() + 1e-6) + 1e-6).rsqrt().view(parameter.shape)
                if isinstance(parameter, DTensor):
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.sub_(group["lr"] * update * grad)


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2]


def others(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim != 2]


def everything(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda model: torch.optim.SGD(everything(model), lr=0.125, momentum=0.5, nesterov=True),
    "adam_foreach": lambda model: torch.optim.Adam(everything(model), lr=0.0625, foreach=True, amsgrad=True),
    "adam_fused": lambda model: torch.optim.AdamW(everything(model), lr=0.0625, fused=True),
    "adam_tensor_lr": lambda model: torch.optim.AdamW(everything(model), lr=torch.tensor(0.0625)),
    "adagrad": lambda model: torch.optim.Adagrad(everything(model), lr=0.0625),
    "rmsprop": lambda model: torch.optim.RMSprop(everything(model), lr=0.0625, centered=True, momentum=0.5),
    "asgd": lambda model: torch.optim.ASGD(everything(model), lr=0.0625),
    "eight_bits": lambda model: Blockwise(everything(model)),
    "muon_and_adam": lambda model: [
        torch.optim.Muon(matrices(model), lr=0.0625),
        torch.optim.AdamW(others(model), lr=0.0625),
    ],
    "factored": lambda model: Factored([p for p in everything(model) if p.ndim > 1]),
    # DistributedDataParallel in the place of FSDP2: torch's can't run on tensors that are cut
    "ddp_adafactor": lambda model: torch.optim.Adafactor(everything(model), lr=0.0625),
}
SAME_NUMBERS = [name for name in OPTIMIZERS if name not in ("muon_and_adam", "factored", "adam_fused")]
"""Those that go element by element, so that a cut gives what one process gives. (A fused step rounds vectors and what
is left over otherwise.)"""


class Several:
    """Steps of several optimizers, each of which owns some parameters."""

    def __init__(self, made: Any) -> None:
        self.all = made if isinstance(made, list) else [made]

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()


def run_with(name: str, seed: int) -> Run:
    model = made(seed)
    # a copy of what is not cut yet: torch can't copy a module of FSDP2
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.5))
    parts, part = 1, 0
    if dist.get_world_size() > 1:
        parts, part = dist.get_world_size(), dist.get_rank()
        mesh = init_device_mesh("cpu", (parts,), mesh_dim_names=("dp",))
    if parts > 1 and name.startswith("ddp"):
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif parts > 1:
        for whole in (model, average.module):
            for layer in whole.layers.values():
                fully_shard(layer, mesh=mesh)
            fully_shard(whole, mesh=mesh)
    optimizer = OPTIMIZERS[name](model)
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    run = data_parallel(model, Several(optimizer), parts, part)
    plain = run.step

    def step(number: int) -> None:
        plain(number)
        average.update_parameters(inner)

    return Run(model, optimizer, step, {"model": model, "optimizer": optimizer, "average": average})


def save_on(rank: int, world: int, folder: str, names: list[str]) -> None:
    for name in names:
        run = run_with(name, 5)
        run.step(0)
        run.step(1)
        ckpt.save(run.state, f"{folder}/{name}_{world}")
        run.step(2)
        ckpt.save(run.state, f"{folder}/{name}_{world}_unbroken")


def load_on(rank: int, world: int, folder: str, names: list[str]) -> None:
    for name in names:
        for source in (1, 2):
            run = run_with(name, 6)
            if source == world:
                run.step(0)  # an optimizer with state of its own must end up with what was saved, as a fresh one must
            ckpt.load(run.state, f"{folder}/{name}_{source}")
            ckpt.save(run.state, f"{folder}/{name}_{source}_{world}")
            run.step(2)
            ckpt.save(run.state, f"{folder}/{name}_{source}_{world}_resumed")


@pytest.mark.timeout(400)
def test_every_optimizer_goes_from_fsdp2_to_one_process_and_back(tmp_path: Path) -> None:
    for world in (1, 2):
        run_ranks(save_on, world, str(tmp_path), list(OPTIMIZERS), timeout=180)
    for world in (1, 2):
        run_ranks(load_on, world, str(tmp_path), list(OPTIMIZERS), timeout=180)
    for name in OPTIMIZERS:
        if name in SAME_NUMBERS:
            assert_same_state(tmp_path / f"{name}_2", tmp_path / f"{name}_1")
        for source in (1, 2):
            for world in (1, 2):
                assert_same_state(tmp_path / f"{name}_{source}_{world}", tmp_path / f"{name}_{source}")
                if source == world or name in SAME_NUMBERS:
                    resumed = tmp_path / f"{name}_{source}_{world}_resumed"
                    assert_same_state(resumed, tmp_path / f"{name}_{source}_unbroken")


def assert_same_state(path: Path, truth: Path) -> None:
    found, expected = contents(path), contents(truth)
    assert found.keys() == expected.keys()
    differ = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not differ, f"{path.name}: {differ}"


class Plain(torch.optim.Optimizer):
    """Keeps a count as a tensor of one element, and a sum of what this rank has of gradients, neither as a DTensor."""

    def __init__(self, params: Iterable[Any], slots: tuple[str, ...]) -> None:
        super().__init__(params, {"lr": 0.5})
        self.slots = slots

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
                made = {"count": torch.zeros(1), "sum": torch.zeros_like(grad)}
                state = self.state[parameter]
                for slot in self.slots:
                    state.setdefault(slot, made[slot]).add_(1 if slot == "count" else grad)


def _single(rank: int, world_size: int, folder: str) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    def sharded() -> torch.nn.Linear:
        model = torch.nn.Linear(3, 2)
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        assert model.bias.to_local().shape == (1,)  # type: ignore[operator]
        return model

    model = sharded()
    ckpt.save(step(model, Plain(model.parameters(), ("count", "sum"))), f"{folder}/a")
    with ckpt.open(f"{folder}/a") as saved:
        found = {name: tensor[...].tolist() for name, tensor in saved.tensors.items() if ".state." in name}
    assert found == {
        "optimizer.state.weight.count": [1.0],
        "optimizer.state.weight.sum": [[1.0, 1.0, 1.0]] * 2,
        "optimizer.state.bias.count": [1.0],
        "optimizer.state.bias.sum": [1.0, 1.0],
    }
    model = sharded()
    ckpt.load({"model": model, "optimizer": (optimizer := Plain(model.parameters(), ()))}, f"{folder}/a")
    assert optimizer.state[model.bias]["sum"].shape == (1,)
    for slot in ("count", "sum"):  # nothing tells what it is
        model = sharded()
        with pytest.raises(StateError, match=rf"optimizer\.state\.bias\.{slot}' is a plain tensor of one element"):
            ckpt.save(step(model, Plain([model.bias], (slot,))), f"{folder}/b")
    model = sharded()
    ckpt.save(step(model, torch.optim.AdamW([model.bias])), f"{folder}/c")
    # what was cut by hand has slots that are like it, as any plain tensor has
    plain = torch.nn.Linear(3, 1)
    ckpt.mark(plain, "weight", (2, 3), (rank, 0))
    ckpt.mark(plain, "bias", (2,), (rank,))
    ckpt.save(step(plain, torch.optim.AdamW([plain.bias])), f"{folder}/d")
    with ckpt.open(f"{folder}/d") as saved:
        assert saved["optimizer.state.bias.exp_avg"].shape == (2,)
    plain.zero_grad()
    ckpt.save(step(plain, Plain(plain.parameters(), ("count", "sum"))), f"{folder}/e")
    with ckpt.open(f"{folder}/e") as saved:
        assert saved["optimizer.state.bias.count"].shape == (1,)
        assert saved["optimizer.state.bias.sum"][...].tolist() == [1.0, 1.0]


def test_a_slot_of_one_element_is_a_number_or_a_part_as_the_slots_of_other_parameters_are(tmp_path: Path) -> None:
    run_ranks(_single, 2, str(tmp_path))
