"""Agents, failed and killed at each of their system calls and messages, while they save for two ranks.

Once a checkpoint is committed, the agent copies it and prunes both places, as the levels do (cycle.py). What it comes
to is recorded when nothing happens. After each fault: what was there is whole, the new checkpoint is whole or absent,
everybody was told the truth, the next save works, and prune removes what was left.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import distributed

from ckpt.agent import main
from ckpt.agent.aftermath import Committed
from ckpt.agent.saver import AsyncSaver
from ckpt_formats.errors import CheckpointError
from tests.crash.agents import Agents, short_waits, spots
from tests.crash.cycle import NEW, RUN, after_save, begin, end, judge, restore
from tests.crash.operations import FROZEN, Fault, Spot
from tests.crash.runs import debris, loads, quick_folder, saver, state
from tests.ranks import run_ranks

PATIENCE = 20.0
"""Seconds after which a wait is an endless one."""


class Outcome(NamedTuple):
    """What one rank was told of a save."""

    error: str
    captured: bool
    committed: bool


def save(by: AsyncSaver, step: int, path: Path, rank: int, world_size: int) -> Outcome:
    """Save, and wait for it as far as it gets."""
    captured = committed = False
    try:
        pending = by.save(state(step, rank, world_size), path)
        pending.captured(PATIENCE)
        captured = True
        pending.wait(PATIENCE)
        committed = True
    except CheckpointError as error:
        return Outcome(f"{type(error).__name__}: {error}", captured, committed)
    return Outcome("", captured, committed)


def of_all(mine: Any) -> list[Any]:
    """What each rank says; a barrier, too."""
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return everyone


def killing(trace: Sequence[Spot]) -> Iterator[Fault]:
    """A kill before each operation, and halfway through those that have a half."""
    for spot in trace:
        yield Fault(spot, "before", None)
        if spot.kind in ("write", "send"):
            yield Fault(spot, "half", None)


def failing(trace: Sequence[Spot]) -> Iterator[Fault]:
    """What may go wrong with each operation while the agent lives."""
    for spot in trace:
        if spot.kind in ("send", "receive"):
            yield Fault(spot, "before", errno.ECONNRESET)
            if spot.kind == "send":
                yield Fault(spot, "half", errno.ETIMEDOUT)
            continue
        yield Fault(spot, "before", errno.EIO)
        yield Fault(spot, "after", errno.ETIMEDOUT)
        if spot.kind == "write":
            yield Fault(spot, "half", errno.ENOSPC)
            yield Fault(spot, "half", 0)


def freezing(trace: Sequence[Spot]) -> Iterator[Fault]:
    """The agent stops before each message, and never goes on; and in a write, which is what a hung disk does."""
    for spot in trace:
        if spot.kind in ("send", "receive", "create", "link"):
            yield Fault(spot, "before", FROZEN)


def some_pairs(trace: Sequence[Spot]) -> Iterator[list[Fault]]:
    """Two of these, the first of which the agent outlives, by chance."""
    dice = random.Random(0)
    second = [*failing(trace), *killing(trace)]
    for first in failing(trace):
        for _ in range(3):
            yield [first, dice.choice(second)]


def _left_of(new: Path) -> list[str]:
    """What a save that failed leaves in the end, in an agent that lives. A trainer that lost its connection is told
    earlier, and the save may be committed yet.
    """
    deadline = time.monotonic() + PATIENCE
    while not (new / "manifest.json").exists() and (left := debris(new)):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.005)
    return []


class _Trials:
    """One rank's part in saves with faults; agents fall under them, trainers stay."""

    def __init__(self, rank: int, world_size: int, place: Path, victim: int) -> None:
        self.rank, self.world_size, self.victim = rank, world_size, victim
        self.original, self.folder = place / "original", place / "tried"
        self.counts: Counter[str] = Counter()
        self.agents = Agents(str(self.folder))
        self.agents.install()
        main.main = _copying(self.folder)
        self.by = AsyncSaver(saver())
        begin(self.original, rank, world_size)
        self.agents.told = str(place / f"told-{rank}")
        assert not self.save().error
        assert rank or judge(self.folder, world_size) == "saved, copied, pruned"
        traces = of_all(spots(self.agents.told) if os.path.exists(self.agents.told) else [])
        self.trace: list[Spot] = traces[victim]
        self.agents.told = None

    def save(self, faults: Sequence[Fault] = ()) -> Outcome:
        """One cycle with faults, and the next save."""
        if self.rank == 0:
            restore(self.original, self.folder)
        of_all(None)
        self.agents.faults = list(faults) if self.rank == self.victim else []
        new = self.folder / RUN / f"step_{NEW}"
        first = save(self.by, NEW, new, self.rank, self.world_size)
        self.agents.faults = []
        self.outcomes: list[Outcome] = of_all(first)
        removing = any(fault.point.kind in ("remove", "rmdir") for fault in faults[:-1])  # type: ignore[union-attr]
        if faults and faults[-1].survived and not removing:
            left = of_all(_left_of(new) if self.rank == 0 else [])[0]
            assert not left, (faults, left)
        self._next(faults)
        self.by.close()
        self.agents.ended()
        of_all(None)
        return first

    def _next(self, faults: Sequence[Fault]) -> None:
        """The next save works. It may raise the failure of the one before, or be the one that comes to the fault, which
        the one after it raises; then the one after that works.
        """
        failed: list[Outcome] = []
        for step in range(9, 11 + 2 * max(1, len(faults))):
            path = self.folder / "other" / f"step_{step}"
            outcome = save(self.by, step, path, self.rank, self.world_size)
            if not any(other.error for other in of_all(outcome)):
                assert self.rank or loads(path, step, self.world_size), faults
                return
            failed.append(outcome)
            assert faults
            told = not outcome.error or str(self.folder) in outcome.error or "does not answer" in outcome.error
            assert told, (faults, self.outcomes, failed)
        raise AssertionError(f"{faults}: no save works any more: {self.outcomes}, then {failed}")

    def look(self, faults: Sequence[Fault]) -> None:
        """Whether what is there, and what was told, is what may be."""
        if self.rank == 0:
            for path in (self.folder / "other").iterdir():
                loads(path, int(path.name[5:]), self.world_size)
            got = judge(self.folder, self.world_size)
            whole = "saved" in got
            told = [outcome.error for outcome in self.outcomes]
            assert whole or all(told), (faults, self.outcomes)
            assert whole or not any(outcome.committed for outcome in self.outcomes), (faults, self.outcomes)
            (fault, *more) = faults
            if (
                not whole
                and not more
                and fault.error
                and fault.survived
                and fault.point.kind not in ("send", "receive")
            ):  # type: ignore[union-attr]
                assert all(os.strerror(fault.error) in text for text in told), (fault, told)
            self.counts.update(["points", f"{'failed' if faults[-1].survived else 'killed'}, then {got}"])
        of_all(None)
        end(self.folder, saver(), self.rank, self.world_size)
        of_all(None)


def _copying(folder: Path) -> Callable[[], None]:
    """The main program of an agent that copies and prunes after commits to the run."""

    def after_commit(committed: Committed) -> None:
        wrong: list[str] = []
        if Path(committed.path).parent == folder / RUN and committed.leads:
            after_save(folder, wrong)

    def program() -> None:
        import argparse

        parser = argparse.ArgumentParser()
        main.add_arguments(parser)
        arguments = vars(parser.parse_args())
        main.serve(**arguments, after_commit=after_commit)

    return program


def _each(
    rank: int, world_size: int, place: str, faults_of: Any, every: int, nodes: bool = False, victim: int = 0
) -> dict[str, int]:
    """Let an agent come to each `every`th fault in turn. Runs on all ranks at once.

    With `nodes`, each rank is on a node of its own, and the agent is that of rank `victim`.
    """
    if nodes:
        os.environ["CKPT_NODE"] = f"node{rank}"
    if faults_of is freezing:
        short_waits()
    trials = _Trials(rank, world_size, Path(place), victim)
    faulty = list(faults_of(trials.trace))
    # the first and the last of all, too, which come before and after the commit
    for some in [faulty[0], *faulty[every // 2 : -1 : every], faulty[-1]] if every > 1 else faulty:
        faults = some if isinstance(some, list) else [some]
        trials.save(faults)
        trials.look(faults)
    return {"spots": len(trials.trace), **trials.counts}


def _tried(place: Path, what: str, faults_of: Any, every: int, *arguments: Any) -> dict[str, int]:
    # of what hangs among the few, the ranks' stacks are shown before the test's own time is up
    seconds = 3000 if every == 1 else 240
    with quick_folder(place) as folder:
        counts: dict[str, int] = run_ranks(_each, 2, str(folder), faults_of, every, *arguments, timeout=seconds)[0]
    print(f"{what}: {counts}")
    return counts


def _ends(counts: dict[str, int]) -> tuple[int, int]:
    """After how many faults there was no new checkpoint, and after how many there was."""
    return (
        sum(count for what, count in counts.items() if what.endswith("then nothing")),
        sum(count for what, count in counts.items() if "then saved" in what),
    )


long = (pytest.mark.soak, pytest.mark.timeout(3600))


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=long)])
def test_agent_killed_at_any_point(tmp_path: Path, every: int) -> None:
    counts = _tried(tmp_path, "agent killed", killing, every)
    assert counts["points"] * every > 100
    assert min(_ends(counts)) >= (1 if every > 1 else 20)


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=long)])
def test_agent_in_which_any_operation_fails(tmp_path: Path, every: int) -> None:
    counts = _tried(tmp_path, "agent's operations failed", failing, every)
    assert counts["points"] * every > 150
    assert min(_ends(counts)) >= (1 if every > 1 else 20)


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=long)])
@pytest.mark.parametrize("victim", [0, 1])
def test_agent_of_one_of_two_nodes_killed_at_any_point(tmp_path: Path, victim: int, every: int) -> None:
    counts = _tried(tmp_path, f"agent of node {victim} killed", killing, every, True, victim)
    assert counts["points"] * every > 50


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=long)])
@pytest.mark.parametrize("victim", [0, 1])
def test_agent_of_one_of_two_nodes_in_which_any_operation_fails(tmp_path: Path, victim: int, every: int) -> None:
    counts = _tried(tmp_path, f"operations of the agent of node {victim} failed", failing, every, True, victim)
    assert counts["points"] * every > 50


@pytest.mark.parametrize(
    ("nodes", "victim", "every"),
    [
        pytest.param(False, 0, 45, id="one node, some"),
        pytest.param(False, 0, 1, id="one node", marks=long),
        pytest.param(True, 0, 1, id="node 0", marks=long),
        pytest.param(True, 1, 1, id="node 1", marks=long),
    ],
)
def test_agent_frozen_at_any_message_is_given_up_within_a_limit(
    tmp_path: Path, nodes: bool, victim: int, every: int
) -> None:
    counts = _tried(tmp_path, "agent frozen", freezing, every, nodes, victim)
    assert counts["points"] * every > 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_agent_that_comes_to_two_faults(tmp_path: Path) -> None:
    counts = _tried(tmp_path, "pairs of an agent's faults", some_pairs, 1)
    assert counts["points"] > 300
