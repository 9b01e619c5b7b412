"""Where agents live: a folder for each in a memory file system, with its socket, its log and the arenas.

A folder is locked for as long as its agent lives, by a lock that the kernel gives back however it ends. So whoever
starts an agent finds what one that was killed has left in memory, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from typing import NamedTuple

MEMORY = "/dev/shm"  # noqa: S108 - folders of our own are made in it, which only this user can enter
"""Where homes lie; the temporary folder where there is no such file system."""
_LOCK = "lock"
_YOUNG = 60.0
"""Seconds for which one that has not got its name yet is left alone: it is being made."""


class Home(NamedTuple):
    """A home that was made; `lock` is the descriptor to be inherited by its agent."""

    path: str
    lock: int


def make_home() -> Home:
    """Make a home, and remove those of agents that were killed. Raises OSError."""
    shared = MEMORY if os.access(MEMORY, os.W_OK) else tempfile.gettempdir()
    prefix = f"ckpt-agent-{os.getuid()}-"
    with contextlib.suppress(OSError):
        for entry in os.scandir(shared):
            if entry.name.startswith(prefix):
                _remove_if_left(entry.path)
            elif entry.name.startswith(f".{prefix}"):
                _remove_if_old(entry.path)
    new = tempfile.mkdtemp(prefix=f".{prefix}", dir=shared)
    lock = os.open(os.path.join(new, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # under the name by which others find it, it is locked from the first moment
    path = os.path.join(shared, os.path.basename(new)[1:])
    os.rename(new, path)
    return Home(path, lock)


def _remove_if_left(path: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # raises while its agent lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _remove_if_old(path: str) -> None:
    with contextlib.suppress(OSError):
        if time.time() - os.stat(path).st_mtime > _YOUNG:
            shutil.rmtree(path, ignore_errors=True)
