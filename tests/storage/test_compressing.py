"""Compressing on the way to a file: in order, from one thread, and nothing is left behind when it fails."""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.storage.compressing import SMALL, blocks_of
from ckpt.storage.data_file import Chunk, Staging, write_data_file
from ckpt.storage.files import ALIGNMENT, File, Files
from ckpt_formats.digest import BLOCK_SIZE, digest
from ckpt_formats.dtypes import dtype
from ckpt_formats.geometry import Box
from ckpt_formats.safetensors_file import LARGE, header_bound, lay_out, parse_header

FLOAT = dtype("float32")


class Source:
    """Trained numbers; remembers which ranges were read, and by which threads."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.data = (np.random.default_rng(count).standard_normal(count) * 0.02).astype(np.float32).tobytes()
        self.reads: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self._fail_at = fail_at

    def read(self, start: int, stop: int, into: memoryview) -> None:
        if self._fail_at is not None and stop > self._fail_at:
            raise OSError(5, "the device is gone")
        self.reads.append((start, stop))
        self.threads.add(threading.get_ident())
        into[:] = self.data[start:stop]


def chunk(name: str, source: Source) -> Chunk:
    count = len(source.data) // 4
    return Chunk(name, FLOAT, (count,), Box((0,), (count,)), source)


def compressors() -> list[str]:
    working = ("ckpt-compress", "ckpt-write")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(working)]


def test_blocks_come_in_order_and_sources_are_read_in_order_by_the_caller() -> None:
    sources = [Source(count) for count in (700_000, 10, SMALL // 4, 300_000)]
    blocks = blocks_of((FLOAT, len(source.data), source) for source in sources)
    seen = [(block.chunk, block.digest) for block in blocks]
    expected = []
    for number, source in enumerate(sources):
        assert source.threads == {threading.get_ident()}
        assert source.reads == sorted(source.reads)
        for start, stop in source.reads:
            assert start % BLOCK_SIZE == 0
            expected.append((number, digest(source.data[start:stop])))
    assert seen == expected
    assert not compressors()


def test_a_source_that_fails_ends_it_and_no_thread_stays() -> None:
    sources = [Source(2_000_000), Source(2_000_000, fail_at=3_000_000)]
    with pytest.raises(OSError, match="device is gone"):
        list(blocks_of((FLOAT, len(source.data), source) for source in sources))
    assert not compressors()


class _FullDisk(Files):
    def create(self, path: str, *, direct: bool) -> File:
        file = super().create(path, direct=direct)

        def write(data: memoryview, at: int) -> None:
            if at >= 4 << 20:
                raise OSError(28, "no space left")

        file.write = write  # type: ignore[method-assign]
        return file


def test_a_full_disk_is_an_error_no_thread_stays_and_buffers_come_back(tmp_path: Path) -> None:
    staging = Staging(2, 1 << 20)
    chunks = [chunk("a", Source(3_000_000))]
    for _ in range(3):
        with pytest.raises(OSError, match="no space"):
            write_data_file(_FullDisk(), str(tmp_path), "full", chunks, staging, compress=True)
        assert not compressors()
        (tmp_path / "full").unlink()
    written = write_data_file(Files(), str(tmp_path), "fine", chunks, staging, compress=True)
    assert (tmp_path / "fine").stat().st_size == written.size


def test_large_chunks_are_aligned_and_the_header_tells_every_byte(tmp_path: Path) -> None:
    chunks = [chunk(f"t{k}", Source(count)) for k, count in enumerate((5000, LARGE // 4, 70_001, 3, 400_000))]
    written = write_data_file(Files(), str(tmp_path), "file", chunks, Staging(2, 1 << 20), compress=True)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == written.size
    assert written.header % ALIGNMENT == 0
    entries = [entry for entry in parse_header(data, len(data), "file") if not entry.key.startswith("__pad__")]
    assert [entry.key for entry in entries] == [chunk.name for chunk in chunks]
    assert [entry.start for entry in entries] == written.rows.start.tolist()
    assert [entry.stop - entry.start for entry in entries] == written.rows.length.tolist()
    assert [entry.start % ALIGNMENT == 0 for entry in entries if entry.stop - entry.start >= LARGE] == [True]
    assert written.rows.start[1] % ALIGNMENT == 0
    assert written.rows.codec.tolist() == [1, 1, 1, 0, 1]


def test_many_small_chunks_in_a_file_of_little_else(tmp_path: Path) -> None:
    """Its header is longer than a staging buffer."""
    chunks = [chunk(f"layers.{k}.attention.projection.weight", Source(2)) for k in range(1500)]
    written = write_data_file(Files(), str(tmp_path), "file", chunks, Staging(2, 1 << 16), compress=True)
    data = (tmp_path / "file").read_bytes()
    assert written.header > 1 << 16
    for row, some in enumerate(chunks):
        start = int(written.rows.start[row])
        assert data[start : start + 8] == some.source.data  # type: ignore[attr-defined]


ENTRIES = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=20),
        st.sampled_from(["U8", "F32", "F8_E4M3FNUZ"]),
        st.lists(st.integers(1, 1 << 40), max_size=3),
        st.integers(1, 1 << 40),
        st.sampled_from([1, 2, 8, ALIGNMENT]),
    ),
    max_size=12,
)


@given(ENTRIES, st.randoms())
def test_no_header_is_longer_than_its_bound(
    entries: list[tuple[str, str, list[int], int, int]], random: Random
) -> None:
    bound = header_bound(entries)
    smaller = []
    for key, _, _, nbytes, itemsize in entries:
        stored = random.randint(1, nbytes)
        smaller.append((key, "U8", (stored,), stored, itemsize))
    for some in (entries, smaller):
        layout = lay_out(some, bound)
        assert len(layout.header) == bound
