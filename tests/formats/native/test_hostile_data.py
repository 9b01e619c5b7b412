"""Data files that are not what the index says, with checksums that fit; and values that are more than values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointError, CorruptionError, FormatError
from ckpt_formats.manifest import rank_blob
from ckpt_formats.values import Opaque
from ckpt_formats.verify import verify
from tests.formats.native.bounds import bounded
from tests.formats.native.hostile import Bag, found_by_verify, load_all, read_all, refused_everywhere
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import ATTEMPT, BLOB, bitwise_equal

DATA = rf"data/00000-{ATTEMPT}.safetensors"


def _headers(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Tampered], object]:
    """A lie: the header of a data file says something else of an entry than the index."""

    def lie(tampered: Tampered) -> None:
        for file in range(len(tampered.data)):
            header = tampered.header(file)
            if name in header:
                change(header[name])
                tampered.set_header(file, json.dumps(header, separators=(",", ":")).encode())
                return
        raise AssertionError(f"there is no entry {name}")

    return lie


def _header(text: bytes) -> Callable[[Tampered], object]:
    return lambda tampered: tampered.set_header(0, text)


def _length(length: int) -> Callable[[Tampered], object]:
    def lie(tampered: Tampered) -> None:
        tampered.data[0][:8] = length.to_bytes(8, "little")
        tampered.seal_header(0)

    return lie


def _swap(tampered: Tampered) -> None:
    header = tampered.header(0)
    header["model.bias"], header["model.flags"] = header["model.flags"], header["model.bias"]
    tampered.set_header(0, json.dumps(header, separators=(",", ":")).encode())


HEADERS: list[tuple[str, Callable[[Tampered], object]]] = [
    ("another dtype", _headers("model.bias", lambda entry: entry.update(dtype="F16"))),
    ("another shape", _headers("model.bias", lambda entry: entry.update(shape=[1, 7]))),
    ("a huge shape", _headers("model.bias", lambda entry: entry.update(shape=[2**62] * 60))),
    ("an entry's bytes swapped", _swap),
    ("an entry that overruns the file", _headers("model.bias", lambda entry: entry.update(data_offsets=[0, 2**62]))),
    ("an entry that is none", _headers("model.bias", lambda entry: entry.clear())),
    ("no JSON", _header(b"\x80\x04\x95pickle.")),
    ("an array", _header(b"[]")),
    ("no entries", _header(b"{}")),
    ("too deep", _header(b'{"a":' * 800)),
    ("nothing", _length(0)),
    ("a length of 2**64-1", _length(2**64 - 1)),
    ("a length past the file", _length(2**40)),
    ("a length past the header", _length(4096)),
]


@pytest.mark.parametrize("lie", [case[1] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_header_that_disagrees_with_the_index_is_found_and_harms_nobody(
    whole: Path, tmp_path: Path, lie: Callable[[Tampered], object]
) -> None:
    """Reading goes by the index and its checksums, so that these bytes are not needed."""
    tampered = Tampered(whole)
    lie(tampered)
    folder = tampered.write(tmp_path / "step_3")
    found_by_verify(folder)
    assert bitwise_equal(read_all(folder), read_all(whole))
    assert bitwise_equal(load_all(folder), load_all(whole))


def test_chunk_that_lies_in_the_header_is_refused(whole: Path, tmp_path: Path) -> None:
    """The root says that the header ends earlier than it does."""
    tampered = Tampered(whole)
    tampered.root["files"][0]["header"] = 8
    tampered.seal_header(0)
    row = tampered.rows("model.bias")[0]
    tampered.pages[0]["start"][row] = 100
    tampered.seal_chunk(row)
    found_by_verify(tampered.write(tmp_path / "step_3"))


def test_padding_that_is_not_zero_is_found(whole: Path, tmp_path: Path) -> None:
    tampered = Tampered(whole)
    for file in range(2):
        for key, entry in tampered.header(file).items():
            if key.startswith("__pad__"):
                tampered.data[file][tampered.root["files"][file]["header"] + entry["data_offsets"][1] - 1] = 1
    folder = tampered.write(tmp_path / "step_3")
    found = [damage.what for damage in verify(folder).damage]
    assert found
    assert all("padding" in what for what in found)


@pytest.mark.parametrize("name", ["model.bias", "model.big", "model.scalar", "model.weight", "model.complex"])
def test_other_bytes_are_refused_by_name(whole: Path, tmp_path: Path, name: str) -> None:
    tampered = Tampered(whole)
    page, row = tampered.pages[0], tampered.rows(name)[-1]
    tampered.data[int(page["file"][row])][int(page["start"][row] + page["length"][row]) - 1] ^= 0x80
    refused_everywhere(tampered, tmp_path / "step_3", CorruptionError, f"data/.*bytes.*'{name}'.*checksum")


def test_payload_of_a_value_that_is_damaged_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    tampered = Tampered(whole)
    page, row = tampered.pages[0], tampered.rows(BLOB)[0]
    tampered.data[int(page["file"][row])][int(page["start"][row])] ^= 1
    refused_everywhere(tampered, tmp_path / "step_3", CorruptionError, f"data/.*{BLOB}.*checksum")


# values


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


ARRAY = {"dtype": "<f8", "shape": [2], "data": "AAAAAAAAAAAAAAAAAAAAAA=="}
VALUES: list[tuple[str, Any]] = [
    ("an unknown tag", {"$os.system": "touch x"}),
    ("a module's name", {"$builtins.eval": "1"}),
    ("a pickle", {"$pickle": "gASVCg=="}),
    ("a tag with more beside it", {"$tuple": [], "$set": []}),
    ("a tag beside a member", {"$tuple": [], "a": 1}),
    ("too deep", _deep(200)),
    ("tuples too deep", json.loads('{"$tuple":[' * 150 + "]}" * 150)),
    ("bytes that are no base64", {"$bytes": "%%%"}),
    ("bytes that are a number", {"$bytes": 10**15}),
    ("a payload from nowhere", {"$bytes": {"blob": "__ckpt__.blob.none"}}),
    ("a payload from a tensor", {"$bytes": {"blob": "model.big"}}),
    ("a payload from a file", {"$bytes": {"blob": "../../../../etc/passwd"}}),
    ("a payload from a number", {"$bytes": {"blob": 7}}),
    ("a payload from a list", {"$bytes": {"blob": [BLOB]}}),
    ("an array of objects", {"$numpy.ndarray": ARRAY | {"dtype": "|O"}}),
    ("an array of records", {"$numpy.ndarray": ARRAY | {"dtype": "i4,O"}}),
    ("an array larger than its bytes", {"$numpy.ndarray": ARRAY | {"shape": [2**40]}}),
    ("an array of 2**62 nothings", {"$numpy.ndarray": ARRAY | {"shape": [0, 2**62, 8], "data": ""}}),
    ("an array of -2", {"$numpy.ndarray": ARRAY | {"shape": [-2]}}),
    ("an array in 100 dimensions", {"$numpy.ndarray": ARRAY | {"shape": [1] * 99 + [2]}}),
    ("elements of 999,999,999 bytes", {"$numpy.ndarray": {"dtype": "|S999999999", "shape": [1], "data": ""}}),
    ("an int that is none", {"$int": "0x"}),
    ("a float that is none", {"$float": "1e5"}),
    ("a date that is none", {"$date": "2024-13-45"}),
    ("a duration of ages", {"$timedelta": [2**50, 0, 0]}),
    ("a zone that is a path", {"$zoneinfo": "../../../../etc/passwd"}),
    ("a dict with a list for a key", {"$dict": [[[1], 2]]}),
    ("a dict with a key twice", {"$dict": [[1, 2], [1, 3]]}),
    ("a set with an element twice", {"$set": [1, 1]}),
    ("a set of lists", {"$set": [[1]]}),
    ("a range that does not advance", {"$range": [0, 10, 0]}),
    ("a deque that is too short", {"$deque": {"maxlen": 0, "items": [1]}}),
    ("a dtype of torch that is none", {"$torch.dtype": "os"}),
    ("a device that is none", {"$torch.device": "/etc/passwd"}),
    ("a generator without a state", {"$torch.Generator": {"device": "cpu", "state": ""}}),
    ("a tensor from nowhere", {"$tensor": "nowhere"}),
    ("a tensor that is none", {"$tensor": [1]}),
    ("a tensor of the format's own", {"$tensor": BLOB}),
    ("a subclass that is none", {"$subclass": {"kind": "os.system", "parts": 7}}),
]


@pytest.mark.parametrize("value", [case[1] for case in VALUES], ids=[case[0] for case in VALUES])
def test_hostile_value_is_refused_or_stays_opaque(whole: Path, tmp_path: Path, value: Any) -> None:
    tampered = Tampered(whole)
    tampered.root["values"]["model"]["epoch"] = value
    folder = tampered.write(tmp_path / "step_3")
    with bounded(folder):
        epoch = _epoch(folder)
    assert isinstance(epoch, Opaque | CheckpointError)
    if isinstance(epoch, CheckpointError):
        _names_the_value(epoch, folder)
    bag = Bag()
    with bounded(folder), pytest.raises(CheckpointError) as caught:
        ckpt.load({"model": bag}, folder)
    _names_the_value(caught.value, folder)
    assert not bag.held, "nothing was applied"
    with bounded(folder):
        verify(folder)


def _epoch(folder: Path) -> object:
    try:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.values["model"]["epoch"]
    except CheckpointError as error:
        return error


def _names_the_value(error: CheckpointError, folder: Path) -> None:
    assert str(folder) in str(error)
    assert "model" in str(error)
    assert len(str(error)) < 1500


RANKS = [
    b"",
    b"[]",
    b"7",
    b"null",
    b"{",
    b"\xff",
    b'{"a": NaN}',
    b'{"a": 1, "a": 2}',
    b"[" * 31,
    b'{"a":' * 6,
    b'\xef\xbb\xbf{"a":1}',
]


@pytest.mark.parametrize("text", RANKS, ids=[repr(text) for text in RANKS])
def test_values_of_a_rank_that_are_no_strict_json_are_refused(whole: Path, tmp_path: Path, text: bytes) -> None:
    tampered = Tampered(whole)
    page, row = tampered.pages[0], tampered.rows(rank_blob(1))[0]
    start, length = int(page["start"][row]), int(page["length"][row])
    tampered.data[int(page["file"][row])][start : start + length] = text.ljust(length)
    tampered.seal_chunk(row)
    refused_everywhere(tampered, tmp_path / "step_3", FormatError, "the values of rank 1", loads=True)


def test_values_of_a_rank_may_not_be_a_tensor_of_floats(whole: Path, tmp_path: Path) -> None:
    tampered = Tampered(whole)
    tampered.tensor(rank_blob(0)).update(dtype="float32", shape=[2])
    tampered.pages[0]["size"][tampered.rows(rank_blob(0))[0]] = [2, 1]
    tampered.pages[0]["length"][tampered.rows(rank_blob(0))[0]] = 8
    tampered.seal_chunk(tampered.rows(rank_blob(0))[0])
    refused_everywhere(tampered, tmp_path / "step_3", CheckpointError, "__ckpt__.rank.00000", loads=True)
