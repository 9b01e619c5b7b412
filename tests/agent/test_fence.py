"""What is promised of optimizers: whatever kind and however wrapped, none steps into a capture; one that can't be
watched is told of, and costs speed, not truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.agent.saver import AsyncSaver
from ckpt.saving import capture as capturing
from ckpt.storage.files import Files
from ckpt_formats.errors import SaveFailedError
from tests.agent.test_async_save import agent_here


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[AsyncSaver]:
    with agent_here(tmp_path, Files()) as saver:
        yield saver


@pytest.fixture
def copied_at_once(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is copied by the thread that trains. Lazy captures take so long that whoever did not wait for one would
    change what it copies.
    """
    copy = capturing._copy
    at_once: list[torch.Tensor] = []

    def slowly(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if threading.current_thread().name == "ckpt-capture":
            time.sleep(0.1)
        else:
            at_once.extend(tensor for pair in pairs for tensor in pair)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", slowly)
    return at_once


def expected(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"model.{name}": value.detach().clone() for name, value in model.named_parameters()}


def check(path: Path, values: dict[str, torch.Tensor]) -> None:
    with ckpt.open(path) as checkpoint:
        for name, value in values.items():
            assert torch.equal(checkpoint[name][...], value), f"{path.name}: {name}"


def run(
    saver: AsyncSaver,
    folder: Path,
    model: torch.nn.Module,
    state: dict[str, Any],
    step: Any,
    copied_at_once: list[torch.Tensor],
) -> None:
    saved = []
    for k in range(4):
        step()
        values = expected(model)
        copied_at_once.clear()
        saved.append((saver.save(state, folder / str(k)), values))
        assert not copied_at_once, "it was not captured lazily"
    for k, (pending, values) in enumerate(saved):
        pending.wait(60)
        check(folder / str(k), values)


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))


KINDS: dict[str, Any] = {
    "foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "single": lambda p: torch.optim.RMSprop(p, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_optimizer_steps_into_a_capture(
    kind: str, saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    model = model_of()
    optimizer = KINDS[kind](model.parameters())

    def step() -> None:
        model(torch.randn(3, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run(saver, tmp_path, model, {"model": model, "optimizer": optimizer}, step, copied_at_once)


def test_a_scheduler_a_scaler_and_accumulated_gradients_change_nothing(
    saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    scaler = torch.amp.GradScaler("cpu")

    def step() -> None:
        for _ in range(3):
            scaler.scale(model(torch.randn(3, 20)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    run(saver, tmp_path, model, state, step, copied_at_once)


def test_two_optimizers_that_step_in_turns(
    saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    model = model_of()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizers = [torch.optim.AdamW(first), torch.optim.SGD(second, lr=0.1)]
    turn = iter(range(99))

    def step() -> None:
        model(torch.randn(3, 20)).square().sum().backward()
        optimizers[next(turn) % 2].step()
        model.zero_grad()

    run(saver, tmp_path, model, {"model": model, "optimizers": optimizers}, step, copied_at_once)


def test_what_no_optimizer_owns_may_change_at_once(saver: AsyncSaver, tmp_path: Path) -> None:
    model = model_of()
    model.register_buffer("seen", torch.zeros(1000))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "average": average, "optimizer": optimizer}
    pendings = []
    for k in range(5):
        model(torch.randn(3, 20)).sum().backward()
        optimizer.step()
        average.update_parameters(model)
        values = {f"average.{name}": value.clone() for name, value in average.state_dict().items()}
        pendings.append((saver.save(state, tmp_path / str(k)), values, float(model.seen[0])))
        with torch.no_grad():
            model.seen += 1
            for parameter in average.parameters():
                parameter.add_(1)
    for k, (pending, values, seen) in enumerate(pendings):
        pending.wait(60)
        del values["average.module.seen"]
        check(tmp_path / str(k), values | {"model.seen": torch.full((1000,), seen)})


def test_parameters_that_change_though_no_step_was_seen_fail_the_save_and_capture_becomes_eager(
    saver: AsyncSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    first = saver.save(state, tmp_path / "0")
    # whoever asks whether it was captured may change everything, and nobody has
    while not first.done():
        time.sleep(0.01)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(SaveFailedError, match="'optimizer' was changed since the last async_save"):
        saver.save(state, tmp_path / "1")
    assert not (tmp_path / "1").exists()
    lazily: list[int] = []
    copy = capturing._copy

    def counted(pairs: list[Any]) -> None:
        lazily.append(len(pairs) if threading.current_thread().name == "ckpt-capture" else 0)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", counted)
    for k in (2, 3):
        values = expected(model)
        pending = saver.save(state, tmp_path / str(k))
        with torch.no_grad():
            model[0].weight += 1
        pending.wait(60)
        check(tmp_path / str(k), values)
    assert lazily
    assert not any(lazily)


def test_who_waits_for_captured_may_change_everything(saver: AsyncSaver, tmp_path: Path) -> None:
    model = model_of()
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    for k in range(3):
        values = expected(model)
        pending = saver.save(state, tmp_path / str(k))
        pending.captured(60)
        with torch.no_grad():
            model[0].weight += 1
        pending.wait(60)
        check(tmp_path / str(k), values)


def test_a_loop_that_does_not_step_is_captured_eagerly(
    saver: AsyncSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes through `tensor.data` are seen by no version counter; without a step, they might be how it trains."""
    model = model_of()
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    pendings = [saver.save(state, tmp_path / "0")]
    while not pendings[0].done():
        time.sleep(0.01)
    copy = capturing._copy

    def late(pairs: list[Any]) -> None:
        if threading.current_thread().name == "ckpt-capture":
            time.sleep(0.1)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", late)
    for k in range(1, 4):
        values = expected(model)
        pendings.append(saver.save(state, tmp_path / str(k)))
        model[0].weight.data.add_(1)
        pendings[-1].handed.wait(60)
        check_later = pendings[-1]
        while not check_later.done():
            time.sleep(0.01)
        if k == 1:
            check(tmp_path / "1", values)
