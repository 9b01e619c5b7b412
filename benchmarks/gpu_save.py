"""Saving from a GPU while it trains: the copies against the limit of page-locked memory, and what a step loses.

    python -m benchmarks.gpu_save [--size 4096] [--json FILE]

Two tables, each interleaved. The first: seconds from the call of async_save until everything is captured, against one
plain copy of as many bytes from the GPU to page-locked memory. The second: a loop that saves after each step against
the same loop that does not, and torch DCP's asynchronous save in its place. Where there is no GPU, it says so and ends.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import ckpt
from benchmarks import options
from benchmarks.interleave import Measure
from benchmarks.report import Report, Section, Yardstick

_BANDWIDTH = 1 / 0.9
"""The most that a capture may take, of the plain copy: 90 % of its bandwidth."""
_STALL = 1.01
_LIMIT, _NONE = "plain copy", "no saving"


class Training:
    """A stack of linear layers and AdamW; `size` MiB of training state in fp32."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        width = 2048
        layers = max(1, (size << 20) // (12 * width * (width + 1)))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.data = torch.randn(16384, width, device="cuda")
        self.state: dict[str, object] = {"model": self.model, "optimizer": self.optimizer}
        self.step()
        self.nbytes = sum(value.nbytes for value in self.tensors().values())

    def step(self) -> None:
        """Enqueue one step; waits for nothing."""
        self.model(self.data).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as DCP takes it: all tensors by name."""
        found = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        names: dict[object, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, slots in self.optimizer.state.items():
            found |= {f"optimizer.{names[parameter]}.{key}": value for key, value in slots.items()}
        return found


def copies(training: Training, folder: Path, repetitions: int) -> Section:
    """The first table."""
    source = torch.empty(training.nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(training.nbytes, dtype=torch.uint8, pin_memory=True)

    def plain() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def ours() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        pending = ckpt.async_save(training.state, folder / "copied")
        pending.captured(600)
        seconds = time.perf_counter() - begin
        pending.wait(600)
        shutil.rmtree(folder / "copied")
        return seconds

    ways: dict[str, Callable[[], float]] = {_LIMIT: plain, "ckpt": ours}
    measures = {
        name: Measure("copy", name, "page-locked" if name == _LIMIT else "async_save, captured", first=way())
        for name, way in ways.items()
    }
    _interleave(ways, measures, repetitions)
    limit = measures[_LIMIT].seconds
    return Section(
        title=f"From the GPU into host memory: {training.nbytes / 1e9:.2f} GB in {len(training.tensors())} tensors",
        measures=list(measures.values()),
        nbytes=training.nbytes,
        yardstick=Yardstick.ratio("x plain copy", limit),
        targets={"ckpt": _BANDWIDTH},
    )


def steps(training: Training, folder: Path, repetitions: int, count: int) -> Section:
    """The second table."""

    def loop(save: Callable[[Path], Callable[[], object]] | None) -> float:
        wait: Callable[[], object] = lambda: None  # noqa: E731 - nothing is under way yet
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for number in range(count):
            training.step()
            if save is not None:
                wait()
                shutil.rmtree(folder / f"{number - 1}", ignore_errors=True)
                wait = save(folder / f"{number}")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        wait()
        shutil.rmtree(folder / f"{count - 1}", ignore_errors=True)
        return seconds

    def ours(path: Path) -> Callable[[], object]:
        pending = ckpt.async_save(training.state, path)
        return lambda: pending.wait(600)

    def dcp_thread(path: Path) -> Callable[[], object]:
        future = dcp.async_save(training.tensors(), checkpoint_id=path)
        return future.result  # type: ignore[union-attr]

    ways: dict[str, Callable[[], float]] = {
        _NONE: lambda: loop(None),
        "ckpt": lambda: loop(ours),
        "torch DCP": lambda: loop(dcp_thread),
    }
    settings = {_NONE: "", "ckpt": "async_save", "torch DCP": "async_save, thread"}
    measures = {name: Measure("loop", name, settings[name], first=way()) for name, way in ways.items()}
    _interleave(ways, measures, repetitions)
    alone = measures[_NONE].seconds
    return Section(
        title=f"A loop of {count} steps on the GPU that saves {training.nbytes / 1e9:.2f} GB after each",
        measures=list(measures.values()),
        nbytes=training.nbytes * count,
        yardstick=Yardstick.ratio("x no saving", alone),
        targets={"ckpt": _STALL},
        notes=["before each save, the one before it is waited for, so that a slow disk is seen, too"],
    )


def _interleave(ways: dict[str, Callable[[], float]], measures: dict[str, Measure], repetitions: int) -> None:
    order = list(ways)
    generator = random.Random(0)
    for _ in range(repetitions):
        generator.shuffle(order)
        for name in order:
            measures[name].seconds.append(ways[name]())


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path("/dev/shm"), show_default=True)
@click.option("--size", type=click.IntRange(64), default=4096, show_default=True, help="MiB of training state.")
@click.option("--steps", "count", type=click.IntRange(2), default=10, show_default=True)
@options.repetitions(5)
@options.JSON
def main(folder: Path, size: int, count: int, repetitions: int, json_path: Path | None) -> None:
    """Saving from a GPU while it trains."""
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to measure.")
        return
    report = Report(gpu=torch.cuda.get_device_name())
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    place = folder.absolute() / "ckpt_gpu_save"
    place.mkdir(parents=True)
    try:
        training = Training(size)
        report.show([copies(training, place, repetitions), steps(training, place, repetitions, count)])
    finally:
        shutil.rmtree(place, ignore_errors=True)
        dist.destroy_process_group()
    report.end("gpu_save", {"size_mib": size, "steps": count, "repetitions": repetitions}, json_path)


if __name__ == "__main__":
    main()
