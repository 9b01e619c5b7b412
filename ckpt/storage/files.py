"""Every change that a save makes to a file system, through one small object.

So that direct I/O, syncing and exclusive publishing are decided in one place, and a test can count, fail, record or
kill at each of them. Knows no checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Self

ALIGNMENT = 4096
"""What O_DIRECT needs of positions, lengths and memory addresses on every file system we know."""
_TIMES = 10
"""How often folders are made anew that others remove."""


class File:
    """A file open for writing. Close it, or use it in a `with` block.

    Attributes:
        path: where it lies.
        direct: whether it bypasses the page cache, so that writes must be aligned.
    """

    def __init__(self, path: str, fd: int, direct: bool) -> None:
        self.path = path
        self.direct = direct
        self._fd = fd

    def write(self, data: memoryview, at: int) -> None:
        """Write all of data at position `at`; safe from several threads. Raises OSError."""
        while data:
            count = os.pwrite(self._fd, data, at)
            if count == 0:
                raise OSError(errno.EIO, "the file system took no bytes", self.path)
            if self.direct and count < len(data):
                # a short direct write may end unaligned; the rest goes again from the last aligned position
                count -= count % ALIGNMENT
                if count == 0:
                    raise OSError(errno.EIO, "the file system took only a part of a block", self.path)
            data = data[count:]
            at += count

    def truncate(self, size: int) -> None:
        """Set the file's size in bytes: cuts the padding of the last direct write."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Return when the file's bytes and size are on stable storage."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_memory(fd: int) -> bool:
    """Whether a file lies in memory, where O_DIRECT is taken and means nothing but a copy."""
    device = os.fstat(fd).st_dev
    return (os.major(device), os.minor(device)) in _memory_file_systems()


@cache
def _memory_file_systems() -> set[tuple[int, int]]:
    """Devices (major, minor) of the tmpfs that are mounted."""
    found: set[tuple[int, int]] = set()
    with suppress(OSError, ValueError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.split()
            if fields[fields.index("-") + 1] in ("tmpfs", "ramfs"):
                major, minor = fields[2].split(":")
                found.add((int(major), int(minor)))
    return found


class Files:
    """The changes a save makes to a mounted file system. All methods raise OSError."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def first_time(self, path: str) -> bool:
        """Whether this is the first time that this is asked for a path: for what need be done only once."""
        if path in self._seen:
            return False
        self._seen.add(path)
        return True

    def make_folders(self, path: str, made: list[str]) -> None:
        """Make a folder and those above it; appends the ones that were made to `made`, the outermost first."""
        for _ in range(_TIMES):
            try:
                self._make_folders(path, made)
            except FileNotFoundError:
                # a save that failed, and had made a folder above, has removed that meanwhile
                continue
            return
        self._make_folders(path, made)

    def _make_folders(self, path: str, made: list[str]) -> None:
        missing: list[str] = []
        at = path
        while not os.path.isdir(at):
            missing.append(at)
            parent = os.path.dirname(at) or "."
            if parent == at:
                break
            at = parent
        for folder in reversed(missing):
            try:
                self.make_folder(folder)
                made.append(folder)
            except FileExistsError:
                # another rank was faster, which is fine; a file of that name is not
                if not os.path.isdir(folder):
                    raise

    def make_folder(self, path: str) -> None:
        os.mkdir(path)

    def create(self, path: str, *, direct: bool) -> File:
        """Create a file that must not exist; with `direct`, past the page cache if the file system can."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if direct and hasattr(os, "O_DIRECT"):
            try:
                fd = os.open(path, flags | os.O_DIRECT, 0o666)
                if _is_memory(fd):
                    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
                    return File(path, fd, False)
                return File(path, fd, True)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                # some file systems create the file and then refuse the flag
                if os.path.exists(path):
                    os.unlink(path)
        return File(path, os.open(path, flags, 0o666), False)

    def sync_folder(self, path: str) -> None:
        """Return when the folder's entries are on stable storage."""
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, atomically. Raises FileExistsError if the name is taken."""
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, atomically; what had that name before is gone."""
        os.replace(source, target)

    def sync_file(self, path: str) -> None:
        """Return when the bytes and size of a file that somebody wrote before are on stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: str) -> None:
        """Remove a name of a file."""
        os.unlink(path)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        os.rmdir(path)
