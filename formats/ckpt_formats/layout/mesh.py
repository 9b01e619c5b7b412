"""Meshes: named axes over the ranks of a job, as `dp=2,tp=4`."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Final

from ckpt_formats.errors import LayoutError

__all__ = ["Mesh", "Where"]

Where = tuple[int | None, ...]
"""Ranks of a mesh that hold the same: for each axis where they stand on it, or None when that is all the same."""

_MOST_RANKS: Final = 1 << 20
_AXIS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*([0-9]{1,9})", re.ASCII)


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

    def ranks(self, where: Where) -> list[int]:
        """The ranks that stand there, ascending."""
        ranks = []
        choices = [range(size) if index is None else (index,) for index, size in zip(where, self.shape, strict=True)]
        for coordinate in itertools.product(*choices):
            rank = 0
            for index, size in zip(coordinate, self.shape, strict=True):
                rank = rank * size + index
            ranks.append(rank)
        return ranks

    def first_rank(self, where: Where) -> int:
        """The lowest of the ranks that stand there."""
        rank = 0
        for index, size in zip(where, self.shape, strict=True):
            rank = rank * size + (index or 0)
        return rank

    def text(self, where: Where) -> str:
        """Where ranks stand, as `tp=1` or `pp=0,tp=1`; `every rank` when it is all the same."""
        fixed = [f"{name}={index}" for name, index in zip(self.names, where, strict=True) if index is not None]
        return ",".join(fixed) or "every rank"
