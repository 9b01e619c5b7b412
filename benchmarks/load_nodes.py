"""Loads a checkpoint on two nodes with a limited link between them: passing on what was read, against raw limits.

    python -m benchmarks.load_nodes [--quick] [--json FILE]

Two processes in network namespaces of their own. Needs root. README.md in this folder has the method.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import ckpt
from benchmarks import options
from benchmarks.files import drop
from benchmarks.interleave import Measure
from benchmarks.options import SHAPE, TENSOR_BYTES, TensorParameters
from benchmarks.ranks import Group, run_ranks
from benchmarks.raw_io import RAW, RawMemory
from benchmarks.report import Report, Section, Yardstick
from benchmarks.state import NamedTensors, sharded_tensors
from benchmarks.systems import CKPT
from benchmarks.two_nodes import ADDRESS, enter

_TARGET = 1.2
_PHASES = ("replicas", "other cut")
"""Every node needs everything; or tensors that were saved in rows are loaded in columns, half of them by each."""
_WHAT = {"replicas": "Load of everything by both nodes", "other cut": "Load of rows into columns by both nodes"}
_LINK = "link"
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters(TensorParameters):
    """What was asked for."""

    phases: tuple[str, ...]


Outcome = dict[tuple[str, str], tuple[Measure, float]]
"""(phase, system) -> its times, and the bytes that it read from the files over those that there are."""


def rank_main(group: Group, asked: Parameters) -> Outcome:
    """What each node runs."""
    size = asked.nbytes
    rows, columns = sharded_tensors(group, asked.tensors, SHAPE, seed=asked.seed, dimensions=(0, 1))
    # the same tensors, whole on each node
    alone = Group(0, 1, group.say)
    (whole,) = sharded_tensors(alone, asked.tensors, SHAPE, seed=asked.seed, dimensions=(0,))
    memory = RawMemory(size // 2, asked.seed + group.rank)
    raw, ours, dcp = (asked.folder / name for name in ("raw", "ckpt", "dcp"))
    raw.mkdir(parents=True, exist_ok=True)
    memory.write(raw / f"{group.rank}.bin", direct=False, threads=1)
    ckpt.save({"model": dict(rows.tensors)}, ours)
    dcp_save(dict(rows.tensors), storage_writer=FileSystemWriter(dcp))
    if group.rank == 0:
        os.sync()
    links = _connected(group)
    outcome: Outcome = {}
    order = random.Random(asked.seed)
    for repetition in range(-1, asked.repetitions):
        for phase in asked.phases:
            into = whole if phase == "replicas" else columns
            # of what one node reads, the other needs all or half
            crossing = size // 2 if phase == "replicas" else size // 4
            ways: list[tuple[str, str, Path, Callable[[], object]]] = [
                (
                    RAW,
                    "O_DIRECT, 4 threads",
                    raw,
                    partial(memory.read, raw / f"{group.rank}.bin", threads=4, direct=True),
                ),
                (_LINK, "plain sockets, both ways", raw, partial(_cross, links, crossing)),
                (CKPT, "exchange", ours, partial(_load, into, ours, "always")),
                (f"{CKPT}, each node for itself", "no exchange", ours, partial(_load, into, ours, "never")),
                ("torch DCP", "FileSystemReader", dcp, partial(_load_dcp, into, dcp)),
            ]
            order.shuffle(ways)
            for system, setting, folder, run in ways:
                title = "first calls" if repetition < 0 else f"repetition {repetition + 1}/{asked.repetitions}"
                group.say(f"{title}: {phase}: {system}")
                mine = system in (RAW, _LINK)
                if not mine:
                    into.spoil()
                seconds, value = _timed(group, folder, run)
                if not mine:
                    into.check()
                read = value.bytes_read if isinstance(value, ckpt.LoadResult) else 0
                total = torch.tensor([read])
                dist.all_reduce(total)
                key = (phase, system)
                measure, _ = outcome.setdefault(key, (Measure(phase, system, setting, first=seconds), 0.0))
                outcome[key] = (measure, float(total) / size)
                if repetition >= 0:
                    measure.seconds.append(seconds)
    return outcome


def _timed(group: Group, folder: Path, run: Callable[[], object]) -> tuple[float, object]:
    """Seconds from the first node's start to the last one's end, nothing cached; and what was returned."""
    group.barrier()
    if group.rank == 0:
        drop(folder)
    group.barrier()
    start = time.monotonic()
    value = run()
    return group.span(start, time.monotonic()), value


def _load(into: NamedTensors, folder: Path, exchange: str) -> object:
    return ckpt.load({"model": dict(into.tensors)}, folder, exchange=exchange)  # type: ignore[arg-type]


def _load_dcp(into: NamedTensors, folder: Path) -> None:
    dcp_load(dict(into.tensors), storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner())


def _connected(group: Group) -> tuple[socket.socket, socket.socket]:
    """A connection to send on and one to receive from."""
    with socket.create_server((ADDRESS.format(group.rank + 1), 0)) as listener:
        ports = torch.zeros(2, dtype=torch.int64)
        ports[group.rank] = listener.getsockname()[1]
        dist.all_reduce(ports)
        other = 1 - group.rank
        sending = socket.create_connection((ADDRESS.format(other + 1), int(ports[other])), 20)
        listener.settimeout(20)
        receiving, _ = listener.accept()
    return sending, receiving


def _cross(links: tuple[socket.socket, socket.socket], nbytes: int) -> None:
    """So many bytes from each node's memory into the other's, both ways at once."""
    sending, receiving = links
    sending.settimeout(600)
    receiving.settimeout(600)
    data, into = bytes(_CHUNK), bytearray(_CHUNK)

    def send() -> None:
        for start in range(0, nbytes, _CHUNK):
            sending.sendall(memoryview(data)[: nbytes - start])

    out = threading.Thread(target=send)
    out.start()
    left = nbytes
    while left:
        count = receiving.recv_into(into, min(left, _CHUNK))
        if not count:
            raise ConnectionError("the other node is gone")
        left -= count
    out.join()


def sections(mbit: int, size: int, outcome: Outcome) -> list[Section]:
    """A table for each phase."""
    result = []
    for phase in dict.fromkeys(key[0] for key in outcome):
        measures = {system: entry[0] for (of, system), entry in outcome.items() if of == phase}
        limits = [max(pair) for pair in zip(measures[RAW].seconds, measures[_LINK].seconds, strict=True)]
        read = ", ".join(
            f"{system} {entry[1]:.2f}" for (of, system), entry in outcome.items() if of == phase and entry[1]
        )
        result.append(
            Section(
                title=f"{_WHAT[phase]}, nothing cached: {size / 2**30:g} GiB, {mbit} Mbit/s each way",
                measures=list(measures.values()),
                nbytes=size,
                yardstick=Yardstick.ratio("x slower of raw, link", limits),
                targets={CKPT: _TARGET},
                notes=[f"bytes read over bytes stored, both nodes: {read}"],
            )
        )
    return result


@click.command()
@options.FOLDER
@click.option(
    "--link",
    "links",
    type=click.IntRange(10),
    multiple=True,
    default=(2500, 10000),
    show_default=True,
    help="Mbit/s each way; repeatable.",
)
@options.size(512)
@options.repetitions(5)
@click.option("--phase", "phases", type=click.Choice(_PHASES), multiple=True, default=_PHASES, show_default=True)
@options.SEED
@options.quick("128 MiB, 2 repetitions")
@options.JSON
def main(
    folder: Path,
    links: Sequence[int],
    size: int,
    repetitions: int,
    phases: tuple[str, ...],
    seed: int,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Load on two nodes: raw reading, a plain copy over the link, ckpt with and without exchange, torch DCP."""
    if quick:
        size, repetitions = 128, 2
    scratch = folder.absolute() / "load_nodes"
    asked = Parameters(
        tensors=size * 2**20 // TENSOR_BYTES, folder=scratch, repetitions=repetitions, seed=seed, phases=phases
    )
    report = Report()
    try:
        for mbit in links:
            meeting = scratch / "meeting"
            meeting.mkdir(parents=True, exist_ok=True)
            outcome = run_ranks(
                rank_main,
                2,
                asked,
                say=report.say(2),
                prepare=partial(enter, folder=meeting, mbit=mbit),
            )
            report.show(sections(mbit, asked.nbytes, outcome))
            shutil.rmtree(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.end("load_nodes", {"links_mbit": links, **asked.as_json()}, json_path)


if __name__ == "__main__":
    main()
