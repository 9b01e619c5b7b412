"""Layouts: how a framework cuts tensors over the ranks of a mesh, in Python or TOML, and what that comes to."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Shape
from ckpt_formats.layout.matching import Found, Logical, find
from ckpt_formats.layout.mesh import Mesh
from ckpt_formats.layout.patterns import Pattern
from ckpt_formats.layout.resolved import Resolved
from ckpt_formats.layout.rules import Cut, Flat, Rule, Spread
from ckpt_formats.layout.short import Cuts, Tables, checked, cut_words, cuts_of
from ckpt_formats.layout.words import from_tree, key_text, to_tree, toml_of

__all__ = ["Layout"]

_WORDS = frozenset({"rule", "otherwise", "spread", "flat"})


@dataclass(frozen=True)
class Layout:
    """Rules that say how tensors lie on the ranks of a mesh; or the short form, tables of dimensions for its axes.

    The empty layout is the short form with only what is usual.
    """

    tables: Tables = field(default_factory=dict)
    """The short form: axis -> pattern -> dimension, or "replicate" (ckpt_formats.layout.short)."""
    rules: Sequence[Rule] = ()
    otherwise: Rule | None = None
    """What holds for tensors that no rule matches. Without it, such a tensor is an error, unless it is 0-d (then it is
    replicated) or an optimizer's slot that has the shape of its parameter (then it lies as that does)."""
    spread: Mapping[str, Spread] = field(default_factory=dict)
    """For captures of patterns, how the numbers that they capture are spread over an axis."""
    flat: Mapping[str, Flat] = field(default_factory=dict)
    """Flat buffers by the name under which rules speak of them."""
    where: str = field(default="the layout", kw_only=True, compare=False)
    """What messages call it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.tables and self.is_language:
            raise LayoutError(
                f"{self.where} has rules and the short form's table [{next(iter(self.tables))}]; say all of it by rules"
            )
        checked(self.where, self.tables)
        for rule in (*self.rules, *([self.otherwise] if self.otherwise is not None else [])):
            self._check(rule)
        for name, flat in self.flat.items():
            if not any(rule.flat == name for rule in (*self.rules, self.otherwise) if rule is not None):
                raise LayoutError(f"{self.where}: no rule speaks of [flat.{name}] {toml_of(flat)}")

    def _check(self, rule: Rule) -> None:
        try:
            for text in (*rule.patterns, *rule.unless):
                Pattern(text)
        except ValueError as error:
            raise LayoutError(f"{self.where}: {rule}: {error}") from None
        if (rule is self.otherwise) != (not rule.patterns):
            why = "it is for what no rule matches" if rule is self.otherwise else "it has to match something"
            raise LayoutError(f"{self.where}: {rule}: {why}")
        if rule is self.otherwise and (rule.tied or rule.like or rule.join is not None or rule.stack):
            raise LayoutError(f"{self.where}: {rule}: it has no captures, so it can't tie, join or stack")
        if rule.flat is not None and rule.flat not in self.flat:
            raise LayoutError(f"{self.where}: {rule}: there is no [flat.{rule.flat}]")

    @property
    def is_language(self) -> bool:
        """Whether it is made of rules, not of the short form's tables."""
        return bool(self.rules or self.otherwise is not None or self.spread or self.flat)

    # --- TOML

    @classmethod
    def parse(cls, text: str, *, where: str = "the layout") -> Layout:
        """A layout written in TOML. LayoutError, which names `where`, when it is not one."""
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise LayoutError(f'{where} is not TOML: {error}; an example:\n[tp]\n"model.*.out.weight" = 1') from None
        try:
            return cls(
                {key: value for key, value in tree.items() if key not in _WORDS},
                [from_tree(Rule, each) for each in _tables(tree, "rule")],
                _otherwise(tree),
                {name: from_tree(Spread, each) for name, each in _named(tree, "spread").items()},
                {name: from_tree(Flat, each) for name, each in _named(tree, "flat").items()},
                where=where,
            )
        except LayoutError as error:
            if where in error.message:
                raise
            raise LayoutError(f"{where}: {error.message}") from None

    @classmethod
    def read(cls, path: str | Path) -> Layout:
        """The layout in a TOML file. LayoutError when it can't be read or is not one."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LayoutError(f"the layout file {path} can't be read: {error}", path=str(path)) from error
        return cls.parse(text, where=f"the layout file {path}")

    def to_toml(self) -> str:
        """The layout as TOML, from which `parse` makes an equal one."""
        lines: list[str] = []

        def table(head: str, tree: Mapping[str, Any]) -> None:
            lines.extend(["", head] if lines else [head])
            lines.extend(f"{key_text(key)} = {toml_of(value)}" for key, value in tree.items())

        for axis, said in self.tables.items():
            table(f"[{key_text(axis)}]", said)
        for name, spread in self.spread.items():
            table(f"[spread.{key_text(name)}]", to_tree(spread))
        for name, flat in self.flat.items():
            table(f"[flat.{key_text(name)}]", to_tree(flat))
        for rule in self.rules:
            table("[[rule]]", to_tree(rule))
        if self.otherwise is not None:
            table("[otherwise]", to_tree(self.otherwise))
        return "\n".join(lines) + "\n" if lines else ""

    # --- what it comes to

    def resolve(
        self,
        mesh: Mesh,
        tensors: Mapping[str, Shape],
        *,
        recorded: Mapping[str, str] | None = None,
        owners: Mapping[str, str] | None = None,
        aliases: Collection[str] = (),
    ) -> Resolved:
        """What it says about tensors on a mesh, checked.

        Args:
            mesh: the ranks.
            tensors: name -> global shape of all tensors of the checkpoint, in their order.
            recorded: name -> cut as the checkpoint's manifest records it; only the short form takes it up.
            owners: name of an optimizer's slot -> name of its parameter. A slot that no rule matches, and that has the
                parameter's shape, lies as the parameter does.
            aliases: further names that tied tensors have, which patterns may speak of.

        LayoutError when a rule or a pattern matches no tensor, two match the same, none does, or one does not fit a
        tensor's shape or the mesh; when an axis is unknown; or when what comes out leaves holes or overlaps.
        """
        if self.is_language:
            self._require_axes(mesh)
            found = find(self.where, mesh, tensors, self.rules, self.otherwise, self.spread, owners or {}, aliases)
            resolved = Resolved(mesh, tensors, found, self.flat, {}, self.where)
        else:
            found, said = _found(mesh, tensors, self.cuts(mesh, tensors, recorded=recorded, owners=owners))
            resolved = Resolved(mesh, tensors, found, {}, said, self.where)
        resolved.check()
        return resolved

    def cuts(
        self,
        mesh: Mesh,
        tensors: Mapping[str, Shape],
        *,
        recorded: Mapping[str, str] | None = None,
        owners: Mapping[str, str] | None = None,
    ) -> dict[str, Cuts]:
        """How each tensor is cut on the mesh, by the short form; arguments as those of `resolve`.

        LayoutError when a table is for no axis of the mesh, a pattern matches no tensor, patterns disagree about a
        tensor, a tensor has not the dimension that a rule cuts, or nothing says what an axis cuts.
        """
        return cuts_of(self.where, self.tables, mesh, tensors, recorded or {}, owners or {})

    def _require_axes(self, mesh: Mesh) -> None:
        def require(axis: str, said: object) -> None:
            if axis not in mesh.names:
                raise LayoutError(f"{self.where}: {said} speaks of the axis {axis!r}, which the mesh {mesh} has not")

        for rule in (*self.rules, *([self.otherwise] if self.otherwise is not None else [])):
            for axis in (*rule.cut_axes, *rule.on, *(pad.per for pad in rule.pads if pad.per is not None)):
                require(axis, rule)
        for name, spread in self.spread.items():
            require(spread.axis, f"[spread.{name}] {toml_of(spread)}")
        for name, flat in self.flat.items():
            for axis in flat.axes:
                require(axis, f"[flat.{name}] {toml_of(flat)}")


def _tables(tree: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    tables = tree.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(each, Mapping) for each in tables):
        raise LayoutError(f"{key!r} has to be tables, each headed [[{key}]]")
    return tables


def _named(tree: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    tables = tree.get(key, {})
    if not isinstance(tables, Mapping) or not all(isinstance(each, Mapping) for each in tables.values()):
        raise LayoutError(f"{key!r} has to be tables with a name each, headed as [{key}.name]")
    return tables


def _otherwise(tree: Mapping[str, Any]) -> Rule | None:
    otherwise = tree.get("otherwise")
    if otherwise is None:
        return None
    if not isinstance(otherwise, Mapping):
        raise LayoutError("'otherwise' has to be a table, headed [otherwise]")
    return from_tree(Rule, otherwise)


def _found(mesh: Mesh, tensors: Mapping[str, Shape], cuts: Mapping[str, Cuts]) -> tuple[Found, dict[str, str]]:
    """The short form in the words of the language: a rule for each way of cutting."""
    found = Found()
    said: dict[str, str] = {}
    rules: dict[Cuts, tuple[Rule, str]] = {}
    for name, shape in tensors.items():
        dims = cuts[name]
        if dims not in rules:
            cut = [Cut(axis=axis, dim=dim) for axis, dim in zip(mesh.names, dims, strict=True) if dim is not None]
            rules[dims] = Rule(match="*", cut=tuple(reversed(cut))), cut_words(dims, mesh)
        rule, said[name] = rules[dims]
        found.rules[name] = rule
        found.logicals.append(
            Logical(rule=rule, by=rule, local=name, captures={}, sources={(): (name,)}, shapes=(shape,))
        )
    return found, said
