"""Codecs: what is encoded comes back bit for bit, as docs/format.md says, and no stored bytes can do harm."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_formats.codecs import (
    BlockError,
    BlockTable,
    decode_block,
    encode_block,
    stored_bounds,
    table_row,
    table_size,
    word_size,
)
from ckpt_formats.digest import digest
from ckpt_formats.dtypes import DTYPES, dtype
from tests.formats.native.bounds import bounded

WORDS = st.sampled_from([2, 4, 8])


@st.composite
def blocks(draw: st.DrawFn) -> tuple[int, bytes]:
    """A word size and a block of whole words: noise, trained numbers, repetitions, or a mixture."""
    word = draw(WORDS)
    count = draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    noise = np.frombuffer(rng.bytes(count * word), f"<u{word}").copy()
    numbers = rng.standard_normal(count).astype("<f8" if word == 8 else "<f4")
    numbers = numbers.view(f"<u{max(word, 4)}") >> (16 if word == 2 else 0)
    kind = draw(st.sampled_from(["noise", "numbers", "zeros", "ones", "half"]))
    if kind == "numbers":
        noise[:] = numbers
    elif kind == "zeros":
        noise[:] = 0
    elif kind == "ones":
        noise[:] = (1 << 8 * word) - 1
    elif kind == "half":
        noise[count // 2 :] = numbers[count // 2 :]
    return word, noise.tobytes()


def encode(data: bytes, word: int) -> bytes:
    into = memoryview(bytearray(len(data)))
    return bytes(into[: encode_block(data, word, into)])


def decode(stored: bytes, word: int, nbytes: int) -> bytes:
    """Decode stored bytes whose check fits."""
    into = bytearray(nbytes)
    decode_block(stored, digest(stored)[:4], word, memoryview(into))
    return bytes(into)


@given(blocks())
def test_blocks_come_back_bit_for_bit_and_never_grow(case: tuple[int, bytes]) -> None:
    word, data = case
    stored = encode(data, word)
    assert decode(stored, word, len(data)) == data
    (least,), (most,) = stored_bounds(np.array([len(data)]), np.array([word]), 1 << 20)
    assert least <= len(stored) + table_size(len(data), 1 << 20) <= most


def decode_by_the_document(stored: bytes, word: int, nbytes: int) -> bytes:
    """What docs/format.md says, number by number, with no code of the codec's."""
    if len(stored) == nbytes:
        return stored
    count = nbytes // word
    exponents = zstandard.ZstdDecompressor().decompress(stored[nbytes - count :])
    result = b""
    for k in range(count):
        value, skip, unit = 0, 0, word // 2
        while unit:
            at = skip * count + k * unit
            value |= int.from_bytes(stored[at : at + unit], "little") << 8 * skip
            skip, unit = skip + unit, unit // 2
        value |= exponents[k] << 8 * (word - 1)
        result += (value >> 1 | (value & 1) << 8 * word - 1).to_bytes(word, "little")
    return result


@settings(max_examples=30)
@given(blocks())
def test_blocks_are_stored_as_the_document_says(case: tuple[int, bytes]) -> None:
    word, data = case
    assert decode_by_the_document(encode(data, word), word, len(data)) == data


def test_numbers_as_training_leaves_them_shrink() -> None:
    numbers = (np.random.default_rng(0).standard_normal(1 << 18) * 0.02).astype("<f4")
    assert numbers.nbytes / len(encode(numbers.tobytes(), 4)) > 1.18
    half = (numbers.view("<u4") >> 16).astype("<u2")
    assert half.nbytes / len(encode(half.tobytes(), 2)) > 1.48


def test_any_flipped_bit_is_found() -> None:
    data = np.random.default_rng(0).standard_normal(60).astype("<f4").tobytes() + bytes(400)
    stored = encode(data, 4)
    assert len(stored) < len(data)
    check = digest(stored)[:4]
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockError, match="checksum"):
            decode_block(bytes(damaged), check, 4, memoryview(bytearray(len(data))))


def test_words_are_numbers_and_their_halves_of_complex_ones() -> None:
    assert {name: word_size(dtype(name)) for name in ("float32", "bfloat16", "float64", "int64")} == {
        "float32": 4,
        "bfloat16": 2,
        "float64": 8,
        "int64": 8,
    }
    assert [word_size(dtype(f"complex{bits}")) for bits in (32, 64, 128)] == [2, 4, 8]
    assert all(word_size(of) == 0 for of in DTYPES.values() if of.itemsize == 1)


# hostile blocks: the check fits, the rest is a lie

COUNT = 64
PLAIN = bytes(3 * COUNT)


def _frame(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def _claims(size: int, single: bool) -> bytes:
    """A frame whose header claims so many bytes of content, and so large a window unless it is a single segment."""
    header = b"\x28\xb5\x2f\xfd" + (b"\xe0" if single else b"\xc0\xf0") + struct.pack("<Q", size)
    # one last block: a byte 1, repeated as often as a block can
    return header + ((128 << 10) << 3 | 0b011).to_bytes(3, "little") + b"\x01"


FRAMES: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no frame", b"not a zstd frame"),
    ("a skippable frame", b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4)),
    ("a frame of less", _frame(bytes(COUNT - 1))),
    ("a frame of more", _frame(bytes(COUNT + 1))),
    ("a bomb", _frame(bytes(50 << 20))),
    ("a frame that does not say its length", _frame(bytes(COUNT), write_content_size=False)),
    ("a bomb that does not say its length", _frame(bytes(50 << 20), write_content_size=False)),
    ("a claim of 2**62 bytes", _claims(1 << 62, single=False)),
    ("a segment of 2**62 bytes", _claims(1 << 62, single=True)),
    ("a block larger than the frame", _claims(COUNT, single=True)),
    ("a window of gigabytes", _claims(COUNT, single=False)),
    ("two frames", _frame(bytes(COUNT // 2)) * 2),
    ("a frame and more", _frame(bytes(COUNT)) + b"\0"),
    ("a frame that is cut", _frame(bytes(range(COUNT)))[:-1]),
    ("a checksum that does not fit", _frame(bytes(COUNT), write_checksum=True)[:-1] + b"\xff"),
]


@pytest.mark.parametrize("frame", [case[1] for case in FRAMES], ids=[case[0] for case in FRAMES])
def test_hostile_frames_are_refused_and_make_no_memory(tmp_path: Path, frame: bytes) -> None:
    stored = PLAIN + frame
    with bounded(tmp_path), pytest.raises(BlockError, match="zstd frame"):
        decode_block(stored, digest(stored)[:4], 4, memoryview(bytearray(4 * COUNT)))


@given(st.binary(max_size=200))
def test_whatever_the_frame_is_nothing_but_a_block_error_comes_of_it(frame: bytes) -> None:
    stored = PLAIN + frame
    if len(stored) < 4 * COUNT:
        with suppress(BlockError):
            decode(stored, 4, 4 * COUNT)


# tables

NBYTES, SIZE = 10_000, 4096
LENGTHS = (4000, 3500, 1700)


def _table(*lengths: int) -> bytes:
    return b"".join(length.to_bytes(4, "little") + bytes(4) for length in lengths)


def test_table_says_where_blocks_lie() -> None:
    data = b"".join(table_row(bytes(length)) for length in LENGTHS)
    table = BlockTable(data, sum(LENGTHS) + len(data), NBYTES, SIZE, 4)
    assert table.ends.tolist() == [0, 4000, 7500, 9200]
    assert [table.check(k) for k in range(3)] == [digest(bytes(length))[:4] for length in LENGTHS]
    assert list(table.runs(7500)) == [(0, 2), (2, 3)]
    assert list(table.runs(1)) == [(0, 1), (1, 2), (2, 3)]
    assert list(table.runs(1 << 20)) == [(0, 3)]


TABLES: list[tuple[str, tuple[int, ...]]] = [
    ("more than a block", (4097, 3500, 1603)),
    ("more than the last block", (4000, 3391, 1809)),
    ("less than what is never compressed", (4096, 3072, 2032)),
    ("a block of nothing", (4096, 0, 1808)),
    ("a sum that is too small", (4000, 3500, 1699)),
    ("a sum that is too large", (4000, 3500, 1701)),
    ("the most that fits", (2**32 - 1, 3500, 1700)),
]


@pytest.mark.parametrize("lengths", [case[1] for case in TABLES], ids=[case[0] for case in TABLES])
def test_tables_that_can_not_be_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(BlockError, match="table"):
        BlockTable(_table(*lengths), sum(LENGTHS) + 24, NBYTES, SIZE, 4)


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(3000, 4200), min_size=3, max_size=3), st.integers(0, 20_000))
def test_a_table_is_refused_or_keeps_within_its_chunk(lengths: list[int], length: int) -> None:
    try:
        table = BlockTable(_table(*lengths), length, NBYTES, SIZE, 4)
    except BlockError:
        return
    assert (np.diff(table.ends) > 0).all()
    assert table.ends[-1] + 24 == length
