"""What ranks find out about each other in a load: one checkpoint, one answer on all, and nobody waits in vain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ckpt
from ckpt_formats.errors import ConfigurationError, CorruptionError, StateMismatchError
from tests.loading.test_sharing import share_everything
from tests.ranks import run_ranks


def of_ones(factor: float) -> nn.Linear:
    model = nn.Linear(700, 700)
    nn.init.constant_(model.weight, factor)
    return model


# --- one checkpoint


def several_checkpoints(rank: int, world_size: int, folder: str) -> list[tuple[str, str, float]]:
    share_everything()
    for step in (1, 2):
        ckpt.save({"model": of_ones(step)}, f"{folder}/step_{step}", step=step)
    own = f"{folder}/node{rank}"
    shutil.copytree(f"{folder}/step_1", f"{own}/same")
    shutil.copytree(f"{folder}/step_{rank + 1}", f"{own}/stale")
    os.chdir(own)
    heard = []
    for path in (f"{folder}/step_{rank + 1}", "stale"):
        model = of_ones(7)
        with pytest.raises((ConfigurationError, CorruptionError)) as caught:
            ckpt.load({"model": model}, path)
        heard.append((type(caught.value).__name__, str(caught.value), float(model.weight.detach().unique())))
    for path in ("same", f"{own}/same"):
        model = of_ones(7)
        assert ckpt.load({"model": model}, path, exchange="always").step == 1
        assert float(model.weight.detach().unique()) == 1
    return heard


def test_ranks_that_open_different_checkpoints_are_told_so_and_nothing_is_touched(tmp_path: Path) -> None:
    for paths, contents in run_ranks(several_checkpoints, 2, str(tmp_path)):
        assert paths[0] == ConfigurationError.__name__
        for step in (1, 2):
            assert f"{tmp_path}/step_{step} (step {step}, " in paths[1]
            assert f"stale (step {step}, " in contents[1]
        assert "on rank 0, " in paths[1]
        assert contents[0] == CorruptionError.__name__
        assert (paths[2], contents[2]) == (7, 7)


# --- names


class Inner(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=bias)


def name_some(rank: int, world_size: int, path: str) -> list[tuple[str, list[str]]]:
    ckpt.save({"a": Inner(bias=True), "b": Inner(bias=True)}, path)
    heard = []
    part = Inner(bias=False)
    states: list[dict[str, Any]] = [{"a": part} if rank == 0 else {"b": part}, {"a": part} if rank == 0 else {}]
    for state in states:
        with pytest.raises(StateMismatchError) as caught:
            ckpt.load(state, path)
        heard.append((str(caught.value), list(ckpt.load(state, path, strict=False).unexpected)))
    # some of the names each
    whole = Inner(bias=True)
    state = {"a": nn.ModuleDict({"inner": whole.inner} if rank else {}), "b": Inner(bias=True)}
    assert ckpt.load(state, path).unexpected == []
    return heard


def test_what_no_rank_that_names_an_entry_expects_is_an_error_on_all(tmp_path: Path) -> None:
    for both, one in run_ranks(name_some, 2, str(tmp_path / "c")):
        assert "In the checkpoint but not in the state: a.inner.bias, b.inner.bias." in both[0]
        assert both[1] == ["a.inner.bias", "b.inner.bias"]
        assert "In the checkpoint but not in the state: a.inner.bias." in one[0]
        assert one[1] == ["a.inner.bias"]
