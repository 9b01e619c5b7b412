"""The arena: shared memory in which a rank's state is captured, mapped by the trainer and by its agent.

A file in a memory file system, allocated whole before it is used (a tmpfs that is full later kills by SIGBUS), and
with its pages touched, so that the first capture is as fast as the tenth. Divided into slots; each holds one capture,
laid out as the data file that it will become. A plain mmap: `multiprocessing.shared_memory` unlinks segments that are
in use when an attached process is killed. Knows no checkpoints.
"""

from __future__ import annotations

import mmap
import os
import threading
import time

from ckpt_formats.errors import SaveFailedError

PAGE = mmap.PAGESIZE
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""Populate: the page faults are taken when the arena is made, not by the first capture."""


class Arena:
    """The agent's side: the file, and which of its slots are free.

    Attributes:
        path: the file.
        slot_bytes: size of a slot, a multiple of the page size.
    """

    def __init__(self, path: str, slot_bytes: int, slots: int) -> None:
        self.path = path
        self.slot_bytes = -(-max(slot_bytes, 1) // PAGE) * PAGE
        size = self.slot_bytes * slots
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size, flags=_FLAGS)
        except OSError as error:
            os.unlink(path)
            raise SaveFailedError(
                f"there is no room for {slots} slots of {self.slot_bytes} bytes in {os.path.dirname(path)} "
                f"({error.strerror}); save synchronously, or make the memory file system larger",
                path=path,
            ) from error
        finally:
            os.close(fd)
        self._free = list(range(slots))
        self._slots = slots
        self._changed = threading.Condition()

    def acquire(self, timeout: float) -> int | None:
        """Take a free slot, waiting for one for at most `timeout` seconds; None if none was given back in time."""
        with self._changed:
            deadline = time.monotonic() + timeout
            while not self._free:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """Whether all slots are free."""
        with self._changed:
            return len(self._free) == self._slots

    def view(self, slot: int) -> memoryview:
        """The memory of a slot."""
        return memoryview(self._map)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def remove(self) -> None:
        """Unlink the file; its memory is freed when the last process unmaps it."""
        os.unlink(self.path)


class MappedArena:
    """The trainer's side: the same memory."""

    def __init__(self, path: str, slot_bytes: int) -> None:
        self.path = path
        self._slot_bytes = slot_bytes
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, flags=_FLAGS)
        finally:
            os.close(fd)

    def view(self, slot: int) -> memoryview:
        """The memory of a slot."""
        return memoryview(self._map)[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
