"""How a checkpoint is to be cut over the ranks of a mesh: what `ckpt reshard --mesh dp=2,tp=4 --layout FILE` means.

Knows names and shapes of tensors, and no files of a checkpoint, processes or torch. A layout is, for each axis of the
mesh, a table from patterns of tensors' names to the dimension that is cut:

    [tp]
    "model.*.qkv.weight" = 0
    "model.*.out.weight" = 1
    "model.*.norm.*" = "replicate"

Several axes may cut one dimension: then the rightmost cuts first, and each axis to its left cuts what those to its
right have left to a rank, by torch.chunk's rule. So a target rank holds what a rank of FSDP2 over tensor parallelism
holds.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Final

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Box, Interval, Shape, boxes_from_intervals, shard_intervals

__all__ = ["Cuts", "Layout", "Mesh", "boxes", "cut_words"]

Cuts = tuple[int | None, ...]
"""For each axis of a mesh, the dimension that it cuts of a tensor, or None when the tensor is replicated over it."""

_REPLICATE: Final = "replicate"
_MOST_RANKS: Final = 1 << 20
_DATA_PARALLEL: Final = frozenset({"dp", "fsdp", "dp_shard"})
_REPLICAS: Final = frozenset({"dp_replicate"})
_AXIS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*([0-9]{1,9})", re.ASCII)
_WORD = re.compile(r"(?:R|S\((\d{1,4})\)|SS\((\d{1,4}),\d{1,18}\))@(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mesh:
    """A grid of ranks: names and sizes of its axes, the last of which varies fastest with the rank."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """The mesh written as `dp=2,tp=4`. LayoutError for anything else."""
        names: list[str] = []
        shape: list[int] = []
        for part in text.split(","):
            match = _AXIS.fullmatch(part.strip())
            if match is None:
                raise LayoutError(
                    f"{part.strip()!r} in the mesh {text!r} is not an axis; a mesh is written as names and sizes,"
                    " outermost first, like dp=2,tp=4"
                )
            name, size = match[1], int(match[2])
            if size < 1:
                raise LayoutError(f"the axis {name!r} of the mesh {text!r} has size {size}; the smallest is 1")
            if name in names:
                raise LayoutError(f"the axis {name!r} is in the mesh {text!r} twice; give each axis a name of its own")
            names.append(name)
            shape.append(size)
        if math.prod(shape) > _MOST_RANKS:
            raise LayoutError(f"the mesh {text!r} has {math.prod(shape)} ranks; at most {_MOST_RANKS} make sense")
        return cls(tuple(names), tuple(shape))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.names, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where the rank stands on each axis. ValueError when there is no such rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"the mesh {self} has no rank {rank}; its ranks are 0 to {self.size - 1}")
        coordinate = []
        for size in reversed(self.shape):
            rank, index = divmod(rank, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))


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
    pattern: str
    regex: re.Pattern[str]
    dim: int | None

    def __str__(self) -> str:
        return f'[{self.axis}] "{self.pattern}" = ' + (f'"{_REPLICATE}"' if self.dim is None else str(self.dim))


class Layout:
    """For axes of a mesh, which dimension of which tensors they cut. The empty layout has only what is usual.

    An axis that the layout has a table for follows that table, and tensors that no pattern matches are replicated over
    it. Without a table, `dp`, `fsdp` and `dp_shard` cut dimension 0, `dp_replicate` replicates, and any other axis
    does what an axis of that name did when the checkpoint was saved. 0-d tensors are always replicated.
    """

    def __init__(
        self, tables: Mapping[str, Mapping[str, int | str]] | None = None, *, where: str = "the layout"
    ) -> None:
        """`tables`: axis -> pattern (as in a shell: * ? [abc]; * matches dots too) -> dimension, or "replicate"."""
        self._where = where
        self._tables: dict[str, list[_Rule]] = {}
        for axis, table in (tables or {}).items():
            if not isinstance(table, Mapping):
                raise LayoutError(
                    f"{where}: {axis!r} stands outside of a table; put it under the mesh axis that it is about, as in"
                    f" [tp], and put a pattern in quotes"
                )
            self._tables[axis] = [self._rule(axis, pattern, value) for pattern, value in table.items()]

    @classmethod
    def parse(cls, text: str, *, where: str = "the layout") -> Layout:
        """A layout written in TOML. LayoutError, which names `where`, when it is not one."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise LayoutError(f'{where} is not TOML: {error}; an example:\n[tp]\n"model.*.out.weight" = 1') from None
        return cls(tables, where=where)

    @classmethod
    def read(cls, path: str | Path) -> Layout:
        """The layout in a TOML file. LayoutError when it can't be read or is not one."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LayoutError(f"the layout file {path} can't be read: {error}", path=str(path)) from error
        return cls.parse(text, where=f"the layout file {path}")

    def _rule(self, axis: str, pattern: str, value: object) -> _Rule:
        if isinstance(value, Mapping):
            raise LayoutError(
                f"{self._where}: a pattern under [{axis}] that begins with {pattern!r} is not in quotes; write it as"
                ' "model.*.out.weight" = 1'
            )
        dim = None if value == _REPLICATE else value
        if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 0):
            raise LayoutError(
                f"{self._where}: [{axis}] {pattern!r} = {value!r} is not a rule; its value is the dimension to cut,"
                f' counted from 0, or "{_REPLICATE}"'
            )
        return _Rule(axis, pattern, re.compile(translate(pattern)), dim)

    def cuts(
        self,
        mesh: Mesh,
        tensors: Mapping[str, Shape],
        *,
        recorded: Mapping[str, str] | None = None,
        owners: Mapping[str, str] | None = None,
    ) -> dict[str, Cuts]:
        """How each tensor is cut on the mesh.

        Args:
            mesh: the target.
            tensors: name -> global shape of all tensors of the checkpoint.
            recorded: name -> cut as the checkpoint's manifest records it.
            owners: name of an optimizer's slot -> name of its parameter. When no pattern matches the slot's own name
                and it has the parameter's shape, it is cut as the parameter is.

        LayoutError when a table is for no axis of the mesh, a pattern matches no tensor, patterns disagree about a
        tensor, a tensor has not the dimension that a rule cuts, or nothing says what an axis cuts.
        """
        for axis in self._tables:
            if axis not in mesh.names:
                raise LayoutError(f"{self._where} has a table for the axis {axis!r}, which the mesh {mesh} has not")
        owners = {
            slot: parameter
            for slot, parameter in (owners or {}).items()
            if slot in tensors and tensors.get(parameter) == tensors[slot]
        }
        per_axis = [
            self._by_table(name, tensors, owners)
            if name in self._tables
            else _by_custom(name, size, tensors, _recorded_dims(name, recorded or {}, tensors, owners))
            for name, size in zip(mesh.names, mesh.shape, strict=True)
        ]
        return {name: tuple(dims.get(name) if shape else None for dims in per_axis) for name, shape in tensors.items()}

    def _by_table(self, axis: str, tensors: Mapping[str, Shape], owners: Mapping[str, str]) -> dict[str, int | None]:
        rules = self._tables[axis]
        matched = {name: [rule for rule in rules if rule.regex.match(name)] for name in tensors}
        used = {rule.pattern for found in matched.values() for rule in found}
        for rule in rules:
            if rule.pattern not in used:
                raise LayoutError(
                    f"{self._where}: no tensor of the checkpoint matches {rule}; `ckpt show` lists their names"
                )
        dims: dict[str, int | None] = {}
        for name, shape in tensors.items():
            found = matched[name] or matched[owners.get(name, name)]
            for rule in found:
                if rule.dim != found[0].dim:
                    raise LayoutError(
                        f"{self._where}: the rules {found[0]} and {rule} disagree about the tensor {name!r}; make the"
                        " patterns narrower, so that only one of them matches",
                        tensor=name,
                    )
                if rule.dim is not None and shape and rule.dim >= len(shape):
                    raise LayoutError(
                        f"{self._where}: {rule} matches the tensor {name!r}, whose shape {list(shape)} has no such"
                        " dimension",
                        tensor=name,
                    )
            if found:
                dims[name] = found[0].dim
        return dims


def _by_custom(
    axis: str, size: int, tensors: Mapping[str, Shape], recorded: Mapping[str, int | None]
) -> Mapping[str, int | None]:
    """What an axis without a table cuts."""
    if axis in _DATA_PARALLEL:
        return dict.fromkeys(tensors, 0)
    if axis in _REPLICAS or size == 1:
        return {}
    if recorded:
        return recorded
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
            match = _WORD.fullmatch(word)
            if match is None or match[3] != axis:
                continue
            dim = match[1] or match[2]
            if dim is not None and int(dim) >= len(shape):
                raise LayoutError(
                    f"the checkpoint says that the tensor {name!r} was cut by {word}, but its shape {list(shape)} has"
                    f" no such dimension; say how to cut over {axis!r} by --layout",
                    tensor=name,
                )
            dims[name] = None if dim is None else int(dim)
    return dims
