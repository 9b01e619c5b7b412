"""What stays the same from one save of a state to the next, so that it need not be worked out again.

Names, shapes and boxes hardly ever change while a model is trained. Each rank compares what it took with what it took
before; that they all found the same, ranks tell each other in a few bytes, in place of descriptions and plans. Knows no
processes beyond that, and no memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ckpt.saving.capture import Form
from ckpt.saving.save import Planned, Taken, view_of
from ckpt.saving.sources import BytesSource, TensorSource
from ckpt.storage.compressing import Readable
from ckpt_formats.digest import DIGEST_SIZE, digest

ORIGIN = 8
"""Bytes of an attempt's id."""
Signature = tuple[object, ...]
NEW = bytes(ORIGIN)
"""Stands for the origin of what is not known yet."""


class Greeting(NamedTuple):
    """What a rank tells all others when a save begins."""

    origin: bytes
    """Of what it would use again; NEW if there is nothing, or if something is wrong: then all plan anew."""
    attempt: bytes
    """An id for the attempt; rank 0's counts."""
    place: bytes
    """Digest of path and step."""
    values: bytes
    """Digest of the plain values."""

    @staticmethod
    def decode(data: bytes) -> Greeting:
        """The inverse of joining the members."""
        cuts = (0, ORIGIN, 2 * ORIGIN, 2 * ORIGIN + DIGEST_SIZE, 2 * ORIGIN + 2 * DIGEST_SIZE)
        return Greeting(*(data[low:high] for low, high in pairwise(cuts)))


class Recurring:
    """What was worked out for a state, good for every later one of the same form.

    Attributes:
        origin: the attempt that it was worked out in, the same on all ranks.
        form: where everything that this rank writes lies.
        contents: on rank 0, what the checkpoint said beside its chunks, as it is told to the agent.
    """

    def __init__(
        self, taken: Taken, planned: Planned, greetings: Sequence[Greeting], contents: dict[str, Any] | None
    ) -> None:
        self.origin = bytes.fromhex(planned.attempt)
        self.form = Form(planned.chunks)
        self.contents = contents
        self._signature = signature(taken)
        self._assignment = planned.assignment
        self._blobs = planned.blobs
        self._values = [greeting.values for greeting in greetings]

    def fits(self, known: Signature) -> bool:
        """Whether it is good for a state with this signature."""
        return self._signature == known

    def sources(self, taken: Taken) -> list[Readable]:
        """The bytes of the form's chunks, in a state that it is good for."""
        tensors = list(taken.local.tensors.values())
        sources: list[Readable] = [
            TensorSource(view_of(tensors[position].pieces[number], box)) for position, number, box in self._assignment
        ]
        sources += [BytesSource(taken.blobs[name]) for name in self._blobs]
        return sources

    def agreed(self, greetings: Sequence[Greeting], taken: Taken) -> bool:
        """Whether all ranks can use it for the save that they begin: the same plan, one path and step, and values that
        are equal, or are what they were on each rank the last time.
        """
        values = [greeting.values for greeting in greetings]
        first = greetings[0]
        if any(greeting.origin != self.origin or greeting.place != first.place for greeting in greetings):
            return False
        if all(value == first.values for value in values):
            self._values = values
            if self.contents is not None:
                self.contents["values"] = taken.values
            return True
        return values == self._values


def place_digest(path: str, step: int | None) -> bytes:
    """Of where a checkpoint is saved, and of which step it is."""
    return digest(f"{step} {path}".encode("utf-8", "surrogateescape"))


def values_digest(taken: Taken) -> bytes:
    """Of the plain values of a state."""
    return digest(json.dumps(taken.values, separators=(",", ":"), sort_keys=True).encode("ascii"))


def signature(taken: Taken) -> Signature:
    """Everything that a plan and the form of a rank's files depend on."""
    local = taken.local
    tensors = [
        (tensor.name, tensor.dtype, tensor.shape, tensor.cut, tensor.mesh, [piece.box for piece in tensor.pieces])
        for tensor in local.tensors.values()
    ]
    return tensors, local.aliases, local.entries, [(name, len(data)) for name, data in taken.blobs.items()]
