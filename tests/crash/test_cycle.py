"""Save -> commit -> copy -> prune, failed and killed at each system call of it, and by pairs.

The calls, reads included, are recorded in a cycle in which nothing happens. For pairs they are recorded anew after each
first fault, so that the second one meets the clearing up after the first, too.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import distributed

from ckpt.storage.files import Files
from tests.crash.cycle import begin, cycle, end, judge, restore
from tests.crash.operations import Fault, Spot, Watch
from tests.crash.runs import quick_folder, saver
from tests.crash.syscalls import unwatch, watch_process
from tests.ranks import run_ranks

_READING = ("open", "read", "list")
DONE = "saved, copied, pruned"


def failures(trace: Sequence[Spot]) -> Iterator[Fault]:
    """An error of each call, before and after it was done; and what is written or read in part."""
    for spot in trace:
        yield Fault(spot, "before", errno.EIO)
        if spot.kind not in _READING:
            yield Fault(spot, "after", errno.ETIMEDOUT)
        if spot.kind == "write":
            yield Fault(spot, "half", errno.ENOSPC)
        if spot.kind in ("write", "read"):
            yield Fault(spot, "half", 0)


def kills(trace: Sequence[Spot]) -> Iterator[Fault]:
    """A kill before each call that changes something, and halfway through writes."""
    for spot in trace:
        if spot.kind not in _READING:
            yield Fault(spot, "before", None)
        if spot.kind == "write":
            yield Fault(spot, "half", None)


def _watched(folder: Path, *faults: Fault) -> tuple[Watch, list[str]]:
    """A cycle with faults, in this process."""
    watch = Watch(*faults[:1], root=str(folder))
    watch.second = faults[1] if len(faults) > 1 else None
    by = saver(Files())
    watch_process(watch, reads=True)
    try:
        return watch, cycle(folder, by)
    finally:
        unwatch()


class _Trials:
    """Cycles with faults, each in the run as it was. In a process without threads, whose forks are killed."""

    def __init__(self, place: Path) -> None:
        self.original = place / "original"
        self.folder = place / "tried"
        begin(self.original)
        restore(self.original, self.folder)
        watch, wrong = _watched(self.folder)
        assert not wrong
        assert judge(self.folder) == DONE
        self.trace = watch.spots
        self.counts: Counter[str] = Counter(calls=len(self.trace))

    def fail(self, *faults: Fault) -> list[Spot]:
        """Returns the calls of the cycle that failed."""
        restore(self.original, self.folder)
        watch, wrong = _watched(self.folder, *faults)
        assert watch.happened, faults
        got = judge(self.folder)
        assert wrong or got == DONE, faults
        end(self.folder, saver())
        self.counts.update(["points", "pairs" if len(faults) > 1 else "single", f"failed, then {got}"])
        return watch.spots

    def kill(self, *faults: Fault, again: Fault | None = None) -> None:
        """`again` is a kill in the cycle after that, if that comes to it."""
        restore(self.original, self.folder)
        # after an error, threads do not always come to the call of the kill
        assert self._dies(*faults) or len(faults) > 1, faults
        got = judge(self.folder)
        if again is not None:
            self._dies(again)
            judge(self.folder)
        end(self.folder, saver())
        pair = again is not None or len(faults) > 1
        self.counts.update(["points", "pairs" if pair else "single", f"killed, then {got}"])

    def _dies(self, *faults: Fault) -> bool:
        child = os.fork()
        if not child:
            try:
                _watched(self.folder, *faults)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _singly(rank: int, world_size: int, place: str, every: int) -> Counter[str]:
    """This process's share of the faults."""
    distributed.destroy_process_group()
    trials = _Trials(Path(place, str(rank)))
    # its threads may come in another order in another process
    trace = sorted(trials.trace)
    for fault in list(failures(trace))[::every][rank::world_size]:
        trials.fail(fault)
    for fault in list(kills(trace))[rank::world_size]:
        trials.kill(fault)
    return trials.counts


def _by_pairs(_rank: int, _world_size: int, place: str, every: int) -> dict[str, int]:
    """Each fault, and with it every `every`th of those that may come after it."""
    distributed.destroy_process_group()
    trials = _Trials(Path(place))
    deaths = list(kills(trials.trace))
    for number, fault in enumerate(failures(trials.trace)):
        spots = trials.fail(fault)
        later = spots[spots.index(fault.point) + 1 :]  # type: ignore[arg-type]
        for second in list(failures(later))[number % every :: every]:
            trials.fail(fault, second)
        for second in list(kills(later))[number % every :: every]:
            trials.kill(fault, second)
    for number, fault in enumerate(deaths):
        trials.kill(fault)
        for second in deaths[number % every :: every]:
            trials.kill(fault, again=second)
    return dict(trials.counts)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_cycle_that_fails_or_dies_at_any_call_keeps_what_was_there_and_the_next_ends_it(
    tmp_path: Path, every: int
) -> None:
    with quick_folder(tmp_path) as folder:
        counts: Counter[str] = sum(run_ranks(_singly, 2, str(folder), every, timeout=250), Counter())
    print(f"save, commit, copy, prune: {counts}")
    assert counts["single"] > 150
    for got in ("nothing", "saved", "saved, copied", DONE):
        assert counts[f"killed, then {got}"] >= 1
        assert counts[f"failed, then {got}"] >= 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_cycle_that_fails_or_dies_twice(tmp_path: Path) -> None:
    with quick_folder(tmp_path) as folder:
        (counts,) = run_ranks(_by_pairs, 1, str(folder), 11, timeout=3500)
    print(f"save, commit, copy, prune, by pairs: {counts}")
    assert counts["pairs"] > 2000
