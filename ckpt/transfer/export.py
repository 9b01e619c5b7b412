"""Export: the tensors of a checkpoint as a folder of plain safetensors files, as Hugging Face's libraries write them.

Whole tensors under their names, in files of bounded size, and an index that says which is in which. Streaming, in
bounded memory, verified on the way. The folder gets its name when it is whole and on stable storage.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt import collector
from ckpt.events import Operation
from ckpt.storage.data_file import Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import remove_folders
from ckpt.transfer.feeding import Feed, Item, Progress, Tally, casts_of
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointExistsError,
    MissingTensorError,
    SaveFailedError,
    UnsupportedValueError,
)
from ckpt_formats.geometry import Box
from ckpt_formats.renaming import Rename
from ckpt_formats.safetensors_file import FileLayout
from ckpt_formats.urls import folder_of

__all__ = ["SHARD", "ExportResult", "export"]

SHARD = 5_000_000_000
"""Bytes of a file, unless a single tensor is larger: what Hugging Face's libraries do."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What an export did."""

    path: str
    """The new folder."""
    files: Sequence[str]
    """Names of the files with tensors, in order."""
    tensors: int
    bytes: int
    """Bytes of the tensors."""
    left_out: Sequence[str]
    """Values, which such files have no place for, and second names of tied tensors, which are written once."""
    overflowed: Sequence[str]
    """Tensors with finite elements beyond the largest of the dtype asked for, which are what torch makes of them now:
    infinite, not a number, or that largest."""
    seconds: float


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    select: Sequence[str] | None = None,
    rename: Rename | None = None,
    dtype: str | Mapping[str, str] | None = None,
    shard: int = SHARD,
    progress: Progress | None = None,
    files: Files | None = None,
) -> ExportResult:
    """Write tensors of the checkpoint `source` into a new folder `target` of safetensors files.

    Args:
        source: a checkpoint's folder, or its URL in a store.
        target: the new folder; nothing may be there, but for an empty folder.
        select, rename, dtype, progress: as for `reshard`.
        shard: bytes of tensors in a file at most; a larger tensor has a file of its own.

    Raises:
        CheckpointNotFoundError, CorruptionError, FormatError, StoreError: of the source.
        MissingTensorError, RenameError, LayoutError: a pattern or a rule is wrong or matches nothing, or nothing is
            left to be written.
        DtypeMismatchError, UnknownDtypeError: as `reshard`.
        UnsupportedValueError: safetensors has no such dtype as a tensor's.
        CheckpointExistsError: something is at the target.
        SaveFailedError: writing failed; nothing is left at the target.
    """
    files = files or Files()
    path = folder_of(target)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise CheckpointExistsError(f"{path} is there already, and nothing is overwritten; choose another", path=path)
    with (
        collector.paused(),
        Operation("export", path) as operation,
        open_checkpoint(source, select=select, rename=rename) as checkpoint,
    ):
        operation.step = checkpoint.step
        with operation.phase("plan"):
            items = _items(checkpoint, dtype)
            planned = list(_shards(items, shard))
        total = sum(item.nbytes for item in items)
        count = Tally(progress, total)
        # beside its place, so that it can be renamed; whoever finds it knows what it was
        folder = f"{path}.{secrets.token_hex(8)}.tmp"
        staging = Staging()
        overflowed: set[str] = set()
        written: dict[str, Sequence[Item]] = {}
        made: list[str] = []
        try:
            files.make_folders(folder, made)
            with operation.phase("write") as phase:
                for number, some in enumerate(planned, 1):
                    name = _file_name(number, len(planned))
                    feed = Feed(checkpoint, some, count)
                    write_data_file(files, folder, name, feed.chunks(), staging, layout=_plain(some))
                    overflowed |= feed.overflowed
                    written[name] = some
                phase.bytes = operation.bytes = total
            with operation.phase("commit"):
                if len(written) > 1:
                    _write_index(files, f"{folder}/{INDEX}", written, total)
                files.sync_folder(folder)
                files.rename(folder, path)
                files.sync_folder(os.path.dirname(path) or ".")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            remove_folders(files, [name for name in made if name != folder])
            if isinstance(error, OSError) and not isinstance(error, CheckpointError):
                raise SaveFailedError(
                    f"{path}: could not be written ({error.strerror or error}); nothing is left of it. "
                    "Free space or choose another place, then try again",
                    path=path,
                ) from error
            raise
        manifest = checkpoint.manifest
    return ExportResult(
        path=path,
        files=list(written),
        tensors=len(items),
        bytes=total,
        left_out=[*manifest.aliases, *manifest.values],
        overflowed=sorted(overflowed),
        seconds=operation.total,
    )


def _items(checkpoint: Checkpoint, dtype: str | Mapping[str, str] | None) -> list[Item]:
    manifest = checkpoint.manifest
    casts = casts_of(manifest, dtype)
    items = []
    for name, meta in manifest.model_tensors.items():
        checkpoint.reader.require(name)
        item = Item(name, meta, casts.get(name, meta.dtype), Box.whole(meta.shape))
        if item.dtype.safetensors is None:
            raise UnsupportedValueError(
                f"the tensor {name!r} is {item.dtype}, which safetensors files can't say; leave it out, or give it "
                "another dtype",
                tensor=name,
            )
        items.append(item)
    if not items:
        raise MissingTensorError(f"{checkpoint.path} has no tensors that could be written", path=checkpoint.path)
    return items


def _shards(items: Sequence[Item], most: int) -> Iterator[list[Item]]:
    """What goes to each file: in the order of the checkpoint, and within a file the largest elements first, so that
    all are aligned without padding."""
    some: list[Item] = []
    size = 0
    for item in items:
        if some and size + item.nbytes > most:
            yield sorted(some, key=_rank)
            some, size = [], 0
        some.append(item)
        size += item.nbytes
    yield sorted(some, key=_rank)


def _rank(item: Item) -> tuple[int, str]:
    return -item.dtype.itemsize, item.name


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _plain(items: Sequence[Item]) -> FileLayout:
    """A file without names of paddings: other readers would take these for tensors."""
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = []
    at = 0
    for item in items:
        starts.append(at)
        offsets = [at, at + item.nbytes]
        head[item.name] = {"dtype": item.dtype.safetensors, "shape": list(item.meta.shape), "data_offsets": offsets}
        at += item.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, [len(header) + start for start in starts], len(header) + at)


def _write_index(files: Files, path: str, written: Mapping[str, Sequence[Item]], total: int) -> None:
    where = {item.name: name for name, items in written.items() for item in items}
    tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    with files.create(path, direct=False) as file:
        file.write(memoryview(json.dumps(tree, indent=2).encode() + b"\n"), 0)
        file.sync()
