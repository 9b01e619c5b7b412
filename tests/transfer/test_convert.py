"""What a converted checkpoint promises: the chosen tensors, by the chosen names, cast as torch casts, whole or not."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ckpt
from ckpt.storage.files import Files
from ckpt.transfer.export import export
from ckpt.transfer.reshard import reshard
from ckpt_formats.errors import (
    CheckpointExistsError,
    CorruptionError,
    DtypeMismatchError,
    MissingTensorError,
    RenameError,
    SaveFailedError,
    UnknownDtypeError,
    UnsupportedValueError,
)
from ckpt_formats.layout import Mesh
from ckpt_formats.verify import verify
from tests.ranks import run_ranks

ONE = Mesh.parse("dp=1")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(33, 65)
        self.head = torch.nn.Linear(65, 33, bias=False)
        self.tied = torch.nn.Linear(65, 33, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("count", torch.tensor([3, 70000]))
        self.temperature = torch.nn.Parameter(torch.tensor(0.1))


def saved(path: Path) -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for slots in optimizer.state.values():
        slots["step"].fill_(1001)
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "long": b"x" * 9999, "epoch": 3}
    ckpt.save(state, path, step=5)
    return model, optimizer


def test_a_dtype_for_all_is_for_floats_but_not_for_counts_of_steps(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "a")
    reshard(tmp_path / "a", tmp_path / "b", Mesh.parse("dp=3"), dtype="bfloat16")
    assert verify(tmp_path / "b").intact
    with ckpt.open(tmp_path / "b") as checkpoint:
        for name, tensor in model.state_dict().items():
            expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            found = checkpoint[f"model.{name}"][...]
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
        assert checkpoint["optimizer.state.up.weight.step"][...] == 1001
        assert checkpoint["optimizer.state.up.weight.exp_avg"].dtype.name == "bfloat16"
        assert checkpoint.values["epoch"] == 3
        assert checkpoint.step == 5
    other = Model().to(torch.bfloat16)
    own = torch.optim.AdamW(other.parameters())
    ckpt.load({"model": other, "optimizer": own}, tmp_path / "b")
    slot = own.state[other.up.weight]["exp_avg"]
    assert torch.equal(slot, optimizer.state[model.up.weight]["exp_avg"].bfloat16())


def test_what_is_selected_loads_as_what_it_was(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a")
    reshard(
        tmp_path / "a", tmp_path / "b", ONE, select=["model.*", "epoch"], rename={"model.up": "part", "model": "net"}
    )
    assert verify(tmp_path / "b").intact
    up = torch.nn.Linear(33, 65)
    state: dict[str, Any] = {"part": up, "epoch": 0}
    ckpt.load(state, tmp_path / "b")
    assert torch.equal(up.weight, model.up.weight)
    assert state["epoch"] == 3
    with ckpt.open(tmp_path / "b") as checkpoint:
        names = {"part.weight", "part.bias", "net.head.weight", "net.tied.weight", "net.count", "net.temperature"}
        assert set(checkpoint.tensors) == names
        assert not [name for name in checkpoint.manifest.tensors if name.startswith("__ckpt__")]
        assert set(checkpoint.manifest.entries) == {"part", "net", "epoch"}


def test_a_tied_tensor_is_selected_by_its_second_name(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a")
    reshard(tmp_path / "a", tmp_path / "b", ONE, select=["model.tied.*", "long"])
    with ckpt.open(tmp_path / "b") as checkpoint:
        assert set(checkpoint.tensors) == {"model.tied.weight"}
        assert torch.equal(checkpoint["model.tied.weight"][...], model.head.weight)
        assert checkpoint.values == {"long": b"x" * 9999}


def _own(rank: int, world_size: int, folder: str, what: str) -> int:
    if what == "save":
        ckpt.save({"own": ckpt.PerRank({"n": 10 + rank}), "rng": ckpt.RNG()}, f"{folder}/a")
        return 0
    state = {"mine": ckpt.PerRank({"n": 0})}
    ckpt.load(state, f"{folder}/b")
    return int(state["mine"].value["n"])


def test_what_ranks_have_of_their_own_is_written_under_its_new_name(tmp_path: Path) -> None:
    run_ranks(_own, 2, str(tmp_path), "save")
    reshard(tmp_path / "a", tmp_path / "b", ONE, select=["own"], rename={"own": "mine"})
    assert verify(tmp_path / "b").intact
    assert run_ranks(_own, 2, str(tmp_path), "load") == [10, 11]


@pytest.mark.parametrize("shard", [2**40, 9000, 1])
def test_exported_files_are_read_by_the_safetensors_library(shard: int, tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a")
    done = export(
        tmp_path / "a", tmp_path / "out", select=["model.*"], rename={"model.*": "*"}, dtype="float16", shard=shard
    )
    found: dict[str, torch.Tensor] = {}
    for name in done.files:
        some = load_file(tmp_path / "out" / name)
        assert len(some) == 1 or sum(t.nbytes for t in some.values()) <= shard
        found |= some
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    expected = {
        n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items() if n != "tied.weight"
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert done.left_out == ["tied.weight"]
    assert done.bytes == sum(t.nbytes for t in found.values())
    index = tmp_path / "out" / "model.safetensors.index.json"
    if len(done.files) == 1:
        assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    else:
        tree = json.loads(index.read_text())
        assert tree["metadata"]["total_size"] == done.bytes
        assert {name: tree["weight_map"][name] for name in expected} == tree["weight_map"]
        assert sorted(set(tree["weight_map"].values())) == sorted(done.files)
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_casts_round_as_torch_does_whatever_the_bits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    source = torch.cat(
        [bits.view(torch.float32), torch.tensor([1.0009765625, 1.00341796875, 65519.9, 65520.0, 3.4e38])]
    )
    ckpt.save({"w": source}, tmp_path / "a")
    for kind in ("bfloat16", "float16", "float8_e4m3fn", "float64"):
        done = export(tmp_path / "a", tmp_path / kind, dtype=kind)
        found = load_file(tmp_path / kind / "model.safetensors")["w"]
        expected = source.to(getattr(torch, kind))
        raw = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[found.element_size()]
        assert torch.equal(found.view(raw), expected.view(raw))
        assert list(done.overflowed) == ([] if kind == "float64" else ["w"])


def test_complex_numbers_become_narrower_as_floats_do(tmp_path: Path) -> None:
    source = torch.tensor([1 + 2j, 0.1 - 1e300j, float("inf")], dtype=torch.complex128)
    ckpt.save({"z": source, "f": torch.tensor([0.5])}, tmp_path / "a")
    done = export(tmp_path / "a", tmp_path / "out", dtype={"*": "complex64"})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["z"], source.to(torch.complex64))
    assert torch.equal(found["f"], torch.tensor([0.5 + 0j]))
    assert list(done.overflowed) == ["z"]


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        ("int8", DtypeMismatchError, "no floating-point dtype"),
        ("bf16", UnknownDtypeError, "bf16"),
        (
            {"model.count": "int16"},
            DtypeMismatchError,
            "'model.count' is int64, not all of whose values there are in int16",
        ),
        ({"model.*": "float32"}, DtypeMismatchError, "'model.count' is int64, not all"),
        ({"model.up.*": "int64"}, DtypeMismatchError, "'model.up.bias' is float32, not all"),
        ({"modle.*": "float16"}, MissingTensorError, "matches 'modle"),
    ],
)
def test_dtypes_that_would_lose_what_nobody_said_may_be_lost_are_refused(
    dtype: str | Mapping[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "a")
    with pytest.raises(error, match=message):
        reshard(tmp_path / "a", tmp_path / "b", ONE, dtype=dtype)
    with pytest.raises(error, match=message):
        export(tmp_path / "a", tmp_path / "c", dtype=dtype)
    assert os.listdir(tmp_path) == ["a"]


def test_dtypes_by_pattern_are_for_what_matches_first(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a")
    casts = {"*.bias": "float64", "model.up.*": "bfloat16", "model.count": "float64"}
    export(tmp_path / "a", tmp_path / "b", select=["model.*"], dtype=casts)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["model.up.bias"], model.up.bias.double())
    assert torch.equal(found["model.up.weight"], model.up.weight.bfloat16())
    assert found["model.count"].tolist() == [3.0, 70000.0]
    assert found["model.head.weight"].dtype == torch.float32


def test_what_can_not_be_exported_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    ckpt.save({"z": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "z")
    ckpt.save({"n": 5}, tmp_path / "n")
    with pytest.raises(UnsupportedValueError, match="'z' is complex128, which safetensors files can't say"):
        export(tmp_path / "z", tmp_path / "out")
    with pytest.raises(MissingTensorError, match="no tensors that could be written"):
        export(tmp_path / "n", tmp_path / "out")
    with pytest.raises(MissingTensorError, match="matches 'nothing"):
        export(tmp_path / "a", tmp_path / "out", select=["nothing.*"])
    with pytest.raises(RenameError, match="renames nothing"):
        export(tmp_path / "a", tmp_path / "out", select=["model.*"], rename={"optimizer": "opt"})
    (file,) = (tmp_path / "a" / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match="checksum"):
        export(tmp_path / "a", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "n", "z"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointExistsError, match="nothing is overwritten"):
        export(tmp_path / "a", tmp_path / "out")


def test_a_disk_that_fails_leaves_nothing_of_an_export(tmp_path: Path) -> None:
    saved(tmp_path / "a")

    class Full(Files):
        def rename(self, source: str, target: str) -> None:  # noqa: ARG002 - Files' signature
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveFailedError, match="No space left on device"):
        export(tmp_path / "a", tmp_path / "new" / "out", files=Full())
    assert os.listdir(tmp_path) == ["a"]


def _peak_of_export(rank: int, world_size: int, folder: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(f"{folder}/a", f"{folder}/b", dtype="bfloat16", shard=64 << 20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def test_an_export_takes_bounded_memory(tmp_path: Path) -> None:
    ckpt.save({f"w{k}": torch.randn(24 << 20) for k in range(4)}, tmp_path / "a")  # 384 MiB
    (extra,) = run_ranks(_peak_of_export, 1, str(tmp_path))
    # buffers of reading, of the window and of writing, and half as much again
    assert extra < 160 << 20
