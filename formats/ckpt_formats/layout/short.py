"""The short form of a layout: for each axis of the mesh, a table from patterns of names to the dimension that is cut.

    [tp]
    "model.*.qkv.weight" = 0
    "model.*.out.weight" = 1
    "model.*.norm.*" = "replicate"

An axis that there is a table for follows it, and tensors that no pattern matches are replicated over it. Without a
table,
`dp`, `fsdp` and `dp_shard` cut dimension 0, `dp_replicate` replicates, and any other axis does what an axis of that
name did when the checkpoint was saved. 0-d tensors are always replicated.

Several axes may cut one dimension: then the rightmost cuts first, and each axis to its left cuts what those to its
right have left to a rank, by torch.chunk's rule. So a rank holds what a rank of FSDP2 over tensor parallelism holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Box, Interval, Shape, boxes_from_intervals, shard_intervals
from ckpt_formats.layout.mesh import Mesh
from ckpt_formats.layout.patterns import Pattern

__all__ = ["Cuts", "Tables", "boxes", "checked", "cut_words", "cuts_of"]

Cuts = tuple[int | None, ...]
"""For each axis of a mesh, the dimension that it cuts of a tensor, or None when the tensor is replicated over it."""

Tables = Mapping[str, Mapping[str, int | str]]
"""Axis -> pattern of names -> the dimension that it cuts, or "replicate"."""

_REPLICATE: Final = "replicate"
_DATA_PARALLEL: Final = frozenset({"dp", "fsdp", "dp_shard"})
_REPLICAS: Final = frozenset({"dp_replicate"})
_WORD = re.compile(r"(?:R|S\((\d{1,4})\)|SS\((\d{1,4}),\d{1,18}\))", re.ASCII)


def boxes(shape: Shape, cuts: Cuts, mesh: Mesh, rank: int) -> list[Box]:
    """What the rank holds of a tensor of that shape: one box, or none when there is nothing left for it."""
    per_dim: list[list[Interval]] = [[(0, extent)] for extent in shape]
    for dim, parts, index in reversed(list(zip(cuts, mesh.shape, mesh.coordinate(rank), strict=True))):
        if dim is not None:
            per_dim[dim] = shard_intervals(per_dim[dim], parts, index)
    return [box for box, _ in boxes_from_intervals(per_dim)]


def cut_words(cuts: Cuts, mesh: Mesh) -> str:
    """The cut as a manifest records it, a word for each axis: `S(0)@dp R@tp`, or `SS(0,4)@dp S(0)@tp`.

    The second says that dp cuts within each of the 4 pieces that axes to its right have made of the same dimension.
    """
    words = []
    for axis, (name, dim) in enumerate(zip(mesh.names, cuts, strict=True)):
        if dim is None:
            words.append(f"R@{name}")
            continue
        pieces = math.prod(mesh.shape[other] for other in range(axis + 1, len(cuts)) if cuts[other] == dim)
        words.append(f"SS({dim},{pieces})@{name}" if pieces > 1 else f"S({dim})@{name}")
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class _Rule:
    axis: str
    pattern: Pattern
    dim: int | None

    def __str__(self) -> str:
        value = f'"{_REPLICATE}"' if self.dim is None else str(self.dim)
        return f'[{self.axis}] "{self.pattern.text}" = {value}'


def checked(where: str, tables: Mapping[str, object]) -> dict[str, list[_Rule]]:
    """The tables' rules. LayoutError, which names `where`, when they are not such tables."""
    rules: dict[str, list[_Rule]] = {}
    for axis, table in tables.items():
        if not isinstance(table, Mapping):
            raise LayoutError(
                f"{where}: {axis!r} stands outside of a table; put it under the mesh axis that it is about, as in"
                f" [tp], and put a pattern in quotes"
            )
        rules[axis] = [_rule(where, axis, pattern, value) for pattern, value in table.items()]
    return rules


def _rule(where: str, axis: str, pattern: str, value: object) -> _Rule:
    if isinstance(value, Mapping):
        raise LayoutError(
            f"{where}: a pattern under [{axis}] that begins with {pattern!r} is not in quotes; write it as"
            ' "model.*.out.weight" = 1'
        )
    dim = None if value == _REPLICATE else value
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 0):
        raise LayoutError(
            f"{where}: [{axis}] {pattern!r} = {value!r} is not a rule; its value is the dimension to cut,"
            f' counted from 0, or "{_REPLICATE}"'
        )
    try:
        return _Rule(axis, Pattern(pattern), dim)
    except ValueError as error:
        raise LayoutError(f"{where}: [{axis}] {error}") from None


def cuts_of(
    where: str,
    tables: Tables,
    mesh: Mesh,
    tensors: Mapping[str, Shape],
    recorded: Mapping[str, str],
    owners: Mapping[str, str],
) -> dict[str, Cuts]:
    """How each tensor is cut on the mesh; see Layout.cuts."""
    rules = checked(where, tables)
    for axis in tables:
        if axis not in mesh.names:
            raise LayoutError(f"{where} has a table for the axis {axis!r}, which the mesh {mesh} has not")
    owners = {
        slot: parameter
        for slot, parameter in owners.items()
        if slot in tensors and tensors.get(parameter) == tensors[slot]
    }
    per_axis = [
        _by_table(where, rules[name], tensors, owners)
        if name in rules
        else _by_custom(name, size, tensors, recorded, owners)
        for name, size in zip(mesh.names, mesh.shape, strict=True)
    ]
    return {name: tuple(dims.get(name) if shape else None for dims in per_axis) for name, shape in tensors.items()}


def _by_table(
    where: str, rules: list[_Rule], tensors: Mapping[str, Shape], owners: Mapping[str, str]
) -> dict[str, int | None]:
    matched = {name: [rule for rule in rules if rule.pattern.match(name) is not None] for name in tensors}
    used = {rule.pattern.text for found in matched.values() for rule in found}
    for rule in rules:
        if rule.pattern.text not in used:
            raise LayoutError(f"{where}: no tensor of the checkpoint matches {rule}; `ckpt show` lists their names")
    dims: dict[str, int | None] = {}
    for name, shape in tensors.items():
        found = matched[name] or matched[owners.get(name, name)]
        for rule in found:
            if rule.dim != found[0].dim:
                raise LayoutError(
                    f"{where}: the rules {found[0]} and {rule} disagree about the tensor {name!r}; make the"
                    " patterns narrower, so that only one of them matches",
                    tensor=name,
                )
            if rule.dim is not None and shape and rule.dim >= len(shape):
                raise LayoutError(
                    f"{where}: {rule} matches the tensor {name!r}, whose shape {list(shape)} has no such dimension",
                    tensor=name,
                )
        if found:
            dims[name] = found[0].dim
    return dims


def _by_custom(
    axis: str, size: int, tensors: Mapping[str, Shape], recorded: Mapping[str, str], owners: Mapping[str, str]
) -> Mapping[str, int | None]:
    """What an axis without a table cuts."""
    if axis in _DATA_PARALLEL:
        return dict.fromkeys(tensors, 0)
    if axis in _REPLICAS or size == 1:
        return {}
    dims = _recorded_dims(axis, recorded, tensors, owners)
    if dims:
        return dims
    example = next((name for name, shape in tensors.items() if len(shape) > 1), "model.layers.0.out.weight")
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", example)
    raise LayoutError(
        f"nothing says which dimensions the mesh axis {axis!r} cuts: the checkpoint was not saved on a mesh with an"
        " axis of that name, and the layout has no table for it; write one to a file, such as\n"
        f'[{axis}]\n"{pattern}" = 0\n'
        "and pass it by --layout; tensors that no pattern matches are replicated over the axis"
    )


def _recorded_dims(
    axis: str, recorded: Mapping[str, str], tensors: Mapping[str, Shape], owners: Mapping[str, str]
) -> dict[str, int | None]:
    """Which dimension of each tensor the axis of that name cut when the checkpoint was saved; empty if it had none."""
    dims: dict[str, int | None] = {}
    for name, shape in tensors.items():
        for word in recorded.get(name, recorded.get(owners.get(name, name), "")).split():
            how, _, cut_over = word.rpartition("@")
            if cut_over != axis:
                continue
            match = _WORD.fullmatch(how)
            if match is None:
                raise LayoutError(
                    f"the checkpoint says that the tensor {name!r} was cut by {word}, which is more than a dimension;"
                    f" say how to cut over {axis!r} by --layout",
                    tensor=name,
                )
            dim = match[1] or match[2]
            if dim is not None and int(dim) >= len(shape):
                raise LayoutError(
                    f"the checkpoint says that the tensor {name!r} was cut by {word}, but its shape {list(shape)} has"
                    f" no such dimension; say how to cut over {axis!r} by --layout",
                    tensor=name,
                )
            dims[name] = None if dim is None else int(dim)
    return dims
