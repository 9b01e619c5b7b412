"""What differs between two checkpoints: names, shapes, dtypes, ties, the bytes of tensors, plain values.

How they are cut is no difference. Where both have the same box with the same checksum, nothing is read; everything else
is read and compared in bounded memory, whatever cut either has. Needs no torch; knows no ranks.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any, Literal, NamedTuple

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.comparing import Numbers, Tally, Tolerance
from ckpt_formats.describing import value_text, writers_text
from ckpt_formats.errors import MissingTensorError
from ckpt_formats.geometry import Box
from ckpt_formats.manifest import RANK_PREFIX, Manifest, TensorMeta
from ckpt_formats.reading import Request
from ckpt_formats.values import JsonValue, canonical

__all__ = ["DiffReport", "Difference", "diff"]

BATCH = 32 << 20
"""Bytes of each checkpoint that are read and compared at once."""

Progress = Callable[[int, int], None]
"""Called with bytes compared so far and bytes to compare in all (of each checkpoint)."""

Subject = Literal["tensor", "value", "entry"]
Kind = Literal["only_a", "only_b", "shape", "dtype", "tie", "content"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not the same in both."""

    subject: Subject
    """A tensor, a plain value, or what a top-level name of the state was."""
    name: str
    """Name of the tensor or entry; path of the value down to where it differs."""
    kind: Kind
    """Only in A, only in B, or what about it differs; `tie`: it shares its storage with other names."""
    a: str | None = None
    """What A has, for people."""
    b: str | None = None
    rank: int | None = None
    """Whose value it is, when each rank has its own."""
    numbers: Numbers | None = None
    """How much the elements of a tensor differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """What `diff` found."""

    a: str
    b: str
    differences: Sequence[Difference]
    close: Sequence[Difference]
    """Tensors whose elements differ, but within the tolerance; not differences."""
    notes: Sequence[str]
    """What differs and is no difference: the cut, the step."""
    tensors: int
    """Tensors that both have, tied names included, and that were compared."""
    values: int
    """Paths of plain values that both have."""
    bytes_compared: int
    """Bytes of tensors, in each, that had to be compared because their checksums did not tell."""
    seconds: float

    @property
    def equal(self) -> bool:
        return not self.differences


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    pattern: str | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare the checkpoints in folders `a` and `b`.

    Tensors are equal when their bits are. With a tolerance they are when numpy.isclose says so of every pair of
    elements (|a - b| <= atol + rtol * |b|; NaN equals NaN). Plain values are always compared exactly.

    Args:
        a, b: the checkpoints' folders.
        rtol, atol: relative and absolute tolerance, not negative.
        pattern: compare only names of tensors and paths of values that match it, as in a shell (`*` matches dots too).
        progress: called as work proceeds.

    Raises:
        CheckpointNotFoundError: no checkpoint was committed in one of the folders.
        MissingTensorError: nothing in either matches the pattern.
        CorruptionError, FormatError: one of them is damaged where it had to be read.
    """
    begin = time.perf_counter()
    with ExitStack() as stack:
        one = stack.enter_context(open_checkpoint(a))
        other = stack.enter_context(open_checkpoint(b))
        comparison = _Comparison(one, other, Tolerance(rtol, atol), pattern, progress)
        comparison.run()
    return DiffReport(
        a=one.path,
        b=other.path,
        differences=comparison.differences,
        close=comparison.close,
        notes=comparison.notes(),
        tensors=comparison.tensors,
        values=comparison.values,
        bytes_compared=comparison.done,
        seconds=time.perf_counter() - begin,
    )


class _Work(NamedTuple):
    """A tensor with boxes that have to be read."""

    name: str
    meta: TensorMeta
    boxes: list[Box]


class _Comparison:
    """One call of `diff`."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, tolerance: Tolerance, pattern: str | None, progress: Progress | None
    ) -> None:
        self._a = a
        self._b = b
        self._tolerance = tolerance
        self._pattern = pattern
        self._wanted = re.compile(translate(pattern)).match if pattern is not None else lambda _: True
        self._progress = progress
        self.differences: list[Difference] = []
        self.close: list[Difference] = []
        self.tensors = self.values = self.done = 0

    def run(self) -> None:
        self._compare_entries()
        work = self._compare_names()
        self._compare_values()
        if self._pattern is not None and not (self.tensors or self.values or self.differences):
            raise MissingTensorError(
                f"no tensor or value in {self._a.path} or {self._b.path} matches {self._pattern!r}; "
                "`ckpt show` lists what they have"
            )
        self._compare_elements(work)

    def notes(self) -> list[str]:
        """What is told, but is no difference."""
        a, b = self._a.manifest, self._b.manifest
        notes = []
        if a.step != b.step:
            notes.append(f"A is of step {_or_none(a.step)}, B of step {_or_none(b.step)}")
        if writers_text(a.layout) != writers_text(b.layout):
            notes.append(f"A was cut for {writers_text(a.layout)}, B for {writers_text(b.layout)}")
        return notes

    # names

    def _compare_entries(self) -> None:
        if self._pattern is not None:
            return
        a, b = self._a.manifest.entries, self._b.manifest.entries
        for name in sorted(a.keys() | b.keys()):
            kinds = [entries[name].get("kind") if name in entries else None for entries in (a, b)]
            if name not in b:
                self._differ("entry", name, "only_a", a=str(kinds[0]))
            elif name not in a:
                self._differ("entry", name, "only_b", b=str(kinds[1]))
            elif a[name] != b[name]:
                same = kinds[0] == kinds[1]
                texts = [f"{kind} with other parameters" if same else str(kind) for kind in kinds]
                self._differ("entry", name, "content", a=texts[0], b=texts[1])

    def _compare_names(self) -> list[_Work]:
        """Names, ties, shapes and dtypes; returns what can't be told without reading."""
        a, b = self._a.manifest, self._b.manifest
        stored_a, stored_b = _stored(a), _stored(b)
        ties_a, ties_b = _ties(stored_a, stored_b), _ties(stored_b, stored_a)
        seen: set[tuple[str, str]] = set()
        work = []
        for name in sorted(stored_a.keys() | stored_b.keys()):
            if not self._wanted(name):
                continue
            if name not in stored_b:
                self._differ("tensor", name, "only_a", a=_tensor_text(a.meta(name)))
                continue
            if name not in stored_a:
                self._differ("tensor", name, "only_b", b=_tensor_text(b.meta(name)))
                continue
            self.tensors += 1
            tie_a, tie_b = ties_a[stored_a[name]] - {name}, ties_b[stored_b[name]] - {name}
            # told of the names that are tied to another one, not of that one again
            if tie_a != tie_b and (name in a.aliases or name in b.aliases):
                self._differ("tensor", name, "tie", a=_tie_text(tie_a), b=_tie_text(tie_b))
            if (stored_a[name], stored_b[name]) in seen:
                continue
            seen.add((stored_a[name], stored_b[name]))
            meta, twin = a.meta(name), b.meta(name)
            if meta.shape != twin.shape:
                self._differ("tensor", name, "shape", a=str(list(meta.shape)), b=str(list(twin.shape)))
            if meta.dtype != twin.dtype:
                self._differ("tensor", name, "dtype", a=meta.dtype.name, b=twin.dtype.name)
            if meta.shape == twin.shape and meta.dtype == twin.dtype:
                boxes = _unlike(a, meta, b, twin)
                if boxes:
                    work.append(_Work(name, meta, boxes))
        return work

    def _differ(
        self,
        subject: Subject,
        name: str,
        kind: Kind,
        *,
        a: str | None = None,
        b: str | None = None,
        rank: int | None = None,
    ) -> None:
        self.differences.append(Difference(subject=subject, name=name, kind=kind, a=a, b=b, rank=rank))

    # plain values

    def _compare_values(self) -> None:
        self._compare_trees(self._a.manifest.values, self._b.manifest.values, None)
        for rank in sorted(_ranks(self._a.manifest) | _ranks(self._b.manifest)):
            self._compare_trees(self._a.per_rank(rank), self._b.per_rank(rank), rank)

    def _compare_trees(self, a: Mapping[str, Any], b: Mapping[str, Any], rank: int | None) -> None:
        for path in sorted(a.keys() | b.keys()):
            if not self._wanted(path):
                continue
            if path not in b:
                self._differ("value", path, "only_a", a=self._text(self._a, a[path], path), rank=rank)
                continue
            if path not in a:
                self._differ("value", path, "only_b", b=self._text(self._b, b[path], path), rank=rank)
                continue
            self.values += 1
            for place, one, other in _places(a[path], b[path], path):
                # a tuple has the value that is there, an empty one nothing
                texts = [
                    self._text(checkpoint, side[0], place) if side else None
                    for checkpoint, side in ((self._a, one), (self._b, other))
                ]
                kind: Kind = "content" if one and other else "only_a" if one else "only_b"
                self._differ("value", place, kind, a=texts[0], b=texts[1], rank=rank)

    def _text(self, checkpoint: Checkpoint, encoded: Any, path: str) -> str:
        return value_text(checkpoint.decode(encoded, path, lenient=True))

    # elements

    def _compare_elements(self, work: Sequence[_Work]) -> None:
        total = sum(box.numel * item.meta.dtype.itemsize for item in work for box in item.boxes)
        tallies: dict[str, Tally] = {item.name: Tally(item.meta.dtype, self._tolerance) for item in work}
        batch = _Batch()
        for item in work:
            limit = max(1, BATCH // item.meta.dtype.itemsize)
            for box in item.boxes:
                for part in _parts(box, limit):
                    if batch.nbytes and batch.nbytes + part.numel * item.meta.dtype.itemsize > BATCH:
                        self._compare_batch(batch, tallies, total)
                        batch = _Batch()
                    batch.add(item, part)
        self._compare_batch(batch, tallies, total)
        for item in work:
            numbers = tallies[item.name].numbers(item.meta.numel)
            if numbers.differing:
                found = Difference(subject="tensor", name=item.name, kind="content", numbers=numbers)
                (self.differences if numbers.beyond else self.close).append(found)

    def _compare_batch(self, batch: _Batch, tallies: Mapping[str, Tally], total: int) -> None:
        if not batch.nbytes:
            return
        self._a.read(batch.of_a)
        self._b.read(batch.of_b)
        for one, (a, b) in zip(batch.of_a, batch.arrays, strict=True):
            tallies[one.name].add(one.box, a, b)
        self.done += batch.nbytes
        if self._progress is not None:
            self._progress(self.done, total)


@dataclass(slots=True)
class _Batch:
    """Boxes to be read from both checkpoints and compared."""

    of_a: list[Request] = field(default_factory=list)
    of_b: list[Request] = field(default_factory=list)
    arrays: list[tuple[AnyArray, AnyArray]] = field(default_factory=list)
    """What they are read into."""
    nbytes: int = 0

    def add(self, item: _Work, box: Box) -> None:
        a, b = (np.empty(box.sizes, dtype=item.meta.dtype.carrier) for _ in range(2))
        self.of_a.append(Request(item.name, box, a))
        self.of_b.append(Request(item.name, box, b))
        self.arrays.append((a, b))
        self.nbytes += box.numel * item.meta.dtype.itemsize


def _stored(manifest: Manifest) -> dict[str, str]:
    """Every name of the model, tied ones included, -> the name that it is stored under."""
    return {**{name: name for name in manifest.model_tensors}, **manifest.aliases}


def _ranks(manifest: Manifest) -> set[int]:
    """The ranks that have values of their own."""
    numbers = [name.removeprefix(RANK_PREFIX) for name in manifest.tensors if name.startswith(RANK_PREFIX)]
    return {int(number) for number in numbers if number.isdecimal() and len(number) < 10}


def _ties(stored: Mapping[str, str], others: Mapping[str, str]) -> dict[str, set[str]]:
    """Stored name -> the names that share it, among those that the other checkpoint has too."""
    groups: dict[str, set[str]] = {}
    for name, home in stored.items():
        group = groups.setdefault(home, set())
        if name in others:
            group.add(name)
    return groups


def _tie_text(names: set[str]) -> str:
    return f"tied to {', '.join(sorted(names))}" if names else "not tied"


def _tensor_text(meta: TensorMeta) -> str:
    return f"{meta.dtype} {list(meta.shape)}"


def _or_none(step: int | None) -> str:
    return "none" if step is None else str(step)


def _unlike(a: Manifest, meta: TensorMeta, b: Manifest, twin: TensorMeta) -> list[Box]:
    """Boxes that together hold every element that may differ: chunks of A without a twin of the same checksum in B."""
    offsets, sizes = a.chunks(meta)
    twin_offsets, twin_sizes = b.chunks(twin)
    if not meta.rows:
        return []
    digests, twin_digests = _digests(a, meta, b.block_size), _digests(b, twin, a.block_size)
    if digests is None or twin_digests is None:
        equal = np.zeros(len(offsets), dtype=bool)
    elif np.array_equal(offsets, twin_offsets) and np.array_equal(sizes, twin_sizes):
        equal = (digests == twin_digests).all(axis=1)
    else:
        known = {
            (*offset, *size): found.tobytes()
            for offset, size, found in zip(twin_offsets.tolist(), twin_sizes.tolist(), twin_digests, strict=True)
        }
        equal = np.array(
            [
                known.get((*offset, *size)) == found.tobytes()
                for offset, size, found in zip(offsets.tolist(), sizes.tolist(), digests, strict=True)
            ],
            dtype=bool,
        )
    rows = np.flatnonzero(~equal)
    pairs = zip(offsets[rows].tolist(), sizes[rows].tolist(), strict=True)
    return [Box(tuple(offset), tuple(size)) for offset, size in pairs]


def _digests(manifest: Manifest, meta: TensorMeta, block_size: int) -> AnyArray | None:
    """The digests of a tensor's chunks, where they can be compared with those made with another block size."""
    page = manifest.page(meta.page)
    if page.digest is None or manifest.block_size != block_size:
        return None
    return page.digest[meta.row : meta.row + meta.rows]


def _parts(box: Box, limit: int) -> Iterator[Box]:
    """A box in parts of at most `limit` elements, in row-major order."""
    if box.numel <= limit:
        yield box
        return
    # the first dimension in which a part may be longer than 1
    dim = 0
    slab = box.numel // box.sizes[0]
    while slab > limit:
        dim += 1
        slab //= box.sizes[dim]
    step = limit // slab
    for index in np.ndindex(*box.sizes[:dim]):
        for start in range(0, box.sizes[dim], step):
            offsets = (*index, start, *(0,) * (box.ndim - dim - 1))
            sizes = (*(1,) * dim, min(step, box.sizes[dim] - start), *box.sizes[dim + 1 :])
            yield Box(tuple(o + s for o, s in zip(box.offsets, offsets, strict=True)), sizes)


# --- plain values: where two encoded trees differ

_Side = tuple[JsonValue] | tuple[()]

_PAIRS = ("$dict", "$ordered_dict", "$counter")
"""Tags whose payload is an array of pairs: keys that JSON's own objects can't have."""


def _places(a: JsonValue, b: JsonValue, path: str) -> Iterator[tuple[str, _Side, _Side]]:
    """Every place where two encoded values differ, with what each has there (nothing: an empty tuple)."""
    if canonical(a) == canonical(b):
        return
    one, other = _members(a), _members(b)
    found = False
    if one is not None and other is not None and type(a) is type(b) and _tag(a) == _tag(b):
        for key in {**one, **other}:
            if key not in one or key not in other:
                found = True
                yield path + key, (one[key],) if key in one else (), (other[key],) if key in other else ()
                continue
            for place in _places(one[key], other[key], path + key):
                found = True
                yield place
    if not found:
        # no members, or the same ones in another order
        yield path, (a,), (b,)


def _members(encoded: JsonValue) -> dict[str, JsonValue] | None:
    """The members of an encoded container by the text that leads to them from its path; None when it is none."""
    tag = _tag(encoded)
    if isinstance(encoded, dict):
        if tag is None:
            # a key of the user's that begins with $ is stored with another one before it
            return {f"[{key[1:] if key.startswith('$$') else key!r}]": item for key, item in encoded.items()}
        payload = encoded[tag]
        if tag in _PAIRS and isinstance(payload, list):
            pairs = [pair for pair in payload if isinstance(pair, list) and len(pair) == 2]
            return {f"[{canonical(key).decode('ascii')}]": item for key, item in pairs}
        encoded = payload if tag == "$tuple" else None
    if isinstance(encoded, list):
        return {f"[{index}]": item for index, item in enumerate(encoded)}
    return None


def _tag(encoded: JsonValue) -> str | None:
    """The tag of an encoded value that is not one of JSON's own."""
    if isinstance(encoded, dict) and len(encoded) == 1:
        (key,) = encoded
        if key.startswith("$") and not key.startswith("$$"):
            return key
    return None
