"""Publishing a checkpoint on a file system: index, root, and the order of syncs that makes the root the commit.

Two phases: writers have written and synced their data files (prepare) before anything here runs; then pages, then the
root under another name, then one exclusive link. Whoever sees `manifest.json` sees everything. docs/format.md, "Order
of writing".
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.storage.files import Files
from ckpt_formats.digest import BLOCK_SIZE, block_digests
from ckpt_formats.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, SaveFailedError
from ckpt_formats.native import names
from ckpt_formats.native.index import PAGE_ROWS
from ckpt_formats.native.reader import read_root
from ckpt_formats.native.root import PageFile, Root, encode


@dataclass(frozen=True, slots=True)
class Folder:
    """A checkpoint's folder that an attempt writes to, and the folders above it that the attempt made."""

    path: str
    made: Sequence[str]


def require_free(path: str) -> None:
    """Raise CheckpointExistsError if a committed checkpoint lies at the path."""
    if is_committed(path):
        raise CheckpointExistsError(
            f"{path} holds a committed checkpoint already, and checkpoints are never overwritten; "
            "save to another path, or remove that one first",
            path=path,
        )


def is_committed(path: str) -> bool:
    """Whether a checkpoint, whole or damaged, lies at the path."""
    return os.path.lexists(os.path.join(path, names.MANIFEST))


def prepare_folder(files: Files, path: str) -> Folder:
    """Make the folders of a checkpoint.

    Raises:
        CheckpointExistsError: a committed checkpoint lies there.
        SaveFailedError: a folder can't be made; those that were are removed again.
    """
    require_free(path)
    made: list[str] = []
    try:
        for name in (names.DATA, names.INDEX):
            files.make_folders(os.path.join(path, name), made)
    except OSError as error:
        remove_folders(files, made)
        raise SaveFailedError(
            f"{path}: the checkpoint's folder can't be made ({error.strerror or error}); nothing was saved. "
            "Save to another place, or make this one writable",
            path=path,
        ) from error
    return Folder(path, made)


def page_spans(counts: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Part the index into pages.

    Args:
        counts: chunks of each tensor, in the order of the rows.

    Returns:
        The first tensor of each page and the one after its last, and for each tensor its page and first row there
        ((0, 0) for a tensor without chunks).
    """
    spans: list[tuple[int, int]] = []
    placed: list[tuple[int, int]] = []
    begin = rows = 0
    for number, count in enumerate(counts):
        if rows and rows + count > PAGE_ROWS:
            spans.append((begin, number))
            begin, rows = number, 0
        placed.append((len(spans), rows) if count else (0, 0))
        rows += count
    if rows:
        spans.append((begin, len(counts)))
    return spans, placed


def write_page(files: Files, folder: str, attempt: str, number: int, data: bytearray, rows: int, leaf: int) -> PageFile:
    """Write a page of the index and sync it. `leaf` is what PageFile says of it."""
    path = names.index_path(number, attempt)
    _write_small(files, os.path.join(folder, path), data)
    return PageFile(path, len(data), rows, [block.hex() for block in block_digests(data, BLOCK_SIZE)], leaf)


def publish(files: Files, folder: Folder, root: Root) -> None:
    """Commit: sync what the root lists, write the root, and link it to its name.

    Raises:
        CheckpointExistsError: another attempt committed at this path meanwhile.
        OSError: nothing was committed.
    """
    publish_encoded(files, folder, root.attempt, encode(root))


def publish_encoded(files: Files, folder: Folder, attempt: str, root: bytes) -> None:
    """The same with the root as bytes: those of another checkpoint, when this is its copy.

    `attempt` is that of whoever publishes, which is not the copied root's own.
    """
    path = folder.path
    for name in (names.DATA, names.INDEX):
        files.sync_folder(os.path.join(path, name))
    temporary = os.path.join(path, names.temporary_manifest(attempt))
    _write_small(files, temporary, root)
    files.sync_folder(path)
    _sync_above(files, folder)
    _link(files, temporary, os.path.join(path, names.MANIFEST), path)
    try:
        files.sync_folder(path)
    except OSError as error:
        # too late to take it back: somebody may have found it already
        raise SaveFailedError(
            f"{path}: the checkpoint is committed and can be loaded, but the disk failed to say that it would outlast "
            f"a power cut ({error.strerror or error}); check the disk, and save the next one elsewhere",
            path=path,
        ) from error
    finally:
        with contextlib.suppress(OSError):
            # committed already: a second name that stays behind harms nobody
            files.remove(temporary)


def _link(files: Files, temporary: str, target: str, path: str) -> None:
    """The commit: exclusive, so that of two attempts one wins; atomic, so that the root is whole or absent."""
    try:
        files.link(temporary, target)
    except OSError as error:
        # a network file system may do it, lose the answer, and fail when it tries again
        if _are_same(temporary, target):
            return
        if isinstance(error, FileExistsError):
            raise CheckpointExistsError(
                f"{path}: another save committed a checkpoint here meanwhile; this one is given up", path=path
            ) from error
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise SaveFailedError(
                f"{path}: the file system allows no hard links, which publish a checkpoint atomically; "
                "save to one that does",
                path=path,
            ) from error
        raise


def _are_same(temporary: str, target: str) -> bool:
    try:
        return os.path.samefile(temporary, target)
    except OSError:
        return False


def _sync_above(files: Files, folder: Folder) -> None:
    """Sync the entries of the checkpoint's folder and of those above it.

    Somebody else may have made the upper ones, without syncing them; so they are synced, too, once, as far as the file
    system reaches and lets us.
    """
    path = folder.path
    ours = {os.path.dirname(made) for made in folder.made} | {os.path.dirname(path)}
    device = os.stat(path).st_dev
    while (parent := os.path.dirname(path)) != path:
        if parent in ours:
            files.sync_folder(parent)
        elif os.stat(parent).st_dev != device:
            break
        elif files.first_time(path):
            try:
                files.sync_folder(parent)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
                    raise
        path = parent


def is_linked(path: str, attempt: str) -> bool:
    """Whether an attempt has committed the checkpoint at the path; where that can't be told, it may have."""
    try:
        return read_root(path).attempt == attempt
    except CheckpointNotFoundError:
        return False
    except (CheckpointError, OSError):
        return True


def discard(files: Files, folder: Folder, attempt: str) -> None:
    """Remove what an attempt that failed has left behind, as far as the file system lets us.

    An attempt may fail after its commit (the last sync of the folder, say): then its files are a checkpoint's, and
    stay.
    """
    if is_linked(folder.path, attempt):
        return
    for name in (names.DATA, names.INDEX, ""):
        inside = os.path.join(folder.path, name) if name else folder.path
        with contextlib.suppress(OSError):
            for entry in os.listdir(inside):
                if attempt in entry:
                    with contextlib.suppress(OSError):
                        files.remove(os.path.join(inside, entry))
    remove_folders(files, folder.made)


def remove_folders(files: Files, made: Sequence[str]) -> None:
    """Remove folders that were made, unless there is something in them."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            files.remove_folder(path)


def _write_small(files: Files, path: str, data: bytes | bytearray) -> None:
    with files.create(path, direct=False) as file:
        file.write(memoryview(data), 0)
        file.sync()
