"""Renaming: a checkpoint under other names, as a manifest derived from its own. No byte of a tensor is touched.

Rules speak of the names of tensors and the paths of values. Some names follow others and are not matched themselves:
slots of optimizers and the names in parameter groups follow their parameters, the parts of a tensor subclass and the
tensors within a value follow what they are in. Knows no files and no live state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckpt_formats.errors import RenameError
from ckpt_formats.layout.patterns import Pattern, fields_of, render
from ckpt_formats.manifest import RESERVED_PREFIX, Manifest, TensorMeta
from ckpt_formats.selecting import payloads, references

__all__ = ["Rename", "renamed"]

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""Name or pattern -> new name, None to leave out what it matches; or a function from names to names."""

_SPECIAL = re.compile(r"[*?{\[]|^re:")
_GROUPS = ".param_groups"


def renamed(manifest: Manifest, rename: Rename) -> Manifest:
    """The manifest with other names.

    Of several rules that match a name the first counts; names that none matches stay. A rule without wildcards, or one
    that is a name of the checkpoint, matches that name and all below it (`model.encoder` also
    `model.encoder.0.weight`). Otherwise it is a pattern as in layouts: a `*` of the new name is what the wildcard at
    its place matched, `{layer}` what `{layer}` did.

    Raises RenameError, which shows the rule: it is wrong, no name is left for it to match, two names become one, or
    what it leaves out is still needed.
    """
    return _Renaming(manifest, rename).derived()


class _Rule:
    """One rule of a mapping."""

    def __init__(self, source: str, target: str | None, *, literal: bool) -> None:
        self.source = source
        self.target = target
        self.used = False
        self._pattern: Pattern | None = None
        if target == "":
            raise RenameError(f"{self}: the new name is empty; None leaves out what the rule matches")
        if literal:
            return
        try:
            self._pattern = Pattern(source)
            fields = fields_of(target.replace("*", "")) if target is not None else set()
        except ValueError as error:
            raise RenameError(f"{self}: {error}") from None
        wild = sum(part.startswith("__") for part in self._pattern.groups)
        stars = 0 if target is None else target.count("*")
        if stars not in (0, wild):
            raise RenameError(
                f"{self}: the new name has {stars} `*`, but the pattern has {wild} wildcards to fill them"
            )
        if fields - self._pattern.captures:
            raise RenameError(f"{self}: the pattern captures no {{{min(fields - self._pattern.captures)}}}")

    def __str__(self) -> str:
        return f"the rename rule {self.source!r}: {self.target!r}"

    def matches(self, name: str) -> bool:
        """Whether the rule says something about a name."""
        if self._pattern is None:
            return name == self.source or name.startswith(self.source + ".")
        return self._pattern.match(name) is not None

    def new(self, name: str) -> str | None:
        """The new name of one that it matches."""
        if self.target is None:
            return None
        if self._pattern is None:
            return self.target + name[len(self.source) :]
        captured = self._pattern.match(name) or {}
        made = self.target
        if "*" in made:
            head, *parts = made.split("*")
            made = head + "".join(f"{{__{number}}}{part}" for number, part in enumerate(parts))
        return render(made, captured)


class _Renaming:
    """The work of `renamed`."""

    def __init__(self, manifest: Manifest, rename: Rename) -> None:
        self._manifest = manifest
        self._function = rename if callable(rename) else None
        self._follows: dict[str, str] = {}
        """Name -> the path that it begins with, and is renamed with."""
        self._slots: dict[str, tuple[str, str, str]] = {}
        """Name -> optimizer, whole name of the parameter that it is a slot of, and the slot."""
        self._optimizers = [key for key, facts in manifest.entries.items() if facts.get("kind") == "optimizer"]
        self._known: dict[str, str | None] = {}
        self._modules_of: dict[str, dict[str, str]] = {}
        self._twins: dict[str, list[str]] = {}
        for alias, name in manifest.aliases.items():
            self._twins.setdefault(name, [name]).append(alias)
        self._names = [name for name in manifest.tensors if not name.startswith(RESERVED_PREFIX)]
        self._names += [*manifest.aliases, *manifest.values]
        self._find_followers()
        self._rules = [] if callable(rename) else self._compiled(rename)

    def derived(self) -> Manifest:
        """The derived manifest."""
        manifest = self._manifest
        new = {name: self._new(name) for name in self._names}
        self._require_used()
        self._require_apart(new)
        tensors, aliases = self._tensors(new)
        modules = {key: self._modules(key) for key in self._optimizers if self._new(key + _GROUPS) is not None}
        owned: dict[str, str | None] = {}
        values: dict[str, Any] = {}
        for path, value in manifest.values.items():
            name = new[path]
            for tag, reference in references(value):
                if tag == "$per_rank":
                    owned[reference] = self._below(path, reference)
            if name is None:
                continue
            key = path.removesuffix(_GROUPS)
            groups = key != path and key in modules
            made = self._groups(value, self._home(key), modules[key]) if groups else value
            values[name] = self._rewritten(path, made, owned)
        tensors |= payloads(manifest, values, owned)
        return manifest.derived(
            tensors=tensors, aliases=aliases, values=values, entries=self._entries(new, modules), owned=owned
        )

    # --- what follows what

    def _find_followers(self) -> None:
        for path, value in self._manifest.values.items():
            for tag, reference in references(value):
                if tag == "blob":
                    continue
                name = f"{path}.{reference}" if tag == "$subclass" else reference
                if tag != "$per_rank" and name.startswith(path + "."):
                    self._follows[name] = path
        for key in self._optimizers:
            home = self._home(key)
            groups = self._manifest.values.get(key + _GROUPS)
            known = {name for group in _listed(groups) for name in _parameters(group)}
            prefix = f"{key}.state."
            for name in self._names:
                if not name.startswith(key + ".") or name in self._follows:
                    continue
                parameter = _longest(name[len(prefix) :], known) if name.startswith(prefix) else None
                if parameter is None:
                    self._follows[name] = key
                else:
                    self._slots[name] = key, home + parameter, name[len(prefix) + len(parameter) :]

    def _home(self, key: str) -> str:
        """What the names of an optimizer's parameters are to be preceded by to be names of tensors."""
        modules = self._manifest.entries[key].get("modules")
        return f"{modules['']}." if isinstance(modules, Mapping) and "" in modules else ""

    # --- names

    def _compiled(self, rename: Mapping[str, str | None]) -> list[_Rule]:
        rules = []
        for source, target in rename.items():
            literal = not _SPECIAL.search(source) or any(
                name == source or name.startswith(source + ".") for name in self._names
            )
            rules.append(_Rule(source, target, literal=literal))
        return rules

    def _by_rules(self, name: str) -> str | None:
        if self._function is not None:
            return self._function(name)
        for rule in self._rules:
            if rule.matches(name):
                rule.used = True
                return rule.new(name)
        return name

    def _new(self, name: str) -> str | None:
        """What a tensor, a value or a parameter is called; None if it is left out."""
        if name not in self._known:
            self._known[name] = self._found(name)
        return self._known[name]

    def _found(self, name: str) -> str | None:
        if name in self._optimizers:
            groups = self._by_rules(name + _GROUPS)
            if groups is not None and not groups.endswith(_GROUPS):
                raise RenameError(
                    f"the optimizer {name!r} can't be renamed so that {name + _GROUPS!r} becomes {groups!r}; rename "
                    f"{name!r} itself",
                    tensor=name,
                )
            return groups and groups.removesuffix(_GROUPS)
        slot = self._slots.get(name)
        if slot is not None:
            key, parameter = self._new(slot[0]), self._parameter(slot[1])
            if key is None or parameter is None:
                return None
            inner = self._modules(slot[0]).get("")
            return f"{key}.state.{parameter.removeprefix(f'{inner}.') if inner else parameter}{slot[2]}"
        if name in self._follows:
            return self._below(self._follows[name], name)
        return self._by_rules(name)

    def _below(self, path: str, name: str) -> str | None:
        """The new name of what follows a path."""
        new = self._new(path)
        if name != path and not name.startswith(path + "."):
            return self._new(name)
        return None if new is None else new + name[len(path) :]

    def _parameter(self, name: str) -> str | None:
        """The new name of a parameter's tensor, or of one that it is tied to if it is left out itself."""
        new = self._new(name)
        if new is None:
            stored = self._manifest.aliases.get(name, name)
            left = (self._new(twin) for twin in self._twins.get(stored, ()))
            new = next((twin for twin in left if twin is not None), None)
        return new

    def _modules(self, key: str) -> dict[str, str]:
        """The entries that an optimizer's parameters are in now, as in its entry."""
        known = self._modules_of.get(key)
        if known is None:
            home = self._home(key)
            entries: dict[str, str] = {}
            for group in _listed(self._manifest.values.get(key + _GROUPS)):
                for name in _parameters(group):
                    new = self._parameter(home + name)
                    if new is not None:
                        entry = self._entry(home + name, new)
                        entries[entry] = entry
            known = {"": next(iter(entries))} if home and len(entries) == 1 else entries
            self._modules_of[key] = known
        return known

    # --- what is checked

    def _require_used(self) -> None:
        for rule in self._rules:
            if rule.used:
                continue
            hit = next((name for name in self._names if rule.matches(name)), None)
            if hit is None:
                why = "no tensor or value of the checkpoint has such a name; `ckpt show` lists what it has"
            elif hit in self._slots:
                why = f"it matches {hit!r}, but slots of optimizers are called after their parameters; rename these"
            elif hit in self._follows:
                why = f"it matches {hit!r}, which is part of {self._follows[hit]!r}; rename that"
            else:
                why = f"what it matches, such as {hit!r}, a rule before it has; put it first"
            raise RenameError(f"{self._manifest.path}: {rule} renames nothing: {why}", path=self._manifest.path)

    def _require_apart(self, new: Mapping[str, str | None]) -> None:
        aliases = self._manifest.aliases
        taken: dict[str, str] = {}
        for name, made in new.items():
            if made is None:
                continue
            if made.startswith(RESERVED_PREFIX) or not all(made.split(".")[:1]):
                raise RenameError(f"{self._said(name)} becomes {made!r}, which can't be a name here", tensor=name)
            first = taken.setdefault(made, name)
            if first != name and aliases.get(first, first) != aliases.get(name, name):
                raise RenameError(
                    f"{self._manifest.path}: {self._said(first)} and {self._said(name)} both become {made!r}; leave "
                    "one of them out (by None as its new name), or rename it too",
                    path=self._manifest.path,
                    tensor=made,
                )

    def _said(self, name: str) -> str:
        rule = next((rule for rule in self._rules if rule.matches(name)), None)
        return repr(name) if rule is None else f"{name!r} (by {rule})"

    # --- what comes out

    def _tensors(self, new: Mapping[str, str | None]) -> tuple[dict[str, TensorMeta], dict[str, str]]:
        tensors: dict[str, TensorMeta] = {}
        aliases: dict[str, str] = {}
        for name, meta in self._manifest.tensors.items():
            if name.startswith(RESERVED_PREFIX):
                continue
            made = [new[twin] for twin in self._twins.get(name, [name])]
            left = list(dict.fromkeys(twin for twin in made if twin is not None))
            if left:
                tensors[left[0]] = meta
                aliases |= dict.fromkeys(left[1:], left[0])
        return tensors, aliases

    def _groups(self, value: Any, home: str, modules: Mapping[str, str]) -> Any:
        """Parameter groups, without those of which no parameter is left."""
        inner = f"{modules['']}." if "" in modules else ""
        groups = []
        for group in _listed(value):
            names = _parameters(group)
            made = (self._parameter(home + name) for name in names)
            left = list(dict.fromkeys(name.removeprefix(inner) for name in made if name is not None))
            if left or not names:
                groups.append({**group, "params": left} if "params" in group else group)
        return groups

    def _rewritten(self, path: str, value: Any, owned: Mapping[str, str | None]) -> Any:
        """An encoded value with other names where it refers to something."""
        if isinstance(value, list):
            return [self._rewritten(path, item, owned) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((tag, payload),) = value.items()
            if tag == "$per_rank" and isinstance(payload, str):
                return {tag: owned.get(payload, payload)}
            if tag == "$tensor" and isinstance(payload, str):
                name = self._parameter(payload)
                if name is None:
                    raise RenameError(
                        f"{self._manifest.path}: {self._said(payload)} is left out, but the value {path!r} refers to "
                        "it; leave that out too",
                        path=self._manifest.path,
                        tensor=payload,
                    )
                return {tag: name}
        return {key: self._rewritten(path, item, owned) for key, item in value.items()}

    def _entry(self, old: str, new: str) -> str:
        """The top-level name that a name is below now."""
        if new == old:
            return self._old_entry(old)
        kind = self._manifest.entries.get(self._old_entry(old), {}).get("kind")
        for top in _tops(new):
            if self._manifest.entries.get(top, {}).get("kind") == kind and kind is not None:
                return top
        return new.partition(".")[0]

    def _old_entry(self, name: str) -> str:
        return next((top for top in _tops(name) if top in self._manifest.entries), name.partition(".")[0])

    def _entries(
        self, new: Mapping[str, str | None], modules: Mapping[str, Mapping[str, str]]
    ) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        held: set[str] = set()
        for name, made in new.items():
            old = self._old_entry(name)
            held.add(old)
            facts = self._manifest.entries.get(old)
            if made is None or facts is None:
                continue
            if old in modules:
                entry, facts = self._new(old) or old, {**facts, "modules": modules[old]}
            else:
                entry = self._entry(name, made)
                if isinstance(facts.get("flat"), Mapping):
                    facts = {**facts, "flat": _flat(facts["flat"], name, made)}
            there = entries.setdefault(entry, dict(facts))
            if there.get("kind") != facts.get("kind"):
                raise RenameError(
                    f"{self._manifest.path}: {self._said(name)} becomes {made!r}, which would be in {entry!r} together "
                    f"with something that is no {facts.get('kind')}; choose another first part of the name",
                    path=self._manifest.path,
                    tensor=name,
                )
            if isinstance(facts.get("flat"), Mapping):
                there["flat"] = {**there.get("flat", {}), **facts["flat"]}
        for key, facts in self._manifest.entries.items():
            if key not in held and key not in entries:
                entries[key] = dict(facts)  # has nothing that could be renamed
        return entries


def _flat(flat: Mapping[str, Any], old: str, new: str) -> dict[str, bool]:
    """Paths of flat dicts that a name is in, as they are called when it has its new name."""
    found = {}
    for path in flat:
        rest = old[len(path) :]
        if old.startswith(path + ".") and new.endswith(rest):
            found[new[: len(new) - len(rest)]] = True
    return found


def _tops(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _longest(rest: str, known: set[str]) -> str | None:
    """`layer.weight.exp_avg` -> `layer.weight`: the longest parameter that it begins with."""
    return next((top for top in _tops(rest.rpartition(".")[0]) if top in known), None)


def _listed(groups: Any) -> list[Mapping[str, Any]]:
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _parameters(group: Mapping[str, Any]) -> list[str]:
    names = group.get("params")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
