"""Per-rank values at another number of ranks: by a stated rule, never silently."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import ckpt
from ckpt_formats.checkpoint import Checkpoint
from tests.ranks import run_ranks


def _draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def _random(rank: int, world_size: int, folder: str) -> tuple[list[str], tuple[float, float, float]]:
    if world_size == 2:
        torch.manual_seed(rank)
        ckpt.save({"rng": ckpt.RNG()}, f"{folder}/a")
        return [], _draws()
    drawn = []
    for noise in (5, 6):
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        result = ckpt.load({"rng": ckpt.RNG()}, f"{folder}/a")
        drawn.append(_draws())
    assert drawn[0] == drawn[1]
    assert not result.per_rank_skipped
    return list(result.per_rank_derived), drawn[0]


def test_random_generators_of_other_ranks_are_seeded_from_what_was_saved(tmp_path: Path) -> None:
    before = run_ranks(_random, 2, str(tmp_path))
    after = run_ranks(_random, 3, str(tmp_path))
    assert all(derived == ["rng"] for derived, _ in after)
    assert len({draws for _, draws in before + after}) == 5


def _resized(rank: int, world_size: int, folder: str) -> tuple[list[str], Any]:
    def share(counts: Sequence[int], rank: int, world_size: int) -> int:
        return sum(counts) // world_size

    seen = ckpt.PerRank(30 * (rank + 1) if world_size == 2 else 0, resize=share)
    if world_size == 2:
        ckpt.save({"seen": seen}, f"{folder}/a")
        return [], seen.value
    result = ckpt.load({"seen": seen}, f"{folder}/a")
    return list(result.per_rank_derived), seen.value


def test_a_value_with_a_rule_is_made_of_those_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(_resized, 2, str(tmp_path))
    assert run_ranks(_resized, 3, str(tmp_path)) == [(["seen"], 30)] * 3


def _several(rank: int, world_size: int, path: str) -> None:
    ckpt.save({f"p{number}": ckpt.PerRank(rank) for number in range(3)}, path)


def test_several_values_with_rules_read_what_each_rank_saved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(_several, 2, str(tmp_path / "a"))
    asked, read = [], Checkpoint.per_rank

    def count(self: Checkpoint, rank: int) -> dict[str, Any]:
        asked.append(rank)
        return read(self, rank)

    monkeypatch.setattr(Checkpoint, "per_rank", count)
    state = {f"p{number}": ckpt.PerRank(7, resize=lambda values, *_: sum(values)) for number in range(3)}
    ckpt.load(state, tmp_path / "a")  # type: ignore[arg-type]
    assert [own.value for own in state.values()] == [1, 1, 1]
    assert sorted(asked) == [0, 1]


class Sampler:
    """An object with a state of which a part is its rank's own, and says itself what becomes of that."""

    def __init__(self, seen: int, rule: bool) -> None:
        self.epoch, self.seen, self.order, self.rule = 0, seen, [seen], rule
        self.given: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        def share(counts: Sequence[int], rank: int, world_size: int) -> int:
            return sum(counts) // world_size

        own = {"seen": ckpt.PerRank(self.seen, resize=share if self.rule else None)}
        return {"epoch": self.epoch, "own": own, "orders": [ckpt.PerRank(self.order)], "rng": ckpt.RNG()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state
        self.epoch, self.seen, self.order = state["epoch"], state["own"]["seen"], state["orders"][0]


class Aware(torch.nn.Linear):
    """A module with an extra state of which a part is its rank's own."""

    def __init__(self, seen: int) -> None:
        super().__init__(2, 2)
        self.seen = seen

    def get_extra_state(self) -> Any:
        return {"seen": ckpt.PerRank(self.seen, resize=lambda counts, *_: max(counts))}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def _nested(rank: int, world_size: int, folder: str) -> Any:
    if world_size == 2:
        ruled, free = Sampler(30 * (rank + 1), rule=True), Sampler(rank, rule=False)
        ruled.epoch = free.epoch = 4
        ckpt.save({"ruled": ruled, "free": free, "model": Aware(10 + rank)}, f"{folder}/a")
        return None
    ruled, free, model = Sampler(0, rule=True), Sampler(7, rule=False), Aware(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ckpt.load({"ruled": ruled, "free": free, "model": model}, f"{folder}/a")
    assert (ruled.epoch, free.epoch) == (4, 4)
    assert set(free.given["rng"]) == set(ckpt.RNG().state_dict())
    told = [str(item.message) for item in caught if "no rule" in str(item.message)]
    values = (ruled.seen, ruled.order, free.seen, free.order, model.seen)
    return values, sorted(result.per_rank_derived), sorted(result.per_rank_skipped), told


def test_what_is_a_ranks_own_within_the_state_of_an_object_has_its_rule_there(tmp_path: Path) -> None:
    run_ranks(_nested, 2, str(tmp_path))
    for values, derived, skipped, told in run_ranks(_nested, 3, str(tmp_path)):
        assert values == (30, [0], 7, [7], 11)
        assert derived == ["free.rng", "model._extra_state.seen", "ruled.own.seen", "ruled.rng"]
        assert skipped == ["free.orders.0", "free.own.seen", "ruled.orders.0"]
        assert len(told) == 1
        assert all(path in told[0] for path in skipped)


def _loader(rank: int) -> StatefulDataLoader:
    generator = torch.Generator().manual_seed(rank)
    return StatefulDataLoader(list(range(100 * rank, 100 * rank + 12)), batch_size=3, shuffle=True, generator=generator)


def _batches(rank: int, world_size: int, folder: str) -> tuple[list[list[int]], list[list[int]]]:
    loader = _loader(rank)
    epoch = iter(loader)
    next(epoch)
    ckpt.save({"data": ckpt.PerRank(loader)}, f"{folder}/a")
    rest = [batch.tolist() for batch in epoch]
    other = _loader(rank)
    ckpt.load({"data": ckpt.PerRank(other)}, f"{folder}/a")
    return rest, [batch.tolist() for batch in other]


def test_a_stateful_data_loader_goes_on_where_each_rank_was(tmp_path: Path) -> None:
    for rank, (rest, resumed) in enumerate(run_ranks(_batches, 2, str(tmp_path))):
        assert len(rest) == 3
        assert resumed == rest
        assert all(number // 100 == rank for batch in rest for number in batch)


class Plain:
    """An object with the state of a loader, of which nothing says that it is one."""

    def __init__(self, loader: StatefulDataLoader) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def _part(rank: int, world_size: int) -> StatefulDataLoader:
    data = list(range(24))
    sampler = StatefulDistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=False)
    return StatefulDataLoader(data, batch_size=2, sampler=sampler)


def _rest(loader: StatefulDataLoader) -> list[int]:
    return [number for batch in loader for number in batch.tolist()]


def _unmarked(rank: int, world_size: int, folder: str) -> None:
    if world_size == 2:
        loader = _part(rank, world_size)
        epoch = iter(loader)
        for _ in range(2 + rank):  # not as far on all ranks
            next(epoch)
        ckpt.save({"data": loader, "more": {"sampler": loader.sampler}}, f"{folder}/a")
        rest = [number for batch in epoch for number in batch.tolist()]
        other, sampler = _part(rank, world_size), _part(rank, world_size).sampler
        ckpt.load({"data": other, "more": {"sampler": sampler}}, f"{folder}/a")
        assert _rest(other) == rest
        assert len(list(sampler)) == 12 - 2 * (2 + rank)
        # what calls itself by no such name is saved as equal on all ranks
        loader = _part(rank, world_size)
        next(iter(loader))
        ckpt.save({"data": Plain(loader)}, f"{folder}/b")
        other = _part(rank, world_size)
        ckpt.load({"data": other}, f"{folder}/b")
        assert len(_rest(other)) == 10
        return
    for name in ("a", "b"):
        loader = _part(rank, world_size)
        state = {"data": loader, "more": {"sampler": loader.sampler}} if name == "a" else {"data": loader}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = ckpt.load(state, f"{folder}/{name}")
        assert result.per_rank_skipped == (["data", "more.sampler"] if name == "a" else ["data"])
        (told,) = [str(item.message) for item in caught if "no rule" in str(item.message)]
        assert f"of 2 ranks, and there are {world_size} now" in told
        assert "data" in told
        assert _rest(loader) == list(range(rank, 24, world_size))


def test_a_loader_of_torchdata_is_its_ranks_own_without_a_word(tmp_path: Path) -> None:
    run_ranks(_unmarked, 2, str(tmp_path))
    run_ranks(_unmarked, 3, str(tmp_path))
    run_ranks(_unmarked, 1, str(tmp_path))
