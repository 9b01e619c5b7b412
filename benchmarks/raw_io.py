"""The raw limit: the least that any system must do, moving a rank's bytes between memory and one file.

Memory is page-aligned, contiguous and touched, which no model's is; there are no names, no checksums and nothing to
copy. Knows nothing of tensors.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from benchmarks.files import sync_path
from benchmarks.interleave import Load, System, Way
from benchmarks.ranks import Group

_IO_BYTES = 16 << 20
_BLOCK = 1 << 20
_ROW = 4096

RAW = "raw"


class RawMemory:
    """`nbytes` of page-aligned random bytes, written and read as they are; a Destination."""

    def __init__(self, nbytes: int, seed: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # a direct write from scattered small pages takes more requests
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._array = np.frombuffer(self._map, dtype=np.uint8)
        generator = np.random.Generator(np.random.SFC64(seed))
        for start in range(0, nbytes, _IO_BYTES):
            part = self._array[start : start + _IO_BYTES]
            part[:] = np.frombuffer(generator.bytes(part.size), dtype=np.uint8)
        self._digest = xxhash.xxh3_64_digest(self._view)

    def spoil(self) -> None:
        self._array[:] = 0

    def check(self) -> None:
        if xxhash.xxh3_64_digest(self._view) != self._digest:
            raise AssertionError("a raw read did not bring back what was written")

    def write(self, path: Path, *, direct: bool, threads: int) -> None:
        """Write all to a new file at `path` and fsync it. `direct` goes past the page cache, which costs no copy."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o644)
        try:
            self._in_parts(threads, lambda start, stop: os.pwrite(file, self._view[start:stop], start))
            os.fsync(file)
        finally:
            os.close(file)
        sync_path(path.parent)

    def read(self, path: Path, *, threads: int, direct: bool = False) -> None:
        file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            self._in_parts(threads, lambda start, stop: os.preadv(file, [self._view[start:stop]], start))
        finally:
            os.close(file)

    def read_hashed(self, path: Path, *, parts: int = 1) -> None:
        """Read and hash block by block, while the CPU's cache has the block: the least that a reader that verifies can
        do. With `parts`, by way of other memory, from where rows of 4 KiB are copied in so many parts: the least where
        ranks with columns share the reading of rows.
        """
        room = memoryview(bytearray(_IO_BYTES if parts > 1 else 0))
        file = os.open(path, os.O_RDONLY)

        def move(start: int, stop: int) -> int:
            target = room[: stop - start] if parts > 1 else self._view[start:stop]
            moved = 0
            for at in range(0, stop - start, _BLOCK):
                block = target[at : at + _BLOCK]
                moved += os.preadv(file, [block], start + at)
                xxhash.xxh3_128_digest(block)
            if parts > 1:
                source = np.frombuffer(target, np.uint8).reshape(-1, parts, _ROW // parts)
                into = self._array[start:stop].reshape(-1, parts, _ROW // parts)
                for part in range(parts):
                    into[:, part] = source[:, part]
            return moved

        try:
            self._in_parts(1, move)
        finally:
            os.close(file)

    def copy_from_map(self, path: Path, *, threads: int) -> None:
        """Read by mapping the file and copying from there: no system calls, but a page fault for every few pages."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), self.nbytes, prot=mmap.PROT_READ) as mapped:
            # Not bound to a name: the map can't be closed while an array of it lives.
            self._in_parts(threads, partial(self._copy, np.frombuffer(mapped, dtype=np.uint8)))

    def _copy(self, source: npt.NDArray[np.uint8], start: int, stop: int) -> int:
        self._array[start:stop] = source[start:stop]
        return stop - start

    def _in_parts(self, threads: int, move: Callable[[int, int], int]) -> None:
        def whole(start: int) -> None:
            stop = min(start + _IO_BYTES, self.nbytes)
            if move(start, stop) != stop - start:
                raise OSError(errno.EIO, f"bytes {start} to {stop} were moved only in part; is the disk full?")

        starts = range(0, self.nbytes, _IO_BYTES)
        if threads == 1:
            for start in starts:
                whole(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(whole, starts))


def can_write_directly(folder: Path) -> bool:
    """Whether the file system of `folder` takes O_DIRECT."""
    probe = folder / "direct-io-probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def raw_system(group: Group, memory: RawMemory, *, direct: bool) -> System:
    """Every way to write and read that may be the fastest on some machine; all ranks at once, a file each."""

    def path(folder: Path) -> Path:
        return folder / f"{group.rank}.bin"

    def writing(setting: str, *, direct: bool, threads: int) -> Way:
        return Way(setting, lambda folder: memory.write(path(folder), direct=direct, threads=threads))

    saves = [writing("buffered write + fsync", direct=False, threads=1)]
    # Direct writing needs sizes that are a multiple of the device's blocks.
    if direct and memory.nbytes % mmap.PAGESIZE == 0:
        saves += [
            writing("O_DIRECT + fsync", direct=True, threads=1),
            writing("O_DIRECT + fsync, 2 threads", direct=True, threads=2),
            writing("O_DIRECT + fsync, 4 threads", direct=True, threads=4),
        ]
    loads = [
        Way("read", lambda folder: memory.read(path(folder), threads=1)),
        Way("read, 2 threads", lambda folder: memory.read(path(folder), threads=2)),
        Way("copy from mmap", lambda folder: memory.copy_from_map(path(folder), threads=1)),
        Way("copy from mmap, 2 threads", lambda folder: memory.copy_from_map(path(folder), threads=2)),
    ]
    return System(RAW, saves, [Load("load", memory, loads)], all_ways=True)
