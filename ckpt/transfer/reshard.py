"""Resharding: a checkpoint cut anew for another mesh, without processes, streaming, in bounded memory.

Loading needs no resharding: any cut loads into any other. What this buys is that the bytes of each target rank lie
together, in a file of its own, so that loading them again and again reads long runs. What is read is verified on the
way.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt import collector
from ckpt.events import Operation
from ckpt.provenance import provenance
from ckpt.saving.commit import Contents, FileNames, Part, commit, split_files
from ckpt.saving.sources import BytesSource
from ckpt.storage.data_file import Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import discard, prepare_folder
from ckpt.transfer.feeding import Casts, Feed, Item, Progress, Tally, casts_of
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.codecs import RAW
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.geometry import Box
from ckpt_formats.json_text import to_json
from ckpt_formats.layout import Layout, Mesh, Resolved
from ckpt_formats.layout.applying import resolve
from ckpt_formats.manifest import RANK_PREFIX, RESERVED_PREFIX, Manifest
from ckpt_formats.native import names
from ckpt_formats.renaming import Rename
from ckpt_formats.urls import folder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardResult:
    """What a reshard did."""

    path: str
    """The new checkpoint's folder."""
    mesh: Mesh
    """What it is cut for."""
    tensors: int
    """Tensors of the model."""
    bytes: int
    """Bytes that were written."""
    bytes_per_rank: Sequence[int]
    """Bytes in each target rank's file; what several ranks hold alike lies in one of them."""
    overflowed: Sequence[str]
    """Tensors with finite elements beyond the largest of the dtype asked for, which are what torch makes of them now:
    infinite, not a number, or that largest."""
    seconds: float


def reshard(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mesh: Mesh,
    layout: Layout | None = None,
    *,
    select: Sequence[str] | None = None,
    rename: Rename | None = None,
    dtype: str | Mapping[str, str] | None = None,
    progress: Progress | None = None,
    files: Files | None = None,
) -> ReshardResult:
    """Write the checkpoint `source`, or a part of it, as a new one in which each rank's bytes on `mesh` lie together.

    Args:
        source: a checkpoint's folder, or its URL in a store.
        target: the new one's folder, which must not hold a checkpoint.
        mesh: axes and sizes, such as Mesh.parse("dp=2,tp=4").
        layout: how tensors lie on the ranks; see docs/layout.md for what goes without saying.
        select: patterns of the tensors and values that are taken, as in layouts; all, unless it is given.
        rename: what they are called in the new one, if otherwise; see ckpt.load.
        dtype: what tensors are converted to, as torch's `Tensor.to` does it: all floating-point ones but for what
            optimizers keep as scalars, or by pattern.
        progress: called after each chunk.

    Raises:
        CheckpointNotFoundError, CorruptionError, FormatError: of the source.
        MissingTensorError, RenameError: a pattern or a rule matches nothing, or names collide.
        DtypeMismatchError, UnknownDtypeError: a dtype can't be that of a tensor without loss, other than of a float.
        LayoutError: nothing says how an axis cuts, or rules are wrong, unused or at odds, or leave holes or overlaps.
        CheckpointExistsError: of the target.
        SaveFailedError: writing failed; nothing was committed.
        StoreError: the store of the source can't be read, or the target is a URL.
    """
    files = files or Files()
    path = folder_of(target)
    with (
        collector.paused(),
        Operation("reshard", path) as operation,
        open_checkpoint(source, select=select, rename=rename) as checkpoint,
    ):
        manifest = checkpoint.manifest
        operation.step = manifest.step
        resolved = resolve(manifest, mesh, layout or Layout())
        with operation.phase("plan"):
            casts = casts_of(manifest, dtype)
            own = _own(checkpoint)
            per_rank = _assign(checkpoint, resolved, casts, own)
        total = sum(part.nbytes for held in per_rank for part in held)
        count = Tally(progress, total)
        folder = prepare_folder(files, path)
        attempt = secrets.token_hex(8)
        staging = Staging()
        # what was compressed stays so
        compress = any(codec != RAW for codec in checkpoint.locations.codecs)
        parts: list[Part] = []
        overflowed: set[str] = set()
        try:
            for rank, held in enumerate(per_rank):
                written = []
                chunk_names = []
                with operation.phase("write") as phase:
                    for number, some in enumerate(split_files(held)):
                        data = names.data_path(rank, number, attempt)
                        feed = Feed(checkpoint, some, count)
                        chunks = [
                            chunk._replace(source=BytesSource(own[chunk.name])) if chunk.name in own else chunk
                            for chunk in feed.chunks()
                        ]
                        written.append(write_data_file(files, path, data, chunks, staging, compress=compress))
                        chunk_names.append(FileNames.of([chunk.name for chunk in chunks]))
                        overflowed |= feed.overflowed
                    phase.bytes = sum(file.size for file in written)
                parts.append(Part(written, chunk_names))
            with operation.phase("commit"):
                commit(files, folder, attempt, _contents(manifest, resolved, casts, own), parts)
            operation.bytes = total
        except BaseException as error:
            discard(files, folder, attempt)
            if isinstance(error, OSError) and not isinstance(error, CheckpointError):
                raise SaveFailedError(
                    f"{path}: could not be written ({error.strerror or error}); nothing was committed. "
                    "Free space or choose another place, then try again",
                    path=path,
                ) from error
            raise
    return ReshardResult(
        path=path,
        mesh=mesh,
        tensors=len(manifest.model_tensors),
        bytes=total,
        bytes_per_rank=[sum(part.nbytes for part in held) for held in per_rank],
        overflowed=sorted(overflowed),
        seconds=operation.total,
    )


def _assign(checkpoint: Checkpoint, resolved: Resolved, casts: Casts, own: Mapping[str, bytes]) -> list[list[Item]]:
    """For each target rank what goes to its file. What several ranks hold goes to the one with the least."""
    manifest, mesh = checkpoint.manifest, resolved.mesh
    load = [0] * mesh.size
    held: list[list[Item]] = [[] for _ in range(mesh.size)]
    shared: list[tuple[Item, list[int]]] = []
    for name, stored in manifest.tensors.items():
        checkpoint.reader.require(name)
        meta = stored._replace(shape=(len(own[name]),)) if name in own else stored
        if name.startswith(RESERVED_PREFIX):
            owners = {Box.whole(meta.shape): list(range(mesh.size))} if meta.numel else {}
        else:
            owners = {}
            holders = list(resolved.holders(name))
            for holder in sorted(holders, key=lambda holder: holder.piece.copy):
                # a copy that is cut differently than its home adds no boxes of its own
                box = holder.piece.box
                if not holder.piece.copy or box in owners:
                    owners.setdefault(box, []).extend(mesh.ranks(holder.where))
        for box, ranks in owners.items():
            part = Item(name, meta, casts.get(name, meta.dtype), box)
            if len(ranks) == 1:
                held[ranks[0]].append(part)
                load[ranks[0]] += part.nbytes
            else:
                shared.append((part, ranks))
    shared.sort(key=lambda item: -item[0].nbytes)
    for part, ranks in shared:
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        held[rank].append(part)
        load[rank] += part.nbytes
    for parts in held:
        parts.sort(key=lambda part: (part.name, part.box))
    return held


def _own(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What ranks have of their own under other names than it was saved, by the name of their bytes."""
    owned = checkpoint.manifest.owned
    if all(path == now for path, now in owned.items()):
        return {}
    return {
        name: to_json(checkpoint.per_rank(int(name[len(RANK_PREFIX) :])))
        for name in checkpoint.manifest.tensors
        if name.startswith(RANK_PREFIX)
    }


def _contents(manifest: Manifest, resolved: Resolved, casts: Casts, own: Mapping[str, bytes]) -> Contents:
    mesh = resolved.mesh
    texts: dict[str, int] = {}
    tensors: dict[str, tuple[str, tuple[int, ...], int | None]] = {}
    for name, meta in manifest.tensors.items():
        cut = None
        if name in resolved.tensors:
            cut = texts.setdefault(resolved.cut(name), len(texts))
        shape = (len(own[name]),) if name in own else meta.shape
        tensors[name] = (casts.get(name, meta.dtype).name, shape, cut)
    layout: dict[str, Any] = {
        "world_size": mesh.size,
        "meshes": [{"names": list(mesh.names), "shape": list(mesh.shape)}],
        "cuts": [{"mesh": 0, "cut": text} for text in texts],
    }
    return Contents(
        step=manifest.step,
        tensors=tensors,
        aliases=manifest.aliases,
        values=manifest.values,
        entries=manifest.entries,
        layout=layout,
        provenance=provenance(made_by="reshard", source=os.path.basename(os.path.normpath(manifest.path))),
    )
