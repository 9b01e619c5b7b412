"""A simulation of very large checkpoints: the manifest of 16,384 ranks, made, opened and planned on this machine.

    python -m benchmarks.scale [--ranks N] [--tensors N] [--cut fsdp|mesh] [--json FILE]

Nothing here is trained and no rank runs: what each of the ranks would report to the committing one is made up, and the
data files are holes of the size that they would have (so every digest is that of zeros). What is measured is real: the
commit of these reports, and `ckpt.load` of what one rank holds, in processes of their own with their peak memory.
README.md in this folder has the method.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

import ckpt
from ckpt.saving.commit import Contents, FileNames, Part, commit
from ckpt.storage.data_file import WrittenFile
from ckpt.storage.files import Files
from ckpt.storage.publish import prepare_folder
from ckpt_formats.digest import digest
from ckpt_formats.manifest import rank_blob
from ckpt_formats.native import names
from ckpt_formats.native.index import IndexRows

HEADER = 4096
"""Bytes of a data file before its chunks; real headers would be longer, which nobody reads here."""
BLOB = 256
"""Bytes of per-rank values of each rank."""
ATTEMPT = "0123456789abcdef"
TP, PP = 8, 8
_LIMIT_S = 600


@dataclass(frozen=True, slots=True)
class Simulated:
    """What is simulated.

    `fsdp` cuts every tensor's rows over all ranks. `mesh` is dp x pp x tp: of 8 pipeline stages each has every eighth
    tensor, whose columns are cut over tp = 8 and whose rows over dp.
    """

    ranks: int
    tensors: int
    cut: str

    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return [f"model.layers.{number // 8:03d}.block.weight_{number % 8}" for number in range(self.tensors)]

    @property
    def shape(self) -> tuple[int, int]:
        """Of each tensor."""
        return (max(1, self._cells[0] * 2 - 1), self._cells[1] * 8)

    @property
    def _cells(self) -> tuple[int, int]:
        if self.cut == "fsdp":
            return self.ranks, 1
        return max(1, self.ranks // (TP * PP)), TP

    def box(self, rank: int) -> tuple[list[int], list[int]] | None:
        """Offsets and sizes of what a rank has of each of its tensors, by the rule of torch.chunk."""
        rows, columns = self.shape
        across, along = self._cells
        dp, tp = (rank, 0) if self.cut == "fsdp" else (rank // (TP * PP), rank % TP)
        step = -(-rows // across)
        start = min(dp * step, rows)
        size = min(step, rows - start)
        width = columns // along
        return ([start, tp * width], [size, width]) if size else None

    def held(self, rank: int) -> list[str]:
        """The tensors of a rank."""
        every = self.names()
        return every if self.cut == "fsdp" else every[rank // TP % PP :: PP]


def part_of(simulated: Simulated, rank: int, held: list[str]) -> tuple[bytes, int]:
    """What a rank reports to the committing one, encoded, and the size of its data file."""
    box = simulated.box(rank)
    count = len(held) if box else 0
    offset = np.zeros((count + 1, 2), np.int64)
    size = np.ones((count + 1, 2), np.int64)
    nbytes = 0
    if box:
        offset[:count], size[:count] = box
        nbytes = math.prod(box[1]) * 4
    size[count] = [BLOB, 1]
    length = np.full(count + 1, nbytes, np.int64)
    length[count] = BLOB
    digests = np.empty((count + 1, 16), np.uint8)
    digests[:] = np.frombuffer(digest(bytes(nbytes)), np.uint8)
    digests[count] = np.frombuffer(digest(bytes(BLOB)), np.uint8)
    rows = IndexRows(
        offset=offset,
        size=size,
        file=np.zeros(count + 1, np.int64),
        start=HEADER + np.cumsum(length) - length,
        length=length,
        codec=np.zeros(count + 1, np.uint8),
        digest=digests,
        block=np.full(count + 1, -1, np.int64),
        block_digest=np.empty((0, 16), np.uint8),
    )
    total = HEADER + int(length.sum())
    written = WrittenFile(names.data_path(rank, 0, ATTEMPT), total, HEADER, "0" * 32, rows)
    return Part([written], [FileNames(held[:count], [rank_blob(rank)])]).encode(), total


def make(simulated: Simulated, folder: Path) -> dict[str, float]:
    """Commit the checkpoint; the seconds and peak memory that it took."""
    files = Files()
    place = prepare_folder(files, str(folder))
    reports = []
    cut = {stage: simulated.held(stage * TP) for stage in range(PP)}
    for rank in range(simulated.ranks):
        report, size = part_of(simulated, rank, cut[0 if simulated.cut == "fsdp" else rank // TP % PP])
        reports.append(report)
        path = folder / names.data_path(rank, 0, ATTEMPT)
        path.touch()
        os.truncate(path, size)
    tensors: dict[str, tuple[str, tuple[int, ...], int | None]] = dict.fromkeys(
        simulated.names(), ("float32", simulated.shape, None)
    )
    own: tuple[str, tuple[int, ...], int | None] = ("uint8", (BLOB,), None)
    tensors |= {rank_blob(rank): own for rank in range(simulated.ranks)}
    contents = Contents(
        step=1,
        tensors=tensors,
        aliases={},
        values={},
        entries={"model": {"kind": "module"}},
        layout={"world_size": simulated.ranks},
        provenance={},
    )
    received = sum(map(len, reports)) / 2**20
    begin, cpu = time.perf_counter(), time.process_time()
    parts = [Part.decode(report) for report in reports]
    decoded = time.perf_counter()
    commit(files, place, ATTEMPT, contents, parts)
    end, cpu_end = time.perf_counter(), time.process_time()
    pages = sum(path.stat().st_size for path in (folder / "index").iterdir())
    return {
        "reports_mib": received,
        "decode_s": decoded - begin,
        "commit_s": end - begin,
        "commit_cpu_s": cpu_end - cpu,
        "commit_peak_mib": peak(),
        "chunks": float(sum(len(file.rows) for part in parts for file in part.files)),
        "index_mib": pages / 2**20,
        "root_mib": (folder / "manifest.json").stat().st_size / 2**20,
    }


def load(simulated: Simulated, folder: Path, rank: int) -> dict[str, float]:
    """Load what a rank holds; the seconds, and the memory above that of the process before."""
    box = simulated.box(rank)
    assert box is not None
    offsets, sizes = box
    model = {
        name.removeprefix("model."): ckpt.Shard(torch.ones(sizes), simulated.shape, offsets)
        for name in simulated.held(rank)
    }
    before = peak()
    begin, cpu = time.perf_counter(), time.process_time()
    result = ckpt.load({"model": model}, folder, strict=simulated.cut == "fsdp")
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if any(shard.local.any() for shard in model.values()):
        raise AssertionError("what was loaded is not what was stored")
    return {"load_s": seconds, "load_cpu_s": cpu, "load_mib": peak() - before, "process_mib": peak()} | {
        f"{phase}_s": spent for phase, spent in result.phases.items()
    }


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(simulated: Simulated, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Commit, then load as the first, a middle and a late rank."""
    ranks = sorted({0, simulated.ranks // 3, simulated.ranks // 2 - 1})
    command = [sys.executable, "-m", "benchmarks.scale", "--steps", json.dumps([asdict(simulated), str(folder), ranks])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for name, line in zip(["commit", *(f"rank {rank}" for rank in ranks)], process.stdout, strict=False):
            yield name, json.loads(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _steps(given: str) -> None:
    """Print what each step measures, in a process of its own that is forked from this one, on one CPU."""
    simulated, folder, ranks = json.loads(given)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    asked = Simulated(**simulated)
    for step in (partial(make, asked, Path(folder)), *(partial(load, asked, Path(folder), rank) for rank in ranks)):
        child = os.fork()
        if not child:
            signal.alarm(_LIMIT_S)
            print(json.dumps(step()), flush=True)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(1)


@click.command()
@click.option("--ranks", default=16384, show_default=True)
@click.option("--tensors", default=2000, show_default=True)
@click.option("--cut", type=click.Choice(["fsdp", "mesh"]), default="fsdp", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; default a temporary folder.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the numbers there, too.")
@click.option("--steps", hidden=True)
def main(ranks: int, tensors: int, cut: str, folder: Path | None, file: Path | None, steps: str | None) -> None:
    """Simulate the manifest of a very large checkpoint."""
    if steps is not None:
        _steps(steps)
        return
    simulated = Simulated(ranks, tensors, cut)
    print(f"SIMULATION: {ranks} ranks, {tensors} tensors, cut {cut}; no rank runs, data files are holes; one CPU")
    where = Path(tempfile.mkdtemp(prefix="scale-", dir=folder))
    measured = {}
    try:
        for name, numbers in run(simulated, where / "step_1"):
            measured[name] = numbers
            print(f"{name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in numbers.items()), flush=True)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    if file is not None:
        file.write_text(json.dumps({"simulated": asdict(simulated), "measured": measured}, indent=1))


if __name__ == "__main__":
    main()
