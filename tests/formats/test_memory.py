"""Memory to read into is of huge pages, where the system has them, so that disks are asked in few large requests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ckpt_formats.memory import HUGE, scratch, shared

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such memory is Linux's")


def address(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def huge_bytes(memory: memoryview, kind: str) -> int:
    """Bytes in huge pages of this kind in the mapping that holds the memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            low, high = (int(end, 16) for end in head.split("-"))
            inside = low <= address(memory) < high
        elif inside and head == f"{kind}:":
            return int(rest.split()[0]) << 10
    return 0


@pytest.mark.parametrize("size", [1, 4096, HUGE, HUGE + 1, 2 * HUGE + 8192, 5 * HUGE])
def test_memory_of_any_size_begins_where_a_huge_page_can(size: int) -> None:
    memory = scratch(size)
    assert len(memory) == size
    assert address(memory) % (HUGE if size >= HUGE else 4096) == 0
    memory[-1] = 1
    assert not any(memory[:-1])


@linux
def test_shared_memory_is_one_for_all_that_map_it_and_stays_when_its_descriptor_is_closed() -> None:
    fd = os.memfd_create("ckpt-test")
    size = 2 * HUGE + 4096
    os.ftruncate(fd, size)
    mine, another = shared(fd, size, fresh=True), shared(fd, size)
    os.close(fd)
    assert address(mine) % HUGE == address(another) % HUGE == 0
    assert not any(another)
    mine[0] = mine[HUGE + 5] = mine[-1] = 7
    assert (another[0], another[HUGE + 5], another[-1]) == (7, 7, 7)
    del mine
    another[1] = 3
    assert another[:2] == b"\7\3"


@linux
def test_shared_memory_is_in_huge_pages_for_all_that_map_it() -> None:
    size = 4 * HUGE
    fd = os.memfd_create("ckpt-test")
    os.ftruncate(fd, size)
    try:
        mine = shared(fd, size, fresh=True)
        if huge_bytes(mine, "ShmemPmdMapped") < size:
            pytest.skip("this system makes no huge pages of shared memory, or has none left")
        another = shared(fd, size)
        assert not any(another)
        assert huge_bytes(another, "ShmemPmdMapped") == size
    finally:
        os.close(fd)


@linux
def test_memory_that_can_not_be_shared_is_an_error() -> None:
    with open(os.devnull, "rb") as stream, pytest.raises(OSError, match="can't be mapped"):
        shared(stream.fileno(), HUGE)
