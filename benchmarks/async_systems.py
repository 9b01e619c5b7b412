"""Systems that save while the training goes on, each as two moments: the training may go on; all of it is durable.

torch DCP by a thread and by a process, torch_checkpointing where it is installed, this project; and those that only
save at once, whose two moments are one. Knows nothing of how they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

import ckpt
from benchmarks.files import sync_path
from benchmarks.interleave import Way
from benchmarks.ranks import Group

DURABLE_S = 600.0
"""Seconds that a save may take before a benchmark fails."""

Wait = Callable[[], None]
"""Returns when a save is durable."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A way to save: `start` returns when the training may go on."""

    system: str
    setting: str
    start: Callable[[Mapping[str, Any], Path], Wait]
    step: Callable[[], AbstractContextManager[object]] = nullcontext
    """What the optimizer's step has to run within."""
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def name(self) -> str:
        return f"{self.system}: {self.setting}"


def at_once(system: str, way: Way) -> Saving:
    """A system that saves while the training waits."""

    def start(_state: Mapping[str, Any], folder: Path) -> Wait:
        way.run(folder)
        return _nothing

    return Saving(system, way.setting, start)


def ckpt_saving(setting: str = "async_save") -> Saving:
    """This project, with its defaults: lazy capture, checksums, commit by the agent."""

    def start(state: Mapping[str, Any], folder: Path) -> Wait:
        pending = ckpt.async_save(state, folder / "checkpoint")

        def wait() -> None:
            pending.wait(DURABLE_S)

        return wait

    return Saving("ckpt", setting, start)


def dcp_thread(group: Group) -> Saving:
    """DCP's writing thread, with a stager that keeps its memory from save to save: faster than without."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return _dcp(group, "async, thread", AsyncCheckpointerType.THREAD, DefaultStager(options))


def dcp_process(group: Group) -> Saving:
    """DCP's writing process, which gets the state through shared memory."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
    )
    return _dcp(group, "async, process", AsyncCheckpointerType.PROCESS, DefaultStager(options))


def _dcp(group: Group, setting: str, kind: AsyncCheckpointerType, stager: DefaultStager) -> Saving:
    def start(state: Mapping[str, Any], folder: Path) -> Wait:
        writer = FileSystemWriter(folder, sync_files=True, thread_count=2)
        begun = dcp_async_save(
            dict(state), storage_writer=writer, async_checkpointer_type=kind, async_stager=stager, use_collectives=True
        )
        future = begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun

        def wait() -> None:
            future.result(DURABLE_S)
            if group.rank == 0:
                sync_path(folder)

        return wait

    return Saving("torch DCP", setting, start, close=stager.close)


def torch_checkpointing(group: Group) -> Saving | None:
    """torch_checkpointing's writing process, staged at once, as it asks for without CUDA; None if not installed.

    It syncs nothing, so what it wrote is synced here. Its staging runs under `lock()`, which is the user's to hold;
    here staging is over when save returns.
    """
    try:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
    except ImportError:
        return None
    staging = CheckpointStagerConfig(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
    manager = CheckpointManager(
        CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            # with it, 0.1.1 fails at the end of a file (EINVAL)
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
    )

    def start(state: Mapping[str, Any], folder: Path) -> Wait:
        future = manager.save(str(folder / "checkpoint"), {"model": dict(state)})

        def wait() -> None:
            if future is not None:
                future.result(DURABLE_S)
            if group.rank == 0:
                for path in [*folder.rglob("*"), folder]:
                    sync_path(path)

        return wait

    return Saving("torch_checkpointing", "async, process", start, close=manager.close)


def _nothing() -> None:
    """It is durable already."""


def owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The tensors as this project's users have them: parameters of a module that an optimizer owns."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
    return {"model": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}
