"""Events of saves that do not stop the training: the trainers tell of captures, the agent of writing and the commit."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.events import Event, OperationEnded, PhaseEnded, add_sink
from ckpt.storage.files import File, Files
from ckpt_formats.errors import CheckpointError
from tests.agent.test_async_save import agent_here
from tests.events.reading import assert_matched, json_lines, open_at_the_end, trace
from tests.ranks import run_ranks


def train_and_save(rank: int, world_size: int, folder: str) -> None:
    os.environ["CKPT_EVENTS"] = f"jsonl:{folder}/lines,trace:{folder}/traces"
    model = torch.nn.Linear(300, 500)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()
        pending = ckpt.async_save({"model": model, "optimizer": optimizer}, f"{folder}/step_{step}")
        optimizer.step()
        pending.wait()


def test_every_phase_of_every_rank_is_told_by_trainers_and_agent(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, str(tmp_path))
    lines = json_lines(tmp_path / "lines")
    for rank in range(2):
        captures = [line for line in lines if line["operation"] == "capture" and line["rank"] == rank]
        ended = [line for line in captures if line["event"] == "phase_ended"]
        for step in range(3):
            phases = {line["phase"] for line in ended if line["step"] == step}
            assert phases == {"describe", "plan", "capture", "lazy capture"}
        writes = [line for line in lines if line["event"] == "phase_ended" and line["phase"] == "write"]
        assert {line["step"] for line in writes if line["rank"] == rank} == {0, 1, 2}
    saves = [line for line in lines if line["event"] == "operation_ended" and line["operation"] == "save"]
    assert [line["step"] for line in saves] == [0, 1, 2]
    assert all(line["error"] is None and line["bytes"] > 3 * 150_000 * 4 for line in saves)
    assert all(set(line["phases"]) == {"write", "commit"} for line in saves)
    starts = [line["event"].removesuffix("_started") for line in lines if line["event"].endswith("_started")]
    ends = [line["event"].removesuffix("_ended") for line in lines if line["event"].endswith("_ended")]
    assert sorted(starts) == sorted(ends)
    for path in (tmp_path / "traces").iterdir():
        assert open_at_the_end(trace(path)) == []


def save_and_listen(rank: int, world_size: int, folder: str) -> list[str]:
    os.environ["CKPT_EVENTS"] = f"jsonl:{folder}/lines"
    told: list[Event] = []
    with add_sink(told.append):
        ckpt.async_save({"w": torch.zeros(1000)}, f"{folder}/step_1").wait(30)
        torch.distributed.barrier()
    assert_matched(told)
    return [f"{type(event).__name__} {event.operation}" for event in told if event.operation == "save"]


def test_a_sink_of_rank_0_hears_what_the_agent_did_when_the_save_is_over(tmp_path: Path) -> None:
    first, second = run_ranks(save_and_listen, 2, str(tmp_path))
    assert first[0] == "OperationStarted save"
    assert first[-1] == "OperationEnded save"
    assert first.count("PhaseEnded save") == 3
    # of the others none: they would hear the same
    assert second == []
    # nor are the sinks of the environment told twice
    ends = [line for line in json_lines(tmp_path / "lines") if line["event"] == "operation_ended"]
    assert sorted(line["operation"] for line in ends) == ["capture", "capture", "save"]


class _Full(Files):
    """A file system on which nothing more fits."""

    def create(self, path: str, *, direct: bool) -> File:  # noqa: ARG002 - as in Files
        raise OSError(28, "No space left on device", path)


def test_a_save_that_the_agent_can_not_write_ends_with_an_error(tmp_path: Path) -> None:
    told: list[Event] = []
    with add_sink(told.append), agent_here(tmp_path, _Full()) as saver:
        pending = saver.save({"w": torch.zeros(10)}, tmp_path / "a")
        with pytest.raises(CheckpointError):
            pending.wait(30)
    assert_matched(told)
    ends = {event.operation: event.error for event in told if isinstance(event, OperationEnded)}
    assert ends["capture"] is None
    assert "No space left on device" in str(ends["save"])
    (write,) = (event for event in told if isinstance(event, PhaseEnded) and event.phase == "write")
    assert "No space left on device" in str(write.error)


def test_the_log_has_one_line_per_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckpt")
    state: dict[str, Any] = {"w": torch.zeros(10)}
    with agent_here(tmp_path, Files()) as saver:
        pending = saver.save(state, tmp_path / "step_4")
        for _ in range(2):
            pending.wait(30)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("saved step 4: 40 B in ")
    assert lines[0].endswith(f" s, to {tmp_path}/step_4")
