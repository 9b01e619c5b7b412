"""Any mesh to any mesh: what one cut saved, every other cut loads, model and optimizer, bit for bit.

Real gloo processes. The truth comes from torch: its own gathering of the full state dict, before saving and after
loading.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckpt
from tests.ranks import run_ranks

CUTS = {
    "single": 1,
    "ddp2": 2,
    "fsdp2": 2,
    "tp2": 2,
    "fsdp3": 3,
    "tp3": 3,
    "fsdp4": 4,
    "tp4": 4,
    "hsdp2x2": 4,
    "fsdp2tp2": 4,
}
IN_PAIRS = ["single", "ddp2", "fsdp3", "tp3", "fsdp4", "fsdp2tp2"]
"""Which are loaded into each other; test_every_cut.py has more."""


class Block(torch.nn.Module):
    """Sizes that nothing divides, a vector shorter than the world, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 101)
        self.down = torch.nn.Linear(101, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.short = torch.nn.Parameter(torch.randn(3))
        self.gain = torch.nn.Parameter(torch.randn(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.randn(5, 3))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(101, 7)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(7, 101, bias=False)


def build(cut: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, cut as said, with weights that depend on the seed, and its optimizer."""
    torch.manual_seed(seed)
    model: torch.nn.Module = Model()
    plan = {"head": ColwiseParallel()}
    for k in range(2):
        plan |= {f"blocks.{k}.up": ColwiseParallel(), f"blocks.{k}.down": RowwiseParallel()}
    world = CUTS[cut]
    if cut.startswith("ddp"):
        model = DistributedDataParallel(model)
    elif cut == "fsdp2tp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    elif cut == "hsdp2x2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model, mesh=mesh)
    elif cut.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    elif cut.startswith("tp"):
        parallelize_module(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), plan)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Real optimizer steps; the gradients are a function of the weights, so that every cut can make them."""
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = (parameter.detach() * (0.1 + step)).sin()
        optimizer.step()
        optimizer.zero_grad()


def truth(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The whole state, gathered by torch."""
    options = StateDictOptions(full_state_dict=True)
    whole: dict[str, object] = dict(get_model_state_dict(model, options=options))
    for fqn, slots in get_optimizer_state_dict(model, optimizer, options=options)["state"].items():
        whole |= {f"{fqn}/{slot}": value for slot, value in slots.items()}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in whole.items()}


def save_on(rank: int, world_size: int, cuts: list[str], folder: str) -> dict[str, dict[str, object]]:
    saved = {}
    for seed, cut in enumerate(cuts):
        model, optimizer = build(cut, seed)
        train(model, optimizer, 2)
        saved[cut] = truth(model, optimizer)
        ckpt.save({"model": model, "optimizer": optimizer}, f"{folder}/{cut}")
    return saved


def load_on(rank: int, world_size: int, cuts: list[str], folder: str) -> dict[tuple[str, str], dict[str, object]]:
    loaded = {}
    for cut in cuts:
        for source in IN_PAIRS:
            model, optimizer = build(cut, 1000 + len(loaded))
            if len(loaded) % 2:
                # an optimizer with state of its own must end up with what was saved, as a fresh one must
                train(model, optimizer, 1)
            ckpt.load({"model": model, "optimizer": optimizer}, f"{folder}/{source}")
            loaded[source, cut] = truth(model, optimizer)
    return loaded


def by_world() -> dict[int, list[str]]:
    worlds: dict[int, list[str]] = {}
    for cut in IN_PAIRS:
        world = CUTS[cut]
        worlds.setdefault(world, []).append(cut)
    return worlds


def assert_equal(a: dict[str, object], b: dict[str, object], what: str) -> None:
    assert a.keys() == b.keys(), what
    for name, value in a.items():
        other = b[name]
        if isinstance(value, torch.Tensor):
            assert isinstance(other, torch.Tensor)
            assert value.dtype == other.dtype
            assert torch.equal(value, other), f"{what}: {name}"
        else:
            assert value == other, f"{what}: {name}"


@pytest.mark.timeout(600)
def test_what_one_cut_saved_every_other_cut_loads_bit_for_bit(tmp_path: Path) -> None:
    saved: dict[str, dict[str, object]] = {}
    for world, cuts in by_world().items():
        saved |= run_ranks(save_on, world, cuts, str(tmp_path), timeout=240)[0]
    pairs = 0
    for world, cuts in by_world().items():
        for result in run_ranks(load_on, world, cuts, str(tmp_path), timeout=240):
            for (source, cut), whole in result.items():
                assert_equal(saved[source], whole, f"{source} -> {cut}")
                pairs += 1
    assert pairs == sum(len(IN_PAIRS) * CUTS[cut] for cut in IN_PAIRS)


def resume_on(rank: int, world_size: int, cut: str, folder: str) -> None:
    model, optimizer = build(cut, 5)
    train(model, optimizer, 2)
    ckpt.save({"model": model, "optimizer": optimizer}, f"{folder}/{cut}_{world_size}")
    train(model, optimizer, 2)
    uninterrupted = truth(model, optimizer)
    model, optimizer = build(cut, 6)
    ckpt.load({"model": model, "optimizer": optimizer}, f"{folder}/{cut}_{world_size}")
    train(model, optimizer, 2)
    assert_equal(uninterrupted, truth(model, optimizer), cut)


@pytest.mark.parametrize("cut", ["fsdp2", "fsdp2tp2"])
def test_training_goes_on_bit_for_bit_after_a_load(cut: str, tmp_path: Path) -> None:
    run_ranks(resume_on, CUTS[cut], cut, str(tmp_path), timeout=120)


def each_box_once(rank: int, world_size: int, folder: str) -> tuple[int, int]:
    model, _ = build("hsdp2x2", 0)
    ckpt.save({"model": model}, f"{folder}/a")
    dist.barrier()
    with ckpt.open(f"{folder}/a") as checkpoint:
        stored = sum(
            sum(table.length.tolist())
            for page in range(checkpoint.manifest.page_count)
            for table in checkpoint.locations.places(page)
        )
        needed = sum(meta.nbytes for meta in checkpoint.manifest.tensors.values())
    return stored, needed


def test_replicated_boxes_are_written_once(tmp_path: Path) -> None:
    for stored, needed in run_ranks(each_box_once, 4, str(tmp_path)):
        assert stored == needed
