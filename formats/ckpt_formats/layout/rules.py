"""The words of the layout language: what a rule can say. docs/layout.md tells it with examples.

All are frozen dataclasses, checked and made uniform when they are made: a list or a single value where several may
stand becomes a tuple, and what can't be is a LayoutError that says where. Knows no meshes' sizes and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from ckpt_formats.errors import FormatError
from ckpt_formats.geometry import Box
from ckpt_formats.layout.patterns import Pattern, fields_of
from ckpt_formats.layout.words import (
    Check,
    UnfitError,
    Word,
    among,
    either,
    flag,
    made,
    number,
    one_or_several,
    several,
    text,
    to_tree,
    toml_of,
)

__all__ = ["Boxes", "Cut", "Flat", "Held", "Pad", "Part", "Rule", "Split", "Spread"]

_MOST = 1 << 20
"""Layers, experts and the like that there can be."""

_numbers = several(number(0), "a list of integers", 1)
_widths = several(number(1), "a list of widths", 1)
_lists = several(several(number(0), "a list of integers"), "a list of lists of integers", 1)
_texts = one_or_several(text, str, "a text or a list of texts")
_any_texts = one_or_several(text, str, "a text or a list of texts", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Word):
    """One part of a fused dimension."""

    width: int
    """Elements of the dimension that it has in the whole tensor."""
    pieces: int | None = None
    """How many pieces it is cut in, when these are fewer than ranks: then neighbours hold the same piece."""
    sizes: Sequence[int] | None = None
    """How much of it each rank gets, when that is not as even as can be."""

    WORD: ClassVar[str] = "a part"
    CHECKS: ClassVar[Mapping[str, Check]] = {"width": number(1), "pieces": number(1), "sizes": _numbers}

    def tree(self) -> Any:
        return self.width if self.pieces is None and self.sizes is None else to_tree(self)

    def check(self) -> None:
        if self.pieces is not None and self.sizes is not None:
            raise self.refuse("say pieces or sizes, not both")
        if self.sizes is not None and sum(self.sizes) != self.width:
            raise self.refuse(f"its sizes make {sum(self.sizes)} together, not its width")


def _part(value: Any) -> Part:
    if isinstance(value, int) and not isinstance(value, bool):
        return Part(width=value)
    return cast("Part", made(Part)(value))


_parts = either(
    several(_part, "a list of widths, each a number or a table of width, pieces, sizes", 1),
    number(1),
    among("joined"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Word):
    """A dimension is cut over an axis of the mesh, or over several as if they were one, the first varying slowest.

    Each rank gets a stretch of ceil(extent / ranks), the last ones less or nothing, as torch.chunk and FSDP2 do it,
    unless something else is said.
    """

    axis: Sequence[str] | str
    dim: int
    parts: Sequence[Part | int | Mapping[str, Any]] | int | Literal["joined"] | None = None
    """The dimension is made of parts of these widths, each of which is cut, and a rank holds its share of every part,
    one after the other. A number: so many equal parts. "joined": the parts are the tensors that the rule joins."""
    groups: int | None = None
    """Each part is made of so many groups; ranks get whole groups, and hold them interleaved: of the first group its
    piece of every part, then of the second, as Megatron holds query, key and value."""
    unit: int = 1
    """Ranks get whole multiples of this, such as the width of a head."""
    sizes: Sequence[int] | None = None
    """How much each rank gets, when that is not as even as can be."""
    lists: Sequence[Sequence[int]] | None = None
    """For each rank the indices that it holds, in its order, such as experts of a stacked tensor."""
    even: bool = False
    """Refuse what does not cut evenly, as Megatron does."""

    WORD: ClassVar[str] = "a cut"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "axis": _texts,
        "dim": number(0),
        "parts": _parts,
        "groups": number(1),
        "unit": number(1),
        "sizes": _numbers,
        "lists": _lists,
        "even": flag,
    }

    @property
    def axes(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.axis)

    def check(self) -> None:
        if sum(how is not None for how in (self.parts, self.sizes, self.lists)) > 1:
            raise self.refuse("say one of parts, sizes and lists")
        if self.groups is not None and self.parts is None:
            raise self.refuse("groups interleave parts; say the parts too")
        special = isinstance(self.parts, tuple) and any(
            part.pieces is not None or part.sizes is not None for part in cast("tuple[Part, ...]", self.parts)
        )
        if self.groups is not None and (special or self.unit != 1):
            raise self.refuse("groups are cut whole; parts of theirs can't have pieces or sizes, nor a unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pad(Word):
    """A dimension is padded before it is cut. Padding is of no tensor: whatever is there is ignored."""

    dim: int
    to: int | None = None
    """The extent with padding."""
    multiple: int | None = None
    """Or what it is padded to a multiple of,"""
    per: str | None = None
    """times the size of this axis of the mesh."""

    WORD: ClassVar[str] = "a padding"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "dim": number(0),
        "to": number(0),
        "multiple": number(1),
        "per": text,
    }

    def check(self) -> None:
        if (self.to is None) == (self.multiple is None):
            raise self.refuse("say either the extent that it pads to, or a multiple")
        if self.per is not None and self.multiple is None:
            raise self.refuse("per belongs to a multiple")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Word):
    """A tensor is several on the ranks: parts of these widths of a dimension, before anything is cut."""

    dim: int
    widths: Sequence[int]

    WORD: ClassVar[str] = "a split"
    CHECKS: ClassVar[Mapping[str, Check]] = {"dim": number(0), "widths": _widths}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Word):
    """A box that a rank holds, written as `[0:4,8:16]`."""

    box: str
    at: Sequence[int] | None = None
    """Where its lowest corner lies in the rank's tensor; the corner of that if nothing is said."""

    WORD: ClassVar[str] = "a box"
    CHECKS: ClassVar[Mapping[str, Check]] = {"box": text, "at": several(number(0), "a list of integers")}

    def tree(self) -> Any:
        return self.box if self.at is None else to_tree(self)

    def check(self) -> None:
        try:
            parsed = Box.parse(self.box)
        except FormatError as error:
            raise self.refuse(error.message) from None
        if self.at is not None and len(self.at) != parsed.ndim:
            raise self.refuse(f"at has {len(self.at)} dimensions, and the box {parsed.ndim}")


def _held(value: Any) -> Held:
    return Held(box=value) if isinstance(value, str) else cast("Held", made(Held)(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes(Word):
    """What each rank of an axis, or of a group of axes, holds, box by box: for what no cut says."""

    axis: Sequence[str] | str
    held: Sequence[Sequence[Held | str | Mapping[str, Any]]]
    """For each rank its boxes."""
    shapes: Sequence[Sequence[int]] | None = None
    """For each rank the shape of its tensor; the smallest in which its boxes lie if nothing is said."""

    WORD: ClassVar[str] = "boxes"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "axis": _texts,
        "held": several(several(_held, "a list of boxes"), "a list of boxes for each rank", 1),
        "shapes": _lists,
    }

    @property
    def axes(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.axis)

    def check(self) -> None:
        if self.shapes is not None and len(self.shapes) != len(self.held):
            raise self.refuse(f"it has {len(self.shapes)} shapes and boxes for {len(self.held)} ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread(Word):
    """How the numbers in names (of layers, of experts) are spread over an axis: pipeline stages, expert parallelism."""

    axis: str
    lists: Sequence[Sequence[int]] | None = None
    """For each stage its numbers, in the order in which it counts them itself from 0 on."""
    count: int | None = None
    """Or how many there are, from 0 on, the same number for each stage, in order."""
    chunks: int = 1
    """Stages of each rank: interleaved pipelines have several."""
    order: Literal["loop", "v"] = "loop"
    """Which they are: of P ranks the rank p has stages p, P+p, 2P+p and so on; or "v", back and forth."""

    WORD: ClassVar[str] = "a spread"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "axis": text,
        "lists": _lists,
        "count": number(1, _MOST),
        "chunks": number(1),
        "order": among("loop", "v"),
    }

    def check(self) -> None:
        if (self.lists is None) == (self.count is None):
            raise self.refuse("say either the lists of numbers, or their count")
        homes: dict[int, int] = {}
        for stage, numbers in enumerate(self.lists or ()):
            for each in numbers:
                if each in homes:
                    raise self.refuse(f"the number {each} is in the lists {homes[each]} and {stage}: an overlap")
                homes[each] = stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat(Word):
    """What the ranks hold after all cuts is flattened, laid into buffers, and the buffers are cut over an axis.

    Each rank gets an equal stretch of each buffer, which is padded at its end for that.
    """

    axis: Sequence[str] | str
    name: str
    """The name of the buffer, and of the stretch of it on a rank. Tensors for which different names come out lie in
    different buffers. Besides captures, {name} is a tensor's own local name and {bucket} counts buckets."""
    order: Sequence[str] | Literal["given", "reverse", "name"] = "given"
    """In which order tensors lie there: as the checkpoint lists them, the other way round, by local name; or a list of
    patterns of local names, each matching one or more tensors (these then by name), together all."""
    align: int = 1
    """Each tensor begins at a multiple of so many elements."""
    total_multiple: int = 1
    """The buffer with its padding has a multiple of so many elements."""
    share_multiple: int = 1
    """Each rank's stretch has a multiple of so many elements."""
    ragged: bool = False
    """No padding at the end: stretches of ceil(elements / ranks) until they run out."""
    bucket: int | None = None
    """A buffer is closed once it has so many elements, and the next one begun. The name needs {bucket}."""

    WORD: ClassVar[str] = "a flat buffer"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "axis": _texts,
        "name": text,
        "order": either(among("given", "reverse", "name"), several(text, "a list of patterns", 1)),
        "align": number(1),
        "total_multiple": number(1),
        "share_multiple": number(1),
        "ragged": flag,
        "bucket": number(1),
    }

    @property
    def axes(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.axis)

    def check(self) -> None:
        try:
            used = fields_of(self.name)
            for pattern in self.order if isinstance(self.order, tuple) else ():
                Pattern(pattern)
        except ValueError as error:
            raise self.refuse(str(error)) from None
        if (self.bucket is not None) != ("bucket" in used):
            raise self.refuse("a bucket's size and {bucket} in the name belong together")
        if self.ragged and (self.total_multiple > 1 or self.share_multiple > 1):
            raise self.refuse("what is ragged has no padding, so multiples mean nothing")


def _on(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping) or not value:
        raise UnfitError("a table of axes and the indices there, such as {pp = [0, -1]}")
    check = several(number(-(2**62)), "a table of axes and lists of indices, such as {pp = [0, -1]}", 1)
    return {text(axis): check(indices) for axis, indices in value.items()}


_HOW: Mapping[str, Check] = {
    "match": _texts,
    "unless": _any_texts,
    "local": _texts,
    "on": _on,
    "join": number(0),
    "split": made(Split),
    "stack": _any_texts,
    "unstack": _any_texts,
    "pad": one_or_several(made(Pad), Pad, "a table of dim and to or multiple, or a list of them", 0),
    "cut": one_or_several(made(Cut), Cut, "a table of axis and dim, or a list of them", 0),
    "boxes": made(Boxes),
    "flat": text,
    "tied": text,
    "like": text,
    "replicas": among("equal", "first", "average"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Word):
    """How the tensors that match a pattern lie on the ranks. What it does not mention an axis for is replicated over
    it."""

    match: Sequence[str] | str = ()
    """Patterns of global names (ckpt_formats.layout.patterns)."""
    unless: Sequence[str] | str = ()
    """Patterns of names that it leaves to other rules."""
    local: Sequence[str] | str | None = None
    """What the tensor is called on a rank, if not by its global name: a template. Of a capture that is spread,
    {layer} is the rank's own count, {layer.number} the global number, {layer.chunk} which of the rank's stages it
    is."""
    on: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Axis -> where on it the tensor is at all; negative numbers count from the end. Several places hold the same."""
    join: int | None = None
    """The patterns of `match` name one tensor each, and ranks hold these joined along this dimension."""
    split: Split | None = None
    """Ranks hold the tensor as several, with a name in `local` for each."""
    stack: Sequence[str] | str = ()
    """Captures that are leading dimensions on the ranks: a tensor per layer here, a tensor of layers there."""
    unstack: Sequence[str] | str = ()
    """The other way round: leading dimensions that are numbers on the ranks."""
    pad: Sequence[Pad] | Pad = ()
    cut: Sequence[Cut] | Cut = ()
    """One after the other: a later one cuts what the former ones have left to a rank."""
    boxes: Boxes | None = None
    """What ranks hold, box by box, instead of cuts."""
    flat: str | None = None
    """The flat buffer into which goes what the cuts have left."""
    tied: str | None = None
    """The tensor has no elements of its own: it is this one, a template, and lies where this rule says as well."""
    like: str | None = None
    """It lies as this other tensor, a template; for slots of optimizers. {like} in `local` is the other's local
    name."""
    replicas: Literal["equal", "first", "average"] = "equal"
    """What holds when ranks that ought to hold the same do not: it is an error, or the lowest rank counts, or the
    mean."""

    WORD: ClassVar[str] = "rule"
    CHECKS: ClassVar[Mapping[str, Check]] = _HOW

    # what is given in any of the accepted forms, as it is kept

    @property
    def patterns(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.match)

    @property
    def locals(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.local or ())

    @property
    def stacked(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.stack)

    @property
    def unstacked(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.unstack)

    @property
    def pads(self) -> tuple[Pad, ...]:
        return cast("tuple[Pad, ...]", self.pad)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return cast("tuple[Cut, ...]", self.cut)

    @property
    def cut_axes(self) -> list[str]:
        """The axes that it cuts over."""
        axes = [axis for cut in self.cuts for axis in cut.axes]
        return axes + list(self.boxes.axes) if self.boxes is not None else axes

    def __str__(self) -> str:
        return f"rule {toml_of(self)}" if self.match else f"[otherwise] {toml_of(self)}"

    def check(self) -> None:
        names = len(self.split.widths) if self.split is not None else 1
        if self.local is not None and len(self.locals) != names:
            raise self.refuse(f"local has {len(self.locals)} names for {names} tensors on a rank")
        renamed = self.join is not None or self.split is not None or self.stack or self.unstack
        if renamed and self.local is None and self.like is None:
            raise self.refuse("what it makes of tensors needs a name on the ranks; say it as local")
        if self.join is not None and len(self.patterns) < 2:
            raise self.refuse("join needs a pattern for each tensor that it joins")
        try:
            for template in (*self.locals, self.tied or "", self.like or ""):
                fields_of(template)
        except ValueError as error:
            raise self.refuse(str(error)) from None
        if self.like is not None and (renamed or self.on or self.pad or self.cut or self.boxes or self.tied):
            raise self.refuse("a tensor that lies as another one is cut as that one; say only local, flat and replicas")
        if self.join is None and any(cut.parts == "joined" for cut in self.cuts):
            raise self.refuse('parts = "joined" speaks of tensors that a rule joins; say join too')
        if self.tied is not None and (self.join is not None or self.split is not None or self.stack or self.unstack):
            raise self.refuse("a tied tensor can't be joined, split or stacked")
        for cut in self.cuts:
            if len(set(cut.axes)) < len(cut.axes):
                raise self.refuse(f"{toml_of(cut)} names an axis twice")
        if self.boxes is not None and (self.cut or self.pad or self.join is not None or self.split is not None):
            raise self.refuse("boxes say all of what ranks hold; leave out cut, pad, join and split")
        over = self.cut_axes
        for axis in over:
            if over.count(axis) > 1 or axis in self.on:
                raise self.refuse(f"it uses the axis {axis!r} twice")
