"""What a save promises: committed or absent, nothing overwritten, nothing changed, clear refusals on every rank."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

import ckpt
import ckpt.saving.save as saving
from ckpt_formats.dtypes import DTYPES
from ckpt_formats.errors import (
    CheckpointExistsError,
    CoverageError,
    RankError,
    SaveFailedError,
    StateError,
    UnsupportedValueError,
    ValuesDifferError,
)
from tests.ranks import run_ranks


def test_the_result_says_what_was_done(tmp_path: Path) -> None:
    result = ckpt.save({"w": torch.arange(10.0)}, tmp_path / "run" / "step_00000120")
    assert result.path == str(tmp_path / "run" / "step_00000120")
    assert result.step == 120
    assert result.bytes == 40
    assert set(result.phases) == {"describe", "plan", "write", "commit"}
    assert 0 < sum(result.phases.values()) <= result.seconds


def test_an_existing_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    ckpt.save({"w": torch.zeros(3)}, tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointExistsError, match="never overwritten"):
        ckpt.save({"w": torch.ones(3)}, tmp_path / "a")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_a_refused_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match=r"hook"):
        ckpt.save({"w": torch.zeros(3), "hook": {"f": print}}, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_can_not_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((SaveFailedError, OSError)):
        ckpt.save({"w": torch.zeros(3)}, tmp_path / "file" / "a")


def test_data_files_open_with_plain_safetensors(tmp_path: Path) -> None:
    state = {"model": torch.nn.Linear(4, 3), "half": torch.randn(7).half(), "list": [1, 2]}
    ckpt.save(state, tmp_path / "a")
    (file,) = (tmp_path / "a" / "data").iterdir()
    with safe_open(file, framework="pt") as stored:
        assert torch.equal(stored.get_tensor("model.weight"), state["model"].weight)  # type: ignore[attr-defined]
        assert torch.equal(stored.get_tensor("half"), state["half"])  # type: ignore[arg-type]
    (page,) = (tmp_path / "a" / "index").iterdir()
    with safe_open(page, framework="pt") as index:
        assert index.get_tensor("offset").shape == (3, 2)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    size = DTYPES[name].itemsize
    raw = torch.randint(0, 2 if name == "bool" else 256, (6 * 5 * size,), dtype=torch.uint8)
    tensor = (raw if name == "uint8" else raw.view(dtype)).reshape(6, 5)
    bits = raw.numpy().reshape(6, 5, size)
    state = {"t": tensor, "scalar": tensor[0, 0], "empty": tensor[:0], "columns": tensor[:, 1:4]}
    expected = {"t": bits, "scalar": bits[0, 0], "empty": bits[:0], "columns": bits[:, 1:4]}
    ckpt.save(state, tmp_path / "a")
    with ckpt.open(tmp_path / "a") as checkpoint:
        for key, value in state.items():
            read = checkpoint[key][...]
            assert read.dtype == dtype
            assert read.shape == value.shape
            assert bytes(read.untyped_storage()) == expected[key].tobytes()


def test_strided_transposed_expanded_and_conjugated_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.randn(300, 500)
    state = {
        "transposed": base.t(),
        "steps": base[::3, 1::7],
        "expanded": torch.randn(1, 9).expand(5, 9),
        "conjugated": torch.randn(4, 4, dtype=torch.complex64).conj(),
        "channels_last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    }
    ckpt.save(state, tmp_path / "a")
    with ckpt.open(tmp_path / "a") as checkpoint:
        for key, value in state.items():
            assert torch.equal(checkpoint[key][...], value), key


def test_tied_parameters_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    def build() -> torch.nn.ModuleDict:
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 8), "head": torch.nn.Linear(8, 50, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model = build()
    result = ckpt.save({"model": model}, tmp_path / "a")
    assert result.bytes == 50 * 8 * 4
    other = build()
    ckpt.load({"model": other}, tmp_path / "a")
    assert other["head"].weight is other["embed"].weight
    assert torch.equal(other["head"].weight, model["head"].weight)  # type: ignore[arg-type]
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["model.head.weight"][:], model["embed"].weight)  # type: ignore[arg-type]


def test_a_tensor_larger_than_every_buffer_goes_through(tmp_path: Path) -> None:
    # 40 MiB in rows that no block or buffer is a multiple of, contiguous and not
    big = torch.arange(10_000_019, dtype=torch.int32)
    wide = torch.arange(3 * 1_000_003, dtype=torch.int32).reshape(3, -1).t()
    ckpt.save({"big": big, "wide": wide}, tmp_path / "a")
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["big"][...], big)
        assert torch.equal(checkpoint["wide"][...], wide)
        assert torch.equal(checkpoint["big"][5_000_000:5_000_005], big[5_000_000:5_000_005])


def test_names_that_can_not_be_stored_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="valid Unicode"):
        ckpt.save({"\ud800": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(StateError, match="__ckpt__"):
        ckpt.save({"__ckpt__.x": torch.zeros(2)}, tmp_path / "a")


def test_names_that_look_like_chunks_are_kept_apart(tmp_path: Path) -> None:
    state = {"a": torch.zeros(4), "a[0:4]": torch.ones(4), "__pad__.0": torch.full((3,), 2.0), "é/ü 名": torch.zeros(1)}
    ckpt.save(state, tmp_path / "a")
    with ckpt.open(tmp_path / "a") as checkpoint:
        for name, value in state.items():
            assert torch.equal(checkpoint[name][:], value)


# --- several ranks


def differing_values(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(ValuesDifferError) as caught:
        ckpt.save({"w": torch.zeros(2), "sampler": {"seed": 1, "order": [1, 2, rank]}}, f"{folder}/a")
    return str(caught.value)


def test_values_that_differ_between_ranks_are_refused_by_path(tmp_path: Path) -> None:
    for message in run_ranks(differing_values, 2, str(tmp_path)):
        assert "sampler" in message
        assert "[2]" in message
        assert "PerRank" in message
    assert os.listdir(tmp_path) == []


def one_rank_fails(rank: int, world_size: int, folder: str) -> str:
    state = {"w": torch.zeros(2), "x": ckpt.PerRank(print if rank == 1 else 0)}
    with pytest.raises(UnsupportedValueError) as caught:
        ckpt.save(state, f"{folder}/a")
    # the same state without the culprit: the ranks are still in step
    ckpt.save({"w": torch.zeros(2)}, f"{folder}/b")
    return str(caught.value)


def test_a_failure_on_one_rank_is_an_error_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    first, second = run_ranks(one_rank_fails, 2, str(tmp_path))
    assert "rank 1" in first
    assert "x" in second
    assert os.listdir(tmp_path) == ["b"]


def different_paths(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(StateError) as caught:
        ckpt.save({"w": torch.zeros(2)}, f"{folder}/{rank}")
    return str(caught.value)


def test_ranks_that_save_to_different_paths_are_told(tmp_path: Path) -> None:
    for message in run_ranks(different_paths, 2, str(tmp_path)):
        assert "same path" in message


def holes_and_overlaps(rank: int, world_size: int, folder: str) -> list[str]:
    messages = []
    for offset in (rank * 3, rank):
        with pytest.raises(CoverageError) as caught:
            ckpt.save({"w": ckpt.Shard(torch.zeros(2), (5,), (min(offset, 3),))}, f"{folder}/a")
        messages.append(str(caught.value))
    return messages


def test_shards_cut_by_hand_must_cover_their_tensor(tmp_path: Path) -> None:
    for hole, overlap in run_ranks(holes_and_overlaps, 2, str(tmp_path)):
        assert "'w'" in hole
        assert "[2:3]" in hole
        assert "'w'" in overlap


def shapes_differ(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(StateError) as caught:
        ckpt.save({"w": torch.zeros(2 + rank)}, f"{folder}/a")
    return str(caught.value)


def test_a_tensor_of_two_shapes_is_refused_by_name(tmp_path: Path) -> None:
    for message in run_ranks(shapes_differ, 2, str(tmp_path)):
        assert "'w'" in message
        assert "rank 1" in message


def balanced(rank: int, world_size: int, folder: str) -> list[int]:
    state = {f"w{k}": torch.full((1 << 20,), float(k)) for k in range(6)}
    state["huge"] = torch.arange(24 << 20, dtype=torch.int32).float()
    ckpt.save(state, f"{folder}/a")
    dist.barrier()
    loaded = {name: torch.empty_like(value) for name, value in state.items()}
    ckpt.load(loaded, f"{folder}/a")  # type: ignore[arg-type]
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    return [path.stat().st_size for path in sorted(Path(folder, "a", "data").iterdir())]


def test_replicated_state_is_written_in_equal_shares(tmp_path: Path) -> None:
    sizes = run_ranks(balanced, 4, str(tmp_path), timeout=120)[0]
    assert len(sizes) == 4
    assert max(sizes) <= 1.2 * min(sizes)


def stages(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(rank)
    model = torch.nn.ModuleDict({f"layer{rank}": torch.nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ckpt.save({"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "me": ckpt.PerRank(rank)}, f"{folder}/a")
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "me": ckpt.PerRank(-1)}
    ckpt.load(state, f"{folder}/a")
    assert state["me"].value == rank  # type: ignore[attr-defined]


def test_ranks_with_different_parts_of_a_model_make_one_checkpoint(tmp_path: Path) -> None:
    run_ranks(stages, 2, str(tmp_path))
    model = torch.nn.ModuleDict({f"layer{k}": torch.nn.Linear(4, 4) for k in range(2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    ckpt.load(state, tmp_path / "a")
    for rank in range(2):
        torch.manual_seed(rank)
        expected = torch.nn.Linear(4, 4)
        assert torch.equal(model[f"layer{rank}"].weight, expected.weight - 0.1)  # type: ignore[operator, arg-type]
    assert len(optimizer.state) == 4


def killed_elsewhere(rank: int, world_size: int, folder: str) -> None:
    with pytest.raises((RankError, SaveFailedError)):
        ckpt.save({"w": torch.zeros(2)}, f"{folder}/file/a")


def test_a_place_that_can_not_be_written_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_ranks(killed_elsewhere, 2, str(tmp_path))


def test_threads_may_save_at_once(tmp_path: Path) -> None:
    states = [{"w": torch.full((9 << 20,), float(k))} for k in range(6)]
    with ThreadPoolExecutor(len(states)) as pool:
        saves = [pool.submit(ckpt.save, state, tmp_path / str(k)) for k, state in enumerate(states)]
        for save in saves:
            save.result(timeout=60)
    for k in range(len(states)):
        with ckpt.open(tmp_path / str(k)) as checkpoint:
            assert checkpoint["w"][-1].item() == k


def unreadable_on_one_rank(rank: int, world_size: int, folder: str) -> str:
    if rank == 1:
        saving.TensorSource = broken_source  # type: ignore[assignment, misc]
    with pytest.raises(RuntimeError, match="no such memory") as caught:
        ckpt.save({"w": torch.zeros(2), "v": ckpt.Shard(torch.zeros(1), (2,), (rank,))}, f"{folder}/a")
    return str(caught.value)


def broken_source(tensor: torch.Tensor) -> None:
    raise RuntimeError("no such memory")


def test_memory_that_one_rank_can_not_read_is_an_error_on_all_at_once(tmp_path: Path) -> None:
    first, _ = run_ranks(unreadable_on_one_rank, 2, str(tmp_path), timeout=30)
    assert "rank 1" in first
    assert os.listdir(tmp_path) == []
