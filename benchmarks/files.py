"""Files of the benchmarks: synced where a peer leaves that to the user, put into the page cache, taken out of it."""

from __future__ import annotations

import os
from pathlib import Path

_READ_BYTES = 16 << 20


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache, but for what waits to be written."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Have a folder's files in the page cache, read in large pieces."""
    buffer = bytearray(_READ_BYTES)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
