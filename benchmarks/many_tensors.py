"""Saves and loads a state of many small tensors, where not bytes but the cost of each tensor counts.

    python -m benchmarks.many_tensors [--quick] [--json FILE]

One process. Saves count until everything is durable, loads until the bytes are in tensors that were there before.
README.md in this folder has the method.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import options
from benchmarks.interleave import Interleaving, Measure, System
from benchmarks.options import TensorParameters
from benchmarks.ranks import Group, run_ranks
from benchmarks.raw_io import RawMemory, can_write_directly, raw_system
from benchmarks.report import Report, Section, Yardstick
from benchmarks.state import many_parameters, many_tensors
from benchmarks.systems import CKPT, ckpt_system, dcp_system, safetensors_system, torch_save_system

_TENSOR_BYTES = 1024
_ELEMENTS = _TENSOR_BYTES // 4

_TARGET_US = 25.0
"""The most that this project may take for each tensor, in microseconds."""

_MODULE = f"{CKPT}, module"


def rank_main(group: Group, asked: TensorParameters) -> list[Measure]:
    """What the process runs: every system on a flat dict, and this project on a module too."""
    group.say(f"making {asked.tensors} tensors of 1 KiB, and a module of as many")
    flat = many_tensors(asked.tensors, _ELEMENTS, seed=asked.seed)
    module, parameters = many_parameters(asked.tensors, _ELEMENTS, seed=asked.seed)
    memory = RawMemory(flat.local_nbytes, asked.seed)
    systems: list[System] = [
        raw_system(group, memory, direct=can_write_directly(asked.folder)),
        torch_save_system(group, flat),
        safetensors_system(group, flat),
        dcp_system(group, flat),
        ckpt_system({"w": dict(flat.tensors)}, flat, setting="flat dict"),
        ckpt_system({"model": module}, parameters, name=_MODULE, setting="module"),
    ]
    if asked.only:
        systems = [system for system in systems if system.name in asked.only]
    interleaving = Interleaving(group, systems, asked.folder, settle=asked.settle, seed=asked.seed)
    return interleaving.run(asked.repetitions)


def sections(asked: TensorParameters, measures: Sequence[Measure]) -> list[Section]:
    per_tensor = Yardstick("us/tensor", lambda measure: [1e6 * s / asked.tensors for s in measure.seconds])
    what = {"save": "Save, until durable", "load": "Load, files cached"}
    return [
        Section(
            title=f"{title}: 1 process, {asked.tensors} tensors of 1 KiB",
            measures=[measure for measure in measures if measure.phase == phase],
            nbytes=asked.nbytes,
            yardstick=per_tensor,
            targets={CKPT: _TARGET_US, _MODULE: _TARGET_US},
            notes=["raw: as many bytes in one piece"],
        )
        for phase, title in what.items()
    ]


@click.command()
@options.FOLDER
@click.option("--tensors", type=click.IntRange(1), default=20_000, show_default=True)
@options.repetitions(7)
@options.SETTLE
@options.SEED
@options.only()
@options.quick("5,000 tensors, 3 repetitions")
@options.JSON
def main(
    folder: Path,
    tensors: int,
    repetitions: int,
    settle: float,
    seed: int,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
) -> None:
    """Save and load many small tensors: raw I/O, torch.save, safetensors, torch DCP and ckpt, interleaved."""
    if quick:
        tensors, repetitions = 5_000, 3
    scratch = folder.absolute() / "many_tensors"
    asked = TensorParameters(
        tensors=tensors,
        tensor_bytes=_TENSOR_BYTES,
        folder=scratch,
        repetitions=repetitions,
        settle=settle,
        seed=seed,
        only=only,
    )
    report = Report()
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        measures = run_ranks(rank_main, 1, asked, say=report.say(1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.show(sections(asked, measures))
    report.end("many_tensors", asked.as_json(), json_path)


if __name__ == "__main__":
    main()
