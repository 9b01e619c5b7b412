"""What every hostile checkpoint is put through: opened and read in full, loaded into a live state, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckpt
from ckpt.state.torch_dtypes import as_carrier
from ckpt_formats.arrays import AnyArray
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointError
from ckpt_formats.verify import verify
from tests.formats.native.bounds import bounded
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import ALIASES, tensors


class Bag:
    """A stateful object that takes whatever a checkpoint has for it: all of it is made as the checkpoint claims."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.held

    def load_state_dict(self, held: dict[str, Any]) -> None:
        self.held = held


def read_all(folder: Path) -> dict[str, AnyArray]:
    """Everything that a checkpoint holds, read as a stranger would; returns its tensors as raw elements."""
    with open_checkpoint(folder) as checkpoint:
        _ = checkpoint.values
        for rank in range(min(checkpoint.manifest.world_size, 4)):
            for path, encoded in checkpoint.per_rank(rank).items():
                checkpoint.decode(encoded, path, lenient=True)
        return {name: checkpoint[name][...].view(checkpoint[name].dtype.carrier) for name in checkpoint.tensors}


def load_all(folder: Path) -> dict[str, AnyArray]:
    """The whole checkpoint, perhaps tampered with, loaded into a live state; returns its tensors as raw elements."""
    bag = Bag()
    ckpt.load({"model": bag}, folder, strict=False)
    names = {*tensors(), *ALIASES}
    return {name: as_carrier(bag.held[name.removeprefix("model.")]) for name in names}


def refused_everywhere(
    tampered: Tampered | None, folder: Path, error: type[CheckpointError], match: str, *, loads: bool = False
) -> None:
    """Write a tampered checkpoint to `folder` (or take what is there) and put it through everything.

    Reading all of it ends in `error`, loading it in a CheckpointError (unless it `loads`, because the lie is about what
    is not needed), and verifying it finds damage.
    """
    if tampered is not None:
        tampered.write(folder)
    with bounded(folder), pytest.raises(error, match=match) as caught:
        read_all(folder)
    _is_clear(caught.value, folder)
    with bounded(folder):
        try:
            load_all(folder)
            refused = False
        except CheckpointError as refusal:
            refused = True
            _is_clear(refusal, folder)
    assert loads or refused, "it can't be loaded"
    found_by_verify(folder)


def found_by_verify(folder: Path) -> None:
    """`ckpt verify` finds something wrong with a checkpoint, or says that it can't tell."""
    with bounded(folder):
        try:
            damage = verify(folder).damage
        except CheckpointError as refusal:
            _is_clear(refusal, folder)
            return
    assert damage
    for found in damage:
        assert found.file
        assert len(found.what) < 1500
        assert found.what.isprintable()


def _is_clear(error: CheckpointError, folder: Path) -> None:
    text = str(error)
    assert str(folder) in text, f"names the checkpoint: {text}"
    assert len(text) < 1500, "can be read"
    assert text.isprintable(), "is safe to print"
