"""What a load promises: in place, only what is needed, verified, and clear refusals that touch nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckpt
from ckpt.state import flatten
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    DtypeMismatchError,
    MissingTensorError,
    RankError,
    ShapeMismatchError,
    StateError,
    StateMismatchError,
)
from ckpt_formats.geometry import Box
from ckpt_formats.locations import LocationMap, Places
from ckpt_formats.reading import Reader, ReadStats, Request
from ckpt_formats.sources import LocalFile
from tests.ranks import run_ranks


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def the_data_file(checkpoint: Path) -> Path:
    (file,) = (checkpoint / "data").iterdir()
    return file


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    ckpt.save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "a")
    target = torch.zeros(3, 2).t()
    address = target.data_ptr()
    result = ckpt.load({"w": target}, tmp_path / "a")
    assert target.data_ptr() == address
    assert target.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert result.bytes_needed == 24


def test_what_the_state_lacks_and_what_the_checkpoint_lacks_are_listed_and_nothing_is_touched(tmp_path: Path) -> None:
    ckpt.save({"model": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})}, tmp_path / "s")
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "c": torch.nn.Linear(2, 2)})
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(StateMismatchError) as caught:
        ckpt.load({"model": other}, tmp_path / "s")
    for name in ("model.b.weight", "model.b.bias", "model.c.weight", "model.c.bias", "strict=False"):
        assert name in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    result = ckpt.load({"model": other}, tmp_path / "s", strict=False)
    assert sorted(result.missing) == ["model.c.bias", "model.c.weight"]
    assert sorted(result.unexpected) == ["model.b.bias", "model.b.weight"]
    assert not torch.equal(before[0], other["a"].weight)  # type: ignore[arg-type]


def test_entries_that_the_state_does_not_name_are_not_loaded(tmp_path: Path) -> None:
    model = torch.nn.Linear(512, 512)
    ckpt.save({"model": model, "big": torch.zeros(1 << 20)}, tmp_path / "a")
    other = torch.nn.Linear(512, 512)
    result = ckpt.load({"model": other}, tmp_path / "a")
    assert torch.equal(other.weight, model.weight)
    assert result.bytes_read <= 1.05 * (512 * 512 + 512) * 4


def test_another_shape_is_refused_and_names_both(tmp_path: Path) -> None:
    ckpt.save({"w": torch.zeros(2, 3)}, tmp_path / "a")
    with pytest.raises(ShapeMismatchError, match=r"w \(\[2, 3\] stored, \[3, 2\] in the state\)"):
        ckpt.load({"w": torch.zeros(3, 2)}, tmp_path / "a")


def test_another_dtype_is_refused_unless_a_cast_is_asked_for(tmp_path: Path) -> None:
    saved = torch.randn(1000, 33)
    ckpt.save({"w": saved}, tmp_path / "a")
    target = torch.zeros(1000, 33, dtype=torch.bfloat16)
    with pytest.raises(DtypeMismatchError, match="cast=True"):
        ckpt.load({"w": target}, tmp_path / "a")
    assert not target.any()
    ckpt.load({"w": target}, tmp_path / "a", cast=True)
    assert torch.equal(target, saved.bfloat16())


@pytest.mark.parametrize(
    "held", [lambda w: {"w": w}, lambda w: [w], lambda w: {"d": [(w,)]}], ids=["dict", "list", "deep"]
)
@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, lambda tensor: tensor.requires_grad_()], ids=["parameter", "tensor"]
)
def test_a_parameter_in_a_container_is_never_replaced(
    held: Callable[[Any], Any], make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
        w = make(torch.randn(shape).to(dtype))
        return w, {"params": held(w), "optimizer": torch.optim.SGD([w], lr=0.1, momentum=0.9)}

    saved, state = build((2, 3), torch.float32)
    saved.grad = torch.ones_like(saved)
    state["optimizer"].step()
    ckpt.save(state, tmp_path / "a")
    for shape, dtype, error in (
        ((4, 3), torch.float32, ShapeMismatchError),
        ((2, 3), torch.bfloat16, DtypeMismatchError),
    ):
        w, state = build(shape, dtype)
        before = w.detach().clone()
        with pytest.raises(error, match=r"params\.[\w.]+ \("):
            ckpt.load(state, tmp_path / "a")
        assert torch.equal(w, before)
        assert not state["optimizer"].state
    ckpt.load(state, tmp_path / "a", cast=True)
    assert torch.equal(w, saved.bfloat16())
    assert state["optimizer"].state[w]["momentum_buffer"].dtype == torch.bfloat16
    assert next(iter(flatten(state).tensors.values())).pieces[0].view.data_ptr() == w.data_ptr()


def test_a_cast_that_would_lose_more_than_digits_is_refused_even_if_asked_for(tmp_path: Path) -> None:
    saved = {
        "w": torch.tensor([1 + 2j]),
        "f": torch.tensor([1.5]),
        "b": torch.tensor([3.0]),
        "n": torch.tensor([1 << 40]),
    }
    ckpt.save(saved, tmp_path / "a")
    state = {
        "w": torch.zeros(1),
        "f": torch.zeros(1, dtype=torch.int64),
        "b": torch.zeros(1, dtype=torch.bool),
        "n": torch.zeros(1, dtype=torch.int32),
    }
    for cast in (True, False):
        with pytest.raises(DtypeMismatchError) as caught:
            ckpt.load(state, tmp_path / "a", cast=cast)
        assert "f (torch.float32 stored, torch.int64 in the state)" in str(caught.value)
        assert all(f"{name} (" in str(caught.value) for name in state)
    assert not any(tensor.any() for tensor in state.values())
    wider = {"w": torch.zeros(1, dtype=torch.complex128), "n": torch.zeros(1, dtype=torch.float64)}
    ckpt.load(wider, tmp_path / "a", cast=True)
    assert (wider["w"].item(), wider["n"].item()) == (1 + 2j, 1 << 40)
    ckpt.save(wider, tmp_path / "b")
    narrower = {"w": torch.zeros(1, dtype=torch.complex64)}
    ckpt.load(narrower, tmp_path / "b", cast=True)
    assert narrower["w"].item() == 1 + 2j


def test_what_is_stored_apart_and_tied_now_is_told_and_warned_of_if_it_differs(tmp_path: Path) -> None:
    def model() -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})

    apart, tied = model(), model()
    tied["head"].weight = tied["embed"].weight
    ckpt.save({"model": apart}, tmp_path / "differ")
    with pytest.warns(UserWarning, match=r"Not loaded: model\.head\.weight \(model\.embed\.weight was taken\)") as told:
        result = ckpt.load({"model": tied}, tmp_path / "differ")
    assert len(told) == 1
    assert result.retied == {"model.head.weight": "model.embed.weight"}
    assert torch.equal(tied["head"].weight, apart["embed"].weight)
    assert not ckpt.load({"model": model()}, tmp_path / "differ").retied
    with torch.no_grad():
        apart["head"].weight.copy_(apart["embed"].weight)
    ckpt.save({"model": apart}, tmp_path / "equal")
    assert ckpt.load({"model": tied}, tmp_path / "equal").retied == result.retied
    ckpt.save({"model": tied}, tmp_path / "tied")
    assert not ckpt.load({"model": tied}, tmp_path / "tied").retied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_inference_mode_are_filled_too_cast_or_not(dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ckpt.save({"model": model}, tmp_path / "a")
    with torch.inference_mode():
        other = torch.nn.Linear(3, 3).to(dtype)
    ckpt.load({"model": other}, tmp_path / "a", cast=True)
    assert torch.equal(other.weight, model.weight.to(dtype))


@pytest.mark.parametrize("cast", [False, True])
def test_a_tensor_whose_elements_share_memory_is_refused_and_nothing_is_touched(cast: bool, tmp_path: Path) -> None:
    saved = torch.arange(6.0, dtype=torch.float64 if cast else torch.float32).reshape(2, 3)
    ckpt.save({"a": saved, "w": saved}, tmp_path / "a")
    for shared in (torch.zeros(3).expand(2, 3), torch.zeros(4).unfold(0, 3, 1)):
        state = {"a": torch.zeros(2, 3), "w": shared}
        with pytest.raises(StateError, match=r"'w'.*clone\(\)"):
            ckpt.load(state, tmp_path / "a", cast=cast)
        assert not any(tensor.any() for tensor in state.values())
    apart = torch.zeros(3, 5, 4)[:, ::2, 1].t()[:2]
    ckpt.load({"w": apart}, tmp_path / "a", cast=cast)
    assert torch.equal(apart, saved.float())


class Fragile:
    """What shows an expanded tensor as its state, and can't be restored."""

    given = None

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def state_dict(self) -> dict[str, object]:
        return {"weights": torch.ones(1).expand(3) if self.error is not None else torch.arange(3.0)}

    def load_state_dict(self, given: dict[str, object]) -> None:
        self.given = given["weights"]
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("another data set"), StateError("another data set")])
def test_what_can_not_be_restored_says_that_tensors_were_overwritten(error: Exception, tmp_path: Path) -> None:
    ckpt.save({"w": torch.ones(2), "data": Fragile()}, tmp_path / "a")
    state = {"w": torch.zeros(2), "data": Fragile(error)}
    with pytest.raises(type(error), match="another data set") as caught:
        ckpt.load(state, tmp_path / "a")
    assert "may have been overwritten" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert state["data"].given.tolist() == [0, 1, 2]  # type: ignore[union-attr]


def test_no_checkpoint_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        ckpt.load({}, tmp_path / "nowhere")
    ckpt.save({"w": torch.zeros(2)}, tmp_path / "run" / "step_5")
    with pytest.raises(CheckpointNotFoundError, match="step_5"):
        ckpt.load({}, tmp_path / "run")
    (tmp_path / "run" / "step_5" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="never committed"):
        ckpt.load({}, tmp_path / "run" / "step_5")


@pytest.mark.parametrize("size", [100, 100_000, 3_000_000])
def test_a_flipped_bit_is_an_error_that_names_file_and_tensor(size: int, tmp_path: Path) -> None:
    ckpt.save({"before": torch.zeros(10), "w": torch.ones(size)}, tmp_path / "a")
    file = the_data_file(tmp_path / "a")
    flip(file, file.stat().st_size - 3)
    with pytest.raises(CorruptionError) as caught:
        ckpt.load({"before": torch.zeros(10), "w": torch.zeros(size)}, tmp_path / "a")
    assert "'w'" in str(caught.value)
    assert file.name in str(caught.value)
    # what is whole still loads
    ckpt.load({"before": torch.ones(10)}, tmp_path / "a")


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    ckpt.save({"w": torch.ones(100_000)}, tmp_path / "a")
    file = the_data_file(tmp_path / "a")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CorruptionError, match="truncated"):
        ckpt.load({"w": torch.zeros(100_000)}, tmp_path / "a")
    file.unlink()
    with pytest.raises(CorruptionError, match=file.name):
        ckpt.load({"w": torch.zeros(100_000)}, tmp_path / "a")


def test_slices_read_only_the_blocks_that_hold_them(tmp_path: Path) -> None:
    rows = torch.arange(4096 * 1024, dtype=torch.float32).reshape(4096, 1024)
    ckpt.save({"w": rows}, tmp_path / "a")
    with open_checkpoint(tmp_path / "a") as checkpoint:
        into = np.empty((10, 1024), np.uint32)
        stats = checkpoint.read([Request("w", Box((2000, 0), (10, 1024)), into)])
        assert stats.bytes_read <= 2 << 20
        assert np.array_equal(into.view(np.float32), rows[2000:2010].numpy())
    with ckpt.open(tmp_path / "a") as checkpoint:
        lazy = checkpoint["w"]
        assert (lazy.shape, str(lazy.dtype)) == ((4096, 1024), "float32")
        for index in [
            (5,),
            (slice(3, 3000, 7), slice(None, None, -5)),
            (..., 3),
            (-1, slice(-9, None)),
            (slice(5, 2),),
            (slice(None), slice(1000, 2000)),
        ]:
            expected = rows.numpy()[index]
            assert np.array_equal(lazy[index].numpy(), expected), index
        with pytest.raises(IndexError, match="out of range"):
            lazy[4096]
        with pytest.raises(IndexError, match="3 indices"):
            lazy[0, 0, 0]


def test_steps_over_a_block_and_more_read_and_keep_only_what_they_pick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(2 * 16 * 2**18, dtype=torch.float32).reshape(2, 16, 2**18)  # rows of 1 MiB
    ckpt.save({"w": rows}, tmp_path / "a")
    read, original = [], Reader.read

    def count(self: Reader, requests: Iterable[Request]) -> ReadStats:
        read.append(original(self, requests))
        return read[-1]

    monkeypatch.setattr(Reader, "read", count)
    with ckpt.open(tmp_path / "a") as checkpoint:
        lazy = checkpoint["w"]
        for index, blocks in [
            ((0, slice(None, None, 15)), 2),
            ((slice(None, None, -1), slice(13, 1, -6), slice(7)), 4),
            ((..., slice(1, 15, 6), slice(None, None, 2**17)), 6),
            ((1, slice(0, 4)), 4),
            ((1, 2, slice(None, None, 3)), 1),
            ((slice(None), slice(None, None, 5), slice(0)), 0),
        ]:
            found = lazy[index]
            assert np.array_equal(found.numpy(), rows.numpy()[index]), index
            assert read[-1].bytes_read <= blocks << 20, index
            assert found.untyped_storage().nbytes() <= 2 * found.nbytes, index


def test_a_tensor_is_indexed_and_made_an_array_as_numpys_are(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7)}
    raw = torch.zeros(2, dtype=torch.uint8).view(torch.bits8)
    ckpt.save({**state, "raw": raw, "one": torch.tensor(3)}, tmp_path / "a")
    for opened in (ckpt.open(tmp_path / "a"), open_checkpoint(tmp_path / "a")):
        with opened as checkpoint:
            assert (np.asarray(checkpoint["n"]), checkpoint["n"][...], checkpoint["n"][()]) == (7, 7, 7)
            lazy = checkpoint["w"]
            assert lazy[np.int64(1), torch.tensor(2)] == 5
            for index in ("w", 1.0, np.ones(2)):
                with pytest.raises(IndexError, match="by integers, slices"):
                    lazy[index]
            assert (checkpoint["one"][()], checkpoint["one"][...], np.asarray(checkpoint["one"])) == (3, 3, 3)
            array = np.asarray(lazy)
            assert (array.dtype, array.tolist()) == (np.dtype(np.float32), state["w"].tolist())
            assert np.array(lazy, dtype=np.int8, copy=True).tolist() == [[0, 1, 2], [3, 4, 5]]
            assert np.asarray(checkpoint["half"]).astype(float).tolist() == [1, 1]
            with pytest.raises(ValueError, match="is a copy"):
                np.array(lazy, copy=False)
            with pytest.raises(TypeError, match=r"numpy has no dtype for the elements of 'raw', bits8"):
                np.asarray(checkpoint["raw"])


def test_a_name_that_is_not_there_suggests_one_that_is(tmp_path: Path) -> None:
    ckpt.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a")
    with (
        ckpt.open(tmp_path / "a") as checkpoint,
        pytest.raises(MissingTensorError, match=r"did you mean 'model\.weight'"),
    ):
        checkpoint["model.wieght"]


def test_a_damaged_first_place_gives_way_to_the_next(tmp_path: Path) -> None:
    """A location map with two copies, each damaged elsewhere, reads as a whole one."""
    state = {"a": torch.randn(700_000), "b": torch.randn(900, 33), "c": torch.randn(5)}
    ckpt.save(state, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    first, second = the_data_file(tmp_path / "a"), the_data_file(tmp_path / "copy")
    # blocks of "a" in turn, then "b" and "c" at the end
    for file, places in ((first, (5000, 2_500_000)), (second, (1_500_000, first.stat().st_size - 1))):
        for place in places:
            flip(file, place)
    checkpoint = open_checkpoint(tmp_path / "a")
    one = checkpoint.locations.places(0)[0]
    other = Places(one.source + 1, one.start, one.length, one.codec)
    both = LocationMap([LocalFile(str(first)), LocalFile(str(second))], ["raw"], lambda _: (one, other))
    into = {name: np.empty(value.shape, np.uint32) for name, value in state.items()}
    requests = [Request(name, Box.whole(array.shape), array) for name, array in into.items()]
    with pytest.raises(CorruptionError):
        checkpoint.read(requests)
    Reader(checkpoint.manifest, both).read(requests)
    for name, value in state.items():
        assert np.array_equal(into[name].view(np.float32), value.numpy()), name
    lost = LocationMap(
        [LocalFile(str(first))], ["raw"], lambda _: (Places(one.source - 1, one.start, one.length, one.codec),)
    )
    with pytest.raises(CorruptionError, match="no place"):
        Reader(checkpoint.manifest, lost).read(requests)
    both.close()


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[object]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]  # noqa: NPY002

    draw()
    ckpt.save({"rng": ckpt.RNG()}, tmp_path / "a")
    expected = draw()
    ckpt.load({"rng": ckpt.RNG()}, tmp_path / "a")
    assert draw() == expected


def test_values_come_back_with_their_types(tmp_path: Path) -> None:
    state = {
        "epoch": 3,
        "lr": 1e-3,
        "order": [1, (2, 3)],
        "best": {"loss": float("inf")},
        "seen": {1, 2},
        "id": b"\0\xff",
    }
    ckpt.save(state, tmp_path / "a")
    target = {"epoch": 0, "lr": 0.0, "order": [], "best": {}, "seen": set(), "id": b""}
    ckpt.load(target, tmp_path / "a")
    assert target == state
    assert type(target["order"][1]) is tuple  # type: ignore[index]


# --- several ranks


def rows_to_columns(rank: int, world_size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(1003 * 997, dtype=torch.float32).reshape(1003, 997)
    ckpt.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, f"{folder}/a")
    dist.barrier()
    for placement in (Shard(1), Shard(0), Replicate()):
        target = distribute_tensor(torch.zeros_like(whole), mesh, [placement])
        ckpt.load({"w": target}, f"{folder}/a")
        assert torch.equal(target.to_local(), distribute_tensor(whole, mesh, [placement]).to_local())


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_load_as_columns(world_size: int, tmp_path: Path) -> None:
    run_ranks(rows_to_columns, world_size, str(tmp_path))


def damaged_for_one_rank(rank: int, world_size: int, folder: str) -> str:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(4000, dtype=torch.float32)
    ckpt.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, f"{folder}/a")
    dist.barrier()
    if rank == 0:
        damaged = next(path for path in Path(folder, "a", "data").iterdir() if path.name.startswith("00001"))
        flip(damaged, damaged.stat().st_size - 1)
    dist.barrier()
    target = distribute_tensor(torch.zeros(4000), mesh, [Shard(0)])
    with pytest.raises((CorruptionError, RankError)) as caught:
        ckpt.load({"w": target}, f"{folder}/a")
    return str(caught.value)


def test_damage_that_one_rank_meets_is_an_error_on_all(tmp_path: Path) -> None:
    for message in run_ranks(damaged_for_one_rank, 2, str(tmp_path)):
        assert "00001-" in message
        assert "checksum" in message


def other_world(rank: int, world_size: int, folder: str) -> tuple[list[str], object]:
    state = {"rng": ckpt.RNG(), "mine": ckpt.PerRank({"seed": 100 + rank}), "epoch": 7}
    if world_size == 2:
        ckpt.save(state, f"{folder}/a")
        return [], None
    with pytest.warns(UserWarning, match="per-rank values of 2 ranks, and there are 3 now: .*: mine"):
        result = ckpt.load(state, f"{folder}/a")
    return list(result.per_rank_skipped), state["epoch"]


def test_per_rank_values_of_another_world_size_are_kept_and_reported(tmp_path: Path) -> None:
    run_ranks(other_world, 2, str(tmp_path))
    for skipped, epoch in run_ranks(other_world, 3, str(tmp_path)):
        assert epoch == 7
        assert skipped == ["mine"]


def test_modules_and_optimizers_in_lists_and_dicts_come_back(tmp_path: Path) -> None:
    def build(seed: int) -> dict[str, object]:
        torch.manual_seed(seed)
        models = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)]
        optimizers = {
            "first": torch.optim.Adam(models[0].parameters(), lr=0.1 + seed),
            "second": torch.optim.SGD(models[1].parameters(), lr=0.2 + seed, momentum=0.9),
        }
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return {"models": models, "optimizers": optimizers}

    state, other = build(0), build(1)
    ckpt.save(state, tmp_path / "a")
    ckpt.load(other, tmp_path / "a")
    for one, two in zip(state["models"], other["models"], strict=True):  # type: ignore[call-overload]
        assert torch.equal(one.weight, two.weight)
    first = other["optimizers"]["first"]  # type: ignore[index]
    assert first.param_groups[0]["lr"] == 0.1
    second = other["optimizers"]["second"]  # type: ignore[index]
    assert second.param_groups[0]["lr"] == 0.2
