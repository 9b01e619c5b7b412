"""The systems that are compared, with the settings worth trying: torch.save, safetensors, torch DCP, this project.

A save counts until everything is durable: where a system leaves files or folders unsynced, they are synced here, within
its time. A load counts until the bytes are in the tensors that were there before, as a training job resumes. Knows
nothing of how it is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import ckpt
from benchmarks.files import sync_path
from benchmarks.interleave import Load, System, Way
from benchmarks.ranks import Group
from benchmarks.state import NamedTensors

CKPT = "ckpt"


def torch_save_system(group: Group, state: NamedTensors) -> System:
    """`torch.save` of this rank's tensors into a file of its own."""

    def save(folder: Path, *, crc32: bool) -> None:
        path = folder / f"{group.rank}.pt"
        with _zip_crc32(crc32):
            torch.save(dict(state.locals), path)
        sync_path(path)
        sync_path(folder)

    def load(folder: Path, *, mapped: bool) -> None:
        _copy_into(state.locals, torch.load(folder / f"{group.rank}.pt", weights_only=True, mmap=mapped))

    saves = [
        Way("defaults", lambda folder: save(folder, crc32=True)),
        Way("no CRC-32", lambda folder: save(folder, crc32=False)),
    ]
    loads = [
        Way("read, then copy", lambda folder: load(folder, mapped=False)),
        Way("mmap, then copy", lambda folder: load(folder, mapped=True)),
    ]
    return System("torch.save", saves, [Load("load", state, loads)])


def safetensors_system(group: Group, state: NamedTensors) -> System:
    """`save_file` of this rank's tensors into a file of its own."""

    def path(folder: Path) -> Path:
        return folder / f"{group.rank}.safetensors"

    def save(folder: Path) -> None:
        save_file(dict(state.locals), path(folder))
        sync_path(path(folder))
        sync_path(folder)

    def load_one_by_one(folder: Path) -> None:
        with safe_open(path(folder), framework="pt") as file:
            for name, tensor in state.locals.items():
                tensor.copy_(file.get_tensor(name))

    loads = [
        Way("load_file, then copy", lambda folder: _copy_into(state.locals, load_file(path(folder)))),
        Way("safe_open, copy one by one", load_one_by_one),
    ]
    return System("safetensors", [Way("save_file", save)], [Load("load", state, loads)])


def dcp_system(group: Group, state: NamedTensors, other_cut: NamedTensors | None = None) -> System:
    """`torch.distributed.checkpoint`, all ranks into one checkpoint."""
    alone = group.size == 1
    if alone:
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def saving(
        setting: str, *, threads: int, per_tensor: bool = False, crc32: bool = True, cached: bool = False
    ) -> Way:
        planner = DefaultSavePlanner(enable_plan_caching=cached)

        def save(folder: Path) -> None:
            writer = FileSystemWriter(
                folder, single_file_per_rank=not per_tensor, sync_files=True, thread_count=threads
            )
            with _zip_crc32(crc32):
                dcp_save(dict(state.tensors), storage_writer=writer, planner=planner, no_dist=alone)
            if group.rank == 0:
                sync_path(folder)

        return Way(setting, save)

    def load(folder: Path, into: NamedTensors) -> None:
        reader = FileSystemReader(folder)
        dcp_load(dict(into.tensors), storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=alone)

    saves = [
        saving("1 thread", threads=1),
        saving("2 threads", threads=2),
        saving("4 threads", threads=4),
        saving("2 threads, no CRC-32, cached plan", threads=2, crc32=False, cached=True),
    ]
    if len(state.tensors) < 1000:
        saves.append(saving("2 threads, a file per tensor", threads=2, per_tensor=True))
    loads = [Load("load", state, [Way("FileSystemReader", lambda folder: load(folder, state))])]
    if other_cut is not None:
        loads.append(
            Load("load, other cut", other_cut, [Way("FileSystemReader", lambda folder: load(folder, other_cut))])
        )
    return System("torch DCP", saves, loads)


def ckpt_system(
    live: MutableMapping[str, object],
    into: NamedTensors,
    *,
    name: str = CKPT,
    setting: str = "defaults",
    other_cut: NamedTensors | None = None,
) -> System:
    """This project with its defaults, checksums among them: `live` is what a user passes, `into` its tensors."""

    def path(folder: Path) -> Path:
        return folder / "checkpoint"

    loads = [Load("load", into, [Way(setting, lambda folder: _done(ckpt.load(live, path(folder))))])]
    if other_cut is not None:
        other: dict[str, object] = {"model": dict(other_cut.tensors)}
        loads.append(
            Load("load, other cut", other_cut, [Way(setting, lambda folder: _done(ckpt.load(other, path(folder))))])
        )
    return System(name, [Way(setting, lambda folder: _done(ckpt.save(live, path(folder))))], loads)


def _done(_result: object) -> None:
    """Drop a result: a Way returns nothing."""


def _copy_into(destination: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> None:
    names = list(destination)
    torch._foreach_copy_([destination[name] for name in names], [loaded[name] for name in names])


@contextmanager
def _zip_crc32(compute: bool) -> Iterator[None]:
    """Whether torch.save computes the CRC-32 of what it writes into its zip file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
