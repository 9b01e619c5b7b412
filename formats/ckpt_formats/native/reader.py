"""Opening a native checkpoint: root and pages to a manifest and a location map.

Reads metadata only; the bytes of chunks are read by reading.py. A checkpoint lies in a folder or below a URL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from ckpt_formats.digest import block_digests, digest
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, FormatError, StoreError
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.manifest import ChunkRows, Manifest, TensorMeta
from ckpt_formats.native import index, names
from ckpt_formats.native.index import LEAF, IndexRows, leaves_of
from ckpt_formats.native.node_folders import NodeFolders, folders_of, missing_text, root_folder
from ckpt_formats.native.ranged import RangedPage
from ckpt_formats.native.root import MAX_SIZE, Root, decode
from ckpt_formats.native.row_checks import RowChecks
from ckpt_formats.remote import Store
from ckpt_formats.sources import ByteSource, on_device, open_source, read_small
from ckpt_formats.urls import is_url, tidy


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
    parts: dict[int, RangedPage] = {}
    checks = RowChecks(root)
    far = is_url(path)

    # these are called under the manifest's lock or for a page that is loaded already

    def load(number: int) -> IndexRows:
        if number not in pages:
            pages[number] = load_page(folder, root, number, open_source)
        return pages[number]

    def load_part(number: int) -> RangedPage:
        if number not in parts:
            source = open_source(os.path.join(folder, root.pages[number].path))
            require_size(source, root.pages[number].size)

            def check(rows: IndexRows, meta: TensorMeta, first: int) -> None:
                checks.check(rows, [meta], source.name, first)

            parts[number] = RangedPage(source, root.pages[number], root.block_size, check, far=far)
        return parts[number]

    def chunk_rows(number: int, whole: bool) -> ChunkRows:
        if whole or number in pages or root.pages[number].leaf != LEAF:
            rows, fetch, bring = load(number), None, None
        else:
            part = load_part(number)
            rows, fetch, bring = part.rows, part.fetch, part.bring if far else None
        return ChunkRows(rows.offset, rows.size, rows.digest, rows.block, rows.block_digest, fetch, bring)

    def places(number: int) -> Sequence[Places]:
        part = None if number in pages else parts.get(number)
        rows = part.rows if part else load(number)
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
        of_page=root.of_page,
        load_page=chunk_rows,
    )
    where = NodeFolders(path, folder, root.layout)

    def lost() -> str:
        return missing_text(where.missing(file.path for file in root.files))

    sources = [_SizedSource(open_source(where.find(file.path)), file.size, lost) for file in root.files]
    return manifest, LocationMap(sources, root.codecs, places, far=far), root


class _SizedSource:
    """A source that is opened at the first read and must then have the size that the root states."""

    def __init__(self, source: ByteSource, size: int, lost: Callable[[], str]) -> None:
        self._source = source
        self._size = size
        self._lost = lost
        self._checked = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._source.name

    def size(self) -> int:
        # many threads begin with the same file, and one request says it to all
        with self._lock:
            if not self._checked:
                self._check()
                self._checked = True
        return self._size

    def _check(self) -> None:
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

    def read(self, start: int, stop: int, into: memoryview) -> None:
        if not self._checked:
            self.size()
        self._source.read(start, stop, into)

    def cached(self, positions: Sequence[int]) -> int:
        return self._source.cached(positions) if on_device(self._source) else len(positions)

    def read_past_cache(self, start: int, stop: int, into: memoryview) -> memoryview | None:
        self.size()
        return self._source.read_past_cache(start, stop, into) if on_device(self._source) else None

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
    if page.leaf == LEAF:
        _, end = leaves_of(page.size)
        if b"".join(block_digests(view[:end], LEAF)) != view[end:]:
            raise FormatError(
                f"{source.name}: its leaf digests are wrong; the checkpoint was written wrongly", path=source.name
            )
    rows = index.unpack(view, source.name)
    if len(rows) != page.rows:
        raise FormatError(f"{source.name}: has {len(rows)} rows, but the manifest says {page.rows}", path=source.name)
    RowChecks(root).check(rows, root.of_page(number), source.name)
    return rows
