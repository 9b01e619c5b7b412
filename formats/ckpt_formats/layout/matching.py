"""Which rule says how each tensor lies on the ranks, and what it makes of them: one, several, or part of one.

Every tensor is matched by exactly one rule. There is no precedence among rules: two that match are an error that shows
both, and `unless` makes one of them narrower. Only [otherwise] takes what no rule matches. A rule or a pattern that
matches nothing is an error too. Knows names, shapes and a mesh, not what a rank's memory looks like.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Interval, Shape
from ckpt_formats.layout.mesh import Mesh
from ckpt_formats.layout.patterns import Captures, Pattern, fields_of, render
from ckpt_formats.layout.rules import Rule, Spread
from ckpt_formats.layout.spreads import Numbers, numbers_of
from ckpt_formats.layout.words import toml_of

__all__ = ["Found", "Logical", "find"]


class Stack(NamedTuple):
    """A leading dimension on the ranks: which numbers are at its indices."""

    axis: int | None
    lists: Sequence[Sequence[int]]
    """By index on the axis; one list for all when it is spread over none."""


@dataclass(slots=True, eq=False)
class Logical:
    """What becomes one tensor on a rank, before it is flattened: usually one tensor of the checkpoint."""

    rule: Rule
    """Says how it is cut."""
    by: Rule
    """The rule that matched; another one when it says that this lies like something else."""
    local: str
    """Its name on the ranks."""
    captures: Mapping[str, str]
    sources: Mapping[tuple[int, ...], tuple[str, ...]]
    """Numbers that are stacked (none: the empty tuple) -> names of the tensors that are joined."""
    shapes: tuple[Shape, ...]
    """Of the tensors that are joined, without leading dimensions that are unstacked."""
    lead: tuple[int, ...] = ()
    """Indices in leading dimensions that are unstacked."""
    window: Interval | None = None
    """Part of the dimension that a rule splits."""
    at: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Axis of the mesh -> where on it this is at all; in all these places the same."""
    stacks: tuple[Stack, ...] = ()

    @property
    def name(self) -> str:
        """The first of its tensors."""
        return next(iter(self.sources.values()))[0]


@dataclass(slots=True)
class Found:
    """What was found for all tensors."""

    logicals: list[Logical] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied name -> the name of the tensor that it is."""
    rules: dict[str, Rule] = field(default_factory=dict)
    """Name -> the rule that matched it; tied names included."""


class _Match(NamedTuple):
    rule: Rule
    by: Rule
    position: int
    """Which of the patterns that are joined."""
    captures: Captures
    key: tuple[object, ...]
    """What tensors that become one on the ranks have in common."""
    leader: str = ""
    """The tensor that this one lies as, if it does."""


class _Group(NamedTuple):
    match: _Match
    members: dict[tuple[int, ...], dict[int, str]]


def find(
    where: str,
    mesh: Mesh,
    tensors: Mapping[str, Shape],
    rules: Sequence[Rule],
    otherwise: Rule | None,
    spread: Mapping[str, Spread],
    owners: Mapping[str, str],
    aliases: Collection[str],
) -> Found:
    """Match rules with tensors. LayoutError as this module's docstring says, and when numbers are nowhere.

    A pattern that matches one of `aliases`, further names of the tensors, has its use.
    """
    finder = _Finder(where, mesh, tensors, rules, otherwise, spread)
    return finder.find(owners, aliases)


class _Finder:
    def __init__(
        self,
        where: str,
        mesh: Mesh,
        tensors: Mapping[str, Shape],
        rules: Sequence[Rule],
        otherwise: Rule | None,
        spread: Mapping[str, Spread],
    ) -> None:
        self._where = where
        self._mesh = mesh
        self._tensors = tensors
        self._rules = rules
        self._otherwise = otherwise
        self._spread = spread
        self._numbers = {capture: numbers_of(where, mesh, capture, said) for capture, said in spread.items()}
        self._seen: dict[str, set[int]] = {capture: set() for capture in spread}
        self._found = Found()
        self._matches: dict[str, _Match] = {}

    def error(self, rule: Rule, name: str, why: str) -> LayoutError:
        return LayoutError(f"{self._where}: {rule} and the tensor {name!r}: {why}", tensor=name)

    def find(self, owners: Mapping[str, str], aliases: Collection[str]) -> Found:
        self._match_all(owners)
        # names of ties that rules enter are among what was matched
        self._check_unused(dict.fromkeys((*self._matches, *aliases)))
        for alias, target in self._found.aliases.items():
            if target in self._found.aliases:
                rule = self._matches[alias].rule
                raise self.error(rule, alias, f"it is tied to {target!r}, which is tied itself")
        self._found.rules.update((name, match.by) for name, match in self._matches.items())
        groups: dict[tuple[object, ...], _Group] = {}
        for name in [*self._tensors, *(alias for alias in self._found.aliases if alias not in self._tensors)]:
            match = self._matches[name]
            group = groups.setdefault((id(match.rule), id(match.by), match.key), _Group(match, {}))
            numbers = tuple(self._number(match, name, capture) for capture in match.rule.stacked)
            joined = group.members.setdefault(numbers, {})
            if match.position in joined:
                raise self.error(match.rule, name, f"it can't be told from {joined[match.position]!r}; capture more")
            joined[match.position] = name
        for group in groups.values():
            self._found.logicals.extend(self._logicals(group))
        for capture, spread in self._numbers.items():
            self._used(capture, spread)
        return self._found

    def _used(self, capture: str, numbers: Numbers) -> None:
        said = f"{self._where}: [spread.{capture}] {toml_of(self._spread[capture])}"
        if not self._seen[capture]:
            raise LayoutError(f"{said} is used by no rule; write {{{capture}}} in patterns of what it spreads")
        for number in sorted(numbers.homes):
            if number not in self._seen[capture]:
                raise LayoutError(f"{said} has the number {number}, which no tensor that rules match has")

    # --- which rule matches

    def _match_all(self, owners: Mapping[str, str]) -> None:
        compiled = [self._compiled(rule) for rule in self._rules]
        used: set[int] = set()
        followers: list[tuple[str, Rule, Captures]] = []
        left: list[str] = []
        for name in self._tensors:
            hits = [
                (number, *hit) for number, patterns in enumerate(compiled) for hit in self._hits(number, patterns, name)
            ]
            if len(hits) > 1:
                raise self._ambiguous(name, [self._rules[number] for number, _, _ in hits])
            if not hits:
                left.append(name)
                continue
            ((number, position, captures),) = hits
            rule = self._rules[number]
            used.add(number)
            if rule.like is not None:
                followers.append((name, rule, captures))
            else:
                self._enter(name, rule, position, captures)
        for number, rule in enumerate(self._rules):
            if number not in used and not self._named_alias(rule):
                raise LayoutError(
                    f"{self._where}: no tensor of the checkpoint matches {rule}; `ckpt show` lists their names"
                )
        unowned = [name for name in left if not self._owned(name, owners)]
        for name in unowned:
            self._enter_otherwise(name)
        for name, rule, captures in followers:
            self._follow(name, rule, captures)
        # slots of what is joined or stacked are so too, so they have one rule together
        shared: dict[tuple[object, ...], Rule] = {}
        for name in left:
            if name not in self._matches:
                leader = self._matches[owners[name]]
                slot = name.rpartition(".")[2]
                key = (*leader.key, slot)
                named = [text.replace("{", "(").replace("}", ")") for text in (owners[name], slot)]
                local = "{like}." + named[1]
                rule = Rule(match=(name,), like=named[0], local=local, replicas=leader.rule.replicas)
                by = shared.setdefault((id(leader.rule), key), rule)
                self._matches[name] = leader._replace(by=by, key=key, leader=owners[name])

    def _compiled(self, rule: Rule) -> tuple[list[Pattern], list[Pattern]]:
        numbers = {*self._spread, *rule.stacked}
        try:
            return [Pattern(text, numbers) for text in rule.patterns], [Pattern(text, numbers) for text in rule.unless]
        except ValueError as error:
            raise LayoutError(f"{self._where}: {rule}: {error}") from None

    def _check_unused(self, names: Collection[str]) -> None:
        """Refuse patterns without which a layout says the same, as those of misspelt names."""
        for rule in self._rules:
            if len(rule.patterns) == 1 and not rule.unless:
                continue  # it has matched something
            matching, unless = self._compiled(rule)
            # what is joined names the tensor that something is missing beside
            for pattern in matching if rule.join is None else ():
                if pattern.text not in names and all(pattern.match(name) is None for name in names):
                    raise LayoutError(
                        f"{self._where}: no tensor of the checkpoint matches {pattern.text!r} of {rule}; `ckpt show`"
                        " lists their names"
                    )
            for pattern in unless:
                left = (name for name in names if pattern.match(name) is not None)
                if all(each.match(name) is None for name in left for each in matching):
                    raise LayoutError(
                        f"{self._where}: nothing that {rule} matches is left out by {pattern.text!r} of its `unless`;"
                        " mend that pattern or leave it out"
                    )
        if self._otherwise not in (None, Rule()) and all(
            match.rule is not self._otherwise for match in self._matches.values()
        ):
            raise LayoutError(
                f"{self._where}: {self._otherwise} is for nothing, since each tensor has another rule; leave it out, or"
                " make a pattern narrower that takes too much"
            )

    def _hits(
        self, number: int, patterns: tuple[Sequence[Pattern], Sequence[Pattern]], name: str
    ) -> Iterator[tuple[int, Captures]]:
        matching, unless = patterns
        joins = self._rules[number].join is not None
        for position, pattern in enumerate(matching):
            captures = pattern.match(name)
            if captures is None:
                continue
            if any(each.match(name) is not None for each in unless):
                return
            yield (position if joins else 0), captures
            if not joins:
                return

    def _ambiguous(self, name: str, rules: Sequence[Rule]) -> LayoutError:
        if rules[0] is rules[1]:
            return self.error(rules[0], name, "two of the patterns that it joins match; make them narrower")
        return LayoutError(
            f"{self._where}: the tensor {name!r} is matched by two rules:\n  {rules[0]}\n  {rules[1]}\n"
            "Make a pattern narrower, or leave the tensor to the other rule by `unless`",
            tensor=name,
        )

    def _key(self, rule: Rule, name: str, captures: Captures) -> tuple[object, ...]:
        if rule.join is None and not rule.stack:
            return (name,)
        return tuple(sorted(item for item in captures.items() if item[0] not in rule.stack))

    def _enter(self, name: str, rule: Rule, position: int, captures: Captures) -> None:
        if rule.tied is not None:
            self._tie(name, rule, captures)
        self._matches[name] = _Match(rule, rule, position, captures, self._key(rule, name, captures))

    def _enter_otherwise(self, name: str) -> None:
        if self._otherwise is not None:
            self._enter(name, self._otherwise, 0, {})
        elif self._tensors[name]:
            raise LayoutError(
                f"{self._where}: no rule matches the tensor {name!r} of shape {list(self._tensors[name])}; add one, or"
                " an empty [otherwise], which replicates what no rule matches",
                tensor=name,
            )
        else:
            self._enter(name, _REPLICATED, 0, {})

    def _owned(self, name: str, owners: Mapping[str, str]) -> bool:
        """Whether an optimizer's slot that no rule matches lies as its parameter does."""
        owner = owners.get(name, "")
        match = self._matches.get(owner)
        return match is not None and match.rule.tied is None and self._tensors.get(owner) == self._tensors[name]

    def _tie(self, name: str, rule: Rule, captures: Captures) -> None:
        target = self._render(rule.tied or "", captures, rule, name)
        if target not in self._tensors or target == name:
            raise self.error(rule, name, f"it is tied to {target!r}, which is no other tensor of the checkpoint")
        if self._tensors.get(name, self._tensors[target]) != self._tensors[target]:
            raise self.error(rule, name, f"it is tied to {target!r}, which has another shape")
        self._found.aliases[name] = target

    def _named_alias(self, rule: Rule) -> bool:
        """Whether the rule speaks of a tied name that the checkpoint does not list, and which is then entered."""
        if rule.tied is None or any(set(text) & set("*?[{") or text.startswith("re:") for text in rule.patterns):
            return False
        for name in rule.patterns:
            self._enter(name, rule, 0, {})
        return True

    def _follow(self, name: str, rule: Rule, captures: Captures) -> None:
        target = self._render(rule.like or "", captures, rule, name)
        leader = self._matches.get(target)
        if leader is None or leader.rule.tied is not None:
            raise self.error(rule, name, f"it lies as {target!r}, which is no tensor with a rule of its own")
        if self._tensors[name] != self._tensors[target]:
            raise self.error(
                rule,
                name,
                f"it lies as {target!r}, and has the shape {list(self._tensors[name])}, not"
                f" {list(self._tensors[target])}; leave it to another rule by `unless`",
            )
        used = fields_of(rule.like or "")
        own = tuple(sorted(item for item in captures.items() if item[0] not in used))
        self._matches[name] = _Match(
            leader.rule, rule, leader.position, {**leader.captures, **captures}, (*leader.key, own), target
        )

    # --- what becomes of it

    def _number(self, match: _Match, name: str, capture: str) -> int:
        text = match.captures.get(capture)
        if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 18:
            raise self.error(match.rule, name, f"it stacks by {capture!r}, which its pattern captures no number as")
        if capture in self._seen:
            self._seen[capture].add(int(text))
        return int(text)

    def _logicals(self, group: _Group) -> Iterator[Logical]:
        match = group.match
        rule = match.rule
        sources, shapes = self._sources(group)
        first = next(iter(group.members.values()))[0]
        lead = len(rule.unstacked)
        if any(len(shape) < lead for shape in shapes):
            raise self.error(rule, first, f"it has the shape {list(shapes[0])} and can't be unstacked {lead} times")
        heads = {shape[:lead] for shape in shapes}
        if len(heads) > 1:
            raise self.error(rule, first, "what it joins differs in the dimensions that are unstacked")
        if math.prod(next(iter(heads))) > _MOST:
            raise self.error(rule, first, f"it would be unstacked into more than {_MOST} tensors")
        inner = tuple(shape[lead:] for shape in shapes)
        stacks = tuple(
            self._stack(rule, capture, position, sources, first) for position, capture in enumerate(rule.stacked)
        )
        windows: list[Interval | None] = [None]
        if rule.split is not None:
            ends = list(itertools.accumulate(rule.split.widths, initial=0))
            windows = list(itertools.pairwise(ends))
        for every in itertools.product(
            *(sorted({number for each in stack.lists for number in each}) for stack in stacks)
        ):
            if every not in sources:
                said = ", ".join(f"{key} {number}" for key, number in zip(rule.stacked, every, strict=True))
                raise self.error(rule, first, f"there is no tensor of {said} to stack: a hole")
        for numbers in itertools.product(*map(range, heads.pop())):
            captures = {**match.captures, **dict(zip(rule.unstacked, map(str, numbers), strict=True))}
            at, fields = self._place(rule, captures, first)
            for position, window in enumerate(windows):
                yield Logical(
                    rule=rule,
                    by=match.by,
                    local=self._local(match, position, fields, first),
                    captures=fields,
                    sources=sources,
                    shapes=inner,
                    lead=numbers,
                    window=window,
                    at=at,
                    stacks=stacks,
                )

    def _sources(self, group: _Group) -> tuple[dict[tuple[int, ...], tuple[str, ...]], tuple[Shape, ...]]:
        rule = group.match.rule
        count = len(rule.patterns) if rule.join is not None else 1
        sources: dict[tuple[int, ...], tuple[str, ...]] = {}
        shapes: tuple[Shape, ...] | None = None
        for numbers, members in group.members.items():
            some = next(iter(members.values()))
            for position in range(count):
                if position not in members:
                    raise self.error(
                        rule, some, f"nothing that it can be joined with matches {rule.patterns[position]!r}: a hole"
                    )
            names = tuple(self._found.aliases.get(members[position], members[position]) for position in range(count))
            these = tuple(self._tensors[name] for name in names)
            if shapes is not None and these != shapes:
                raise self.error(rule, some, "what it stacks has different shapes")
            shapes = these
            sources[numbers] = names
        return sources, shapes or ()

    def _stack(self, rule: Rule, capture: str, position: int, sources: Iterable[tuple[int, ...]], name: str) -> Stack:
        here = sorted({numbers[position] for numbers in sources})
        numbers = self._numbers.get(capture)
        if numbers is None:
            # some models stack from a later layer on, but none leaves one out in between without saying so
            absent = next((number for number, after in itertools.pairwise(here) if after != number + 1), None)
            if absent is not None:
                raise self.error(
                    rule,
                    name,
                    f"there is no tensor of {capture} {absent + 1} to stack: a hole; if there should be none, say by"
                    f" the lists of a [spread.{capture}] which there are",
                )
            return Stack(None, [here])
        if self._spread[capture].chunks > 1:
            raise self.error(rule, name, f"it stacks by {capture!r}, of which each rank has several stages")
        for number in here:
            if number not in numbers.homes:
                raise self.error(rule, name, f"no list of [spread.{capture}] has the number {number}: a hole")
        for number in numbers.homes:
            if number not in here:
                raise self.error(
                    rule,
                    name,
                    f"[spread.{capture}] has the number {number}, and nothing of it can be stacked: a hole",
                )
        return Stack(numbers.axis, numbers.lists)

    def _place(self, rule: Rule, captures: Captures, name: str) -> tuple[dict[int, tuple[int, ...]], dict[str, str]]:
        """Where on which axes it is, and the fields for names there."""
        at: dict[int, tuple[int, ...]] = {}
        for axis, indices in rule.on.items():
            size = self._mesh.shape[self._mesh.names.index(axis)]
            chosen = tuple(dict.fromkeys(index % size for index in indices if -size <= index < size))
            if any(not -size <= index < size for index in indices):
                raise self.error(rule, name, f"the axis {axis!r} has no index {max(indices, key=abs)} on {self._mesh}")
            at[self._mesh.names.index(axis)] = chosen
        hidden = rule.stacked
        fields = {key: value for key, value in captures.items() if not key.startswith("__") and key not in hidden}
        fields["name"] = fields.get("name", name)
        taken = {self._mesh.names.index(axis) for axis in rule.cut_axes}
        stacked = [self._numbers[capture].axis for capture in rule.stacked if capture in self._numbers]
        for capture, text in captures.items():
            numbers = self._numbers.get(capture)
            if numbers is None or capture in rule.stacked:
                continue
            if not (text.isascii() and text.isdecimal()):
                raise self.error(rule, name, f"it captures {text!r} as {capture!r}, which is spread and no number")
            number = int(text)
            self._seen[capture].add(number)
            home = numbers.homes.get(number)
            if home is None:
                raise self.error(rule, name, f"no list of [spread.{capture}] has the number {number}: a hole")
            if numbers.axis in at:
                raise self.error(rule, name, f"it is placed on the axis {self._mesh.names[numbers.axis]!r} twice")
            at[numbers.axis] = (home.place,)
            fields |= {capture: str(home.own), f"{capture}.number": str(number)}
            fields |= {f"{capture}.chunk": str(home.chunk), f"{capture}.stage": str(home.stage)}
        both = [*at, *stacked]
        for place in both:
            if place in taken or both.count(place) > 1:
                raise self.error(rule, name, f"it uses the axis {self._mesh.names[place]!r} twice")
        return at, fields

    def _local(self, match: _Match, position: int, fields: Mapping[str, str], name: str) -> str:
        rule, by = match.rule, match.by
        if by is rule:
            return self._render(rule.locals[position], fields, rule, name) if rule.local is not None else name
        leader = match.leader
        if rule.local is not None:
            leader = self._render(rule.locals[position], {**fields, "name": leader}, rule, name)
        if by.local is not None:
            return self._render(by.locals[0], {**fields, "like": leader}, by, name)
        if rule.local is not None:
            raise self.error(by, name, "what it lies as has another name on the ranks; say its own as local")
        return name

    def _render(self, template: str, fields: Mapping[str, object], rule: Rule, name: str) -> str:
        try:
            return render(template, fields)
        except KeyError as error:
            raise self.error(
                rule, name, f"{template!r} has the field {error.args[0]!r}, and it captures none"
            ) from None


_REPLICATED = Rule()
_MOST = 1 << 20
