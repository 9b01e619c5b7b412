"""Checkpoints of one writer, in one data file, with a codec or without, from arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckpt.saving.commit import Contents, FileNames, Part, commit
from ckpt.saving.sources import BytesSource
from ckpt.storage.data_file import Chunk, Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import prepare_folder
from ckpt_formats.arrays import AnyArray
from ckpt_formats.dtypes import dtype
from ckpt_formats.geometry import Box

ATTEMPT = "00112233445566bb"
DATA = f"data/00000-{ATTEMPT}.safetensors"


def trained(name: str, *shape: int, seed: int = 0) -> AnyArray:
    """Elements of a dtype as training leaves them, roughly: normally distributed. As the dtype's carrier."""
    of = dtype(name)
    rng = np.random.default_rng(seed)
    if of.numpy is None or (not np.issubdtype(of.numpy, np.number) and of.numpy.kind != "V"):
        count = int(np.prod(shape, dtype=np.int64)) * of.itemsize
        return np.frombuffer(rng.bytes(count), np.uint8).view(of.carrier).reshape(shape)
    values = rng.standard_normal(shape) * (0.02 if of.numpy.kind not in "iu" else 50)
    with np.errstate(invalid="ignore"):
        return values.astype(of.numpy).view(of.carrier)


def write(
    folder: Path,
    tensors: Mapping[str, tuple[str, AnyArray]],
    *,
    cut: Mapping[str, list[Box]] | None = None,
    compress: bool = True,
) -> Path:
    """Write tensors, name -> (dtype, elements), to `folder`; in one chunk each if `cut` has no boxes for them."""
    files = Files()
    place = prepare_folder(files, str(folder))
    chunks = []
    for name, (of, array) in tensors.items():
        for box in (cut or {}).get(name, [Box.whole(array.shape)]):
            data = np.ascontiguousarray(array[box.slices()]).tobytes()
            chunks.append(Chunk(name, dtype(of), array.shape, box, BytesSource(data)))
    written = write_data_file(files, str(folder), DATA, chunks, Staging(2, 1 << 20), compress=compress)
    contents = Contents(
        step=3,
        tensors={name: (of, array.shape, None) for name, (of, array) in tensors.items()},
        aliases={},
        values={},
        entries={},
        layout={"world_size": 1, "meshes": [], "cuts": []},
        provenance={"writer": "tests"},
    )
    commit(files, place, ATTEMPT, contents, [Part([written], [FileNames.of([chunk.name for chunk in chunks])])])
    return folder
