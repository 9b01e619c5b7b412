"""What ranks find out about each other before a load touches anything: whether they have opened one checkpoint, and
which of its names none of them expects.

Knows no tensors. What it raises, it raises on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ckpt.collective import Collective
from ckpt_formats.checkpoint import Checkpoint
from ckpt_formats.errors import ConfigurationError, CorruptionError

__all__ = ["identity", "listed", "prefixes", "refuse_mixture", "unexpected_by_all"]

LISTED = 10
"""How many names an error lists before it says how many more there are."""
_DIGITS = 11


def identity(checkpoint: Checkpoint) -> int:
    """A number that copies of a checkpoint have in common, and others do not; of 44 bits, so that as many can be added
    as there are ranks.
    """
    return int(checkpoint.manifest.attempt[:_DIGITS], 16)


def refuse_mixture(group: Collective, checkpoint: Checkpoint) -> NoReturn:
    """Say which ranks have opened which checkpoint, since it is not one. Collective.

    Raises:
        CorruptionError: other checkpoints lie at the same path, on disks of the nodes' own.
        ConfigurationError: ranks were given other paths.
    """
    path = checkpoint.path
    step = "" if checkpoint.step is None else f"step {checkpoint.step}, "
    mine = f"{path} ({step}attempt {checkpoint.manifest.attempt})"

    def by_rank(payloads: list[bytes]) -> bytes:
        ranks: dict[str, list[int]] = {}
        paths = set()
        for rank, payload in enumerate(payloads):
            where, what = json.loads(payload)
            paths.add(where)
            ranks.setdefault(what, []).append(rank)
        found = [
            f"{what} on rank {first}" + (f" and {len(others)} more" if others else "")
            for what, (first, *others) in ranks.items()
        ]
        return json.dumps([len(paths), found]).encode()

    paths, found = json.loads(group.exchange(json.dumps([path, mine]).encode(), None, by_rank))
    if paths == 1:
        raise CorruptionError(
            f"{path} is not the same checkpoint on all nodes." + listed("There is", found) + " Remove what is out of "
            "date, or give every node a copy of one of them (`ckpt copy`)",
            path=path,
        )
    raise ConfigurationError(
        "ranks load different checkpoints, and parts of them would be mixed." + listed("There is", found) + " Let one "
        "rank choose the path and tell it to the others; on disks of their own, nodes need copies of one checkpoint "
        "(`ckpt copy`)",
        path=path,
    )


def unexpected_by_all(group: Collective, entries: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """The names that no rank expects which has the entry they belong to in its state. Collective.

    With pipeline stages each rank has only some of an entry's names, or only some of the entries.

    Args:
        entries: of this rank's state.
        unexpected: names in the checkpoint, below these, that this rank does not have.
    """

    def common(payloads: list[bytes]) -> bytes:
        alike: dict[tuple[str, ...], set[str]] = {}
        for payload in payloads:
            own, names = json.loads(payload)
            alike.setdefault(tuple(own), set(names)).intersection_update(names)
        told = [(frozenset(own), names) for own, names in alike.items()]
        return json.dumps(
            [
                name
                for name in sorted(set().union(*alike.values()))
                if all(name in names or own.isdisjoint(prefixes(name)) for own, names in told)
            ]
        ).encode()

    answer = group.exchange(json.dumps([sorted(entries), unexpected]).encode(), None, common)
    left: list[str] = json.loads(answer)
    return left


def prefixes(path: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`: the names that a value at this path may belong to; names may have dots in them."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def listed(what: str, names: Sequence[str]) -> str:
    """A sentence that lists names, not all of them if they are many; empty without any."""
    if not names:
        return ""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f" {what}: {', '.join(list(names)[:LISTED])}{more}."
