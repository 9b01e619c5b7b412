"""An index page that lies, with digests that fit: refused before anything is allocated or read by its claims."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.digest import digest
from ckpt_formats.errors import CheckpointError, CorruptionError, CoverageError, FormatError, UnknownCodecError
from ckpt_formats.verify import verify
from tests.formats.native.hostile import load_all, read_all, refused_everywhere
from tests.formats.native.tampering import Tampered, pack, pack_raw
from tests.formats.native.whole import bitwise_equal, write_whole

Lie = tuple[str, Callable[[Tampered], object], type[CheckpointError], str]

PAGE = r"index/000-00112233445566aa.safetensors"


def _cell(column: str, tensor: str, to: Any, chunk: int = 0) -> Callable[[Tampered], object]:
    """A lie: one cell of the row of a tensor's chunk says something else."""

    def lie(tampered: Tampered) -> None:
        tampered.pages[0][column][tampered.rows(tensor)[chunk]] = to

    return lie


# model.weight is [6, 8] in the chunks [0:4,0:8], [4:6,0:5], [4:5,5:8], [5:6,5:8]; model.bias is [7] of 2 bytes each
BOXES: list[Lie] = [
    ("two boxes overlap", _cell("offset", "model.weight", [4, 4], 2), CoverageError, "'model.weight'.*overlap"),
    ("a box twice", _cell("offset", "model.weight", [4, 5], 3), CoverageError, "'model.weight'.*overlap"),
    ("a hole", lambda t: t.remove_row(t.rows("model.weight")[3]), CoverageError, "'model.weight'.*no box covers"),
    ("a hole at the edge", _cell("offset", "model.weight", [6, 5], 3), CoverageError, "'model.weight'.*leaves"),
    ("a box outside", _cell("offset", "model.weight", [0, 1], 0), CoverageError, "'model.weight'.*leaves"),
    ("a box far outside", _cell("offset", "model.weight", [2**63 - 1, 0], 0), CoverageError, "'model.weight'.*leaves"),
    ("a negative offset", _cell("offset", "model.weight", [-1, 0], 0), FormatError, PAGE),
    ("an empty box", _cell("size", "model.weight", [0, 8], 0), FormatError, f"{PAGE}.*without elements"),
    ("a negative size", _cell("size", "model.weight", [-4, -8], 0), FormatError, f"{PAGE}.*without elements"),
    (
        "another shape of the same size",
        _cell("size", "model.weight", [8, 4], 0),
        CoverageError,
        "'model.weight'.*leaves",
    ),
    ("2**62 elements", _cell("size", "model.weight", [2**31, 2**31], 0), FormatError, f"{PAGE}.*row 9"),
    (
        "a product that wraps around to 32",
        _cell("size", "model.weight", [2**62, 2**62], 0),
        FormatError,
        f"{PAGE}.*row 9",
    ),
    ("2**63-1 elements", _cell("size", "model.weight", [2**63 - 1, 1], 0), FormatError, f"{PAGE}.*row 9"),
    ("a dimension more", _cell("size", "model.bias", [7, 2]), FormatError, f"{PAGE}.*row 3.*dimensions"),
    ("a place in a dimension more", _cell("offset", "model.bias", [0, 5]), FormatError, f"{PAGE}.*row 3.*dimensions"),
    ("a place in a 0-d tensor", _cell("offset", "model.scalar", [1, 0]), FormatError, f"{PAGE}.*row 8.*dimensions"),
    (
        "a chunk of the 0-d tensor too few",
        lambda t: t.remove_row(t.rows("model.scalar")[0]),
        CoverageError,
        "'model.scalar'",
    ),
    (
        "a shape of 2**62",
        lambda t: t.tensor("model.bias").update(shape=[2**61]),
        CoverageError,
        "'model.bias'.*no box covers",
    ),
    (
        "a huge shape without chunks",
        lambda t: t.tensor("model.empty").update(shape=[2**31, 2**31]),
        CoverageError,
        "'model.empty'.*no boxes|'model.empty'.*no box",
    ),
    ("another dtype", lambda t: t.tensor("model.bias").update(dtype="float64"), FormatError, f"{PAGE}.*row 3.*length"),
    ("a wider shape", lambda t: t.tensor("model.bias").update(shape=[8]), CoverageError, "'model.bias'.*no box covers"),
    ("a narrower shape", lambda t: t.tensor("model.bias").update(shape=[6]), CoverageError, "'model.bias'.*leaves"),
    ("more dimensions than the page", lambda t: t.tensor("model.bias").update(shape=[7, 1, 1]), FormatError, PAGE),
]

PLACES: list[Lie] = [
    *((f"file {file}", _cell("file", "model.bias", file), FormatError, PAGE) for file in (-1, 2, 2**31, 2**63 - 1)),
    *(
        (f"codec {codec}", _cell("codec", "model.bias", codec), FormatError, f"{PAGE}.*row 3.*codec")
        for codec in (1, 255)
    ),
    (
        "an unknown codec",
        lambda t: t.root.update(codecs=["zstd-5"]),
        UnknownCodecError,
        "codec 'zstd-5'.*does not know",
    ),
    ("a codec that is a module", lambda t: t.root.update(codecs=["os"]), UnknownCodecError, "codec 'os'"),
    *(
        (f"start {at}", _cell("start", "model.bias", at), FormatError, PAGE)
        for at in (-1, 0, 8, 4095, 2**40, 2**62, 2**63 - 1)
    ),
    *(
        (f"length {n}", _cell("length", "model.bias", n), FormatError, PAGE)
        for n in (-1, 0, 13, 15, 2**40, 2**62, 2**63 - 1)
    ),
    (
        "an end past the file's",
        lambda t: _cell("start", "model.bias", len(t.data[0]) - 13)(t),
        FormatError,
        f"{PAGE}.*row 3.*past the end",
    ),
    (
        "the bytes of another chunk",
        lambda t: _cell("start", "model.flags", t.pages[0]["start"][t.rows("model.bias")[0]])(t),
        FormatError,
        f"{PAGE}.*row.*another chunk",
    ),
    (
        "the last byte of another chunk",
        lambda t: _cell("start", "model.flags", t.pages[0]["start"][t.rows("model.bias")[0]] + 13)(t),
        FormatError,
        f"{PAGE}.*row.*another chunk",
    ),
    ("a large chunk without blocks", _cell("block", "model.big", -1), FormatError, f"{PAGE}.*row 4.*block"),
    ("a small chunk with blocks", _cell("block", "model.bias", 0), FormatError, f"{PAGE}.*row 3.*block"),
    *((f"block {n}", _cell("block", "model.big", n), FormatError, PAGE) for n in (1, 2, 2**62, 2**63 - 1, -2)),
    ("another digest of blocks", _cell("digest", "model.big", 7), FormatError, f"{PAGE}.*row 4.*digest"),
    (
        "another digest of a block",
        lambda t: t.pages[0]["block_digest"].__setitem__((1, 3), 7),
        FormatError,
        "row 4.*digest",
    ),
    ("another digest of a chunk", _cell("digest", "model.bias", 7), CorruptionError, "'model.bias'.*checksum"),
]


def _column(name: str, change: Callable[[Any], Any]) -> Callable[[Tampered], object]:
    def lie(tampered: Tampered) -> None:
        tampered.pages[0][name] = change(tampered.pages[0][name])

    return lie


COLUMNS = ("offset", "size", "file", "start", "length", "block", "codec", "digest", "block_digest")
TABLES: list[Lie] = [
    *((f"no {name}", lambda t, name=name: t.pages[0].pop(name), FormatError, f"{PAGE}.*'{name}'") for name in COLUMNS),
    *(
        (f"{name} of floats", _column(name, lambda c: c.astype(np.float64)), FormatError, f"{PAGE}.*'{name}'")
        for name in COLUMNS
    ),
    *(
        (f"{name} in 3 dimensions", _column(name, lambda c: c.reshape(1, 1, -1)), FormatError, f"{PAGE}.*'{name}'")
        for name in COLUMNS
    ),
    *((f"{name} shorter", _column(name, lambda c: c[:-1]), FormatError, PAGE) for name in COLUMNS),
    *((f"{name} longer", _column(name, lambda c: np.concatenate([c, c])), FormatError, PAGE) for name in COLUMNS[:-1]),
    ("bytes for numbers", _column("file", lambda c: c.astype(np.uint8)), FormatError, f"{PAGE}.*'file'"),
    (
        "digests of 15 bytes",
        _column("digest", lambda c: np.ascontiguousarray(c[:, :15])),
        FormatError,
        f"{PAGE}.*16 bytes",
    ),
    (
        "sizes wider than offsets",
        _column("size", lambda c: np.pad(c, ((0, 0), (0, 1)), constant_values=1)),
        FormatError,
        PAGE,
    ),
    (
        "no dimensions",
        lambda t: t.pages[0].update(offset=t.pages[0]["offset"][:, :0], size=t.pages[0]["size"][:, :0]),
        FormatError,
        PAGE,
    ),
]


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in BOXES], ids=[case[0] for case in BOXES])
def test_boxes_that_are_no_cover_are_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    tampered = Tampered(whole)
    lie(tampered)
    refused_everywhere(tampered, tmp_path / "step_3", error, match)


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in PLACES], ids=[case[0] for case in PLACES])
def test_places_that_are_none_are_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    tampered = Tampered(whole)
    lie(tampered)
    refused_everywhere(tampered, tmp_path / "step_3", error, match)


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in TABLES], ids=[case[0] for case in TABLES])
def test_malformed_tables_are_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    tampered = Tampered(whole)
    lie(tampered)
    refused_everywhere(tampered, tmp_path / "step_3", error, match)


def _enlarge(tampered: Tampered, size: int) -> None:
    """Shape, box, length and the file's size all claim that model.flags has `size` bytes; only the file does not."""
    page, row = tampered.pages[0], tampered.rows("model.flags")[0]
    start = len(tampered.data[0])
    tampered.root["block_size"] = 1 << 28
    for other in tampered.rows("model.big"):
        page["block"][other] = -1
        tampered.seal_chunk(other)
    page["block_digest"] = page["block_digest"][:0]
    page["size"][row], page["length"][row], page["start"][row] = [size, 1], size, start
    tampered.tensor("model.flags")["shape"] = [size]
    tampered.root["files"][0]["size"] = start + size


@pytest.mark.parametrize("size", [2**40, 2**50, 2**61])
def test_chunk_larger_than_its_file_really_is_allocates_nothing(whole: Path, tmp_path: Path, size: int) -> None:
    tampered = Tampered(whole)
    _enlarge(tampered, size)
    refused_everywhere(tampered, tmp_path / "step_3", FormatError, "row 7.*block digests")


def test_large_chunk_of_which_only_the_digests_are_there_allocates_nothing(whole: Path, tmp_path: Path) -> None:
    tampered = Tampered(whole)
    _enlarge(tampered, 1 << 40)
    page, row = tampered.pages[0], tampered.rows("model.flags")[0]
    page["block_digest"] = np.zeros((1 << 12, 16), np.uint8)
    page["digest"][row] = np.frombuffer(digest(page["block_digest"].tobytes()), np.uint8)
    page["block"][row] = 0
    refused_everywhere(tampered, tmp_path / "step_3", CorruptionError, "data/00000-.* the manifest says")


def test_chunks_that_share_block_digests_cost_no_quadratic_work(whole: Path, tmp_path: Path) -> None:
    """20,000 chunks that each claim the same 100,000 digests: to check them all would hash 32 GB."""
    tampered = Tampered(whole)
    chunks, blocks, size = 20_000, 100_000, 4096
    nbytes = size * blocks
    same = np.frombuffer(digest(bytes(16 * blocks)), np.uint8)
    tampered.root["block_size"] = size
    header = tampered.root["files"][0]["header"]
    tampered.root["files"][0]["size"] = header + chunks * nbytes
    tampered.root["tensors"] = {
        "x": {"dtype": "uint8", "shape": [chunks * nbytes], "page": 0, "row": 0, "rows": chunks},
    }
    tampered.root["aliases"], tampered.root["values"] = {}, {"model": {"x": {"$tensor": "x"}}}
    tampered.root["pages"][0]["rows"] = chunks
    at = np.arange(chunks, dtype=np.int64)
    tampered.pages[0] = {
        "offset": (at * nbytes)[:, None],
        "size": np.full((chunks, 1), nbytes, np.int64),
        "file": at * 0,
        "start": header + at * nbytes,
        "length": at * 0 + nbytes,
        "block": at * 0,
        "codec": np.zeros(chunks, np.uint8),
        "digest": np.broadcast_to(same, (chunks, 16)),
        "block_digest": np.zeros((blocks, 16), np.uint8),
    }
    refused_everywhere(tampered, tmp_path / "step_3", FormatError, f"{PAGE}.*share")


# pages that are no pages


def _header(text: bytes, payload: bytes = b"") -> Callable[[Tampered], object]:
    return lambda tampered: tampered.page_bytes.update({0: pack_raw(text, payload)})


def _entry(**claims: Any) -> bytes:
    return json.dumps({"offset": {"dtype": "I64", "shape": [13, 2], "data_offsets": [0, 208]} | claims}).encode()


def _twice(tampered: Tampered) -> None:
    packed = pack(tampered.pages[0])
    length = int.from_bytes(packed[:8], "little")
    text = packed[8 : 8 + length].replace(b'"size"', b'"file"', 1)
    tampered.page_bytes[0] = pack_raw(text, packed[8 + length :])


PAGES: list[Lie] = [
    *(
        (f"{n} bytes", lambda t, n=n: t.page_bytes.update({0: bytes(n)}), FormatError, PAGE)
        for n in (0, 1, 7, 8, 9, 4096)
    ),
    (
        "a header of 2**64-1 bytes",
        lambda t: t.page_bytes.update({0: b"\xff" * 64}),
        FormatError,
        f"{PAGE}.*header claims",
    ),
    (
        "a header of 2**40 bytes",
        lambda t: t.page_bytes.update({0: (1 << 40).to_bytes(8, "little") + b"{}"}),
        FormatError,
        f"{PAGE}.*header claims",
    ),
    ("a header that is no JSON", _header(b"\x80\x04\x95pickle."), FormatError, f"{PAGE}.*JSON"),
    ("a header that is an array", _header(b"[]"), FormatError, f"{PAGE}.*object"),
    ("a header 100,000 deep", _header(b'{"a":' * 100_000), FormatError, f"{PAGE}.*JSON"),
    ("a column twice", _twice, FormatError, f"{PAGE}.*'file' occurs twice"),
    ("an entry that is none", _header(b'{"offset": 1}'), FormatError, f"{PAGE}.*'offset'"),
    ("an entry of nothing", _header(b'{"offset": {}}'), FormatError, f"{PAGE}.*'offset'"),
    ("a dtype that is none", _header(_entry(dtype=[1]), bytes(208)), FormatError, f"{PAGE}.*'offset'"),
    ("a dtype nobody knows", _header(_entry(dtype="X9"), bytes(208)), FormatError, f"{PAGE}.*'offset'"),
    ("200,000 dimensions", _header(_entry(shape=[2**62] * 200_000), bytes(208)), FormatError, f"{PAGE}.*'offset'"),
    ("a shape without bytes", _header(_entry(shape=[2**62, 2], data_offsets=[0, 0])), FormatError, f"{PAGE}.*'offset'"),
    (
        "an empty shape too large",
        _header(_entry(shape=[0, 2**62], data_offsets=[0, 0])),
        FormatError,
        f"{PAGE}.*'offset'",
    ),
    ("a shape below zero", _header(_entry(shape=[-13, -2]), bytes(208)), FormatError, f"{PAGE}.*'offset'"),
    ("offsets below zero", _header(_entry(data_offsets=[-208, 0]), bytes(208)), FormatError, f"{PAGE}.*'offset'"),
    (
        "offsets the wrong way round",
        _header(_entry(data_offsets=[208, 0]), bytes(208)),
        FormatError,
        f"{PAGE}.*'offset'",
    ),
    ("offsets past the end", _header(_entry(data_offsets=[0, 2**62]), bytes(208)), FormatError, PAGE),
    ("a hole before", _header(_entry(data_offsets=[8, 216]), bytes(216)), FormatError, f"{PAGE}.*'offset'.*hole"),
    ("bytes behind", _header(_entry(), bytes(216)), FormatError, PAGE),
]


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in PAGES], ids=[case[0] for case in PAGES])
def test_page_that_is_none_is_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    tampered = Tampered(whole)
    lie(tampered)
    refused_everywhere(tampered, tmp_path / "step_3", error, match)


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def _huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


REPLACED = [_missing, _folder, _pipe, _device, _circle, _shorter, _empty, _longer, _huge]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["page", "data of rank 0", "data of rank 1"])
@pytest.mark.parametrize("replace", REPLACED, ids=[replace.__name__.strip("_") for replace in REPLACED])
def test_file_that_is_another_is_refused_by_name(
    whole: Path, tmp_path: Path, replace: Callable[[Path], None], number: int
) -> None:
    tampered = Tampered(whole)
    folder = tampered.write(tmp_path / "step_3")
    path = [*(page["path"] for page in tampered.root["pages"]), *(file["path"] for file in tampered.root["files"])][
        number
    ]
    replace(folder / path)
    refused_everywhere(None, folder, CorruptionError, f"{path}: ")


def test_files_may_be_links_to_where_they_are_kept(whole: Path, tmp_path: Path) -> None:
    """Stores that keep each file once link to it from there. A link can't lie: sizes and checksums have to fit."""
    tampered = Tampered(whole)
    folder = tampered.write(tmp_path / "step_3")
    for path in [*folder.glob("*/*"), folder / "manifest.json"]:
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert bitwise_equal(read_all(folder), read_all(whole))
    assert bitwise_equal(load_all(folder), load_all(whole))


@pytest.mark.parametrize("size", [4096, 3 * 4096, 1 << 16, 1 << 22, 3 << 22, 1 << 24, 1 << 28])
def test_any_block_size_of_another_writer_can_be_read(tmp_path: Path, size: int) -> None:
    """Blocks that are smaller and larger than what a reader reads at once, and that do not divide it."""
    known = write_whole(tmp_path / "whole", big_rows=12_000)
    tampered = Tampered(tmp_path / "whole")
    page = tampered.pages[0]
    tampered.root["block_size"] = size
    page["block_digest"] = np.zeros((sum(-(-int(n) // size) for n in page["length"] if n > size), 16), np.uint8)
    block = 0
    for row, length in enumerate(page["length"].tolist()):
        page["block"][row] = block if length > size else -1
        block += -(-length // size) if length > size else 0
        tampered.seal_chunk(row)
    folder = tampered.write(tmp_path / "step_3")
    assert bitwise_equal(read_all(folder), known)
    assert bitwise_equal(load_all(folder), known)
    assert verify(folder).intact
    with open_checkpoint(folder) as checkpoint:
        big = checkpoint["model.big"]
        assert np.array_equal(big[7:11_990:3, 100:400].view(np.uint32), known["model.big"][7:11_990:3, 100:400])
        assert np.array_equal(big[11_000:, ::-1].view(np.uint32), known["model.big"][11_000:, ::-1])
