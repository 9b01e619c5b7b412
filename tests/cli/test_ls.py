"""`ckpt ls`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_checkpoints_of_a_run_by_step(run: Path) -> None:
    done = ckpt("ls", run)
    assert (done.returncode, done.stderr) == (0, "")
    title, *rows = done.stdout.splitlines()
    assert title.split() == ["checkpoint", "step", "size", "tensors", "saved", "by", "state"]
    assert [row.split()[0] for row in rows] == ["step_00000100", "step_00000200"]
    for row in rows:
        assert row.endswith("1 rank  whole")


def test_what_is_not_whole_is_told_apart(run: Path) -> None:
    data_file(run / "step_00000100").unlink()
    flip(run / "step_00000200/manifest.json", 50)
    for name in ("data", "index"):
        (run / "step_00000300" / name).mkdir(parents=True)
    result = here("ls", run)
    assert result.exit_code == 0
    states = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("step_")}
    assert "step_00000100: 1 of 2 files missing" in result.stdout
    assert states["step_00000300"].endswith("not committed")
    assert "does not fit its own checksum" in result.stdout
    rows = json.loads(here("ls", run, "--json").stdout)["checkpoints"]
    # a damaged root has no step to say, so its folder's name does
    assert {row["step"]: row["state"] for row in rows} == {100: "partial", 200: "damaged", 300: "not committed"}


def test_a_checkpoint_lists_itself(checkpoint: Path) -> None:
    result = here("ls", checkpoint)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    result = here("ls", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path} holds no checkpoints.\n")
    assert json.loads(here("ls", tmp_path, "--json").stdout) == {"path": str(tmp_path), "checkpoints": []}


def test_json(run: Path) -> None:
    tree = json.loads(ckpt("ls", run, "--json").stdout)
    first = tree["checkpoints"][0]
    assert set(first) == {
        "path",
        "state",
        "problem",
        "step",
        "bytes",
        "tensors",
        "created",
        "world_size",
        "by",
    }
    assert (first["step"], first["state"], first["tensors"], first["world_size"]) == (100, "whole", 21, 1)
    assert first["created"].endswith("+00:00")
