"""What one worker of the demo does: train its part of the model, or write a line of text with it.

It knows no Ray, and no other worker but through the process group. A node's fork server imports this module once, so
that each worker starts with everything imported.
"""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import torch

# What DTensor and the first optimizer would otherwise import in every worker, which takes a second or two each time.
import torch._dynamo
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import ckpt.api
from ckpt_cli.demo.model import GPT, SHOWN_TENSOR, parallelize
from ckpt_cli.demo.protocol import Reporter, Task
from ckpt_cli.demo.text import WINDOW, Sampler, Text

SEED = 1
_WARM_UP = 8
_LINE = 120  # bytes
_COLLECTIVE_LIMIT_S = 60


def work(task: Task, report: Reporter) -> None:
    """Do what the task says."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if task.prompt:
        write_line(task, report)
    else:
        train(task, report)
    report("done")


def train(task: Task, report: Reporter) -> None:
    """Train from the task's checkpoint, or from nothing, to its last step."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task.rendezvous}",
        rank=task.rank,
        world_size=task.dp * task.tp,
        timeout=timedelta(seconds=_COLLECTIVE_LIMIT_S),
    )
    mesh = init_device_mesh("cpu", (task.dp, task.tp), mesh_dim_names=("dp", "tp"))
    part = mesh.get_local_rank("dp")
    group = mesh.get_group("dp")

    torch.manual_seed(SEED)  # the same weights on every rank, whatever the mesh; each then keeps its part
    text = Text()
    model = GPT(len(text.symbols))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP, 1 - 0.95 * step / task.steps)
    )
    sampler = Sampler(text, seed=SEED)
    shown = model.get_parameter(SHOWN_TENSOR)
    rows = shown.to_local().shape[0] if isinstance(shown, DTensor) else shown.shape[0]
    report("ready", threads=torch.get_num_threads(), parameters=parameters, symbols=len(text.symbols), rows=rows)

    # All that a resumed run needs, the same on every mesh.
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler, "rng": ckpt.RNG()}
    if task.checkpoint is not None:
        began = time.monotonic()
        ckpt.load(state, task.checkpoint)
        report("loaded", seconds=time.monotonic() - began, samples=sampler.samples_drawn)

    step = sampler.samples_drawn // task.batch
    while step < task.stop:
        began = time.monotonic()
        loss = model(*sampler.batch(task.batch, part, task.dp))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean = loss.detach() / task.dp
        dist.all_reduce(mean, group=group)
        step += 1
        if task.rank == 0:
            report("step", step=step, loss=mean.item(), seconds=time.monotonic() - began)
        if task.save_every and task.run is not None and step % task.save_every == 0:
            saved = ckpt.save(state, task.run / f"step_{step:08d}", step=step)
            if task.rank == 0:
                report("saved", step=step, seconds=saved.seconds, bytes=saved.bytes)
    dist.barrier()
    dist.destroy_process_group()


def write_line(task: Task, report: Reporter) -> None:
    """Load the model alone, whole, into this one process, and let it go on from the prompt."""
    if task.checkpoint is None:
        raise ValueError("a model that writes must come from a checkpoint")
    text = Text()
    model = GPT(len(text.symbols))
    began = time.monotonic()
    ckpt.load({"model": model}, task.checkpoint)
    report("loaded", seconds=time.monotonic() - began)
    numbers = text.encode(task.prompt.encode())
    chance = torch.Generator().manual_seed(SEED)
    with torch.inference_mode():
        while len(numbers) < _LINE:
            odds = torch.softmax(model(numbers[None, -WINDOW:])[0, -1] / 0.6, 0)
            numbers = torch.cat([numbers, torch.multinomial(odds, 1, generator=chance)])
    report("text", text=" ".join(text.decode(numbers.tolist()).split()))
