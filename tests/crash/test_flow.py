"""The agent of a run with levels, failed and killed at each system call and message, while a loop of two ranks saves.

Its process commits, carries checkpoints from the first level to the next, and prunes both; on one node, and on two with
disks of their own. A job goes on from step 2 and makes steps 3 and 4. After each fault: what was committed is whole,
nothing partial is visible, everybody was told the truth, what the agent outlives it makes up for by itself, and the
next job, in which nothing happens, brings everything to where it has to be.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ckpt
from ckpt.levels import flow
from ckpt.levels.prune import prune
from ckpt.loop import lead
from ckpt.loop.checkpointer import Checkpointer
from ckpt_formats.errors import CheckpointError
from ckpt_formats.runs import State, find_checkpoints
from tests.crash.agents import Agents, short_waits, spots
from tests.crash.cycle import restore
from tests.crash.operations import FROZEN, Fault, Spot
from tests.crash.runs import blank, debris, loads, quick_folder, same, state
from tests.crash.test_agent import failing, killing, long, of_all
from tests.ranks import run_ranks

PATIENCE = 20.0
"""Seconds after which a wait is an endless one."""
WORLD = 2
OLD, LAST = 2, 4
"""The step that a job finds, and the one that it ends with."""
FAR = "far"
"""The level that the nodes share; the first is `first`, or on disks of the nodes' own `node0/first`, `node1/first`."""


class Outcome(NamedTuple):
    """What a rank was told of a job."""

    error: str
    resumed: int


def in_flow(trace: Sequence[Spot]) -> Iterator[Fault]:
    """What may go wrong with each operation while the agent lives; what is read fails, too, or comes in part."""
    yield from failing([spot for spot in trace if spot.kind not in ("open", "read", "list")])
    for spot in trace:
        if spot.kind in ("open", "read", "list"):
            yield Fault(spot, "before", errno.EIO)
        if spot.kind == "read":
            yield Fault(spot, "half", 0)


def freezing(trace: Sequence[Spot]) -> Iterator[Fault]:
    """The agent stops in what it does for the levels, which is what a hung disk does, and never goes on."""
    for spot in trace:
        if spot.kind in ("create", "link", "rename", "remove") or (spot.kind == "send" and "wait" not in spot.name):
            yield Fault(spot, "before", FROZEN)


def late(trace: Sequence[Spot]) -> Iterator[Fault]:
    """A commit fails when the manifest has its name: the folder can't be synced, or what others are to get not read."""
    ours = [spot for spot in trace if spot.name == f"node0/first/step_{LAST:08d}" and spot.kind == "sync_folder"]
    yield Fault(ours[-1], "before", errno.EIO)
    read = [spot for spot in trace if spot.name.endswith(f"step_{LAST:08d}/manifest.json") and spot.kind == "open"]
    yield Fault(read[0], "before", errno.EIO)


class _Trials:
    """One rank's part in jobs with faults; agents fall under them, trainers stay."""

    def __init__(self, rank: int, place: Path, *, nodes: bool, victim: int) -> None:
        self.rank, self.victim = rank, victim
        self.original, self.folder = place / "original", place / "tried"
        node = "{node}/" if nodes else ""
        self.first, self.far = f"{node}first", FAR
        self.counts: Counter[str] = Counter()
        self.agents = Agents(str(self.folder), reads=True)
        self.agents.install()
        lead.PATIENCE_S = flow.PATIENCE = PATIENCE
        flow.FIRST_PAUSE_S = 0.02
        assert not self.job(OLD, self.original).error
        self.agents.ended()
        of_all(None)
        self.agents.told = str(place / f"told-{rank}")
        traces = of_all(self._counted())
        self.trace: list[Spot] = traces[victim]
        self.agents.told = None

    def _counted(self) -> list[Spot]:
        self.begin()
        assert not self.job(LAST).error
        self.agents.ended()
        told = self.agents.told or ""
        return spots(told) if os.path.exists(told) else []

    def begin(self) -> None:
        """Have the run as it was."""
        if self.rank == 0:
            restore(self.original, self.folder)
        of_all(None)

    def job(self, last: int, folder: Path | None = None) -> Outcome:
        """Train up to a step, save each one, and wait until all is where it has to be."""
        folder = folder or self.folder
        current = blank(self.rank, WORLD)
        tiers = [ckpt.Disk(folder / self.first, every=1, keep=2), ckpt.Disk(folder / self.far, every=1, keep=1)]
        resumed = -1
        try:
            with Checkpointer(folder / "run", current, tiers=tiers) as loop:
                resumed = loop.step
                assert not resumed or same(current, state(resumed, self.rank, WORLD))
                for step in loop.steps(last):
                    current.update(state(step, self.rank, WORLD))
                    if step == last:
                        # the save before is over, so that what happens to it does not depend on chance
                        self._settled(loop, step - 1)
        except CheckpointError as error:
            return Outcome(f"{type(error).__name__}: {error}", resumed)
        return Outcome("", resumed)

    def _settled(self, loop: Checkpointer, step: int) -> None:
        if loop._lead is not None and step > resumed_step(loop):
            deadline = time.monotonic() + PATIENCE
            while loop._lead.committed != step and loop._lead.failed is None:
                assert time.monotonic() < deadline, f"step {step} is neither committed nor failed"
                time.sleep(0.002)
        of_all(None)

    def try_out(self, fault: Fault) -> None:
        """A job with a fault, and the next one."""
        self.begin()
        self.agents.faults = [fault] if self.rank == self.victim else []
        outcomes = of_all(self.job(LAST))
        self.agents.faults = []
        self.agents.ended()
        of_all(None)
        if self.rank == 0:
            self._judge(fault, outcomes)
        of_all(None)
        told = of_all(self.job(LAST + 1))
        logs = [forked.log() for forked in self.agents.running]
        assert not any(outcome.error for outcome in told), (fault, outcomes, told, logs)
        assert told[0].resumed >= OLD, (fault, outcomes, told)
        self.agents.ended()
        of_all(None)
        if self.rank == 0:
            self._end(fault, outcomes)
        of_all(None)

    def there(self, place: str) -> list[int]:
        """The whole checkpoints of a level; there must be nothing but them and what never was committed."""
        found = find_checkpoints(self.folder / place)
        steps = [item.step or 0 for item in found if item.state is State.WHOLE]
        for item in found:
            # nodes prune their own disks, each at its time
            half_pruned = item.elsewhere and (item.step or 0) < steps[-1]
            assert half_pruned or item.state in (State.WHOLE, State.NOT_COMMITTED), item
        for step in steps:
            assert loads(self.path(place, step), step, WORLD, thoroughly=False)
        return steps

    def path(self, place: str, step: int) -> Path:
        return self.folder / place / f"step_{step:08d}"

    def _judge(self, fault: Fault, outcomes: Sequence[Outcome]) -> None:
        first, far = self.there(self.first), self.there(self.far)
        told = [outcome.error for outcome in outcomes]
        assert first, "the last committed checkpoint is there"
        assert max(first) >= OLD
        assert far, "one is kept"
        assert LAST in first or all(told), (fault, outcomes, first)
        if fault.survived and not any(told):
            assert LAST in far, (fault, first, far)
        stage = "saved" if LAST in first else "partly saved" if LAST - 1 in first else "nothing"
        stage += ", copied" if LAST in far else ""
        self.counts.update(["points", f"{'failed' if fault.survived else 'killed'}, then {stage}"])

    def _end(self, fault: Fault, outcomes: Sequence[Outcome]) -> None:
        """The next job brought all to where it has to be, and prune removes the rest."""
        for place in (self.first, self.far):
            report = prune(self.folder / place, 1 if place == self.far else 2, grace=-1.0)
            assert not report.failed, (fault, report.failed)
        found = {place: self.there(place) for place in (self.first, self.far)}
        first, far = found[self.first], found[self.far]
        assert first[-1] == LAST + 1, (fault, outcomes, first)
        assert len(first) == 2, (fault, outcomes, first)
        assert LAST in first or any(outcome.error for outcome in outcomes), (fault, outcomes, first)
        assert far == [LAST + 1], (fault, outcomes, far)
        for place in (self.first, self.far):
            for folder in self.folder.glob(place.replace("{node}", "*")):
                rest = {int(name[5:]) for name in os.listdir(folder) if name[0] != "."} - set(found[place])
                # what may be committed on another node goes when the rule says so
                assert all(step > first[0] for step in rest) if "{node}" in place else not rest, (fault, outcomes, rest)
            assert not debris(self.path(place, LAST + 1))


def resumed_step(loop: Checkpointer) -> int:
    """The step that a loop went on from."""
    return 0 if loop.resumed is None else int(loop.resumed[-8:])


def _each(
    rank: int, world_size: int, place: str, faults_of: Callable[..., Any], every: int, nodes: bool, victim: int
) -> dict[str, int]:
    if nodes:
        os.environ["CKPT_NODE"] = f"node{rank}"
    if faults_of is freezing:
        short_waits()
    trials = _Trials(rank, Path(place), nodes=nodes, victim=victim)
    for fault in list(faults_of(trials.trace))[every // 2 :: every]:
        try:
            trials.try_out(fault)
        except BaseException as error:
            error.add_note(f"in the trial with: {fault}")
            raise
    return {"spots": len(trials.trace), **trials.counts}


def _tried(place: Path, what: str, faults_of: Callable[..., Any], every: int, *arguments: Any) -> dict[str, int]:
    seconds = 3000 if every == 1 else 240
    with quick_folder(place) as folder:
        counts: dict[str, int] = run_ranks(_each, WORLD, str(folder), faults_of, every, *arguments, timeout=seconds)[0]
    print(f"{what}: {counts}")
    return counts


@pytest.mark.parametrize(
    ("nodes", "victim", "every"),
    [
        pytest.param(False, 0, 131, id="one node, some"),
        pytest.param(True, 1, 97, id="own disks, some"),
        pytest.param(False, 0, 1, id="one node", marks=long),
        pytest.param(True, 0, 1, id="own disks, node 0", marks=long),
        pytest.param(True, 1, 1, id="own disks, node 1", marks=long),
    ],
)
@pytest.mark.parametrize("faults_of", [killing, in_flow], ids=["killed", "failed"])
def test_levels_of_an_agent_that_comes_to_harm_at_any_point(
    tmp_path: Path, faults_of: Any, nodes: bool, victim: int, every: int
) -> None:
    counts = _tried(tmp_path, f"levels, {'disks of' if nodes else ''} node {victim}", faults_of, every, nodes, victim)
    assert counts["points"] * every > 200


def test_nodes_with_disks_of_their_own_keep_their_parts_of_what_failed_after_its_commit(tmp_path: Path) -> None:
    assert _tried(tmp_path, "late", late, 1, True, 0)["points"] == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("nodes", "victim"), [(False, 0), (True, 0), (True, 1)])
def test_levels_of_an_agent_that_freezes_at_any_point(tmp_path: Path, nodes: bool, victim: int) -> None:
    assert _tried(tmp_path, "agent with levels frozen", freezing, 1, nodes, victim)["points"] > 40
