"""`ckpt reshard`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt_formats.diff import diff
from ckpt_formats.verify import verify
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_a_checkpoint_cut_for_another_mesh(checkpoint: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text('[tp]\n"model.layers.*.weight" = 1\n')
    done = ckpt("reshard", checkpoint, tmp_path / "new", "--mesh", "dp=2,tp=4", "--layout", layout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Wrote {tmp_path / 'new'}: 21 tensors, 1.4 MiB, for 8 ranks (dp=2,tp=4), ")
    assert verify(tmp_path / "new").intact
    assert diff(checkpoint, tmp_path / "new").equal
    assert len(list((tmp_path / "new/data").iterdir())) == 8
    tree = json.loads(here("show", tmp_path / "new", "model.layers.0.weight", "--json").stdout)
    assert tree["tensors"]["model.layers.0.weight"]["cut"] == "S(0)@dp S(1)@tp"
    assert len(tree["chunks"]) == 8


def test_a_checkpoint_cut_by_rules(checkpoint: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text(
        """
        [flat.zero]
        axis = "dp"
        name = "{slot}"
        order = "reverse"

        [[rule]]
        match = "model.layers.{layer}.weight"
        cut = {axis = "tp", dim = 0, parts = [4, 8], groups = 4}

        [[rule]]
        match = "model.embed.weight"
        on = {pp = [0]}

        [[rule]]
        match = "model.head.weight"
        tied = "model.embed.weight"
        on = {pp = [-1]}
        cut = {axis = "tp", dim = 1}

        [[rule]]
        match = "optimizer.state.layers.{rest*}.{slot}"
        unless = "*.step"
        like = "model.layers.{rest}"
        local = "{like}.{slot}"
        flat = "zero"

        [[rule]]
        match = "big"
        pad = {dim = 0, to = 704}
        cut = {axis = ["pp", "dp"], dim = 0, unit = 4}

        [otherwise]
        """
    )
    mesh = "pp=2,dp=2,tp=2"
    done = ckpt("reshard", checkpoint, tmp_path / "new", "--mesh", mesh, "--layout", layout)
    assert (done.returncode, done.stderr) == (0, "")
    assert verify(tmp_path / "new").intact
    assert diff(checkpoint, tmp_path / "new").equal
    options = ("--mesh", mesh, "--layout", layout, "--json")
    said = json.loads(here("show", checkpoint, *options).stdout)["tensors"]
    for name, tensor in said.items():
        chunks = json.loads(here("show", tmp_path / "new", name, "--json").stdout)
        assert chunks["tensors"][name]["cut"] == tensor["cut"]
        assert {chunk["box"] for chunk in chunks["chunks"]} == {
            piece["box"] for piece in tensor["pieces"] if not piece["copy"]
        }
    # what the short form can't say is not taken up silently
    again = here("reshard", tmp_path / "new", tmp_path / "again", "--mesh", "tp=2")
    assert again.exit_code == 2
    assert "which is more than a dimension; say how to cut over 'tp' by --layout" in again.stderr


def test_json(checkpoint: Path, tmp_path: Path) -> None:
    done = ckpt("reshard", checkpoint, tmp_path / "new", "--mesh", "dp=2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    tree = json.loads(done.stdout)
    assert set(tree) == {"path", "mesh", "tensors", "bytes", "bytes_per_rank", "seconds"}
    assert tree["mesh"] == {"names": ["dp"], "shape": [2]}
    assert sum(tree["bytes_per_rank"]) == tree["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "dp=two"), "'dp=two'"),
        (("--mesh", "dp=2,xp=2"), "mesh axis 'xp'"),
        (("--mesh", "dp=2", "--layout", "nosuchfile.toml"), "nosuchfile.toml"),
        (("--mesh", "dp=2", "--layout", "wrong.toml"), "wrong.toml"),
        ((), "--mesh"),
    ],
)
def test_a_wrong_mesh_or_layout_is_exit_2_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "wrong.toml").write_text("not toml")
    options = tuple(str(tmp_path / option) if option == "wrong.toml" else option for option in options)
    result = here("reshard", checkpoint, tmp_path / "new", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_in_the_way_is_exit_2_and_stays(run: Path) -> None:
    a, b = run / "step_00000100", run / "step_00000200"
    before = (b / "manifest.json").read_bytes()
    result = here("reshard", a, b, "--mesh", "dp=2")
    assert result.exit_code == 2
    assert str(b) in result.stderr
    assert (b / "manifest.json").read_bytes() == before
    assert verify(b).intact


def test_a_damaged_source_is_exit_1_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    flip(data_file(checkpoint), 40_000)
    result = here("reshard", checkpoint, tmp_path / "new", "--mesh", "dp=2")
    assert result.exit_code == 1
    assert "do not fit their checksum" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_target_that_can_t_be_written_is_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = here("reshard", checkpoint, tmp_path / "file/new", "--mesh", "dp=2")
    assert result.exit_code != 0
    assert "Error: " in result.stderr
    assert "bug" not in result.stderr
