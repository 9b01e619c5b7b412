"""Spreads on a mesh of known size: on which rank and in which of its stages each number in names is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckpt_formats.errors import LayoutError
from ckpt_formats.layout.mesh import Mesh
from ckpt_formats.layout.rules import Spread
from ckpt_formats.layout.words import toml_of

__all__ = ["Home", "Numbers", "numbers_of"]


class Home(NamedTuple):
    """Where a spread number is."""

    place: int
    """On the axis."""
    chunk: int
    """Which of that rank's stages."""
    stage: int
    own: int
    """How the stage counts it."""


class Numbers(NamedTuple):
    """A spread on a mesh of known size."""

    axis: int
    homes: Mapping[int, Home]
    lists: Sequence[Sequence[int]]
    """By index on the axis; only with one stage for each rank."""


def numbers_of(where: str, mesh: Mesh, capture: str, spread: Spread) -> Numbers:
    """What a spread is on the mesh. LayoutError when its lists are not as many as the axis needs."""
    said = f"{where}: [spread.{capture}] {toml_of(spread)}"
    axis = mesh.names.index(spread.axis)
    ranks = mesh.shape[axis]
    stages = ranks * spread.chunks
    if spread.lists is not None:
        lists: Sequence[Sequence[int]] = spread.lists
        if len(lists) != stages:
            raise LayoutError(f"{said} has {len(lists)} lists, and the mesh {mesh} needs {stages}")
    else:
        count = spread.count or 0
        if count % stages:
            raise LayoutError(f"{said}: {count} can't be spread evenly over {stages} stages; say the lists")
        each = count // stages
        lists = [range(stage * each, (stage + 1) * each) for stage in range(stages)]
    homes: dict[int, Home] = {}
    for stage, numbers in enumerate(lists):
        chunk, index = divmod(stage, ranks)
        if spread.order == "v" and chunk % 2:
            index = ranks - 1 - index
        for own, number in enumerate(numbers):
            homes[number] = Home(index, chunk, stage, own)
    return Numbers(axis, homes, lists)
