"""The container of everything but the root: safetensors files with aligned, padded headers.

Written here rather than with the safetensors library because that library neither aligns data for direct I/O nor tells
byte positions; files stay readable by it, which the tests check. Knows no manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, TypeGuard

import numpy as np

from ckpt_formats.arrays import AnyArray, Buffer
from ckpt_formats.errors import FormatError
from ckpt_formats.json_text import parse_json

ALIGNMENT = 4096
"""Headers are padded to a multiple of this, and large chunks begin at one: what direct I/O needs."""
LARGE = 256 * 1024
"""Chunks of at least so many bytes begin at a multiple of ALIGNMENT."""
MAX_HEADER = 100_000_000
"""The safetensors library refuses longer headers, and so do we."""
PAD_PREFIX = "__pad__"

_COLUMN_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Where everything of one file will lie, known before a byte is written.

    Attributes:
        header: length, JSON and padding: the first bytes of the file.
        starts: position of each entry's first byte, from the beginning of the file.
        size: size of the file in bytes.
    """

    header: bytes
    starts: list[int]
    size: int


def lay_out(entries: Iterable[tuple[str, str, Sequence[int], int, int]], room: int = 0) -> FileLayout:
    """Place entries (key, safetensors dtype, shape, bytes, element size) one after the other, in the given order.

    Args:
        entries: what the file holds; an element size of ALIGNMENT aligns an entry as if it were large.
        room: bytes that the header shall have at least, a multiple of ALIGNMENT.

    Raises:
        FormatError: the header would be longer than safetensors allows.
    """
    parts: list[str] = []
    starts: list[int] = []
    at = 0
    pads = 0
    for key, dtype, shape, nbytes, itemsize in entries:
        alignment = ALIGNMENT if nbytes >= LARGE else itemsize
        gap = -at % alignment
        if gap:
            parts.append(f'"{PAD_PREFIX}.{pads}":{{"dtype":"U8","shape":[{gap}],"data_offsets":[{at},{at + gap}]}}')
            pads += 1
            at += gap
        starts.append(at)
        dims = ",".join(map(str, shape))
        parts.append(
            f'{encode_basestring_ascii(key)}:{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{at},{at + nbytes}]}}'
        )
        at += nbytes
    text = ("{" + ",".join(parts) + "}").encode("ascii")
    padded = max(room, -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT)
    if padded > MAX_HEADER:
        raise FormatError(f"{len(starts)} chunks do not fit the header of one file; write them into several files")
    header = (padded - 8).to_bytes(8, "little") + text + b" " * (padded - 8 - len(text))
    return FileLayout(header, [padded + start for start in starts], padded + at)


def header_bound(entries: Iterable[tuple[str, str, Sequence[int], int, int]]) -> int:
    """The most bytes that the header of these entries can have, a multiple of ALIGNMENT, if each may turn out smaller.

    For a header that can only be written when the sizes are known, but whose place must be known before.
    """
    texts = count = total = 0
    for key, _, shape, nbytes, _ in entries:
        texts += len(encode_basestring_ascii(key)) + len(",".join(map(str, shape)))
        count += 1
        total += nbytes + ALIGNMENT
    digits = len(str(total))
    entry = len(':{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]},') + 3 * digits
    pad = len(f'"{PAD_PREFIX}.{count}":{{"dtype":"U8","shape":[{ALIGNMENT}],"data_offsets":[,]}},') + 2 * digits
    return -(-(8 + 2 + texts + count * (entry + pad)) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a file's header; `start` and `stop` count from the beginning of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def is_index(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a non-negative integer that fits 63 bits (bool is not one)."""
    return type(value) is int and 0 <= value < 1 << 63


def parse_header(data: Buffer, file_size: int, what: str) -> list[Entry]:
    """The entries of a file, in order of position, from its first bytes (at least the whole header).

    Raises:
        FormatError: the header does not follow the format, or its entries leave holes, overlap, or overrun the file.
    """
    view = memoryview(data).cast("B")
    if len(view) < 8:
        raise FormatError(f"{what}: too short for a safetensors header")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER or 8 + length > min(len(view), file_size):
        raise FormatError(f"{what}: its header claims {length} bytes, more than there are")
    tree = parse_json(view[8 : 8 + length], what)
    if not isinstance(tree, dict):
        raise FormatError(f"{what}: its header is not a JSON object")
    entries: list[Entry] = []
    for key, item in tree.items():
        if key == "__metadata__":
            continue
        if not isinstance(item, dict):
            raise FormatError(f"{what}: entry {key!r} is not a JSON object")
        dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
        if (
            not isinstance(dtype, str)
            or not isinstance(shape, list)
            or not all(map(is_index, shape))
            or not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(map(is_index, offsets))
        ):
            raise FormatError(f"{what}: entry {key!r} is malformed")
        entries.append(Entry(key, dtype, tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1]))
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    at = 8 + length
    for entry in entries:
        if entry.start != at or entry.stop < entry.start:
            raise FormatError(f"{what}: entry {entry.key!r} overlaps another or leaves a hole before it")
        at = entry.stop
    if at != file_size:
        raise FormatError(f"{what}: its entries end at byte {at}, but the file has {file_size} bytes")
    return entries


def pack_columns(columns: Mapping[str, AnyArray], *, header_only: bool = False) -> bytearray:
    """Columns (int64 or uint8 arrays, at most 2-D) as the bytes of one safetensors file, or only its header.

    int64 columns must come before uint8 ones, so that no column needs padding.
    """
    header: dict[str, object] = {}
    at = 0
    for key, array in columns.items():
        dtype = "I64" if array.dtype == np.int64 else "U8"
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    if header_only:
        return bytearray(head)
    data = bytearray(len(head) + at)
    data[: len(head)] = head
    at = len(head)
    for array in columns.values():
        stored = np.frombuffer(data, array.dtype.newbyteorder("<"), array.size, at)
        stored.reshape(array.shape)[...] = array
        at += array.nbytes
    return data


def _fits(shape: tuple[int, ...], itemsize: int, nbytes: int) -> bool:
    """Whether an array of that shape has so many bytes, and can exist: numpy multiplies sizes of empty ones, too."""
    return math.prod(shape) * itemsize == nbytes and math.prod(size or 1 for size in shape) * itemsize < 1 << 63


def unpack_columns(data: Buffer, what: str) -> dict[str, AnyArray]:
    """The inverse of pack_columns: read-only views into data.

    Raises:
        FormatError: data are not such a file.
    """
    view = memoryview(data).cast("B")
    columns: dict[str, AnyArray] = {}
    for entry in parse_header(view, len(view), what):
        dtype = _COLUMN_DTYPES.get(entry.dtype)
        # the number of dimensions first: the product of a million of them takes minutes
        if dtype is None or len(entry.shape) > 2 or not _fits(entry.shape, dtype.itemsize, entry.stop - entry.start):
            raise FormatError(f"{what}: column {entry.key!r} is malformed")
        columns[entry.key] = np.frombuffer(view[entry.start : entry.stop], dtype=dtype).reshape(entry.shape)
    return columns
