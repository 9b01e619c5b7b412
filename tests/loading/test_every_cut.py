"""Every way of cutting a model: each is really trained, saves what one process saves, and loads what each saved.

Real gloo processes; the truth is one process that has no parallelism at all. All comparisons are bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.state import flatten
from tests.loading.cuts import CUTS, Run
from tests.ranks import run_ranks

WORLDS = sorted({ranks for ranks, _ in CUTS.values()})
BEFORE, AFTER = 2, 1
"""Steps of training before the state is saved, and after it was loaded."""


def of_world(world: int) -> list[str]:
    return [cut for cut, (ranks, _) in CUTS.items() if ranks == world]


def trained(cut: str, seed: int, steps: int) -> Run:
    run = CUTS[cut][1](seed)
    for number in range(steps):
        run.step(number)
    return run


def save_on(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # what torch says of FSDP1's age
    for cut in of_world(world):
        run = trained(cut, 7, BEFORE)
        ckpt.save(run.state, f"{folder}/{cut}")
        if cut == "single":
            for number in range(AFTER):
                run.step(BEFORE + number)
            ckpt.save(run.state, f"{folder}/unbroken")


def sources_of(cut: str, count: int) -> list[str]:
    """So many of the cuts, so that each is loaded by as many others."""
    names = list(CUTS)
    at = names.index(cut)
    return [names[(at + 1 + 7 * number) % len(names)] for number in range(count)]


def load_on(rank: int, world: int, folder: str, count: int) -> dict[str, dict[str, set[str]]]:
    warnings.simplefilter("ignore")
    truth = contents(f"{folder}/single")
    names: dict[str, dict[str, set[str]]] = {}
    for cut in of_world(world):
        run = trained(cut, 8, 1)
        names[cut] = {}
        for source in sources_of(cut, count):
            ckpt.load(run.state, f"{folder}/{source}")
            names[cut][source] = compared(run, truth, f"{source} -> {cut}")
            run.step(5)  # so that what the next one loads is not there already
        # a fresh optimizer has no state of its own
        source = sources_of(cut, 4)[-1]
        run = trained(cut, 9, 0)
        ckpt.load(run.state, f"{folder}/{source}")
        for number in range(AFTER):
            run.step(BEFORE + number)
        ckpt.save(run.state, f"{folder}/resumed_{cut}")
    return names


def compared(run: Run, truth: dict[str, torch.Tensor], what: str) -> set[str]:
    """Names of all that this rank holds, which is what it should be."""
    held = flatten(run.state)
    for name, tensor in held.tensors.items():
        assert tensor.dtype == truth[name].dtype, f"{what}: {name}"
        for piece in tensor.pieces:
            assert torch.equal(piece.view, truth[name][piece.box.slices()]), f"{what}: {name} {piece.box}"
    return set(held.tensors)


def contents(path: str | Path) -> dict[str, torch.Tensor]:
    with ckpt.open(path) as checkpoint:
        return {name: tensor[...] for name, tensor in checkpoint.tensors.items()}


def groups_of(path: str | Path) -> dict[str, Any]:
    """Parameter -> its hyperparameters."""
    with ckpt.open(path) as checkpoint:
        groups: Any = checkpoint.values["optimizer.param_groups"]
    return {name: {k: v for k, v in group.items() if k != "params"} for group in groups for name in group["params"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cuts")
    for world in WORLDS:
        run_ranks(save_on, world, str(folder), timeout=240)
    return folder


def assert_same(path: Path, truth: Path) -> None:
    expected, found = contents(truth), contents(path)
    assert found.keys() == expected.keys()
    differ = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not differ, f"{path.name}: {differ}"
    assert groups_of(path) == groups_of(truth)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "single"])
def test_training_cut_so_saves_what_one_process_saves(cut: str, saved: Path) -> None:
    assert_same(saved / cut, saved / "single")


def assert_loads(world: int, saved: Path, count: int) -> None:
    ranks = run_ranks(load_on, world, str(saved), count, timeout=480)
    everything = contents(saved / "single").keys()
    for cut in of_world(world):
        for source in sources_of(cut, count):
            assert set().union(*(names[cut][source] for names in ranks)) == everything, f"{source} -> {cut}"
        assert_same(saved / f"resumed_{cut}", saved / "unbroken")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", WORLDS)
def test_each_cut_loads_what_others_saved_and_trains_on_as_one_process_would(world: int, saved: Path) -> None:
    assert_loads(world, saved, 3)


def save_while_training(rank: int, world: int, folder: str, cuts: list[str]) -> None:
    warnings.simplefilter("ignore")
    for cut in cuts:
        run = trained(cut, 7, BEFORE)
        pending = [ckpt.async_save(run.state, f"{folder}/{cut}_behind")]
        for number in range(AFTER):
            run.step(BEFORE + number)
        pending.append(ckpt.async_save(run.state, f"{folder}/{cut}_after"))
        run.step(7)
        for save in pending:
            save.result()


def test_what_is_flat_or_elsewhere_is_saved_while_the_training_goes_on(saved: Path, tmp_path: Path) -> None:
    cuts = ["fsdp1_orig", "fsdp1_flat", "fsdp1_flat_grad_op", "zero1", "pp2_stages2"]
    run_ranks(save_while_training, 2, str(tmp_path), cuts, timeout=120)
    for cut in cuts:
        assert_same(tmp_path / f"{cut}_behind", saved / "single")
        assert_same(tmp_path / f"{cut}_after", saved / "unbroken")


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", WORLDS)
def test_each_cut_loads_what_each_saved(world: int, saved: Path, tmp_path: Path) -> None:
    for cut in (*CUTS, "unbroken"):
        (tmp_path / cut).symlink_to(saved / cut)
    assert_loads(world, tmp_path, len(CUTS))
