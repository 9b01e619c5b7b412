"""Resharding: a checkpoint cut anew for another mesh, without processes, streaming, in bounded memory.

Loading needs no resharding: any cut loads into any other. What this buys is that the bytes of each target rank lie
together, in a file of its own, so that loading them again and again reads long runs. What is read is verified on the
way.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckpt import collector
from ckpt.events import Operation
from ckpt.provenance import provenance
from ckpt.saving.commit import Contents, FileNames, Part, commit, split_files
from ckpt.storage.data_file import Chunk, Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import discard, prepare_folder
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.codecs import RAW
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.geometry import Box, flat_boxes
from ckpt_formats.layout import Layout, Mesh, Resolved
from ckpt_formats.layout.applying import resolve
from ckpt_formats.manifest import RESERVED_PREFIX, Manifest, TensorMeta
from ckpt_formats.native import names
from ckpt_formats.reading import Request
from ckpt_formats.remote import folder_of

WINDOW = 16 << 20
"""Bytes that are read from the source at once."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


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
    seconds: float


def reshard(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mesh: Mesh,
    layout: Layout | None = None,
    *,
    progress: Progress | None = None,
    files: Files | None = None,
) -> ReshardResult:
    """Write the checkpoint `source` as a new one, `target`, in which each rank's bytes on `mesh` lie together.

    Args:
        source: a checkpoint's folder, or its URL in a store.
        target: the new one's folder, which must not hold a checkpoint.
        mesh: axes and sizes, such as Mesh.parse("dp=2,tp=4").
        layout: how tensors lie on the ranks; see docs/layout.md for what goes without saying.
        progress: called after each chunk.

    Raises:
        CheckpointNotFoundError, CorruptionError, FormatError: of the source.
        LayoutError: nothing says how an axis cuts, or rules are wrong, unused or at odds, or leave holes or overlaps.
        CheckpointExistsError: of the target.
        SaveFailedError: writing failed; nothing was committed.
        StoreError: the store of the source can't be read, or the target is a URL.
    """
    files = files or Files()
    path = folder_of(target)
    with collector.paused(), Operation("reshard", path) as operation, open_checkpoint(source) as checkpoint:
        manifest = checkpoint.manifest
        operation.step = manifest.step
        resolved = resolve(manifest, mesh, layout or Layout())
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        with operation.phase("plan"):
            per_rank = _assign(checkpoint, resolved)
        total = sum(part.nbytes for held in per_rank for part in held)
        folder = prepare_folder(files, path)
        attempt = secrets.token_hex(8)
        staging = Staging()
        # what was compressed stays so
        compress = any(codec != RAW for codec in checkpoint.locations.codecs)
        parts: list[Part] = []
        try:
            for rank, held in enumerate(per_rank):
                written = []
                chunk_names = []
                with operation.phase("write") as phase:
                    for number, some in enumerate(split_files(held)):
                        data = names.data_path(rank, number, attempt)
                        chunks = _Feed(checkpoint, some, count).chunks()
                        written.append(write_data_file(files, path, data, chunks, staging, compress=compress))
                        chunk_names.append(FileNames.of([chunk.name for chunk in chunks]))
                    phase.bytes = sum(file.size for file in written)
                parts.append(Part(written, chunk_names))
            with operation.phase("commit"):
                commit(files, folder, attempt, _contents(manifest, resolved), parts)
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
        seconds=operation.total,
    )


class _Part(NamedTuple):
    """A box that goes to a target rank's file."""

    meta: TensorMeta
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.meta.dtype.itemsize


def _assign(checkpoint: Checkpoint, resolved: Resolved) -> list[list[_Part]]:
    """For each target rank what goes to its file. What several ranks hold goes to the one with the least."""
    manifest, mesh = checkpoint.manifest, resolved.mesh
    load = [0] * mesh.size
    held: list[list[_Part]] = [[] for _ in range(mesh.size)]
    shared: list[tuple[_Part, list[int]]] = []
    for name, meta in manifest.tensors.items():
        checkpoint.reader.require(name)
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
            part = _Part(meta, box)
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
        parts.sort(key=lambda part: (part.meta.name, part.box))
    return held


def _contents(manifest: Manifest, resolved: Resolved) -> Contents:
    mesh = resolved.mesh
    texts: dict[str, int] = {}
    tensors: dict[str, tuple[str, tuple[int, ...], int | None]] = {}
    for name, meta in manifest.tensors.items():
        cut = None
        if name in resolved.tensors:
            cut = texts.setdefault(resolved.cut(name), len(texts))
        tensors[name] = (meta.dtype.name, meta.shape, cut)
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


class _Feed:
    """The elements of one target file's chunks, read from the source in the order in which they are written.

    They are read a window at a time, small chunks many together.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[_Part], count: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._parts = parts
        self._count = count
        self._window: dict[int, tuple[int, memoryview]] = {}

    def chunks(self) -> list[Chunk]:
        """The chunks, with this as the source of their bytes."""
        return [
            Chunk(meta.name, meta.dtype, meta.shape, box, _Fed(self, position))
            for position, (meta, box) in enumerate(self._parts)
        ]

    def read(self, position: int, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop of a chunk."""
        begin, data = self._window.get(position, (0, memoryview(b"")))
        if start < begin or stop > begin + len(data):
            self._fetch(position, start)
            begin, data = self._window[position]
        into[:] = data[start - begin : stop - begin]
        self._count(stop - start)

    def _fetch(self, position: int, start: int) -> None:
        self._window = {}
        requests: list[Request] = []
        room = WINDOW
        while room and position < len(self._parts):
            meta, box = self._parts[position]
            itemsize = meta.dtype.itemsize
            nbytes = box.numel * itemsize
            stop = min(nbytes, start + room // itemsize * itemsize)
            if stop == start:
                break
            flat: AnyArray = np.empty((stop - start) // itemsize, dtype=meta.dtype.carrier)
            if stop - start == nbytes:
                requests.append(Request(meta.name, box, flat.reshape(box.sizes)))
            else:
                at = 0
                for run in flat_boxes(box.sizes, start // itemsize, stop // itemsize):
                    place = Box(tuple(o + b for o, b in zip(run.offsets, box.offsets, strict=True)), run.sizes)
                    requests.append(Request(meta.name, place, flat[at : at + run.numel].reshape(run.sizes)))
                    at += run.numel
            self._window[position] = (start, flat.view(np.uint8).data)
            room -= stop - start
            position += 1
            start = 0
        self._checkpoint.read(requests)


class _Fed:
    """One chunk of a feed."""

    __slots__ = ("_feed", "_position")

    def __init__(self, feed: _Feed, position: int) -> None:
        self._feed = feed
        self._position = position

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop of the chunk."""
        self._feed.read(self._position, start, stop, into)
