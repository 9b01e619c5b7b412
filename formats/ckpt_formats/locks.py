"""Who uses a checkpoint now: shared and exclusive locks on its manifest, which end with the process that holds them.

A reader or copier holds a checkpoint while it uses it; whoever removes it asks for it alone, and is refused until then.
Where the file system has no locks (some network file systems), nobody is protected and nobody is refused. In a store,
leases do the same (leases.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ckpt_formats import leases
from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.native import names
from ckpt_formats.sources import open_plain
from ckpt_formats.urls import is_url

__all__ = ["Hold", "alone", "held", "hold"]

PATIENCE_S = 5.0
"""Seconds to wait while somebody has a checkpoint alone: who removes it takes its name away at once, else lets go."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Hold(Protocol):
    """That somebody uses a checkpoint; ends with `release`, or with the process."""

    def release(self, *, wait: bool = True) -> None:
        """Use it no more; with `wait`, return when others know."""
        ...


class _Lock:
    """A shared lock on a manifest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self, *, wait: bool = True) -> None:  # noqa: ARG002 - known at once
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def hold(path: str) -> Hold:
    """Use the checkpoint in folder `path`, or below that URL, until it is released: nobody prunes it meanwhile.

    Raises:
        CheckpointNotFoundError: it is not there, or it is being removed now.
        OSError: its manifest can't be opened.
    """
    if is_url(path):
        return leases.hold(path)
    manifest = os.path.join(path, names.MANIFEST)
    try:
        fd = open_plain(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise _gone(path) from None
    lock = _Lock(fd)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (locked := _lock(fd, fcntl.LOCK_SH)) and _is_there(fd, manifest) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not locked or not _is_there(fd, manifest):
            raise _gone(path)
    except BaseException:
        lock.release()
        raise
    return lock


@contextmanager
def held(path: str) -> Iterator[None]:
    """Use a checkpoint within the block; see `hold`."""
    using = hold(path)
    try:
        yield
    finally:
        using.release()


@contextmanager
def alone(path: str) -> Iterator[bool]:
    """Whether nobody else uses the checkpoint in folder `path`; if so, nobody begins to within the block.

    Raises:
        CheckpointNotFoundError: it is not there any more.
        OSError: its manifest can't be opened.
    """
    if is_url(path):
        with leases.alone(path) as free:
            yield free
        return
    manifest = os.path.join(path, names.MANIFEST)
    try:
        fd = open_plain(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise _gone(path) from None
    try:
        try:
            free = _lock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            # NFS makes record locks of these, which want a file that is open for writing; nothing is written
            writable = os.open(manifest, os.O_RDWR | os.O_CLOEXEC)
            os.close(fd)
            fd = writable
            free = _lock(fd, fcntl.LOCK_EX)
        if free and not _is_there(fd, manifest):
            raise _gone(path)
        yield free
    finally:
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    """Lock a file without waiting; whether that could be done, or there are no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_there(fd: int, manifest: str) -> bool:
    """Whether the open file still is the one of that name."""
    try:
        there = os.stat(manifest)
    except OSError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _gone(path: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{path}: no checkpoint is there, or it is being removed; use another one", path=path
    )
