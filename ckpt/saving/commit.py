"""Prepare and commit: what writers report, and how rank 0 makes one checkpoint of it.

A writer's report (a *part*) says which chunks lie where in its files, with their digests. Rank 0 merges the parts into
the index, writes the root, and publishes it. Knows no live state and no process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ckpt.storage.data_file import WrittenFile
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, publish, write_pages
from ckpt_formats.codecs import KNOWN
from ckpt_formats.digest import BLOCK_SIZE
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.json_text import parse_json, to_json
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.native import index
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.root import DataFile, Root

C = TypeVar("C")

FILE_CHUNKS = 200_000
"""Chunks per data file; more would not fit the header of a safetensors file."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one writer wrote: its files, and the tensor name of each row, file after file."""

    files: Sequence[WrittenFile]
    names: Sequence[Sequence[str]]

    def encode(self) -> bytes:
        """As bytes, to be sent to rank 0."""
        rows = [index.pack(file.rows) for file in self.files]
        head = to_json(
            {
                "files": [[file.path, file.size, file.header, file.digest] for file in self.files],
                "names": self.names,
                "rows": [len(row) for row in rows],
            }
        )
        return b"".join([len(head).to_bytes(8, "little"), head, *rows])

    @staticmethod
    def decode(data: bytes) -> Part:
        """The inverse of encode."""
        view = memoryview(data)
        at = 8 + int.from_bytes(view[:8], "little")
        head = parse_json(view[8:at], "what a rank wrote")
        files = []
        for (path, size, header, digest), length in zip(head["files"], head["rows"], strict=True):
            files.append(WrittenFile(path, size, header, digest, index.unpack(view[at : at + length], path)))
            at += length
        return Part(files, head["names"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint says beside its chunks: everything of the root that no writer knows."""

    step: int | None
    tensors: Mapping[str, tuple[str, tuple[int, ...], int | None]]
    """Name -> dtype, global shape, position in layout["cuts"]; the format's own names included."""
    aliases: Mapping[str, str]
    values: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    layout: Mapping[str, Any]
    provenance: Mapping[str, Any]


def split_files(chunks: Sequence[C]) -> Iterator[Sequence[C]]:
    """What a writer writes, by the file: one per writer, several when the header would get too long."""
    for at in range(0, len(chunks), FILE_CHUNKS):
        yield chunks[at : at + FILE_CHUNKS]


def commit(files: Files, folder: Folder, attempt: str, contents: Contents, parts: Sequence[Part]) -> None:
    """Write index and root, and publish.

    Raises:
        CheckpointExistsError: another attempt committed meanwhile.
        OSError: nothing was committed.
    """
    written = [file for part in parts for file in part.files]
    row_names = [name for part in parts for file_names in part.names for name in file_names]
    ordered = sorted(contents.tensors)
    position = {name: k for k, name in enumerate(ordered)}
    if written:
        rows = index.merge([file.rows for file in written], range(len(written)))
        tensor = np.fromiter((position[name] for name in row_names), np.int64, len(row_names))
        # by tensor, then by offset: the last key of lexsort is the first to sort by
        order = np.lexsort((*rows.offset.T[::-1], tensor))
        rows = index.take(rows, order)
        counts = np.bincount(tensor, minlength=len(ordered)).tolist()
    else:
        rows = index.merge([_no_rows()], [0])
        counts = [0] * len(ordered)
    pages, placed = write_pages(files, folder.path, attempt, rows, counts)
    tensors: dict[str, TensorMeta] = {}
    for name, count, (page, row) in zip(ordered, counts, placed, strict=True):
        dtype, shape, cut = contents.tensors[name]
        tensors[name] = TensorMeta(name, dtype_named(dtype), shape, page, row, count, cut)
    root = Root(
        attempt=attempt,
        step=contents.step,
        block_size=BLOCK_SIZE,
        codecs=KNOWN[: int(rows.codec.max(initial=0)) + 1],
        files=[DataFile(file.path, file.size, file.header, file.digest) for file in written],
        pages=pages,
        tensors=tensors,
        aliases=contents.aliases,
        values=contents.values,
        entries=contents.entries,
        layout=contents.layout,
        provenance=contents.provenance,
    )
    publish(files, folder, root)


def _no_rows() -> IndexRows:
    def column(dtype: type, *width: int) -> Any:
        return np.empty((0, *width), dtype)

    return IndexRows(
        offset=column(np.int64, 1),
        size=column(np.int64, 1),
        file=column(np.int64),
        start=column(np.int64),
        length=column(np.int64),
        codec=column(np.uint8),
        digest=column(np.uint8, 16),
        block=column(np.int64),
        block_digest=column(np.uint8, 16),
    )
