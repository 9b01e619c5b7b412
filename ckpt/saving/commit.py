"""Prepare and commit: what writers report, and how rank 0 makes one checkpoint of it.

A writer's report (a *part*) says which chunks lie where in its files, with their digests. Rank 0 merges the parts into
the index, writes the root, and publishes it. Knows no live state and no process group.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from ckpt.saving.chunk_table import ChunkTable
from ckpt.storage.data_file import WrittenFile
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, page_spans, publish, write_page
from ckpt_formats.codecs import KNOWN
from ckpt_formats.digest import BLOCK_SIZE
from ckpt_formats.json_text import parse_json, to_json
from ckpt_formats.manifest import RESERVED_PREFIX, TensorMeta
from ckpt_formats.native import index
from ckpt_formats.native.index import LEAF, pack, pack_with_leaves
from ckpt_formats.native.root import DataFile, PageFile, Root
from ckpt_formats.safetensors_file import unpack_columns

C = TypeVar("C")

FILE_CHUNKS = 200_000
"""Chunks per data file; more would not fit the header of a safetensors file."""


class FileNames(NamedTuple):
    """The tensor name of each row of a file: names of the model's tensors, which many ranks have alike, then others."""

    shared: Sequence[str]
    own: Sequence[str]

    @classmethod
    def of(cls, names: Sequence[str]) -> FileNames:
        """Names in the order of the rows."""
        at = next((k for k, name in enumerate(names) if name.startswith(RESERVED_PREFIX)), len(names))
        return cls(names[:at], names[at:])


@dataclass(frozen=True, slots=True)
class Part:
    """What one writer wrote: its files, and the tensor names of their rows."""

    files: Sequence[WrittenFile]
    names: Sequence[FileNames]

    def encode(self) -> bytes:
        """As bytes, to be sent to rank 0."""
        rows = [index.pack(file.rows) for file in self.files]
        shared = [zlib.compress(to_json(names.shared), 1) for names in self.names]
        head = to_json(
            {
                "files": [[file.path, file.size, file.header, file.digest] for file in self.files],
                "own": [names.own for names in self.names],
                "shared": [len(names) for names in shared],
                "rows": [len(row) for row in rows],
            }
        )
        return b"".join([len(head).to_bytes(8, "little"), head, *shared, *rows])

    @staticmethod
    def decode(data: bytes) -> Part:
        """The inverse of encode. Names that many ranks have are kept once."""
        view = memoryview(data)
        at = 8 + int.from_bytes(view[:8], "little")
        head = parse_json(view[8:at], "what a rank wrote")
        row_names = []
        for own, length in zip(head["own"], head["shared"], strict=True):
            row_names.append(FileNames(_shared_names(bytes(view[at : at + length])), own))
            at += length
        files = []
        for (path, size, header, digest), length in zip(head["files"], head["rows"], strict=True):
            rows = index.rows_of(unpack_columns(view[at : at + length], path), path)
            files.append(WrittenFile(path, size, header, digest, rows))
            at += length
        return Part(files, row_names)


@lru_cache(maxsize=8)
def _shared_names(packed: bytes) -> tuple[str, ...]:
    return tuple(json.loads(zlib.decompress(packed)))


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
        CoverageError: what was written does not cover a tensor; nothing was committed.
        OSError: nothing was committed.
    """
    written = [file for part in parts for file in part.files]
    row_names = [names for part in parts for names in part.names]
    table = ChunkTable(contents.tensors, [file.rows for file in written], row_names)
    pages: list[PageFile] = []
    tensors: dict[str, TensorMeta] = {}
    spans, placed = page_spans(table.counts)
    for number, (first, last) in enumerate(spans):
        page = table.page(first, last, placed)
        data = pack_with_leaves(page.rows) if page.partly else pack(page.rows)
        leaf = LEAF if page.partly else 0
        pages.append(write_page(files, folder.path, attempt, number, data, len(page.rows), leaf))
        tensors.update((meta.name, meta) for meta in page.metas)
    if len(tensors) < len(table.names):
        # the page of those without chunks is none
        tensors = {name: tensors.get(name) or table.empty(name) for name in table.names}
    root = Root(
        attempt=attempt,
        step=contents.step,
        block_size=BLOCK_SIZE,
        codecs=KNOWN[: table.codecs],
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
