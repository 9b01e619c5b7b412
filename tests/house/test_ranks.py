"""The tests' own runner of ranks: it tells what went wrong, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import distributed

from tests.ranks import Killed, run_ranks


def _sum_over_ranks(rank: int, world_size: int, weight: int) -> tuple[int, float]:
    total = torch.tensor(float(rank * weight))
    distributed.all_reduce(total)
    return rank, total.item()


def test_results_come_in_rank_order_from_one_process_group() -> None:
    assert run_ranks(_sum_over_ranks, 3, 10) == [(0, 30.0), (1, 30.0), (2, 30.0)]


def _return_tensor(rank: int, world_size: int) -> torch.Tensor:
    return torch.full((3,), rank)


def test_tensors_outlive_the_rank_that_made_them() -> None:
    first, second = run_ranks(_return_tensor, 2)
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [1, 1, 1]


def _where_am_i(rank: int, world_size: int) -> tuple[str, str | None, int]:
    return os.getcwd(), os.environ.get("RANKS_TEST"), torch.get_num_threads()


def test_ranks_have_the_callers_folder_and_environment_and_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKS_TEST", "seen")
    assert run_ranks(_where_am_i, 1) == [(str(tmp_path), "seen", 1)]


def _rank_one_raises(rank: int, world_size: int, folder: str) -> None:
    _note_pid(folder)
    if rank == 1:
        _until(lambda: len(os.listdir(folder)) == world_size, "both ranks have started")
        raise ValueError("the reason")
    distributed.barrier()


def test_a_failure_carries_the_traceback_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(_rank_one_raises, 2, str(tmp_path))
    text = str(failure.value)
    assert "rank 1 failed" in text
    assert 'raise ValueError("the reason")' in text
    assert "rank 0 failed first" not in text
    _assert_all_gone(tmp_path, 2)


def _one_never_returns_and_one_freezes(rank: int, world_size: int, folder: str) -> None:
    _note_pid(folder)
    if rank == 1:
        _wait_in_a_place_with_a_name()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)


def _wait_in_a_place_with_a_name() -> None:
    threading.Event().wait()


def test_a_hang_is_dumped_a_frozen_rank_is_named_and_both_are_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(_one_never_returns_and_one_freezes, 3, str(tmp_path), timeout=8)
    text = str(failure.value)
    assert "not done after 8 s: rank 1, rank 2\n" in text
    assert "_wait_in_a_place_with_a_name" in text.partition("rank 1 stands at:\n")[2].partition("rank 2 stands at")[0]
    assert "rank 2 stands at:\n(it does not answer" in text
    _assert_all_gone(tmp_path, 3)


def _rank_one_is_killed(rank: int, world_size: int, folder: str) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_killed_rank_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 failed: its process was killed by SIGKILL without an answer"):
        run_ranks(_rank_one_is_killed, 2, str(tmp_path))


def test_where_death_is_allowed_a_killed_rank_is_told_apart_and_the_others_go_on(tmp_path: Path) -> None:
    results = run_ranks(_rank_one_is_killed, 3, str(tmp_path), allow_death=True)
    assert results == ["alive", Killed(signal.SIGKILL), "alive"]


def _leave_quietly(rank: int, world_size: int) -> NoReturn:
    os._exit(0)


def test_a_rank_that_leaves_without_an_answer_is_a_failure_even_where_death_is_allowed() -> None:
    with pytest.raises(AssertionError, match="exited with code 0 without an answer"):
        run_ranks(_leave_quietly, 1, allow_death=True)


def _return_what_cannot_be_sent(rank: int, world_size: int) -> object:
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_a_failure_that_says_so() -> None:
    with pytest.raises(AssertionError, match=r"cannot pickle '_thread\.lock' object"):
        run_ranks(_return_what_cannot_be_sent, 1)


def _start_a_child(rank: int, world_size: int) -> int:
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid


def test_what_a_rank_started_ends_with_it() -> None:
    (pid,) = run_ranks(_start_a_child, 1)
    _assert_gone(pid)


# The module that is run as a script by the next test calls this with the folder.
def run_for_ever(folder: str) -> None:
    run_ranks(_never_return, 2, folder, timeout=300)


def _never_return(rank: int, world_size: int, folder: str) -> None:
    _note_pid(folder)
    threading.Event().wait()


def test_ranks_die_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    program = "import sys; from tests.house.test_ranks import run_for_ever; run_for_ever(sys.argv[1])"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=root) as caller:
        try:
            _until(lambda: len(list(tmp_path.iterdir())) == 2, "both ranks have started", limit=120)
        finally:
            caller.kill()
    _assert_all_gone(tmp_path, 2)


# --- processes that must be gone ---


def _note_pid(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()


def _assert_all_gone(folder: Path, count: int) -> None:
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == count
    for pid in pids:
        _assert_gone(pid)


def _assert_gone(pid: int) -> None:
    _until(lambda: not _is_alive(pid), f"process {pid} is gone")


def _is_alive(pid: int) -> bool:
    try:
        # A zombie, whose new parent has not asked for it yet, has ended.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(holds: Callable[[], bool], what: str, limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(0.02)
