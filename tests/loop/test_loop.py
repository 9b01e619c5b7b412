"""A Checkpointer around a loop, alone and on several ranks."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt.loop import interruption
from ckpt_formats.errors import ConfigurationError, CorruptionError, FactsError, SaveFailedError, StateError
from ckpt_formats.runs import State, find_checkpoints
from tests.ranks import Killed, run_ranks


class Training:
    """A small model, an optimizer, and a count of the steps: what they become depends on the steps alone."""

    def __init__(self, *, sharded: int = 0) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (sharded,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state: dict[str, object] = {"model": self.model, "optimizer": self.optimizer, "count": 0}

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.model(torch.randn(4, 8, generator=generator)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["count"] = number

    def weights(self) -> list[torch.Tensor]:
        return [
            (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for value in self.model.parameters()
        ]


def after(steps: int) -> list[torch.Tensor]:
    """The weights of a training that was never interrupted."""
    training = Training()
    for step in range(1, steps + 1):
        training.step(step)
    return training.weights()


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def train(run: Path, steps: int, each: Callable[[Any, int], object] = lambda *_: None, **options: Any) -> list[int]:
    """Train up to a step, alone; returns the steps that were made. The weights are those of an unbroken training."""
    training = Training()
    made = []
    with ckpt.Checkpointer(run, training.state, **options) as loop:
        for step in loop.steps(steps):
            training.step(step)
            made.append(step)
            each(loop, step)
    assert same(training.weights(), after(loop.step))
    return made


def saved(run: Path) -> list[int]:
    """The steps of the whole checkpoints of a run."""
    return [item.step or 0 for item in find_checkpoints(run) if item.state is State.WHOLE]


def test_the_memory_for_the_first_save_is_there_when_the_loop_begins(tmp_path: Path) -> None:
    state: dict[str, object] = {"weights": torch.zeros(1 << 25)}  # 128 MiB: the pages of three take a while to touch
    with ckpt.Checkpointer(tmp_path, state, every=1) as run:
        spare = run._saver._slots._spare
        assert spare is not None
        assert len(spare.view) >= 1 << 27
        # of the file's pages none is left to be made
        assert os.stat(spare.arena).st_blocks * 512 >= 3 << 27


def test_a_loop_saves_every_so_many_steps_and_its_last_and_goes_on_from_there(tmp_path: Path) -> None:
    assert train(tmp_path / "run", 10, every=4) == list(range(1, 11))
    assert saved(tmp_path / "run") == [4, 8, 10]
    assert train(tmp_path / "run", 13, every=4) == [11, 12, 13]
    assert saved(tmp_path / "run") == [4, 8, 10, 12, 13]
    # all steps are made
    assert train(tmp_path / "run", 13, every=4) == []


def test_what_rank_0_logs_at_a_step_is_in_the_checkpoint_of_that_step(tmp_path: Path) -> None:
    train(tmp_path, 4, lambda loop, step: loop.log(loss=10.0 - step) if step < 4 else None, every=1)
    for step in (1, 2, 3):
        with ckpt.open(tmp_path / f"step_{step:08d}") as checkpoint:
            assert checkpoint.values["checkpointer"]["metrics"] == {"loss": 10.0 - step}
    with ckpt.open(tmp_path / "step_00000004") as checkpoint:
        assert checkpoint.values["checkpointer"]["metrics"] == {}


def test_a_metric_that_can_not_be_recorded_is_an_error_where_it_is_logged(tmp_path: Path) -> None:
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every=100) as loop:
        for name in ("per layer\tgrad", "top1,top5", " loss", ""):
            with pytest.raises(FactsError, match="printable characters without commas"):
                loop.log(**{"loss": 1.0, name: 1.0})
        for value in (None, "low", torch.zeros(2)):
            with pytest.raises(FactsError, match=r"the metric 'loss' is .*; give a number"):
                loop.log(loss=value)  # type: ignore[arg-type]


def test_a_rule_by_a_metric_that_nobody_logs_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 5, lambda loop, step: loop.log(val_loss=step), every=1, keep=ckpt.BestN(2, "val_los"))
    assert caplog.text.count("no checkpoint has the metric 'val_los' (those that are: 'val_loss')") == 1


@pytest.mark.parametrize("options", [{}, {"compress": True, "bandwidth": 1e6}])
def test_a_loop_compresses_its_checkpoints_and_keeps_to_a_bandwidth_if_asked_to(
    options: dict[str, Any], tmp_path: Path
) -> None:
    weights = torch.randn(1 << 18)
    begin = time.monotonic()
    with ckpt.Checkpointer(tmp_path, {"weights": weights}, every=1, **options) as loop:
        assert list(loop.steps(1)) == [1]
    (file,) = (tmp_path / "step_00000001" / "data").iterdir()
    assert (file.stat().st_size < 0.95 * weights.nbytes) == bool(options)
    if options:
        assert time.monotonic() - begin > 0.8 * file.stat().st_size / 1e6
    other = {"weights": torch.zeros_like(weights)}
    ckpt.load(other, tmp_path / "step_00000001")
    assert torch.equal(other["weights"], weights)


def test_a_save_that_is_asked_for_is_made_at_the_end_of_the_step(tmp_path: Path) -> None:
    train(tmp_path, 9, lambda loop, step: loop.save() if step == 3 else None, every=100)
    assert saved(tmp_path) == [3, 9]


def test_integers_of_any_kind_say_when_to_save_what_to_keep_and_where_to_end(tmp_path: Path) -> None:
    train(tmp_path, np.int64(5), every=np.int64(1), keep=np.int64(2))  # type: ignore[arg-type]
    assert saved(tmp_path) == [4, 5]
    assert (
        ckpt.Checkpointer(tmp_path, {}, every=np.int64(1)).levels[0].every
        == ckpt.Checkpointer(tmp_path, {}, every=1).levels[0].every
    )


def test_steps_outside_of_the_block_are_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    run = ckpt.Checkpointer(tmp_path, {"x": torch.zeros(3)}, every=1)
    with pytest.raises(SaveFailedError, match=r"steps\(\) is used outside of the `with` block"):
        run.steps(3)
    with run:
        left, begun = run.steps(3), run.steps(3)
        assert next(begun) == 1
        with pytest.raises(ConfigurationError, match=r"steps\(3.0\): give the number"):
            run.steps(3.0)  # type: ignore[arg-type]
        with pytest.raises(SaveFailedError, match="a second time, inside of itself"):
            run.__enter__()
    for steps in (lambda: run.steps(3), lambda: next(left), lambda: next(begun)):
        with pytest.raises(SaveFailedError, match="outside of the `with` block"):
            steps()
    assert saved(tmp_path) == []
    with run:
        assert list(run.steps(2)) == [1, 2]
    assert saved(tmp_path) == [1, 2]


def test_steps_before_batches_in_a_zip_use_each_batch_once(tmp_path: Path) -> None:
    seen: list[int] = []
    for stop in (3, 9):
        sampler = ckpt.Sampler(20, batch_size=2)
        with ckpt.Checkpointer(tmp_path, {"sampler": sampler}, every=1) as run:
            for step, batch in zip(run.steps(10), sampler.consume(sampler), strict=False):
                seen += batch
                if step == stop:
                    run.stop()
    assert seen == [index for batch in ckpt.Sampler(20, batch_size=2) for index in batch][: len(seen)]
    assert len(seen) == 18


def test_the_loop_can_be_asked_to_stop_and_goes_on_later(tmp_path: Path) -> None:
    assert train(tmp_path, 9, lambda loop, step: loop.stop() if step == 3 else None, every=100) == [1, 2, 3]
    assert train(tmp_path, 9, every=100) == [4, 5, 6, 7, 8, 9]
    assert saved(tmp_path) == [3, 9]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_a_last_time_and_ends_the_loop(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every=100) as loop:
        for step in loop.steps(1000):
            training.step(step)
            if step == 5:
                os.kill(os.getpid(), number)
    assert (loop.step, loop.stopped) == (5, number.name)
    assert saved(tmp_path) == [5]
    assert signal.getsignal(number) is before


def test_a_process_that_was_forked_in_the_loop_dies_of_the_signal_as_ever(tmp_path: Path) -> None:
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every=100) as loop:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            # an interpreter that is still being forked loses signals
            os.write(writing, b"1")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert list(loop.steps(3)) == [1, 2, 3]
    assert loop.stopped is None


def test_steps_go_on_in_a_second_loop_unless_the_first_was_told_to_stop(tmp_path: Path) -> None:
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every=2) as loop:
        assert list(loop.steps(3)) == [1, 2, 3]
        for step in loop.steps(9):
            if step == 5:
                loop.stop()
        assert loop.step == 5
        assert list(loop.steps(9)) == []
    assert saved(tmp_path) == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["file", "function"])
def test_a_notice_of_preemption_saves_a_last_time_and_ends_the_loop(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "POLL_S", 0.02)
    file = tmp_path / "notice"
    training = Training()
    notice: Any = file if kind == "file" else file.exists
    with ckpt.Checkpointer(tmp_path / "run", training.state, every=10_000_000, preemption=notice) as loop:
        for step in loop.steps(10_000_000):
            if step == 3:
                file.touch()
            time.sleep(0.002)
    assert loop.stopped == "preemption notice"
    assert 3 <= loop.step < 10_000_000
    assert saved(tmp_path / "run") == [loop.step]


def test_time_says_when_to_save_too(tmp_path: Path) -> None:
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every="0.2 s") as loop:
        begin = time.monotonic()
        for step in loop.steps(10_000_000):
            time.sleep(0.01)
            if step % 10 == 0 and len(saved(tmp_path)) >= 3:
                loop.stop()
            assert time.monotonic() - begin < 60
        seconds = time.monotonic() - begin
    *steps, last = saved(tmp_path)
    assert last == loop.step
    # not oftener than that, nor later than at the end of the step in which the time was up, each of which takes 0.01 s
    assert len(steps) <= seconds / 0.2
    assert all(after - before <= 21 for before, after in zip([0, *steps], [*steps, last], strict=True))


def test_as_often_as_pays_begins_with_a_save_that_shows_what_saves_cost(tmp_path: Path) -> None:
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, mtbf="1h") as loop:
        for step in loop.steps(1_000_000):
            training.step(step)
            if step == 1:
                begin = time.monotonic()
            if loop._lead is not None and loop._lead.committed is not None:
                break
            assert time.monotonic() - begin < 30
        interval = loop._lead.interval() if loop._lead else None
    # a save that stops the training for some milliseconds pays some seconds later, at a failure per hour
    assert interval is not None
    assert 1 < interval < 60
    assert saved(tmp_path) == [1]


@pytest.mark.parametrize("damage", ["a flipped bit in the data", "a flipped bit in the manifest", "a file gone"])
def test_damage_is_passed_over_for_the_checkpoint_before_and_moved_aside(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 6, every=2)
    newest = tmp_path / "step_00000006"
    (data,) = (newest / "data").iterdir()
    victim = newest / "manifest.json" if "manifest" in damage else data
    content = bytearray(victim.read_bytes())
    if "gone" in damage:
        victim.unlink()
    else:
        content[-20] ^= 1
        victim.write_bytes(content)
    # the steps that are lost are made again, and saved again
    assert train(tmp_path, 8, every=2) == [5, 6, 7, 8]
    assert saved(tmp_path) == [2, 4, 6, 8]
    assert os.listdir(tmp_path / "damaged") == ["step_00000006.0"]
    assert "step 6 on disk can't be used" in caplog.text
    assert "goes on after step 4" in caplog.text


def test_a_training_with_thousands_of_open_files_saves_too(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        train(tmp_path, 2, every=1)
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert saved(tmp_path) == [1, 2]


def test_memory_for_captures_is_given_back_at_the_end(tmp_path: Path) -> None:
    gc.disable()  # at once, not when it is collected
    try:
        train(tmp_path, 2, every=1)
        assert "/ckpt-agent-" not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_what_can_not_be_read_for_a_moment_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 6, every=2)
    read, failed = os.preadv, []

    def fails_once(fd: int, *arguments: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if "/data/" in name and len(failed) < 2:  # past the cache, and then through it
            failed.append(name)
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, *arguments)

    monkeypatch.setattr(os, "preadv", fails_once)
    assert train(tmp_path, 8, every=2) == [7, 8]
    assert len(failed) == 2
    assert saved(tmp_path) == [2, 4, 6, 8]
    assert not (tmp_path / "damaged").exists()


def test_a_run_of_which_all_is_damaged_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    train(tmp_path, 2, every=1)
    for step in (1, 2):
        (data,) = (tmp_path / f"step_{step:08d}" / "data").iterdir()
        data.unlink()
    with pytest.raises(CorruptionError, match="none of the checkpoints of this run can be loaded"):
        train(tmp_path, 4, every=1)
    assert not (tmp_path / "damaged").exists()


def test_another_model_is_no_damage(tmp_path: Path) -> None:
    train(tmp_path, 2, every=1)
    with (
        pytest.raises(StateError.__mro__[1], match="does not fit the state"),
        ckpt.Checkpointer(tmp_path, {"other": torch.zeros(3)}),
    ):
        pass
    assert saved(tmp_path) == [1, 2]


def test_a_save_that_fails_is_told_and_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def hinder(loop: Any, step: int) -> None:
        if step in (2, 3):
            # a file lies where the checkpoint's folder would
            (tmp_path / f"step_0000000{step + 1}").touch()

    assert train(tmp_path, 6, hinder, every=1) == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path) == [1, 2, 5, 6]
    assert "step 3 is not saved, and the training goes on" in caplog.text
    assert "step 4 is not saved, and the training goes on" in caplog.text
    assert "2 saves in a row have failed" in caplog.text


def test_a_disk_that_is_full_for_a_while_costs_only_the_saves_of_that_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(loop: Any, step: int) -> None:
        agent, lead = loop._saver.agent.pid, loop._lead
        if step == 2:
            until(lambda: lead.committed == 1, "step 1 to be committed")
            # the agent can't write a file of any size any more
            resource.prlimit(agent, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if step == 4:
            until(lambda: lead.failed is not None and "step 3" in caplog.text, "the failures to be known")
            resource.prlimit(agent, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert train(tmp_path, 6, fill, every=1) == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path) == [1, 4, 5, 6]
    assert "step 2 is not saved, and the training goes on" in caplog.text
    assert "File too large" in caplog.text
    assert "the newest checkpoint is of step 1; 2 saves in a row have failed" in caplog.text


def test_an_agent_that_is_killed_is_replaced_and_the_loop_goes_on(tmp_path: Path) -> None:
    agents = []

    def kill(loop: Any, step: int) -> None:
        agents.append(loop._saver.agent.pid)
        if step == 3:
            until(lambda: loop._lead.committed == 2, "step 2 to be committed")
            os.kill(agents[-1], signal.SIGKILL)

    assert train(tmp_path, 8, kill, every=1, keep=4) == list(range(1, 9))
    assert len(set(agents)) == 2
    assert saved(tmp_path) == [5, 6, 7, 8]


def test_the_end_of_a_training_that_can_not_be_saved_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaveFailedError, match="step_00000002"):
        train(tmp_path, 2, lambda *_: (tmp_path / "step_00000002").touch(), every=1)
    assert saved(tmp_path) == [1]


def test_failures_are_raised_where_that_is_asked_for(tmp_path: Path) -> None:
    made: list[int] = []

    def hinder(loop: Any, step: int) -> None:
        made.append(step)
        (tmp_path / "step_00000003").touch()
        if step == 4:
            until(lambda: loop._lead.failed is not None, "the failure of step 3 to be known")

    with pytest.raises(SaveFailedError, match="step_00000003"):
        train(tmp_path, 9, hinder, every=1, on_error="raise")
    assert made in ([1, 2, 3], [1, 2, 3, 4])


def test_a_state_that_can_not_be_saved_is_raised_at_once(tmp_path: Path) -> None:
    training = Training()
    training.state["function"] = print
    with (
        pytest.raises(TypeError, match="function"),
        ckpt.Checkpointer(tmp_path, training.state, every=1) as loop,
    ):
        for _ in loop.steps(3):
            pass
    assert saved(tmp_path) == []


def test_an_error_in_the_loop_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 5, lambda _, step: 1 // (step - 3), every=1)
    until(lambda: saved(tmp_path) == [1, 2], "the agent to write what was captured")
    assert train(tmp_path, 5, every=1) == [3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "positive number of steps"),
        ({"every": "often"}, "every='often'"),
        ({"every": True}, "every=True"),
        ({"every": 2.0}, "every=2.0"),
        ({"keep": True}, "LatestN"),
        ({"on_error": "hide"}, "on_error"),
        ({"capture": "eagre"}, "capture='eagre'"),
        ({"memory": "64e6"}, "memory='64e6'"),
        ({"mtbf": "-1h"}, "mtbf"),
        ({"compress": "always"}, "compress='always'"),
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"keep": 0}, "LatestN"),
        ({"tiers": [ckpt.Disk("s3://bucket/a")]}, "Remote"),
        ({"tiers": [ckpt.Remote("/mnt/a")]}, "Disk"),
        ({"tiers": [ckpt.Remote("s3://bucket//b")]}, "Remote.'s3://bucket//b'. .* an empty part"),
        ({"tiers": [ckpt.Remote("s3://")]}, "Remote.'s3://'. names no bucket"),
        ({"tiers": [ckpt.Disk(), ckpt.Disk()]}, "two levels"),
        ({"tiers": [ckpt.Remote("s3://a/b"), ckpt.Disk("/x", every=4)], "every": 1}, "every=1 .* contradicts every=4"),
        ({"tiers": [ckpt.Disk(keep=2)], "keep": 3}, "keep=3 .* contradicts keep=2"),
        ({"tiers": [ckpt.Disk(), ckpt.Disk("/x", every="auto")]}, "auto"),
        ({"tiers": [ckpt.Disk(), ckpt.Remote("s3://a/b", options={"x": print})]}, "options of remote"),
        ({"tiers": [ckpt.Disk(), ckpt.Remote("s3://a/b", bandwidth=0)]}, "bandwidth=0"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_happens(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ckpt.Checkpointer(tmp_path / "run", {"w": torch.zeros(3)}, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_url_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="Remote"):
        ckpt.Checkpointer("s3://bucket/run", {"w": torch.zeros(3)})


def test_a_folder_that_can_not_be_written_is_an_error_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(SaveFailedError, match="nothing can be saved there"),
        ckpt.Checkpointer(tmp_path / "file" / "run", {"w": torch.zeros(3)}),
    ):
        pass


# --- on several ranks


def told_on_one_rank(rank: int, world_size: int, folder: str, how: str) -> tuple[list[int], str | None, bool]:
    training = Training(sharded=world_size)
    made = []
    with ckpt.Checkpointer(folder, training.state, every=1000) as loop:
        for step in loop.steps(1000):
            training.step(step)
            made.append(step)
            if step == 4 and rank == world_size - 1:
                if how == "signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    loop.stop()
    return made, loop.stopped, same(training.weights(), after(loop.step))


@pytest.mark.parametrize("how", ["signal", "stop"])
def test_a_signal_to_one_rank_saves_the_same_step_on_all(how: str, tmp_path: Path) -> None:
    results = run_ranks(told_on_one_rank, 4, str(tmp_path), how)
    # raised at the end of step 4, it holds everywhere after step 5
    reason = "SIGTERM" if how == "signal" else "stop()"
    assert [result[:2] for result in results] == [([1, 2, 3, 4, 5], reason)] * 4
    assert saved(tmp_path) == [5]


def by_the_clock(rank: int, world_size: int, folder: str, every: str) -> int:
    training = Training(sharded=world_size)
    with ckpt.Checkpointer(folder, training.state, every=every, mtbf=0.1) as loop:
        for step in loop.steps(1_000_000):
            training.step(step)
            # ranks are not in step, and their clocks say different things
            time.sleep(0.001 * rank)
            if rank == 1 and step % 10 == 0 and len(saved(Path(folder))) >= 3:
                loop.stop()
    return loop.step


@pytest.mark.parametrize("every", ["0.3 s", "auto"])
def test_ranks_save_the_same_steps_by_the_clock_of_one(every: str, tmp_path: Path) -> None:
    last = set(run_ranks(by_the_clock, 3, str(tmp_path), every))
    assert len(last) == 1
    steps = saved(tmp_path)
    assert steps[-1:] == list(last)
    assert len(steps) >= 4
    assert not [item for item in find_checkpoints(tmp_path) if item.state is not State.WHOLE]


def trained(rank: int, world_size: int, folder: str, steps: int, kill_at: int) -> tuple[int, bool]:
    training = Training(sharded=world_size)
    with ckpt.Checkpointer(folder, training.state, every=2) as loop:
        first = loop.step
        for step in loop.steps(steps):
            training.step(step)
            if step == kill_at:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
    return first, same(training.weights(), after(steps))


def test_a_run_goes_on_at_other_world_sizes_after_all_ranks_were_killed(tmp_path: Path) -> None:
    results = run_ranks(trained, 4, str(tmp_path), 20, 7, allow_death=True)
    assert all(isinstance(result, Killed) for result in results)
    # nobody waited for the save of step 6: that every rank had captured it is enough for the next job to find it
    results = run_ranks(trained, 2, str(tmp_path), 12, 0)
    assert [whole for _, whole in results] == [True, True]
    assert results[0][0] in (4, 6)
    assert run_ranks(trained, 3, str(tmp_path), 13, 0) == [(12, True)] * 3
    assert saved(tmp_path)[-2:] == [12, 13]


def twice(rank: int, world_size: int, folder: str) -> list[int]:
    made = []
    run = ckpt.Checkpointer(folder, {"x": torch.zeros(3)}, every=2)
    for total in (3, 5):
        with run:
            made += list(run.steps(total))
    return made


def test_a_checkpointer_is_entered_anew_and_goes_on(tmp_path: Path) -> None:
    assert run_ranks(twice, 2, str(tmp_path)) == [[1, 2, 3, 4, 5]] * 2


def fails_on(rank: int, world_size: int, folder: str, on_error: Any) -> tuple[int, str | None]:
    training = Training(sharded=world_size)
    if rank == 0:
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "step_00000002").touch()
    dist.barrier()
    try:
        with ckpt.Checkpointer(folder, training.state, every=1, on_error=on_error) as loop:
            for step in loop.steps(6 if on_error == "log" else 10_000):
                training.step(step)
    except SaveFailedError as error:
        return loop.step, type(error).__name__
    return loop.step, None


def test_failures_are_raised_on_every_rank_or_on_none(tmp_path: Path) -> None:
    (last, kind), other = run_ranks(fails_on, 2, str(tmp_path), "raise")
    assert (last, kind) == other
    assert kind == "SaveFailedError"
    assert 2 <= last < 10_000
    assert run_ranks(fails_on, 2, str(tmp_path / "other"), "log") == [(6, None)] * 2
    assert saved(tmp_path / "other") == [1, 3, 4, 5, 6]


def test_a_failure_that_the_next_save_makes_up_for_is_raised_nevertheless(tmp_path: Path) -> None:
    training = Training()
    steps = []

    def fail_and_succeed(loop: ckpt.Checkpointer) -> None:
        """The end of both saves is known before the loop asks again."""
        lead = loop._lead
        assert lead is not None
        lead.begun(2, ["disk"], SaveFailedError("the disk is full"))
        lead.begun(3, ["disk"], loop._saver.save(training.state, tmp_path / "step_00000003", step=3))
        until(lambda: lead.committed == 3, "step 3 to be committed")

    def train_on() -> None:
        with ckpt.Checkpointer(tmp_path, training.state, every=100, on_error="raise") as loop:
            for step in loop.steps(100):
                steps.append(step)
                training.step(step)
                if step == 2:
                    fail_and_succeed(loop)

    with pytest.raises(SaveFailedError, match="full"):
        train_on()
    assert steps == [1, 2]


def two_at_once(rank: int, world_size: int, folder: str) -> str | None:
    training = Training(sharded=world_size)
    try:
        with ckpt.Checkpointer(folder, training.state, every=1):
            return None
    except SaveFailedError as error:
        return str(error)


def test_a_second_job_is_told_who_has_the_run(tmp_path: Path) -> None:
    train(tmp_path, 1, every=1)
    training = Training()
    with ckpt.Checkpointer(tmp_path, training.state, every=1) as loop:
        for message in run_ranks(two_at_once, 2, str(tmp_path)):
            assert f"another job saves into this run, process {os.getpid()} on" in message
        for step in loop.steps(3):
            training.step(step)
    assert saved(tmp_path) == [1, 2, 3]
    assert run_ranks(two_at_once, 2, str(tmp_path)) == [None, None]


def until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition, for a limited time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckpt")


@pytest.fixture(scope="module", autouse=True)
def no_agent_stays() -> Any:
    yield
    until(lambda: not [t for t in threading.enumerate() if t.name == "ckpt-agent-reaper"], "the agents to end")
