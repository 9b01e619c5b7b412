"""A training loop that saves at every step, against the same loop that does not.

    python -m benchmarks.training_loop [--json FILE] [--saves 500]

The demo's GPT, scaled until its training state has more than 100 MB and a step takes about a second. One process, so
that every system runs as it would for a user: an asynchronous save waits for the one before it. Told are the seconds of
whole loops as ratios to the loop without saving in the same round, and the CPU-seconds that saving cost, those of the
processes that save included. Then, in new processes, how long a Checkpointer's first save has the training wait, and
how long the nine after it do, with steps too short to hide anything. With --saves, another loop counts memory and open
files over so many saves.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

import ckpt
from benchmarks import options
from benchmarks.async_systems import Saving, Wait, at_once, ckpt_saving, dcp_thread
from benchmarks.interleave import Measure, Way, quartiles
from benchmarks.ranks import Group, run_ranks
from benchmarks.report import Report, Section, Yardstick
from ckpt_cli.demo import model as gpt

_TARGET = 1.05
"""The most that saving at every step may cost, of the loop without it."""
_NONE = "no saving"
FIRST_SAVES = 10
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters(options.Parameters):
    """What was asked for."""

    steps: int
    saves: int


@dataclass(slots=True)
class Result:
    """What the rank brings home."""

    state_bytes: int
    measures: list[Measure]
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """CPU-seconds of each loop."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """Those of them that other processes spent."""
    growth: list[str] = field(default_factory=list)


class Training:
    """The demo's GPT and AdamW on random text, of which every step costs the same."""

    def __init__(self, seed: int, batch: int = 14) -> None:
        torch.manual_seed(seed)
        # the demo's model reads its sizes when it is made
        gpt.WIDTH, gpt.HEADS, gpt.HIDDEN, gpt.LAYERS = 512, 8, 1365, 4
        self.model = gpt.GPT(256)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.text = torch.randint(256, (batch, 129))
        self.state: dict[str, object] = {"model": self.model, "optimizer": self.optimizer}
        self.step(lambda: None)

    def step(self, save: Callable[[], object]) -> None:
        """One step, and a save of its result."""
        loss = self.model(self.text[:, :-1], self.text[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        save()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as other systems take it: all tensors by name."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        names: dict[object, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, slots in self.optimizer.state.items():
            found |= {f"optimizer.{names[parameter]}.{key}": value for key, value in slots.items()}
        return {name: value.detach() for name, value in found.items()}


def rank_main(group: Group, asked: Parameters) -> Result:
    """What the process runs."""
    if not dist.is_initialized():
        # DCP's process wants one, of one rank too
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    training = Training(asked.seed)
    tensors = training.tensors()
    result = Result(sum(tensor.nbytes for tensor in tensors.values()), [])
    nothing = Saving(_NONE, f"{asked.steps} steps", lambda _state, _folder: lambda: None)
    savings = [nothing, at_once("torch.save", Way("at once, synced", partial(_torch_save, training)))]
    savings += [dcp_thread(group), ckpt_saving("async_save")]
    measures = {saving.name: Measure("loop", saving.system, saving.setting, first=0.0) for saving in savings}
    generator = random.Random(asked.seed)
    for number in range(-1, asked.repetitions):
        generator.shuffle(savings)
        for saving in savings:
            group.say(f"{'first' if number < 0 else f'repetition {number + 1}/{asked.repetitions}'}: {saving.name}")
            seconds, cpu, others = _loop(training, saving, asked)
            if number < 0:
                measures[saving.name].first = seconds
            else:
                measures[saving.name].seconds.append(seconds)
                result.cpu.setdefault(saving.name, []).append(cpu)
                result.others.setdefault(saving.name, []).append(others)
    result.measures = list(measures.values())
    if asked.saves:
        result.growth = _growth(group, training, asked)
    dist.destroy_process_group()
    return result


def rank_main_of_first_saves(group: Group, asked: Parameters) -> list[float]:
    """What a new process runs: seconds that the training waited for each of ten saves, after steps on one sample."""
    training = Training(asked.seed, batch=1)
    shutil.rmtree(asked.folder, ignore_errors=True)
    waits = []
    with ckpt.Checkpointer(asked.folder, training.state, every=1, keep=2) as run:
        end = None
        for _ in run.steps(FIRST_SAVES + 1):
            if end is not None:
                waits.append(time.monotonic() - end)
            training.step(lambda: None)
            end = time.monotonic()
    group.say(", ".join(f"{wait * 1e3:.1f}" for wait in waits) + " ms")
    return waits


def _torch_save(training: Training, folder: Path) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def _loop(training: Training, saving: Saving, asked: Parameters) -> tuple[float, float, float]:
    """Seconds of a loop that saves after each step, and ends when the last save is durable; its CPU-seconds, and
    those of other processes among them.
    """
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    os.sync()
    waits: list[Wait] = []
    own, others = _cpu_seconds()
    begin = time.monotonic()
    for number in range(asked.steps):
        folder = asked.folder / f"{number}"
        folder.mkdir()

        def save(folder: Path = folder) -> None:
            # at most one under way, as most of these systems want it
            if waits and saving.system != "ckpt":
                waits.pop()()
            live: Any = training.state if saving.system == "ckpt" else training.tensors()
            waits.append(saving.start(live, folder))

        training.step(save)
    for wait in waits:
        wait()
    seconds = time.monotonic() - begin
    own_after, others_after = _cpu_seconds()
    return seconds, own_after - own + others_after - others, others_after - others


def _cpu_seconds() -> tuple[float, float]:
    """Of this process, and of those that it has started and that live."""
    own = os.getpid()
    return _cpu_of(own), sum(_cpu_of(pid) for pid in _family(own) - {own})


def _family(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _growth(group: Group, training: Training, asked: Parameters) -> list[str]:
    """Memory and open files of all processes while the state is saved again and again."""
    lines = []
    pending = None
    for number in range(asked.saves):
        path = asked.folder / f"growth_{number}"
        if pending is not None:
            pending.wait(600)
            shutil.rmtree(pending.path)
        pending = ckpt.async_save(training.state, path)
        if number in (9, asked.saves // 2, asked.saves - 1):
            pending.wait(600)
            family = _family(os.getpid())
            memory = sum(_anonymous(pid) for pid in family)
            files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
            lines.append(f"after {number + 1} saves: {memory / 1e6:.1f} MB of memory of their own, {files} open files")
            group.say(lines[-1])
    return lines


def _anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself; the arena, which is shared, is not in it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def section(result: Result, asked: Parameters) -> Section:
    """The table."""
    alone = next(measure for measure in result.measures if measure.system == _NONE)

    notes = [f"{asked.steps} steps of {quartiles(alone.seconds)[1] / asked.steps:.2f} s, a save after each"]
    base = quartiles(result.cpu[f"{_NONE}: {asked.steps} steps"])[1]
    for name, seconds in sorted(result.cpu.items()):
        if not name.startswith(_NONE):
            spent = (quartiles(seconds)[1] - base) / asked.steps
            others = quartiles(result.others[name])[1] / asked.steps
            notes.append(
                f"{name}: {spent:+.3f} CPU-seconds for each step with its save, {others:.3f} of other processes"
            )
    notes.append("(torch's threads spin while they wait for each other, so CPU-seconds of the loop vary by themselves)")
    return Section(
        title=f"A training loop that saves at every step: 1 process, state of {result.state_bytes / 1e6:.0f} MB",
        measures=result.measures,
        nbytes=result.state_bytes * asked.steps,
        yardstick=Yardstick.ratio("x no saving", alone.seconds),
        targets={"ckpt": _TARGET},
        notes=notes,
    )


def first_section(runs: Sequence[Sequence[float]], nbytes: int) -> Section:
    """The table of first saves: one repetition a process."""
    firsts = [waits[0] for waits in runs]
    later = [quartiles(waits[1:])[1] for waits in runs]
    # the first save of all is of the first process
    measures = [
        Measure("first", "ckpt", "first save", first=firsts[0], seconds=firsts),
        Measure("first", "ckpt", f"saves 2 to {FIRST_SAVES}, their median", first=later[0], seconds=later),
    ]
    return Section(
        title="For how long a Checkpointer's first save has the training wait: 1 process",
        measures=measures,
        nbytes=nbytes,
        yardstick=Yardstick.ratio("x later", later),
        targets={},
    )


@click.command()
@options.FOLDER
@click.option("--steps", type=click.IntRange(2), default=10, show_default=True)
@options.repetitions(5)
@options.SEED
@click.option("--saves", type=click.IntRange(0), default=0, help="Also count memory and open files over so many saves.")
@options.JSON
def main(folder: Path, steps: int, repetitions: int, seed: int, saves: int, json_path: Path | None) -> None:
    """A training loop that saves at every step: torch.save, torch DCP and ckpt against no saving, interleaved."""
    asked = Parameters(
        folder=folder.absolute() / "training_loop", repetitions=repetitions, seed=seed, steps=steps, saves=saves
    )
    report = Report()
    try:
        say = report.say(1)
        result: Result = run_ranks(rank_main, 1, asked, say=say, children=True)
        firsts = [
            run_ranks(rank_main_of_first_saves, 1, asked, say=say, children=True) for _ in range(asked.repetitions)
        ]
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
    report.show([section(result, asked), first_section(firsts, result.state_bytes)])
    for line in result.growth:
        report.console.print(line)
    report.end("training_loop", asked.as_json(), json_path)


if __name__ == "__main__":
    main()
