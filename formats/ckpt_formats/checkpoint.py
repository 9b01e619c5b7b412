"""An open checkpoint: its tensors, lazily, and its values. Needs numpy alone; knows no processes.

`ckpt.open` gives the same object with torch tensors coming out of it.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Self, overload

import numpy as np

from ckpt_formats import values
from ckpt_formats.arrays import AnyArray
from ckpt_formats.dtypes import DType
from ckpt_formats.errors import CheckpointNotFoundError, FormatError, MissingTensorError, StoreError
from ckpt_formats.geometry import Box
from ckpt_formats.indexing import Index, pick
from ckpt_formats.json_text import parse_json
from ckpt_formats.locations import LocationMap
from ckpt_formats.locks import Hold, hold
from ckpt_formats.manifest import BLOB_PREFIX, Manifest, TensorMeta, rank_blob
from ckpt_formats.native.node_folders import root_folder
from ckpt_formats.native.reader import open_native
from ckpt_formats.reading import Reader, ReadStats, Request
from ckpt_formats.renaming import Rename, renamed
from ckpt_formats.selecting import selected
from ckpt_formats.urls import tidy
from ckpt_formats.values.tree import brief

Leaves = Mapping[str, Callable[[Any, str], object]]
Wrap = Callable[[AnyArray, DType], Any]


def as_numpy(array: AnyArray, dtype: DType) -> AnyArray:
    """Elements in their numpy dtype, or as raw elements of the same size where numpy has none."""
    return array.view(dtype.array)


class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed: `t[:]` is all of it, `t[0:2, 5]` a part.

    Attributes:
        name: its name.
        shape: its global shape, in elements.
        dtype: its dtype; `str(dtype)` is torch's name for it.
    """

    def __init__(self, reader: Reader, name: str, meta: TensorMeta, wrap: Wrap, block_size: int) -> None:
        self._reader = reader
        self._wrap = wrap
        self._block_size = block_size
        self.name = name
        self.shape = meta.shape
        self.dtype = meta.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return Box.whole(self.shape).numel * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {list(self.shape)})"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Any:
        """Read a part by integers, slices (steps included) and `...`; only the blocks that hold it are read, and
        what lies between picked ones that are closer than a block.

        Raises:
            IndexError: the index does not fit the shape.
            CorruptionError: bytes that are needed do not fit their checksum.
        """
        return self._wrap(self._read(index if isinstance(index, tuple) else (index,)), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:
        """All of it, for `numpy.asarray`. TypeError when numpy has no such dtype, ValueError for `copy=False`."""
        if self.dtype.numpy is None:
            raise TypeError(f"numpy has no dtype for the elements of {self.name!r}, {self.dtype}; read it by t[:]")
        if copy is False:
            raise ValueError(f"{self.name!r} lies in a checkpoint, so an array of it is a copy; leave out copy=False")
        array: AnyArray = self._read(()).view(self.dtype.numpy)
        return array if dtype is None else array.astype(dtype, copy=False)

    def _read(self, index: tuple[Index, ...]) -> AnyArray:
        picked = pick(self.shape, index, -(-self._block_size // self.dtype.itemsize))
        self._reader.require(self.name, picked.bounds)
        array: AnyArray = np.empty(picked.shape, dtype=self.dtype.carrier)
        # [...] keeps what has no dimensions an array
        places: list[tuple[Box, tuple[slice | EllipsisType, ...]]]
        places = [(box, (*at.slices(), ...)) for box, at in picked.boxes()]
        self._reader.read(Request(self.name, box, array[at]) for box, at in places)
        found: AnyArray = array[(*picked.rest, ...)]
        # a view would keep all that was read
        return found.copy() if 2 * found.nbytes <= array.nbytes else found


class _Tensors(Mapping[str, LazyTensor]):
    """Names, aliases included, to lazy tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._metas = checkpoint.manifest.model_tensors

    def __getitem__(self, name: str) -> LazyTensor:
        manifest = self._checkpoint.manifest
        return LazyTensor(
            self._checkpoint.reader, name, manifest.meta(name), self._checkpoint.wrap, manifest.block_size
        )

    def __iter__(self) -> Iterator[str]:
        yield from self._metas
        yield from self._checkpoint.manifest.aliases

    def __len__(self) -> int:
        return len(self._metas) + len(self._checkpoint.manifest.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._metas or name in self._checkpoint.manifest.aliases


class Checkpoint:
    """A committed checkpoint, open for reading. Use it in a `with` block, or close it; it is not pruned before.

    Attributes:
        path: its folder.
        manifest: what it says of tensors, chunks and values.
        locations: where the chunks' bytes lie.
        reader: reads boxes of it in bulk.
    """

    def __init__(
        self,
        path: str,
        manifest: Manifest,
        locations: LocationMap,
        wrap: Wrap = as_numpy,
        held: Hold | None = None,
    ) -> None:
        # whoever forgets to close it: without waiting, since nobody knows which thread collects it
        if held is not None:
            weakref.finalize(self, held.release, wait=False)
        self._held = held
        self.path = path
        self.manifest = manifest
        self.locations = locations
        self.reader = Reader(manifest, locations)
        self.wrap = wrap
        self._values: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """The training step, if there is one."""
        return self.manifest.step

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Name -> lazy tensor, tied names included."""
        return _Tensors(self)

    @overload
    def __getitem__(self, name: str) -> LazyTensor: ...

    @overload
    def __getitem__(self, name: re.Pattern[str]) -> dict[str, LazyTensor]: ...

    def __getitem__(self, name: str | re.Pattern[str]) -> Any:
        """The tensor of that name; of a pattern such as `model.layers.0.*`, the tensors whose names fit it, by name.

        `*` stands for anything, dots included, `?` for one character. A compiled regular expression has to fit the
        whole name. A name that is a tensor's is no pattern, whatever it contains.

        Raises MissingTensorError (a KeyError) with names that look like it.
        """
        tensors = self.tensors
        if isinstance(name, str):
            if name in tensors or not ("*" in name or "?" in name):
                return tensors[name]
            # no sets of characters: names have brackets
            parts = (".*" if part == "*" else "." if part == "?" else re.escape(part) for part in name)
            name = re.compile("".join(parts), re.DOTALL)
        found = {known: tensors[known] for known in sorted(tensors) if name.fullmatch(known)}
        if not found:
            raise MissingTensorError(
                f"{self.path} has no tensor whose name fits {name.pattern!r}; `ckpt show` lists what it has",
                path=self.path,
            )
        return found

    @property
    def values(self) -> dict[str, Any]:
        """Path -> value: everything that is not a tensor. What only torch knows comes as `values.Opaque` without it."""
        if self._values is None:
            self._values = {
                path: self.decode(encoded, path, lenient=True) for path, encoded in self.manifest.values.items()
            }
        return self._values

    def per_rank(self, rank: int) -> dict[str, Any]:
        """Path -> encoded value of what rank `rank` saved as its own; empty if it saved nothing.

        Raises:
            CorruptionError, FormatError: the bytes are damaged or not what they should be.
        """
        name = rank_blob(rank)
        if name not in self.manifest.tensors:
            return {}
        tree = parse_json(self.blob(name), f"{self.path}: the values of rank {rank}")
        if not isinstance(tree, dict):
            raise FormatError(f"{self.path}: the values of rank {rank} are not an object", path=self.path)
        owned = self.manifest.owned
        return {new: value for path, value in tree.items() if (new := owned.get(path, path)) is not None}

    def blob(self, name: str) -> bytes:
        """The bytes that the format keeps under one of its own names."""
        meta = self.manifest.tensors.get(name)
        if meta is None or meta.dtype.itemsize != 1 or len(meta.shape) != 1:
            raise MissingTensorError(f"{self.path} has no bytes {name!r}", path=self.path, tensor=name)
        self.reader.require(name)
        array: AnyArray = np.empty(meta.shape, dtype=np.uint8)
        self.reader.read([Request(name, Box.whole(meta.shape), array)])
        return array.tobytes()

    def decode(self, encoded: Any, path: str, *, lenient: bool = False, leaf: Leaves | None = None) -> Any:
        """A value of the manifest from its encoded form; large payloads are fetched from where they lie."""
        try:
            return values.decode(encoded, path, blob=partial(self._referred, path), lenient=lenient, leaf=leaf)
        except FormatError as error:
            if error.path is None:
                error.path = self.path
                error.message = f"{self.path}: {error.message}"
            raise

    def _referred(self, path: str, reference: Any) -> bytes:
        if (
            not isinstance(reference, str)
            or not reference.startswith(BLOB_PREFIX)
            or reference not in self.manifest.tensors
        ):
            raise FormatError(
                f"{self.path}: the value {path!r} refers to {brief(reference)}, and there is no such payload; the "
                "checkpoint was written wrongly or tampered with",
                path=self.path,
                tensor=path,
            )
        return self.blob(reference)

    def read(self, requests: Iterable[Request], *, threads: int | None = None) -> ReadStats:
        """Fill many arrays at once; see reading.Reader.read."""
        return self.reader.read(requests, threads=threads)

    def close(self) -> None:
        """Close the files that are open, and let it be pruned. Reading after that opens them again."""
        self.locations.close()
        if self._held is not None:
            self._held.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, step={self.step}, {len(self.tensors)} tensors)"


def open_checkpoint(
    path: str | os.PathLike[str],
    wrap: Wrap = as_numpy,
    *,
    select: Sequence[str] | None = None,
    rename: Rename | None = None,
    held: bool = True,
) -> Checkpoint:
    """Open the checkpoint in folder `path`, reading only its root.

    Args:
        path: a checkpoint's folder, or its URL in a store.
        wrap: makes what indexing returns out of raw elements; numpy arrays by default.
        select: patterns of what is to be seen of it; see selecting.selected.
        rename: what of that is called otherwise than it was saved; see renaming.renamed.
        held: keep it from being pruned until it is closed.

    Raises:
        CheckpointNotFoundError: none was committed there.
        CorruptionError, FormatError: its root is damaged or wrong.
        MissingTensorError: a pattern of `select` matches nothing.
        RenameError: a rule of `rename` is wrong or unused, or gives two things one name.
        StoreError: its store can't be read.
    """
    folder = tidy(path)
    using = _hold(folder) if held else None
    try:
        manifest, locations, _ = open_native(folder)
        if select is not None:
            manifest = selected(manifest, select)
        if rename is not None:
            manifest = renamed(manifest, rename)
    except BaseException:
        if using is not None:
            using.release()
        raise
    return Checkpoint(folder, manifest, locations, wrap, using)


def _hold(folder: str) -> Hold | None:
    try:
        return hold(root_folder(folder))
    except StoreError:
        raise
    except CheckpointNotFoundError:
        open_native(folder)  # says better what is there instead
        raise  # it is being removed
    except OSError:
        return None  # why it can't be read is better said by who reads it
