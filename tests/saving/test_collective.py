"""What ranks promise each other when they act together: the same answer everywhere, and nobody waits for the dead."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from ckpt.collective import Collective
from ckpt_formats.errors import RankError
from tests.ranks import run_ranks

WAITS = ("gather", "share", "tally", "scatter", "broadcast", "piece_together")


def left_alone(rank: int, world_size: int, what: str) -> tuple[str, float]:
    """Rank 0 knows that a rank is dead, and takes part in nothing; the others wait for it."""
    group = Collective()
    dist.barrier()
    if rank == 0:
        group.give_up(RankError("rank 7 died", rank=7))
    begin = time.monotonic()
    told = ""
    if rank:
        waits = {
            "gather": lambda: group.gather(b"x"),
            "share": lambda: group.share(b"x"),
            "tally": lambda: group.tally(None, 1),
            "scatter": lambda: group.scatter(None),
            "broadcast": lambda: group.broadcast(None),
            "piece_together": lambda: group.piece_together(b"x", rank, world_size),
        }
        try:
            waits[what]()
        except RankError as error:
            told = f"{error.rank}: {error.message}"
    seconds = time.monotonic() - begin
    # no collective works any more
    store = dist.distributed_c10d._get_default_store()
    store.set(f"told-{rank}", "")
    store.wait([f"told-{other}" for other in range(world_size)])
    return told, seconds


@pytest.mark.parametrize("what", WAITS)
def test_who_waits_for_a_rank_that_has_given_up_hears_why_within_seconds(what: str) -> None:
    first, *others = run_ranks(left_alone, 3, what)
    assert first[0] == ""
    for told, seconds in others:
        assert told == "7: rank 7 died"
        assert seconds < 10


def everything(rank: int, world_size: int) -> list[object]:
    group = Collective()
    mine = bytes([rank]) * (rank * 5000)
    return [
        group.gather(mine),
        group.share(bytes([rank, 9])),
        group.tally(None, rank, 1),
        group.scatter([bytes([k]) * k * 5000 for k in range(world_size)] if rank == 0 else None),
        group.broadcast(b"a" * 100 if rank == 0 else None),
        group.broadcast(b"b" * 10_000 if rank == 0 else None),
        group.piece_together(mine, sum(k * 5000 for k in range(rank)), sum(k * 5000 for k in range(world_size))),
    ]


@pytest.mark.parametrize("world_size", [1, 3])
def test_everybody_gets_what_was_asked_for(world_size: int) -> None:
    payloads = [bytes([k]) * k * 5000 for k in range(world_size)]
    for rank, got in enumerate(run_ranks(everything, world_size)):
        assert got == [
            payloads if rank == 0 else None,
            [bytes([k, 9]) for k in range(world_size)],
            [sum(range(world_size)), world_size],
            payloads[rank],
            b"a" * 100,
            b"b" * 10_000,
            b"".join(payloads),
        ]
