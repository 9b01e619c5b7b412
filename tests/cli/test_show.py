"""`ckpt show`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import ckpt as library
from ckpt.transfer.reshard import reshard
from ckpt_formats.layout import Mesh
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_a_checkpoint_in_full(checkpoint: Path) -> None:
    done = ckpt("show", checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == f"{checkpoint}, step 100"
    assert any(line.startswith("made by anyckpt ") and "torch" in line for line in lines)
    assert "saved by 1 rank" in lines
    assert "model module 5 5.9 KiB" in lines
    assert "model.embed.weight float32 [100, 12] 4.7 KiB 1" in lines
    assert "model.head.weight float32 [100, 12] = model.embed.weight" in lines
    assert "big float32 [700, 500] 1.3 MiB 1" in lines
    assert "epoch 3" in lines
    assert "config {'dtype': <torch.dtype 'bfloat16'>, 'lr': 0.001}" in lines


def test_how_tensors_are_cut(checkpoint: Path, tmp_path: Path) -> None:
    reshard(checkpoint, tmp_path / "cut", Mesh.parse("dp=5"))
    result = here("show", tmp_path / "cut", "model.embed.weight")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "model.embed.weight float32 [100, 12] 4.7 KiB S(0)@dp 5" in lines
    chunks = [line.split() for line in lines if line.startswith("[")]
    assert [chunk[0] for chunk in chunks] == [f"[{k}:{k + 20},0:12]" for k in range(0, 100, 20)]
    for rank, (_, file, _) in enumerate(chunks):
        assert os.path.basename(file).startswith(f"{rank:05d}-")
        assert (tmp_path / "cut" / file).is_file()


def test_the_bytes_of_a_chunk_are_where_it_says(checkpoint: Path) -> None:
    tree = json.loads(here("show", checkpoint, "big", "--json").stdout)
    (chunk,) = tree["chunks"]
    data = (checkpoint / chunk["file"]).read_bytes()[chunk["start"] : chunk["stop"]]
    assert data == bytes(700 * 500 * 4)
    assert len(chunk["digest"]) == 32


def test_a_tied_name_shows_the_chunks_that_it_shares(checkpoint: Path) -> None:
    tied = json.loads(here("show", checkpoint, "model.head.weight", "--json").stdout)
    stored = json.loads(here("show", checkpoint, "model.embed.weight", "--json").stdout)
    assert tied["chunks"] == stored["chunks"]
    assert tied["aliases"] == {"model.head.weight": "model.embed.weight"}


def test_a_pattern_limits_tensors_and_values(checkpoint: Path) -> None:
    tree = json.loads(here("show", checkpoint, "model.*.bias", "--json").stdout)
    assert list(tree["tensors"]) == ["model.layers.0.bias", "model.layers.1.bias"]
    assert tree["values"] == {}
    result = here("show", checkpoint, "ep*")
    assert result.stdout.split() == ["value", "epoch", "3"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_nothing_that_matches_is_exit_1(checkpoint: Path, options: tuple[str, ...]) -> None:
    result = here("show", checkpoint, "model.embed.weigth", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "did you mean 'model.embed.weight'" in result.stderr


def test_values_in_full(checkpoint: Path) -> None:
    done = ckpt("show", checkpoint, "--values")
    assert done.returncode == 0
    assert "  config = {'lr': 0.001, 'dtype': Opaque(tag='torch.dtype', payload='bfloat16')}\n" in done.stdout
    assert "  rng = <each rank's own>\n" in done.stdout
    assert "  rng (rank 0) =\n" in done.stdout
    tree = json.loads(here("show", checkpoint, "--values", "--json").stdout)
    assert tree["values"]["epoch"] == 3
    assert list(tree["per_rank"]["0"]) == ["rng"]


def test_json(checkpoint: Path) -> None:
    tree = json.loads(ckpt("show", checkpoint, "--json").stdout)
    assert set(tree) == {
        "path",
        "step",
        "attempt",
        "files",
        "codecs",
        "layout",
        "provenance",
        "entries",
        "tensors",
        "aliases",
        "values",
    }
    assert tree["tensors"]["big"] == {
        "dtype": "float32",
        "shape": [700, 500],
        "bytes": 1400000,
        "cut": None,
        "chunks": 1,
    }
    assert tree["entries"]["optimizer"]["kind"] == "optimizer"
    assert tree["entries"]["big"] == {"kind": "tensor", "tensors": 1, "bytes": 1400000, "values": 0}


def test_a_damaged_manifest_is_exit_1_and_no_checkpoint_exit_2(checkpoint: Path, tmp_path: Path) -> None:
    flip(checkpoint / "manifest.json", 99)
    done = ckpt("show", checkpoint)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not fit its own checksum" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert ckpt("show", tmp_path).returncode == 2


def test_damage_where_a_value_lies_is_told(tmp_path: Path) -> None:
    library.save({"big": b"x" * 100_000}, tmp_path / "a")
    flip(data_file(tmp_path / "a"), -1)
    result = here("show", tmp_path / "a")
    assert result.exit_code == 1
    assert "do not fit their checksum" in result.stderr


HOSTILE = [
    "w[0]",
    "[bold]not bold[/bold]",
    ":smile:",
    "[link=http://x]",
    "\x1b[31mred\x1b[0m\x07",
    "a\u202eb",
    "x\ny",
    "\u200b",
]


def test_names_can_neither_style_nor_steer_a_terminal(tmp_path: Path) -> None:
    library.save({name: torch.zeros(2) for name in HOSTILE}, tmp_path / "a")
    done = ckpt("show", tmp_path / "a", env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert done.returncode == 0
    for name in HOSTILE[:4]:
        assert f"  {name}" in done.stdout
    for name in HOSTILE[4:]:
        assert name not in done.stdout
        assert f"  {name.encode('unicode_escape').decode('ascii')}" in done.stdout
    plain = ckpt("show", tmp_path / "a").stdout
    assert all(character.isprintable() or character == "\n" for character in plain)
    assert set(json.loads(ckpt("show", tmp_path / "a", "--json").stdout)["tensors"]) == set(HOSTILE)
    wrong = ckpt("show", tmp_path / "a", "\x1b[31m")
    assert wrong.returncode == 1
    assert "\x1b" not in wrong.stderr


def test_a_name_with_brackets_is_found_by_itself(tmp_path: Path) -> None:
    library.save({"w[0]": torch.zeros(2), "w0": torch.zeros(2)}, tmp_path / "a")
    assert list(json.loads(here("show", tmp_path / "a", "w[0]", "--json").stdout)["tensors"]) == ["w[0]"]
    assert list(json.loads(here("show", tmp_path / "a", "w[012]", "--json").stdout)["tensors"]) == ["w0"]


def test_a_tensor_without_elements_has_no_chunks(tmp_path: Path) -> None:
    library.save({"empty": torch.zeros(0, 3)}, tmp_path / "a")
    assert "no chunks" in here("show", tmp_path / "a", "empty").stdout


def test_what_is_compressed_tells_codec_and_ratio(tmp_path: Path) -> None:
    state = {"w": torch.randn(300, 400), "few": torch.zeros(7)}
    library.save(state, tmp_path / "a", compress=True)
    tree = json.loads(here("show", tmp_path / "a", "w", "--json").stdout)
    (chunk,) = tree["chunks"]
    stored = chunk["stop"] - chunk["start"]
    assert (chunk["codec"], chunk["bytes"]) == ("exponent-zstd", 480_000)
    assert tree["codecs"] == {
        "raw": {"chunks": 1, "bytes": 28, "stored": 28},
        "exponent-zstd": {"chunks": 1, "bytes": 480_000, "stored": stored},
    }
    ratio = f"({480_000 / stored:.2f}x)"
    assert "exponent-zstd: 468.8 KiB in 1 chunk" in here("show", tmp_path / "a").stdout
    assert ratio in here("show", tmp_path / "a").stdout
    assert f"exponent-zstd {ratio}" in here("show", tmp_path / "a", "w").stdout


def test_nothing_is_said_of_codecs_where_nothing_is_compressed(checkpoint: Path) -> None:
    assert "stored in" not in here("show", checkpoint).stdout
    assert json.loads(here("show", checkpoint, "--json").stdout)["codecs"] == {}


RULES = """
[flat.zero]
axis = "dp"
name = "flat"
align = 8

[[rule]]
match = "model.layers.{layer}.weight"
cut = {axis = "tp", dim = 1}

[[rule]]
match = "model.embed.weight"
pad = {dim = 0, to = 128}
cut = {axis = "tp", dim = 0}
flat = "zero"

[otherwise]
"""


def test_what_a_layout_comes_to(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.toml").write_text(RULES)
    options = ("--mesh", "dp=2,tp=2", "--layout", tmp_path / "cut.toml")
    done = ckpt("show", checkpoint, "model.embed.weight", *options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == f"{checkpoint} for 4 ranks (dp=2,tp=2)"
    assert "model.embed.weight [100, 12]" in lines
    assert any(
        line.startswith('rule {match = "model.embed.weight", pad = {dim = 0, to = 128}, cut = ') for line in lines
    )
    assert "dp=0,tp=0 [0:32,0:12] flat [384] from 0, strides [12, 1]" in lines
    assert "dp=1,tp=1 [96:100,0:12] flat [384] from 0, strides [12, 1]" in lines

    tree = json.loads(here("show", checkpoint, "model.*", *options, "--json").stdout)
    assert set(tree) == {"path", "mesh", "tensors", "aliases"}
    assert tree["mesh"] == {"names": ["dp", "tp"], "shape": [2, 2]}
    weight = tree["tensors"]["model.layers.0.weight"]
    assert (weight["shape"], weight["cut"]) == ([12, 12], "R@dp S(1)@tp")
    assert weight["rule"] == 'rule {match = "model.layers.{layer}.weight", cut = {axis = "tp", dim = 1}}'
    assert weight["pieces"][1] == {
        "where": {"tp": 1},
        "box": "[0:12,6:12]",
        "local": "model.layers.0.weight",
        "local_shape": [12, 6],
        "start": 0,
        "strides": [6, 1],
        "copy": False,
    }
    assert tree["tensors"]["model.embed.weight"]["cut"] == "flat@dp cut(0)@tp"
    assert tree["tensors"]["model.layers.0.bias"]["rule"] == "[otherwise] {}"


def test_what_goes_without_a_layout_file(checkpoint: Path) -> None:
    tree = json.loads(here("show", checkpoint, "model.embed.weight", "--mesh", "dp=3", "--json").stdout)
    (tensor,) = tree["tensors"].values()
    assert tensor["rule"] == tensor["cut"] == "S(0)@dp"
    assert [piece["box"] for piece in tensor["pieces"]] == ["[0:34,0:12]", "[34:68,0:12]", "[68:100,0:12]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "cut.toml"), "say which by --mesh"),
        (("--mesh", "tp=2"), "mesh axis 'tp'"),
        (("--mesh", "dp=2", "--layout", "cut.toml"), "speaks of the axis 'tp', which the mesh dp=2 has not"),
        (("--mesh", "dp=2,tp=2", "--layout", "both.toml"), "is matched by two rules"),
    ],
)
def test_a_layout_that_does_not_fit_is_exit_2(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "cut.toml").write_text(RULES)
    (tmp_path / "both.toml").write_text(RULES + '[[rule]]\nmatch = "model.embed.*"\n')
    result = here("show", checkpoint, *(tmp_path / each if each.endswith(".toml") else each for each in options))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
