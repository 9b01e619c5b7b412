"""The link to the storage that an agent writes to: how fast it takes bytes, and how fast it may.

All files of an agent share it. Knows no checkpoints.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckpt.storage.files import File, Files
from ckpt.storage.throttle import Throttle

SLOW = 300e6
"""Bytes per second below which compression pays: a CPU compresses about three times as fast, and the link has that much
less to take."""
MEASURED = 16 << 20
"""Bytes after which a measurement means something."""
REMEMBERED = 1 << 30
"""Bytes after which the past counts half, for links that become slower or faster."""


class Link:
    """Measures and, if it is asked to, limits what is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._throttle = Throttle()
        self._active = 0
        self._since = 0.0
        self._bytes = 0
        self._busy = 0.0

    def limit(self, bandwidth: float | None) -> None:
        """From now on, write at most so many bytes per second; None for as many as the storage takes."""
        self._throttle.limit(bandwidth)

    @property
    def speed(self) -> float | None:
        """Bytes per second while anything was being written; None while too little was."""
        with self._lock:
            return self._bytes / self._busy if self._bytes >= MEASURED and self._busy else None

    @property
    def slow(self) -> bool:
        """Whether it is known to be so slow that compression pays."""
        speed = self.speed
        return speed is not None and speed < SLOW

    def do(self, what: Callable[[], None], nbytes: int) -> None:
        """Write so many bytes, by calling `what` when they are due."""
        with self._lock:
            now = time.monotonic()
            if not self._active:
                self._since = now
            self._active += 1
        due = self._throttle.take(nbytes)
        try:
            what()
            left = due - time.monotonic()
            if left > 0:
                time.sleep(left)
        finally:
            with self._lock:
                self._active -= 1
                self._bytes += nbytes
                # not only when all is quiet: on slow storage it never is
                now = time.monotonic()
                self._busy += now - self._since
                self._since = now
                if self._bytes > REMEMBERED:
                    self._bytes //= 2
                    self._busy /= 2


class LinkedFiles(Files):
    """Files that are written through a link."""

    def __init__(self, files: Files, link: Link) -> None:
        super().__init__()
        self._files = files
        self._link = link

    def create(self, path: str, *, direct: bool) -> File:
        """See Files."""
        return _LinkedFile(self._files.create(path, direct=direct), self._link)


class _LinkedFile(File):
    """A file of another `Files`, with its own ways of writing."""

    def __init__(self, file: File, link: Link) -> None:
        super().__init__(file.path, -1, file.direct)
        self._file = file
        self._link = link

    def write(self, data: memoryview, at: int) -> None:
        """See File."""
        self._link.do(lambda: self._file.write(data, at), len(data))

    def truncate(self, size: int) -> None:
        """See File."""
        self._file.truncate(size)

    def sync(self) -> None:
        """See File."""
        self._link.do(self._file.sync, 0)

    def close(self) -> None:
        """See File."""
        self._file.close()
