"""`ckpt verify`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ckpt_formats.native.reader import read_root
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_an_intact_checkpoint(checkpoint: Path) -> None:
    done = ckpt("verify", checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{checkpoint} is intact.\nChecked ")
    assert "in 3 files" in done.stdout


@pytest.mark.parametrize("region", ["root", "index", "header", "data", "padding"])
def test_a_flipped_bit_anywhere_is_exit_1_and_named(checkpoint: Path, region: str) -> None:
    root = read_root(str(checkpoint))
    tree = json.loads(here("show", checkpoint, "big", "--json").stdout)
    start = tree["chunks"][0]["start"]
    file, position = {
        "root": ("manifest.json", 1000),
        "index": (root.pages[0].path, 2000),
        "header": (root.files[0].path, 100),
        "data": (root.files[0].path, start + 5),
        # large chunks are aligned
        "padding": (root.files[0].path, start - 1),
    }[region]
    flip(checkpoint / file, position)
    done = ckpt("verify", checkpoint)
    assert (done.returncode, done.stderr) == (1, "")
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(f"{checkpoint} is damaged: 1 place")
    assert second.startswith(f"  {file}")
    if region == "data":
        assert f"bytes {start}-{start + (1 << 20)}  big [0:700,0:500]" in done.stdout
    (damage,) = json.loads(ckpt("verify", checkpoint, "--json").stdout)["damage"]
    assert damage["file"] == file
    if region != "root":
        assert damage["start"] <= position < damage["stop"]


def test_a_truncated_and_a_missing_file(run: Path) -> None:
    one, other = run / "step_00000100", run / "step_00000200"
    os.truncate(data_file(one), 8000)
    data_file(other).unlink()
    result = here("verify", one)
    assert result.exit_code == 1
    assert "the file is truncated: it has 8000 of " in result.stdout
    result = here("verify", other)
    assert result.exit_code == 1
    assert "the file is missing" in result.stdout
    assert "… and 12 more (--json lists all)" in result.stdout
    tree = json.loads(here("verify", other, "--json").stdout)
    assert len(tree["damage"]) == 1 + 22
    assert not tree["intact"]


def test_json(checkpoint: Path) -> None:
    (checkpoint / "data/leftover").write_bytes(b"abc")
    done = ckpt("verify", checkpoint, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    tree = json.loads(done.stdout)
    assert tree["intact"] is True
    assert tree["damage"] == []
    assert tree["debris"] == [{"path": "data/leftover", "bytes": 3}]
    assert set(tree) == {
        "path",
        "intact",
        "step",
        "files",
        "tensors",
        "chunks",
        "bytes",
        "seconds",
        "damage",
        "debris",
    }


def test_what_does_not_belong_to_it_is_told_but_no_damage(checkpoint: Path) -> None:
    (checkpoint / "data/\x1b[31mleftover").write_bytes(b"abc")
    result = here("verify", checkpoint)
    assert result.exit_code == 0
    assert "Not part of the checkpoint, and harmless: 1 file, 3 B\n  data/\\x1b[31mleftover\n" in result.stdout


def test_no_checkpoint_is_exit_2(run: Path, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    done = ckpt("verify", checkpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert "never committed" in done.stderr
    assert ckpt("verify", run / "nowhere").returncode == 2
