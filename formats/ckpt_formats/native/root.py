"""The root of a native checkpoint, `manifest.json`: to bytes and back, every claim checked. docs/format.md, "The root".

Knows nothing of where the root lies or how it is published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from ckpt_formats.dtypes import DType
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.errors import CorruptionError, FormatError, StateError, UnknownDtypeError, UnknownVersionError
from ckpt_formats.grid import Runs, is_grid
from ckpt_formats.json_text import parse_json, to_json
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.native import names
from ckpt_formats.safetensors_file import ALIGNMENT, is_index
from ckpt_formats.sealed import TAIL_SIZE, is_whole, seal
from ckpt_formats.values.tree import brief

FORMAT = "ckpt"
VERSION = 1
_HEX_DIGEST = re.compile(r"[0-9a-f]{32}")
MAX_NDIM = 64
"""Torch's own limit on dimensions."""
MAX_SIZE = 1 << 30
"""Bytes of the largest manifest: it is read as a whole. A million tensors take 0.1 GiB."""
MAX_BLOCK = 1 << 28
"""Bytes of the largest block of digests: a reader has to hold one in memory to verify it."""


class DataFile(NamedTuple):
    """A data file as the root lists it. `header` is the size in bytes of the part that `digest` covers."""

    path: str
    size: int
    header: int
    digest: str


class PageFile(NamedTuple):
    """An index page as the root lists it; `digests` has one hexadecimal digest per block of the file."""

    path: str
    size: int
    rows: int
    digests: list[str]
    leaf: int = 0
    """Bytes of the page per leaf digest, if it ends with those."""


@dataclass(slots=True)
class Root:
    """What manifest.json says. The fields are the members of docs/format.md."""

    attempt: str
    step: int | None
    block_size: int
    codecs: Sequence[str]
    files: Sequence[DataFile]
    pages: Sequence[PageFile]
    tensors: Mapping[str, TensorMeta]
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    _of_page: list[list[TensorMeta]] = field(default_factory=list, repr=False)

    def of_page(self, number: int) -> Sequence[TensorMeta]:
        """The tensors whose chunks are the rows of a page, in their order."""
        if not self._of_page:
            self._of_page = [[] for _ in self.pages]
            for meta in self.tensors.values():
                if meta.rows:
                    self._of_page[meta.page].append(meta)
        return self._of_page[number]


def encode(root: Root) -> bytes:
    """The bytes of manifest.json. Raises StateError if they are more than a reader takes."""
    tensors: dict[str, dict[str, object]] = {}
    for name, dtype, shape, page, row, rows, cut, grid in root.tensors.values():
        item: dict[str, object] = {"dtype": dtype.name, "shape": shape, "page": page, "row": row, "rows": rows}
        if cut is not None:
            item["cut"] = cut
        if grid is not None:
            item["grid"] = grid
        tensors[name] = item
    body = to_json(
        {
            "format": FORMAT,
            "version": VERSION,
            "attempt": root.attempt,
            "step": root.step,
            "block_size": root.block_size,
            "codecs": list(root.codecs),
            "provenance": root.provenance,
            "layout": root.layout,
            "entries": root.entries,
            "files": [file._asdict() for file in root.files],
            "pages": [_page_item(page) for page in root.pages],
            "aliases": root.aliases,
            "values": root.values,
            "tensors": tensors,
        }
    )
    if len(body) + TAIL_SIZE > MAX_SIZE:
        raise StateError(
            f"the manifest would have {len(body)} bytes, more than the {MAX_SIZE} that readers take; "
            "keep large plain values as tensors or numpy arrays, which are stored apart"
        )
    return seal(body)


def _page_item(page: PageFile) -> dict[str, object]:
    item = page._asdict()
    if not page.leaf:
        del item["leaf"]
    return item


def decode(data: bytes, path: str) -> Root:
    """The root from the bytes of manifest.json; `path` is for messages.

    Raises:
        CorruptionError: the bytes do not fit the digest at their end.
        UnknownVersionError: another version of the format.
        FormatError: anything else that docs/format.md rules out.
    """
    if not is_whole(data):
        raise CorruptionError(
            f"{path}: the manifest does not fit its own checksum: it is damaged or truncated; use another checkpoint",
            path=path,
        )
    tree = parse_json(data, path)
    return _Checker(path).root(tree)


class _Checker:
    """Checks a parsed root member by member; every complaint names the file and the member."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.path}: {what}; the checkpoint was written wrongly or tampered with", path=self.path)

    def root(self, tree: Any) -> Root:
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            self.fail(f'the manifest is not one of this format ("format" is not "{FORMAT}")')
        version = tree.get("version")
        if version != VERSION or type(version) is not int:
            raise UnknownVersionError(
                f"{self.path}: the checkpoint has format version {brief(version)}; this release reads {VERSION}. "
                "Install a release of anyckpt that knows it",
                path=self.path,
            )
        attempt, step, block_size = tree.get("attempt"), tree.get("step"), tree.get("block_size")
        if not isinstance(attempt, str) or not names.is_attempt(attempt):
            self.fail('"attempt" is not 16 hexadecimal digits')
        if step is not None and not is_index(step):
            self.fail('"step" is neither null nor a non-negative integer')
        if not is_index(block_size) or not 0 < block_size <= MAX_BLOCK or block_size % ALIGNMENT:
            self.fail('"block_size" is not a multiple of 4096 from 4096 to 2**28')
        codecs = self.array(tree, "codecs")
        if not all(isinstance(codec, str) for codec in codecs) or len(codecs) > 256:
            self.fail('"codecs" is not an array of at most 256 names')
        files = [self.data_file(item, k) for k, item in enumerate(self.array(tree, "files"))]
        pages = [self.page(item, k, block_size) for k, item in enumerate(self.array(tree, "pages"))]
        paths = [file.path for file in files] + [page.path for page in pages]
        if len(set(paths)) != len(paths):
            self.fail("a file is listed twice")
        layout = self.object(tree, "layout")
        if not is_index(layout.get("world_size", 1)) or layout.get("world_size", 1) < 1:
            self.fail('"layout.world_size" is not a positive integer')
        cuts = self.cuts(layout)
        tensors = self.tensors(self.object(tree, "tensors"), pages, len(cuts))
        aliases = self.object(tree, "aliases")
        for alias, name in aliases.items():
            if not isinstance(name, str) or name not in tensors or alias in tensors:
                self.fail(f"the alias {brief(alias)} does not lead to a stored tensor, or is one itself")
        entries = self.object(tree, "entries")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
                self.fail(f'the entry {brief(name)} has no "kind"')
            if not all(_is_names(entry.get(member, {}), kind) for member, kind in _ENTRY_MEMBERS.items()):
                self.fail(f"the entry {brief(name)} says malformed things of itself")
        return Root(
            attempt=attempt,
            step=step,
            block_size=block_size,
            codecs=codecs,
            files=files,
            pages=pages,
            tensors=tensors,
            aliases=aliases,
            values=self.object(tree, "values"),
            entries=entries,
            layout=layout,
            provenance=self.object(tree, "provenance"),
        )

    def array(self, tree: Mapping[str, Any], name: str) -> list[Any]:
        value = tree.get(name)
        if not isinstance(value, list):
            self.fail(f'"{name}" is not an array')
        return value

    def object(self, tree: Mapping[str, Any], name: str) -> dict[str, Any]:
        value = tree.get(name)
        if not isinstance(value, dict):
            self.fail(f'"{name}" is not an object')
        return value

    def data_file(self, item: Any, position: int) -> DataFile:
        what = f'"files"[{position}]'
        if not isinstance(item, dict):
            self.fail(f"{what} is not an object")
        path, size, header, digest = (item.get(name) for name in DataFile._fields)
        if not names.is_safe(path, names.DATA):
            self.fail(f'{what} has the path {brief(path)}, which is not a plain name below "{names.DATA}/"')
        if not is_index(size) or not is_index(header) or header > size or header < 8:
            self.fail(f"{what} ({path}) has impossible sizes")
        if not isinstance(digest, str) or _HEX_DIGEST.fullmatch(digest) is None:
            self.fail(f"{what} ({path}) has no digest")
        return DataFile(path, size, header, digest)

    def page(self, item: Any, position: int, block_size: int) -> PageFile:
        what = f'"pages"[{position}]'
        if not isinstance(item, dict):
            self.fail(f"{what} is not an object")
        path, size, rows, digests, leaf = (item.get(name) for name in PageFile._fields)
        if not names.is_safe(path, names.INDEX):
            self.fail(f'{what} has the path {brief(path)}, which is not a plain name below "{names.INDEX}/"')
        if not is_index(size) or not is_index(rows):
            self.fail(f"{what} ({path}) has impossible sizes")
        if (
            not isinstance(digests, list)
            or len(digests) != -(-size // block_size)
            or not all(isinstance(digest, str) and _HEX_DIGEST.fullmatch(digest) for digest in digests)
        ):
            self.fail(f"{what} ({path}) does not have one digest per block")
        if leaf is not None and not (is_index(leaf) and leaf > 0):
            self.fail(f"{what} ({path}) has leaves of an impossible size")
        return PageFile(path, size, rows, digests, leaf or 0)

    def cuts(self, layout: Mapping[str, Any]) -> list[Any]:
        meshes, cuts = layout.get("meshes", []), layout.get("cuts", [])
        if not isinstance(meshes, list) or not all(map(_is_mesh, meshes)):
            self.fail('"layout.meshes" is not an array of meshes')
        if not isinstance(cuts, list) or not all(_is_cut(cut, len(meshes)) for cut in cuts):
            self.fail('"layout.cuts" is not an array of cuts over these meshes')
        return cuts

    def dtype(self, tensor: str, name: Any) -> DType:
        try:
            return dtype_named(name)
        except UnknownDtypeError as error:
            raise UnknownDtypeError(
                f"{self.path}: tensor {brief(tensor)}: {error}", path=self.path, tensor=tensor
            ) from None

    def grid(self, tensor: str, item: Any, shape: Sequence[int], rows: int) -> Runs:
        if not is_grid(item, shape, rows):
            self.fail(f"tensor {brief(tensor)} has a grid that does not fit its shape and its rows")
        return tuple(tuple((size, count) for size, count in runs) for runs in item)

    def tensors(self, tree: dict[str, Any], pages: Sequence[PageFile], cut_count: int) -> dict[str, TensorMeta]:
        tensors: dict[str, TensorMeta] = {}
        page_count = len(pages)
        known: dict[str, DType] = {}
        at_page = at_row = 0
        previous = ""
        for name, item in tree.items():
            if not name or name <= previous:
                self.fail(f"tensor {brief(name)}: names are not in order")
            previous = name
            if not isinstance(item, dict):
                self.fail(f"tensor {brief(name)} is not an object")
            get: Callable[[str], Any] = item.get
            shape, page, row, rows, cut = get("shape"), get("page"), get("row"), get("rows"), get("cut")
            if cut is not None and not (is_index(cut) and cut < cut_count):
                self.fail(f'tensor {brief(name)} refers to a cut that "layout.cuts" does not have')
            # is_index, but for the upper bounds, which are those of the pages
            if not (type(page) is type(row) is type(rows) is int and page >= 0 and row >= 0 and rows >= 0):
                self.fail(f"tensor {brief(name)} has no place in the index")
            if rows:
                if page != at_page:
                    if page != at_page + 1 or page >= page_count or at_row != pages[at_page].rows:
                        self.fail(f"tensor {brief(name)} has a page that does not follow the one before")
                    at_page, at_row = page, 0
                if row != at_row or page >= page_count or row + rows > pages[page].rows:
                    self.fail(f"tensor {brief(name)} has rows that the index does not have or that another tensor has")
                at_row += rows
            elif page or row:
                self.fail(f"tensor {brief(name)} has no chunks but a place in the index")
            named = get("dtype")
            dtype = known.get(named) if type(named) is str else None
            if dtype is None:
                dtype = self.dtype(name, named)
                known[dtype.name] = dtype
            if not _is_possible(shape, dtype.itemsize):
                self.fail(f"tensor {brief(name)} has an impossible shape")
            runs = self.grid(name, item["grid"], shape, rows) if "grid" in item else None
            tensors[name] = TensorMeta(name, dtype, tuple(shape), page, row, rows, cut, runs)
        if any(page.rows for page in pages[at_page + 1 :]) or (page_count and at_row != pages[at_page].rows):
            self.fail("the index has rows that belong to no tensor")
        return tensors


def _is_possible(shape: Any, itemsize: int) -> bool:
    """Whether this is a shape that an array library can hold: without its zeros, it must fit 63 bits."""
    if type(shape) is not list or len(shape) > MAX_NDIM:
        return False
    nbytes = itemsize
    for size in shape:
        if type(size) is not int or size < 0:
            return False
        nbytes *= size or 1
    return nbytes < 1 << 63


def _is_mesh(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    axes, shape = item.get("names"), item.get("shape")
    return (
        isinstance(axes, list)
        and isinstance(shape, list)
        and len(axes) == len(shape)
        and all(isinstance(axis, str) for axis in axes)
        and all(is_index(size) and size > 0 for size in shape)
    )


def _is_cut(item: Any, mesh_count: int) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("cut"), str) or "mesh" not in item:
        return False
    mesh = item["mesh"]
    return mesh is None or (is_index(mesh) and mesh < mesh_count)


_ENTRY_MEMBERS = {"modules": str, "local": bool, "flat": bool}


def _is_names(item: Any, kind: type) -> bool:
    """Whether this is an object all of whose members are of one type."""
    return isinstance(item, dict) and all(isinstance(value, kind) for value in item.values())
