"""Recording metrics, tags and pins beside a checkpoint: written under another name, synced, renamed.

So a reader finds the facts of before or of after, whole, whatever dies when. The checkpoint itself is not written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator

from ckpt.storage.files import Files
from ckpt.storage.objects import ObjectStore
from ckpt_formats.errors import CheckpointError, SaveFailedError, StoreError
from ckpt_formats.facts import Facts, encode, read_facts
from ckpt_formats.locks import held
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE, folders_of, root_folder
from ckpt_formats.native.reader import is_native
from ckpt_formats.urls import is_url, normal

PATIENCE_S = 10.0
"""Seconds to wait for somebody else who records facts of the same checkpoint."""


def update_facts(
    path: str | os.PathLike[str], change: Callable[[Facts], Facts], *, files: Files | None = None
) -> Facts:
    """Record what `change` makes of the facts of the committed checkpoint in folder `path`; returns it.

    Others who do so at the same time come before or after, and none's change is lost, where the file system has locks,
    or the store conditional puts.

    Args:
        path: a checkpoint's folder, or its URL in a store.
        change: makes the new facts of the old ones.
        files: what writes to folders.

    Raises:
        CheckpointNotFoundError: no committed checkpoint is there.
        CorruptionError, FormatError: the facts that are there can't be read; they stay as they are.
        FactsError: a tag or metric can't be recorded.
        SaveFailedError: writing failed; the facts of before are still there.
        StoreError: so did a store.
    """
    folder = normal(path)
    if is_url(folder):
        return _update_in_store(folder, change)
    if NODE in folder:
        # beside each node's part, as far as they can be reached
        all_of_them = [update_facts(each, change, files=files) for each in folders_of(folder) if is_native(each)]
        return all_of_them[0] if all_of_them else update_facts(root_folder(folder), change, files=files)
    files = files or Files()
    try:
        # held: who prunes looks at the facts when nobody holds it, so a pin that was set is never overlooked
        with held(folder), _turn(folder):
            before = read_facts(folder)
            after = change(before)
            if after != before:
                write_facts(files, folder, after)
            return after
    except CheckpointError:
        raise
    except OSError as error:
        raise SaveFailedError(
            f"{folder}: metrics, tags or pin could not be recorded ({error.strerror or error}); the checkpoint and "
            "what was recorded of it before are untouched. Free space or make the folder writable, then try again",
            path=folder,
        ) from error


def _update_in_store(url: str, change: Callable[[Facts], Facts]) -> Facts:
    store = ObjectStore(url)
    with held(url), _turn_in_store(store):
        before = read_facts(url)
        after = change(before)
        if after != before:
            store.put(os.path.join(url, names.FACTS), encode(after))
        return after


@contextlib.contextmanager
def _turn_in_store(store: ObjectStore) -> Iterator[None]:
    """Nobody else records facts of a checkpoint in a store within the block: an object that is made exclusively."""
    turn = os.path.join(store.url, names.temporary("turn", "0" * 16))
    mine = secrets.token_hex(8).encode("ascii")
    deadline = time.monotonic() + 2 * PATIENCE_S
    first: bytes | None = None
    seen = time.monotonic()
    while not store.create(turn, mine):
        with contextlib.suppress(FileNotFoundError):
            other = store.read(turn)
            if other != first:
                first, seen = other, time.monotonic()
            elif time.monotonic() - seen > PATIENCE_S:
                store.remove(turn)  # whoever made it takes no longer than that, or died
        if time.monotonic() > deadline:
            why = f"another process has been recording facts of it for {2 * PATIENCE_S:.0f} s; try again"
            raise StoreError(f"{store.url}: {why}", path=store.url)
        time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):
            store.remove(turn)


def write_facts(files: Files, folder: str, facts: Facts) -> None:
    """Publish facts in a checkpoint's folder, in place of those that are there. Raises OSError, FactsError."""
    data = encode(facts)
    temporary = os.path.join(folder, names.temporary("facts", secrets.token_hex(8)))
    try:
        with files.create(temporary, direct=False) as file:
            file.write(memoryview(data), 0)
            file.sync()
        files.rename(temporary, os.path.join(folder, names.FACTS))
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove(temporary)
        raise
    files.sync_folder(folder)


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Nobody else records facts here within the block, where the file system can lock a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    why = f"another process has been recording facts of it for {PATIENCE_S:.0f} s"
                    raise OSError(errno.EBUSY, why, folder) from None
                time.sleep(0.01)
            except OSError:
                break  # no locks here
        yield
    finally:
        os.close(fd)
