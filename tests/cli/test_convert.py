"""`ckpt convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.verify import verify
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_a_model_as_safetensors_in_half_precision(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--to", "safetensors", "--select", "model.*", "--rename", "model.*=*", "--dtype", "float16")
    done = ckpt("convert", checkpoint, tmp_path / "new", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Wrote {tmp_path / 'new'}: ")
    found = load_file(tmp_path / "new" / "model.safetensors")
    with open_checkpoint(checkpoint) as source:
        models = [name for name in source.manifest.model_tensors if name.startswith("model.")]
        assert sorted(found) == sorted(name.removeprefix("model.") for name in models)
        weight = source["model.embed.weight"][...]
    assert (found["embed.weight"] == weight.astype("float16")).all()
    assert found["embed.weight"].dtype == "float16"


def test_a_part_of_a_checkpoint_as_one_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--to", "native", "--select", "model.*", "--rename", "model=net", "--mesh", "dp=2", "--json")
    done = here("convert", checkpoint, tmp_path / "new", *options)
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["mesh"] == {"names": ["dp"], "shape": [2]}
    assert (facts["to"], facts["left_out"], facts["overflowed"]) == ("native", [], [])
    assert verify(tmp_path / "new").intact
    with open_checkpoint(tmp_path / "new") as made:
        assert all(name.startswith("net.") for name in made.tensors)
        assert facts["tensors"] == len(made.manifest.model_tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "native", "--rename", "modle=x"), "renames nothing"),
        (("--to", "native", "--rename", "model"), "has no OLD=NEW in it"),
        (("--to", "native", "--dtype", "int8"), "no floating-point dtype"),
        (("--to", "native", "--dtype", "fp16"), "unknown dtype 'fp16'"),
        (("--to", "native", "--select", "modle.*"), "matches 'modle"),
        (("--to", "native", "--select", "{"), "brace"),
        (("--to", "native", "--shard-size", "5"), "is for --to safetensors"),
        (("--to", "safetensors", "--mesh", "dp=2"), "are for --to native"),
    ],
)
def test_wrong_requests(options: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path) -> None:
    done = here("convert", checkpoint, tmp_path / "new", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_damage_is_told_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    path = data_file(checkpoint)
    flip(path, path.stat().st_size // 2)
    done = here("convert", checkpoint, tmp_path / "new", "--to", "safetensors")
    assert done.exit_code == 1
    assert "checksum" in done.stderr
    assert not (tmp_path / "new").exists()
