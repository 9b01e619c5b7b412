"""Each operation of a save fails in turn: the save says so on every rank, leaves nothing behind, and the next works."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ckpt.saving.save import Saver
from ckpt_formats.errors import CheckpointExistsError, SaveFailedError
from tests.crash.operations import Fault, Faulty, Operation, Watch, errors
from tests.crash.runs import debris, loads, saver, state
from tests.ranks import run_ranks


def _try(saver: Saver, watch: Watch, fault: Fault, path: Path, rank: int = 0, world_size: int = 1) -> str:
    """Save with a fault; returns the error, empty if there was none."""
    watch.seen.clear()
    watch.fault, watch.happened = fault, False
    try:
        saver.save(state(2, rank, world_size), path)
    except SaveFailedError as error:
        return str(error)
    finally:
        watch.fault = None
    return ""


def _harmless(operation: Operation, fault: Fault) -> bool:
    """Whether an operation may fail without the save failing: it tidies up, or did what it should."""
    return operation.kind == "remove" or (operation.kind == "link" and fault.when == "after")


def _is_committed(operations: list[Operation], fault: Fault) -> bool:
    """Whether the root had its name before the fault."""
    kinds = [operation.kind for operation in operations]
    return "link" in kinds[: fault.point] or (kinds[fault.point] == "link" and fault.when == "after")


@pytest.mark.parametrize("code", [errno.EIO, pytest.param(errno.ENOSPC, marks=pytest.mark.soak)])
def test_save_in_which_any_operation_fails_leaves_nothing_and_the_next_works(tmp_path: Path, code: int) -> None:
    saver().save(state(1), tmp_path / "step_1")
    watch = Watch()
    # one saver for all, as in a training: its buffers and plans outlast the failures
    same_saver = saver(Faulty(watch))
    same_saver.save(state(3), tmp_path / "counted")
    watch.seen.clear()
    same_saver.save(state(3), tmp_path / "run_0" / "counted")
    tried = 0
    for fault in errors(list(watch.seen), code):
        tried += 1
        new = tmp_path / f"run_{tried}" / "step_2"
        failed = _try(same_saver, watch, fault, new)
        operation = watch.seen[fault.point]
        assert watch.happened
        assert failed or _harmless(operation, fault), (fault, operation)
        assert loads(tmp_path / "step_1", 1), (fault, operation)
        if _is_committed(watch.seen, fault):
            assert loads(new, 2), (fault, operation)
            assert "nothing was committed" not in failed, (fault, operation)
            with pytest.raises(CheckpointExistsError):
                same_saver.save(state(2), new)
            continue
        assert str(new) in failed
        assert os.strerror(code) in failed
        assert not loads(new, 2), (fault, operation)
        if not (operation.kind == "mkdir" and fault.when == "after"):
            assert not debris(new.parent), (fault, operation)
        same_saver.save(state(2), new)
        assert loads(new, 2), (fault, operation)
    print(f"{tried} failures ({os.strerror(code)}) at {len(watch.seen)} operations")
    assert tried > 50


def test_disk_that_stays_full_fails_the_save_and_not_the_cleaning(tmp_path: Path) -> None:
    saver().save(state(1), tmp_path / "step_1")

    class Full(Watch):
        def step(self, kind: str, path: str, act, half=None) -> None:  # type: ignore[no-untyped-def]
            if kind == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            super().step(kind, path, act, half)

    with pytest.raises(SaveFailedError, match=r"No space left on device.*[Ff]ree"):
        saver(Faulty(Full())).save(state(2), tmp_path / "step_2")
    assert not debris(tmp_path / "step_2")
    assert loads(tmp_path / "step_1", 1)


# several ranks


def _fail_everywhere(rank: int, world_size: int, folder: str, code: int) -> int:
    """Fail each operation of each rank in turn; every rank must raise. Runs on all ranks at once."""
    run = Path(folder)
    saver().save(state(1, rank, world_size), run / "step_1")
    watch = Watch()
    same_saver = saver(Faulty(watch))
    tried = 0
    for victim in range(world_size):
        counting = run / f"counted_{victim}"
        watch.seen.clear()
        same_saver.save(state(3, rank, world_size), counting)
        kinds = [[operation.kind for operation in watch.seen]] * world_size
        torch_distributed().all_gather_object(kinds, kinds[rank])
        for point, kind in enumerate(kinds[victim]):
            for when in ("before", "half") if kind == "write" else ("before",):
                tried += 1
                new = run / f"run_{tried}" / "step_2"
                fault = Fault(point, when, code)
                failed = _try(
                    same_saver, watch, fault if rank == victim else Fault(-1, when, code), new, rank, world_size
                )
                outcomes: list[tuple[str, bool]] = [("", False)] * world_size
                torch_distributed().all_gather_object(outcomes, (failed, watch.happened))
                if rank == 0:
                    _judge(new, outcomes, fault, victim)
                torch_distributed().barrier()
                if failed and not new.exists():
                    same_saver.save(state(2, rank, world_size), new)
                    assert rank or loads(new, 2, world_size), (victim, fault)
                if rank == 0:
                    assert loads(run / "step_1", 1, world_size)
                    shutil.rmtree(new.parent)
                torch_distributed().barrier()
    return tried


def _judge(new: Path, outcomes: list[tuple[str, bool]], fault: Fault, victim: int) -> None:
    happened = any(happened for _, happened in outcomes)
    failures = [failed for failed, _ in outcomes]
    committed = loads(new, 2, len(outcomes))
    if not happened or not any(failures):
        assert committed, (victim, fault)
        assert not any(failures), (victim, fault, failures)
        return
    assert all(failures), (victim, fault, failures)
    assert all(os.strerror(fault.error or 0) in failed for failed in failures), (victim, fault, failures)
    assert committed == ("is committed" in failures[0]), (victim, fault, failures)
    if not committed:
        assert not debris(new.parent), (victim, fault)


def torch_distributed():  # type: ignore[no-untyped-def]
    """torch.distributed, imported where there is a group."""
    from torch import distributed

    return distributed


def test_any_operation_that_fails_on_any_rank_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    tried = run_ranks(_fail_everywhere, 2, str(tmp_path), errno.ENOSPC, timeout=120)
    print(f"{tried[0]} failures on 2 ranks")
    assert tried[0] > 40
