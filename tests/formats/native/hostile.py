"""What every hostile checkpoint is put through: opened, read in full, loaded, verified."""

from __future__ import annotations

from pathlib import Path

import pytest
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointError

from tests.formats.native.bounds import bounded
from tests.formats.native.tampering import Tampered


def read_all(folder: Path) -> dict[str, AnyArray]:
    """Everything that a checkpoint holds, read as a stranger would."""
    with open_checkpoint(folder) as checkpoint:
        for path, encoded in checkpoint.manifest.values.items():
            checkpoint.decode(encoded, path)
        for rank in range(min(checkpoint.manifest.world_size, 4)):
            for path, encoded in checkpoint.per_rank(rank).items():
                checkpoint.decode(encoded, path)
        return {name: checkpoint[name][...] for name in checkpoint.tensors}


def refused_everywhere(tampered: Tampered | None, folder: Path, error: type[CheckpointError], match: str) -> None:
    """Write a tampered checkpoint to `folder` (or take what is there); opening and reading it must end in `error`."""
    if tampered is not None:
        tampered.write(folder)
    with bounded(folder), pytest.raises(error, match=match) as caught:
        read_all(folder)
    _is_clear(caught.value, folder)


def _is_clear(error: CheckpointError, folder: Path) -> None:
    text = str(error)
    assert str(folder) in text, "names the checkpoint"
    assert len(text) < 1500, "can be read"
    assert text.isprintable(), "is safe to print"
