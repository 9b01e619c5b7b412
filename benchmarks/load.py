"""Loads a checkpoint of large tensors, whole, in part and into another cut, against raw reading and against peers.

    python -m benchmarks.load [--quick] [--json FILE]

Every system saves once; then its files are loaded again and again, from the page cache and from the disk, into tensors
that were there before. Beside the times: bytes read over bytes needed, and the memory that a load took beyond what it
loads into. README.md in this folder has the method.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.files import drop, warm
from benchmarks.interleave import Destination, Measure, fastest, quartiles
from benchmarks.load_systems import PHASES, LoadingSystem, Saved, loading_systems
from benchmarks.options import SHAPE, TENSOR_BYTES, TensorParameters
from benchmarks.ranks import Group, run_ranks
from benchmarks.raw_io import RAW
from benchmarks.report import Report, Section, Yardstick
from benchmarks.systems import CKPT

_TARGETS = {
    ("same cut", "cached"): 1.2,
    ("other cut", "cached"): 1.6,
    ("same cut", "cold"): 1.15,
    ("other cut", "cold"): 1.15,
    ("model only", "cold"): 1.15,
}
"""The most that this project may take, as a ratio to the raw limit."""
_OVERREAD = 1.05
"""The most bytes that it may read for one that is needed."""
_BUFFERS = 256 << 20
"""Bytes of memory that it may take beyond what it loads into, on each rank."""

_WHAT = {
    "same cut": "Load of the same cut",
    "other cut": "Load of rows into columns",
    "model only": "Load of the model out of model and moments",
}
_HOW = {"cached": "files cached", "cold": "nothing cached"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters(TensorParameters):
    """What was asked for."""

    phases: tuple[str, ...]
    temperatures: tuple[str, ...]


@dataclass(slots=True)
class Cost:
    """What a way to load costs beside time: one entry per repetition, all ranks together."""

    read: list[float] = field(default_factory=list)
    """Bytes that read calls returned, over bytes needed; what is mapped is not read."""
    memory: list[int] = field(default_factory=list)
    """Bytes of the peak of resident memory beyond what was resident before, of the rank that took most."""


_Key = tuple[str, str, str, str]
Outcome = dict[_Key, tuple[Measure, Cost, int]]
"""(phase, temperature, system, setting) -> its times, its costs, and the bytes that all ranks needed."""


def rank_main(group: Group, asked: Parameters) -> Outcome:
    """What each rank runs: every system saves once, then all load in turn."""
    group.say(f"filling {asked.tensors} tensors of 16 MiB")
    saved = Saved(group, asked.tensors, SHAPE, asked.seed, asked.folder)
    systems = [s for s in loading_systems(group, saved) if not asked.only or s.name in (RAW, *asked.only)]
    phases = [phase for phase in asked.phases if phase in saved.into]
    for system in systems:
        group.say(f"saving: {system.name}")
        group.barrier()
        system.save()
    group.barrier()
    if group.rank == 0:
        os.sync()
        # they get into the page cache by reading: what some ways of writing leave there is read faster
        drop(asked.folder)
    group.barrier()
    order = random.Random(asked.seed)  # equal seeds on all ranks draw equal orders
    outcome: Outcome = {}
    for repetition in range(-1, asked.repetitions):
        for phase in phases:
            for temperature in asked.temperatures:
                ways = [(s, way) for s in systems for way in s.loads.get(phase, ())]
                order.shuffle(ways)
                for system, way in ways:
                    title = "first calls" if repetition < 0 else f"repetition {repetition + 1}/{asked.repetitions}"
                    group.say(f"{title}: {phase}, {temperature}: {system.name}")
                    into = saved.raw[phase] if system.name == RAW else saved.into[phase]
                    key = (phase, temperature, system.name, way.setting)
                    seconds, read, memory = _timed(
                        group, system, into, partial(way.run, system.folder), cold=temperature == "cold"
                    )
                    needed = int(_total(group, saved.raw[phase].nbytes))
                    entry = outcome.setdefault(key, (Measure(*key[:1], *key[2:], first=seconds), Cost(), needed))
                    if repetition >= 0:
                        entry[0].seconds.append(seconds)
                        entry[1].read.append(read / needed)
                        entry[1].memory.append(memory)
    return outcome


def _timed(
    group: Group, system: LoadingSystem, into: Destination, run: Callable[[], None], *, cold: bool
) -> tuple[float, float, int]:
    """Seconds from the first rank's start to the last one's end, bytes read by all, peak of memory of one."""
    group.barrier()
    if group.rank == 0:
        (drop if cold else warm)(system.folder)
    into.spoil()
    gc.collect()
    group.barrier()
    before, resident = _bytes_read(), _resident()
    start = time.monotonic()
    run()
    stop = time.monotonic()
    taken = _resident(peak=True) - resident
    read = _bytes_read() - before
    seconds = group.span(start, stop)
    into.check()
    return seconds, _total(group, read), int(_most(group, taken))


def _bytes_read() -> int:
    """Bytes that this process's read calls have returned, whatever from."""
    with open("/proc/self/io", encoding="ascii") as stream:
        return int(next(line for line in stream if line.startswith("rchar")).split()[1])


def _resident(*, peak: bool = False) -> int:
    """Bytes resident now, from when the peak counts; or the peak since then. Shared and mapped memory count too."""
    if not peak:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    with open("/proc/self/status", encoding="ascii") as stream:
        return int(next(line for line in stream if line.startswith("VmHWM")).split()[1]) << 10


def _total(group: Group, value: float) -> float:
    return _reduced(group, value, dist.ReduceOp.SUM)


def _most(group: Group, value: float) -> float:
    return _reduced(group, value, dist.ReduceOp.MAX)


def _reduced(group: Group, value: float, op: dist.ReduceOp.RedOpType) -> float:
    if group.size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return float(tensor)


def sections(processes: int, outcome: Outcome) -> list[Section]:
    """A table of times for each phase and temperature, beside the raw limit's there."""
    result = []
    where = "1 process" if processes == 1 else f"{processes} processes"
    for phase, temperature in dict.fromkeys(key[:2] for key in outcome):
        shown = {key: entry for key, entry in outcome.items() if key[:2] == (phase, temperature)}
        limit = fastest(entry[0] for key, entry in shown.items() if key[2] == RAW)
        needed = next(entry[2] for entry in shown.values())
        target = _TARGETS.get((phase, temperature))
        result.append(
            Section(
                title=f"{_WHAT[phase]}, {_HOW[temperature]}: {where}, {needed / 2**30:g} GiB",
                measures=[entry[0] for entry in shown.values()],
                nbytes=needed,
                yardstick=Yardstick.ratio("x raw", limit.seconds),
                targets={} if target is None else {CKPT: target},
                notes=[f"raw limit: {limit.setting}, which had the least median"],
            )
        )
    return result


def show_costs(console: Console, processes: int, outcome: Outcome) -> None:
    """One table of bytes read and memory, of every way that is not raw."""
    table = Table(
        title=f"What else it costs: {processes} process{'es' if processes > 1 else ''}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("load, system")
    table.add_column("read / needed", justify="right")
    table.add_column("target", justify="right")
    table.add_column("peak memory of a rank beyond its tensors", justify="right")
    table.add_column("target", justify="right")
    for (phase, temperature, system, _), (_, cost, _) in outcome.items():
        if system == RAW or (temperature == "cold" and (phase, "cached", system) in {key[:3] for key in outcome}):
            continue
        read, memory = quartiles(cost.read)[1], max(cost.memory)
        ours = system == CKPT
        table.add_row(
            f"{phase}: {system}",
            f"{read:.2f}" if read > 0.1 else "mapped",
            _judged(f"<= {_OVERREAD:g}", read <= _OVERREAD) if ours else "",
            f"{memory / 2**20:.0f} MiB",
            _judged(f"<= {_BUFFERS >> 20} MiB", memory <= _BUFFERS) if ours else "",
        )
    console.print(table)
    console.print()


def _judged(target: str, met: bool) -> str:
    return f"{target} " + ("[green]met[/]" if met else "[bold red]MISSED[/]")


@click.command()
@options.FOLDER
@options.PROCESSES
@options.size(1024)
@options.repetitions(5)
@click.option("--phase", "phases", type=click.Choice(PHASES), multiple=True, default=PHASES, show_default=True)
@click.option(
    "--cache",
    "temperatures",
    type=click.Choice(tuple(_HOW)),
    multiple=True,
    default=tuple(_HOW),
    show_default=True,
    help="Whether the files lie in the page cache.",
)
@options.SEED
@options.only("the raw limit")
@options.quick("256 MiB, 2 repetitions")
@options.JSON
def main(
    folder: Path,
    processes: Sequence[int],
    size: int,
    repetitions: int,
    phases: tuple[str, ...],
    temperatures: tuple[str, ...],
    seed: int,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
) -> None:
    """Load large tensors: raw reading, safetensors, torch DCP, its Hugging Face reader and ckpt, interleaved."""
    if quick:
        size, repetitions = 256, 2
    scratch = folder.absolute() / "load"
    asked = Parameters(
        tensors=size * 2**20 // TENSOR_BYTES,
        folder=scratch,
        repetitions=repetitions,
        seed=seed,
        phases=phases,
        temperatures=temperatures,
        only=only,
    )
    report = Report()
    try:
        for number in processes:
            scratch.mkdir(parents=True, exist_ok=True)
            outcome = run_ranks(rank_main, number, asked, say=report.say(number))
            report.show(sections(number, outcome))
            show_costs(report.console, number, outcome)
            shutil.rmtree(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.end("load", {"processes": processes, **asked.as_json()}, json_path)


if __name__ == "__main__":
    main()
