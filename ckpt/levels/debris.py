"""What in a checkpoint's folder bears a name of this format, and so may be debris. Anything else is never touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from ckpt_formats.native import names
from ckpt_formats.remote import Entry

__all__ = ["FOLDERS", "info_of", "is_begun", "is_data", "is_ours", "newest_change", "ours"]

FOLDERS = (names.INDEX, names.DATA)
"""The folders in a checkpoint's folder."""


def ours(path: str) -> Iterator[str]:
    """The files in a checkpoint's folder, relative to it, that have names of this format; the manifest is not told."""
    for folder in (*FOLDERS, ""):
        inside = os.path.join(path, folder)
        if os.path.islink(inside):
            continue
        try:
            entries = sorted(os.listdir(inside))
        except OSError:
            continue
        for name in entries:
            mine = names.attempt_of(name) is not None if folder else name == names.FACTS or _is_temporary(name)
            info = info_of(os.path.join(inside, name)) if mine else None
            if info is not None and not stat.S_ISDIR(info.st_mode):
                yield f"{folder}/{name}" if folder else name


def is_ours(entry: Entry) -> bool:
    """Whether an object in a checkpoint's folder has a name of this format; the manifest's is not told."""
    folder, _, name = entry.name.rpartition("/")
    if folder:
        return folder in FOLDERS and names.attempt_of(name) is not None
    return name == names.FACTS or _is_temporary(name)


def is_data(url: str, path: str) -> bool:
    """Whether an object is in the checkpoint's folder `path`, with a name of this format."""
    return is_ours(Entry(url[len(path) + 1 :], 0, False, None))


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and names.attempt_of(name) is not None


def is_begun(path: str) -> bool:
    """Whether a folder without files is one that a save has begun or a prune has emptied."""
    if all(os.path.isdir(os.path.join(path, name)) for name in FOLDERS):
        return True
    try:
        entries = set(os.listdir(path))
    except OSError:
        return False
    return entries <= set(FOLDERS) and names.step_of(os.path.basename(path)) is not None


def newest_change(path: str) -> float:
    """When something was last changed in a folder, in seconds since the epoch."""
    newest = 0.0
    for inside, _, files in os.walk(path):
        for at in (inside, *(os.path.join(inside, file) for file in files)):
            info = info_of(at)
            if info is not None:
                newest = max(newest, info.st_mtime)
    return newest


def info_of(path: str) -> os.stat_result | None:
    """What is known of a file, not of what it links to; None if there is none."""
    try:
        return os.lstat(path)
    except OSError:
        return None
