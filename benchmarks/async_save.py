"""Saves while the training goes on: for how long the training waits, and when everything is durable.

    python -m benchmarks.async_save [--quick] [--dir FOLDER] [--json FILE]

The same state goes through every system in turn, those that save at once among them, beside a copy of the same bytes in
memory (what `save` of an asynchronous system is measured by) and the raw limit of writing. A forward and backward pass
run on after each call, as they would. README.md in this folder has the method; benchmarks/training_loop.py measures
whole loops.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from benchmarks import options
from benchmarks.async_systems import (
    Saving,
    Wait,
    at_once,
    ckpt_saving,
    dcp_process,
    dcp_thread,
    owned,
    torch_checkpointing,
)
from benchmarks.interleave import Measure, fastest
from benchmarks.options import TENSOR_BYTES, TensorParameters
from benchmarks.ranks import Group, run_ranks
from benchmarks.raw_io import RawMemory, can_write_directly, raw_system
from benchmarks.report import Report, Section, Yardstick
from benchmarks.state import sharded_tensors
from benchmarks.systems import dcp_system, safetensors_system, torch_save_system

_SHAPE = (4096, 1024)
_TARGETS = {"blocked": 0.05, "durable": 1.10}
"""The most that this project may take: of a copy in memory, and of the fastest raw write."""
_COPY = "memory copy"


def rank_main(group: Group, asked: TensorParameters) -> list[Measure]:
    """What each rank runs."""
    group.say(f"filling {asked.tensors} tensors of 16 MiB")
    (state,) = sharded_tensors(group, asked.tensors, _SHAPE, seed=asked.seed, dimensions=(0,))
    memory = RawMemory(state.local_nbytes, asked.seed + group.rank)
    raw = raw_system(group, memory, direct=can_write_directly(asked.folder))
    rooms = [torch.empty_like(tensor).zero_() for tensor in state.locals.values()]
    sources = list(state.locals.values())

    def copy(_state: Any, _folder: Path) -> Wait:
        torch._foreach_copy_(rooms, sources)
        return lambda: None

    savings = [Saving(_COPY, "torch, into memory that was touched", copy)]
    savings += [at_once("raw", way) for way in raw.saves]
    for system in (torch_save_system(group, state), safetensors_system(group, state), dcp_system(group, state)):
        savings += [at_once(system.name, way) for way in system.saves[-1:]]
    savings += [dcp_thread(group)] + ([dcp_process(group)] if group.size > 1 else [])
    other = torch_checkpointing(group)
    savings += [other] if other is not None else []
    savings.append(ckpt_saving())
    if asked.only:
        savings = [saving for saving in savings if saving.system in (_COPY, "raw", *asked.only)]
    return _Run(group, asked, savings, dict(state.tensors), owned(state.tensors)).run()


class _Run:
    def __init__(
        self,
        group: Group,
        asked: TensorParameters,
        savings: Sequence[Saving],
        tensors: dict[str, torch.Tensor],
        live: dict[str, object],
    ) -> None:
        self._group = group
        self._asked = asked
        self._savings = list(savings)
        self._tensors = tensors
        self._live = live
        # equal seeds on all ranks draw equal orders, without a word between them
        self._random = random.Random(asked.seed)

    def run(self) -> list[Measure]:
        measures: dict[tuple[str, str], Measure] = {}
        for number in range(-1, self._asked.repetitions):
            order = list(self._savings)
            self._random.shuffle(order)
            for saving in order:
                title = "first calls" if number < 0 else f"repetition {number + 1}/{self._asked.repetitions}"
                self._group.say(f"{title}: {saving.name}")
                failure, times = self._one(saving)
                if failure:
                    self._group.say(f"{saving.name} is left out: {failure}")
                    self._savings.remove(saving)
                    continue
                for phase, seconds in times.items():
                    key = (phase, saving.name)
                    if number < 0:
                        measures[key] = Measure(phase, saving.system, saving.setting, first=seconds)
                    else:
                        measures[key].seconds.append(seconds)
        for saving in self._savings:
            with suppress(Exception):
                saving.close()
        return [measure for measure in measures.values() if measure.seconds]

    def _one(self, saving: Saving) -> tuple[str, dict[str, float]]:
        folder = self._asked.folder / "".join(c if c.isalnum() else "_" for c in saving.name)
        self._group.barrier()
        if self._group.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            time.sleep(self._asked.settle)
        gc.collect()
        self._group.barrier()
        failure = ""
        start = going = stop = time.monotonic()
        try:
            wait = saving.start(self._live if saving.system == "ckpt" else self._tensors, folder)
            going = time.monotonic()
            wait()
            stop = time.monotonic()
        except Exception as error:
            if saving.system == "ckpt":
                raise
            failure = f"{type(error).__name__}: {error}"
        failure = self._anywhere(failure)
        times = {"blocked": self._most(going - start), "durable": self._group.span(start, stop)}
        self._group.barrier()
        if self._group.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return failure, times

    def _anywhere(self, failure: str) -> str:
        if self._group.size == 1:
            return failure
        everyone: list[str] = [""] * self._group.size
        dist.all_gather_object(everyone, failure)
        return next(filter(None, everyone), "")

    def _most(self, seconds: float) -> float:
        """Of all ranks: the training goes on when the last one does."""
        if self._group.size == 1:
            return seconds
        most = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)


def sections(processes: int, where: str, nbytes: int, measures: Sequence[Measure]) -> list[Section]:
    """The tables of one run."""
    copy = next(m for m in measures if m.phase == "blocked" and m.system == _COPY)
    raw = fastest([m for m in measures if m.phase == "durable" and m.system == "raw"])
    who = f"{processes} process{'es' if processes > 1 else ''}, {nbytes / 2**30:g} GiB, {where}"
    shown = {
        "blocked": ([m for m in measures if m.phase == "blocked" and m.system != "raw"], copy, "x copy"),
        "durable": ([m for m in measures if m.phase == "durable" and m.system != _COPY], raw, "x raw"),
    }
    titles = {"blocked": "For how long the training waits for a save", "durable": "Until the save is durable"}
    return [
        Section(
            title=f"{titles[phase]}: {who}",
            measures=some,
            nbytes=nbytes,
            yardstick=Yardstick.ratio(unit, limit.seconds),
            targets={"ckpt": _TARGETS[phase]},
            notes=[f"{unit[2:]}: {limit.setting}"],
        )
        for phase, (some, limit, unit) in shown.items()
    ]


@click.command()
@click.option(
    "--dir",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    default=(Path(".bench"), Path("/dev/shm")),
    show_default=True,
    help="Where the files go, in turn.",
)
@options.PROCESSES
@options.size(1024)
@options.repetitions(5)
@options.SETTLE
@options.SEED
@options.only("the limits")
@options.quick("256 MiB, 3 repetitions")
@options.JSON
def main(
    folders: tuple[Path, ...],
    processes: tuple[int, ...],
    size: int,
    repetitions: int,
    settle: float,
    seed: int,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
) -> None:
    """Save while training: torch.save, safetensors, torch DCP, torch_checkpointing and ckpt, interleaved."""
    if quick:
        size, repetitions = 256, 3
    said = TensorParameters(
        tensors=size * 2**20 // TENSOR_BYTES,
        folder=Path(),
        repetitions=repetitions,
        settle=settle,
        seed=seed,
        only=only,
    )
    report = Report()
    for folder in folders:
        scratch = folder.absolute() / "async_save"
        asked = replace(said, folder=scratch)
        try:
            for number in processes:
                scratch.mkdir(parents=True, exist_ok=True)
                measures = run_ranks(rank_main, number, asked, say=report.say(number), children=True)
                report.show(sections(number, str(folder), asked.nbytes, measures))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    report.end("async_save", {"processes": processes, **said.as_json()}, json_path)


if __name__ == "__main__":
    main()
