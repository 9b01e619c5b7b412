"""Models on the meta device are loaded into: memory for what the checkpoint has, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Shard

import ckpt
from ckpt_formats.errors import CheckpointError, StateMismatchError
from tests.ranks import run_ranks


class Tied(nn.Module):
    """A tied head, a buffer that is saved and one that is not."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.ones(3), persistent=False)


@pytest.fixture
def garbage() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _save(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = Tied()
    model.norm.running_mean += 2  # type: ignore[operator]
    ckpt.save({"model": model}, path)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _bare(model: nn.Module) -> nn.Module:
    return model


def _stages(model: nn.Module) -> nn.Module:
    return ckpt.Stages([model])


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


wrapped = pytest.mark.parametrize("wrap", [_bare, _stages, checkpoint_wrapper, _compiled])


@wrapped
def test_a_model_on_the_meta_device_is_made_and_filled_and_its_ties_stay(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    saved = _save(tmp_path / "c")
    with torch.device("meta"):
        model = Tied()
    result = ckpt.load({"model": wrap(model)}, tmp_path / "c")
    assert model.head.weight is model.embed.weight
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert model.table.is_meta
    assert result.still_meta == ["model.table"]


def test_a_model_that_does_not_fit_stays_on_the_meta_device(tmp_path: Path) -> None:
    _save(tmp_path / "c")
    with torch.device("meta"):
        model = Tied(7)
    with pytest.raises(CheckpointError, match="Other shapes"):
        ckpt.load({"model": model}, tmp_path / "c")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@wrapped
def test_what_the_checkpoint_lacks_is_not_left_without_values(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    _save(tmp_path / "c")
    with torch.device("meta"):
        model = Tied()
        model.extra = nn.Linear(2, 2)
    with pytest.raises(StateMismatchError, match=r"On the meta device and not in the checkpoint: model\.extra\.bias"):
        ckpt.load({"model": wrap(model)}, tmp_path / "c", strict=False)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


class Adapted(nn.Module):
    """Hooks on saving and loading, as modules with adapters have them."""

    def __init__(self, change: Callable[[dict[str, Any]], None], back: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.adapter = nn.Linear(4, 4)
        self.register_state_dict_post_hook(lambda _, state, *__: change(state))
        self.register_load_state_dict_pre_hook(lambda _, state, *__: back(state))


def _drop(state: dict[str, Any]) -> None:
    del state["base.weight"], state["base.bias"]


def _rename(state: dict[str, Any]) -> None:
    state["kernel"] = state.pop("base.weight")


def _rename_back(state: dict[str, Any]) -> None:
    state["base.weight"] = state.pop("kernel")


def _double(state: dict[str, Any]) -> None:
    state["base.weight"] = state["base.weight"] * 2


def _halve(state: dict[str, Any]) -> None:
    state["base.weight"] = state["base.weight"] / 2


def _nothing(state: dict[str, Any]) -> None:
    pass


def test_what_a_module_does_not_save_of_itself_is_not_left_without_values(tmp_path: Path) -> None:
    ckpt.save({"model": Adapted(_drop, _nothing)}, tmp_path / "c")
    with torch.device("meta"):
        model = Adapted(_drop, _nothing)
    with pytest.raises(StateMismatchError, match=r"not in the checkpoint: model\.base\.bias, model\.base\.weight\."):
        ckpt.load({"model": model}, tmp_path / "c")
    assert all(tensor.is_meta for tensor in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("change", "back"), [(_rename, _rename_back), (_double, _halve)])
def test_a_module_that_saves_itself_under_other_names_or_values_is_filled_by_its_own_code(
    tmp_path: Path,
    garbage: None,
    change: Callable[[dict[str, Any]], None],
    back: Callable[[dict[str, Any]], None],
    dtype: torch.dtype,
) -> None:
    saved = Adapted(change, back)
    ckpt.save({"model": saved}, tmp_path / "c")
    with torch.device("meta"):
        model = Adapted(change, back).to(dtype)
    ckpt.load({"model": model}, tmp_path / "c", cast=True)
    for loaded, parameter in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(loaded, parameter.to(dtype))


def test_padding_of_a_marked_tensor_is_zero(tmp_path: Path, garbage: None) -> None:
    whole = nn.Embedding(11, 5)
    ckpt.save({"model": whole}, tmp_path / "c")
    part = nn.Embedding(8, 5, device="meta")
    ckpt.mark(part, "weight", (11, 5), parts=[((8, 0), (0, 0), (3, 5))])
    ckpt.load({"model": part}, tmp_path / "c")
    assert torch.equal(part.weight[:3], whole.weight[8:])
    assert not part.weight[3:].any()


def test_ties_between_entries_stay(tmp_path: Path) -> None:
    def tied() -> tuple[nn.Module, nn.Module]:
        embed, head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        head.weight = embed.weight
        return embed, head

    first, second = tied()
    ckpt.save({"first": first, "second": second}, tmp_path / "c")
    with torch.device("meta"):
        embed, head = tied()
    ckpt.load({"first": embed, "second": head}, tmp_path / "c")
    assert head.weight is embed.weight
    assert torch.equal(head.weight, first.weight)


def test_a_model_for_which_there_is_no_memory_stays_on_the_meta_device(tmp_path: Path) -> None:
    ckpt.save({"model": nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 1))}, tmp_path / "c")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(10**15, 1))
    with pytest.raises(RuntimeError, match="memory"):
        ckpt.load({"model": model}, tmp_path / "c")
    assert all(parameter.is_meta for parameter in model.parameters())


def _sharded(rank: int, world_size: int, path: str) -> tuple[bool, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ckpt.load({"model": model}, path)
    weight = model[1].weight.full_tensor()
    return bool(torch.isfinite(model(torch.ones(2, 5))).all()), weight


def test_fsdp2_on_the_meta_device_is_filled_shard_by_shard_and_runs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    ckpt.save({"model": model}, tmp_path / "c")
    for runs, weight in run_ranks(_sharded, 2, str(tmp_path / "c")):
        assert runs
        assert torch.equal(weight, model[1].weight)


class Expert(nn.Module):
    """A parameter to shard over other ranks than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4, bias=False)
        self.expert = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x) @ self.expert


def _sharded_over_two_meshes(rank: int, world_size: int, path: str) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "expert"))
    over = {axis: _fsdp_common.FSDPMeshInfo(mesh=mesh[axis], shard_mesh_dim=0) for axis in ("data", "expert")}
    with torch.device("meta"):
        model = Expert()
    expert = model.expert

    def place(parameter: nn.Parameter) -> Any:
        axis = "expert" if parameter is expert else "data"
        return _fsdp_common.ShardPlacementResult(placement=Shard(0), mesh_info=over[axis])

    fully_shard(model, mesh=mesh["data"], shard_placement_fn=place)
    ckpt.load({"model": model}, path)
    return model(torch.ones(2, 4)).detach()


@pytest.mark.skipif(not hasattr(_fsdp_common, "ShardPlacementResult"), reason="this torch has one mesh for all")
def test_fsdp2_with_a_mesh_for_each_parameter_is_filled_on_the_meta_device(tmp_path: Path) -> None:
    model = Expert()
    ckpt.save({"model": model}, tmp_path / "c")
    for output in run_ranks(_sharded_over_two_meshes, 4, str(tmp_path / "c")):
        torch.testing.assert_close(output, model(torch.ones(2, 4)).detach())


def _misfit(rank: int, world_size: int, path: str, what: str) -> tuple[str, bool]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if rank == 1:
        if what == "shape":
            model[1] = nn.Linear(4, 5)
        elif what == "dtype":
            model[1] = model[1].double()
        else:
            model.add_module("other", nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        ckpt.load({"model": model}, path)
    return str(caught.value), all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("what", "names"), [("shape", "model.1.weight"), ("dtype", "model.1.weight"), ("name", "model.other.weight")]
)
def test_a_target_that_fits_on_one_rank_only_is_an_error_on_each_and_touches_none(
    tmp_path: Path, what: str, names: str
) -> None:
    ckpt.save({"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}, tmp_path / "c")
    results = run_ranks(_misfit, 2, str(tmp_path / "c"), what)
    assert all(untouched for _, untouched in results)
    assert names in results[1][0]
    assert "rank 1" in results[0][0]


def test_a_sub_module_is_loaded_under_its_name_in_the_checkpoint(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 2)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["decoder"](model["encoder"](torch.ones(1, 4))).sum().backward()
    optimizer.step()
    ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    part = nn.Linear(4, 4, dtype=torch.bfloat16, device="meta")
    result = ckpt.load({"model": {"encoder": part}}, tmp_path / "c", cast=True)
    assert torch.equal(part.weight, model["encoder"].weight.bfloat16())
    assert result.bytes_needed == (4 * 4 + 4) * 4  # as stored
