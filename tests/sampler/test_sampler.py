"""What the sampler promises a training that stops and goes on: each sample once, whatever the ranks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import ckpt
from ckpt_formats.errors import ConfigurationError, StateError, ValuesDifferError
from tests.ranks import run_ranks

# --- a training over several ranks, without processes


class _Ranks:
    """All ranks of a training, whose loaders fetch `ahead` batches more than they were asked for."""

    def __init__(self, world_size: int, ahead: int, state: dict[str, Any] | None, **arguments: Any) -> None:
        self.samplers = [ckpt.Sampler(rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
        if state is not None:
            for sampler in self.samplers:
                sampler.load_state_dict(state)
        self._ahead = ahead
        self._loaders: list[Iterator[list[int]]] = []

    def batch(self) -> tuple[int, list[int]]:
        """Train on the next batch of each rank: its epoch, and the global batch."""
        (epoch,) = {sampler.epoch for sampler in self.samplers}
        shares = [next(loader, None) for loader in self._loaders]
        if None in shares or not shares:  # the epoch has ended, or none has begun
            assert not any(shares)
            self._loaders = [_fetching_ahead(sampler, self._ahead) for sampler in self.samplers]
            shares = [next(loader) for loader in self._loaders]
        batch = [index for share in shares for index in share or []]
        for sampler in self.samplers:
            sampler.step()
        return epoch, batch

    def state(self) -> dict[str, Any]:
        states = [sampler.state_dict() for sampler in self.samplers]
        assert all(state == states[0] for state in states)
        return states[0]


def _fetching_ahead(sampler: ckpt.Sampler, ahead: int) -> Iterator[list[int]]:
    batches = iter(sampler)
    fetched = deque(islice(batches, ahead))
    for batch in batches:
        fetched.append(batch)
        yield fetched.popleft()
    yield from fetched


@dataclass(frozen=True)
class _Segment:
    """What a training does between two starts."""

    world_size: int
    ahead: int
    saved_after: int
    """Batches; then it saves."""
    lost: int
    """Batches after the save, when it crashes."""


_SEGMENTS = st.lists(
    st.builds(
        _Segment,
        world_size=st.integers(1, 5),
        ahead=st.integers(0, 6),
        saved_after=st.integers(0, 7),
        lost=st.integers(0, 5),
    ),
    min_size=1,
    max_size=8,
)
_ARGUMENTS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(5, 12),
        "seed": st.integers(0, 2**32),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
    }
)


def _train(segments: Sequence[_Segment], batch_sizes: Sequence[int], **arguments: Any) -> list[tuple[int, list[int]]]:
    """Train, save and crash; what was trained on and not lost, as (epoch, global batch)."""
    kept: list[tuple[int, list[int]]] = []
    state = None
    for segment, batch_size in zip(segments, batch_sizes, strict=True):
        ranks = _Ranks(segment.world_size, segment.ahead, state, **arguments | {"batch_size": batch_size})
        kept += [ranks.batch() for _ in range(segment.saved_after)]
        state = ranks.state()
        for _ in range(segment.lost):
            ranks.batch()
    return kept


@given(segments=_SEGMENTS, length=st.integers(12, 60), arguments=_ARGUMENTS)
def test_crashes_and_other_world_sizes_leave_the_order_of_one_undisturbed_rank(
    segments: list[_Segment], length: int, arguments: dict[str, Any]
) -> None:
    trained = _train(segments, [arguments["batch_size"]] * len(segments), dataset=length, **arguments)
    alone = _Ranks(1, 0, None, dataset=length, **arguments)
    assert trained == [alone.batch() for _ in trained]


@given(
    segments=_SEGMENTS, length=st.integers(12, 60), arguments=_ARGUMENTS, sizes=st.lists(st.integers(5, 12), min_size=8)
)
def test_every_sample_of_an_epoch_is_consumed_exactly_once_even_if_the_batch_size_changes(
    segments: list[_Segment], length: int, arguments: dict[str, Any], sizes: list[int]
) -> None:
    trained = _train(segments, sizes[: len(segments)], dataset=length, **arguments)
    epochs = {epoch for epoch, _ in trained}
    assert epochs == set(range(len(epochs)))
    for epoch in epochs:
        samples = Counter(index for one, batch in trained if one == epoch for index in batch)
        assert set(samples.values()) == {1}
        assert set(samples) <= set(range(length))
        if epoch + 1 in epochs:
            left_out = length - len(samples)
            assert left_out < max(sizes) if arguments["drop_last"] else left_out == 0


@given(length=st.integers(1, 60), batch_size=st.integers(1, 12), world_size=st.integers(1, 12))
def test_shares_differ_by_one_sample_at_most_and_lie_in_the_order_of_the_ranks(
    length: int, batch_size: int, world_size: int
) -> None:
    world_size = min(world_size, batch_size)
    by_rank = [
        list(
            ckpt.Sampler(
                length, batch_size=batch_size, drop_last=False, shuffle=False, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    batches = list(zip(*by_rank, strict=True))  # every rank has as many batches as every other
    assert len(batches) == -(-length // batch_size)
    for shares in batches:
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    assert [index for shares in batches for share in shares for index in share] == list(range(length))


# --- one rank


def test_nothing_is_consumed_until_it_is_said() -> None:
    sampler = ckpt.Sampler(20, batch_size=4)
    before = sampler.state_dict()
    batches = list(sampler)
    assert list(sampler) == batches
    assert sampler.state_dict() == before
    sampler.step()
    assert list(sampler) == batches[1:]


def test_the_epoch_ends_with_its_last_batch() -> None:
    sampler = ckpt.Sampler(10, batch_size=4, drop_last=False)
    assert len(sampler) == 3
    positions = []
    for _ in range(4):
        sampler.step()
        positions.append((sampler.epoch, sampler.consumed))
    assert positions == [(0, 4), (0, 8), (1, 0), (1, 4)]
    assert len(sampler) == 3


def test_drop_last_leaves_out_the_samples_that_make_no_batch() -> None:
    sampler = ckpt.Sampler(10, batch_size=4, shuffle=False)
    assert len(sampler) == 2
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    sampler.step()
    sampler.step()
    assert (sampler.epoch, sampler.consumed) == (1, 0)


def test_a_larger_batch_that_what_is_left_does_not_fill_begins_the_next_epoch() -> None:
    small = ckpt.Sampler(10, batch_size=4)
    small.step()
    large = ckpt.Sampler(10, batch_size=8)
    large.load_state_dict(small.state_dict())
    assert (large.epoch, large.consumed) == (1, 0)
    assert len(list(large)) == 1


def test_a_loop_that_is_handed_a_batch_has_consumed_it() -> None:
    sampler = ckpt.Sampler(10, batch_size=2, shuffle=False)
    loop = sampler.consume(sampler)
    assert sampler.consumed == 0
    assert next(loop) == [0, 1]
    assert sampler.consumed == 2
    resumed = ckpt.Sampler(10, batch_size=2, shuffle=False)
    resumed.load_state_dict(sampler.state_dict())
    assert next(resumed.consume(resumed)) == next(loop) == [2, 3]


@pytest.mark.parametrize("counted_by", ["step", "consume"])
def test_a_loop_does_not_go_on_over_a_state_loaded_meanwhile(counted_by: str) -> None:
    sampler = ckpt.Sampler(10, batch_size=2)
    state = sampler.state_dict()
    loop = sampler.consume(list(sampler)) if counted_by == "consume" else iter(sampler)
    next(loop)
    sampler.load_state_dict(state)
    with pytest.raises(StateError, match="load first, then begin the loop"):
        next(loop)
    assert sampler.state_dict() == state
    assert len(list(sampler.consume(sampler))) == 5


@pytest.mark.parametrize(
    ("other", "both"),
    [
        (ckpt.Sampler(11, batch_size=2, seed=3), ["number of samples 10", "has 11"]),
        (ckpt.Sampler(10, batch_size=2, seed=4), ["seed 3", "has 4"]),
        (ckpt.Sampler(10, batch_size=2, seed=3, shuffle=False), ["'feistel-12'", "'sequential'"]),
    ],
)
def test_a_state_of_another_order_is_refused_with_both_named(other: ckpt.Sampler, both: list[str]) -> None:
    sampler = ckpt.Sampler(range(10), batch_size=2, seed=3)
    sampler.step()
    before = other.state_dict()
    with pytest.raises(StateError) as raised:
        other.load_state_dict(sampler.state_dict())
    assert all(words in str(raised.value) for words in both)
    assert other.state_dict() == before


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": True},
        {"consumed": 2.0},
        {"consumed": 11},
        {"consumed": None},
        {"length": "10"},
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any]) -> None:
    sampler = ckpt.Sampler(10, batch_size=2)
    with pytest.raises(StateError, match=r"no state of a ckpt\.Sampler"):
        sampler.load_state_dict(sampler.state_dict() | change)
    for name in set(sampler.state_dict()) - {"batch_size"}:
        partial = sampler.state_dict()
        del partial[name]
        with pytest.raises(StateError, match=r"no state of a ckpt\.Sampler"):
            sampler.load_state_dict(partial)
    assert (sampler.epoch, sampler.consumed) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": 0, "batch_size": 4}, "a dataset that has samples"),
        ({"dataset": [], "batch_size": 4, "drop_last": False}, "a dataset that has samples"),
        ({"dataset": 3, "batch_size": 4}, "smaller batch_size, or drop_last=False"),
        ({"dataset": -1, "batch_size": 4, "drop_last": False}, "a dataset that has samples"),
        ({"dataset": 9, "batch_size": 0}, "batch of 0 samples"),
        ({"dataset": 9, "batch_size": 3, "rank": 0, "world_size": 4}, "none for some of the 4 ranks"),
        ({"dataset": 9, "batch_size": 3, "rank": 0}, "give both, or neither"),
        ({"dataset": 9, "batch_size": 3, "rank": 2, "world_size": 2}, "rank 2 of world size 2"),
    ],
)
def test_a_sampler_that_would_have_no_batch_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(StateError, match=words):
        ckpt.Sampler(**arguments)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_any_kind_make_the_sampler_that_plain_ones_make(kind: Any, tmp_path: Path) -> None:
    plain = ckpt.Sampler(100, batch_size=8, seed=3, rank=1, world_size=2)
    sampler = ckpt.Sampler(kind(100), batch_size=kind(8), seed=kind(3), rank=kind(1), world_size=kind(2))
    assert list(sampler) == list(plain)
    sampler.step()
    ckpt.save({"sampler": sampler}, tmp_path / "checkpoint")
    ckpt.load({"sampler": plain}, tmp_path / "checkpoint")
    assert plain.consumed == 8
    assert {type(value) for value in sampler.state_dict().values()} == {int, str}


def test_a_state_that_was_saved_with_numpy_s_integers_is_loaded(tmp_path: Path) -> None:
    sampler = ckpt.Sampler(100, batch_size=8)
    numbers = {"epoch": np.int64(2), "consumed": np.int64(16), "length": np.int64(100), "seed": np.int64(0)}
    ckpt.save({"sampler": sampler.state_dict() | numbers}, tmp_path / "checkpoint")
    ckpt.load({"sampler": sampler}, tmp_path / "checkpoint")
    assert (sampler.epoch, sampler.consumed) == (2, 16)
    assert type(sampler.consumed) is int


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": 10.0}, "dataset=10.0: give something that has a length"),
        ({"dataset": iter([])}, "something that has a length"),
        ({"batch_size": 64 / 8}, "batch_size=8.0: give an integer"),
        ({"batch_size": None}, "batch_size=None"),
        ({"seed": None}, "seed=None"),
        ({"rank": "0", "world_size": 1}, "rank='0'"),
    ],
)
def test_what_is_no_integer_where_one_is_needed_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ckpt.Sampler(**{"dataset": 10, "batch_size": 8} | change)


# --- a real loader


class _Recorded:
    """What a loader draws from a sampler, noted."""

    def __init__(self, sampler: ckpt.Sampler) -> None:
        self._sampler = sampler
        self.drawn = 0

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._sampler:
            self.drawn += 1
            yield batch


def _loader(sampler: Any) -> DataLoader[torch.Tensor]:
    return DataLoader(
        range(64),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=2,
        prefetch_factor=3,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )


def test_what_loader_workers_fetched_ahead_is_not_consumed() -> None:
    sampler = ckpt.Sampler(64, batch_size=4, seed=2)
    recorded = _Recorded(sampler)
    loader = _loader(recorded)
    trained: list[int] = []
    for count, batch in enumerate(loader, 1):
        trained += batch.tolist()
        sampler.step()
        assert sampler.consumed == 4 * count
        assert recorded.drawn >= min(count + 6, 16)
        if count == 5:
            break
    state = sampler.state_dict()
    # the same loop goes on: the persistent workers still hold what they fetched ahead, and it is not given twice
    for batch in sampler.consume(loader):
        trained += batch.tolist()
    assert sorted(trained) == list(range(64))
    assert (sampler.epoch, sampler.consumed) == (1, 0)
    # a crash after the fifth batch, and another process that goes on from there
    resumed = ckpt.Sampler(64, batch_size=4, seed=2)
    resumed.load_state_dict(state)
    assert [index for batch in resumed for index in batch] == trained[20:]


# --- real ranks, real checkpoints

_LENGTH = 100


def _go_on(rank: int, world_size: int, batches: int, resume: str | None, save: str) -> list[list[int]]:
    sampler = ckpt.Sampler(_LENGTH, batch_size=7, seed=1, drop_last=False)
    assert (sampler.rank, sampler.world_size) == (rank, world_size)
    state = {"weight": torch.full((2,), 1.0), "sampler": sampler}
    if resume is not None:
        ckpt.load(state, resume)
    shares = list(islice(sampler.consume(sampler), batches))
    ckpt.save(state, save)
    return shares


def test_two_ranks_then_one_then_three_consume_an_epoch_exactly_once(tmp_path: Path) -> None:
    trained: list[int] = []
    resume = None
    for world_size, batches in ((2, 4), (1, 5), (3, 6)):
        save = str(tmp_path / f"by_{world_size}")
        by_rank = run_ranks(_go_on, world_size, batches, resume, save)
        trained += [index for shares in zip(*by_rank, strict=True) for share in shares for index in share]
        resume = save
    alone = ckpt.Sampler(_LENGTH, batch_size=7, seed=1, drop_last=False)
    assert trained == [index for batch in alone for index in batch]
    assert len(trained) == len(set(trained)) == _LENGTH


def _miscount(rank: int, world_size: int, path: str) -> None:
    sampler = ckpt.Sampler(_LENGTH, batch_size=8)
    if rank == 1:
        sampler.step()
    with pytest.raises(ValuesDifferError, match="sampler"):
        ckpt.save({"sampler": sampler}, path)


def test_ranks_that_counted_differently_are_found_when_they_save(tmp_path: Path) -> None:
    run_ranks(_miscount, 2, str(tmp_path / "a"))
