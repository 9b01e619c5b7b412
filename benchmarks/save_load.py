"""Saves and loads a model of large tensors, in one process and in four, against the raw limit and against peers.

    python -m benchmarks.save_load [--quick] [--json FILE]

Saves count until everything is durable, loads until every byte is in tensors that were there before, with the files in
the page cache. README.md in this folder has the method.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import options
from benchmarks.interleave import Interleaving, Measure, System, fastest
from benchmarks.options import SHAPE, TENSOR_BYTES, TensorParameters
from benchmarks.ranks import Group, run_ranks
from benchmarks.raw_io import RAW, RawMemory, can_write_directly, raw_system
from benchmarks.report import Report, Section, Yardstick
from benchmarks.state import NamedTensors, sharded_tensors
from benchmarks.systems import CKPT, ckpt_system, dcp_system, safetensors_system, torch_save_system

_TARGETS = {"save": 1.2, "load": 1.5}
"""The most that this project may take, as a ratio to the raw limit."""

_LIMIT_OF = {"save": "save", "load": "load", "load, other cut": "load"}
"""Which raw limit each phase is told by: whatever the cut, a rank reads as many bytes."""

_WHAT = {
    "save": "Save, until durable",
    "load": "Load of the same cut, files cached",
    "load, other cut": "Load of rows into columns, files cached (for information)",
}


def rank_main(group: Group, asked: TensorParameters) -> list[Measure]:
    """What each rank runs: its part of the state, and every system on it."""
    group.say(f"filling {asked.tensors} tensors of 16 MiB")
    cuts = (0, 1) if group.size > 1 else (0,)
    state, *others = sharded_tensors(group, asked.tensors, SHAPE, seed=asked.seed, dimensions=cuts)
    columns = others[0] if others else None
    direct = can_write_directly(asked.folder)
    if not direct:
        group.say("this file system refuses O_DIRECT: the raw limit is of buffered writing only")
    memory = RawMemory(state.local_nbytes, asked.seed + group.rank)
    systems = _systems(group, state, columns, raw_system(group, memory, direct=direct))
    if asked.only:
        systems = [system for system in systems if system.name in (RAW, *asked.only)]
    interleaving = Interleaving(group, systems, asked.folder, settle=asked.settle, seed=asked.seed)
    return interleaving.run(asked.repetitions)


def _systems(group: Group, state: NamedTensors, columns: NamedTensors | None, raw: System) -> list[System]:
    return [
        raw,
        torch_save_system(group, state),
        safetensors_system(group, state),
        dcp_system(group, state, columns),
        ckpt_system({"model": dict(state.tensors)}, state, other_cut=columns),
    ]


def sections(processes: int, nbytes: int, measures: Sequence[Measure]) -> list[Section]:
    """The tables of one run, a table per phase, each beside the raw limit's."""
    raw = {phase: [m for m in measures if m.system == RAW and m.phase == phase] for phase in ("save", "load")}
    result = []
    for phase, limiting in _LIMIT_OF.items():
        shown = [m for m in measures if m.phase == phase]
        if not shown:
            continue
        limit = fastest(raw[limiting])
        where = "1 process" if processes == 1 else f"{processes} processes"
        notes = [f"raw limit: {limit.setting}" + (f", {processes} at once" if processes > 1 else "")]
        if len({m.setting for m in shown if m.system == limit.system}) > 1:
            notes[0] += ", which had the least median"
        result.append(
            Section(
                title=f"{_WHAT[phase]}: {where}, {nbytes / 2**30:g} GiB",
                measures=shown,
                nbytes=nbytes,
                yardstick=Yardstick.ratio("x raw", limit.seconds),
                targets={CKPT: _TARGETS[phase]} if phase in _TARGETS else {},
                notes=notes,
            )
        )
    return result


@click.command()
@options.FOLDER
@options.PROCESSES
@options.size(1024)
@options.repetitions(7)
@options.SETTLE
@options.SEED
@options.only("the raw limit")
@options.quick("256 MiB, 3 repetitions")
@options.JSON
def main(
    folder: Path,
    processes: tuple[int, ...],
    size: int,
    repetitions: int,
    settle: float,
    seed: int,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
) -> None:
    """Save and load large tensors: raw I/O, torch.save, safetensors, torch DCP and ckpt, interleaved."""
    if quick:
        size, repetitions = 256, 3
    scratch = folder.absolute() / "save_load"
    asked = TensorParameters(
        tensors=size * 2**20 // TENSOR_BYTES,
        folder=scratch,
        repetitions=repetitions,
        settle=settle,
        seed=seed,
        only=only,
    )
    report = Report()
    try:
        for number in processes:
            scratch.mkdir(parents=True, exist_ok=True)
            measures = run_ranks(rank_main, number, asked, say=report.say(number))
            report.show(sections(number, asked.nbytes, measures))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.end("save_load", {"processes": processes, **asked.as_json()}, json_path)


if __name__ == "__main__":
    main()
