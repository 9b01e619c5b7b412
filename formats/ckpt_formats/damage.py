"""What verifying found: damage to single places, debris, and the report. Reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ckpt_formats.errors import CheckpointError, CorruptionError
from ckpt_formats.geometry import Box

__all__ = ["Damage", "Debris", "VerifyReport", "in_order", "reason", "unreadable"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One place where a checkpoint is not what was written."""

    file: str
    """Path of the file, relative to the checkpoint's folder."""
    what: str
    """What is wrong with these bytes, as the rest of a sentence that begins with them."""
    start: int | None = None
    """First byte in the file; None when it is about the file as a whole."""
    stop: int | None = None
    """The byte after the last one."""
    tensor: str | None = None
    """Name of the tensor whose bytes they are, if they are some tensor's."""
    box: Box | None = None
    """The chunk's box in that tensor."""


class Debris(NamedTuple):
    """A file in the checkpoint's folder that it does not list: left by an attempt that failed, or foreign."""

    path: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    path: str
    """The checkpoint's folder."""
    step: int | None
    """The training step it is of; None also when the manifest is damaged."""
    files: int
    """Files that the checkpoint lists, its manifest included."""
    tensors: int
    """Tensors whose chunks were checked to cover them, the format's own included."""
    chunks: int
    """Chunks that the readable part of the index lists."""
    bytes: int
    """Bytes that were read and checked."""
    seconds: float
    damage: Sequence[Damage]
    """Everything that is wrong, file by file, in order of position."""
    debris: Sequence[Debris]
    """Not damage: a reader ignores these files."""

    @property
    def intact(self) -> bool:
        return not self.damage


def in_order(found: Sequence[Damage], files: Sequence[str]) -> list[Damage]:
    """Damage by file, in the order of `files`, and position; neighbouring blocks of one chunk with the same complaint
    made one."""
    position = {path: number for number, path in enumerate(files)}
    ordered: list[Damage] = []
    for damage in sorted(found, key=lambda d: (position[d.file], -1 if d.start is None else d.start)):
        last = ordered[-1] if ordered else None
        if (
            last is not None
            and last.stop is not None
            and last.stop == damage.start
            and damage.tensor is not None
            and (last.file, last.what, last.tensor, last.box) == (damage.file, damage.what, damage.tensor, damage.box)
        ):
            ordered[-1] = replace(last, stop=damage.stop)
        else:
            ordered.append(damage)
    return ordered


def unreadable(error: CorruptionError) -> str:
    """Why bytes can't be read, as the rest of a sentence that begins with them."""
    cause = error.__cause__
    return f"can't be read ({cause.strerror})" if isinstance(cause, OSError) else "ends too early"


def reason(error: CheckpointError, name: str) -> str:
    """An error's message without the name of the file that a Damage has anyway."""
    return error.message.removeprefix(f"{name}: ")
