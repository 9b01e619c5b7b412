"""A model that can be cut in every way, and really trained in each with the same result to the last bit.

Sums in another order give other roundings, so that hardly any cut of an ordinary model equals one process. This one
computes in float64 on multiples of small powers of two: what a forward pass keeps, and what a backward pass hands on
from one layer to the next, is rounded to them, wherever the layer is. All sums are then exact in any order, and so is
averaging over 2 or 4 ranks; what an optimizer does with the gradients is done element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional

import ckpt

VOCABULARY = 11
WIDTH = 6
HIDDEN = 10
LAYERS = 4
EXPERTS = 4
BATCH = 8
SEQUENCE = 4


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.round(value * 16) / 16

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        # of a mean over the samples that are here: the same for a sample, however many there are
        unit = 32 * grad.shape[0]
        return torch.round(grad * unit) / unit


class _WeightRounded(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.round(value * 16) / 16

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def rounded(value: torch.Tensor) -> torch.Tensor:
    return _Rounded.apply(value)


def weight(parameter: torch.Tensor) -> torch.Tensor:
    return _WeightRounded.apply(parameter)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight(self.weight), None if self.bias is None else weight(self.bias))


class Embedding(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, weight(self.weight))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rounded(x * weight(self.weight))


class Stacked(nn.Module):
    """All experts in one tensor; each token goes to one by its place in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return experts_apply(x, list(weight(self.w)), range(EXPERTS))


class Apart(nn.Module):
    """A module for each expert, called by its number in the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(k): Linear(WIDTH, WIDTH, bias=False) for k in range(EXPERTS)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return experts_apply(x, [weight(e.weight).t() for e in self.experts.values()], map(int, self.experts))


def experts_apply(x: torch.Tensor, weights: list[torch.Tensor], numbers: Any) -> torch.Tensor:
    position = torch.arange(x.shape[1]) % EXPERTS
    out = torch.zeros_like(x)
    for number, own in zip(numbers, weights, strict=True):
        out = out + (x @ own) * (position == number).to(x.dtype)[None, :, None]
    return out


class Mix(nn.Module):
    """What context parallelism has to fetch from its neighbours: every token sees the one before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rounded(x + x.roll(1, dims=1))


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.scale = Scale()
        self.up = Linear(WIDTH, HIDDEN)
        self.down = Linear(HIDDEN, WIDTH)
        self.moe = Stacked() if number == 1 else Apart() if number == 2 else nn.Identity()
        self.register_buffer("table", torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(rounded(self.up(self.scale(x))))
        x = rounded(x + self.down(hidden) / 4)
        return rounded(x + self.moe(x) / 4) if not isinstance(self.moe, nn.Identity) else x


class Model(nn.Module):
    """A language model of a kind; a stage of it has only some of its layers, under their names."""

    def __init__(self, layers: range = range(LAYERS), *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        made = nn.ModuleDict({str(k): Block(k) for k in range(LAYERS)})
        self.embed = Embedding(VOCABULARY, WIDTH)
        self.frozen = Linear(WIDTH, WIDTH)
        self.mix = Mix()
        self.layers = nn.ModuleDict({str(k): made[str(k)] for k in layers})
        self.head = Linear(WIDTH, VOCABULARY, bias=False)
        self.frozen.requires_grad_(False)
        if not first:
            self.embed = self.frozen = self.mix = None  # type: ignore[assignment]
        if not last:
            self.head = None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.mix(rounded(self.frozen(rounded(self.embed(x)))))
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(x)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over samples; its terms are exact."""
    return (rounded(logits) - targets).square().sum() / (16 * logits.shape[0])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same tokens for every cut."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    targets = torch.randint(-2, 3, (BATCH, SEQUENCE, VOCABULARY), generator=generator)
    return tokens, targets.double()


@dataclass
class Run:
    """A model under training, cut in some way."""

    model: Any
    optimizer: Any
    step: Callable[[int], object]
    """One step of training on the batch of that number."""
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.state or {"model": self.model, "optimizer": self.optimizer}


def made(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model().double()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of parameters that every cut can tell apart."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "layers." in name], "weight_decay": 0.125},
        {"params": [p for name, p in named if "layers." not in name], "weight_decay": 0.0},
    ]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([g for g in groups(model) if g["params"]], lr=0.0625)


def data_parallel(model: nn.Module, optimizer: Any, parts: int = 1, part: int = 0) -> Run:
    """Train on this part of each batch; the wrappers average the gradients."""

    def step(number: int) -> None:
        tokens, targets = (whole.chunk(parts)[part] for whole in batch(number))
        loss_of(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


def single(seed: int) -> Run:
    model = made(seed)
    return data_parallel(model, adam(model))


# --- data parallelism


def ddp(seed: int) -> Run:
    model = nn.parallel.DistributedDataParallel(made(seed))
    return data_parallel(model, adam(model), dist.get_world_size(), dist.get_rank())


def zero1(seed: int) -> Run:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(made(seed))
    optimizer = ZeroRedundancyOptimizer(groups(model), torch.optim.AdamW, lr=0.0625)
    return data_parallel(model, optimizer, dist.get_world_size(), dist.get_rank())


def fsdp1(seed: int, *, original: bool, strategy: str) -> Run:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = made(seed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp")) if "HYBRID" in strategy else None
    frozen = model.frozen

    def alone(module: nn.Module, recurse: bool, **_: Any) -> bool:
        return recurse or isinstance(module, Block) or module is frozen

    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=alone,
        use_orig_params=original,
        sharding_strategy=ShardingStrategy[strategy],
        device_mesh=mesh,
        device_id=torch.device("cpu"),
    )
    return data_parallel(wrapped, adam(wrapped), dist.get_world_size(), dist.get_rank())


def fsdp2(seed: int, shape: tuple[int, ...] = (), names: tuple[str, ...] = ("dp",)) -> Run:
    from torch.distributed.fsdp import fully_shard

    model = made(seed)
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return data_parallel(model, adam(model), dist.get_world_size(), dist.get_rank())


# --- tensor, sequence and context parallelism


def tensor_plan(*, vocabulary: bool) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
    if vocabulary:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
    for k in range(LAYERS):
        plan |= {f"layers.{k}.up": ColwiseParallel(use_local_output=False), f"layers.{k}.down": RowwiseParallel()}
    return plan


def tp(seed: int, *, vocabulary: bool) -> Run:
    from torch.distributed.tensor.parallel import parallelize_module

    model = made(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, tensor_plan(vocabulary=vocabulary))
    return data_parallel(model, adam(model))


def fsdp2_tp(seed: int, shape: tuple[int, ...], names: tuple[str, ...]) -> Run:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    model = made(seed)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    parallelize_module(model, mesh["tp"], tensor_plan(vocabulary=True))
    data = mesh[names[:-1]]
    for layer in model.layers.values():
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)
    parts = dist.get_world_size() // mesh["tp"].size()
    return data_parallel(model, adam(model), parts, dist.get_rank() // mesh["tp"].size())


def sequence(seed: int) -> Run:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model = made(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    whole = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
    cut = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
    plan: dict[str, Any] = {
        "mix": cut,
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for k in range(LAYERS):
        plan |= {
            f"layers.{k}.scale": SequenceParallel(),
            f"layers.{k}.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            f"layers.{k}.down": RowwiseParallel(output_layouts=Shard(1)),
        }
    parallelize_module(model, mesh, plan)
    for k in (1, 2):
        parallelize_module(model.layers[str(k)].moe, mesh, whole)
        parallelize_module(model.layers[str(k)].moe, mesh, cut)
    return data_parallel(model, adam(model))


def context(seed: int) -> Run:
    """Each rank has a part of every sequence; parameters are whole, their gradients are summed."""
    model = made(seed)
    optimizer = adam(model)
    parts, part = dist.get_world_size(), dist.get_rank()

    class Ring(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = torch.cat(differentiable.all_gather(x), dim=1)
            return rounded(x + whole.roll(1, dims=1).chunk(parts, dim=1)[part])

    model.mix = Ring()  # type: ignore[assignment]
    first = SEQUENCE // parts * part
    for layer in model.layers.values():
        if not isinstance(layer.moe, nn.Identity):
            # experts go by the place in the whole sequence
            layer.moe.register_forward_pre_hook(
                lambda _, given: (functional.pad(given[0], (0, 0, first, SEQUENCE - first - given[0].shape[1])),)
            )
            layer.moe.register_forward_hook(lambda _, __, out: out[:, first : first + SEQUENCE // parts])

    def step(number: int) -> None:
        tokens, targets = (whole.chunk(parts, dim=1)[part] for whole in batch(number))
        loss_of(model(tokens), targets).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


# --- experts


class StackedHere(nn.Module):
    """This rank's experts, a DTensor over the mesh axis."""

    def __init__(self, stacked: Stacked, mesh: Any) -> None:
        super().__init__()
        self.mesh = mesh
        self.w = nn.Parameter(distribute_tensor(stacked.w.detach(), mesh, [Shard(0)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group, count = self.mesh.get_group(), EXPERTS // self.mesh.size()
        local = self.w.to_local() if isinstance(self.w, DTensor) else self.w
        first = self.mesh.get_local_rank() * count
        out = experts_apply(_Shared.apply(x, group), list(weight(local)), range(first, first + count))
        return _Summed.apply(out, group)


class ApartHere(Apart):
    """Only this rank's experts, each under its number in the whole model."""

    def __init__(self, whole: Apart, mesh: Any) -> None:
        nn.Module.__init__(self)
        self.mesh = mesh
        count = EXPERTS // mesh.size()
        first = mesh.get_local_rank() * count
        self.experts = nn.ModuleDict({str(k): whole.experts[str(k)] for k in range(first, first + count)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.mesh.get_group()
        return _Summed.apply(super().forward(_Shared.apply(x, group)), group)


def experts(seed: int, data: int) -> Run:
    """Experts over an axis of the mesh, with FSDP2 over the other if that is more than one."""
    from torch.distributed.fsdp import fully_shard

    model = made(seed)
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("dp", "ep"))
    model.layers["1"].moe = StackedHere(model.layers["1"].moe, mesh["ep"])
    model.layers["2"].moe = ApartHere(model.layers["2"].moe, mesh["ep"])
    if data > 1:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return data_parallel(model, adam(model), data, dist.get_rank() // mesh["ep"].size())


# --- pipelines


def pipeline(seed: int, per_rank: int, data: int = 1) -> Run:
    """Stages of torch.distributed.pipelining, `per_rank` on each rank of a pipeline, FSDP2 over the other axis."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

    mesh = init_device_mesh("cpu", (dist.get_world_size() // data, data), mesh_dim_names=("pp", "dp"))
    ranks, rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
    count = ranks * per_rank
    each = LAYERS // count
    modules, stages = [], []
    for number in range(rank, count, ranks):
        torch.manual_seed(seed)
        layers = range(number * each, (number + 1) * each)
        module = Model(layers, first=number == 0, last=number == count - 1).double()
        if data > 1:
            for layer in module.layers.values():
                fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=False)
            fully_shard(module, mesh=mesh["dp"], reshard_after_forward=False)
        modules.append(module)
        stages.append(PipelineStage(module, number, count, torch.device("cpu"), group=mesh["pp"].get_group()))
    micro = 4 // data

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return loss_of(output, target)

    schedule: Any = (
        Schedule1F1B(stages[0], micro, loss_fn=loss)
        if per_rank == 1
        else ScheduleInterleaved1F1B(stages, micro, loss_fn=loss)
    )
    whole = ckpt.Stages(modules)
    optimizer = adam(whole)

    def step(number: int) -> None:
        tokens, targets = (part.chunk(data)[mesh["dp"].get_local_rank()] for part in batch(number))
        given = (tokens,) if rank == 0 else ()
        schedule.step(*given, target=targets if rank == ranks - 1 else None)
        optimizer.step()
        optimizer.zero_grad()

    return Run(whole, optimizer, step)


CUTS: dict[str, tuple[int, Callable[[int], Run]]] = {
    "single": (1, single),
    "ddp2": (2, ddp),
    "zero1": (2, zero1),
    "fsdp1_orig": (2, lambda seed: fsdp1(seed, original=True, strategy="FULL_SHARD")),
    "fsdp1_flat": (2, lambda seed: fsdp1(seed, original=False, strategy="FULL_SHARD")),
    "fsdp1_flat_grad_op": (2, lambda seed: fsdp1(seed, original=False, strategy="SHARD_GRAD_OP")),
    "fsdp1_orig_no_shard": (2, lambda seed: fsdp1(seed, original=True, strategy="NO_SHARD")),
    "fsdp1_orig4": (4, lambda seed: fsdp1(seed, original=True, strategy="SHARD_GRAD_OP")),
    "fsdp1_hybrid": (4, lambda seed: fsdp1(seed, original=False, strategy="HYBRID_SHARD")),
    "fsdp2": (2, fsdp2),
    "fsdp4": (4, fsdp2),
    "hsdp2x2": (4, lambda seed: fsdp2(seed, (2, 2), ("dp_replicate", "dp_shard"))),
    "tp2": (2, lambda seed: tp(seed, vocabulary=False)),
    "vocab_tp2": (2, lambda seed: tp(seed, vocabulary=True)),
    "vocab_tp4": (4, lambda seed: tp(seed, vocabulary=True)),
    "fsdp2tp2": (4, lambda seed: fsdp2_tp(seed, (2, 2), ("dp", "tp"))),
    "hsdp2x2tp2": (8, lambda seed: fsdp2_tp(seed, (2, 2, 2), ("dp_replicate", "dp_shard", "tp"))),
    "sequence2": (2, sequence),
    "context2": (2, context),
    "ep2": (2, lambda seed: experts(seed, 1)),
    "ep2fsdp2": (4, lambda seed: experts(seed, 2)),
    "pp2": (2, lambda seed: pipeline(seed, 1)),
    "pp2_stages2": (2, lambda seed: pipeline(seed, 2)),
    "pp2fsdp2": (4, lambda seed: pipeline(seed, 1, 2)),
}
"""Name -> (ranks, what makes it from a seed)."""
