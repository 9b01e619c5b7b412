"""`ckpt diff`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt as library
from ckpt.transfer.reshard import reshard
from ckpt_formats.layout import Mesh
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_equal_however_it_is_cut(checkpoint: Path, tmp_path: Path) -> None:
    reshard(checkpoint, tmp_path / "cut", Mesh.parse("dp=3"))
    done = ckpt("diff", checkpoint, tmp_path / "cut")
    assert (done.returncode, done.stderr) == (0, "")
    assert "They are equal: 22 tensors and 5 values." in done.stdout
    assert "No difference, but: A was cut for 1 rank, B for 3 ranks (dp=3)." in done.stdout


def test_what_differs_is_named_and_exit_1(run: Path) -> None:
    done = ckpt("diff", run / "step_00000100", run / "step_00000200")
    assert (done.returncode, done.stderr) == (1, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[2] == "They differ:"
    assert any(line.startswith("model.embed.weight 1,200 of 1,200 elements, at most by ") for line in lines)
    assert not any(line.startswith("big ") for line in lines)
    assert "epoch 3 in A, 4 in B" in lines
    assert "No difference, but: A is of step 100, B of step 200." in lines


def test_json(run: Path) -> None:
    tree = json.loads(ckpt("diff", run / "step_00000100", run / "step_00000200", "--json").stdout)
    assert set(tree) == {
        "a",
        "b",
        "equal",
        "differences",
        "within_tolerance",
        "notes",
        "tensors",
        "values",
        "bytes_compared",
        "seconds",
    }
    differences = {item["name"]: item for item in tree["differences"]}
    assert differences["epoch"] == {
        "subject": "value",
        "name": "epoch",
        "kind": "content",
        "a": "3",
        "b": "4",
        "rank": None,
        "numbers": None,
    }
    numbers = differences["model.embed.weight"]["numbers"]
    assert set(numbers) == {"elements", "differing", "beyond", "max_abs", "max_rel", "where"}
    assert numbers["elements"] == 1200


def save(path: Path, **state: Any) -> Path:
    library.save(state, path)
    return path


def test_a_tolerance(tmp_path: Path) -> None:
    a = save(tmp_path / "a", w=torch.ones(5), v=torch.ones(2))
    b = save(tmp_path / "b", w=torch.ones(5) * 1.01, v=torch.ones(2) * 1.001)
    assert here("diff", a, b).exit_code == 1
    result = here("diff", a, b, "--atol", "0.005")
    assert result.exit_code == 1
    assert "w       5 of 5 elements beyond the tolerance, at most by 0.01 at [0] (relative 0.0099)" in result.stdout
    assert "Within the tolerance: 1 tensor" in result.stdout
    result = here("diff", a, b, "--rtol", "0.1")
    assert result.exit_code == 0
    assert "They are equal within the tolerance: 2 tensors." in result.stdout
    tree = json.loads(here("diff", a, b, "--rtol", "0.1", "--json").stdout)
    assert [item["name"] for item in tree["within_tolerance"]] == ["w", "v"] or len(tree["within_tolerance"]) == 2


def test_infinite_differences_are_json_all_the_same(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", w=torch.tensor([1.0])), save(tmp_path / "b", w=torch.tensor([math.nan]))
    numbers = json.loads(here("diff", a, b, "--json").stdout)["differences"][0]["numbers"]
    assert (numbers["max_abs"], numbers["max_rel"]) == ("inf", "inf")


def test_names_shapes_and_dtypes(tmp_path: Path) -> None:
    a = save(tmp_path / "a", old=torch.zeros(2), s=torch.zeros(2, 3), d=torch.zeros(2))
    b = save(tmp_path / "b", new=torch.zeros(2), s=torch.zeros(3, 2), d=torch.zeros(2).half())
    lines = [" ".join(line.split()) for line in here("diff", a, b).stdout.splitlines()]
    assert "old only in A: float32 [2]" in lines
    assert "new only in B: float32 [2]" in lines
    assert "s shape [2, 3] in A, [3, 2] in B" in lines
    assert "d dtype float32 in A, float16 in B" in lines


def test_only_what_matches(run: Path) -> None:
    a, b = run / "step_00000100", run / "step_00000200"
    assert here("diff", a, b, "--only", "big").exit_code == 0
    assert here("diff", a, b, "--only", "model.*").exit_code == 1
    result = here("diff", a, b, "--only", "nosuch*")
    assert result.exit_code == 2
    assert "nosuch*" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_damage_is_an_error_not_a_difference(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    reshard(checkpoint, tmp_path / "cut", Mesh.parse("dp=3"))
    flip(data_file(checkpoint), 40_000)
    done = ckpt("diff", checkpoint, tmp_path / "cut", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "do not fit their checksum" in done.stderr
