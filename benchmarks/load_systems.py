"""What loads are compared: raw reading, safetensors, torch DCP, its Hugging Face reader, this project.

Each saves one checkpoint of a model and two moments as large, cut by rows, and loads it into the same cut, into
columns, or only the model. Knows nothing of how it is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import ckpt
from benchmarks.interleave import Way
from benchmarks.ranks import Group
from benchmarks.raw_io import RAW, RawMemory
from benchmarks.state import NamedTensors, sharded_tensors
from benchmarks.systems import CKPT

PHASES = ("same cut", "other cut", "model only")
"""Everything as it was saved; everything cut by columns (several ranks only); the first third, as it was saved."""


class Saved:
    """The state that every system saves, and what is loaded into.

    Attributes:
        folder: below it every system has a folder.
        rows: all tensors, as they are saved.
        into: by phase, the tensors that it fills.
        raw: by phase, as many bytes in one piece.
    """

    def __init__(self, group: Group, tensors: int, shape: tuple[int, int], seed: int, folder: Path) -> None:
        self.folder = folder
        cuts = (0, 1) if group.size > 1 else (0,)
        self.rows, *others = sharded_tensors(group, tensors, shape, seed=seed, dimensions=cuts)
        first = list(self.rows.tensors)[: max(1, tensors // 3)]
        parts = (self.rows.tensors, self.rows.locals, self.rows.digests)
        self._model = NamedTensors(*({name: part[name] for name in first} for part in parts))  # type: ignore[arg-type]
        self.into = {"same cut": self.rows, "model only": self._model}
        self.raw = {phase: RawMemory(into.local_nbytes, seed + group.rank) for phase, into in self.into.items()}
        if others:
            self.into["other cut"] = others[0]
            self.raw["other cut"] = self.raw["same cut"]

    def entries(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
        """The state that a user of this project would have: the model in one entry, its moments in another."""
        entries: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            entries.setdefault("model" if name in self._model.tensors else "moments", {})[name] = tensor
        return dict(entries)


@dataclass(frozen=True, slots=True)
class LoadingSystem:
    """One system: what it saves, once, into its folder, and how it loads from there."""

    name: str
    folder: Path
    save: Callable[[], object]
    """The caller syncs."""
    loads: Mapping[str, Sequence[Way]]
    """By phase; what a system can't do is left out."""


def loading_systems(group: Group, saved: Saved) -> list[LoadingSystem]:
    """All of them, each in a folder of its own."""
    peers = [make(group, saved) for make in (raw_system, safetensors_system, dcp_system, huggingface_system)]
    return [*peers, ckpt_system(saved)]


def raw_system(group: Group, saved: Saved) -> LoadingSystem:
    """As many bytes as needed, read by each rank from a file of its own: by the page cache, and past it."""
    folder = saved.folder / "raw"
    paths = {id(memory): folder / f"{n}-{group.rank}.bin" for n, memory in enumerate(saved.raw.values())}

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for memory in {id(memory): memory for memory in saved.raw.values()}.values():
            memory.write(paths[id(memory)], direct=False, threads=1)

    def ways(phase: str, memory: RawMemory) -> list[Way]:
        path = paths[id(memory)]
        parts = group.size if phase == "other cut" else 1
        # what verifies, or shares reads, can't be faster than this
        least = "read, hashed, copied by columns" if parts > 1 else "read, hashed"
        return [
            Way("read", lambda _: memory.read(path, threads=1)),
            Way("read, 4 threads", lambda _: memory.read(path, threads=4)),
            Way("O_DIRECT, 4 threads", lambda _: memory.read(path, threads=4, direct=True)),
            Way(least, lambda _: memory.read_hashed(path, parts=parts)),
        ]

    return LoadingSystem(RAW, folder, save, {phase: ways(phase, memory) for phase, memory in saved.raw.items()})


def safetensors_system(group: Group, saved: Saved) -> LoadingSystem:
    """A file for each rank, of its own tensors; it knows no other cut."""
    folder = saved.folder / "safetensors"
    path = folder / f"{group.rank}.safetensors"

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(saved.rows.locals), path)

    def load(into: NamedTensors, _: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name, tensor in into.locals.items():
                tensor.copy_(file.get_tensor(name))

    same = [phase for phase in saved.into if phase != "other cut"]
    loads = {phase: [Way("safe_open, copy one by one", partial(load, saved.into[phase]))] for phase in same}
    return LoadingSystem("safetensors", folder, save, loads)


def dcp_system(group: Group, saved: Saved) -> LoadingSystem:
    """`torch.distributed.checkpoint` with its own files."""
    folder = saved.folder / "dcp"
    return _dcp(
        "torch DCP",
        group,
        saved,
        folder,
        lambda: FileSystemWriter(folder, thread_count=2),
        lambda: FileSystemReader(folder),
        "FileSystemReader",
    )


def huggingface_system(group: Group, saved: Saved) -> LoadingSystem:
    """The same with safetensors files, as Hugging Face has them, a shard for each rank."""
    folder = saved.folder / "hf"
    return _dcp(
        "torch DCP, HF",
        group,
        saved,
        folder,
        lambda: HuggingFaceStorageWriter(str(folder), save_distributed=True),
        lambda: HuggingFaceStorageReader(str(folder), thread_count=2),
        "HuggingFaceStorageReader",
    )


def _dcp(
    name: str,
    group: Group,
    saved: Saved,
    folder: Path,
    writer: Callable[[], StorageWriter],
    reader: Callable[[], StorageReader],
    setting: str,
) -> LoadingSystem:
    alone = group.size == 1
    if alone:
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def save() -> None:
        dcp_save(dict(saved.rows.tensors), storage_writer=writer(), no_dist=alone)

    def load(into: NamedTensors, _: Path) -> None:
        dcp_load(dict(into.tensors), storage_reader=reader(), planner=DefaultLoadPlanner(), no_dist=alone)

    loads = {phase: [Way(setting, partial(load, into))] for phase, into in saved.into.items()}
    return LoadingSystem(name, folder, save, loads)


def ckpt_system(saved: Saved) -> LoadingSystem:
    """This project with its defaults: every byte is verified."""
    folder = saved.folder / "ckpt"

    def load(into: NamedTensors, _: Path) -> None:
        ckpt.load(dict(saved.entries(into.tensors)), folder / "checkpoint")

    def save() -> None:
        ckpt.save(saved.entries(saved.rows.tensors), folder / "checkpoint")

    loads = {phase: [Way("defaults", partial(load, into))] for phase, into in saved.into.items()}
    return LoadingSystem(CKPT, folder, save, loads)
