"""Opening a native checkpoint: root and pages to a manifest and a location map.

Reads metadata only; the bytes of chunks are read by reading.py. A checkpoint lies in a folder or below a URL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from ckpt_formats.codecs import EXPONENT_ZSTD, RAW, stored_bounds, word_size
from ckpt_formats.digest import digest
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, FormatError, StoreError
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.manifest import ChunkRows, Manifest
from ckpt_formats.native import index, names
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.node_folders import NodeFolders, folders_of, missing_text, root_folder
from ckpt_formats.native.root import MAX_SIZE, Root, decode
from ckpt_formats.remote import Store, is_url, tidy
from ckpt_formats.sources import ByteSource, DeviceSource, open_source, read_small


def is_native(path: str) -> bool:
    """Whether a committed native checkpoint lies at the path or URL. Raises StoreError."""
    path = tidy(path)
    file = os.path.join(path, names.MANIFEST)
    if is_url(path):
        try:
            Store(path).size(file)
        except FileNotFoundError:
            return False
        return True
    return any(os.path.isfile(os.path.join(folder, names.MANIFEST)) for folder in folders_of(path))


def read_root(path: str) -> Root:
    """The checked root of the checkpoint in folder `path`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        CorruptionError, FormatError: its root is damaged or wrong.
        StoreError: its store can't be read.
    """
    path = root_folder(path)
    file = os.path.join(path, names.MANIFEST)
    try:
        data = read_small(file, MAX_SIZE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(_why_not_found(path), path=path) from error
    except StoreError:
        raise
    except OSError as error:
        raise _unreadable(file, error) from error
    if data is None:
        raise FormatError(
            f"{file}: has more than the {MAX_SIZE} bytes that a manifest may have: it is damaged or no manifest; use "
            "another checkpoint",
            path=file,
        )
    return decode(data, file)


def _unreadable(file: str, error: OSError) -> CorruptionError:
    return CorruptionError(
        f"{file}: the manifest can't be read ({error.strerror}); restore it or use another checkpoint", path=file
    )


def _why_not_found(path: str) -> str:
    if is_url(path):
        return _why_not_in_store(path)
    if not os.path.exists(path):
        return f"{path}: no such folder; check the path"
    if not os.path.isdir(path):
        return f"{path} is a file; a checkpoint is a folder with a {names.MANIFEST}"
    inside = sorted(name for name in os.listdir(path) if is_native(os.path.join(path, name)))
    if inside:
        return f"{path} is not a checkpoint itself, but holds some: {', '.join(inside[-3:])}; name one of them"
    if os.path.isdir(os.path.join(path, names.DATA)):
        return f"{path} has no {names.MANIFEST}: its save was never committed; use an earlier checkpoint"
    return f"{path} has no {names.MANIFEST}: no checkpoint in this format lies there; check the path"


def _why_not_in_store(path: str) -> str:
    store = Store(path)
    try:
        below = store.ls(path)
    except FileNotFoundError:
        return f"{path}: there is nothing at that URL; check it"
    if any(entry.name == names.DATA for entry in below):
        return f"{path} has no {names.MANIFEST}: its upload was never committed; use an earlier checkpoint"
    inside = [entry.name for entry in below if entry.folder and names.step_of(entry.name) is not None]
    if inside:
        return f"{path} is not a checkpoint itself, but holds some: {', '.join(inside[-3:])}; name one of them"
    return f"{path} has no {names.MANIFEST}: no checkpoint in this format lies there; check the URL"


def open_native(
    path: str, open_source: Callable[[str], ByteSource] = open_source
) -> tuple[Manifest, LocationMap, Root]:
    """Open the native checkpoint in folder `path`, reading only its root.

    Sizes of the files that the root lists are checked when they are first read. With `{node}` in the path, the folders
    of all nodes that can be reached are one checkpoint.
    """
    folder = root_folder(path)
    root = read_root(folder)
    pages: dict[int, IndexRows] = {}

    def load(number: int) -> IndexRows:
        # called under the manifest's lock or for a page that is loaded already
        if number not in pages:
            pages[number] = load_page(folder, root, number, open_source)
        return pages[number]

    def chunk_rows(number: int) -> ChunkRows:
        rows = load(number)
        return ChunkRows(rows.offset, rows.size, rows.digest, rows.block, rows.block_digest)

    def places(number: int) -> Sequence[Places]:
        rows = load(number)
        return (Places(rows.file, rows.start, rows.length, rows.codec),)

    manifest = Manifest(
        path=path,
        step=root.step,
        attempt=root.attempt,
        tensors=root.tensors,
        aliases=root.aliases,
        values=root.values,
        entries=root.entries,
        layout=root.layout,
        provenance=root.provenance,
        block_size=root.block_size,
        page_count=len(root.pages),
        load_page=chunk_rows,
    )
    where = NodeFolders(path, folder, root.layout)

    def lost() -> str:
        return missing_text(where.missing(file.path for file in root.files))

    sources = [_SizedSource(open_source(where.find(file.path)), file.size, lost) for file in root.files]
    return manifest, LocationMap(sources, root.codecs, places, far=is_url(path)), root


class _SizedSource:
    """A source that is opened at the first read and must then have the size that the root states."""

    def __init__(self, source: ByteSource, size: int, lost: Callable[[], str]) -> None:
        self._source = source
        self._size = size
        self._lost = lost
        self._checked = False

    @property
    def name(self) -> str:
        return self._source.name

    def size(self) -> int:
        if not self._checked:
            try:
                require_size(self._source, self._size)
            except CorruptionError as error:
                lost = self._lost()
                if lost:
                    raise CorruptionError(
                        f"{self.name}: {lost}. Load where the folders of all nodes can be reached, bring back the "
                        "disk, or use another checkpoint",
                        path=self.name,
                    ) from error
                raise
            self._checked = True
        return self._size

    def read(self, start: int, stop: int, into: memoryview) -> None:
        self.size()
        self._source.read(start, stop, into)

    def cached(self, positions: Sequence[int]) -> int:
        return self._source.cached(positions) if isinstance(self._source, DeviceSource) else len(positions)

    def read_past_cache(self, start: int, stop: int, into: memoryview) -> memoryview | None:
        self.size()
        return self._source.read_past_cache(start, stop, into) if isinstance(self._source, DeviceSource) else None

    def close(self) -> None:
        self._source.close()


def require_size(source: ByteSource, size: int) -> None:
    """Raise CorruptionError unless the source is there and has that size."""
    actual = source.size()
    if actual != size:
        raise CorruptionError(
            f"{source.name}: has {actual} bytes, but the manifest says {size}: it was truncated or replaced; "
            "restore the file or use another checkpoint",
            path=source.name,
        )


def load_page(path: str, root: Root, number: int, open_source: Callable[[str], ByteSource] = open_source) -> IndexRows:
    """Read, verify and check page `number`: every row lies in its file and has the length of its box.

    Raises:
        CorruptionError: the page does not fit its digests.
        FormatError: a row claims what can't be.
    """
    page = root.pages[number]
    source = open_source(os.path.join(path, page.path))
    try:
        require_size(source, page.size)
        data = bytearray(page.size)
        view = memoryview(data)
        source.read(0, page.size, view)
    finally:
        source.close()
    for block, expected in enumerate(page.digests):
        start = block * root.block_size
        if digest(view[start : start + root.block_size]).hex() != expected:
            raise CorruptionError(
                f"{source.name}: bytes {start} to {min(start + root.block_size, page.size)} of the index do not fit "
                "their checksum: it is damaged; restore the file or use another checkpoint",
                path=source.name,
            )
    rows = index.unpack(view, source.name)
    _check_rows(rows, root, number, source.name)
    return rows


def _check_rows(rows: IndexRows, root: Root, number: int, what: str) -> None:
    def fail(why: str, bad: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise FormatError(f"{what}: row {row}: {why}; the checkpoint was written wrongly", path=what)

    if len(rows) != root.pages[number].rows:
        raise FormatError(f"{what}: has {len(rows)} rows, but the manifest says {root.pages[number].rows}", path=what)
    if not len(rows):
        return
    fail("its file is not in the manifest", rows.file >= len(root.files))
    fail("its codec is not in the manifest", rows.codec >= len(root.codecs))
    sizes = np.array([file.size for file in root.files], dtype=np.int64)
    headers = np.array([file.header for file in root.files], dtype=np.int64)
    fail("it begins inside the header of its file", rows.start < headers[rows.file])
    fail("it ends past the end of its file", rows.length > sizes[rows.file])
    fail("it ends past the end of its file", rows.start > sizes[rows.file] - rows.length)

    metas = [meta for meta in root.tensors.values() if meta.rows and meta.page == number]
    counts = np.array([meta.rows for meta in metas], dtype=np.int64)
    itemsize = np.repeat(np.array([meta.dtype.itemsize for meta in metas], dtype=np.int64), counts)
    ndim = np.repeat(np.array([len(meta.shape) for meta in metas], dtype=np.int64), counts)
    width = rows.size.shape[1]
    fail("its tensor has more dimensions than the page", ndim > width)
    beyond = np.arange(width)[None, :] >= ndim[:, None]
    fail("its box has more dimensions than its tensor", (beyond & ((rows.size != 1) | (rows.offset != 0))).any(axis=1))
    # products in floating point first: claims of 2**62 elements must not wrap around
    fail("its box is larger than any file", np.prod(rows.size.astype(np.float64), axis=1) * itemsize >= 2.0**62)
    nbytes = np.prod(rows.size, axis=1) * itemsize
    raw = np.array([codec == RAW for codec in root.codecs], dtype=bool)[rows.codec]
    fail("its length is not that of its box", raw & (rows.length != nbytes))
    encoded = np.array([codec == EXPONENT_ZSTD for codec in root.codecs], dtype=bool)[rows.codec]
    if encoded.any():
        word = np.repeat(np.array([word_size(meta.dtype) for meta in metas], dtype=np.int64), counts)
        fail(f"its dtype can't be stored with the codec {EXPONENT_ZSTD!r}", encoded & (word == 0))
        least, most = stored_bounds(nbytes, np.maximum(word, 1), root.block_size)
        fail("its length is not one that its box can have", encoded & ((rows.length < least) | (rows.length > most)))
    order = np.lexsort((rows.start, rows.file))
    follows = rows.file[order][1:] == rows.file[order][:-1]
    shared = follows & (rows.start[order][1:] < (rows.start + rows.length)[order][:-1])
    fail("its bytes are another chunk's too", np.isin(np.arange(len(rows)), order[1:][shared]))
    blocks = np.where(nbytes > root.block_size, -(-nbytes // root.block_size), 0)
    fail("its block digests are not in the index", (blocks > 0) != (rows.block >= 0))
    fail("its block digests are not in the index", rows.block > len(rows.block_digest) - blocks)
    if int(blocks.sum()) > len(rows.block_digest):
        # also keeps the work below in proportion to the size of the page
        raise FormatError(f"{what}: chunks share block digests; the checkpoint was written wrongly", path=what)
    for row in np.flatnonzero(blocks):
        first = int(rows.block[row])
        if digest(rows.block_digest[first : first + int(blocks[row])].tobytes()) != rows.digest[row].tobytes():
            raise FormatError(f"{what}: row {row}: its digest is not that of its blocks", path=what)
