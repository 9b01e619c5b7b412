"""Selecting: a checkpoint with only some of its tensors and values, as a manifest derived from its own.

Knows no files and no live state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_formats.errors import LayoutError, MissingTensorError
from ckpt_formats.layout.patterns import Pattern
from ckpt_formats.manifest import BLOB_PREFIX, RANK_PREFIX, RESERVED_PREFIX, Manifest, TensorMeta

__all__ = ["payloads", "references", "selected"]


def selected(manifest: Manifest, patterns: Sequence[str]) -> Manifest:
    """The manifest with the tensors and values whose names match one of the patterns, which are those of layouts.

    What a value that is selected refers to is selected with it, and of tied tensors a name that is not goes alone.

    Raises MissingTensorError for a pattern that matches nothing, LayoutError for what is no pattern.
    """
    try:
        compiled = [Pattern(text) for text in patterns]
    except ValueError as error:
        raise LayoutError(str(error)) from None
    metas = manifest.model_tensors
    names = [*metas, *manifest.aliases, *manifest.values]
    known = set(names)
    for pattern in compiled:
        if not any(pattern.match(name) is not None for name in names):
            raise MissingTensorError(
                f"{manifest.path} has no tensor and no value whose name matches {pattern.text!r}; `ckpt show` lists "
                "what it has",
                path=manifest.path,
            )
    chosen = {name for name in names if any(pattern.match(name) is not None for pattern in compiled)}
    found = {path: list(references(value)) for path, value in manifest.values.items()}
    todo = [path for path in found if path in chosen]
    while todo:
        path = todo.pop()
        needed = (f"{path}.{name}" if tag == "$subclass" else name for tag, name in found.get(path, ()))
        todo += (more := {name for name in needed if name in known} - chosen)
        chosen |= more
    values = {path: value for path, value in manifest.values.items() if path in chosen}
    owned: dict[str, str | None] = {}
    for path, needs in found.items():
        owned |= {name: name if path in chosen else None for tag, name in needs if tag == "$per_rank"}
    twins: dict[str, list[str]] = {}
    for alias, name in manifest.aliases.items():
        twins.setdefault(name, [name]).append(alias)
    tensors: dict[str, TensorMeta] = {}
    aliases: dict[str, str] = {}
    for name, meta in manifest.tensors.items():
        if name.startswith(RESERVED_PREFIX):
            continue
        left = [twin for twin in twins.get(name, [name]) if twin in chosen]
        if left:
            tensors[left[0]] = meta
            aliases |= dict.fromkeys(left[1:], left[0])
    tensors |= payloads(manifest, values, owned)
    tops = {top for name in (*tensors, *aliases, *values) for top in _tops(name)}
    entries = {key: facts for key, facts in manifest.entries.items() if key in tops}
    return manifest.derived(tensors=tensors, aliases=aliases, values=values, entries=entries, owned=owned)


def payloads(manifest: Manifest, values: Mapping[str, Any], owned: Mapping[str, str | None]) -> dict[str, TensorMeta]:
    """Of the tensors that are the format's own, those that some values of a manifest still need.

    Args:
        values: path -> encoded value, those that are left.
        owned: as of a manifest.
    """
    kept = {name for value in values.values() for tag, name in references(value) if tag == "blob"}
    ranks = not owned or any(path is not None for path in owned.values())
    return {
        name: meta
        for name, meta in manifest.tensors.items()
        if name in kept or (ranks and name.startswith(RANK_PREFIX))
    }


def references(value: Any) -> Iterator[tuple[str, str]]:
    """(tag, name) of what an encoded value refers to: `$tensor`, `$per_rank`, `blob`, or `$subclass` and a part."""
    if isinstance(value, list):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        if len(value) == 1:
            ((tag, payload),) = value.items()
            if tag in ("$tensor", "$per_rank") and isinstance(payload, str):
                yield tag, payload
                return
            # in a payload of bytes or an array
            if tag == "blob" and isinstance(payload, str) and payload.startswith(BLOB_PREFIX):
                yield tag, payload
                return
            if tag == "$subclass" and isinstance(payload, dict) and isinstance(payload.get("parts"), list):
                yield from ((tag, part) for part in payload["parts"] if isinstance(part, str))
        for item in value.values():
            yield from references(item)


def _tops(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
