"""Byte sources: something that can read a range of bytes into a buffer.

A place in a location map is a range of a byte source. Knows no tensors. Local files here, objects of stores in
remote.py; `open_source` and `read_small` take paths and URLs alike.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from typing import Protocol, TypeGuard

from ckpt_formats.errors import CorruptionError
from ckpt_formats.remote import RemoteFile, Store
from ckpt_formats.urls import is_url

PAGE = mmap.PAGESIZE


class ByteSource(Protocol):
    """Random access to immutable bytes. Implementations are safe to call from several threads."""

    @property
    def name(self) -> str:
        """What to call it in messages, e.g. its path."""
        ...

    def size(self) -> int:
        """Its length in bytes. Raises CorruptionError if it is not there."""
        ...

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` (stop - start writable bytes) with the bytes start..stop.

        Raises:
            CorruptionError: it is not there, ends before `stop`, or the device can't read it.
        """
        ...

    def close(self) -> None:
        """Give back what it holds open. Reading after that opens it again."""
        ...


class DeviceSource(ByteSource, Protocol):
    """A source that may lie on a device of this machine, behind its page cache."""

    def cached(self, positions: Sequence[int]) -> int:
        """How many of these bytes lie in the page cache; all of them where nobody can say."""
        ...

    def read_past_cache(self, start: int, stop: int, into: memoryview) -> memoryview | None:
        """Read from the device, past the page cache, where that can be done.

        Args:
            start, stop: the bytes that are wanted.
            into: page-aligned memory, with room for two pages more than that.

        Returns the bytes, which lie somewhere in `into`; None where it can't be done, or not all of them are had.
        """
        ...


def on_device(source: ByteSource) -> TypeGuard[DeviceSource]:
    """Whether it is a DeviceSource; what `isinstance` finds out of a protocol takes many times as long."""
    return hasattr(source, "read_past_cache")


def open_plain(path: str) -> int:
    """Open a file for reading; links are followed. Returns its descriptor.

    Raises OSError, also for what is no plain file: opening a pipe would wait for its writer, and a device has no end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOTSUP
        raise OSError(code, "it is a folder" if stat.S_ISDIR(mode) else "it is not a plain file", path)
    return fd


class LocalFile:
    """A file on a mounted file system, opened at the first read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._direct = -1
        self._refuses_direct = not hasattr(os, "O_DIRECT")

    @property
    def name(self) -> str:
        return self._path

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = open_plain(self._path)
                except OSError as error:
                    raise self._unreadable(error) from error
            return self._fd

    def _unreadable(self, error: OSError) -> CorruptionError:
        return CorruptionError(
            f"{self._path}: a file of the checkpoint can't be read ({error.strerror}); "
            "restore the file or use another checkpoint",
            path=self._path,
        )

    def size(self) -> int:
        fd = self._open()
        try:
            return os.fstat(fd).st_size
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, start: int, stop: int, into: memoryview) -> None:
        fd = self._fd if self._fd >= 0 else self._open()
        at = start
        while at < stop:
            try:
                count = os.preadv(fd, [into if at == start else into[at - start :]], at)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise CorruptionError(
                    f"{self._path}: the file ends at byte {at}, but bytes up to {stop} are needed; "
                    "it was truncated: restore it or use another checkpoint",
                    path=self._path,
                )
            at += count

    def cached(self, positions: Sequence[int]) -> int:
        fd = self._open()
        page = bytearray(1)
        found = 0
        try:
            # else each look would have the kernel read more than the page
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for at in positions:
                with contextlib.suppress(BlockingIOError):
                    found += os.preadv(fd, [page], at, os.RWF_NOWAIT) > 0
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
        except (AttributeError, OSError):
            return len(positions)
        return found

    def read_past_cache(self, start: int, stop: int, into: memoryview) -> memoryview | None:
        fd = self._open_direct()
        if fd < 0:
            return None
        low, high = start - start % PAGE, -(-stop // PAGE) * PAGE
        at = low
        try:
            while at < stop:
                count = os.preadv(fd, [into[at - low : high - low]], at)
                # a file that ends here, or a device with larger blocks: the plain way finds out
                if count == 0 or (at + count < stop and count % PAGE):
                    return None
                at += count
        except OSError:
            self._refuses_direct = True
            return None
        return into[start - low : stop - low]

    def _open_direct(self) -> int:
        with self._lock:
            if self._direct < 0 and not self._refuses_direct:
                try:
                    self._direct = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
                except OSError:
                    self._refuses_direct = True
            return self._direct if not self._refuses_direct else -1

    def close(self) -> None:
        with self._lock:
            for fd in (self._fd, self._direct):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._direct = -1

    def __del__(self) -> None:
        for fd in (getattr(self, "_fd", -1), getattr(self, "_direct", -1)):
            if fd >= 0:
                os.close(fd)


def open_source(path: str) -> ByteSource:
    """The file at a path, or the object at a URL. Touches nothing before the first read."""
    return RemoteFile(path) if is_url(path) else LocalFile(path)


def read_small(path: str, limit: int) -> bytes | None:
    """All bytes of a small file or object; None, and nothing of it is read, if it has more than `limit`.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        OSError: it can't be read; StoreError when its store can't.
    """
    if is_url(path):
        return Store(path).read_small(path, limit)
    fd = open_plain(path)
    with open(fd, "rb") as stream:
        return None if os.fstat(fd).st_size > limit else stream.read()


class InMemory:
    """A byte source of bytes that were read before, those from `origin` on."""

    def __init__(self, name: str, data: memoryview, origin: int = 0) -> None:
        self.name = name
        self._data = data
        self._origin = origin

    def size(self) -> int:
        return self._origin + len(self._data)

    def read(self, start: int, stop: int, into: memoryview) -> None:
        into[: stop - start] = self._data[start - self._origin : stop - self._origin]

    def close(self) -> None:
        pass
