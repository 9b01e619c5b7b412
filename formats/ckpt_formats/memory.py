"""Memory of our own to read into and to write from, in huge pages where there are any.

A fault for each small page costs as much as reading it; and direct reads and writes of small pages, which lie scattered
in the machine's memory, take many more requests to the disk: up to three times as long, on the disk that we measured.
Pages can only be huge where memory begins at a multiple of their size, and kernels do not see to that.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import numpy as np

HUGE = 2 << 20
"""Bytes of a huge page."""
_MAP_FIXED = 0x10
"""MAP_FIXED of Linux, which the module mmap does not tell."""
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1: make pages huge now, whatever the system's defaults are. Others know no such advice."""


def scratch(size: int) -> memoryview:
    """Page-aligned zeroed memory of at least one byte, for this process."""
    if size < HUGE:
        return memoryview(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    room, at = _room(size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(room)[at : at + size]


def shared(fd: int, size: int, *, fresh: bool = False) -> memoryview:
    """A file of memory (memfd) from its beginning on, mapped to share it with other processes. Linux only.

    Args:
        fd: may be closed afterwards.
        size: at least one byte; the file has as many.
        fresh: nobody has used the file yet: it gets its pages now.

    Raises OSError.
    """
    # what is mapped over a part of other memory goes with it
    room, at = _room(size)
    map_at(_address(room) + at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
    view = memoryview(room)[at : at + size]
    if fresh and size >= HUGE:
        # of every huge page there has to be something
        np.frombuffer(view, np.uint8)[::HUGE] = 0
        with contextlib.suppress(OSError):
            room.madvise(_COLLAPSE, at, size - size % HUGE)
    return view


def map_at(address: int, size: int, protection: int, flags: int, fd: int) -> None:
    """Map a file, or memory without one (-1), in the place of what this process has mapped at an address. Linux only.

    Raises OSError.
    """
    if _map()(address, size, protection, flags | _MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "memory can't be mapped")


def _room(size: int) -> tuple[mmap.mmap, int]:
    """Memory in which so many bytes have room from a multiple of a huge page's size on, and where that is in it.

    What is never touched of it takes no memory.
    """
    room = mmap.mmap(-1, -(-size // HUGE) * HUGE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return room, -_address(room) % HUGE


@cache
def _map() -> Callable[..., int]:
    """The C library's mmap, which can map at an address."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_ssize_t]
    return function


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
