"""Names and local values are those of torch.distributed.checkpoint.state_dict, however a model is wrapped and cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ckpt.state import LocalState, flatten
from tests.ranks import run_ranks
from tests.state.in_memory import same_bits


class Block(nn.Module):
    """Sizes that no mesh divides: over 4 ranks, 101 is uneven, 7 leaves one row, and 3 leaves some rank nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 101)
        self.down = nn.Linear(101, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("seen", torch.tensor(3))
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x)))) * self.scale.sum()


class Model(nn.Module):
    """Frozen and tied parameters, a buffer that isn't saved, and one of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.rand(5, 2), requires_grad=False)
        self.register_buffer("passing", torch.rand(3), persistent=False)
        self.register_buffer("nothing", torch.rand(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randint(11, (8,), generator=generator)).pow(2).mean().backward()
    optimizer.step()


def assert_as_the_oracle(state: dict[str, Any], local: LocalState) -> None:
    model, optimizer = state["model"], state["optimizer"]
    theirs = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    osd = get_optimizer_state_dict(model, optimizer)
    for name, slots in osd["state"].items():
        theirs |= {f"optimizer.state.{name}.{slot}": value for slot, value in slots.items()}

    assert set(local.tensors) | set(local.aliases) == set(theirs)
    assert local.values["optimizer.param_groups"] == osd["param_groups"]
    for name, tensor in theirs.items():
        ours = local.tensors[local.aliases.get(name, name)]
        mine = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        assert ours.shape == tuple(tensor.shape)
        assert ours.dtype == tensor.dtype
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for piece in ours.pieces:
            assert same_bits(piece.view, full[piece.box.slices()]), f"{name}{piece.box}"
        assert sum(piece.box.numel for piece in ours.pieces) == mine.numel(), name


def plain(rank: int) -> nn.Module:
    return Model()


def ddp(rank: int) -> nn.Module:
    return DistributedDataParallel(Model())


def compiled_and_checkpointed(rank: int) -> nn.Module:
    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return DistributedDataParallel(torch.compile(model, backend="eager"))


def sharded(model: Model, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(rank: int) -> nn.Module:
    return sharded(Model(), init_device_mesh("cpu", (4,), mesh_dim_names=("dp",)))


def hsdp(rank: int) -> nn.Module:
    return sharded(Model(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))


def parallel(model: Model, mesh: DeviceMesh) -> Model:
    for block in model.blocks:
        # what is between them stays a DTensor: the size of a plain tensor would not tell how uneven it is cut
        plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def tp(rank: int) -> nn.Module:
    return parallel(Model(), init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))


def fsdp2_over_tp(rank: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return sharded(parallel(Model(), mesh["tp"]), mesh["dp"])


def compare(rank: int, world: int, wrap: Callable[[int], nn.Module], steps: int) -> list[str]:
    torch.manual_seed(0)
    model = wrap(rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # foreach: DTensors and plain tensors don't go together in one call of it
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.5}], foreach=False
    )
    for seed in range(steps):
        step(model, optimizer, seed)
    state = {"model": model, "optimizer": optimizer}
    local = flatten(state)
    if steps:
        assert_as_the_oracle(state, local)
    return [f"{name}:{tensor.cut}" for name, tensor in local.tensors.items() if not tensor.pieces]


@pytest.mark.parametrize(
    "wrap", [plain, ddp, compiled_and_checkpointed, fsdp2, hsdp, tp, fsdp2_over_tp], ids=lambda wrap: wrap.__name__
)
def test_names_and_local_values_are_those_of_torch(wrap: Callable[[int], nn.Module]) -> None:
    run_ranks(compare, 4, wrap, 2)


def test_ranks_with_an_empty_shard_have_no_pieces() -> None:
    empty = run_ranks(compare, 4, fsdp2, 2)
    assert not any(name.startswith("model.blocks.0.scale:") for name in empty[0])
    assert "model.blocks.0.scale:S(0)@dp" in empty[3]
    assert "optimizer.state.blocks.0.scale.exp_avg:S(0)@dp" in empty[3]


def gathered_by_a_forward_pass(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = fsdp2(rank)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    step(model, optimizer)
    before = flatten({"model": model, "optimizer": optimizer})
    values = {name: [piece.view.clone() for piece in tensor.pieces] for name, tensor in before.tensors.items()}
    model(torch.arange(8))  # the root keeps its parameters gathered until a backward pass
    assert not isinstance(model.frozen, DTensor)

    after = flatten({"model": model, "optimizer": optimizer})

    assert not isinstance(model.frozen, DTensor), "saving has resharded the model"
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in after.tensors.items():
        assert tensor.cut == before.tensors[name].cut
        for piece, value in zip(tensor.pieces, values[name], strict=True):
            assert same_bits(piece.view, value), name


def test_parameters_that_fsdp_holds_gathered_are_saved_sharded_and_stay_gathered() -> None:
    run_ranks(gathered_by_a_forward_pass, 4)


def two_stages(rank: int, world: int) -> tuple[list[str], Any]:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    mine = nn.Sequential()
    for index, part in list(whole.named_children())[2 * rank : 2 * rank + 2]:
        mine.add_module(index, part)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    mine(torch.rand(4, 3 if rank == 0 else 5)).sum().backward()
    optimizer.step()
    local = flatten({"model": mine, "optimizer": optimizer})
    distributed.barrier()
    return sorted(local.tensors), local.values["optimizer.param_groups"]


def test_pipeline_stages_have_the_names_of_the_whole_model() -> None:
    first, second = run_ranks(two_stages, 2)
    assert first[0] == [
        "model.0.bias",
        "model.0.weight",
        "optimizer.state.0.bias.momentum_buffer",
        "optimizer.state.0.weight.momentum_buffer",
    ]
    assert second[1][0]["params"] == ["2.weight", "2.bias"]
