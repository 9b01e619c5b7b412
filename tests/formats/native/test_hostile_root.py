"""A manifest that lies: each lie ends in an error that names the place, in no time, whatever it claims."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    UnknownDtypeError,
    UnknownVersionError,
)
from tests.formats.native.bounds import bounded
from tests.formats.native.hostile import refused_everywhere
from tests.formats.native.tampering import Tampered, seal_root

Lie = tuple[str, Callable[[Tampered], object], type[CheckpointError], str]


def _set(*place: str | int, to: Any) -> Callable[[Tampered], object]:
    """A lie: one member of the root says something else."""

    def lie(tampered: Tampered) -> None:
        at: Any = tampered.root
        for part in place[:-1]:
            at = at[part]
        at[place[-1]] = to

    return lie


def _without(*place: str | int) -> Callable[[Tampered], object]:
    def lie(tampered: Tampered) -> None:
        at: Any = tampered.root
        for part in place[:-1]:
            at = at[part]
        del at[place[-1]]

    return lie


def _entry(member: str, said: Any) -> Callable[[Tampered], object]:
    return lambda tampered: tampered.root["entries"]["model"].update({member: said})


DEEP: Any = []
for _ in range(850):
    DEEP = [DEEP]

HEAD: list[Lie] = [
    ("another format", _set("format", to="other"), FormatError, '"format"'),
    ("no format", _without("format"), FormatError, '"format"'),
    ("a newer version", _set("version", to=2), UnknownVersionError, "version 2.*Install"),
    ("version as text", _set("version", to="1"), UnknownVersionError, "version"),
    ("version as bool", _set("version", to=True), UnknownVersionError, "version"),
    ("version as float", _set("version", to=1.0), UnknownVersionError, "version"),
    ("a nested version", _set("version", to=DEEP), UnknownVersionError, "version"),
    ("a version of a megabyte", _set("version", to="9" * 10**6), UnknownVersionError, "version"),
    ("attempt that is a path", _set("attempt", to="../../../../etc/"), FormatError, '"attempt"'),
    ("attempt in capitals", _set("attempt", to="A" * 16), FormatError, '"attempt"'),
    ("attempt and a newline", _set("attempt", to="a" * 16 + "\n"), FormatError, '"attempt"'),
    *((f"step {step}", _set("step", to=step), FormatError, '"step"') for step in (-1, "3", True, 2**63, 0.5, [])),
    *(
        (f"block size {size}", _set("block_size", to=size), FormatError, '"block_size"')
        for size in (0, -4096, 4095, 4097, 2**62, 2**40, "4096", 4096.0, True, None)
    ),
    ("codecs that are none", _set("codecs", to={"raw": 1}), FormatError, '"codecs"'),
    ("a codec that is no name", _set("codecs", to=[["raw"]]), FormatError, '"codecs"'),
    ("more codecs than a byte counts", _set("codecs", to=["raw"] * 257), FormatError, '"codecs"'),
    *(
        (f"{member} missing", _without(member), FormatError, f'"{member}"')
        for member in ("codecs", "files", "pages", "tensors", "aliases", "values", "entries", "layout", "provenance")
    ),
    *(
        (f"{member} of another type", _set(member, to=7), FormatError, f'"{member}"')
        for member in ("files", "pages", "tensors", "aliases", "values", "entries", "layout", "provenance")
    ),
    ("an entry without a kind", _set("entries", "model", to={}), FormatError, "'model'"),
    *(
        (f"an entry whose {member} are {str(said)[:20]}", _entry(member, said), FormatError, "'model'")
        for member in ("modules", "local", "flat")
        for said in (None, 7, "x", ["x"], {"x": 7}, {"x": None}, {"x": []})
    ),
    ("an entry that is none", _set("entries", "model", to=[1]), FormatError, "'model'"),
]

PATHS = (
    *("", ".", "..", "/", "/etc/passwd", "~/x", "data", "data/", "data/.", "data/..", "data/../manifest.json"),
    *("data//x", "/data/x", "./data/x", "data/a/b", "../data/x", "data\\x", "data/a\\b", "data/a\0b", "data/..\\..\\x"),
    *(
        "data/\ud800",
        "data/\x1b[2J",
        "data/a\nb",
        "data/" + "x" * 5000,
        "C:\\x",
        "file:///etc/passwd",
        7,
        None,
        ["data/x"],
        DEEP,
    ),
)
FILES: list[Lie] = [
    *(
        (f"data file at {str(path)[:30]!r}", _set("files", 1, "path", to=path), FormatError, r'"files"\[1\]')
        for path in (*PATHS, "index/000-00112233445566aa.safetensors")
    ),
    *(
        (
            f"page at {str(path)[:30]!r}",
            _set("pages", 0, "path", to=path.replace("data", "index") if isinstance(path, str) else path),
            FormatError,
            r'"pages"\[0\]',
        )
        for path in (*PATHS, "index/x")
        if path != "index/x"
    ),
    ("a file twice", lambda t: t.root["files"][1].update(path=t.root["files"][0]["path"]), FormatError, "listed twice"),
    ("a file that is none", _set("files", 0, to="data/x"), FormatError, r'"files"\[0\]'),
    ("a page that is none", _set("pages", 0, to="index/x"), FormatError, r'"pages"\[0\]'),
    *(
        (f"data file of {size} bytes", _set("files", 0, "size", to=size), FormatError, "impossible sizes")
        for size in (-1, 2**63, 2**200, True, 1.5, "9", None, 100)
    ),
    *(
        (f"header of {size} bytes", _set("files", 0, "header", to=size), FormatError, "impossible sizes")
        for size in (-1, 0, 7, 2**62, None)
    ),
    *(
        (f"data file's digest {digest!r}", _set("files", 0, "digest", to=digest), FormatError, "no digest")
        for digest in ("", "0" * 31, "0" * 33, "G" * 32, "A" * 32, None, 7, "0" * 32 + "\n")
    ),
    *(
        (f"page of {size} rows", _set("pages", 0, "rows", to=size), FormatError, "rows|sizes")
        for size in (-1, 2**63, 1, 2**62, None)
    ),
    ("no pages but chunks", _set("pages", to=[]), FormatError, "does not have|index"),
    (
        "a page that no tensor uses",
        lambda t: t.root["pages"].append(dict(t.root["pages"][0], path="index/y")),
        FormatError,
        "no tensor",
    ),
]


def _page_digests(digests: object) -> Callable[[Tampered], object]:
    def lie(tampered: Tampered) -> None:
        tampered.page_digests = digests

    return lie


FILES += [
    (f"page digests {str(digests)[:20]}", _page_digests(digests), FormatError, "one digest per block")
    for digests in ([], ["0" * 32] * 2, ["x"], "0" * 32, None, [7])
]

TENSORS: list[Lie] = [
    *(
        (
            f"shape {str(shape)[:30]}",
            _set("tensors", "model.bias", "shape", to=shape),
            FormatError,
            "'model.bias'.*shape",
        )
        for shape in (
            [-1],
            [2**63],
            [2**70],
            [True],
            [1.0],
            ["7"],
            7,
            None,
            [1] * 65,
            [0] * 100_000,
            [0, 2**62, 4],
            [2**62, 0, 8],
        )
    ),
    *(
        (
            f"dtype {str(dtype)[:30]}",
            _set("tensors", "model.bias", "dtype", to=dtype),
            UnknownDtypeError,
            "'model.bias'",
        )
        for dtype in ("float128", "object", "O", "os.system", "", None, 7, ["float32"], {"a": 1}, DEEP, "x" * 10**6)
    ),
    ("a tensor that is none", _set("tensors", "model.bias", to=[]), FormatError, "'model.bias'"),
    *(
        (f"page {page}", _set("tensors", "model.bias", "page", to=page), FormatError, "'model.bias'")
        for page in (-1, 1, 2, 2**62, 2**63, "0", None)
    ),
    (
        "the second page of none",
        lambda t: t.root.update(
            pages=[], tensors={"x": {"dtype": "int8", "shape": [1], "page": 1, "row": 0, "rows": 1}}, aliases={}
        ),
        FormatError,
        "'x'",
    ),
    *(
        (f"row {row}", _set("tensors", "model.bias", "row", to=row), FormatError, "'model.bias'")
        for row in (-1, 0, 2, 4, 2**62, None)
    ),
    *(
        (f"{rows} rows", _set("tensors", "model.bias", "rows", to=rows), FormatError, "'model.bi")
        for rows in (-1, 0, 2, 2**62, 2**63, None)
    ),
    ("a place without chunks", _set("tensors", "model.empty", "row", to=3), FormatError, "'model.empty'"),
    ("a cut that is not there", _set("tensors", "model.bias", "cut", to=1), FormatError, "'model.bias'.*cut"),
    ("a cut as text", _set("tensors", "model.bias", "cut", to="0"), FormatError, "'model.bias'.*cut"),
    (
        "names out of order",
        lambda t: t.root.update(tensors=dict(reversed(t.root["tensors"].items()))),
        FormatError,
        "not in order|rows",
    ),
    (
        "an empty name",
        lambda t: t.root.update(tensors={"": t.root["tensors"]["model.empty"]} | t.root["tensors"]),
        FormatError,
        "tensor ''",
    ),
    *(
        (f"alias to {str(name)[:20]!r}", _set("aliases", "tied", to=name), FormatError, "'tied'")
        for name in ("nowhere", "tied", "model.tied", "", None, 7, ["model.bias"], {})
    ),
    ("aliases in a circle", lambda t: t.root["aliases"].update(a="b", b="a"), FormatError, "alias 'a'"),
    ("an alias in a tensor's place", _set("aliases", "model.bias", to="model.weight"), FormatError, "'model.bias'"),
]


MESH = {"names": ["dp", "tp"], "shape": [2, 4]}


def _layout(meshes: Any, cuts: Any) -> Callable[[Tampered], object]:
    return lambda tampered: tampered.root["layout"].update(meshes=meshes, cuts=cuts)


CUT = {"mesh": 0, "cut": "S(0)@dp"}
LAYOUT: list[Lie] = [
    ("no rank wrote it", _set("layout", "world_size", to=0), FormatError, '"layout.world_size"'),
    ("ranks as text", _set("layout", "world_size", to="4"), FormatError, '"layout.world_size"'),
    ("cuts that are none", _layout([], {}), FormatError, '"layout.cuts"'),
    ("meshes that are none", _layout({}, [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh that is none", _layout([7], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh without a shape", _layout([{"names": ["dp"]}], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh without names", _layout([{"shape": [2]}], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh of numbers", _layout([{"names": [7], "shape": [2]}], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh of nothing", _layout([MESH | {"shape": [0, 1]}], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh of text", _layout([MESH | {"shape": "24"}], [CUT]), FormatError, '"layout.meshes"'),
    ("a mesh with more names than sizes", _layout([MESH | {"shape": [2]}], [CUT]), FormatError, '"layout.meshes"'),
    ("a cut that is none", _layout([MESH], ["S(0)@dp"]), FormatError, '"layout.cuts"'),
    ("a cut without words", _layout([MESH], [{"mesh": 0}]), FormatError, '"layout.cuts"'),
    ("a cut of a number", _layout([MESH], [{"mesh": 0, "cut": 0}]), FormatError, '"layout.cuts"'),
    ("a cut over a mesh that is not there", _layout([MESH], [CUT | {"mesh": 1}]), FormatError, '"layout.cuts"'),
    ("a cut over a mesh by name", _layout([MESH], [CUT | {"mesh": "dp"}]), FormatError, '"layout.cuts"'),
]


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in HEAD], ids=[case[0] for case in HEAD])
def test_lying_head_is_refused(whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str) -> None:
    refused_everywhere(_tampered(whole, lie), tmp_path / "step_3", error, match)


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_lying_list_of_files_is_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    refused_everywhere(_tampered(whole, lie), tmp_path / "step_3", error, match)


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS])
def test_lying_list_of_tensors_is_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    refused_everywhere(_tampered(whole, lie), tmp_path / "step_3", error, match)


@pytest.mark.parametrize(("lie", "error", "match"), [case[1:] for case in LAYOUT], ids=[case[0] for case in LAYOUT])
def test_lying_layout_is_refused(
    whole: Path, tmp_path: Path, lie: Any, error: type[CheckpointError], match: str
) -> None:
    refused_everywhere(_tampered(whole, lie), tmp_path / "step_3", error, match)


def _tampered(whole: Path, lie: Callable[[Tampered], object]) -> Tampered:
    tampered = Tampered(whole)
    lie(tampered)
    return tampered


# what is not even JSON, or not only

Text = Callable[[bytes], bytes]


def _replace(old: bytes, new: bytes) -> Text:
    def change(text: bytes) -> bytes:
        assert text.count(old) == 1
        return text.replace(old, new)

    return change


TEXTS: list[tuple[str, Text, str]] = [
    ("nothing", lambda _: b"", "JSON"),
    ("an array", lambda _: b"[1]", "JSON"),
    ("a member twice", _replace(b'"version": 1', b'"version": 2, "version": 1'), "'version' occurs twice"),
    ("a tensor twice", _replace(b'"model.bias": {', b'"model.bias": {}, "model.bias": {'), "'model.bias' occurs twice"),
    ("a digest of its own", _replace(b'"version": 1', b'"digest": "0", "version": 1'), "'digest' occurs twice"),
    (
        "a value twice, deep down",
        _replace(b'"epoch": 3', b'"epoch": [{"a": 1, "a": 2}]'),
        "'a' occurs twice",
    ),
    ("NaN", _replace(b'"epoch": 3', b'"epoch": NaN'), "NaN"),
    ("-Infinity", _replace(b'"epoch": 3', b'"epoch": -Infinity'), "-Infinity"),
    ("a number of 100,000 digits", _replace(b'"epoch": 3', b'"epoch": ' + b"9" * 100_000), "JSON"),
    (
        "arrays 100,000 deep",
        _replace(b'"epoch": 3', b'"epoch": ' + b"[" * 100_000 + b"]" * 100_000),
        "JSON",
    ),
    (
        "objects 100,000 deep",
        _replace(b'"epoch": 3', b'"epoch": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "JSON",
    ),
    ("no Unicode", _replace(b'"model.bias": {', b'"model.bia\xff": {'), "JSON"),
    ("a surrogate in UTF-8", _replace(b'"model.bias": {', b'"model.bia\xed\xa0\x80": {'), "JSON"),
    ("another encoding", lambda text: text.decode().encode("utf-16"), "JSON"),
    ("a byte order mark", lambda text: b"\xef\xbb\xbf" + text, "JSON"),
    ("a comment", _replace(b'"version": 1', b'/* */ "version": 1'), "JSON"),
    ("a control character", _replace(b'"model.bias": {', b'"model.bia\n": {'), "JSON"),
    ("a comma too many", _replace(b'"version": 1,', b'"version": 1,,'), "JSON"),
    ("quotes of Python", lambda text: text.replace(b'"', b"'"), "JSON"),
    ("an end in the middle", _replace(b'"version": 1', b'"version": 1}, {"a": 1'), "JSON"),
]


@pytest.mark.parametrize(("change", "match"), [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS])
def test_manifest_that_is_no_strict_json_is_refused(whole: Path, tmp_path: Path, change: Text, match: str) -> None:
    tampered = Tampered(whole)
    folder = tampered.write(tmp_path / "step_3")
    text = json.dumps(tampered.root).encode()
    (folder / "manifest.json").write_bytes(seal_root(change(text)))
    refused_everywhere(None, folder, FormatError, match)


def test_manifest_cut_off_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    text = (folder / "manifest.json").read_bytes()
    for length in (*range(60), *range(60, len(text) - 60, 97), *range(len(text) - 60, len(text))):
        (folder / "manifest.json").write_bytes(text[:length])
        with bounded(tmp_path), pytest.raises(CorruptionError, match=r"manifest.json: .*damaged or truncated"):
            open_checkpoint(folder)


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"{}", b"x" * 100])
def test_manifest_with_more_behind_it_is_refused(whole: Path, tmp_path: Path, extra: bytes) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    with (folder / "manifest.json").open("ab") as stream:
        stream.write(extra)
    refused_everywhere(None, folder, CorruptionError, "manifest.json")


def test_sparse_manifest_of_a_tebibyte_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    text = (folder / "manifest.json").read_bytes()
    os.truncate(folder / "manifest.json", 1 << 40)
    refused_everywhere(None, folder, CheckpointError, "manifest.json")
    with (folder / "manifest.json").open("r+b") as stream:
        stream.seek((1 << 40) - 46)
        stream.write(text[-46:])
    refused_everywhere(None, folder, CheckpointError, "manifest.json")


def test_manifest_that_is_a_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    refused_everywhere(None, folder, CheckpointError, "manifest.json")


@pytest.mark.timeout(20)
def test_manifest_that_is_a_pipe_is_refused_and_not_waited_for(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    refused_everywhere(None, folder, CheckpointError, "manifest.json")


@pytest.mark.timeout(20)
def test_manifest_that_is_an_endless_device_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    refused_everywhere(None, folder, CheckpointError, "manifest.json")


def test_manifest_that_is_a_circle_of_links_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("manifest.json")
    refused_everywhere(None, folder, CheckpointError, "manifest.json")


def test_folder_without_manifest_is_no_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "manifest.json").unlink()
    refused_everywhere(None, folder, CheckpointNotFoundError, "never committed; use an earlier")
    refused_everywhere(None, folder / "nowhere", CheckpointNotFoundError, "no such folder")
    refused_everywhere(None, folder / "data", CheckpointNotFoundError, "no checkpoint in this format")


def test_unknown_members_are_ignored(whole: Path, tmp_path: Path) -> None:
    tampered = Tampered(whole)
    tampered.root["later"] = {"x": [1]}
    for item in (tampered.root["files"][0], tampered.root["pages"][0], tampered.tensor("model.bias")):
        item["later"] = 1
    with open_checkpoint(tampered.write(tmp_path / "step_3")) as checkpoint:
        assert checkpoint["model.bias"][...].shape == (7,)


def test_files_that_the_manifest_does_not_list_are_ignored(whole: Path, tmp_path: Path) -> None:
    folder = Tampered(whole).write(tmp_path / "step_3")
    (folder / "data" / "00000-ffffffffffffffff.safetensors").write_bytes(b"debris of an attempt that failed")
    (folder / ".manifest-ffffffffffffffff.tmp").write_bytes(b"{")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint["model.bias"][...].shape == (7,)
