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
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.facts import Facts, encode, read_facts
from ckpt_formats.locks import held
from ckpt_formats.native import names

PATIENCE_S = 10.0
"""Seconds to wait for somebody else who records facts of the same checkpoint."""


def update_facts(
    path: str | os.PathLike[str], change: Callable[[Facts], Facts], *, files: Files | None = None
) -> Facts:
    """Record what `change` makes of the facts of the committed checkpoint in folder `path`; returns it.

    Others who do so at the same time come before or after, and none's change is lost, where the file system has locks.

    Raises:
        CheckpointNotFoundError: no committed checkpoint is there.
        CorruptionError, FormatError: the facts that are there can't be read; they stay as they are.
        FactsError: a tag or metric can't be recorded.
        SaveFailedError: writing failed; the facts of before are still there.
    """
    folder = os.path.abspath(os.fspath(path))
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
