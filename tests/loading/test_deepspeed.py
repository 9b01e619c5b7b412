"""DeepSpeed's engines: each stage really trains, saves what one process saves, and loads what any other saved.

The truth for float32 is one process with AdamW and no DeepSpeed; for bfloat16, what DeepSpeed itself says that its
master weights and slots are. All comparisons are bit for bit.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt.agent.fence import Fence
from ckpt.state import flatten
from ckpt_formats.errors import DtypeMismatchError, RankError, StateError
from tests.docs.test_parallelism import DEEPSPEED
from tests.docs.test_parallelism import Model as Documented
from tests.loading import cuts
from tests.loading.cuts import Model, Run
from tests.loading.test_every_cut import assert_same, contents
from tests.loading.test_fsdp1 import Tied
from tests.ranks import run_ranks

# not by importing it: only the ranks have it
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

BEFORE, AFTER = 2, 1
"""Steps of training before the state is saved, and after it was loaded."""
LR = 0.0625

ENGINES: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage2_round_robin": {"stage": 2, "round_robin_gradients": True},
    "stage2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    # small parameters stay gathered
    "stage3": {"stage": 3, "stage3_param_persistence_threshold": 30},
    "stage3_sub_groups": {"stage": 3, "sub_group_size": 40, "stage3_param_persistence_threshold": 0},
    "stage3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
}
LOW = {f"bf16_{name}": ENGINES[name] for name in ("stage0", "stage1", "stage2", "stage3")}
FOUR = ("stage1", "stage2_round_robin", "stage3", "stage3_sub_groups", "bf16_stage1", "bf16_stage3")
RUN = {2: (*ENGINES, *LOW), 4: FOUR}
"""Ranks -> what trains on so many."""
EXACT = [(name, world) for world, names in RUN.items() for name in names if name in ENGINES]
ROUNDED = [(name, world) for world, names in RUN.items() for name in names if name in LOW]


def quiet() -> None:
    """What DeepSpeed needs to be told where nobody has launched it, and nothing is to be compiled."""
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    import deepspeed

    gc.freeze()  # it collects garbage for every engine, among all that is imported
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled


def initialized(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    import deepspeed

    world = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": cuts.BATCH // world,
        "gradient_clipping": 0.0,
        "zero_optimization": ENGINES.get(name) or LOW[name],
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": name in LOW},
        "steps_per_print": 1 << 30,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def engine(name: str, seed: int) -> Run:
    """An engine that trains in two groups with different hyperparameters, while some parameters are frozen."""
    torch.manual_seed(seed)
    model = Model()
    made = initialized(name, model, adam(model))
    world = dist.get_world_size()

    def step(number: int) -> float:
        tokens, targets = (whole.chunk(world)[dist.get_rank()] for whole in cuts.batch(number))
        loss = cuts.loss_of(made(tokens).float(), targets.float())
        made.backward(loss)
        made.step()
        return loss.item()

    return Run(made, made.optimizer, step)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(cuts.groups(model), lr=LR)


def plain(seed: int) -> Run:
    """One process, in the same dtype."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = adam(model)

    def step(number: int) -> None:
        tokens, targets = cuts.batch(number)
        cuts.loss_of(model(tokens), targets.float()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


# --- saving


def save_on(rank: int, world: int, folder: str) -> None:
    quiet()
    for name in RUN[world]:
        run = engine(name, 7)
        for number in range(BEFORE):
            run.step(number)
        ckpt.save(run.state, f"{folder}/{name}_{world}")
        if name in LOW:
            assert_as_deepspeed_says(run, f"{folder}/{name}_{world}")
            for number in range(AFTER):
                run.step(BEFORE + number)
            ckpt.save(run.state, f"{folder}/{name}_{world}_unbroken")
        run.model.destroy()
    if world == 2:
        save_behind(folder)


def assert_as_deepspeed_says(run: Run, path: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    saved = contents(path)
    if run.model.zero_optimization_stage() == 0:
        masters = [master for group in run.optimizer.fp32_groups for master in group]
        assert torch.equal(saved["model.layers.0.scale.weight"], masters[0])
        return
    if run.model.zero_optimization_stage() < 3:
        # it looks for slots of all groups when only the first one has stepped
        run.optimizer._hp_optimizer_states_linked = False
        run.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in run.model.module.named_parameters():
        if not parameter.requires_grad:
            assert saved[f"model.{name}"].dtype is torch.bfloat16
            continue
        assert saved[f"model.{name}"].dtype is torch.float32
        assert torch.equal(saved[f"model.{name}"], safe_get_full_fp32_param(parameter)), name
        for slot in ("exp_avg", "exp_avg_sq"):
            stored = saved[f"optimizer.state.{name}.{slot}"]
            assert torch.equal(stored, safe_get_full_optimizer_state(parameter, slot)), f"{name}.{slot}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("deepspeed")
    run = plain(7)
    for number in range(BEFORE):
        run.step(number)
    ckpt.save(run.state, folder / "plain")
    for number in range(AFTER):
        run.step(BEFORE + number)
    ckpt.save(run.state, folder / "unbroken")
    run_ranks(save_on, 2, str(folder), timeout=240)
    run_ranks(save_and_load_on, 4, str(folder), timeout=240)
    return folder


def save_and_load_on(rank: int, world: int, folder: str) -> None:
    save_on(rank, world, folder)
    load_on(rank, world, folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "world"), EXACT)
def test_an_engine_saves_what_one_process_saves(name: str, world: int, saved: Path) -> None:
    assert_same(saved / f"{name}_{world}", saved / "plain")


# --- loading


def sources_of(name: str, world: int) -> str:
    """Which of what was saved an engine loads: by another one, and mostly on another number of ranks."""
    made = [f"{other}_{size}" for other, size in EXACT] + ["plain"]
    return made[(made.index(f"{name}_{world}") + 5) % len(made)]


def load_on(rank: int, world: int, folder: str) -> None:
    quiet()
    truth = contents(f"{folder}/plain")
    for turn, name in enumerate(name for name in RUN[world] if name in ENGINES):
        run = engine(name, 8)
        if turn % 2:
            run.step(5)  # it has slots already, which are filled where they are
        ckpt.load(run.state, f"{folder}/{sources_of(name, world)}")
        compared(run, truth)
        if name != "stage2_round_robin":  # of which DeepSpeed tells wrong masters
            assert_computes_with_masters(run)
        for number in range(AFTER):
            run.step(BEFORE + number)
        ckpt.save(run.state, f"{folder}/resumed_{name}_{world}")
        run.model.destroy()
    load_low_on(world, folder)


def compared(run: Run, truth: dict[str, torch.Tensor]) -> None:
    for name, tensor in flatten(run.state).tensors.items():
        assert tensor.dtype == truth[name].dtype, name
        for piece in tensor.pieces:
            assert torch.equal(piece.view, truth[name][piece.box.slices()]), f"{name} {piece.box}"


def assert_computes_with_masters(run: Run) -> None:
    """The model has its master weights, rounded to its own dtype."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in run.model.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is None or not parameter.requires_grad:
            continue
        gather = [parameter] if hasattr(parameter, "ds_tensor") else []
        with deepspeed.zero.GatheredParameters(gather, enabled=bool(gather)):
            assert torch.equal(parameter.data.cpu(), master.to(parameter.dtype).cpu()), name


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Path:
    run_ranks(load_on, 2, str(saved), timeout=240)
    return saved


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "world"), EXACT)
def test_an_engine_loads_what_another_saved_and_trains_on_as_one_process_would(
    name: str, world: int, loaded: Path
) -> None:
    assert_same(loaded / f"resumed_{name}_{world}", loaded / "unbroken")


@pytest.mark.parametrize(("name", "world"), EXACT)
def test_one_process_trains_on_from_what_an_engine_saved(name: str, world: int, saved: Path, tmp_path: Path) -> None:
    run = plain(9)
    ckpt.load(run.state, saved / f"{name}_{world}")
    for number in range(AFTER):
        run.step(BEFORE + number)
    ckpt.save(run.state, tmp_path / "resumed")
    assert_same(tmp_path / "resumed", saved / "unbroken")


def load_low_on(world: int, folder: str) -> None:
    names = [f"{name}_{ranks}" for name, ranks in ROUNDED]
    for turn, name in enumerate(name for name in RUN[world] if name in LOW):
        run = engine(name, 8)
        if turn % 2:
            run.step(5)
        # by another stage, or on another number of ranks
        source = f"{folder}/{names[(names.index(f'{name}_{world}') + 1) % len(names)]}"
        ckpt.load(run.state, source)
        compared(run, contents(source))
        assert_computes_with_masters(run)

        ckpt.load(run.state, f"{folder}/{name}_{world}")
        for number in range(AFTER):
            run.step(BEFORE + number)
        ckpt.save(run.state, f"{folder}/resumed_{name}_{world}")
        run.model.destroy()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "world"), ROUNDED)
def test_master_weights_go_from_stage_to_stage_and_training_goes_on_from_them(
    name: str, world: int, loaded: Path
) -> None:
    assert_same(loaded / f"resumed_{name}_{world}", loaded / f"{name}_{world}_unbroken")


def test_master_weights_are_the_parameters_of_a_process_without_deepspeed(saved: Path) -> None:
    path = saved / "bf16_stage3_4"
    run = plain(9)
    with pytest.raises(DtypeMismatchError, match=r"model\.frozen\.weight"):
        ckpt.load(run.state, path)
    ckpt.load(run.state, path, cast=True)
    for name, tensor in contents(path).items():
        (piece,) = flatten(run.state).tensors[name].pieces
        assert torch.equal(piece.view, tensor.to(torch.float32)), name


# --- saving behind the training


BEHIND = ("stage1", "stage2_offload", "stage3_sub_groups", "bf16_stage2")


def save_behind(folder: str) -> None:
    for name in BEHIND:
        run = engine(name, 7)
        run.step(0)
        ckpt.save(run.state, f"{folder}/{name}_before")
        held = flatten(run.state).tensors
        seen: list[dict[str, torch.Tensor]] = []

        def settle(held: Any = held, seen: Any = seen) -> None:
            seen.append({f"{key} {p.box}": p.view.clone() for key, t in held.items() for p in t.pieces})

        fence = Fence(settle)
        settle()
        lazily = fence.around(run.state, Untrusting())
        own = [p.view for key, t in held.items() if t.cut == "flat" and "frozen" not in key for p in t.pieces]
        assert own
        assert all(map(lazily, own))
        pending = ckpt.async_save(run.state, f"{folder}/{name}_behind")
        run.step(1)
        fence.close()
        assert len(seen) > 1, "no hook ran before the step"
        assert all(torch.equal(seen[1][key], view) for key, view in seen[0].items()), "the hook ran too late"
        assert any(not torch.equal(p.view, seen[0][f"{k} {p.box}"]) for k, t in held.items() for p in t.pieces)
        pending.result()
        run.model.destroy()


class Untrusting:
    trusted = False


@pytest.mark.parametrize("name", BEHIND)
def test_what_is_saved_behind_the_training_is_of_before_the_step(name: str, saved: Path) -> None:
    assert_same(saved / f"{name}_behind", saved / f"{name}_before")


# --- models of other kinds


class TiedAndFrozen(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.inner.bias.requires_grad_(False)


def tied_on(rank: int, world: int, folder: str) -> None:
    quiet()
    (example,) = DEEPSPEED
    names = {"torch": torch, "ckpt": ckpt, "model": Documented(), "path": f"{folder}/documented"}
    exec(compile(example, "the example of docs/parallelism.md", "exec"), names)
    for name in ("stage1", "stage3"):
        model = TiedAndFrozen()
        # the frozen parameter is in a group, of which DeepSpeed drops it
        made = initialized(name, model, torch.optim.AdamW(model.parameters(), lr=LR))
        state = {"model": made, "optimizer": made.optimizer}
        ckpt.load(state, f"{folder}/plain")
        ckpt.save(state, f"{folder}/{name}")
        ckpt.load({"model": made}, f"{folder}/other")  # the weights alone
        ckpt.save({"model": made}, f"{folder}/{name}_other")
        if name == "stage1":
            with pytest.raises(StateError, match="put the engine into the state in place of its module"):
                ckpt.save({"model": made.module}, f"{folder}/never")
        made.destroy()


class Fragile:
    """What can't be restored on the second rank."""

    def state_dict(self) -> dict[str, int]:
        return {"seen": 3}

    def load_state_dict(self, _: dict[str, int]) -> None:
        if dist.get_rank() == 1:
            raise ValueError("a sampler of another data set")


def fail_on_one(rank: int, world: int, folder: str) -> list[str]:
    quiet()
    heard = []
    for name in ("stage1", "stage3"):
        run = engine(name, 7)
        state = {"model": run.model, "optimizer": run.optimizer, "sampler": Fragile()}
        ckpt.save(state, f"{folder}/{name}")
        with pytest.raises((ValueError, RankError), match="a sampler of another data set") as caught:
            ckpt.load(state, f"{folder}/{name}")
        heard.append(f"{type(caught.value).__name__} {caught.value}")
        # the ranks are not apart: nobody is in a collective that others left
        ckpt.load({"model": run.model, "optimizer": run.optimizer}, f"{folder}/{name}")
        run.model.destroy()
    return heard


def test_what_can_not_be_restored_on_one_rank_is_an_error_on_all_before_deepspeed_waits_for_it(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one, 2, str(tmp_path))
    for mine, others in zip(second, first, strict=True):
        assert mine == "ValueError a sampler of another data set"
        assert others.startswith("RankError rank 1: ValueError: a sampler of another data set")
        assert "may have been overwritten" in others


def test_tied_and_frozen_parameters_and_weights_alone_and_the_documented_example(tmp_path: Path) -> None:
    for name in ("plain", "other"):
        model = TiedAndFrozen()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
        ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / name)
    run_ranks(tied_on, 2, str(tmp_path))
    whole = {f"model.{name}": tensor.shape for name, tensor in Documented().state_dict().items()}
    assert {name: tensor.shape for name, tensor in contents(tmp_path / "documented").items()} == whole
    for name in ("stage1", "stage3"):
        with ckpt.open(tmp_path / name) as checkpoint:
            assert checkpoint.manifest.aliases == {"model.head.weight": "model.embed.weight"}
        plain, found = contents(tmp_path / "plain"), contents(tmp_path / name)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)
        other, found = contents(tmp_path / "other"), contents(tmp_path / f"{name}_other")
        assert all(torch.equal(found[key], other[key]) for key in found)
        ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / name)
        assert torch.equal(model.head.weight, plain["model.embed.weight"])
