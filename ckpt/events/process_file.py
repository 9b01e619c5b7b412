"""Lines in a file that one process alone writes, so that ranks never interleave and nothing needs to be locked.

Knows no events.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import threading

__all__ = ["ProcessFile"]


class ProcessFile:
    """A file in a folder that is made, like the folder, when there is a first line to write.

    Its name has rank, host and process, and a number if the name is taken: no file is ever written by two processes, or
    by two lives of one. Each line is handed to the system at once and as a whole, so a process that dies loses none. A
    forked child has a file of its own.
    """

    def __init__(self, folder: str | os.PathLike[str], suffix: str) -> None:
        # as it is now: programs change their working folder
        self.folder = os.path.abspath(os.fspath(folder))
        self._suffix = suffix
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._file: int | None = None

    def write(self, rank: int, text: str, *, first: str = "") -> None:
        """Append `text`, whole lines. A new file is named after `rank` and begins with `first`.

        Does nothing once closed. Raises OSError.
        """
        if self._process != os.getpid():
            # the parent's descriptor is the parent's, and its lock may have been held when this process was forked
            self._reset()
        # the lock keeps the descriptor from being closed, and its number given to another file, before the write
        with self._lock:
            if self._closed:
                return
            if self._file is None:
                self._file = self._create(rank)
                text = first + text
            self._write(self._file, text)

    def close(self, last: str = "") -> None:
        """Append `last` if there is a file, and close it."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
            if self._file is None:
                return
            try:
                self._write(self._file, last)
            finally:
                os.close(self._file)
                self._file = None

    def _create(self, rank: int) -> int:
        os.makedirs(self.folder, exist_ok=True)
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        name = f"rank{rank:05d}-{host}-{self._process}"
        for number in itertools.count(1):
            path = os.path.join(self.folder, f"{name}{f'-{number}' if number > 1 else ''}{self._suffix}")
            with contextlib.suppress(FileExistsError):
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        raise AssertionError("counts without end")

    @staticmethod
    def _write(file: int, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(file, data) :]
