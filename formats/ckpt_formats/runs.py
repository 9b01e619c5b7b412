"""What lies in the folder of a run: its checkpoints, and what remains of saves that did not become any.

Reads each checkpoint's root and the sizes of its files, nothing else; whether bytes are right is for `verify`. Knows no
retention and no levels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from ckpt_formats.describing import writers_text
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, FormatError, UnknownVersionError
from ckpt_formats.manifest import RESERVED_PREFIX
from ckpt_formats.native import names
from ckpt_formats.native.reader import read_root
from ckpt_formats.native.root import Root

__all__ = ["Found", "State", "find_checkpoints"]


class State(StrEnum):
    """How whole a checkpoint is, as far as its root and the sizes of its files tell."""

    WHOLE = "whole"
    PARTIAL = "partial"
    """Files that it lists are missing or have another size."""
    NOT_COMMITTED = "not committed"
    """What a save left that did not end, or has not ended yet; nobody takes it for a checkpoint."""
    DAMAGED = "damaged"
    """Its root can't be read."""
    UNKNOWN_VERSION = "unknown version"
    """A newer release wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint, or what is there of one. What its root would say is None when that can't be read."""

    path: str
    state: State
    problem: str | None = None
    """What is wrong, when it is not whole."""
    step: int | None
    """By its root, or by its folder's name when it has none that can be read."""
    bytes: int
    """Size of the files that it lists, or of what lies there."""
    tensors: int | None = None
    created: datetime | None = None
    world_size: int | None = None
    writers: str | None = None
    """Ranks and meshes that wrote it, for people."""


def find_checkpoints(path: str | os.PathLike[str]) -> list[Found]:
    """What lies in folder `path`: the checkpoint that it is itself, or those in its folders, sorted by step.

    Raises:
        CheckpointNotFoundError: there is no such folder.
    """
    folder = os.fspath(path)
    if not os.path.isdir(folder):
        what = "is a file; name a run's folder" if os.path.exists(folder) else "no such folder; check the path"
        raise CheckpointNotFoundError(f"{folder}: {what}", path=folder)
    itself = _inspect(folder)
    if itself is not None:
        return [itself]
    below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    found = [item for item in map(_inspect, below) if item is not None]
    return sorted(found, key=lambda item: -1 if item.step is None else item.step)


def _inspect(folder: str) -> Found | None:
    """What a folder is, None when it is nothing of this format."""
    manifest = os.path.join(folder, names.MANIFEST)
    step = names.step_of(os.path.basename(os.path.abspath(folder)))
    if not os.path.lexists(manifest):
        # a save makes both folders before it writes anything
        if all(os.path.isdir(os.path.join(folder, name)) for name in (names.DATA, names.INDEX)):
            why = f"it has no {names.MANIFEST}: its save did not end, or has not ended yet"
            return Found(path=folder, state=State.NOT_COMMITTED, problem=why, step=step, bytes=_size_below(folder))
        return None
    try:
        if not os.path.isfile(manifest):
            raise FormatError(f"{manifest} is not a plain file")
        root = read_root(folder)
    except UnknownVersionError as error:
        return Found(path=folder, state=State.UNKNOWN_VERSION, problem=str(error), step=step, bytes=_size_below(folder))
    except (CorruptionError, FormatError) as error:
        return Found(path=folder, state=State.DAMAGED, problem=str(error), step=step, bytes=_size_below(folder))
    except OSError as error:
        why = f"{manifest}: can't be read ({error.strerror})"
        return Found(path=folder, state=State.DAMAGED, problem=why, step=step, bytes=_size_below(folder))
    problem = _incomplete(folder, root)
    listed = sum(file.size for file in root.files) + sum(page.size for page in root.pages)
    return Found(
        path=folder,
        state=State.WHOLE if problem is None else State.PARTIAL,
        problem=problem,
        step=root.step,
        bytes=listed + os.path.getsize(manifest),
        tensors=sum(not name.startswith(RESERVED_PREFIX) for name in root.tensors),
        created=_created(root),
        world_size=root.layout.get("world_size", 1),
        writers=writers_text(root.layout),
    )


def _incomplete(folder: str, root: Root) -> str | None:
    """Which of the files that a root lists are not there, or not of their size."""
    listed = [(page.path, page.size) for page in root.pages] + [(file.path, file.size) for file in root.files]
    missing = other = 0
    for path, size in listed:
        try:
            other += os.stat(os.path.join(folder, path)).st_size != size
        except OSError:
            missing += 1
    parts = []
    if missing:
        parts.append(f"{missing} of {len(listed)} files missing")
    if other:
        parts.append(f"{other} of {len(listed)} files of another size than was written")
    return ", ".join(parts) or None


def _created(root: Root) -> datetime | None:
    created: Any = root.provenance.get("created")
    try:
        when = datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def _size_below(folder: str) -> int:
    total = 0
    for inside, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(inside, file)).st_size
            except OSError:
                continue  # a save that is going on, or cleaned up, takes files away
    return total
