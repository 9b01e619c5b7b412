"""The front door's functions: save, load, open."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import torch

from ckpt.agent.pending import PendingSave
from ckpt.agent.saver import AsyncSaver, CaptureMode
from ckpt.collective import ProcessGroup
from ckpt.loading.load import LoadResult
from ckpt.loading.load import load as _load
from ckpt.saving.save import Saver, SaveResult
from ckpt.state.torch_dtypes import from_carrier, torch_dtype
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.dtypes import DType
from ckpt_formats.reading import BUFFERS
from ckpt_formats.renaming import Rename

_saver = Saver()
_async_saver = AsyncSaver(_saver)
# what is being captured when the process ends in good order is still saved
atexit.register(_async_saver.close)


def save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    process_group: ProcessGroup | None = None,
    compress: bool = False,
) -> SaveResult:
    """Save a training state as a checkpoint; returns when it is committed and on stable storage.

    Collective: all ranks of the process group call it with the same path and the same entries. Each box is written by
    one rank. Saving changes nothing in the state.

    Args:
        state: name -> module, optimizer, anything with `state_dict` and `load_state_dict`, tensor (DTensor, Shard),
            plain value, or RNG(). Plain values must be equal on all ranks or be marked with PerRank.
        path: the checkpoint's folder, which must not hold a committed checkpoint; folders above it are made.
        step: the training step, by default the one in the folder's name (`step_100`), if there is one.
        process_group: the ranks that take part; the default group when there is one, else this process alone.
        compress: store floating-point tensors smaller, without loss: training state in fp32 by about a sixth, trained
            weights in bf16 by about a third (benchmarks/compression.py). Worth it where links are slow.

    Raises:
        ConfigurationError: `compress` is neither True nor False.
        CheckpointExistsError: a checkpoint was committed there before.
        StateError, UnsupportedValueError, ValuesDifferError, CoverageError: the state can't be saved; nothing was
            written.
        SaveFailedError: writing failed; nothing was committed.
        RankError: another rank failed; nothing was committed.
    """
    return _saver.save(state, path, step=step, process_group=process_group, compress=compress)


def async_save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    process_group: ProcessGroup | None = None,
    capture: CaptureMode = "lazy",
    memory: float | None = None,
    compress: bool | Literal["auto"] = False,
    bandwidth: float | None = None,
) -> PendingSave:
    """Save a training state without stopping the training; returns as soon as it may go on.

    Collective like `save`. The state is copied into shared memory, from where an agent, a process of its own on this
    node that outlives the trainers, writes and commits it. What an optimizer of the state owns (parameters and slots)
    is copied while the next forward and backward pass run; the optimizer's `step` waits for what is left. Everything
    else is copied before this returns. Several saves may be under way; when the memory for them is used up, a save
    waits, and says so.

    Args:
        state, path, step, process_group: as for `save`. With `{node}` in the path, which stands for a node's name, each
            node writes to a disk of its own.
        capture: "eager" copies everything before this returns, for those who change parameters by other means than
            `optimizer.step` (or wait for `pending.captured()` before they do).
        memory: bytes of shared memory that this rank's captures may take, all saves under way together; by default
            three times what it writes. A state that is larger goes through in pieces, while the training waits.
        compress: as for `save`, by the agent; "auto" compresses for as long as the storage is measured to be so slow
            that it pays. A state that goes through in pieces is not compressed.
        bandwidth: bytes per second at which the agent of this node may write; by default as fast as it can.

    Returns a handle: `captured()`, `committed()`, `wait()`, `done()`, `result()`. A save that failed says so there,
    and at the next `async_save`.

    Raises what `save` raises when the state can't be saved, ConfigurationError for an option that means nothing, and
    SaveFailedError or RankError when an agent can't be started or reached.
    """
    if memory is not None:
        _async_saver.declare(memory)
    return _async_saver.save(
        state,
        path,
        step=step,
        process_group=process_group,
        capture=capture,
        compress=compress,
        bandwidth=bandwidth,
    )


def load(
    state: MutableMapping[str, object],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    cast: bool = False,
    rename: Rename | None = None,
    buffers: int = BUFFERS,
    exchange: Literal["auto", "always", "never"] = "auto",
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
) -> LoadResult:
    """Load a checkpoint into a state, in place, whatever parallelism wrote it and whatever parallelism the state has.

    Collective like `save`. Each rank reads only the ranges that it needs, verified against their checksums. Entries of
    the checkpoint that the state does not name are not loaded.

    Args:
        state: as for `save`. Tensors are written in place; slots that an optimizer does not have yet are made; plain
            values are replaced in the mapping.
        path: the checkpoint's folder.
        strict: with False, names that only one side has are skipped and reported in the result.
        cast: convert tensors whose dtype differs, instead of refusing: between floats, between complex numbers, and
            where nothing is lost.
        rename: names in the checkpoint -> names in the state, where these differ: `{"model.encoder": "encoder"}` for
            all that is below, `{"model.blocks.*": "model.layers.*"}` by pattern, None as the new name for what is to
            be left out; or a function from names to names. Slots of optimizers and parameter groups follow their
            parameters (docs/loading.md). Names in errors and in the result are the new ones.
        buffers: bytes of memory beside the state that each rank may take to read through; at least what one block of
            the checkpoint needs (1 MiB, unless another release wrote it) is taken.
        exchange: whether nodes pass on to each other what several of them need, so that each byte is read from the
            storage once: "always", "never", or "auto", which does if the storage is reached over a network (an object
            store, or a file system such as NFS or Lustre) and most of what is needed is not cached. Equal on all ranks.
        device: where modules on torch's meta device get their memory: by default the CPU, or the device of a DTensor's
            mesh. Parameters and persistent buffers do; other buffers stay there, and are listed in the result.
        process_group: as for `save`.

    Raises:
        CheckpointNotFoundError: no checkpoint was committed there.
        RenameError: a rule of `rename` is wrong, matches nothing, or gives two things one name; nothing was touched.
        StateMismatchError, ShapeMismatchError, DtypeMismatchError: the state is another; nothing was touched.
        ConfigurationError: ranks were given different checkpoints; nothing was touched.
        CorruptionError: bytes do not fit their checksum; tensors may have been overwritten in part.
        RankError: another rank failed.
    """
    # tensors are written in place, behind the back of version counters
    _async_saver.settle()
    return _load(
        state,
        path,
        strict=strict,
        cast=cast,
        rename=rename,
        buffers=buffers,
        exchange=exchange,
        device=device,
        process_group=process_group,
    )


def open(path: str | os.PathLike[str], *, rename: Rename | None = None) -> Checkpoint:
    """Open a checkpoint for reading, without a process group and without loading anything.

    `ckpt.open(path)["model.embed.weight"][0:10]` reads those rows as a torch tensor on the CPU; `.tensors` maps names
    to such lazy tensors, `.values` has the plain values, `.manifest` everything else. With `rename`, as for `load`, all
    of these have the new names.

    Raises:
        CheckpointNotFoundError: no checkpoint was committed there.
        CorruptionError, FormatError: its manifest is damaged or wrong.
        RenameError: as `load`.
    """
    return open_checkpoint(path, _as_torch, rename=rename)


def _as_torch(array: AnyArray, dtype: DType) -> Any:
    # negative strides, from a[::-1], are nothing that torch knows
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    tensor: torch.Tensor = from_carrier(array, torch_dtype(dtype.name))
    return tensor
