"""A large index is read in part: only the rows that are needed, and every one of them verified and checked."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckpt.saving.commit import Contents, FileNames, Part, commit
from ckpt.saving.sources import BytesSource
from ckpt.storage import publish
from ckpt.storage.data_file import Chunk, Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import prepare_folder
from ckpt_formats import sources
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.dtypes import dtype
from ckpt_formats.errors import CorruptionError, CoverageError, FormatError
from ckpt_formats.geometry import Box
from ckpt_formats.native import ranged
from ckpt_formats.native.index import LEAF, pack_with_leaves, rows_of
from ckpt_formats.native.reader import read_root
from ckpt_formats.reading import Request
from ckpt_formats.remote import RemoteFile, Store
from ckpt_formats.verify import verify
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import ATTEMPT

WRITERS = 256
TENSORS = 96
SHAPE = (2 * WRITERS - 1, 4)
"""Uneven: the last row of cells has one row, the others two."""
_FILES = 4


def _boxes(number: int) -> list[Box]:
    """How a tensor is cut: over rows; over rows and columns; or like bricks, which are no grid."""
    rows = [Box((2 * k, 0), (min(2, SHAPE[0] - 2 * k), 4)) for k in range(WRITERS)]
    if number % 3 == 0:
        return rows
    widths = [(2, 2), (2, 2)] if number % 3 == 1 else [(1, 3), (3, 1)]
    halves = []
    for k, box in enumerate(rows):
        left, right = widths[k % 2]
        halves.append(Box(box.offsets, (box.sizes[0], left)))
        halves.append(Box((box.offsets[0], left), (box.sizes[0], right)))
    return halves


def _write(folder: Path, without: tuple[str, int] | None = None) -> dict[str, AnyArray]:
    """Write TENSORS tensors in hundreds of chunks each, but for one chunk (tensor, number)."""
    rng = np.random.default_rng(0)
    tensors = {f"model.{number:03d}": rng.random(SHAPE, np.float32) for number in range(TENSORS)}
    chunks: list[list[Chunk]] = [[] for _ in range(_FILES)]
    for number, (name, array) in enumerate(tensors.items()):
        for k, box in enumerate(_boxes(number)):
            if (name, k) != without:
                data = BytesSource(np.ascontiguousarray(array[box.slices()]).tobytes())
                chunks[k % _FILES].append(Chunk(name, dtype("float32"), SHAPE, box, data))
    files, staging = Files(), Staging(2, 1 << 20)
    place = prepare_folder(files, str(folder))
    parts = []
    for writer, some in enumerate(chunks):
        written = write_data_file(files, str(folder), f"data/{writer:05d}-{ATTEMPT}.safetensors", some, staging)
        parts.append(Part.decode(Part([written], [FileNames.of([chunk.name for chunk in some])]).encode()))
    contents = Contents(
        step=1,
        tensors=dict.fromkeys(tensors, ("float32", SHAPE, None)),
        aliases={},
        values={},
        entries={"model": {"kind": "module"}},
        layout={"world_size": _FILES},
        provenance={},
    )
    commit(files, place, ATTEMPT, contents, parts)
    return tensors


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, AnyArray]]:
    """A checkpoint whose index has two pages that can be read in part."""
    folder = tmp_path_factory.mktemp("wide") / "step_1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "PAGE_ROWS", 24_000)
        tensors = _write(folder)
    assert [page.leaf for page in read_root(str(folder)).pages] == [LEAF, LEAF]
    return folder, tensors


def _index_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of an index page from now on."""
    reads: list[int] = []
    read = sources.LocalFile.read

    def counted(self: sources.LocalFile, start: int, stop: int, into: memoryview) -> None:
        if "/index/" in self.name:
            reads.append(stop - start)
        read(self, start, stop, into)

    monkeypatch.setattr(sources.LocalFile, "read", counted)
    return reads


def test_what_is_read_in_part_is_what_was_written(wide: tuple[Path, dict[str, AnyArray]]) -> None:
    folder, tensors = wide
    rng = np.random.default_rng(1)
    with open_checkpoint(folder) as checkpoint:
        for name, array in tensors.items():
            low = rng.integers(0, SHAPE)
            high = rng.integers(low, SHAPE) + 1
            part = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            assert checkpoint[name][part].tobytes() == array[part].tobytes()
            assert checkpoint[name][...].tobytes() == array.tobytes()
    assert verify(folder).intact


def test_a_chunk_of_a_grid_takes_few_leaves_of_the_index(
    wide: tuple[Path, dict[str, AnyArray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensors = wide
    names = [name for number, name in enumerate(tensors) if number % 3 < 2]
    reads = _index_reads(monkeypatch)
    with open_checkpoint(folder) as checkpoint:
        for name in names:
            assert checkpoint[name][100:102].tobytes() == tensors[name][100:102].tobytes()
    pages = read_root(str(folder)).pages
    # the end of each page, with its leaf digests, and at most two leaves for each column of each tensor
    assert sum(reads) <= len(pages) * (2 << 20) + len(names) * 9 * 2 * LEAF
    assert sorted(reads)[-3] <= 4 * LEAF


@pytest.fixture
def stored(wide: tuple[Path, dict[str, AnyArray]]) -> Iterator[str]:
    """The same checkpoint in a store."""
    url = f"memory://wide/{uuid.uuid4().hex}"
    store = Store(url)
    for path in wide[0].rglob("*"):
        if path.is_file():
            store.put(f"{url}/{path.relative_to(wide[0])}", path.read_bytes())
    yield url
    for entry in store.walk(url):
        store.remove(f"{url}/{entry.name}")


def _far_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of an index page in a store from now on."""
    reads: list[int] = []
    read = RemoteFile.read

    def counted(self: RemoteFile, start: int, stop: int, into: memoryview) -> None:
        if "/index/" in self.name:
            reads.append(stop - start)
        read(self, start, stop, into)

    monkeypatch.setattr(RemoteFile, "read", counted)
    return reads


def test_from_a_store_rows_of_many_tensors_come_by_few_requests(
    stored: str, wide: tuple[Path, dict[str, AnyArray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for number, name in enumerate(wide[1]) if number % 3 < 2]
    reads = _far_reads(monkeypatch)
    with open_checkpoint(stored) as checkpoint:
        requests = [Request(name, Box((100, 0), (2, 4)), np.empty((2, 4), np.float32)) for name in names]
        checkpoint.read(requests)
    assert all(request.into.tobytes() == wide[1][request.name][100:102].tobytes() for request in requests)
    # the leaf digests and the header of two pages, and then one by one it would be some hundred
    assert len(reads) <= 20
    assert sum(reads) <= sum(page.size for page in read_root(stored).pages)


def test_from_a_store_what_is_read_in_part_is_what_was_written(
    stored: str, wide: tuple[Path, dict[str, AnyArray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "GAP", 2)
    monkeypatch.setattr(ranged, "MOST", 3)
    reads = _far_reads(monkeypatch)
    rng = np.random.default_rng(2)
    with open_checkpoint(stored) as checkpoint:
        for name, array in wide[1].items():
            low = rng.integers(0, SHAPE)
            high = rng.integers(low, SHAPE) + 1
            part = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            assert checkpoint[name][part].tobytes() == array[part].tobytes()
    # no leaf twice
    assert sum(reads) <= sum(page.size for page in read_root(stored).pages) + (1 << 20)


def test_from_a_store_damage_of_a_row_is_found(stored: str, wide: tuple[Path, dict[str, AnyArray]]) -> None:
    page = read_root(stored).pages[0]
    data = bytearray(Store(stored).read(f"{stored}/{page.path}"))
    data[page.size // 3] ^= 1
    Store(stored).put(f"{stored}/{page.path}", bytes(data))
    with open_checkpoint(stored) as checkpoint:
        whole = [Request(name, Box.whole(SHAPE), np.empty(SHAPE, np.float32)) for name in wide[1]]
        with pytest.raises(CorruptionError, match="of the index do not fit"):
            checkpoint.read(whole)


def test_damage_is_found_where_it_is_read_and_only_there(
    wide: tuple[Path, dict[str, AnyArray]], tmp_path: Path
) -> None:
    folder, tensors = wide
    shutil.copytree(folder, tmp_path / "step_1")
    page = tmp_path / "step_1" / read_root(str(folder)).pages[0].path
    data = bytearray(page.read_bytes())
    data[len(data) // 4] ^= 1
    page.write_bytes(data)
    found, sound = [], []
    with open_checkpoint(tmp_path / "step_1") as checkpoint:
        for name in tensors:
            try:
                assert checkpoint[name][...].tobytes() == tensors[name].tobytes()
                sound.append(name)
            except CorruptionError as error:
                found.append(str(error))
    assert found
    assert all("index/000-" in message for message in found)
    assert sound
    assert [damage.file for damage in verify(tmp_path / "step_1").damage] == [
        page.relative_to(page.parents[1]).as_posix()
    ]


@pytest.mark.parametrize("column", ["offset", "size", "file", "start", "length", "codec"])
def test_a_row_that_lies_is_refused_when_it_is_read(
    wide: tuple[Path, dict[str, AnyArray]], tmp_path: Path, column: str
) -> None:
    folder, _ = wide
    tampered = Tampered(folder)
    first = tampered.tensor("model.000")["row"]
    tampered.pages[0][column][first + 50] += 1 if column in ("offset", "size") else 200
    if column == "start":
        tampered.pages[0][column][first + 50] = 1 << 40
    _write_sealed(tampered, tmp_path / "step_1")
    with open_checkpoint(tmp_path / "step_1") as checkpoint:
        assert checkpoint["model.000"][0:2].shape == (2, 4)
        with pytest.raises(FormatError, match="index/000-"):
            checkpoint["model.000"][100:102]


def test_a_grid_that_the_chunks_are_not_is_refused(wide: tuple[Path, dict[str, AnyArray]], tmp_path: Path) -> None:
    folder, _ = wide
    tampered = Tampered(folder)
    assert tampered.tensor("model.000")["grid"] == [[[2, 255], [1, 1]], [[4, 1]]]
    tampered.tensor("model.000")["grid"] = [[[1, 1], [2, 255]], [[4, 1]]]
    _write_sealed(tampered, tmp_path / "step_1")
    with open_checkpoint(tmp_path / "step_1") as checkpoint, pytest.raises(FormatError, match="grid"):
        checkpoint["model.000"][100:102]
    assert "not those of its grid" in verify(tmp_path / "step_1").damage[0].what


@pytest.mark.parametrize(
    "grid",
    [
        [[[2, 256]], [[4, 1]]],
        [[[2, 255], [1, 1]]],
        [[[2, 255], [1, 1], [0, 1]], [[4, 1]]],
        [[[511, 1]], [[4, 1]]],
        [[[2, -255], [1, 1]], [[4, 1]]],
        [[[2.0, 255], [1, 1]], [[4, 1]]],
        {"0": 1},
        [[[1, 1]] * 65, [[4, 1]]],
    ],
)
def test_an_impossible_grid_is_refused(wide: tuple[Path, dict[str, AnyArray]], tmp_path: Path, grid: object) -> None:
    tampered = Tampered(wide[0])
    tampered.tensor("model.000")["grid"] = grid
    tampered.write(tmp_path / "step_1")
    with pytest.raises(FormatError, match=r"'model\.000' has a grid that does not fit"):
        open_checkpoint(tmp_path / "step_1")


def test_wrong_leaf_digests_are_found(wide: tuple[Path, dict[str, AnyArray]], tmp_path: Path) -> None:
    tampered = Tampered(wide[0])
    _write_sealed(tampered, tmp_path / "step_1")
    assert verify(tmp_path / "step_1").intact
    packed = bytearray(tampered.page_bytes[1])
    packed[-17] ^= 1
    tampered.page_bytes[1] = bytes(packed)
    tampered.write(tmp_path / "step_2")
    assert "its leaf digests are wrong" in verify(tmp_path / "step_2").damage[0].what


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_hole_is_found_before_anything_is_committed(tmp_path: Path, number: int) -> None:
    name = f"model.{number:03d}"
    with pytest.raises(CoverageError, match=re.escape(f"tensor '{name}': what was written does not cover it")):
        _write(tmp_path / "step_1", without=(name, 77))
    assert not (tmp_path / "step_1" / "manifest.json").exists()


def _write_sealed(tampered: Tampered, folder: Path) -> None:
    """Write a tampered checkpoint with leaf digests that fit."""
    for number, page in enumerate(tampered.pages):
        tampered.page_bytes[number] = bytes(pack_with_leaves(rows_of(page, f"page {number}")))
    tampered.write(folder)
