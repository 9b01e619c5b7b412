"""Plain values, containers, stateful objects, per-rank values and random generators of a state."""

from __future__ import annotations

import random
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt.state import RNG, PerRank, PerRankRef, Shard, TensorRef, build_target, flatten
from ckpt_formats.errors import StateError
from tests.state.in_memory import load, same_bits, save, saved_state


class Sampler:
    """A stateful object; `tensors` differ in number from save to save."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_scalars_are_rebound_and_containers_are_filled_in_place() -> None:
    saved = save({"step": 7, "best": float("nan"), "log": {"loss": [1.0, 2.0], "by": {"a": (1, 2)}}, "seen": [1]})
    log: dict[str, Any] = {"loss": [], "gone": 1}
    by: dict[str, Any] = {}
    log["by"] = by
    seen: list[int] = []
    state = {"step": 0, "best": 0.0, "log": log, "seen": seen}
    target = load(state, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert state["step"] == 7
    assert state["best"] != state["best"]
    assert state["log"] is log
    assert log == {"loss": [1.0, 2.0], "by": {"a": (1, 2)}}
    assert log["by"] is by
    assert state["seen"] is seen
    assert seen == [1]


def test_what_is_loaded_shares_nothing_with_the_checkpoint() -> None:
    known = saved_state(save({"log": [[1], {"a": [2]}], "sampler": Sampler(order=[1, 2])}))
    state = {"log": [], "sampler": Sampler()}
    build_target(state, known).apply(known.values, {})
    state["log"][0].append(9)
    state["log"][1]["a"].append(9)
    state["sampler"].state["order"].append(9)
    assert known.values == {"log": [[1], {"a": [2]}], "sampler": {"order": [1, 2]}}


def test_tensors_in_containers_keep_their_memory_if_they_fit_and_are_made_if_not() -> None:
    torch.manual_seed(0)
    saved = save({"a": {"x": torch.rand(3), "y": torch.rand(2), "z": [torch.rand(1), {"w": torch.rand(4)}]}})
    x, w = torch.zeros(3), torch.zeros(4)
    state: dict[str, Any] = {"a": {"x": x, "y": torch.zeros(5), "z": [torch.zeros(2), {"w": w}]}}
    target = load(state, saved)
    assert (target.missing, target.unexpected) == ([], [])
    a = state["a"]
    assert a["x"] is x
    assert a["z"][1]["w"] is w
    for name, tensor in (("a.x", x), ("a.y", a["y"]), ("a.z.0", a["z"][0]), ("a.z.1.w", w)):
        assert same_bits(tensor, saved.whole(name)), name


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.ones(2), "b": {"c": torch.zeros(1), "d": 3}},
        {"layer.weight": torch.ones(2), "layer.bias": torch.zeros(1), "version": 3},
        {"dotted.key": {"inner": torch.ones(2)}, "x": 1},
        {1: torch.ones(2), (2, "x"): [torch.zeros(1)]},
        OrderedDict(a=torch.ones(2), b=torch.zeros(1)),
        {"a": {"b.c": torch.ones(2), "b": 5}},
        [torch.ones(2), (torch.zeros(1), None)],
    ],
    ids=str,
)
def test_an_empty_container_is_filled_with_what_was_saved(value: Any) -> None:
    saved = save({"cache": value})
    state: dict[str, Any] = {"cache": [] if isinstance(value, list) else {}}
    cache = state["cache"]
    target = load(state, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert state["cache"] is cache
    assert plain(cache) == plain(value)


def test_a_state_dict_in_the_state_is_spread_so_that_stages_can_have_their_own() -> None:
    local = flatten({"model": {"0.weight": torch.ones(2), "version": 1}})
    assert list(local.tensors) == ["model.0.weight"]
    assert local.values == {"model.version": 1}
    assert local.entries == {"model": {"kind": "value", "flat": {"model": True}}}


keys = st.text(st.sampled_from("ab."), min_size=1, max_size=3)
trees = st.recursive(
    st.sampled_from([1, None, "x", torch.float32]) | st.builds(lambda: torch.ones(2)),
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(keys, trees, max_size=3))
def test_any_container_comes_back_whole_unless_its_names_collide(value: dict[str, Any]) -> None:
    try:
        saved = save({"x": value})
    except StateError as error:
        assert "same name" in str(error)  # noqa: PT017
        return
    state: dict[str, Any] = {"x": {}}
    target = load(state, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert plain(state["x"]) == plain(value)


def test_stateful_objects_get_what_they_gave() -> None:
    torch.manual_seed(0)
    shadow = {"layer.weight": torch.rand(2), "n": torch.tensor(3)}
    saved = save({"ema": Sampler(shadow=shadow, decay=0.9, order=[(1, 2)], none=None)})
    assert set(saved.tensors) == {"ema.shadow.layer.weight", "ema.shadow.n"}
    fresh = Sampler(shadow={}, decay=0.5)  # it has no shadow before its first update
    target = load({"ema": fresh}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert same_bits(fresh.state["shadow"]["layer.weight"], shadow["layer.weight"])
    assert {**fresh.state, "shadow": None} == {"shadow": None, "decay": 0.9, "order": [(1, 2)], "none": None}


def test_modules_and_optimizers_in_lists_are_entries_of_their_own() -> None:
    def build() -> dict[str, Any]:
        parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]
        return {"parts": parts, "train": {"optimizers": optimizers, "step": 3}}

    state = build()
    for part, optimizer in zip(state["parts"], state["train"]["optimizers"], strict=True):
        part(torch.rand(1, 2)).sum().backward()
        optimizer.step()
    saved = save(state)
    assert saved.entries["train.optimizers.1"] == {"kind": "optimizer", "modules": {"": "parts.1"}}
    assert "train.optimizers.1.state.weight.momentum_buffer" in saved.tensors
    other = build()
    other["train"]["step"] = 0
    target = load(other, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert other["train"]["step"] == 3
    assert same_bits(other["parts"][1].weight, state["parts"][1].weight)
    assert len(other["train"]["optimizers"][1].state) == 2


def test_what_can_not_be_replaced_is_refused_before_anything_is_loaded() -> None:
    saved = save({"x": (torch.nn.Linear(1, 1), 3, [4])})
    list_in_tuple: list[int] = []
    with pytest.raises(StateError, match=r"'x\.1' can't be replaced in a tuple"):
        build_target({"x": (torch.nn.Linear(1, 1), 0, list_in_tuple)}, saved_state(saved))
    with pytest.raises(StateError, match=r"'step' can't be replaced in a mappingproxy"):
        build_target(MappingProxyType({"step": 0}), saved_state(save({"step": 3})))
    part = save({"x": (torch.nn.Linear(1, 1), [4])})
    load({"x": (torch.nn.Linear(1, 1), list_in_tuple)}, part)
    assert list_in_tuple == [4]


def test_per_rank_values_are_kept_apart_and_come_back_as_such() -> None:
    state = {"a": PerRank(1), "b": {"c": PerRank([2]), "t": torch.ones(1)}, "s": Sampler(at=PerRank(3), n=4)}
    local = flatten(state)
    assert local.per_rank == {"a": 1, "b.c": [2], "s.at": 3}
    assert local.values == {
        "a": PerRankRef("a"),
        "b.c": PerRankRef("b.c"),
        "s": {"at": PerRankRef("s.at"), "n": 4},
    }
    saved = save(state)
    own = PerRank(0)
    other = {"a": own, "b": {"c": PerRank(None), "t": torch.zeros(1)}, "s": Sampler()}
    target = load(other, saved)
    assert target.per_rank_skipped == []
    assert other["a"] is own
    assert own.value == 1
    assert other["b"]["c"].value == [2]
    assert other["s"].state == {"at": 3, "n": 4}


def test_per_rank_values_stay_and_are_told_when_none_was_saved_for_this_rank() -> None:
    saved = save({"a": PerRank(1), "s": Sampler(at=PerRank(3), n=4, new=PerRank(5)), "rng": RNG()})
    before = torch.get_rng_state()
    other = {"a": PerRank(0), "s": Sampler(at=9, n=0), "rng": RNG()}
    target = load(other, saved, same_world=False)
    assert sorted(target.per_rank_skipped) == ["a", "rng", "s.at", "s.new"]
    assert other["a"].value == 0
    assert other["s"].state == {"at": 9, "n": 4}
    assert same_bits(torch.get_rng_state(), before)


def draw() -> list[float]:
    old_numpy = [float(np.random.rand()), float(np.random.randn())]  # noqa: NPY002
    return [random.random(), random.gauss(0, 1), *old_numpy, torch.rand(1).item()]


def test_random_numbers_go_on_where_they_stopped() -> None:
    draw()
    saved = save({"rng": RNG()})
    expected = draw()
    draw()
    load({"rng": RNG()}, saved)
    assert draw() == expected


def test_random_generators_are_restored_after_all_that_may_draw() -> None:
    class Drawing(Sampler):
        def load_state_dict(self, _state_dict: dict[str, Any]) -> None:
            draw()

    saved = save({"rng": RNG(), "sampler": Drawing()})
    expected = draw()
    load({"rng": RNG(), "sampler": Drawing()}, saved)
    assert draw() == expected


def test_generators_keep_their_identity() -> None:
    generator = torch.Generator().manual_seed(3)
    saved = save({"generator": generator})
    expected = torch.rand(2, generator=generator)
    mine = torch.Generator()
    load({"generator": mine}, saved)
    assert same_bits(torch.rand(2, generator=mine), expected)


def test_shards_are_boxes_of_their_whole() -> None:
    local = flatten({"w": Shard(torch.ones(2, 3), (4, 6), (2, 0)), "empty": Shard(torch.ones(0, 3), (4, 3), (4, 0))})
    assert local.tensors["w"].shape == (4, 6)
    assert str(local.tensors["w"].pieces[0].box) == "[2:4,0:3]"
    assert local.tensors["empty"].pieces == []


def test_shards_in_lists_are_filled_and_stay_what_they_are() -> None:
    saved = save({"w": [Shard(torch.ones(2, 3), (4, 3), (2, 0)), {1: Shard.flat(torch.ones(2), (4,), 0)}]})
    block, interval = torch.zeros(2, 3), torch.zeros(2)
    state = {"w": [Shard(block, (4, 3), (2, 0)), {1: Shard.flat(interval, (4,), 0)}]}
    target = load(state, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert block.eq(1).all()
    assert interval.eq(1).all()
    assert flatten(state).tensors["w.0"].shape == (4, 3)
    assert flatten(state).tensors["w.1.1"].shape == (4,)


def test_an_optimizer_of_shards_has_slots_that_are_cut_alike() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"w": Shard(parameter, (4, 3), (2, 0)), "optimizer": optimizer}
    local = flatten(state)
    assert str(local.tensors["optimizer.state.w.exp_avg"].pieces[0].box) == "[2:4,0:3]"
    assert local.tensors["optimizer.state.w.exp_avg"].shape == (4, 3)
    assert local.tensors["optimizer.state.w.step"].shape == ()
    assert local.entries["optimizer"]["modules"] == {"w": "w"}
    assert "local" not in local.entries["optimizer"]  # that is for plain slots of DTensors
    fresh = torch.nn.Parameter(torch.zeros(4, 3))
    other = {"w": fresh, "optimizer": torch.optim.AdamW([fresh])}
    saved = save(state)
    upper = save({"w": Shard(torch.ones(2, 3), (4, 3), (0, 0))})
    saved.pieces["w"] |= upper.pieces["w"]
    for slot in ("exp_avg", "exp_avg_sq"):
        saved.pieces[f"optimizer.state.w.{slot}"] |= upper.pieces["w"]
    load(other, saved)
    assert other["optimizer"].state[fresh]["exp_avg"].shape == (4, 3)
    assert same_bits(fresh.detach()[2:], parameter.detach())


def test_marks_stand_where_tensors_were() -> None:
    local = flatten({"s": Sampler(a=[1, torch.ones(1)], b=(torch.ones(2),))})
    assert local.values["s"] == {"a": [1, TensorRef("s.a.1")], "b": (TensorRef("s.b.0"),)}
