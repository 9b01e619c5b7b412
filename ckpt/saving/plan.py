"""Who writes what: replicated boxes once, balanced by bytes.

Every rank describes what it holds (names, shapes, boxes; no bytes). Rank 0 checks that the descriptions agree and that
the boxes cover every tensor, and gives each box to one of the ranks that hold it. A plan depends on the descriptions
alone, so it is kept for as long as they stay the same. Knows no files and no processes: descriptions in, assignments
out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ckpt.state import LocalState
from ckpt.state.torch_dtypes import dtype_of
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.errors import CoverageError, StateError
from ckpt_formats.geometry import Box, check_cover
from ckpt_formats.json_text import to_json

SPLIT = 16 << 20
"""A replicated box is cut into parts of at least so many bytes, so that its owners share the writing."""


class Assigned(NamedTuple):
    """One box to write: position of the tensor in the rank's own description, position of its piece, and the box."""

    tensor: int
    piece: int
    box: Box


class PlannedTensor(NamedTuple):
    """A tensor of the global model."""

    dtype: str
    shape: tuple[int, ...]
    cut: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What all ranks together save.

    Attributes:
        tensors: name -> what it is, sorted by name.
        aliases: tied name -> stored name.
        meshes: distinct meshes.
        cuts: distinct (position in meshes or None, text), how tensors were cut.
        assignments: for each rank, what it writes.
    """

    tensors: Mapping[str, PlannedTensor]
    aliases: Mapping[str, str]
    meshes: Sequence[Mapping[str, Any]]
    cuts: Sequence[Mapping[str, Any]]
    assignments: Sequence[Sequence[Assigned]]


def describe(state: LocalState) -> bytes:
    """What a rank holds, as bytes that are equal exactly when plans are.

    Raises StateError for names that can't be stored.
    """
    for name in state.tensors:
        if not name or not _is_text(name):
            raise StateError(
                f"a tensor can't be named {name!r}; give it a non-empty name that is valid Unicode", tensor=name
            )
    cuts: dict[tuple[Any, str], int] = {}
    tensors = [
        [
            tensor.name,
            dtype_of(tensor.dtype).name,
            tensor.shape,
            cuts.setdefault((tensor.mesh, tensor.cut), len(cuts)),
            [[piece.box.offsets, piece.box.sizes] for piece in tensor.pieces],
        ]
        for tensor in state.tensors.values()
    ]
    tree = {
        "tensors": tensors,
        "cuts": [[mesh, cut] for mesh, cut in cuts],
        "aliases": state.aliases,
    }
    return to_json(tree)


def _is_text(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Holder(NamedTuple):
    rank: int
    tensor: int
    piece: int


def make_plan(descriptions: Sequence[bytes]) -> Plan:
    """Plan a save from every rank's description, in rank order.

    Raises:
        StateError: two ranks describe a tensor, tie or entry differently.
        CoverageError: the boxes of a tensor overlap or leave a hole.
    """
    trees = [json.loads(description) for description in descriptions]
    tensors: dict[str, PlannedTensor] = {}
    first_rank: dict[str, int] = {}
    meshes: dict[str, int] = {}
    cuts: dict[tuple[int | None, str], int] = {}
    holders: dict[str, dict[Box, list[_Holder]]] = {}
    for rank, tree in enumerate(trees):
        cut_numbers = []
        for mesh, text in tree["cuts"]:
            number = None
            if mesh is not None:
                key = json.dumps({"names": mesh[0], "shape": mesh[1]})
                number = meshes.setdefault(key, len(meshes))
            cut_numbers.append(cuts.setdefault((number, text), len(cuts)))
        for position, (name, dtype, shape, cut, boxes) in enumerate(tree["tensors"]):
            described = PlannedTensor(dtype, tuple(shape), cut_numbers[cut])
            known = tensors.setdefault(name, described)
            first_rank.setdefault(name, rank)
            if known.dtype != dtype or known.shape != described.shape:
                raise StateError(
                    f"tensor {name!r} is {known.dtype} {list(known.shape)} on rank {first_rank[name]} but {dtype} "
                    f"{list(shape)} on rank {rank}; give them different names, or make them one tensor",
                    tensor=name,
                    rank=rank,
                )
            held = holders.setdefault(name, {})
            for piece, (offsets, sizes) in enumerate(boxes):
                held.setdefault(Box(tuple(offsets), tuple(sizes)), []).append(_Holder(rank, position, piece))
    for name, planned in tensors.items():
        _check(name, planned, list(holders[name]))
    aliases = _merge_aliases([tree["aliases"] for tree in trees])
    for alias, name in aliases.items():
        if alias in tensors:
            rank = first_rank[alias]
            raise StateError(
                f"{alias!r} is tied to {name!r} on one rank, but stands for itself on rank {rank}; tie the same "
                "tensors, in the same order, on every rank that has any of them",
                tensor=alias,
                rank=rank,
            )
    return Plan(
        tensors=dict(sorted(tensors.items())),
        aliases=aliases,
        meshes=[json.loads(mesh) for mesh in meshes],
        cuts=[{"mesh": number, "cut": text} for number, text in cuts],
        assignments=_assign(tensors, holders, len(trees)),
    )


def _check(name: str, tensor: PlannedTensor, boxes: list[Box]) -> None:
    ndim = len(tensor.shape)
    if 0 in tensor.shape and math.prod(size or 1 for size in tensor.shape) >= 1 << 58:
        raise StateError(
            f"tensor {name!r} has the shape {list(tensor.shape)}, which overflows; an empty tensor needs no large "
            "dimensions",
            tensor=name,
        )
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), ndim)
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), ndim)
    try:
        check_cover(tensor.shape, offsets, sizes)
    except CoverageError as error:
        raise CoverageError(
            f"tensor {name!r} can't be saved: {error}. Every element must be held by some rank, and ranks that hold a "
            "part in common must hold the same box; check the Shard offsets, or the process group",
            tensor=name,
        ) from None


def _assign(
    tensors: Mapping[str, PlannedTensor], holders: Mapping[str, Mapping[Box, list[_Holder]]], world_size: int
) -> list[list[Assigned]]:
    assignments: list[list[Assigned]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    shared: list[tuple[int, Box, list[_Holder]]] = []
    for name, held in holders.items():
        itemsize = dtype_named(tensors[name].dtype).itemsize
        for box, owners in held.items():
            nbytes = box.numel * itemsize
            if len(owners) == 1:
                owner = owners[0]
                assignments[owner.rank].append(Assigned(owner.tensor, owner.piece, box))
                load[owner.rank] += nbytes
            else:
                shared.extend((part.numel * itemsize, part, owners) for part in _split(box, nbytes, len(owners)))
    # the largest first, each to the owner with the least to write: within 4/3 of the best (Graham 1969)
    shared.sort(key=lambda item: -item[0])
    for nbytes, box, owners in shared:
        owner = min(owners, key=lambda owner: (load[owner.rank], owner.rank))
        assignments[owner.rank].append(Assigned(owner.tensor, owner.piece, box))
        load[owner.rank] += nbytes
    for assignment in assignments:
        # in the order of the rank's own walk: neighbours in memory stay neighbours in the file
        assignment.sort()
    return assignments


def _split(box: Box, nbytes: int, owners: int) -> list[Box]:
    """Cut a replicated box along its longest dimension into about equal parts of at least SPLIT bytes."""
    parts = min(owners, nbytes // SPLIT)
    if parts <= 1:
        return [box]
    dim = box.sizes.index(max(box.sizes))
    size = box.sizes[dim]
    parts = min(parts, size)
    cuts = [size * part // parts for part in range(parts + 1)]
    return [
        Box(
            (*box.offsets[:dim], box.offsets[dim] + low, *box.offsets[dim + 1 :]),
            (*box.sizes[:dim], high - low, *box.sizes[dim + 1 :]),
        )
        for low, high in pairwise(cuts)
    ]


def _merge_aliases(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for rank, part in enumerate(parts):
        for alias, name in part.items():
            if merged.setdefault(alias, name) != name:
                raise StateError(
                    f"{alias!r} is tied to {merged[alias]!r} on one rank and to {name!r} on rank {rank}; "
                    "build the model alike on every rank",
                    tensor=alias,
                    rank=rank,
                )
    return merged


def merge_entries(parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The top-level entries of all ranks made one; nested facts are joined, others must be equal. Raises StateError."""
    merged: dict[str, dict[str, Any]] = {}
    for rank, part in enumerate(parts):
        if list(part) != list(parts[0]) and set(part) != set(parts[0]):
            raise StateError(
                f"the state has the entries {sorted(parts[0])} on rank 0 but {sorted(part)} on rank {rank}; "
                "every rank must name the same entries",
                rank=rank,
            )
        for name, entry in part.items():
            known = merged.setdefault(name, {})
            for key, fact in entry.items():
                if isinstance(fact, dict):
                    known.setdefault(key, {}).update(fact)
                elif known.setdefault(key, fact) != fact:
                    raise StateError(
                        f"entry {name!r} is {known[key]!r} on one rank and {fact!r} on rank {rank}; "
                        "every rank must save the same kinds of objects",
                        rank=rank,
                    )
    return merged


def encode_assignment(assignment: Sequence[Assigned]) -> bytes:
    """An assignment as bytes."""
    return json.dumps(assignment, separators=(",", ":")).encode("ascii")


def decode_assignment(data: bytes) -> list[Assigned]:
    """The inverse of encode_assignment."""
    return [
        Assigned(tensor, piece, Box(tuple(offsets), tuple(sizes)))
        for tensor, piece, (offsets, sizes) in json.loads(data)
    ]
