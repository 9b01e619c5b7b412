"""What is promised of optimizers: whatever kind and however wrapped, none steps into a capture; one that can't be
watched is told of, and costs speed, not truth.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

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


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_an_optimizer_that_was_made_after_the_save_waits_as_well(
    kind: str, saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    """A new phase of a training begins, and the old optimizer was in the state; fused steps no version counter sees."""
    model = model_of()
    state: dict[str, Any] = {"model": model, "optimizer": KINDS[kind](model.parameters())}
    former = []

    def step() -> None:
        former.append(state["optimizer"])
        state["optimizer"] = KINDS[kind](model.parameters())
        model(torch.randn(3, 20)).square().sum().backward()
        state["optimizer"].step()

    run(saver, tmp_path, model, state, step, copied_at_once)


@pytest.mark.parametrize("flat", [False, True], ids=["the same parameters", "parameters in one storage"])
def test_a_step_of_one_optimizer_is_no_alarm_for_another_one(
    flat: bool, saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    model = model_of()
    first = second = list(model.parameters())
    if flat:
        whole = torch.randn(sum(parameter.numel() for parameter in first))
        at = 0
        for module in (model[0], model[2]):
            for name, parameter in module.named_parameters():
                part = whole[at : at + parameter.numel()].view(parameter.shape)
                setattr(module, name, torch.nn.Parameter(part))
                at += parameter.numel()
        first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    resting, stepping = torch.optim.SGD(first, lr=0.1), torch.optim.AdamW(second)

    def step() -> None:
        model(torch.randn(3, 20)).square().sum().backward()
        stepping.step()
        model.zero_grad()

    run(saver, tmp_path, model, {"model": model, "optimizers": [resting, stepping]}, step, copied_at_once)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by its class alone, around the one that steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_a_wrapper_that_torch_knows_nothing_of_is_as_good_as_what_it_wraps(
    saver: AsyncSaver, tmp_path: Path, copied_at_once: list[torch.Tensor]
) -> None:
    model = model_of()
    optimizer = Wrapper(torch.optim.AdamW(model.parameters(), fused=True))

    def step() -> None:
        model(torch.randn(3, 20)).square().sum().backward()
        optimizer.step()
        model.zero_grad()

    run(saver, tmp_path, model, {"model": model, "optimizer": optimizer}, step, copied_at_once)


class Unwatched(Wrapper):
    """Steps itself, by writes that no version counter sees."""

    def __init__(self, params: Any) -> None:
        self.state = {}
        self.defaults = {}
        self.param_groups = [{"params": list(params)}]

    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - every optimizer's takes one
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 1


@pytest.mark.usefixtures("copied_at_once")
def test_an_optimizer_that_can_not_be_watched_is_told_of_and_costs_speed_alone(
    saver: AsyncSaver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    optimizer = Unwatched(model.parameters())
    saved = []
    for k in range(3):
        saved.append((saver.save({"model": model, "optimizer": optimizer}, tmp_path / str(k)), expected(model)))
        optimizer.step()
    for k, (pending, values) in enumerate(saved):
        pending.wait(60)
        check(tmp_path / str(k), values)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "ckpt"]
    assert "the steps of the optimizer 'optimizer' can't be seen" in told
    assert "torch.optim.Optimizer.__init__" in told


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
    copied: list[int] = []
    copy = capturing._copy

    def counted(pairs: list[Any]) -> None:
        copied.append(len(pairs) if threading.current_thread().name == "ckpt-capture" else 0)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", counted)
    for k in (2, 3):
        values = expected(model)
        pending = saver.save(state, tmp_path / str(k))
        with torch.no_grad():
            model[0].weight += 1
        pending.wait(60)
        check(tmp_path / str(k), values)
    assert copied
    assert not any(copied)


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


@pytest.mark.usefixtures("copied_at_once")
def test_saves_from_within_a_step_have_the_values_of_that_moment(saver: AsyncSaver, tmp_path: Path) -> None:
    """A closure of LBFGS, and a hook that runs after ours: the fence has let them pass."""
    model = model_of()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    state = {"model": model, "optimizer": optimizer}
    saved = []

    def save() -> None:
        values = expected(model)
        saved.append((saver.save(state, tmp_path / str(len(saved))), values))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 20)).square().sum()
        loss.backward()
        save()
        return loss

    save()
    optimizer.step(closure)
    hook = optimizer.register_step_pre_hook(lambda *_: save())
    optimizer.step(closure)
    hook.remove()
    assert len(saved) > 4
    for k, (pending, values) in enumerate(saved):
        pending.wait(60)
        check(tmp_path / str(k), values)


@pytest.mark.usefixtures("copied_at_once")
def test_a_buffer_beside_parameters_in_one_storage_is_not_the_optimizers(saver: AsyncSaver, tmp_path: Path) -> None:
    flat = torch.arange(30.0)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(flat[:10])
    # a view that torch does not count as one: a change of it is not seen
    beside = torch.empty(0).set_(flat.untyped_storage(), 10, (20,))
    model.register_buffer("beside", beside)
    state = {"model": model, "optimizer": torch.optim.SGD([model.weight], lr=0.1)}
    pending = saver.save(state, tmp_path / "0")
    beside += 100
    pending.wait(60)
    check(tmp_path / "0", {"model.weight": torch.arange(10.0), "model.beside": torch.arange(10.0, 30.0)})


@pytest.mark.usefixtures("copied_at_once")
def test_parameters_of_all_kinds_that_change_in_all_ways(
    saver: AsyncSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not contiguous, larger than a batch, tied, replaced through `.data`, resized; stepped twice, by two threads."""
    monkeypatch.setattr(capturing, "BATCH", 1 << 16)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.strided = torch.nn.Parameter(torch.randn(70, 50).t())
    model.large = torch.nn.Parameter(torch.randn(3 * capturing.BATCH // 4 + 5))
    model.tied = model.strided
    model.replaced = torch.nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    saved = []
    for k in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step = threading.Thread(target=optimizer.step)
        step.start()
        step.join()
        optimizer.step()
        values = expected(model)
        saved.append((saver.save(state, tmp_path / str(k)), values))
        # what the save refers to is the memory that was there
        model.replaced.data = torch.randn(1000 + k)
        optimizer.state[model.replaced].clear()
    for k, (pending, values) in enumerate(saved):
        pending.wait(60)
        check(tmp_path / str(k), values)


@pytest.mark.usefixtures("copied_at_once")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_saves_in_whatever_mode(mode: Any, saver: AsyncSaver, tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.inference_mode():
        average = torch.nn.Parameter(torch.randn(1000), requires_grad=False)
    # a parameter that no step changes, of the kind whose changes torch does not count
    optimizer.add_param_group({"params": [average]})
    state = {"model": model, "optimizer": optimizer, "average": average}
    for k in range(4):
        model(torch.randn(3, 20)).sum().backward()
        optimizer.step()
        values = expected(model)
        with mode() if k % 2 == 0 else torch.enable_grad():
            pending = saver.save(state, tmp_path / str(k))
        optimizer.step()
        pending.wait(60)
        check(tmp_path / str(k), values)


def test_a_step_does_not_wait_for_a_thread_that_has_no_time(
    saver: AsyncSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that copies may have to wait for a file system first."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    go = threading.Event()
    saver._worker.do(lambda: bool(go.wait(60)))
    values = expected(model)
    pending = saver.save({"model": model, "optimizer": optimizer}, tmp_path / "a")
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    assert not go.is_set()
    assert not pending.handed.is_set()
    go.set()
    pending.wait(60)
    check(tmp_path / "a", values)


def test_nothing_of_a_model_lives_on_when_it_was_saved(saver: AsyncSaver, tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    pending = saver.save(state, tmp_path / "a")
    pending.wait(60)
    freed = [weakref.ref(optimizer), weakref.ref(model)]
    del state, model, optimizer
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    assert not saver._fence._guarded
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    held = [tensor for tensor in tensors if tensor.shape == (30, 20)]
    rooms = {id(room) for _, known in saver._known for some in known.form._rooms.values() for room in some}
    assert [tensor for tensor in held if id(tensor) not in rooms] == []


def test_steps_are_let_go_when_the_saver_is_closed(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    with agent_here(tmp_path, Files()) as saver:
        saver.save({"model": model, "optimizer": optimizer}, tmp_path / "a").wait(60)
        assert len(_global_optimizer_pre_hooks) > before[0]
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


@pytest.mark.usefixtures("copied_at_once")
def test_two_savers_of_one_state(saver: AsyncSaver, tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    (tmp_path / "b").mkdir()
    saved = []
    with agent_here(tmp_path / "b", Files()) as other:
        for k in range(4):
            model(torch.randn(3, 20)).sum().backward()
            optimizer.step()
            values = expected(model)
            for one, folder in ((saver, tmp_path), (other, tmp_path / "b")):
                saved.append((one.save(state, folder / str(k)), folder / str(k), values))
        for pending, path, values in saved:
            pending.wait(60)
            check(path, values)
