"""The arena: shared memory in which a rank's state is captured, mapped by the trainer and by its agent.

A file in a memory file system, allocated whole before it is used (a tmpfs that is full later kills by SIGBUS), and
with its pages touched, so that the first capture is as fast as the tenth. Captures lie in it one beside the other, each
in a range of its own (a slot), laid out as the data files that it will become. A plain mmap:
`multiprocessing.shared_memory` unlinks segments that are in use when an attached process is killed. Knows no
checkpoints.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
import weakref

from ckpt_formats.errors import SaveFailedError
from ckpt_formats.memory import map_at

PAGE = mmap.PAGESIZE
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""Populate: the page faults are taken when the arena is made, not by the first capture."""
_NOTHING = 0
"""PROT_NONE of Linux, which the module mmap does not tell."""


class Arena:
    """The agent's side: the file, and which ranges of it are in use.

    Attributes:
        path: the file.
        size: its bytes, a multiple of the page size.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size = pages(size)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size, flags=_FLAGS)
        except OSError as error:
            os.unlink(path)
            raise SaveFailedError(
                f"there is no room for {size} bytes of captures in {os.path.dirname(path)} ({error.strerror}); declare "
                "less with memory=…, save synchronously, or make the memory file system larger",
                path=path,
            ) from error
        finally:
            os.close(fd)
        self._used: list[tuple[int, int]] = []
        """Ranges (start, stop) in use, sorted."""
        self._changed = threading.Condition()

    def acquire(self, nbytes: int, timeout: float) -> int | None:
        """Take a range of free memory, waiting for one for at most `timeout` seconds.

        Returns where it begins; None if there was none in time.
        """
        with self._changed:
            deadline = time.monotonic() + timeout
            while (start := self._gap(pages(nbytes))) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            bisect.insort(self._used, (start, start + pages(nbytes)))
            return start

    def release(self, start: int) -> None:
        """Give a range back."""
        with self._changed:
            self._used = [used for used in self._used if used[0] != start]
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing is in use."""
        with self._changed:
            return not self._used

    def view(self, start: int, nbytes: int) -> memoryview:
        """The memory of a range, up to the end of its last page."""
        return memoryview(self._map)[start : start + pages(nbytes)]

    def remove(self) -> None:
        """Unlink the file; its memory is freed when the last process unmaps it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _gap(self, nbytes: int) -> int | None:
        """Where the first gap of so many bytes begins."""
        at = 0
        for start, stop in self._used:
            if start - at >= nbytes:
                return at
            at = stop
        return at if self.size - at >= nbytes else None


class MappedArena:
    """The trainer's side: the same memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, flags=_FLAGS)
        finally:
            os.close(fd)
        _mapped[self._map] = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def all(self) -> memoryview:
        """All of its memory."""
        return memoryview(self._map)

    def view(self, start: int, nbytes: int) -> memoryview:
        """The memory of a range, up to the end of its last page."""
        return memoryview(self._map)[start : start + pages(nbytes)]


_mapped: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
"""Where the arenas lie that this process has mapped."""


def _leave_to_parent() -> None:
    """In a forked process, such as a data loader's worker, which would hold the memory for as long as it lives: give it
    up, but keep its addresses. With MADV_DONTFORK they would be free for what is mapped next, and when the garbage
    collector finds the arena, it unmaps what lies there.
    """
    for arena, address in list(_mapped.items()):
        with contextlib.suppress(OSError):
            map_at(address, len(arena), _NOTHING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_leave_to_parent)


def pages(nbytes: int) -> int:
    """As many bytes, rounded up to whole pages; at least one."""
    return -(-max(nbytes, 1) // PAGE) * PAGE
