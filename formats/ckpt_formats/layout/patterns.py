"""Patterns of tensors' names, and templates that make names from what patterns captured.

A pattern is like a shell's: `*` is any text, dots too, `?` any character, `[abc]` one of these. `{layer}` captures a
part of the name without dots under that name, `{rest*}` one with dots. A capture that a layout numbers (its stages,
experts or stacked layers) is digits only. A pattern that begins with `re:` is a regular expression instead, whose
named groups are captures. A pattern has to match the whole name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

__all__ = ["Captures", "Pattern", "fields_of", "render"]

Captures = dict[str, str]

_FIELD = re.compile(r"\{([A-Za-z_]\w*(?:\.[a-z]+)?)\*?\}", re.ASCII)
_CAPTURE = re.compile(r"\{([A-Za-z_]\w*)(\*?)\}", re.ASCII)
_REGEX = "re:"


class Pattern:
    """A pattern, compiled. ValueError, which says what is wrong with it, when it is not one.

    Attributes:
        text: as it was written.
        captures: the names under which it captures.
        groups: the same and, as `__0`, `__1` and so on, its wildcards, in their order.
    """

    __slots__ = ("_regex", "captures", "groups", "text")

    def __init__(self, text: str, numbers: Collection[str] = ()) -> None:
        """`numbers`: captures that are digits only."""
        self.text = text
        source = text[len(_REGEX) :] if text.startswith(_REGEX) else _translate(text, numbers)
        try:
            self._regex = re.compile(source, re.DOTALL)
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is no regular expression: {error}") from None
        self.groups = tuple(self._regex.groupindex)
        self.captures = frozenset(name for name in self.groups if not name.startswith("__"))

    def match(self, name: str) -> Captures | None:
        """What it captures of a name, what wildcards matched under `__0`, `__1` and so on; None if it does not
        match."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        return {key: value for key, value in match.groupdict().items() if value is not None}


def _translate(text: str, numbers: Collection[str]) -> str:
    parts: list[str] = []
    seen: set[str] = set()
    wild = position = 0
    while position < len(text):
        character = text[position]
        capture = _CAPTURE.match(text, position)
        close = text.find("]", position + 2) if character == "[" else -1
        if capture is not None:
            name, dots = capture[1], capture[2]
            if name.startswith("__"):
                raise ValueError(f"the pattern {text!r} captures {name!r}; names with two underscores are taken")
            what = r"[0-9]+" if name in numbers else ".+" if dots else r"[^.]+"
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{what})")
            seen.add(name)
            position = capture.end()
            continue
        if character in "{}":
            raise ValueError(f"the pattern {text!r} has a brace that makes no capture; one is written like {{layer}}")
        if close > 0:
            inner = text[position + 1 : close].replace("\\", r"\\").replace("[", r"\[")
            inner = "^" + inner[1:] if inner.startswith("!") else inner.replace("^", r"\^")
            parts.append(f"(?P<__{wild}>[{inner}])")
            wild += 1
            position = close + 1
            continue
        if character in "*?":
            parts.append(f"(?P<__{wild}>{'.*' if character == '*' else '.'})")
            wild += 1
        else:
            parts.append(re.escape(character))
        position += 1
    return "".join(parts)


def fields_of(template: str) -> set[str]:
    """The fields of a template, such as `layer` and `layer.chunk`. ValueError when it has other braces.

    A star in them, as in the pattern that captured, means nothing.
    """
    rest = _FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise ValueError(f"{template!r} has a brace that is no field; one is written like {{layer}}")
    return set(_FIELD.findall(template))


def render(template: str, fields: Mapping[str, object]) -> str:
    """The template with its fields filled in. KeyError for one that is not there."""
    return _FIELD.sub(lambda match: str(fields[match[1]]), template)
