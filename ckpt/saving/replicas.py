"""Whether ranks that hold the same part of a tensor hold the same elements.

Saving takes that for granted: it writes one of the replicas. A tensor that was cut by hand and not marked looks like a
replica, too; what is found here is most often that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from ckpt.collective import Collective, ProcessGroup
from ckpt.saving.sources import TensorSource
from ckpt.state import flatten
from ckpt.state.types import Piece
from ckpt_formats.digest import Hasher
from ckpt_formats.errors import ValuesDifferError
from ckpt_formats.json_text import to_json

__all__ = ["check_replicas"]

WINDOW = 8 << 20
"""Bytes that are copied at once, of tensors that are not plainly in memory."""
LISTED = 10
"""How many tensors an error names."""


def check_replicas(state: Mapping[str, object], *, process_group: ProcessGroup | None = None) -> int:
    """Raise if ranks that should hold the same do not, bit for bit; nothing is written and no tensor is sent.

    Collective like `save`, which writes one of the replicas without looking at the others. Worth calling once, after
    some steps, for a model that was cut by hand: what was forgotten to be marked is found. Costs a digest of what this
    rank has in common with others.

    Args:
        state: as for `save`.
        process_group: as for `save`.

    Returns the bytes that were compared on this rank.

    Raises:
        ValuesDifferError: on every rank, with the names of the tensors and the ranks that differ.
        StateError: the state can't be saved.
        RankError: another rank failed.
    """
    group = Collective(process_group)
    failure: Exception | None = None
    held: dict[str, Piece] = {}
    try:
        local = flatten(state)
        held = {f"{name} {piece.box}": piece for name, of in local.tensors.items() for piece in of.pieces}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks learn it
        failure = error
    common = set(json.loads(group.exchange(to_json(list(held)), failure, _in_common)))
    digests: dict[str, str] = {}
    try:
        digests = {key: _digest(piece) for key, piece in held.items() if key in common}
    except Exception as error:  # noqa: BLE001 - as above
        failure = error
    group.exchange(to_json(digests), failure, _compare)
    return sum(held[key].view.nbytes for key in digests)


def _in_common(payloads: list[bytes]) -> bytes:
    """What more than one rank holds."""
    seen: set[str] = set()
    common: set[str] = set()
    for payload in payloads:
        keys = set(json.loads(payload))
        common |= seen & keys
        seen |= keys
    return to_json(sorted(common))


def _compare(payloads: list[bytes]) -> bytes:
    first: dict[str, tuple[int, str]] = {}
    differing: dict[str, tuple[int, int]] = {}
    for rank, payload in enumerate(payloads):
        for key, digest in json.loads(payload).items():
            known = first.setdefault(key, (rank, digest))
            if known[1] != digest:
                differing.setdefault(key, (known[0], rank))
    if not differing:
        return b""
    listed = [f"{key} (ranks {one} and {other})" for key, (one, other) in list(differing.items())[:LISTED]]
    more = f" and {len(differing) - LISTED} more" if len(differing) > LISTED else ""
    name = next(iter(differing)).rpartition(" ")[0]
    raise ValuesDifferError(
        f"ranks that should hold the same do not: {', '.join(listed)}{more}. If each has its own part of a larger "
        "tensor, say which by ckpt.mark, ckpt.mark_layout or ckpt.Shard; if each has one of its own, give it another "
        "name on each rank; if they should be equal, broadcast them",
        tensor=name,
    )


def _digest(piece: Piece) -> str:
    hasher = Hasher()
    for data in _bytes(piece):
        hasher.update(data)
    return hasher.digest().hex()


def _bytes(piece: Piece) -> Iterator[memoryview]:
    source, nbytes = TensorSource(piece.view), piece.view.nbytes
    buffer = memoryview(bytearray(min(WINDOW, nbytes)))
    for start in range(0, nbytes, WINDOW):
        stop = min(start + WINDOW, nbytes)
        source.read(start, stop, buffer[: stop - start])
        yield buffer[: stop - start]
