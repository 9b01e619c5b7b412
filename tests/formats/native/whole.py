"""A small whole checkpoint in which everything of the format occurs, written without a process group.

Two writers; tensors that are whole, cut, tied, empty and 0-d; chunks of less than a block and of several; dtypes with
and without a safetensors name; padding; a large value apart; per-rank values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ckpt.saving.commit import Contents, FileNames, Part, commit
from ckpt.saving.sources import BytesSource
from ckpt.storage.data_file import Chunk, Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import prepare_folder
from ckpt_formats.arrays import AnyArray
from ckpt_formats.digest import hexdigest
from ckpt_formats.dtypes import dtype
from ckpt_formats.geometry import Box
from ckpt_formats.manifest import BLOB_PREFIX, rank_blob
from ckpt_formats.values import encode

ATTEMPT = "00112233445566aa"
PAYLOAD = bytes(range(256)) * 40
BLOB = BLOB_PREFIX + hexdigest(PAYLOAD)
PER_RANK = {"sampler": "a per-rank value"}


def tensors(big_rows: int = 701) -> dict[str, tuple[str, AnyArray, list[tuple[int, Box]]]]:
    """Name -> dtype, raw elements, and which writer has which box."""
    rng = np.random.default_rng(0)

    def elements(name: str, *shape: int) -> AnyArray:
        of = dtype(name)
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.frombuffer(rng.bytes(count * of.itemsize), np.uint8)
        return (raw & 1 if name == "bool" else raw).view(of.carrier).reshape(shape)

    def whole(writer: int, *shape: int) -> list[tuple[int, Box]]:
        return [(writer, Box.whole(shape))]

    quarters = [
        (0, Box((0, 0), (4, 8))),
        (1, Box((4, 0), (2, 5))),
        (1, Box((4, 5), (1, 3))),
        (0, Box((5, 5), (1, 3))),
    ]
    halves = [(0, Box((0, 0), (big_rows - 1, 500))), (1, Box((big_rows - 1, 0), (1, 500)))]
    return {
        "model.bias": ("bfloat16", elements("bfloat16", 7), whole(0, 7)),
        "model.big": ("float32", elements("float32", big_rows, 500), halves),
        "model.complex": ("complex128", elements("complex128", 3), whole(1, 3)),
        "model.empty": ("int8", elements("int8", 0, 3), []),
        "model.flags": ("bool", elements("bool", 9), whole(0, 9)),
        "model.scalar": ("float64", elements("float64"), whole(1)),
        "model.weight": ("float32", elements("float32", 6, 8), quarters),
    }


PLAIN = {"epoch": 3, "order": [1, (2, 3)], "payload": PAYLOAD}
"""Plain values beside the tensors of the one entry, `model`."""
ALIASES = {"model.tied": "model.weight"}


def write_whole(folder: Path, big_rows: int = 701) -> dict[str, AnyArray]:
    """Write the checkpoint to `folder`; returns its tensors, tied names included, as raw elements."""
    files, staging = Files(), Staging(2, 1 << 20)
    place = prepare_folder(files, str(folder))
    known = tensors(big_rows)
    chunks: list[list[Chunk]] = [[], []]
    for name, (of, array, boxes) in known.items():
        for writer, box in boxes:
            data = np.ascontiguousarray(array[box.slices()]).tobytes()
            chunks[writer].append(Chunk(name, dtype(of), array.shape, box, BytesSource(data)))
    own = {rank_blob(rank): json.dumps(PER_RANK).encode() for rank in range(2)}
    for writer, (name, data) in enumerate([*own.items(), (BLOB, PAYLOAD)]):
        box = Box.whole((len(data),))
        chunks[writer % 2].append(Chunk(name, dtype("uint8"), box.sizes, box, BytesSource(data)))
    parts = []
    for writer, some in enumerate(chunks):
        path = f"data/{writer:05d}-{ATTEMPT}.safetensors"
        written = write_data_file(files, str(folder), path, some, staging)
        parts.append(Part([written], [FileNames.of([chunk.name for chunk in some])]))
    described = {name: (of, array.shape, 0) for name, (of, array, _) in known.items()}
    for name, data in [*own.items(), (BLOB, PAYLOAD)]:
        described[name] = ("uint8", (len(data),), 0)
    contents = Contents(
        step=3,
        tensors=described,
        aliases=ALIASES,
        values={"model": _model(known)},
        entries={"model": {"kind": "stateful"}},
        layout={"world_size": 2, "meshes": [], "cuts": [{"mesh": None, "cut": ""}]},
        provenance={"writer": "tests"},
    )
    commit(files, place, ATTEMPT, contents, parts)
    return {name: array for name, (_, array, _) in known.items()} | {
        alias: known[name][1] for alias, name in ALIASES.items()
    }


def _model(names: Iterable[str]) -> dict[str, object]:
    """The value of the one entry: tensors by reference, and plain values beside them."""
    value: dict[str, object] = {name.removeprefix("model."): {"$tensor": name} for name in (*names, *ALIASES)}
    for key, plain in PLAIN.items():
        value[key] = encode(plain, f"model.{key}", blob=lambda _: BLOB)
    return value


def bitwise_equal(a: Mapping[str, AnyArray], b: Mapping[str, AnyArray]) -> bool:
    """Whether two sets of arrays have the same names, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes() for name in a
    )


def files_of(folder: Path) -> Sequence[Path]:
    """The files of a checkpoint, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
