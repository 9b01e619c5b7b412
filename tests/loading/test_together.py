"""What ranks find out about each other in a load: one checkpoint, one answer on all, and nobody waits in vain."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt.loading import sharing
from ckpt_formats.errors import ConfigurationError, CorruptionError, RankError, StateMismatchError
from ckpt_formats.reading import ReadStats
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


# --- what fails after the bytes have come


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise OSError("a file of the data set is gone")


class Loader:
    def state_dict(self) -> dict[str, int]:
        return {"at": 3}

    def load_state_dict(self, _: dict[str, int]) -> None:
        fail_on_one()


class Own(torch.optim.SGD):
    """An optimizer that loads by code of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": 1}

    def load_state_dict(self, _: dict[str, Any]) -> None:
        fail_on_one()


class Picky(dict[str, Any]):
    """A container that does not take everything."""

    def __setitem__(self, key: str, value: object) -> None:
        fail_on_one()
        super().__setitem__(key, value)


def loader() -> dict[str, Any]:
    return {"data": ckpt.PerRank(Loader())}


def optimizer() -> dict[str, Any]:
    model = nn.Linear(3, 3)
    return {"model": model, "optimizer": Own(model.parameters(), lr=0.1)}


def container() -> dict[str, Any]:
    return {"facts": Picky(loss=0.5, at=torch.zeros(2))}


def restore(rank: int, world_size: int, folder: str) -> list[tuple[str, str]]:
    heard = []
    makers: list[Callable[[], dict[str, Any]]] = [loader, optimizer, container]
    for make in makers:
        path = f"{folder}/{make.__name__}"
        ckpt.save(make(), path)
        with pytest.raises((OSError, RankError)) as caught:
            ckpt.load(make(), path)
        text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
        heard.append((type(caught.value).__name__, text))
    return heard


def test_what_can_not_be_restored_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    others, own = run_ranks(restore, 2, str(tmp_path))
    for (kind, text), (own_kind, own_text) in zip(others, own, strict=True):
        assert kind == RankError.__name__
        assert text.startswith("rank 1: OSError: a file of the data set is gone")
        assert own_kind == OSError.__name__
        for said in (text, own_text):
            assert "Tensors of the state may have been overwritten in part" in said


def other_steps(rank: int, world_size: int, path: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), use_orig_params=False, device_id=torch.device("cpu")
    )
    with pytest.raises(StateMismatchError) as caught:
        ckpt.load({"model": model, "optimizer": torch.optim.Adam(model.parameters())}, path)
    return str(caught.value)


def test_parameters_of_other_steps_in_a_flat_parameter_are_an_error_that_says_what_was_touched(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam(model.parameters())
    for part in (model, model[0]):
        optimizer.zero_grad()
        part(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    for text in run_ranks(other_steps, 2, str(tmp_path / "c")):
        assert "saved with step = " in text
        assert "Tensors of the state may have been overwritten in part" in text


# --- a rank that is interrupted


class Interrupted:
    """Ctrl-C reaches the second rank's process when its state is asked for, or given back."""

    def __init__(self, when: str) -> None:
        self.when = when

    def state_dict(self) -> dict[str, int]:
        self._reach("plan")
        return {"at": 3}

    def load_state_dict(self, _: dict[str, int]) -> None:
        self._reach("apply")

    def _reach(self, when: str) -> None:
        if when == self.when and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)


def interrupted(rank: int, world_size: int, path: str, when: str) -> tuple[str, str, bool, float]:
    share_everything()
    run = sharing._Round.run

    def reach(self: sharing._Round, threads: int, *, past_cache: bool) -> ReadStats:
        signal.raise_signal(signal.SIGINT)
        return run(self, threads, past_cache=past_cache)

    if when == "read" and rank == 1:
        sharing._Round.run = reach  # type: ignore[method-assign]
    ckpt.save({"model": of_ones(1), "data": Interrupted("never")}, path)
    with torch.device("meta"):
        model = nn.Linear(700, 700)

    def act() -> None:
        if when == "save":
            ckpt.save({"data": Interrupted("plan")}, f"{path}.2")
        ckpt.load({"model": model, "data": Interrupted(when)}, path)

    begin = time.monotonic()
    with pytest.raises((KeyboardInterrupt, RankError)) as caught:
        act()
    seconds = time.monotonic() - begin
    # the one that was interrupted lives on
    store = dist.distributed_c10d._get_default_store()
    store.set(f"heard-{rank}", "")
    store.wait([f"heard-{other}" for other in range(world_size)])
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    return type(caught.value).__name__, text, model.weight.is_meta, seconds


@pytest.mark.parametrize("when", ["save", "plan", "read", "apply"])
def test_a_rank_that_is_interrupted_is_an_error_on_the_others_within_seconds(when: str, tmp_path: Path) -> None:
    answers = run_ranks(interrupted, 3, str(tmp_path / "c"), when)
    assert [kind for kind, *_ in answers] == ["RankError", "KeyboardInterrupt", "RankError"]
    for rank, (_, text, untouched, seconds) in enumerate(answers):
        assert rank == 1 or "rank 1 was interrupted" in text
        assert ("overwritten in part" in text) == (when in ("read", "apply"))
        assert untouched == (when in ("save", "plan"))
        assert seconds < 20
