"""Comparing checkpoints: what differs is named, however either is cut, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.transfer.reshard import reshard
from ckpt_formats import diff as module
from ckpt_formats.checkpoint import Checkpoint
from ckpt_formats.diff import Difference, DiffReport, diff
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, MissingTensorError
from ckpt_formats.geometry import Box, check_cover
from ckpt_formats.layout import Layout, Mesh
from ckpt_formats.reading import ReadStats, Request
from tests.ranks import run_ranks


def save(path: Path, state: dict[str, Any]) -> Path:
    ckpt.save(state, path)
    return path


def weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(60, 34, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "n": torch.arange(12).reshape(3, 4),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


CUTS = [("x=7", {"x": 0}), ("x=3", {"x": 1}), ("x=2,y=3", {"x": 0, "y": 1}), ("x=4,y=2", {"x": 1, "y": 1})]


def recut(source: Path, target: Path, mesh: str, dims: dict[str, int]) -> Path:
    """The same checkpoint with tensor `w` cut over a mesh."""
    reshard(source, target, Mesh.parse(mesh), Layout({axis: {"w": dim} for axis, dim in dims.items()}))
    return target


def found(report: DiffReport) -> dict[str, str]:
    return {item.name: item.kind for item in report.differences}


def single(report: DiffReport) -> Difference:
    (difference,) = report.differences
    return difference


# --- tensors


def test_a_checkpoint_is_equal_to_its_twin_and_nothing_is_read(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {**weights(), "epoch": 3})
    b = save(tmp_path / "b", {**weights(), "epoch": 3})
    report = diff(a, b)
    assert report.equal
    assert not report.notes
    assert (report.tensors, report.values, report.bytes_compared) == (5, 1, 0)


@pytest.mark.parametrize(("mesh", "dims"), CUTS)
def test_how_it_is_cut_is_no_difference(tmp_path: Path, mesh: str, dims: dict[str, int]) -> None:
    a = save(tmp_path / "a", weights())
    b = recut(a, tmp_path / "b", mesh, dims)
    report = diff(a, b)
    assert report.equal
    assert report.bytes_compared == 60 * 34 * 4
    assert report.notes == [f"A was cut for 1 rank, B for {Mesh.parse(mesh).size} ranks ({mesh})"]


@pytest.mark.parametrize("batch", [4, 1000, 32 << 20])
@pytest.mark.parametrize(("mesh", "dims"), CUTS)
def test_one_element_that_differs_is_found_at_its_index(
    tmp_path: Path, mesh: str, dims: dict[str, int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    state = weights()
    a = save(tmp_path / "a", state)
    state["w"][41, 20] += 0.5
    b = recut(save(tmp_path / "whole", state), tmp_path / "b", mesh, dims)
    for one, other in ((a, b), (b, a), (a, tmp_path / "whole")):
        difference = single(diff(one, other))
        assert (difference.subject, difference.name, difference.kind) == ("tensor", "w", "content")
        numbers = difference.numbers
        assert numbers is not None
        assert (numbers.elements, numbers.differing, numbers.beyond, numbers.where) == (2040, 1, 1, (41, 20))
        assert numbers.max_abs == pytest.approx(0.5, rel=1e-6)


def test_chunks_with_the_same_checksum_are_not_read_when_others_differ(tmp_path: Path) -> None:
    state = weights()
    a = recut(save(tmp_path / "1", state), tmp_path / "a", "x=6", {"x": 0})
    state["w"][25, 0] += 1
    b = recut(save(tmp_path / "2", state), tmp_path / "b", "x=6", {"x": 0})
    report = diff(a, b)
    assert found(report) == {"w": "content"}
    assert report.bytes_compared == 10 * 34 * 4


def test_elements_are_read_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4096)
    state: dict[str, Any] = {"w": torch.randn(300, 100), **{f"small{k}": torch.randn(9) for k in range(300)}}
    a = save(tmp_path / "a", state)
    b = save(tmp_path / "b", {name: tensor + 1 for name, tensor in state.items()})
    sizes = []
    read = Checkpoint.read

    def recorded(self: Checkpoint, requests: list[Request], *, threads: int | None = None) -> ReadStats:
        sizes.append(sum(request.into.nbytes for request in requests))
        return read(self, requests, threads=threads)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    assert len(diff(a, b).differences) == 301
    assert max(sizes) <= 4096
    # full ones, not one for each tensor
    assert len(sizes) < 2 * 1.3 * (300 * 100 + 300 * 9) * 4 / 4096


def test_names_that_only_one_has(tmp_path: Path) -> None:
    state = weights()
    a = save(tmp_path / "a", {**state, "old": torch.zeros(2)})
    b = save(tmp_path / "b", {**state, "new": torch.zeros(2, 3, dtype=torch.int8)})
    tensors = {item.name: item for item in diff(a, b).differences if item.subject == "tensor"}
    assert (tensors["old"].kind, tensors["old"].a, tensors["old"].b) == ("only_a", "float32 [2]", None)
    assert (tensors["new"].kind, tensors["new"].a, tensors["new"].b) == ("only_b", None, "int8 [2, 3]")
    entries = {item.name: item.kind for item in diff(a, b).differences if item.subject == "entry"}
    assert entries == {"old": "only_a", "new": "only_b"}


def test_shapes_and_dtypes(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {"s": torch.zeros(2, 3), "d": torch.zeros(2), "both": torch.zeros(1)})
    b = save(tmp_path / "b", {"s": torch.zeros(3, 2), "d": torch.zeros(2).double(), "both": torch.zeros(2).int()})
    differences = {(item.name, item.kind): (item.a, item.b) for item in diff(a, b).differences}
    assert differences == {
        ("s", "shape"): ("[2, 3]", "[3, 2]"),
        ("d", "dtype"): ("float32", "float64"),
        ("both", "shape"): ("[1]", "[2]"),
        ("both", "dtype"): ("float32", "int32"),
    }


def test_equal_as_numbers_but_not_in_bits(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {"w": torch.tensor([0.0, 1.0, math.nan])})
    b = save(tmp_path / "b", {"w": torch.tensor([-0.0, 1.0, -math.nan])})
    numbers = single(diff(a, b)).numbers
    assert numbers is not None
    assert (numbers.differing, numbers.max_abs) == (2, 0.0)
    report = diff(a, b, atol=1e-9)
    assert report.equal
    assert [item.name for item in report.close] == ["w"]


def test_a_tolerance_is_the_one_of_numpy_isclose(tmp_path: Path) -> None:
    state = {"w": torch.tensor([1.0, 100.0, 0.0, math.inf, math.nan])}
    a = save(tmp_path / "a", state)
    b = save(tmp_path / "b", {"w": torch.tensor([1.001, 100.2, 1e-9, math.inf, math.nan])})
    report = diff(a, b, rtol=1e-3, atol=1e-8)
    numbers = single(report).numbers
    assert numbers is not None
    assert (numbers.differing, numbers.beyond, numbers.where) == (3, 1, (1,))
    assert numbers.max_abs == pytest.approx(0.2, rel=1e-4)
    assert numbers.max_rel == pytest.approx(1.0)
    report = diff(a, b, rtol=1e-2, atol=1e-8)
    assert report.equal
    assert single_close(report).max_abs == pytest.approx(0.2, rel=1e-4)


def single_close(report: DiffReport) -> Any:
    (close,) = report.close
    return close.numbers


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tmp_path: Path, tolerance: float) -> None:
    a = save(tmp_path / "a", weights())
    with pytest.raises(ValueError, match="tolerance"):
        diff(a, a, atol=tolerance)


class Tied(torch.nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(15.0).reshape(5, 3))
            self.head.weight.copy_(self.embed.weight)
        if tied:
            self.head.weight = self.embed.weight


def test_ties(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {"model": Tied(tied=True)})
    b = save(tmp_path / "b", {"model": Tied(tied=False)})
    assert diff(a, a).equal
    assert diff(a, a).tensors == 2
    difference = single(diff(a, b))
    assert (difference.kind, difference.name) == ("tie", "model.head.weight")
    assert (difference.a, difference.b) == ("tied to model.embed.weight", "not tied")


def test_a_tied_tensor_that_differs_is_told_once(tmp_path: Path) -> None:
    one, other = Tied(tied=True), Tied(tied=True)
    with torch.no_grad():
        other.embed.weight[2, 1] = 100
    report = diff(save(tmp_path / "a", {"model": one}), save(tmp_path / "b", {"model": other}))
    assert found(report) == {"model.embed.weight": "content"}


# --- plain values


def places(report: DiffReport) -> dict[str, tuple[str, str | None, str | None]]:
    return {item.name: (item.kind, item.a, item.b) for item in report.differences if item.subject == "value"}


def test_values_are_told_by_path_down_to_where_they_differ(tmp_path: Path) -> None:
    a = {"c": {"lr": 0.1, "betas": (0.9, 0.95), "names": ["x", "y"], 3: "three", "same": {1, 2}}, "epoch": 3}
    b = {"c": {"lr": 0.2, "betas": (0.9, 0.99), "names": ["x"], 3: "drei", "same": {2, 1}, "$new": None}, "epoch": 3.0}
    report = diff(save(tmp_path / "a", a), save(tmp_path / "b", b))
    assert places(report) == {
        'c["lr"]': ("content", "0.1", "0.2"),
        'c["betas"][1]': ("content", "0.95", "0.99"),
        'c["names"][1]': ("only_a", "'y'", None),
        "c[3]": ("content", "'three'", "'drei'"),
        'c["$new"]': ("only_b", None, "None"),
        "epoch": ("content", "3", "3.0"),
    }


def test_values_of_other_kinds(tmp_path: Path) -> None:
    big = np.arange(5000)
    other = big.copy()
    other[77] = 0
    a = {"kind": [1], "array": big, "order": {"a": 1, "b": 2}, "nan": math.nan, "dtype": torch.bfloat16}
    b = {"kind": (1,), "array": other, "order": {"b": 2, "a": 1}, "nan": math.nan, "dtype": torch.float16}
    assert places(diff(save(tmp_path / "a", a), save(tmp_path / "b", b))) == {
        "kind": ("content", "[1]", "(1,)"),
        "array": ("content", "<array of int64 [5000]>", "<array of int64 [5000]>"),
        "dtype": ("content", repr(torch.bfloat16), repr(torch.float16)),
    }


def _save_own(rank: int, world_size: int, folder: str) -> None:
    own = {"seen": 10 * rank, "of": world_size}
    ckpt.save({"w": torch.zeros(3), "sampler": ckpt.PerRank(own)}, f"{folder}/{world_size}")
    own["seen"] += rank
    ckpt.save({"w": torch.zeros(3), "sampler": ckpt.PerRank(own)}, f"{folder}/{world_size}b")


def test_values_that_each_rank_has_of_its_own(tmp_path: Path) -> None:
    for world_size in (2, 3):
        run_ranks(_save_own, world_size, str(tmp_path))
    difference = single(diff(tmp_path / "2", tmp_path / "2b"))
    assert (difference.name, difference.rank) == ("sampler['seen']", 1)
    assert (difference.a, difference.b) == ("10", "11")
    differences = [(item.name, item.kind, item.rank) for item in diff(tmp_path / "2", tmp_path / "3").differences]
    assert ("sampler", "only_b", 2) in differences
    assert ("sampler['of']", "content", 0) in differences


# --- the rest


def test_a_pattern_limits_tensors_and_values(tmp_path: Path) -> None:
    state = {**weights(), "config": {"lr": 1}}
    a = save(tmp_path / "a", state)
    b = save(tmp_path / "b", {**state, "w": state["w"] + 1, "b": state["b"] + 1, "config": {"lr": 2}})
    assert found(diff(a, b, pattern="b")) == {"b": "content"}
    assert found(diff(a, b, pattern="[bw]")) == {"b": "content", "w": "content"}
    assert found(diff(a, b, pattern="conf*")) == {"config['lr']": "content"}
    assert diff(a, b, pattern="scal*").equal
    with pytest.raises(MissingTensorError, match="nothing\\*"):
        diff(a, b, pattern="nothing*")


def test_the_step_is_told_but_is_no_difference(tmp_path: Path) -> None:
    a, b = save(tmp_path / "step_1", weights()), save(tmp_path / "b", weights())
    report = diff(a, b)
    assert report.equal
    assert report.notes == ["A is of step 1, B of step none"]


def test_damage_where_bytes_have_to_be_read_is_an_error(tmp_path: Path) -> None:
    a = save(tmp_path / "a", weights())
    b = recut(a, tmp_path / "b", "x=3", {"x": 1})
    (data,) = (a / "data").iterdir()
    data.write_bytes(data.read_bytes()[:-200] + bytes(200))
    with pytest.raises(CorruptionError, match="'w'"):
        diff(a, b)
    with pytest.raises(CheckpointNotFoundError):
        diff(a, tmp_path / "nowhere")


def test_progress_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 1000)
    a = save(tmp_path / "a", weights())
    b = recut(a, tmp_path / "b", "x=3", {"x": 1})
    told: list[tuple[int, int]] = []
    diff(a, b, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (8160, 8160)
    assert len(told) > 5


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    offsets=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    limit=st.integers(1, 60),
)
def test_parts_cover_a_box_and_none_is_longer_than_the_limit(sizes: list[int], offsets: list[int], limit: int) -> None:
    box = Box(tuple(offsets[: len(sizes)]), tuple(sizes))
    parts = list(module._parts(box, limit))
    assert all(part.numel <= limit for part in parts)
    moved = [part.relative_to(box.offsets) for part in parts]
    check_cover(box.sizes, np.array([part.offsets for part in moved]), np.array([part.sizes for part in moved]))
