"""Checkpoints with compressed chunks: read in any part, verified, and refused when they lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.diff import diff
from ckpt_formats.digest import BLOCK_SIZE
from ckpt_formats.dtypes import DTYPES
from ckpt_formats.errors import CheckpointError, CorruptionError, FormatError
from ckpt_formats.geometry import Box
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.reading import Reader, Request
from ckpt_formats.verify import verify
from tests.formats.native.bounds import bounded
from tests.formats.native.compressed import DATA, trained, write
from tests.formats.native.tampering import Tampered

ROWS, COLUMNS = 1500, 701
"""More than four blocks of float32, at whose ends no row ends."""
TENSORS = {
    "big": ("float32", trained("float32", ROWS, COLUMNS)),
    "cut": ("bfloat16", trained("bfloat16", 900, 1000)),
    "noise": ("float32", np.frombuffer(np.random.default_rng(1).bytes(1_200_000), np.uint32)),
    "one": ("float64", trained("float64", 40, 70)),
    "pair": ("complex64", trained("complex64", 333, 77)),
    "small": ("float32", trained("float32", 100)),
    "bytes": ("uint8", trained("uint8", 70_000)),
}
CUT = {"cut": [Box((0, 0), (400, 1000)), Box((400, 0), (500, 333)), Box((400, 333), (500, 667))]}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which codecs and sizes are mixed; not to be changed."""
    return write(tmp_path_factory.mktemp("compressed") / "step_3", TENSORS, cut=CUT)


@pytest.fixture(scope="module")
def opened(compressed: Path) -> Checkpoint:
    return open_checkpoint(compressed)


def test_one_file_has_chunks_with_and_without_a_codec_and_less_bytes(compressed: Path, opened: Checkpoint) -> None:
    places = opened.locations.places(0)[0]
    metas = opened.manifest.model_tensors
    codecs = {name: set(places.codec[meta.row : meta.row + meta.rows].tolist()) for name, meta in metas.items()}
    assert opened.locations.codecs == ["raw", "exponent-zstd"]
    assert codecs == {name: {0 if name in ("small", "bytes") else 1} for name in TENSORS}
    raw = sum(array.nbytes for _, array in TENSORS.values())
    assert (compressed / DATA).stat().st_size < 0.9 * raw


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: (name, trained(name, 211, 97)) for name in DTYPES}
    with open_checkpoint(write(tmp_path / "a", tensors)) as checkpoint:
        for name, (_, array) in tensors.items():
            assert checkpoint[name][...].tobytes() == array.tobytes(), name


def test_a_plain_reader_of_safetensors_finds_every_entry(compressed: Path) -> None:
    with safe_open(compressed / DATA, "numpy") as file:
        keys = {key for key in file.keys() if not key.startswith("__pad__")}  # noqa: SIM118 - it is no dict
        assert keys == (TENSORS.keys() - {"cut"}) | {f"cut{box}" for box in CUT["cut"]}
        assert file.get_tensor("small").tobytes() == TENSORS["small"][1].tobytes()
        assert file.get_tensor("big").dtype == np.uint8


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, Box]:
    name = draw(st.sampled_from(sorted(TENSORS)))
    offsets, sizes = [], []
    for size in TENSORS[name][1].shape:
        offset = draw(st.integers(0, size - 1))
        offsets.append(offset)
        sizes.append(draw(st.integers(1, size - offset)))
    return name, Box(tuple(offsets), tuple(sizes))


@settings(max_examples=60)
@given(st.lists(parts(), min_size=1, max_size=4), st.booleans(), st.integers(1, 3))
def test_any_part_is_what_it_is_without_compression(
    opened: Checkpoint, wanted: list[tuple[str, Box]], transposed: bool, threads: int
) -> None:
    requests = []
    for name, box in wanted:
        carrier = TENSORS[name][1].dtype
        into: AnyArray = np.zeros(box.sizes, carrier)
        requests.append(Request(name, box, np.zeros(box.sizes[::-1], carrier).T if transposed else into))
    Reader(opened.manifest, opened.locations).read(requests, threads=threads)
    for name, box, into in requests:
        assert np.array_equal(into, TENSORS[name][1][box.slices()]), (name, box)


def test_a_part_costs_only_the_blocks_that_it_touches(opened: Checkpoint) -> None:
    into = np.zeros((3, COLUMNS), np.uint32)
    stats = opened.read([Request("big", Box((700, 0), (3, COLUMNS)), into)])
    assert np.array_equal(into, TENSORS["big"][1][700:703])
    assert 0 < stats.bytes_read < BLOCK_SIZE
    assert stats.bytes_needed == into.nbytes


def test_a_compressed_checkpoint_equals_a_plain_one(compressed: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", TENSORS, compress=False)
    assert verify(compressed).intact
    assert diff(compressed, plain).equal


def stored(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Where the first chunk of a tensor is stored."""
    places = checkpoint.locations.places(0)[0]
    row = checkpoint.manifest.meta(name).row
    start = int(places.start[row])
    return start, start + int(places.length[row])


def test_flipped_bits_of_compressed_chunks_are_found_and_named(compressed: Path, tmp_path: Path) -> None:
    file = compressed / DATA
    original = file.read_bytes()
    copy = write(tmp_path / "step_3", TENSORS, cut=CUT)
    assert (copy / DATA).read_bytes() == original
    chosen = random.Random(0)
    with open_checkpoint(compressed) as checkpoint:
        ranges = {name: stored(checkpoint, name) for name in ("big", "noise", "one", "pair")}
    for name, (start, stop) in ranges.items():
        # the table at the end, the frame before it, the planes, and some places between
        for at in (start, stop - 1, stop - 8, stop - 9, *(chosen.randrange(start, stop) for _ in range(8))):
            damaged = bytearray(original)
            damaged[at] ^= 1 << chosen.randrange(8)
            (copy / DATA).write_bytes(damaged)
            found = verify(copy).damage
            assert found
            assert {(damage.file, damage.tensor) for damage in found} == {(DATA, name)}
            assert all(d.start is not None and d.stop is not None and start <= d.start < d.stop <= stop for d in found)
            with open_checkpoint(copy) as checkpoint, pytest.raises(CorruptionError, match=name) as caught:
                _ = checkpoint[name][...]
            assert DATA in str(caught.value)
            assert str(Box.whole(TENSORS[name][1].shape)) in str(caught.value)


def test_a_truncated_file_is_named_with_its_chunks(tmp_path: Path) -> None:
    folder = write(tmp_path / "step_3", TENSORS, cut=CUT)
    with open(folder / DATA, "r+b") as file:
        file.truncate(stored(open_checkpoint(folder), "noise")[1] - 5)
    assert "noise" in {damage.tensor for damage in verify(folder).damage}


def test_where_a_compressed_place_is_damaged_another_serves(compressed: Path, tmp_path: Path) -> None:
    """And the other way round: what is damaged in the plain file comes from the compressed one."""
    copies = [write(tmp_path / "a", TENSORS), write(tmp_path / "b", TENSORS, compress=False)]
    checkpoints = [open_checkpoint(copy) for copy in copies]
    rows = [checkpoint.locations.places(0)[0] for checkpoint in checkpoints]
    for copy, checkpoint, block in zip(copies, checkpoints, (0.1, 0.9), strict=True):
        start, stop = stored(checkpoint, "big")
        with open(copy / DATA, "r+b") as file:
            file.seek(int(start + block * (stop - start)))
            file.write(b"damage")
    one, other = rows
    other = Places(other.source + 1, other.start, other.length, other.codec)
    sources = [checkpoint.locations.sources[0] for checkpoint in checkpoints]
    for order in ((one, other), (other, one)):
        both = LocationMap(sources, ["raw", "exponent-zstd"], lambda _, order=order: order)  # type: ignore[misc]
        for box in (Box.whole((ROWS, COLUMNS)), Box((3, 5), (ROWS - 7, 600))):
            into = np.zeros(box.sizes, np.uint32)
            Reader(checkpoints[0].manifest, both).read([Request("big", box, into)])
            assert np.array_equal(into, TENSORS["big"][1][box.slices()])


# lies, sealed with checksums that fit


def _length(name: str, change: Callable[[int], int]) -> Callable[[Tampered], object]:
    def lie(tampered: Tampered) -> None:
        row = tampered.rows(name)[0]
        tampered.pages[0]["length"][row] = change(int(tampered.pages[0]["length"][row]))

    return lie


def _codec(name: str, codec: int) -> Callable[[Tampered], object]:
    return lambda tampered: tampered.pages[0]["codec"].__setitem__(tampered.rows(name)[0], codec)


def _larger(tampered: Tampered) -> None:
    """A tensor that claims a hundred times the bytes that are stored of it."""
    row = tampered.rows("one")[0]
    tampered.tensor("one")["shape"][0] *= 100
    tampered.pages[0]["size"][row, 0] *= 100


LIES: list[tuple[str, Callable[[Tampered], object]]] = [
    ("no table", _length("big", lambda _: 8)),
    ("less than can be", _length("big", lambda length: length // 2)),
    ("more than can be", _length("one", lambda length: 2 * length)),
    ("nothing", _length("big", lambda _: 0)),
    ("a codec for bytes", _codec("bytes", 1)),
    ("raw for what has one", _codec("big", 0)),
    ("a larger tensor", _larger),
]


@pytest.mark.parametrize("lie", [case[1] for case in LIES], ids=[case[0] for case in LIES])
def test_lengths_that_can_not_be_are_refused(
    compressed: Path, tmp_path: Path, lie: Callable[[Tampered], object]
) -> None:
    tampered = Tampered(compressed)
    lie(tampered)
    folder = tampered.write(tmp_path / "step_3")
    with bounded(tmp_path):
        with open_checkpoint(folder) as checkpoint, pytest.raises(FormatError, match="row"):
            _ = checkpoint["big"][...]
        assert verify(folder).damage


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 39), st.binary(min_size=1, max_size=12), st.data())
def test_whatever_is_stored_nothing_but_an_error_comes_of_it(
    compressed: Path, tmp_path_factory: pytest.TempPathFactory, back: int, junk: bytes, data: st.DataObject
) -> None:
    """Junk over the table of a chunk, and elsewhere in it."""
    tampered = Tampered(compressed)
    start, stop = stored(open_checkpoint(compressed), "big")
    at = data.draw(st.sampled_from([stop - 40 + back, start + back, (start + stop) // 2]))
    before = bytes(tampered.data[0])
    tampered.data[0][at : min(at + len(junk), stop)] = junk[: stop - at]
    folder = tampered.write(tmp_path_factory.mktemp("junk") / "step_3")
    with open_checkpoint(folder) as checkpoint:
        if bytes(tampered.data[0]) == before:
            return
        with pytest.raises(CheckpointError):
            _ = checkpoint["big"][...]
    assert {damage.tensor for damage in verify(folder).damage} == {"big"}
