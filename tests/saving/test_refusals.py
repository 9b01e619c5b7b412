"""What a save accepts can be opened again; what could not be is refused, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt_formats.errors import StateError
from ckpt_formats.native import root
from tests.ranks import run_ranks


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, True, "3"])
def test_step_that_is_none_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(StateError, match="is no training step"):
        ckpt.save({"x": torch.ones(2)}, tmp_path / "a", step=step)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("folder", "given", "stored"),
    [
        ("step_00000012", None, 12),
        ("step_12", 7, 7),
        ("x", np.int64(9), 9),
        ("x", 2**63 - 1, 2**63 - 1),
        ("x", None, None),
        ("step_" + "9" * 30, None, None),
    ],
)
def test_step_comes_from_the_caller_or_the_folder(tmp_path: Path, folder: str, given: Any, stored: int | None) -> None:
    result = ckpt.save({"x": torch.ones(2)}, tmp_path / folder, step=given)
    with ckpt.open(tmp_path / folder) as checkpoint:
        assert result.step == checkpoint.step == stored


def test_empty_tensor_of_an_overflowing_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"'x' has the shape .* overflows"):
        ckpt.save({"x": torch.empty(2**62, 0, 8)}, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_manifest_that_no_reader_would_take_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "MAX_SIZE", 20_000)
    with pytest.raises(StateError, match=r"the manifest would have .* numpy arrays"):
        ckpt.save({"x": list(range(10_000))}, tmp_path / "a")
    assert not os.listdir(tmp_path)
    ckpt.save({"x": np.arange(10_000)}, tmp_path / "a")
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert np.array_equal(checkpoint.values["x"], np.arange(10_000))


def _tie(rank: int, world_size: int, folder: str, how: str) -> str:
    shared = torch.ones(3)
    states = {
        "one rank has the second alone": [{"a": shared, "b": shared}, {"b": shared}],
        "in another order": [{"a": shared, "b": shared}, {"b": shared, "a": shared}],
        "in a chain": [{"a": shared, "b": shared}, {"b": shared, "c": shared}],
        "one rank has the first alone": [{"a": shared, "b": shared}, {"a": shared}],
    }
    try:
        ckpt.save({"m": states[how][rank]}, folder)
    except StateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["one rank has the second alone", "in another order", "in a chain"])
def test_tensors_tied_differently_on_two_ranks_are_refused_on_both(tmp_path: Path, how: str) -> None:
    messages = run_ranks(_tie, 2, str(tmp_path / "a"), how)
    assert all("'m.b' is tied to 'm.a' on one rank" in message for message in messages)
    assert not os.listdir(tmp_path)


def test_tie_that_one_rank_knows_alone_is_kept(tmp_path: Path) -> None:
    assert run_ranks(_tie, 2, str(tmp_path / "a"), "one rank has the first alone") == ["", ""]
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["m.b"][:], torch.ones(3))


def _steps(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(StateError) as caught:
        ckpt.save({"x": torch.ones(2)}, folder, step=rank)
    return str(caught.value)


def test_ranks_that_save_different_steps_are_told(tmp_path: Path) -> None:
    messages = run_ranks(_steps, 2, str(tmp_path / "a"))
    assert all("rank 1 saves step 1 but rank 0 step 0" in message for message in messages)
    assert not os.listdir(tmp_path)
