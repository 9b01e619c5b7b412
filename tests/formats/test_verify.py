"""Verifying: damage anywhere is found, named by file, bytes and tensor, and never raised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckpt_formats import verify as module
from ckpt_formats.errors import CheckpointNotFoundError, UnknownCodecError, UnknownVersionError
from ckpt_formats.geometry import Box
from ckpt_formats.native import spans
from ckpt_formats.native.index import unpack
from ckpt_formats.native.reader import read_root
from ckpt_formats.safetensors_file import PAD_PREFIX, parse_header
from ckpt_formats.sources import LocalFile
from ckpt_formats.verify import verify
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import BLOB, files_of, write_whole


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "step_3"
    write_whole(folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A whole checkpoint that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "step_3"))


def flip(folder: Path, file: str, position: int) -> None:
    data = bytearray((folder / file).read_bytes())
    data[position] ^= 1 << position % 8
    (folder / file).write_bytes(data)


def place_of(folder: Path, tensor: str, box: str | None = None) -> tuple[str, int, int]:
    """File and byte range of a tensor's chunk."""
    root = read_root(str(folder))
    rows = unpack((folder / root.pages[0].path).read_bytes(), "index")
    meta = root.tensors[tensor]
    for row in range(meta.row, meta.row + meta.rows):
        ndim = len(meta.shape)
        found = Box(tuple(rows.offset[row, :ndim].tolist()), tuple(rows.size[row, :ndim].tolist()))
        if box in (None, str(found)):
            start = int(rows.start[row])
            return root.files[int(rows.file[row])].path, start, start + int(rows.length[row])
    raise AssertionError(f"{tensor} has no chunk {box}")


def padding_of(folder: Path) -> tuple[str, int]:
    """File and position of a byte of padding."""
    for file in read_root(str(folder)).files:
        for entry in parse_header((folder / file.path).read_bytes(), file.size, file.path):
            if entry.key.startswith(PAD_PREFIX):
                return file.path, entry.start
    raise AssertionError("there is no padding")


def test_a_whole_checkpoint_is_intact_and_all_its_bytes_are_checked(checkpoint: Path) -> None:
    report = verify(checkpoint)
    assert report.intact
    assert not report.damage
    assert not report.debris
    assert report.bytes == sum(path.stat().st_size for path in files_of(checkpoint))
    assert report.files == len(files_of(checkpoint))
    assert report.step == 3
    assert report.tensors == 10
    assert report.chunks == 13


REGIONS: dict[str, Callable[[Path], tuple[str, int, str | None]]] = {
    "root": lambda _: ("manifest.json", 100, None),
    "root's own digest": lambda folder: ("manifest.json", (folder / "manifest.json").stat().st_size - 10, None),
    "index header": lambda folder: (read_root(str(folder)).pages[0].path, 20, None),
    "index rows": lambda folder: (
        read_root(str(folder)).pages[0].path,
        read_root(str(folder)).pages[0].size - 5,
        None,
    ),
    "header length": lambda folder: (read_root(str(folder)).files[0].path, 0, None),
    "header": lambda folder: (read_root(str(folder)).files[1].path, 60, None),
    "header padding": lambda folder: (
        read_root(str(folder)).files[0].path,
        read_root(str(folder)).files[0].header - 1,
        None,
    ),
    "chunk": lambda folder: (*place_of(folder, "model.bias")[:2], "model.bias"),
    "0-d chunk": lambda folder: (*place_of(folder, "model.scalar")[:2], "model.scalar"),
    "cut chunk": lambda folder: (*place_of(folder, "model.weight", "[4:5,5:8]")[:2], "model.weight"),
    "first block": lambda folder: (*place_of(folder, "model.big", "[0:700,0:500]")[:2], "model.big"),
    "last block": lambda folder: (
        place_of(folder, "model.big", "[0:700,0:500]")[0],
        place_of(folder, "model.big", "[0:700,0:500]")[2] - 1,
        "model.big",
    ),
    "raw dtype": lambda folder: (*place_of(folder, "model.complex")[:2], "model.complex"),
    "large value": lambda folder: (*place_of(folder, BLOB)[:2], BLOB),
    "per-rank value": lambda folder: (*place_of(folder, "__ckpt__.rank.00001")[:2], "__ckpt__.rank.00001"),
    "padding": lambda folder: (*padding_of(folder), None),
}


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_is_found_where_it_is(checkpoint: Path, region: str) -> None:
    file, position, tensor = REGIONS[region](checkpoint)
    flip(checkpoint, file, position)
    (damage,) = verify(checkpoint).damage
    assert damage.file == file
    assert damage.tensor == tensor
    if file != "manifest.json":
        assert damage.start is not None
        assert damage.stop is not None
        assert damage.start <= position < damage.stop


@pytest.mark.parametrize("span", [512, 1 << 20])
@pytest.mark.parametrize("region", ["chunk", "last block", "padding", "header"])
def test_what_is_longer_than_a_buffer_is_checked_in_parts(
    checkpoint: Path, region: str, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "SPAN", span)
    assert verify(checkpoint).intact
    file, position, tensor = REGIONS[region](checkpoint)
    flip(checkpoint, file, position)
    (damage,) = verify(checkpoint, threads=1).damage
    assert (damage.file, damage.tensor) == (file, tensor)


def test_a_damaged_block_is_named_by_its_bytes_alone(checkpoint: Path) -> None:
    file, start, stop = place_of(checkpoint, "model.big", "[0:700,0:500]")
    flip(checkpoint, file, stop - 1)
    (damage,) = verify(checkpoint).damage
    assert (damage.start, damage.stop) == (start + (1 << 20), stop)
    assert damage.box == Box((0, 0), (700, 500))
    assert damage.what == "does not fit its checksum"


def test_neighbouring_damaged_blocks_are_one_place(checkpoint: Path) -> None:
    file, start, stop = place_of(checkpoint, "model.big", "[0:700,0:500]")
    flip(checkpoint, file, start)
    flip(checkpoint, file, stop - 1)
    (damage,) = verify(checkpoint).damage
    assert (damage.start, damage.stop) == (start, stop)


def test_all_damage_is_reported_not_only_the_first(checkpoint: Path) -> None:
    places = [place_of(checkpoint, name) for name in ("model.bias", "model.scalar", "model.flags", "model.complex")]
    for file, start, _ in places:
        flip(checkpoint, file, start)
    flip(checkpoint, read_root(str(checkpoint)).files[1].path, 50)
    damage = verify(checkpoint).damage
    assert {item.tensor for item in damage} == {None, "model.bias", "model.scalar", "model.flags", "model.complex"}
    # file by file, in order of position
    files = [file.path for file in read_root(str(checkpoint)).files]
    order = [(files.index(item.file), item.start) for item in damage]
    assert order == sorted(order)


def test_a_truncated_file_loses_what_lay_behind_and_nothing_else(checkpoint: Path) -> None:
    file, start, _ = place_of(checkpoint, "model.flags")
    os.truncate(checkpoint / file, start + 3)
    damage = verify(checkpoint).damage
    assert damage[0].what.startswith("the file is truncated")
    assert damage[0].start is None
    lost = {item.tensor for item in damage[1:]}
    assert "model.flags" in lost
    for item in damage[1:]:
        assert item.file == file
        assert item.stop is not None
        assert item.stop > start + 3
        assert f"the file ends at byte {start + 3}" in item.what
    root = read_root(str(checkpoint))
    rows = unpack((checkpoint / root.pages[0].path).read_bytes(), "index")
    number = [entry.path for entry in root.files].index(file)
    behind = (rows.file == number) & (rows.start + rows.length > start + 3)
    assert len(damage) == 1 + np.count_nonzero(behind)


def test_a_file_that_has_grown_is_damaged(checkpoint: Path) -> None:
    file = read_root(str(checkpoint)).files[0].path
    with (checkpoint / file).open("ab") as stream:
        stream.write(b"\0")
    (damage,) = verify(checkpoint).damage
    assert damage.file == file
    assert "too long" in damage.what


def test_a_missing_data_file_names_every_chunk_that_is_lost(checkpoint: Path) -> None:
    root = read_root(str(checkpoint))
    rows = unpack((checkpoint / root.pages[0].path).read_bytes(), "index")
    (checkpoint / root.files[1].path).unlink()
    damage = verify(checkpoint).damage
    assert damage[0].what == "the file is missing"
    assert len(damage) == 1 + np.count_nonzero(rows.file == 1)
    assert all(item.tensor is not None and item.box is not None for item in damage[1:])


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "too long"])
def test_without_the_index_headers_and_padding_are_still_checked(checkpoint: Path, how: str) -> None:
    root = read_root(str(checkpoint))
    page = checkpoint / root.pages[0].path
    match how:
        case "missing":
            page.unlink()
        case "truncated":
            os.truncate(page, 700)
        case "flipped":
            flip(checkpoint, root.pages[0].path, 900)
        case "too long":
            page.write_bytes(page.read_bytes() + b"x")
    report = verify(checkpoint)
    (damage,) = report.damage
    assert damage.file == root.pages[0].path
    assert "so 13 chunks of 9 tensors could not be checked" in damage.what
    assert report.chunks == 0

    file, position = padding_of(checkpoint)
    flip(checkpoint, file, position)
    other = next(entry.path for entry in root.files if entry.path != file)
    flip(checkpoint, other, 30)
    assert {item.file for item in verify(checkpoint).damage} == {root.pages[0].path, file, other}


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
@pytest.mark.parametrize("which", ["manifest", "page", "data"])
def test_what_is_no_plain_file_is_reported_and_nothing_waits_for_it(checkpoint: Path, which: str, kind: str) -> None:
    root = read_root(str(checkpoint))
    name = {"manifest": "manifest.json", "page": root.pages[0].path, "data": root.files[0].path}[which]
    file = checkpoint / name
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to("nowhere")
    if which == "manifest" and kind == "dangling link":
        with pytest.raises(CheckpointNotFoundError):
            verify(checkpoint)
        return
    report = verify(checkpoint)
    assert not report.intact
    assert {item.file for item in report.damage} == {name}


def test_files_that_the_checkpoint_does_not_list_are_told_but_no_damage(checkpoint: Path) -> None:
    (checkpoint / "data/00000-ffffffffffffffff.safetensors").write_bytes(b"left by an attempt that failed")
    (checkpoint / ".manifest-ffffffffffffffff.tmp").write_bytes(b"{}")
    report = verify(checkpoint)
    assert report.intact
    assert dict(report.debris) == {
        "data/00000-ffffffffffffffff.safetensors": 30,
        ".manifest-ffffffffffffffff.tmp": 2,
    }


def test_no_checkpoint_is_an_error_that_says_why(checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="step_3"):
        verify(checkpoint.parent)
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        verify(checkpoint / "nowhere")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="never committed"):
        verify(checkpoint)


# --- checksums that fit, and still something is wrong


def test_what_this_release_does_not_know_is_no_damage(original: Path, tmp_path: Path) -> None:
    newer = Tampered(original)
    newer.root["version"] = 2
    with pytest.raises(UnknownVersionError):
        verify(newer.write(tmp_path / "version"))
    packed = Tampered(original)
    packed.root["codecs"] = ["raw", "zstd"]
    packed.pages[0]["codec"][packed.rows("model.bias")[0]] = 1
    with pytest.raises(UnknownCodecError, match="zstd"):
        verify(packed.write(tmp_path / "codec"))


def test_a_header_that_calls_a_chunk_something_else_is_damage(original: Path, tmp_path: Path) -> None:
    lie = Tampered(original)
    file = int(lie.pages[0]["file"][lie.rows("model.bias")[0]])
    header = lie.header(file)
    header["model.sail"] = header.pop("model.bias")
    lie.set_header(file, json.dumps(header, separators=(",", ":")).encode())
    (damage,) = verify(lie.write(tmp_path / "lie")).damage
    assert damage.tensor == "model.bias"
    assert "'model.sail'" in damage.what


def test_a_chunk_that_the_index_does_not_list_is_damage(original: Path, tmp_path: Path) -> None:
    lie = Tampered(original)
    lie.remove_row(lie.rows("model.weight")[0])
    damage = verify(lie.write(tmp_path / "lie")).damage
    assert any("no box covers [0:4,0:" in item.what and item.tensor == "model.weight" for item in damage)
    assert any("'model.weight[0:4,0:8]' that the index does not list" in item.what for item in damage)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"a": {"$int": "seven"}}, "the value 'a' does not decode"),
        ({"a": {"$bytes": {"blob": "__ckpt__.blob.gone"}}}, "the value 'a' does not decode"),
    ],
)
def test_values_that_do_not_decode_are_damage(
    original: Path, tmp_path: Path, values: dict[str, object], what: str
) -> None:
    lie = Tampered(original)
    lie.root["values"] = values
    (damage,) = verify(lie.write(tmp_path / "lie")).damage
    assert damage.file == "manifest.json"
    assert damage.what.startswith(what)


def test_per_rank_values_that_do_not_decode_are_damage(original: Path, tmp_path: Path) -> None:
    lie = Tampered(original)
    (row,) = lie.rows("__ckpt__.rank.00001")
    file, start = int(lie.pages[0]["file"][row]), int(lie.pages[0]["start"][row])
    lie.data[file][start : start + 1] = b"["
    lie.seal_chunk(row)
    (damage,) = verify(lie.write(tmp_path / "lie")).damage
    assert damage.what.startswith("the values of rank 1 do not decode")


# --- how it works


def test_each_data_file_is_read_once_and_in_order(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN", 1 << 20)
    reads: dict[str, list[tuple[int, int]]] = {}

    class Recorded(LocalFile):
        def read(self, start: int, stop: int, into: memoryview) -> None:
            reads.setdefault(self.name, []).append((start, stop))
            super().read(start, stop, into)

    monkeypatch.setattr(module, "open_source", Recorded)
    assert verify(checkpoint, threads=1).intact
    for file in read_root(str(checkpoint)).files:
        ranges = reads[str(checkpoint / file.path)]
        starts, stops = zip(*ranges, strict=True)
        assert starts == (0, *stops[:-1])
        assert stops[-1] == file.size


def test_progress_ends_at_the_whole(checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    report = verify(checkpoint, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (report.bytes, report.bytes)


def test_many_threads_say_the_same_as_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN", 4096)
    for name in ("model.bias", "model.big", "model.flags", "model.scalar"):
        file, start, _ = place_of(checkpoint, name)
        flip(checkpoint, file, start)
    assert verify(checkpoint, threads=8).damage == verify(checkpoint, threads=1).damage
