"""Checkpoints with one lie: a whole one taken apart, changed, and sealed again with digests that fit.

So a reader can't refuse it for its checksums, only for what it claims.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_formats.arrays import AnyArray
from ckpt_formats.digest import block_digests, combine, digest, hexdigest
from ckpt_formats.safetensors_file import unpack_columns

Columns = dict[str, AnyArray]


class Tampered:
    """A checkpoint in parts that can be changed at will.

    Attributes:
        root: manifest.json, without its digest.
        pages: the columns of each index page.
        data: the bytes of each data file.
        page_bytes: page number -> bytes to write in the place of its columns.
        page_digests: what the root says in the place of the pages' digests, unless it is `...`.
    """

    def __init__(self, folder: Path) -> None:
        self.root: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        del self.root["digest"]
        self.pages: list[Columns] = []
        for page in self.root["pages"]:
            columns = unpack_columns((folder / page["path"]).read_bytes(), page["path"])
            self.pages.append({name: np.array(column) for name, column in columns.items()})
        self.data = [bytearray((folder / file["path"]).read_bytes()) for file in self.root["files"]]
        self.page_bytes: dict[int, bytes] = {}
        self.page_digests: object = ...
        self._page_paths = [page["path"] for page in self.root["pages"]]
        self._data_paths = [file["path"] for file in self.root["files"]]

    # parts by name

    def tensor(self, name: str) -> dict[str, Any]:
        """What the root says of a tensor."""
        return self.root["tensors"][name]  # type: ignore[no-any-return]

    def rows(self, name: str) -> list[int]:
        """Its rows in page 0."""
        first = self.tensor(name)["row"]
        return list(range(first, first + self.tensor(name)["rows"]))

    def remove_row(self, row: int) -> None:
        """Take a row out of page 0 and out of its tensor."""
        page = self.pages[0]
        for name in page:
            if name != "block_digest":
                page[name] = np.delete(page[name], row, axis=0)
        for meta in self.root["tensors"].values():
            if meta["row"] > row:
                meta["row"] -= 1
            elif meta["row"] <= row < meta["row"] + meta["rows"]:
                meta["rows"] -= 1
                meta["row"] *= meta["rows"] > 0
        self.root["pages"][0]["rows"] -= 1

    def header(self, file: int) -> dict[str, Any]:
        """The safetensors header of a data file."""
        return json.loads(self.data[file][8 : 8 + self._header_length(file)])  # type: ignore[no-any-return]

    def set_header(self, file: int, text: bytes) -> None:
        """Put other text into the room of the safetensors header of a data file, and its digest into the root."""
        room = self._header_length(file)
        assert len(text) <= room
        self.data[file][8 : 8 + room] = text.ljust(room)
        self.seal_header(file)

    def seal_header(self, file: int) -> None:
        """Let the root have the digest of a data file's header as it is now."""
        claims = self.root["files"][file]
        claims["digest"] = hexdigest(bytes(self.data[file][: claims["header"]]))

    def seal_chunk(self, row: int) -> None:
        """Let the index have the digest of the bytes that row `row` of page 0 claims."""
        page = self.pages[0]
        start, length = int(page["start"][row]), int(page["length"][row])
        data = bytes(self.data[int(page["file"][row])][start : start + length])
        block_size = self.root["block_size"]
        if len(data) <= block_size:
            page["digest"][row] = np.frombuffer(digest(data), np.uint8)
            return
        blocks = block_digests(data, block_size)
        first = int(page["block"][row])
        page["block_digest"][first : first + len(blocks)] = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, 16)
        page["digest"][row] = np.frombuffer(combine(blocks), np.uint8)

    def _header_length(self, file: int) -> int:
        return int.from_bytes(self.data[file][:8], "little")

    # sealing

    def write(self, folder: Path) -> Path:
        """Write it with digests that fit; sizes and digests of pages in the root are brought up to date."""
        for name in ("data", "index"):
            (folder / name).mkdir(parents=True)
        for path, content in zip(self._data_paths, self.data, strict=True):
            (folder / path).write_bytes(content)
        for number, (path, columns) in enumerate(zip(self._page_paths, self.pages, strict=True)):
            packed = self.page_bytes.get(number, pack(columns))
            (folder / path).write_bytes(packed)
            self.seal_page(number, packed)
        (folder / "manifest.json").write_bytes(seal_root(json.dumps(self.root).encode()))
        return folder

    def seal_page(self, number: int, packed: bytes) -> None:
        """Let the root have size and digests of a page."""
        pages, size = self.root.get("pages"), self.root.get("block_size")
        if isinstance(pages, list) and number < len(pages) and isinstance(pages[number], dict):
            pages[number]["size"] = len(packed)
            if isinstance(size, int) and size > 0:
                digests = [digest(packed[at : at + size]).hex() for at in range(0, len(packed), size)]
                pages[number]["digests"] = digests if self.page_digests is ... else self.page_digests


def seal_root(text: bytes) -> bytes:
    """JSON of an object without `digest` -> a manifest.json whose checksum fits."""
    body = text.strip().removesuffix(b"}")
    return body + b',"digest":"' + hexdigest(body).encode() + b'"}\n'


def pack(columns: Columns) -> bytes:
    """Columns of any integer dtype as a safetensors file, whatever they say."""
    names = {"int64": "I64", "uint8": "U8", "int32": "I32", "float64": "F64"}
    header, at = {}, 0
    for name, column in columns.items():
        stop = at + column.nbytes
        header[name] = {"dtype": names[column.dtype.name], "shape": list(column.shape), "data_offsets": [at, stop]}
        at = stop
    return pack_raw(json.dumps(header).encode(), b"".join(column.tobytes() for column in columns.values()))


def pack_raw(text: bytes, payload: bytes) -> bytes:
    """A safetensors file of any header and payload."""
    return len(text).to_bytes(8, "little") + text + payload
