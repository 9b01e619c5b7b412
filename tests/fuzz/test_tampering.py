"""Random lies with checksums that fit: whatever a manifest or an index says, reading, loading and verifying end in an
error of ours or in a result, in bounded time and memory."""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import ckpt
from ckpt_cli.main import cli
from ckpt_formats.errors import CheckpointError
from ckpt_formats.verify import verify
from tests.formats.native.bounds import bounded
from tests.formats.native.hostile import Bag, read_all
from tests.formats.native.tampering import Tampered

ROUNDS = 250
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 7, 8, 16, 255, 4095, 4096, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
ATOMS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        1.5,
        1e308,
        "",
        "x",
        "..",
        "/",
        "data/x",
        "model",
        "model.weight",
        "raw",
        "float64",
        "$tensor",
    ),
    *(
        [],
        {},
        [[]],
        [0],
        [""],
        {"": 0},
        {"a": {}},
        {"$tensor": "model.weight"},
        {"$per_rank": "x"},
        {"$tuple": []},
        {"$x": 1},
    ),
    *(
        {"$subclass": {"kind": "x", "parts": ["a"], "context": None}},
        {"$bytes": {"blob": "x"}},
        2**64,
        2**200,
        *INTEGERS,
    ),
)


def _state(*, trained: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}])
    if trained:
        model(torch.randn(3, 5)).sum().backward()
        optimizer.step()
    bag = Bag()
    bag.held = {"seen": torch.arange(3), "rounds": [1, (2, 3)]} if trained else {}
    sampler = {"order": list(range(5)), "mask": torch.ones(3) * trained, "deep": {"a.b": torch.zeros(2), "c": 1}}
    return {
        "model": model,
        "optimizer": optimizer,
        "bag": bag,
        "sampler": sampler,
        "extra": torch.arange(4.0),
        "rng": ckpt.RNG(),
        "own": ckpt.PerRank({"x": [1, 2]}),
        "step": 3,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "step_3"
    with torch.random.fork_rng():
        ckpt.save(_state(trained=True), folder)
        ckpt.load(_state(trained=False), folder)
    return folder


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of JSON."""
    found: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        at = stack.pop()
        keys = at.keys() if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            stack.append(at[key])
    return found


def _lie_in_root(tampered: Tampered, dice: random.Random, *, outside: tuple[str, ...] = ()) -> str:
    """Change one thing in the root; says what."""
    tree = {key: value for key, value in tampered.root.items() if key not in outside}
    nodes = _nodes(tree)
    container, key = dice.choice(nodes)
    container = tampered.root if container is tree else container
    old = container[key]
    match dice.randrange(8):
        case 0:
            del container[key]
            return f"{key!r} deleted"
        case 1 | 2:
            other, place = dice.choice(nodes)
            container[key] = copy.deepcopy(other[place])
            return f"{key!r}: {old!r:.50} became {container[key]!r:.50}"
        case 3 if isinstance(old, int):
            container[key] = old + dice.choice((-1, 1, 4096, -4096))
            return f"{key!r}: {old!r:.50} became {container[key]}"
        case 4 if isinstance(container, dict):
            container[dice.choice(("", "x", "$x", "$tuple", "model", "extra", "__ckpt__.rank.00000"))] = old
            return f"{key!r} stands under another name, too"
        case 5 if isinstance(container, list):
            container.append(old)
            return f"{key!r} is there twice"
        case _:
            container[key] = copy.deepcopy(dice.choice(ATOMS))
            return f"{key!r}: {old!r:.50} became {container[key]!r:.50}"


def _lie_in_page(tampered: Tampered, dice: random.Random) -> str:
    """Change one cell of the index; says which."""
    name = dice.choice([name for name, column in tampered.pages[0].items() if column.size])
    column = tampered.pages[0][name]
    flat = column.reshape(-1)
    at = dice.randrange(len(flat))
    if column.dtype == np.uint8:
        flat[at] = dice.randrange(256)
    else:
        new = dice.choice([*INTEGERS, int(flat[at]) + dice.choice((-1, 1)), int(dice.choice(flat))])
        flat[at] = max(-(2**63), min(new, 2**63 - 1))
    tampered.pages[0][name] = flat.reshape(column.shape)
    return f"{name}[{at}] became {flat[at]}"


def _outcome(folder: Path, act: Callable[[], object], what: str) -> str:
    """`fine`, or the name of the error of ours. Anything else is a failure that says what was changed."""
    try:
        with bounded(folder):
            act()
    except CheckpointError as error:
        return type(error).__name__
    except BaseException as error:
        error.add_note(f"tampered with: {what}")
        raise
    return "fine"


def _try(base: Path, folder: Path, seed: int) -> str:
    """Tell one to three lies, and put the checkpoint through everything."""
    dice = random.Random(seed)
    tampered = Tampered(base)
    lies = [
        (_lie_in_page if dice.random() < 0.3 else _lie_in_root)(tampered, dice)
        for _ in range(dice.choice((1, 1, 1, 2, 3)))
    ]
    what = f"seed {seed}: {'; '.join(lies)}"
    tampered.write(folder)
    _outcome(folder, lambda: verify(folder, threads=1), what)
    _outcome(folder, lambda: read_all(folder), what)
    return _outcome(folder, lambda: ckpt.load(_state(trained=False), folder, strict=False, cast=True), what)


def _fuzz(base: Path, place: Path, seeds: range) -> None:
    outcomes: Counter[str] = Counter()
    with torch.random.fork_rng():
        for seed in seeds:
            folder = place / f"step_{seed}"
            outcomes[_try(base, folder, seed)] += 1
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
    print(f"{len(seeds)} tampered checkpoints: {dict(outcomes)}")
    assert outcomes["FormatError"] > len(seeds) / 5


def test_random_lies_end_in_our_errors(trained: Path, tmp_path: Path) -> None:
    _fuzz(trained, tmp_path, range(ROUNDS))


def _tell_of(base: Path, run: Path, seed: int) -> None:
    """Let each verb of the command look at a tampered checkpoint."""
    dice = random.Random(seed)
    tampered = Tampered(base)
    lies = [
        (_lie_in_page if dice.random() < 0.2 else _lie_in_root)(tampered, dice) for _ in range(dice.choice((1, 1, 2)))
    ]
    folder = str(tampered.write(run / "step_3"))
    for words in (
        ("ls", str(run)),
        ("show", folder, "--json", "--values"),
        ("show", folder, "model.0.weight"),
        ("verify", folder),
        ("diff", str(base), folder),
        ("reshard", folder, str(run / "out"), "--mesh", "dp=2"),
    ):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code in (0, 1, 2), (seed, words, lies, result.exception)
        assert "This is a bug" not in result.output, (seed, words, lies, result.output)


def test_command_answers_random_lies_with_a_sentence(trained: Path, tmp_path: Path) -> None:
    for seed in range(80):
        _tell_of(trained, tmp_path / f"run_{seed}", seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_random_lies_end_in_our_errors(trained: Path, tmp_path: Path) -> None:
    _fuzz(trained, tmp_path, range(ROUNDS, ROUNDS + int(os.environ.get("LIES", "20000"))))
