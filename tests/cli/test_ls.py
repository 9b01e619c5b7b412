"""`ckpt ls`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ckpt
from ckpt.levels.record import write_levels
from tests.cli.command import ckpt as command
from tests.cli.command import here
from tests.cli.conftest import data_file, flip


def test_checkpoints_of_a_run_by_step(run: Path) -> None:
    done = command("ls", run)
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
    tree = json.loads(command("ls", run, "--json").stdout)
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


def test_a_run_with_levels_lists_all_of_them(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "step_00000100", tmp_path / "far" / "step_00000100")
    tiers = [ckpt.Disk(every=100, keep=2), ckpt.Disk(tmp_path / "far", every=300), ckpt.Disk(tmp_path / "none")]
    write_levels(str(run), ckpt.Checkpointer(run, {}, tiers=tiers).levels)
    result = here("ls", run)
    rows = [line.split()[:3] for line in result.stdout.splitlines()[1:4]]
    assert rows == [
        ["step_00000100", "disk", "100"],
        ["step_00000100", "disk2", "100"],
        ["step_00000200", "disk", "200"],
    ]
    assert f"disk2: {tmp_path}/far, every 300 steps" in result.stdout
    tree = json.loads(here("ls", run, "--json").stdout)
    assert [(row["level"], row["step"]) for row in tree["checkpoints"]] == [
        ("disk", 100),
        ("disk2", 100),
        ("disk", 200),
    ]
    assert [(level["name"], level["found"]) for level in tree["levels"]] == [("disk", 2), ("disk2", 1), ("disk3", 0)]
    # runs are moved
    moved = run.rename(tmp_path / "moved")
    assert [row["path"] for row in json.loads(here("ls", moved, "--json").stdout)["checkpoints"]][2] == str(
        moved / "step_00000200"
    )


def test_a_level_that_can_not_be_listed_is_told_and_hides_no_other(run: Path) -> None:
    tiers = [ckpt.Disk(every=100), ckpt.Remote("nosuch://bucket/a")]
    write_levels(str(run), ckpt.Checkpointer(run, {}, tiers=tiers).levels)
    result = here("ls", run)
    assert result.exit_code == 0
    assert sum(line.startswith("step_") for line in result.stdout.splitlines()) == 2
    assert "remote can't be listed: nosuch://" in result.stdout
