"""What modules save beside plain parameters: extra state, ties, hooks, state dicts of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ckpt.state import flatten
from ckpt_formats.errors import StateError
from tests.state.in_memory import load, same_bits, save


class Counter(nn.Module):
    """Extra state with tensors in it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.extra: Any = {"count": count, "history": [torch.full((count,), 1.5)], "names": ("a", None)}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_comes_back_with_its_types() -> None:
    state = {"model": nn.Sequential(Counter(3))}
    saved = save(state)
    assert "model.0._extra_state" in saved.values
    assert "model.0._extra_state.history.0" in saved.tensors
    other = nn.Sequential(Counter(1))  # of another size: what was saved decides
    target = load({"model": other}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert other[0].extra["count"] == 3
    assert other[0].extra["names"] == ("a", None)
    assert same_bits(other[0].extra["history"][0], torch.full((3,), 1.5))


class TensorExtra(Counter):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.extra = torch.full((count,), 2.5)


def test_extra_state_that_is_a_tensor_has_the_name_that_torch_gives_it() -> None:
    model = nn.Sequential(TensorExtra(3))
    saved = save({"model": model})
    assert {f"model.{name}" for name in get_model_state_dict(model)} == set(saved.tensors)
    other = nn.Sequential(TensorExtra(1))
    load({"model": other}, saved)
    assert same_bits(other[0].extra, torch.full((3,), 2.5))


class Scaled(nn.Module):
    """Saves something else than what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        made = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        made[prefix + "doubled"] = made.pop(prefix + "inner.weight") * 2
        return made

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[prefix + "inner.weight"] = state_dict.pop(prefix + "doubled") / 2
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict, assign)


@pytest.mark.parametrize("nested", [False, True])
def test_a_module_with_a_state_dict_of_its_own_is_asked(nested: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(Scaled(), backend="eager")) if nested else Scaled()
    prefix = "model.1." if nested else "model."
    scaled = model[1] if nested else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaled.inner(model[0](torch.rand(2, 3)) if nested else torch.rand(2, 3)).sum().backward()
    optimizer.step()

    saved = save({"model": model, "optimizer": optimizer})

    assert {f"{prefix}doubled", f"{prefix}inner.bias"} <= set(saved.tensors)
    assert f"{prefix}inner.weight" not in saved.tensors
    # as torch: the optimizer knows parameters, not what a state_dict makes of them
    assert f"optimizer.state.{prefix[6:]}inner.weight.momentum_buffer" in saved.tensors
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(3, 3), torch.compile(Scaled(), backend="eager")) if nested else Scaled()
    fresh = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    target = load({"model": other, "optimizer": fresh}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(one, two)
    assert len(fresh.state) == len(optimizer.state)


def test_hooks_on_saving_and_loading_are_honoured() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

        def rename(module: Any, state: Any, prefix: str, _: Any) -> None:
            state[prefix + "w"] = state.pop(prefix + "weight")

        def back(module: Any, state: Any, prefix: str, *_: Any) -> None:
            state[prefix + "weight"] = state.pop(prefix + "w")

        model[1].register_state_dict_post_hook(rename)
        model[1].register_load_state_dict_pre_hook(back)
        return model

    model, other = build(), build()
    saved = save({"model": model})
    assert list(saved.tensors) == ["model.0.weight", "model.0.bias", "model.1.bias", "model.1.w"]
    load({"model": other}, saved)
    assert same_bits(other[1].weight, model[1].weight)


def test_a_hook_after_loading_is_called() -> None:
    called: list[torch.Tensor] = []
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    other[0].register_load_state_dict_post_hook(lambda module, _: called.append(module.weight.detach().clone()))
    load({"model": other}, save({"model": model}))
    assert len(called) == 1
    assert same_bits(called[0], model[0].weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_that_torch_itself_rewrites() -> None:
    def build() -> nn.Module:
        plain = nn.utils.spectral_norm(nn.Linear(3, 4))
        return nn.Sequential(plain, nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), nn.BatchNorm1d(2))

    torch.manual_seed(0)
    model = build()
    model(torch.rand(5, 3))
    saved = save({"model": model})
    assert set(saved.tensors) == {f"model.{name}" for name in get_model_state_dict(model)}
    torch.manual_seed(1)
    other = build()
    target = load({"model": other}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert same_bits(one, two), name


def test_tied_tensors_are_stored_once_and_stay_tied() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model[2].bias.data = model[0].bias.data  # another object over the same memory
        return model

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    saved = save({"model": model, "optimizer": optimizer})
    assert saved.aliases == {"model.1.weight": "model.0.weight", "model.2.bias": "model.0.bias"}
    assert "optimizer.state.1.weight.momentum_buffer" not in saved.tensors
    assert "optimizer.state.2.bias.momentum_buffer" in saved.tensors, "two parameters, two states"
    other = build()
    target = load({"model": other}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert other[1].weight is other[0].weight
    untied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    target = load({"model": untied}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert same_bits(untied[1].weight, model[0].weight)


def test_tensors_that_are_stored_apart_but_tied_here_are_told() -> None:
    untied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    target = load({"model": tied}, save({"model": untied}))
    assert (target.missing, target.unexpected) == ([], [])
    assert target.retied == {"model.1.weight": "model.0.weight"}


def test_a_tied_tensor_is_found_under_its_other_name() -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 3, bias=False)})
    tied = nn.ModuleDict({"embed": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3, bias=False)})
    tied["head"].weight = tied["embed"].weight
    target = load({"model": tied}, save({"model": model}))
    assert (target.missing, target.unexpected) == ([], [])
    assert same_bits(tied["embed"].weight, model["head"].weight)


def test_views_that_overlap_are_stored_each_by_itself() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "top": whole[:1], "turned": whole.t(), "every other": whole[:, ::2], "again": whole[:1]}
    local = flatten(state)
    assert local.aliases == {"again": "top"}
    assert set(local.tensors) == {"whole", "top", "turned", "every other"}
    assert torch.equal(local.tensors["every other"].pieces[0].view, whole[:, ::2])


def test_lazy_modules_have_no_state_before_they_ran() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(StateError, match=r"model\.0\.weight.*run the module once"):
        flatten({"model": model})
    model(torch.rand(2, 4))
    assert set(flatten({"model": model}).tensors) == {"model.0.weight", "model.0.bias"}


def deepspeeds(name: str, **attributes: object) -> Any:
    """Something of DeepSpeed's by what shows it; tests/loading/test_deepspeed.py has the real thing."""
    base = type("DeepSpeedOptimizer", (), {"__module__": "deepspeed.runtime.base_optimizer"})
    return type(name, (base,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2", **attributes})()


def test_what_is_not_known_of_deepspeed_is_refused_with_the_way_out() -> None:
    with pytest.raises(StateError, match=r"ZenFlowZeroOptimizer of DeepSpeed.*engine\.save_checkpoint"):
        flatten({"optimizer": deepspeeds("ZenFlowZeroOptimizer")})
    for attribute, words in (("has_moe_layers", "has experts"), ("zenflow", "uses ZenFlow")):
        with pytest.raises(StateError, match=rf"{words}.*engine\.save_checkpoint"):
            flatten({"optimizer": deepspeeds("DeepSpeedZeroOptimizer", **{attribute: True})})
    for attribute, words in (("swap_optimizer", "its state on NVMe"), ("params_in_nvme_and_cpu", "parameters on NVMe")):
        with pytest.raises(StateError, match=rf"{words}.*engine\.save_checkpoint"):
            flatten({"optimizer": deepspeeds("DeepSpeedZeroOptimizer_Stage3", **{attribute: True})})
    with pytest.raises(StateError, match=r"reload_states"):
        flatten({"optimizer": deepspeeds("DeepSpeedZeroOptimizer", offloaded_states={"optim_states"})})
    half = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    fused = deepspeeds(
        "FP16_Optimizer", fp16_groups=[[half]], fp16_groups_flat=[half], fp32_groups_flat=[torch.zeros(4)]
    )
    with pytest.raises(StateError, match=r"float16, whose loss scale"):
        flatten({"optimizer": fused})
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    half.tensor_model_parallel = True  # type: ignore[attr-defined]
    fused.fp16_groups = [[half]]
    fused.fp16_groups_flat = [half]
    with pytest.raises(StateError, match=r"cut by tensor or expert parallelism"):
        flatten({"optimizer": fused})


def test_what_deepspeed_trains_without_zero_is_called_by_its_parameters() -> None:
    layer = nn.Linear(3, 2).bfloat16()
    whole = torch.cat([p.detach().flatten() for p in layer.parameters()])
    layer.weight.data, layer.bias.data = whole[:6].view(2, 3), whole[6:]
    master = (torch.arange(8.0) / 3).requires_grad_()
    inner = torch.optim.AdamW([master])
    fused = deepspeeds(
        "FP16_Optimizer",
        fp16_groups=[list(layer.parameters())],
        fp16_groups_flat=[whole],
        fp32_groups_flat=[master],
        optimizer=inner,
    )
    master.sum().backward()
    inner.step()
    state = {"model": layer, "optimizer": fused}
    local = flatten(state)
    assert local.tensors["model.weight"].dtype is torch.float32
    assert torch.equal(local.tensors["model.bias"].pieces[0].view, master[6:])
    assert torch.equal(
        local.tensors["optimizer.state.weight.exp_avg"].pieces[0].view.flatten(), inner.state[master]["exp_avg"][:6]
    )
    assert local.values["optimizer.param_groups"][0]["params"] == ["weight", "bias"]


def test_schedulers_of_deepspeed_are_stateful_like_others() -> None:
    def state_dict(self: object) -> dict[str, object]:
        return {"last": 3}

    kind = type(
        "WarmupLR",
        (),
        {
            "__module__": "deepspeed.runtime.lr_schedules",
            "state_dict": state_dict,
            "load_state_dict": state_dict,
        },
    )
    assert flatten({"scheduler": kind()}).values == {"scheduler": {"last": 3}}


def test_scripted_modules_are_walked_like_others() -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    saved = save({"model": inner})
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    target = load({"model": scripted}, saved)
    assert (target.missing, target.unexpected) == ([], [])
    assert same_bits(scripted.state_dict()["0.weight"], inner[0].weight)
