"""Events of real saves and loads on several ranks: every phase of every rank, also when one of them fails or dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.events import Event, JsonLinesSink, OperationEnded, PhaseEnded, WaitEnded, add_sink
from ckpt.saving.save import Saver
from ckpt.storage.files import File, Files
from ckpt_formats.errors import RankError, SaveFailedError
from tests.events.reading import assert_matched, json_lines, open_at_the_end, trace
from tests.ranks import Killed, run_ranks

SAVE = ["describe", "plan", "write", "commit"]
LOAD = ["plan", "agree", "read", "agree", "apply"]


def save_and_load(rank: int, world_size: int, folder: str) -> list[Event]:
    told: list[Event] = []
    state: dict[str, Any] = {"w": ckpt.Shard(torch.full((4, 5), float(rank)), (4 * world_size, 5), (4 * rank, 0))}
    with add_sink(told.append):
        ckpt.save(state, f"{folder}/step_9")
        ckpt.load(state, f"{folder}/step_9")
    return told


def test_every_phase_of_every_rank_is_told(tmp_path: Path) -> None:
    for rank, told in enumerate(run_ranks(save_and_load, 2, str(tmp_path))):
        assert_matched(told)
        assert {(event.rank, event.world_size) for event in told} == {(rank, 2)}
        save, load = (event for event in told if isinstance(event, OperationEnded))
        phases = [event for event in told if isinstance(event, PhaseEnded)]
        assert [event.phase for event in phases if event.id == save.id] == SAVE
        assert [event.phase for event in phases if event.id == load.id] == LOAD
        assert {event.step for event in phases if event.id == save.id} == {9}
        assert (save.bytes, load.step) == (160, 9)
        assert load.bytes >= 80
        assert all(event.bytes >= 80 for event in phases if event.phase in {"write", "read"})
        assert sum(event.seconds for event in phases if event.id == save.id) <= save.seconds
        assert [event.error for event in [*phases, save, load]] == [None] * 11


def test_ranks_tell_how_long_they_waited_for_each_other(tmp_path: Path) -> None:
    for told in run_ranks(save_and_load, 2, str(tmp_path)):
        waits = [event for event in told if isinstance(event, WaitEnded)]
        assert {event.reason for event in waits} == {"other ranks"}
        assert {event.phase for event in waits if event.operation == "save"} == {"plan", "commit"}
        assert {event.phase for event in waits if event.operation == "load"} == {"agree", "apply"}
        for end in (event for event in told if isinstance(event, PhaseEnded)):
            assert 0 <= end.waited <= end.seconds


class _Full(Files):
    """A file system on which nothing more fits."""

    def create(self, path: str, *, direct: bool) -> File:  # noqa: ARG002 - as in Files
        raise OSError(28, "No space left on device", path)


def fail_on_rank_1(rank: int, world_size: int, folder: str) -> list[Event]:
    told: list[Event] = []
    with add_sink(told.append), pytest.raises(SaveFailedError):
        Saver(_Full() if rank == 1 else Files()).save(
            {"w": ckpt.Shard(torch.zeros(3), (3 * world_size,), (3 * rank,))}, f"{folder}/a"
        )
    return told


def test_a_failed_save_ends_with_an_error_on_every_rank_and_the_phase_on_its_own(tmp_path: Path) -> None:
    for rank, told in enumerate(run_ranks(fail_on_rank_1, 2, str(tmp_path))):
        assert_matched(told)
        (end,) = (event for event in told if isinstance(event, OperationEnded))
        assert told[-1] is end
        assert end.error is not None
        assert end.error.startswith("SaveFailedError: ")
        assert "rank 1 could not write (No space left on device)" in end.error
        errors = {event.phase: event.error is not None for event in told if isinstance(event, PhaseEnded)}
        assert errors == {"describe": False, "plan": False, "write": rank == 1, "commit": True}


class _Deadly(Files):
    """A file system that kills who writes to it."""

    def create(self, path: str, *, direct: bool) -> File:  # noqa: ARG002 - as in Files
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")


def die_on_rank_1(rank: int, world_size: int, folder: str) -> None:
    add_sink(JsonLinesSink(f"{folder}/events"))
    with pytest.raises(RankError):
        Saver(_Deadly() if rank == 1 else Files()).save({"w": torch.zeros(3), "r": ckpt.PerRank(rank)}, f"{folder}/a")


def test_the_file_of_a_rank_that_died_tells_what_it_was_at(tmp_path: Path) -> None:
    assert run_ranks(die_on_rank_1, 2, str(tmp_path), allow_death=True)[1] == Killed(signal.SIGKILL)
    lines = json_lines(tmp_path / "events")
    dead = [line for line in lines if line["rank"] == 1]
    assert (dead[-1]["event"], dead[-1]["phase"]) == ("phase_started", "write")
    alive = [line for line in lines if line["rank"] == 0]
    assert alive[-1]["event"] == "operation_ended"
    assert alive[-1]["error"].startswith("RankError: ")


def save_by_environment(rank: int, world_size: int, folder: str) -> None:
    os.environ["CKPT_EVENTS"] = f"jsonl:{folder}/lines,trace:{folder}/traces"
    for step in range(3):
        ckpt.save({"w": torch.zeros(3)}, f"{folder}/step_{step}")


def test_ranks_that_share_a_folder_share_no_file(tmp_path: Path) -> None:
    run_ranks(save_by_environment, 2, str(tmp_path))
    for folder, suffix in (("lines", "jsonl"), ("traces", "trace.json")):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert [name[:10] for name in names] == ["rank00000-", "rank00001-"]
        assert all(name.endswith(suffix) for name in names)
    for path in (tmp_path / "traces").iterdir():
        entries = trace(path)
        assert open_at_the_end(entries) == []
        assert {entry["pid"] for entry in entries if entry["ph"] != "M"} == {int(path.name[4:9])}
        assert [entry["name"] for entry in entries if entry["ph"] == "B" and "wait" not in entry["name"]] == SAVE * 3
    merged = ["["] + [
        line
        for path in (tmp_path / "traces").iterdir()
        for line in path.read_text().splitlines()
        if line.endswith("},")
    ]
    (tmp_path / "all.trace.json").write_text("\n".join(merged))
    assert open_at_the_end(trace(tmp_path / "all.trace.json")) == []
    assert {line["rank"] for line in json_lines(tmp_path / "lines")} == {0, 1}
