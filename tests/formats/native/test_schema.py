"""The JSON Schema of the root says what the reader holds roots to, as far as a schema can."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ckpt
from ckpt_formats.dtypes import DTYPES
from tests.crash.runs import saver, state
from tests.formats.native.tampering import Tampered
from tests.formats.native.test_hostile_root import FILES, HEAD, LAYOUT, TENSORS
from tests.ranks import run_ranks

SCHEMA: dict[str, Any] = json.loads(files("ckpt_formats.native").joinpath("manifest.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

BEYOND = {
    "version as float",
    "a file twice",
    "data file of 100 bytes",
    "header of 4611686018427387904 bytes",
    "page of 1 rows",
    "page of 4611686018427387904 rows",
    "no pages but chunks",
    "a page that no tensor uses",
    "page digests []",
    "page digests ['000000000000000000",
    "block size 4096.0",
    "shape [1.0]",
    "page 1",
    "page 2",
    "page 4611686018427387904",
    "the second page of none",
    "row 0",
    "row 2",
    "row 4",
    "row 4611686018427387904",
    "2 rows",
    "4611686018427387904 rows",
    "shape [0, 4611686018427387904, 4]",
    "shape [4611686018427387904, 0, 8]",
    "a cut that is not there",
    "a cut over a mesh that is not there",
    "a mesh with more names than sizes",
    "names out of order",
    "alias to 'nowhere'",
    "alias to 'tied'",
    "alias to 'model.tied'",
    "aliases in a circle",
    "an alias in a tensor's place",
}
"""What no schema can refuse: what one member says of another, and numbers that are no integers but equal to one."""


def _root(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["dtype"]["enum"] == list(DTYPES)


def test_what_is_written_validates(whole: Path, tmp_path: Path) -> None:
    VALIDATOR.validate(_root(whole))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt.save({"model": model, "optimizer": optimizer, "rng": ckpt.RNG()}, tmp_path / "step_1")
    VALIDATOR.validate(_root(tmp_path / "step_1"))
    ckpt.save({}, tmp_path / "empty")
    VALIDATOR.validate(_root(tmp_path / "empty"))


def _save(rank: int, world_size: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    cut = {"cut": distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])}
    saver().save(state(3, rank, world_size) | cut, folder)


def test_what_several_ranks_write_validates(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path / "step_3"))
    root = _root(tmp_path / "step_3")
    assert root["layout"]["meshes"]
    VALIDATOR.validate(root)


LIES = [*HEAD, *FILES, *TENSORS, *LAYOUT]


@pytest.mark.parametrize(("name", "lie"), [case[:2] for case in LIES], ids=[case[0] for case in LIES])
def test_lie_is_refused_by_the_schema_too(whole: Path, tmp_path: Path, name: str, lie: Any) -> None:
    tampered = Tampered(whole)
    lie(tampered)
    root = _root(tampered.write(tmp_path / "step_3"))
    assert VALIDATOR.is_valid(root) == (name in BEYOND)
