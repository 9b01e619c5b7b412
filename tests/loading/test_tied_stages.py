"""Tied embeddings on the first and the last stage of a pipeline: two tensors there, one in one process.

Both ways, model and optimizer, bit for bit, with training before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B

import ckpt
from tests.loading.cuts import LAYERS, Model, Run, adam, batch, loss_of, made
from tests.ranks import run_ranks


def tied(seed: int) -> Run:
    model = made(seed)
    model.head.weight = model.embed.weight
    optimizer = adam(model)

    def step(number: int) -> None:
        tokens, targets = batch(number)
        loss_of(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


def staged(seed: int) -> Run:
    rank = dist.get_rank()
    torch.manual_seed(seed)
    half = LAYERS // 2
    model = Model(range(rank * half, (rank + 1) * half), first=rank == 0, last=rank == 1).double()
    shared = model.embed.weight if rank == 0 else model.head.weight
    with torch.no_grad():
        dist.broadcast(shared, 0)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=loss_of)
    optimizer = adam(model)

    def step(number: int) -> None:
        tokens, targets = batch(number)
        schedule.step(*((tokens,) if rank == 0 else ()), target=targets if rank else None)
        dist.all_reduce(shared.grad)
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


def weights(run: Run) -> dict[str, torch.Tensor]:
    found = dict(run.model.state_dict())
    for name, parameter in run.model.named_parameters():
        for slot, value in run.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{slot}"] = value
    return {name: value.clone() for name, value in found.items()}


def save_stages(rank: int, world: int, path: str) -> None:
    run = staged(3)
    run.step(0)
    run.step(1)
    ckpt.save(run.state, path)


def load_stages(rank: int, world: int, path: str, seed: int, ahead: int) -> dict[str, torch.Tensor]:
    run = staged(seed)
    for number in range(ahead):
        run.step(number)
    ckpt.load(run.state, path)
    run.step(2)
    return weights(run)


def reference(seed: int, steps: int) -> Run:
    run = tied(seed)
    for number in range(steps):
        run.step(number)
    return run


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    for name, value in found.items():
        # in one process the two names are of one tensor, and optimizers know the first
        known = name if name in expected else name.replace("head.weight", "embed.weight")
        assert torch.equal(value, expected[known]), name


def test_stages_that_tie_their_embeddings_load_into_one_process_and_back(tmp_path: Path) -> None:
    from_pipeline, from_one, again = (str(tmp_path / name) for name in ("pipeline", "one", "again"))
    truth = reference(3, 3)
    run_ranks(save_stages, 2, from_pipeline)

    run = reference(9, 1)
    result = ckpt.load(run.state, from_pipeline)  # without a warning: both stages have the same
    assert result.retied == {"model.head.weight": "model.embed.weight"}
    assert_equal(weights(run), weights(reference(3, 2)))
    ckpt.save(run.state, from_one)
    run.step(2)
    assert_equal(weights(run), weights(truth))
    run = reference(9, 0)
    ckpt.load(run.state, from_one)
    ckpt.save(run.state, again)

    for path in (from_pipeline, from_one, again):
        for ahead in (0, 1):
            for found in run_ranks(load_stages, 2, path, 11, ahead):
                assert_equal(found, weights(truth))
