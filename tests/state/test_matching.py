"""What does not fit is told by name, and what can't be saved is refused with the way out."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch
from torch import nn

from ckpt.state import PerRank, SavedState, build_target, flatten
from ckpt_formats.errors import MissingTensorError, StateError, StateMismatchError
from tests.state.in_memory import Saved, load, same_bits, save, saved_state


def trained(module: nn.Module, make: Any = torch.optim.AdamW) -> dict[str, Any]:
    optimizer = make(module.parameters())
    module(torch.rand(3, 2)).sum().backward()
    optimizer.step()
    return {"model": module, "optimizer": optimizer}


def plain(value: Any) -> Any:
    """A state with lists in the place of tensors, which can't be compared."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def fresh(module: nn.Module) -> dict[str, Any]:
    return {"model": module, "optimizer": torch.optim.AdamW(module.parameters())}


@pytest.fixture
def saved() -> Saved:
    torch.manual_seed(0)
    return save(trained(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))))


def test_names_that_only_one_side_has_are_listed(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    target = build_target(fresh(model), saved_state(saved))
    assert target.missing == [
        "optimizer.param_groups.2.weight",
        "optimizer.param_groups.2.bias",
        "model.2.weight",
        "model.2.bias",
    ]
    assert set(target.unexpected) == {
        "model.1.bias",
        *(f"optimizer.state.1.bias.{slot}" for slot in ("step", "exp_avg", "exp_avg_sq")),
    }
    assert "model.2.weight" not in target.tensors


def test_entries_that_the_state_does_not_have_are_left_alone(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    target = load({"model": model}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert all(name.startswith("model.") for name in target.tensors)


def test_an_entry_that_the_checkpoint_does_not_have_is_missing(saved: Saved) -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1)
    state: dict[str, Any] = {"step": 1, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}
    target = load(state, saved)
    assert target.missing == ["step", "scheduler"]
    assert state["step"] == 1


def test_a_parameter_that_the_checkpoint_does_not_know_keeps_its_state(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1))
    state = trained(model)
    kept = state["optimizer"].state[model[2].weight]["exp_avg"].clone()
    load(state, saved)
    assert same_bits(state["optimizer"].state[model[2].weight]["exp_avg"], kept)


def test_other_shapes_and_dtypes_are_left_to_the_caller(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).to(torch.bfloat16)
    target = build_target(fresh(model), saved_state(saved))
    assert target.tensors["model.0.weight"].shape == (4, 2)
    assert saved.tensors["model.0.weight"].shape == (3, 2)
    # slots follow their parameter, so that what is cast fits it; a step is what it was
    assert target.tensors["optimizer.state.0.weight.exp_avg"].shape == (4, 2)
    assert target.tensors["optimizer.state.0.weight.exp_avg"].dtype == torch.bfloat16
    assert target.tensors["optimizer.state.0.weight.step"].dtype == torch.float32


def test_groups_may_be_set_up_otherwise_if_their_parameters_agree(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [{"params": [parameter], "lr": 9.0} for parameter in reversed(list(model.parameters()))]
    optimizer = torch.optim.AdamW(groups)
    load({"model": model, "optimizer": optimizer}, saved)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 4
    assert len(optimizer.state) == 4


def test_parameters_of_one_group_that_were_saved_with_different_settings_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2}]
    known = saved_state(save({"model": model, "optimizer": torch.optim.AdamW(groups)}))
    with pytest.raises(StateMismatchError, match=r"'0\.weight' and '1\.weight'.*lr = 0\.1 and 0\.2"):
        build_target(fresh(model), known)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["with slots", "without"])
def test_the_state_dict_of_an_optimizer_is_no_optimizer_and_says_how_it_is_loaded(make: Any) -> None:
    state = trained(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), make)
    saved = save({"model": state["model"], "optimizer": state["optimizer"].state_dict()})
    live = {"model": state["model"], "optimizer": make(state["model"].parameters())}
    with pytest.raises(StateMismatchError, match=r"saved as what its state_dict\(\) gives.*load {'optimizer': {}}"):
        build_target(live, saved_state(saved))
    remedy: dict[str, Any] = {"optimizer": {}}
    load(remedy, saved)
    live["optimizer"].load_state_dict(remedy["optimizer"])
    assert plain(live["optimizer"].state_dict()) == plain(state["optimizer"].state_dict())


def test_several_modules_under_one_optimizer() -> None:
    def build() -> dict[str, Any]:
        one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], momentum=0.9)
        return {"one": one, "two": two, "optimizer": optimizer}

    torch.manual_seed(0)
    state = build()
    state["two"](state["one"](torch.rand(1, 2))).sum().backward()
    state["optimizer"].step()
    known = save(state)
    assert known.entries["optimizer"]["modules"] == {"one": "one", "two": "two"}
    assert "optimizer.state.two.weight.momentum_buffer" in known.tensors
    other = build()
    target = load(other, known)
    assert (target.missing, target.unexpected) == ([], [])
    assert len(other["optimizer"].state) == 4
    # and under an optimizer of one of them alone
    part = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(part.parameters(), momentum=0.9)
    target = load({"two": part, "optimizer": optimizer}, known)
    assert target.missing == []
    assert all(".one." in name for name in target.unexpected)
    there = state["optimizer"].state[state["two"].weight]["momentum_buffer"]
    assert same_bits(optimizer.state[part.weight]["momentum_buffer"], there)


def test_a_module_that_was_saved_alone_and_now_shares_its_optimizer(saved: Saved) -> None:
    model, extra = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Linear(1, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *extra.parameters()])
    target = load({"model": model, "extra": extra, "optimizer": optimizer}, saved)
    assert target.unexpected == []
    assert "model.0.weight" in target.tensors
    assert len(optimizer.state) == 4


def test_one_module_within_another_does_not_change_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    local = flatten({"first": model[0], **trained(model)})
    assert local.entries["optimizer"]["modules"] == {"": "model"}
    assert local.aliases["model.0.weight"] == "first.weight"


def nested() -> nn.Sequential:
    """A module in which names of the whole are names of its part too."""
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    moment: torch.Tensor = optimizer.state[parameter]["exp_avg"]
    return moment


def test_a_part_of_a_module_gets_its_own_slots_from_the_optimizer_of_the_whole_and_back() -> None:
    torch.manual_seed(0)
    whole = trained(nested())
    part = nested()[1]
    optimizer = torch.optim.AdamW(part.parameters())
    target = load({"model": {"1": part}, "optimizer": optimizer}, save(whole))
    assert target.missing == []
    assert {name.rpartition(".")[0] for name in target.unexpected} == {
        f"optimizer.state.0.{name}" for name in ("weight", "bias")
    }
    for mine, other in zip(part.parameters(), whole["model"][1].parameters(), strict=True):
        assert same_bits(mine.detach(), other.detach())
        assert same_bits(moments(optimizer, mine), moments(whole["optimizer"], other))
    # and what was saved of the part goes to that part of a whole
    again = fresh(nested())
    saved = save({"model": {"1": part}, "optimizer": optimizer})
    target = load(again, saved)
    assert target.unexpected == []
    assert set(target.missing) == {
        f"{before}model.0.{name}" for before in ("", "optimizer.param_groups.") for name in ("weight", "bias")
    }
    for mine, other in zip(part.parameters(), again["model"][1].parameters(), strict=True):
        assert same_bits(moments(optimizer, mine), moments(again["optimizer"], other))


def test_slots_of_another_parameter_of_that_name_are_not_taken() -> None:
    model = nested()
    optimizer = torch.optim.AdamW(model[0].parameters())
    model(torch.rand(3, 2)).sum().backward()
    optimizer.step()
    saved = save({"model": model, "optimizer": optimizer})
    assert saved.entries["optimizer"]["modules"] == {"": "model"}
    for state in (
        {"model": {"1": model[1]}},  # "0.weight" there, and of the whole
        {"0": model[1]},  # "0.0.weight", of nothing that was saved
    ):
        live = torch.optim.AdamW(model[1][0].parameters())
        target = load({**state, "optimizer": live}, saved)
        assert not live.state
        key = "1.0" if "model" in state else "0.0"
        assert {f"optimizer.param_groups.{key}.{name}" for name in ("weight", "bias")} <= set(target.missing)
        assert len(target.unexpected) == 6


def test_a_parameter_that_two_entries_have_is_found_by_either_of_its_names() -> None:
    torch.manual_seed(0)
    state = trained(nested())
    both = {"first": state["model"][1], **state}
    for was, now in ((state, both), (both, state)):
        part = torch.optim.AdamW(state["model"][1].parameters())
        saved = save({**was, "optimizer": state["optimizer"]})
        assert load({**now, "optimizer": part}, saved).missing == []
        weight = state["model"][1][0].weight
        assert same_bits(moments(part, weight), moments(state["optimizer"], weight))


def test_a_damaged_reference_is_refused() -> None:
    known = saved_state(save({"x": [torch.ones(1)]}))
    with pytest.raises(MissingTensorError, match=r"x\.0"):
        build_target({"x": []}, SavedState(tensors={}, values=known.values, entries=known.entries))


# --- what can't be saved


def test_a_parameter_in_no_module_is_named_with_the_remedy() -> None:
    model, lost = nn.Linear(2, 2), nn.Linear(3, 5)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [lost.bias, lost.weight]}], lr=0.1)
    with pytest.raises(StateError, match=r"'opt'.*number 0 of its group 1, of shape \[5\].*Put the module"):
        flatten({"model": model, "opt": optimizer})


def test_a_group_that_was_left_behind_by_a_new_model_is_noticed() -> None:
    model = nn.Linear(2, 2)
    state = trained(nn.Sequential(model))
    state["optimizer"].param_groups[0]["params"] = [model.weight]
    with pytest.raises(StateError, match="in none of its groups"):
        flatten(state)


@pytest.mark.parametrize(
    ("state", "places"),
    [
        ({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, ["state['a.b']", "state['a']['b']"]),
        ({"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}}, ["state['a']['b.c']", "state['a']['b']['c']"]),
        ({"m": nn.Linear(1, 1), "m.weight": 3}, ["weight of state['m']", "state['m.weight']"]),
        ({"a": {1: torch.ones(1), "1": torch.zeros(1)}}, ["state['a'][1]", "state['a']['1']"]),
        ({"a": PerRank(1), "x": 2, "b": {"c": PerRank(1)}, "b.c": 1}, ["state['b']['c']", "state['b.c']"]),
    ],
)
def test_names_that_collide_are_refused_with_both_places(state: dict[str, Any], places: list[str]) -> None:
    with pytest.raises(StateError) as raised:
        flatten(state)
    assert all(place in str(raised.value) for place in places), str(raised.value)


@pytest.mark.parametrize("key", ["__ckpt__", "__ckpt__.x", "", 3])
def test_keys_that_are_no_names_are_refused(key: Any) -> None:
    with pytest.raises(StateError, match="key"):
        flatten({key: 1})


@pytest.mark.filterwarnings("ignore:.*(S|s)parse.*:UserWarning", "ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(2, device="meta"), "meta device.*materialise"),
        (lambda: torch.ones(2).to_sparse(), "sparse_coo.*indices"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "sparse_csr.*to_dense"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor.*unbind"),
    ],
)
def test_tensors_that_are_no_boxes_of_memory_are_refused_with_the_way_out(make: Any, said: str) -> None:
    with pytest.raises(StateError, match=said) as raised:
        flatten({"x": {"y": make()}})
    assert raised.value.tensor == "x.y"


def test_a_meta_parameter_is_refused() -> None:
    with pytest.raises(StateError, match=r"model\.weight.*meta device"):
        flatten({"model": nn.Linear(2, 2, device="meta")})


# --- tensor subclasses


class Pair(torch.Tensor):
    """Two tensors and a number, as quantised tensors are made."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale, made.bits = codes, scale, bits
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], {"bits": self.bits}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def pair(value: int, bits: int = 8) -> Pair:
    return Pair(torch.full((3,), value, dtype=torch.int8), torch.tensor(float(value)), bits)


def test_subclasses_are_taken_apart_and_filled() -> None:
    known = save({"w": pair(3), "nested": {"v": pair(4)}})
    assert set(known.tensors) == {"w.codes", "w.scale", "nested.v.codes", "nested.v.scale"}
    state = {"w": pair(0), "nested": {"v": pair(0)}}
    target = load(state, known)
    assert (target.missing, target.unexpected) == ([], [])
    assert state["w"].codes.tolist() == [3, 3, 3]
    assert state["nested"]["v"].scale.item() == 4


def test_a_subclass_of_another_kind_is_refused() -> None:
    known = saved_state(save({"w": pair(3)}))
    with pytest.raises(StateMismatchError, match=r"'w', a Pair, was saved with \{'bits': 8\}"):
        build_target({"w": pair(3, bits=4)}, known)
    with pytest.raises(StateError, match="no class is imported"):
        build_target({"w": []}, known)


class Quantised(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, _closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["moment"] = pair(5)


def test_slots_that_are_subclasses_are_filled_if_they_are_there() -> None:
    state = trained(nn.Linear(2, 1, bias=False), Quantised)
    known = save(state)
    assert "optimizer.state.weight.moment.codes" in known.tensors
    other = trained(nn.Linear(2, 1, bias=False), Quantised)
    other["optimizer"].state[other["model"].weight]["moment"] = pair(0)
    target = load(other, known)
    assert (target.missing, target.unexpected) == ([], [])
    assert other["optimizer"].state[other["model"].weight]["moment"].codes.tolist() == [5, 5, 5]
    module = nn.Linear(2, 1, bias=False)
    with pytest.raises(StateError, match=r"moment.*was a Pair.*one step"):
        build_target({"model": module, "optimizer": Quantised(module.parameters())}, saved_state(known))


class Opaque(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A subclass of which nothing but the type is special."""


def test_other_subclasses_are_plain_or_refused() -> None:
    plain = torch.ones(2).as_subclass(Plain)
    view = flatten({"x": plain}).tensors["x"].pieces[0].view
    assert type(view) is torch.Tensor
    assert view.data_ptr() == plain.data_ptr()
    with pytest.raises(StateError, match="__tensor_flatten__"):
        flatten({"x": torch.ones(2).as_subclass(Opaque)})


# --- optimizers with more than their slots


class Own(torch.optim.SGD):
    """Keeps something outside of `state`, in a state_dict of its own."""

    best: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict.pop("best")
        super().load_state_dict(state_dict)


def test_what_an_optimizer_saves_by_itself_comes_back() -> None:
    state = trained(nn.Linear(2, 1), lambda parameters: Own(parameters, lr=0.1, momentum=0.9))
    state["optimizer"].best = {"loss": torch.tensor(0.5), "at": 3}
    other = trained(nn.Linear(2, 1), lambda parameters: Own(parameters, lr=0.2, momentum=0.9))
    target = load(other, save(state))
    assert (target.missing, target.unexpected) == ([], [])
    assert other["optimizer"].best == {"loss": torch.tensor(0.5), "at": 3}
    assert other["optimizer"].param_groups[0]["lr"] == 0.1
    for one, two in zip(state["model"].parameters(), other["model"].parameters(), strict=True):
        buffers = [s["optimizer"].state[p]["momentum_buffer"] for s, p in ((state, one), (other, two))]
        assert same_bits(*buffers)


def test_state_that_belongs_to_no_parameter_is_kept() -> None:
    state = trained(nn.Linear(2, 1))
    state["optimizer"].state["shared"] = {"k": 3, "t": torch.ones(2)}
    other = fresh(nn.Linear(2, 1))
    target = load(other, save(state))
    assert (target.missing, target.unexpected) == ([], [])
    assert other["optimizer"].state["shared"]["k"] == 3
    assert same_bits(other["optimizer"].state["shared"]["t"], torch.ones(2))


def test_slots_that_are_one_tensor_stay_one() -> None:
    state = trained(nn.Linear(2, 1))
    optimizer = state["optimizer"]
    shared = torch.tensor(7.0)
    for slots in optimizer.state.values():
        slots["step"] = shared
    known = save(state)
    assert known.aliases == {"optimizer.state.bias.step": "optimizer.state.weight.step"}
    other = fresh(nn.Linear(2, 1))
    load(other, known)
    weight, bias = other["optimizer"].state.values()
    assert weight["step"] is bias["step"]
    assert weight["step"].item() == 7
