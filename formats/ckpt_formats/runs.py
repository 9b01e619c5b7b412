"""What lies in the folder of a run: its checkpoints, and what remains of saves that did not become any.

Reads each checkpoint's root and the sizes of its files, nothing else; whether bytes are right is for `verify`. Knows no
retention and no levels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from ckpt_formats.describing import writers_text
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, FormatError, UnknownVersionError
from ckpt_formats.manifest import RESERVED_PREFIX
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE, NodeFolders, folders_of, missing_text, root_folder
from ckpt_formats.native.reader import read_root
from ckpt_formats.native.root import Root
from ckpt_formats.remote import Store
from ckpt_formats.urls import is_url, tidy

__all__ = ["Found", "State", "find_checkpoints"]

LISTERS = 8
"""Threads that look into the checkpoints of a run in a store, where each look waits for answers."""


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
    elsewhere: bool = False
    """It is partial for no other reason than that other nodes' disks can't be reached."""
    step: int | None
    """By its root, or by its folder's name when it has none that can be read."""
    bytes: int
    """Size of the files that it lists, or of what lies there."""
    tensors: int | None = None
    created: datetime | None = None
    world_size: int | None = None
    writers: str | None = None
    """Ranks and meshes that wrote it, for people."""

    @property
    def of_loop(self) -> bool:
        """Whether its folder is called after its step, as a Checkpointer calls its own; others somebody put there."""
        return names.is_called_after(self.path, self.step)


def find_checkpoints(path: str | os.PathLike[str]) -> list[Found]:
    """What lies in folder `path`: the checkpoint that it is itself, or those in its folders, sorted by step.

    Args:
        path: a folder, or a URL of a store. With `{node}` in it, the folders of all nodes that can be reached.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        StoreError: its store can't be read.
    """
    folder = tidy(path)
    if is_url(folder):
        return _in_store(folder)
    if NODE in folder:
        return _on_nodes(folder)
    if not os.path.isdir(folder):
        what = "is a file; name a run's folder" if os.path.exists(folder) else "no such folder; check the path"
        raise CheckpointNotFoundError(f"{folder}: {what}", path=folder)
    itself = _inspect(folder)
    if itself is not None:
        return [itself]
    below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    return _by_step(map(_inspect, below))


def _on_nodes(folder: str) -> list[Found]:
    """The same on node-local disks, where every node has a folder with its part of each checkpoint."""
    folders = folders_of(folder)
    if not folders:
        raise CheckpointNotFoundError(f"{folder}: no node's folder can be reached from here; check the path")
    if any(_inspect(each) is not None for each in folders):
        itself = _inspect(folder)
        return [] if itself is None else [itself]
    below = sorted({entry.name for each in folders for entry in os.scandir(each) if entry.is_dir()})
    return _by_step(_inspect(os.path.join(folder, name)) for name in below)


def _by_step(found: Iterable[Found | None]) -> list[Found]:
    return sorted(filter(None, found), key=lambda item: -1 if item.step is None else item.step)


def _in_store(url: str) -> list[Found]:
    store = Store(url)
    try:
        below = store.ls(url)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{url}: there is nothing at that URL; check it", path=url) from None
    if any(entry.name in (names.MANIFEST, names.DATA) for entry in below):
        itself = _inspect_in_store(store, url)
        if itself is not None:
            return [itself]
    folders = [os.path.join(url, entry.name) for entry in below if entry.folder]
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="ckpt-list") as pool:
        return _by_step(pool.map(lambda folder: _inspect_in_store(store, folder), folders))


def _inspect_in_store(store: Store, folder: str) -> Found | None:
    """What lies below a URL, None when it is nothing of this format."""
    sizes = {entry.name: entry.size for entry in store.walk(folder)}
    step = names.step_of(os.path.basename(folder))
    there = sum(sizes.values())
    if names.MANIFEST not in sizes:
        if any(at in (names.DATA, names.INDEX) and names.attempt_of(file) for at, _, file in map(_parts, sizes)):
            why = f"it has no {names.MANIFEST}: its upload did not end, or has not ended yet"
            return Found(path=folder, state=State.NOT_COMMITTED, problem=why, step=step, bytes=there)
        return None
    try:
        root = read_root(folder)
    except UnknownVersionError as error:
        return Found(path=folder, state=State.UNKNOWN_VERSION, problem=str(error), step=step, bytes=there)
    except CheckpointNotFoundError:
        return None  # removed this moment
    except (CorruptionError, FormatError) as error:
        return Found(path=folder, state=State.DAMAGED, problem=str(error), step=step, bytes=there)
    return _committed(folder, root, sizes[names.MANIFEST], sizes.get)


def _parts(name: str) -> tuple[str, str, str]:
    return name.partition("/")


def _inspect(path: str) -> Found | None:
    """What a folder is, None when it is nothing of this format."""
    found = None
    try:
        found = _look(path)
        whole = found is None or found.state in (State.WHOLE, State.NOT_COMMITTED)
    except FileNotFoundError:
        whole = False
    if whole or any(os.path.lexists(os.path.join(folder, names.MANIFEST)) for folder in folders_of(path)):
        return found
    # what was amiss is that it was removed while it was looked at
    return _look(path)


def _look(path: str) -> Found | None:
    try:
        folder = root_folder(path)
    except CheckpointNotFoundError:
        # no node has a root: what each has is alike
        folder = next(iter(folders_of(path)), path)
    manifest = os.path.join(folder, names.MANIFEST)
    step = names.step_of(os.path.basename(os.path.abspath(path)))
    if not os.path.lexists(manifest):
        # a save makes both folders before it writes anything
        if all(os.path.isdir(os.path.join(folder, name)) for name in (names.DATA, names.INDEX)):
            why = f"it has no {names.MANIFEST}: its save did not end, or has not ended yet"
            return Found(path=path, state=State.NOT_COMMITTED, problem=why, step=step, bytes=_size_below(folder))
        return None
    try:
        if not os.path.isfile(manifest):
            raise FormatError(f"{manifest} is not a plain file")
        root = read_root(folder)
    except UnknownVersionError as error:
        return Found(path=path, state=State.UNKNOWN_VERSION, problem=str(error), step=step, bytes=_size_below(folder))
    except (CorruptionError, FormatError) as error:
        return Found(path=path, state=State.DAMAGED, problem=str(error), step=step, bytes=_size_below(folder))
    except OSError as error:
        why = f"{manifest}: can't be read ({error.strerror})"
        return Found(path=path, state=State.DAMAGED, problem=why, step=step, bytes=_size_below(folder))

    where = NodeFolders(path, folder, root.layout)

    def size(file: str) -> int | None:
        try:
            return os.stat(where.find(file)).st_size
        except OSError:
            return None

    found = _committed(path, root, os.path.getsize(manifest), size)
    lost = where.missing(file.path for file in root.files)
    if not lost:
        return found
    here = replace(root, files=[file for file in root.files if where.node(file.path) not in lost])
    elsewhere = where.own not in lost and _incomplete(here, size) is None
    return replace(found, problem=missing_text(lost), elsewhere=elsewhere)


def _committed(folder: str, root: Root, manifest: int, size: Callable[[str], int | None]) -> Found:
    """A checkpoint whose root could be read. `size` is that of a file, None when there is none."""
    problem = _incomplete(root, size)
    listed = sum(file.size for file in root.files) + sum(page.size for page in root.pages)
    return Found(
        path=folder,
        state=State.WHOLE if problem is None else State.PARTIAL,
        problem=problem,
        step=root.step,
        bytes=listed + manifest,
        tensors=sum(not name.startswith(RESERVED_PREFIX) for name in root.tensors),
        created=_created(root),
        world_size=root.layout.get("world_size", 1),
        writers=writers_text(root.layout),
    )


def _incomplete(root: Root, size: Callable[[str], int | None]) -> str | None:
    """Which of the files that a root lists are not there, or not of their size."""
    listed = [(page.path, page.size) for page in root.pages] + [(file.path, file.size) for file in root.files]
    actual = [size(path) for path, _ in listed]
    missing = actual.count(None)
    other = sum(found is not None and found != expected for found, (_, expected) in zip(actual, listed, strict=True))
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
