"""What saving without stopping promises: the values of its step, committed whoever dies, nothing left behind."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt import api
from ckpt.agent import homes
from ckpt.agent.client import AgentClient, launch
from ckpt.agent.saver import AsyncSaver
from ckpt.agent.server import Agent
from ckpt.agent.wire import Channel
from ckpt.saving import capture as capturing
from ckpt.storage.files import File, Files
from ckpt_formats.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigurationError,
    SaveFailedError,
    StateError,
    ValuesDifferError,
)
from tests.ranks import Killed, run_ranks


@pytest.fixture(scope="module", autouse=True)
def no_agent_stays() -> Iterator[None]:
    """The agent of this very process ends with its tests, not with the process."""
    yield
    api._async_saver.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "ckpt-agent-reaper"], "the agent to end")


def until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition, for a limited time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@contextmanager
def agent_here(folder: Path, files: Files) -> Iterator[AsyncSaver]:
    """A saver with an agent in a thread of this process, whose file operations a test decides."""
    home = folder / "home"
    home.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(home / "socket"))
        listener.listen()
        serving = threading.Thread(target=Agent(str(home), files).serve, args=(listener,))
        serving.start()
        saver = AsyncSaver()
        saver._client = AgentClient(str(home / "socket"), 0)
        try:
            yield saver
        finally:
            saver.close()
            serving.join(30)
            assert not serving.is_alive()


def test_what_was_saved_loads_bit_for_bit(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 100)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "rng": ckpt.RNG(),
        "long": b"x" * 100_000,
        "strided": torch.randn(700, 900).t(),
        "odd": torch.randn(3).to(torch.float8_e8m0fnu),
        "wide": torch.randn(3, dtype=torch.complex128),
        "empty": torch.empty(0, 3),
    }
    pending = ckpt.async_save(state, tmp_path / "step_7")
    result = pending.wait()
    assert result.step == 7
    assert pending.done()
    assert pending.result().bytes == result.bytes
    ckpt.save(state, tmp_path / "sync")
    with ckpt.open(tmp_path / "step_7") as one, ckpt.open(tmp_path / "sync") as other:
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            assert bytes(one[name][...].untyped_storage()) == bytes(other[name][...].untyped_storage()), name
        assert one.manifest.values == other.manifest.values


@pytest.mark.parametrize(
    "options", [{"capture": "eagre"}, {"capture": None}, {"compress": "yes"}, {"compress": None}, {"compress": 2}]
)
def test_an_option_that_means_nothing_is_refused_by_its_name(options: dict[str, Any], tmp_path: Path) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}"):
        ckpt.async_save({"w": torch.zeros(3)}, tmp_path / "a", **options)
    if name == "compress":
        for wrong in (value, "auto"):
            with pytest.raises(ConfigurationError, match=f"compress={wrong!r}: give True or False"):
                ckpt.save({"w": torch.zeros(3)}, tmp_path / "a", compress=wrong)
    assert not (tmp_path / "a").exists()


def test_what_the_agent_can_not_do_it_says_and_goes_on(tmp_path: Path) -> None:
    with agent_here(tmp_path, Files()) as saver:
        assert saver.agent is not None
        channel = Channel.connect(saver.agent.address, 30, "the agent")
        try:
            for message in ({"op": "slot", "rank": 0, "bytes": "many", "memory": None}, {"op": "nothing"}):
                answer = channel.ask(message, 30)
                assert re.search(r"the agent could not do '(slot|nothing)': (Value|Key)Error: ", answer["error"])
        finally:
            channel.close()
        saver.save({"w": torch.zeros(3)}, tmp_path / "a").wait(60)


def test_threads_that_save_at_once_for_the_first_time_share_one_agent(tmp_path: Path) -> None:
    agents: list[str] = []

    def counted() -> str:
        agents.append(launch())
        return agents[-1]

    saver = AsyncSaver(launcher=counted)
    together = threading.Barrier(4)

    def save(number: int) -> None:
        together.wait(30)
        saver.save({"w": torch.full((1000 + number,), number)}, tmp_path / str(number)).wait(60)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        saver.close()
    assert len(agents) == 1
    for number in range(4):
        with ckpt.open(tmp_path / str(number)) as checkpoint:
            assert (checkpoint["w"][...] == number).all()


def test_plain_values_are_those_of_their_step_however_fast_saves_follow(tmp_path: Path) -> None:
    pendings = [ckpt.async_save({"w": torch.zeros(3), "n": step}, tmp_path / str(step)) for step in range(8)]
    for step, pending in enumerate(pendings):
        pending.wait(30)
        with ckpt.open(tmp_path / str(step)) as checkpoint:
            assert checkpoint.values["n"] == step


class Counting(torch.nn.Module):
    """Buffers that change in each forward pass, as running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(200, 200) for _ in range(6)])
        self.register_buffer("seen", torch.zeros(50_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("kind", ["foreach", "fused", "single", "two", "scheduled"])
def test_each_checkpoint_has_the_values_of_its_step_whatever_the_timing(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Counting()
    parameters = list(model.parameters())
    options: dict[str, Any] = {"fused": True} if kind == "fused" else {"foreach": kind == "foreach"}
    split = 4 if kind == "two" else len(parameters)
    optimizers = [torch.optim.Adam(part, **options) for part in (parameters[:split], parameters[split:]) if part]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers if kind == "scheduled"]
    average = torch.zeros(200, 200)
    state = {"model": model, "optimizers": optimizers, "average": average, "schedulers": schedulers}
    expected: list[dict[str, torch.Tensor]] = []
    pendings = []
    chance = random.Random(kind)
    for step in range(24):
        model(torch.randn(4, 200)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        expected.append(
            {
                "average": average.clone(),
                **{f"model.{name}": value.clone() for name, value in model.state_dict().items()},
                **{
                    f"step{k}": optimizers[k].state[optimizers[k].param_groups[0]["params"][0]]["exp_avg"].clone()
                    for k in range(len(optimizers))
                },
            }
        )
        pendings.append(ckpt.async_save(state, tmp_path / str(step)))
        # what no optimizer owns may change at once
        average += 1
        model.seen += 1
        if chance.random() < 0.5:
            time.sleep(chance.random() / 200)
    for step, (pending, values) in enumerate(zip(pendings, expected, strict=True)):
        pending.wait(60)
        with ckpt.open(tmp_path / str(step)) as checkpoint:
            for name, value in values.items():
                stored = name
                if name.startswith("step"):
                    first = "layers.0.weight" if name == "step0" else "layers.2.weight"
                    stored = f"optimizers.{name[4:]}.state.{first}.exp_avg"
                assert torch.equal(checkpoint[stored][...], value), f"step {step}: {name}"


def test_a_change_that_no_optimizer_announced_fails_the_save_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters())
    changed = threading.Event()
    copy = capturing._copy

    def late(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if threading.current_thread().name == "ckpt-capture":
            assert changed.wait(30)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", late)
    state = {"model": model, "optimizer": optimizer}
    pending = ckpt.async_save(state, tmp_path / "a")
    with torch.no_grad():
        model.weight += 1
    changed.set()
    with pytest.raises(SaveFailedError, match='capture="eager"'):
        pending.wait()
    assert not (tmp_path / "a").exists()
    # at the next use as well, so that it can't pass unheard
    with pytest.raises(SaveFailedError, match="was changed while it was captured"):
        ckpt.async_save(state, tmp_path / "c")
    # eager captures are done when the call returns
    pending = ckpt.async_save(state, tmp_path / "b", capture="eager")
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    pending.wait()
    with ckpt.open(tmp_path / "b") as checkpoint:
        assert torch.equal(checkpoint["model.weight"][:], before)


def test_refusals_are_raised_at_the_call_and_leave_nothing(tmp_path: Path) -> None:
    ckpt.async_save({"w": torch.zeros(3)}, tmp_path / "a").wait()
    with pytest.raises(CheckpointExistsError):
        ckpt.async_save({"w": torch.zeros(3)}, tmp_path / "a")
    with pytest.raises(TypeError, match="hook"):
        ckpt.async_save({"hook": print}, tmp_path / "b")
    with pytest.raises(StateError, match="no training step"):
        ckpt.async_save({"w": torch.zeros(3)}, tmp_path / "b", step=-1)
    assert os.listdir(tmp_path) == ["a"]


class Broken(Files):
    """A disk that is full for data files while `full` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.full = True

    def create(self, path: str, *, direct: bool) -> File:
        if self.full and "/data/" in path:
            raise OSError(28, "No space left on device", path)
        return super().create(path, direct=direct)


def test_a_write_that_fails_is_told_by_the_handle_and_at_the_next_save(tmp_path: Path) -> None:
    disk = Broken()
    with agent_here(tmp_path, disk) as saver:
        pending = saver.save({"w": torch.zeros(3)}, tmp_path / "run" / "a")
        with pytest.raises(SaveFailedError, match="No space left"):
            pending.wait()
        with pytest.raises(SaveFailedError, match="No space left"):
            saver.save({"w": torch.zeros(3)}, tmp_path / "run" / "c")
        disk.full = False
        saver.save({"w": torch.zeros(3)}, tmp_path / "run" / "d").wait()
    assert sorted(os.listdir(tmp_path / "run")) == ["d"]


class Slow(Files):
    """A disk that writes no data before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def create(self, path: str, *, direct: bool) -> File:
        if "/data/" in path:
            assert self.go.wait(60)
        return super().create(path, direct=direct)


def test_a_full_arena_makes_a_save_wait_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Slow()
    with agent_here(tmp_path, disk) as saver:
        pendings = [saver.save({"w": torch.full((9,), float(k))}, tmp_path / str(k)) for k in range(3)]
        for pending in pendings:
            pending.captured(30)
            assert not pending.done()
        waited = threading.Thread(
            target=lambda: pendings.append(saver.save({"w": torch.full((9,), 3.0)}, tmp_path / "3"))
        )
        waited.start()
        until(lambda: "arena is full" in caplog.text, "the save to say that it waits")
        assert waited.is_alive()
        disk.go.set()
        waited.join(30)
        for k, pending in enumerate(pendings):
            pending.wait(30)
            with ckpt.open(tmp_path / str(k)) as checkpoint:
                assert checkpoint["w"][0].item() == k
        assert len(pendings) == 4


# --- agents as processes


def agents_below(folder: str) -> None:
    """Have the agents that this process starts live in `agents` there, apart from those of others on this machine."""
    homes.MEMORY = os.path.join(folder, "agents")
    os.makedirs(homes.MEMORY, exist_ok=True)


def die_when_captured(rank: int, world_size: int, folder: str, when: str) -> None:
    torch.manual_seed(0)
    agents_below(folder)
    state = {"w": torch.arange(3_000_000, dtype=torch.float32), "x": ckpt.PerRank(rank)}
    ckpt.save({"w": torch.zeros(3)}, f"{folder}/before")
    if when == "captured":
        ckpt.async_save(state, f"{folder}/a").captured()
    else:
        capturing._copy = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        ckpt.async_save(state, f"{folder}/a")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_captured_save_is_committed_although_all_trainers_are_killed(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(die_when_captured, world_size, str(tmp_path), "captured", allow_death=True)
    assert all(isinstance(result, Killed) for result in results)
    until((tmp_path / "a" / "manifest.json").exists, "the agent to commit")
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["w"][:], torch.arange(3_000_000, dtype=torch.float32))
    until(lambda: not os.listdir(tmp_path / "agents"), "the agent to end and leave nothing")


def test_a_save_whose_trainer_died_before_capturing_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(die_when_captured, 1, str(tmp_path), "copying", allow_death=True)
    until(lambda: not os.listdir(tmp_path / "agents"), "the agent to end and leave nothing")
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["agents", "before"]


def train_and_save(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 101), torch.nn.ReLU(), torch.nn.Linear(101, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",)))
    optimizer = torch.optim.AdamW(model.parameters())
    pendings = []
    for step in range(6):
        model(torch.randn(4, 33)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ckpt.save({"model": model, "optimizer": optimizer}, f"{folder}/sync_{step}")
        pendings.append(ckpt.async_save({"model": model, "optimizer": optimizer}, f"{folder}/async_{step}"))
    for pending in pendings:
        pending.wait(60)
    with pytest.raises(ValuesDifferError):
        ckpt.async_save({"differs": rank}, f"{folder}/refused")
    dist.barrier()


def test_sharded_training_saves_every_step_as_synchronous_saves_do(tmp_path: Path) -> None:
    run_ranks(train_and_save, 4, str(tmp_path), timeout=120)
    for step in range(6):
        with ckpt.open(tmp_path / f"sync_{step}") as one, ckpt.open(tmp_path / f"async_{step}") as other:
            for name in one.tensors:
                assert torch.equal(one[name][...], other[name][...]), f"step {step}: {name}"


def test_a_model_that_grows_and_shrinks_between_saves_just_works(tmp_path: Path) -> None:
    disk = Slow()
    states = [{"w": torch.full((size,), float(size))} for size in (10, 100_000, 50, 300_000, 7)]
    with agent_here(tmp_path, disk) as saver:
        # all of them lie in their arenas, old and new ones, before the first is written
        pendings = [saver.save(state, tmp_path / str(k)) for k, state in enumerate(states)]
        disk.go.set()
        for k, (pending, state) in enumerate(zip(pendings, states, strict=True)):
            pending.wait(30)
            with ckpt.open(tmp_path / str(k)) as checkpoint:
                assert torch.equal(checkpoint["w"][:], state["w"])
    assert [name for name in os.listdir(tmp_path / "home") if name.startswith("arena")] == []


def test_a_load_waits_for_what_is_still_being_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(10, 10)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
    ckpt.save(state, tmp_path / "before")
    original = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    changed = model.weight.detach().clone()
    copy = capturing._copy

    def slow(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if threading.current_thread().name == "ckpt-capture":
            # as long as it takes, a load that did not wait would be done
            time.sleep(0.3)
        copy(pairs)

    monkeypatch.setattr(capturing, "_copy", slow)
    pending = ckpt.async_save(state, tmp_path / "a")
    ckpt.load(state, tmp_path / "before")
    assert torch.equal(model.weight, original)
    pending.wait()
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["model.weight"][:], changed)
