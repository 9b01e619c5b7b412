"""A layout on a mesh, for tensors of known shapes: what lies where in each rank's tensors, and where each tensor is.

Both ways it costs what is asked for: one rank's tensors, or one tensor's ranks, and no elements. Tensors of equal
shapes under one rule share what was worked out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import mul
from typing import NamedTuple

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.errors import CoverageError, LayoutError
from ckpt_formats.geometry import Box, Shape, check_cover
from ckpt_formats.layout.buffers import Buffer, Entry, buffers_of
from ckpt_formats.layout.lowering import Core, MisfitError, Placed, lower, strides_of, within
from ckpt_formats.layout.matching import Found, Logical
from ckpt_formats.layout.mesh import Mesh, Where
from ckpt_formats.layout.patterns import Pattern
from ckpt_formats.layout.rules import Flat, Rule
from ckpt_formats.layout.words import toml_of

__all__ = ["Holder", "LocalTensor", "Piece", "Resolved"]


class Piece(NamedTuple):
    """A box of a tensor, and where its elements lie in a rank's tensor, counted in elements from its first,
    row-major."""

    tensor: str
    """Name of the tensor of the checkpoint."""
    box: Box
    start: int
    """Where the box's lowest corner lies."""
    strides: Shape
    """How far it is from there to the next index of each dimension of the box."""
    copy: bool = False
    """Whether ranks elsewhere on the axes that are cut hold the same and count as its home: for a tied name, a second
    stage, a piece of a part that several hold."""

    def view(self, memory: AnyArray) -> AnyArray:
        """The box's elements in the rank's tensor, as a view of the box's shape. ValueError unless it is contiguous."""
        if not memory.flags.c_contiguous:
            raise ValueError(
                f"the memory of a rank's tensor has to be contiguous to see {self.box} of {self.tensor!r} in it"
            )
        if 0 in self.box.sizes:
            return memory.reshape(-1)[:0].reshape(self.box.sizes)
        size = memory.itemsize
        strides = tuple(stride * size for stride in self.strides)
        # of bytes, because not every dtype can be a buffer; unlike numpy's as_strided this checks bounds
        memory_bytes = memory.reshape(-1).view(np.uint8)
        return np.ndarray(self.box.sizes, memory.dtype, memory_bytes, self.start * size, strides)

    def clip(self, box: Box) -> Piece | None:
        """What of it lies in a box of the same tensor."""
        common = self.box.intersect(box)
        if common is None:
            return None
        moved = zip(common.offsets, self.box.offsets, self.strides, strict=True)
        start = self.start + sum((offset - begin) * stride for offset, begin, stride in moved)
        return self._replace(box=common, start=start)


class LocalTensor(NamedTuple):
    """A tensor that a rank holds. What of it no piece covers is padding."""

    name: str
    shape: Shape
    pieces: Sequence[Piece]


class Holder(NamedTuple):
    """Ranks that hold a piece of a tensor of the checkpoint, all alike."""

    where: Where
    local: str
    """Name of the ranks' tensor that it lies in."""
    shape: Shape
    """Shape of that."""
    piece: Piece


class _CutThere(NamedTuple):
    """What the cuts of a rule leave to ranks at a place, and the names of the tensors that it is of."""

    core: Core
    names: Sequence[str]
    copy: bool


class Resolved:
    """What a layout says about tensors on a mesh.

    Attributes:
        mesh: the ranks.
        tensors: name -> global shape.
        aliases: tied name -> name of the tensor that it is.
    """

    def __init__(
        self,
        mesh: Mesh,
        tensors: Mapping[str, Shape],
        found: Found,
        flats: Mapping[str, Flat],
        said: Mapping[str, str],
        where: str,
    ) -> None:
        """`said`: what is told of a tensor's rule where it is not the rule's own text."""
        self.mesh = mesh
        self.tensors = tensors
        self.aliases = found.aliases
        self._flats = flats
        self._said = said
        self._where = where
        self._logicals = found.logicals
        self._rules = found.rules
        self._of: dict[str, list[Logical]] = {}
        for logical in found.logicals:
            for name in dict.fromkeys(itertools.chain.from_iterable(logical.sources.values())):
                self._of.setdefault(name, []).append(logical)
        self._in: dict[str, list[Logical]] = {name: [] for name in flats}
        for logical in found.logicals:
            if logical.by.flat is not None:
                self._in[logical.by.flat].append(logical)
        self._cores: dict[tuple[object, ...], Core] = {}
        self._axes: dict[int, dict[int, tuple[int, ...]]] = {}
        self._flat_axes = {name: self._positions(flat.axes) for name, flat in flats.items()}
        self._shared_axes = {name: self._axes_of(name) for name in flats}
        self._buffers: dict[tuple[str, tuple[int, ...]], tuple[dict[str, Buffer], dict[int, tuple[Buffer, Entry]]]] = {}

    # --- what a rank holds

    def local(self, rank: int) -> dict[str, LocalTensor]:
        """The tensors that a rank holds, by name. ValueError when there is no such rank."""
        coordinate = self.mesh.coordinate(rank)
        held: dict[str, LocalTensor] = {}
        for logical in self._logicals:
            if logical.by.flat is None and self._stands(logical, coordinate):
                cut = self._cut(logical, coordinate)
                pieces = list(self._pieces(logical, cut, cut.core.placed, 0))
                held[logical.local] = LocalTensor(logical.local, cut.core.shape, pieces)
        for flat in self._flats:
            part, key = self._key(flat, coordinate)
            for buffer in self._plan(flat, key)[0].values():
                start, stop = buffer.share(part)
                found: list[Piece] = []
                for entry in buffer.entries_in(start, stop):
                    cut = self._cut(entry.logical, key, shared=self._shared_axes[flat])
                    found += self._stretch(entry, cut, start, stop)
                held[buffer.name] = LocalTensor(buffer.name, (stop - start,), found)
        return held

    # --- where a tensor is

    def holders(self, name: str, box: Box | None = None) -> Iterator[Holder]:
        """Where a tensor's elements, or those of a box of it, are: each of them in one piece that is no copy.

        Ranks that hold a piece alike are one Holder. KeyError when there is no such tensor.
        """
        name = self.aliases.get(name, name)
        self.tensors[name]
        for logical in self._of.get(name, ()):
            for where, local, shape, piece in self._found(logical, name):
                clipped = piece if box is None else piece.clip(box)
                if clipped is not None:
                    yield Holder(where, local, shape, clipped)

    def boxes(self, name: str, rank: int) -> list[Box]:
        """The boxes of a tensor that a rank holds."""
        coordinate = self.mesh.coordinate(rank)
        return sorted(
            {
                holder.piece.box
                for holder in self.holders(name)
                if all(index in (None, here) for index, here in zip(holder.where, coordinate, strict=True))
            }
        )

    def _found(self, logical: Logical, name: str) -> Iterator[Holder]:
        flat = logical.by.flat
        if flat is None:
            yield from self._before_flat(logical, name)
            return
        axes = self._relevant(logical)
        shared = {axis: tuple(range(self.mesh.shape[axis])) for axis in self._shared_axes[flat]}
        flat_axes = self._flat_axes[flat]
        for where in self._wheres({**shared, **axes}):
            key = tuple(index or 0 for index in where)
            buffer, entry = self._plan(flat, key)[1][id(logical)]
            cut = self._cut(logical, key, name, self._shared_axes[flat])
            for part in buffer.parts_of(entry):
                start, stop = buffer.share(part)
                there, left = list(where), part
                for axis in reversed(flat_axes):
                    left, there[axis] = divmod(left, self.mesh.shape[axis])
                for piece in self._stretch(entry, cut, start, stop):
                    if piece.tensor == name:
                        yield Holder(tuple(there), buffer.name, (stop - start,), piece)

    def _before_flat(self, logical: Logical, name: str) -> Iterator[Holder]:
        """Where a tensor is, if nothing were flattened."""
        for where in self._wheres(self._relevant(logical)):
            cut = self._cut(logical, tuple(index or 0 for index in where), name)
            for piece in self._pieces(logical, cut, cut.core.placed, 0):
                if piece.tensor == name:
                    yield Holder(where, logical.local, cut.core.shape, piece)

    # --- words

    def rule(self, name: str) -> str:
        """The rule that says how a tensor lies, as text. KeyError when there is no such tensor."""
        return self._said.get(name) or str(self.rule_of(name))

    def rule_of(self, name: str) -> Rule:
        """The rule that matched a tensor, which may be a tied name. KeyError when there is none of that name."""
        return self._rules[name]

    def cut(self, name: str) -> str:
        """How a tensor is cut, in the words of a manifest where they can say it: `S(0)@dp R@tp`."""
        if name in self._said:
            return self._said[name]
        logical = next(logical for logical in self._of[name] if logical.rule.tied is None)
        words = []
        for axis, mesh_name in enumerate(self.mesh.names):
            words.append(f"{self._word(logical, axis)}@{mesh_name}")
        return " ".join(words)

    def _word(self, logical: Logical, axis: int) -> str:
        """What an axis does to a tensor. Only what a manifest knows is told so that it is taken up again."""
        rule, mine = logical.rule, self.mesh.names[axis]
        flat = logical.by.flat
        if flat is not None and axis in self._flat_axes[flat]:
            return "flat"
        if rule.boxes is not None and mine in rule.boxes.axes:
            return "boxes"
        if axis in self._relevant(logical) and mine not in rule.cut_axes:
            return "placed"
        others = rule.pads or rule.join is not None or rule.split or rule.stack or rule.unstack
        for number, cut in enumerate(rule.cuts):
            if mine not in cut.axes:
                continue
            special = (cut.parts, cut.sizes, cut.lists, cut.groups)
            if others or len(cut.axes) > 1 or cut.unit > 1 or any(how is not None for how in special):
                return f"cut({cut.dim})"
            # as torch says it: what axes to the right have cut before is cut anew in each of their pieces
            before = [
                self.mesh.names.index(each)
                for each in itertools.chain.from_iterable(
                    other.axes for other in rule.cuts[:number] if other.dim == cut.dim
                )
            ]
            pieces = math.prod(self.mesh.shape[other] for other in before if other > axis)
            return f"SS({cut.dim},{pieces})" if pieces > 1 else f"S({cut.dim})"
        return "R"

    # --- the check

    def check(self) -> None:
        """Check that the ranks hold each element of each tensor, once but for copies, and that names on a rank differ.

        LayoutError shows the rule and the tensor, and where the hole or overlap is.
        """
        whole = self._check_names()
        # a check for each shape under each rule: where tensors are stacked or placed makes no difference to their boxes
        known: set[tuple[object, ...]] = set()
        for name, shape in self.tensors.items():
            if name in self.aliases:
                continue
            homes = [logical for logical in self._of.get(name, ()) if logical.rule.tied is None]
            if not homes:  # unstacked, and there is nothing of it
                continue
            logical = homes[0]
            position = next(names.index(name) for names in logical.sources.values() if name in names)
            key = (id(logical.rule), logical.shapes, position, shape)
            if key in known:
                continue
            known.add(key)
            holders = itertools.chain.from_iterable(self._before_flat(logical, name) for logical in homes)
            boxes = [holder.piece.box for holder in holders if not holder.piece.copy]
            offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), len(shape))
            sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), len(shape))
            try:
                check_cover(shape, offsets, sizes)
            except CoverageError as error:
                raise self._error(logical, str(error), name) from None
        for flat in self._flats:
            self._check_order(flat)
        # each element of what is flattened is in one place of its buffer, and in one stretch of that, so there is no
        # more to check than that buffers can be made
        owners: dict[str, str] = {}
        for flat, shared in self._shared_axes.items():
            for where in self._wheres({axis: tuple(range(self.mesh.shape[axis])) for axis in shared}):
                for buffer in self._plan(flat, tuple(index or 0 for index in where))[0].values():
                    logical = buffer.entries[0].logical
                    if buffer.name in whole or owners.setdefault(buffer.name, flat) != flat:
                        raise self._error(logical, f"a rank has two tensors of the name {buffer.name!r}")

    def _check_order(self, name: str) -> None:
        """Refuse patterns of a buffer's order that match nothing on any rank; on some ranks of a pipeline they may."""
        flat = self._flats[name]
        locals_of = {logical.local for logical in self._in[name]}
        for text in flat.order if isinstance(flat.order, tuple) else ():
            if text not in locals_of and all(Pattern(text).match(local) is None for local in locals_of):
                raise LayoutError(
                    f"{self._where}: [flat.{name}] {toml_of(flat)} has {text!r} in its order, and no tensor that goes "
                    "there has a name on the ranks that matches it"
                )

    def _check_names(self) -> set[str]:
        """The names of ranks' tensors that are not flattened."""
        named: dict[str, list[Logical]] = {}
        for logical in self._logicals:
            for other in named.setdefault(logical.local, []):
                meet = all(
                    set(other.at[axis]) & set(indices) for axis, indices in logical.at.items() if axis in other.at
                )
                if meet:
                    raise LayoutError(
                        f"{self._where}: the tensors {other.name!r} and {logical.name!r} overlap: on the same ranks"
                        f" both are called {logical.local!r}, by\n  {other.by}\n  {logical.by}",
                        tensor=logical.name,
                    )
            named[logical.local].append(logical)
        return {name for name, logicals in named.items() if any(logical.by.flat is None for logical in logicals)}

    def _error(self, logical: Logical, why: str, name: str | None = None) -> LayoutError:
        name = name if name is not None else logical.name
        said = self._said.get(name) or str(logical.by)
        return LayoutError(f"{self._where}: {said} and the tensor {name!r}: {why}", tensor=name)

    # --- working it out

    def _positions(self, axes: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.mesh.names.index(axis) for axis in axes)

    def _relevant(self, logical: Logical) -> dict[int, tuple[int, ...]]:
        """The axes on which it matters where a rank stands, and where on them the tensor is."""
        axes = self._axes.get(id(logical))
        if axes is None:
            axes = dict(logical.at)
            over = list(self._positions(logical.rule.cut_axes))
            over += [stack.axis for stack in logical.stacks if stack.axis is not None]
            for axis in over:
                axes[axis] = tuple(range(self.mesh.shape[axis]))
            self._axes[id(logical)] = axes
        return axes

    def _axes_of(self, flat: str) -> tuple[int, ...]:
        """The axes, but for its own, on which buffers differ."""
        own = self._flat_axes[flat]
        axes: set[int] = set()
        for logical in self._in[flat]:
            mine = self._relevant(logical)
            for axis in own:
                if axis in mine:
                    name = self.mesh.names[axis]
                    raise self._error(logical, f"it uses the axis {name!r}, and [flat.{flat}] cuts over the same")
            axes |= mine.keys()
        return tuple(sorted(axes))

    def _wheres(self, axes: Mapping[int, Sequence[int]]) -> Iterator[Where]:
        choices: list[Sequence[int | None]] = [axes.get(axis, (None,)) for axis in range(len(self.mesh.shape))]
        return itertools.product(*choices)

    def _stands(self, logical: Logical, coordinate: Sequence[int]) -> bool:
        return all(coordinate[axis] in indices for axis, indices in logical.at.items())

    def _is_copy(self, logical: Logical, coordinate: Sequence[int], shared: Sequence[int] = ()) -> bool:
        """Whether the tensor there is one more of what is elsewhere already."""
        if logical.rule.tied is not None or any(coordinate[axis] != at[0] for axis, at in logical.at.items()):
            return True
        mine = self._relevant(logical)
        return any(coordinate[axis] for axis in shared if axis not in mine)

    def _core(self, logical: Logical, coordinate: Sequence[int]) -> Core:
        rule = logical.rule
        ranks = []
        for pad in rule.pads:
            factor = self.mesh.shape[self.mesh.names.index(pad.per)] if pad.per is not None else 1
            ranks.append((factor, 0))
        for over in [cut.axes for cut in rule.cuts] if rule.boxes is None else [rule.boxes.axes]:
            count, index = 1, 0
            for axis in self._positions(over):
                size = self.mesh.shape[axis]
                count, index = count * size, index * size + coordinate[axis]
            ranks.append((count, index))
        key = (id(rule), logical.shapes, logical.window, tuple(ranks))
        core = self._cores.get(key)
        if core is None:
            try:
                core = lower(rule, logical.shapes, logical.window, ranks)
            except MisfitError as error:
                shapes = " and ".join(str(list(shape)) for shape in logical.shapes)
                raise self._error(logical, f"{error} (on the mesh {self.mesh}, of shape {shapes})") from None
            self._cores[key] = core
        return core

    def _stacked(self, logical: Logical, coordinate: Sequence[int]) -> list[Sequence[int]]:
        return [stack.lists[0 if stack.axis is None else coordinate[stack.axis]] for stack in logical.stacks]

    def _cut(
        self, logical: Logical, coordinate: Sequence[int], only: str | None = None, shared: Sequence[int] = ()
    ) -> _CutThere:
        """What ranks there hold before it is flattened; of what is stacked, just what has a tensor, if one is named."""
        core = self._core(logical, coordinate)
        copy = self._is_copy(logical, coordinate, shared)
        if not logical.stacks:
            return _CutThere(core, logical.sources[()], copy)
        lists = self._stacked(logical, coordinate)
        zeros, ones = (0,) * len(lists), (1,) * len(lists)
        names: list[str] = []
        placed: list[Placed] = []
        for place in itertools.product(*(range(len(numbers)) for numbers in lists)):
            joined = logical.sources[tuple(numbers[at] for numbers, at in zip(lists, place, strict=True))]
            if only is not None and only not in joined:
                continue
            placed += [
                Placed(len(names) + source, zeros + offsets, ones + sizes, place + at, one_more)
                for source, offsets, sizes, at, one_more in core.placed
            ]
            names += joined
        return _CutThere(Core((*map(len, lists), *core.shape), placed), names, copy)

    def _pieces(self, logical: Logical, cut: _CutThere, placed: Sequence[Placed], base: int) -> Iterator[Piece]:
        strides = strides_of(cut.core.shape)
        lead = logical.lead
        stacked = len(logical.stacks)
        ones, zeros = (1,) * len(lead), (0,) * len(lead)
        for source, offsets, sizes, at, one_more in placed:
            start = base + sum(map(mul, at, strides))
            box = Box(lead + offsets[stacked:], ones + sizes[stacked:])
            yield Piece(cut.names[source], box, start, zeros + strides[stacked:], cut.copy or one_more)

    # --- flat buffers

    def _key(self, flat: str, coordinate: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Which stretch of its buffers a rank has, and a coordinate that stands for all ranks with the same buffers."""
        part = 0
        for axis in self._flat_axes[flat]:
            part = part * self.mesh.shape[axis] + coordinate[axis]
        shared = self._shared_axes[flat]
        return part, tuple(index if axis in shared else 0 for axis, index in enumerate(coordinate))

    def _plan(self, flat: str, key: tuple[int, ...]) -> tuple[dict[str, Buffer], dict[int, tuple[Buffer, Entry]]]:
        plan = self._buffers.get((flat, key))
        if plan is None:
            parts = math.prod(self.mesh.shape[axis] for axis in self._flat_axes[flat])
            inside = []
            for logical in self._in[flat]:
                if self._stands(logical, key):
                    shape = (*map(len, self._stacked(logical, key)), *self._core(logical, key).shape)
                    inside.append((logical, shape))
            where = f"{self._where}: [flat.{flat}]"
            buffers = buffers_of(where, self._flats[flat], inside, parts)
            entries = {id(entry.logical): (buffer, entry) for buffer in buffers.values() for entry in buffer.entries}
            plan = self._buffers[flat, key] = buffers, entries
        return plan

    def _stretch(self, entry: Entry, cut: _CutThere, start: int, stop: int) -> Iterator[Piece]:
        """The pieces of a tensor in a buffer that lie in the stretch [start, stop) of it."""
        low, high = max(start, entry.start), min(stop, entry.start + entry.numel)
        if low >= high:
            return iter(())
        placed = within(cut.core, low - entry.start, high - entry.start)
        return self._pieces(entry.logical, cut, placed, entry.start - start)
