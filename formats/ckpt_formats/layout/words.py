"""What the words of the layout language have in common: fields that are checked and made uniform, and TOML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, ClassVar, TypeVar, cast

from ckpt_formats.errors import LayoutError

__all__ = [
    "Check",
    "UnfitError",
    "Word",
    "among",
    "either",
    "flag",
    "from_tree",
    "key_text",
    "made",
    "number",
    "one_or_several",
    "several",
    "text",
    "to_tree",
    "toml_of",
]

_Class = TypeVar("_Class")
Check = Callable[[Any], Any]
"""Takes a value as it was given and returns it as it is kept; UnfitError says what it should have been."""


class UnfitError(Exception):
    """A field can't have this value."""


def number(least: int, most: int = 2**63 - 1) -> Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            limit = f" and at most {most}" if most < 2**63 - 1 else ""
            raise UnfitError(f"an integer of at least {least}{limit}")
        return value

    return check


def several(check: Check, what: str, least: int = 0) -> Check:
    def checked(value: Any) -> tuple[Any, ...]:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or len(value) < least:
            raise UnfitError(what)
        return tuple(check(item) for item in value)

    return checked


def one_or_several(check: Check, kind: type, what: str, least: int = 1) -> Check:
    many = several(check, what, least)

    def checked(value: Any) -> tuple[Any, ...]:
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return cast("tuple[Any, ...]", many(value))
        if not isinstance(value, (kind, Mapping)):
            raise UnfitError(what)
        return (check(value),)

    return checked


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UnfitError("a text")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UnfitError("true or false")
    return value


def among(*words: str) -> Check:
    def check(value: Any) -> Any:
        if value not in words:
            raise UnfitError(" or ".join(f'"{word}"' for word in words))
        return value

    return check


def made(cls: type[_Class]) -> Check:
    def check(value: Any) -> _Class:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise UnfitError(f"a table of {', '.join(spec.name for spec in fields(cast('Any', cls)))}")
        return from_tree(cls, value)

    return check


def either(*checks: Check) -> Check:
    def check(value: Any) -> Any:
        expected = []
        for each in checks:
            try:
                return each(value)
            except UnfitError as error:
                expected.append(str(error))
        raise UnfitError(", or ".join(expected))

    return check


class Word:
    """What the words have in common: their fields are checked and made uniform."""

    __slots__ = ()
    CHECKS: ClassVar[Mapping[str, Check]]
    WORD: ClassVar[str]

    def __post_init__(self) -> None:
        for spec in fields(cast("Any", self)):
            value = getattr(self, spec.name)
            usual = _default(spec)
            if type(value) is type(usual) and value == usual:
                continue
            try:
                checked = self.CHECKS[spec.name](value)
            except UnfitError as error:
                raise LayoutError(f"{self.WORD}: {spec.name} = {value!r} has to be {error}") from None
            object.__setattr__(self, spec.name, checked)
        self.check()

    def check(self) -> None:
        """Raise LayoutError when fields contradict each other."""

    def tree(self) -> Any:
        """As it stands in TOML."""
        return to_tree(self)

    def refuse(self, why: str) -> LayoutError:
        return LayoutError(f"{self.WORD} {toml_of(self)}: {why}")


def _default(spec: Any) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def from_tree(cls: type[_Class], tree: Mapping[str, Any], **more: Any) -> _Class:
    """The word that a table of TOML says. LayoutError for keys that it does not have."""
    known = {spec.name for spec in fields(cast("Any", cls))}
    word = cast("Any", cls).WORD
    for key in tree:
        if key not in known:
            raise LayoutError(f"{word} can't say {key!r}; it can say {', '.join(sorted(known))}")
    try:
        return cls(**tree, **more)
    except TypeError:
        missing = [
            spec.name
            for spec in fields(cast("Any", cls))
            if spec.default is MISSING and spec.default_factory is MISSING and spec.name not in tree
        ]
        raise LayoutError(f"{word} {dict(tree)!r} has to say {' and '.join(missing)}") from None


def to_tree(word: Any) -> dict[str, Any]:
    """The same as a table of TOML would hold it: without what is as usual, single values not in lists."""
    tree: dict[str, Any] = {}
    for spec in fields(word):
        value = getattr(word, spec.name)
        if value != _default(spec):
            single = spec.name in {"axis", "match", "local", "stack", "unstack", "pad", "cut", "unless"}
            if single and isinstance(value, tuple) and len(value) == 1:
                value = value[0]
            tree[spec.name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tree() if isinstance(value, Word) else value


def toml_of(value: Any) -> str:
    """A value as TOML writes it in one line; a word as an inline table."""
    if isinstance(value, Word):
        value = to_tree(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key_text(key)} = {toml_of(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(toml_of(item) for item in value) + "]"


def key_text(key: str) -> str:
    """A key as TOML writes it: in quotes where it needs them."""
    return key if key.isascii() and key.replace("-", "_").isidentifier() else _quoted(key)


def _quoted(string: str) -> str:
    characters = []
    for character in string:
        if character in '"\\':
            characters.append("\\" + character)
        elif ord(character) < 32 or ord(character) == 127:
            characters.append(f"\\u{ord(character):04x}")
        else:
            characters.append(character)
    return '"' + "".join(characters) + '"'
