"""Runs systems that save and load against each other, interleaved: the machine's moods fall on all of them alike.

One repetition runs every system once, in an order drawn anew; a checkpoint lives from its save to the loads right after
it. Knows neither what a system does nor how the figures are shown.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks.files import drop, warm
from benchmarks.ranks import Group

_CALIBRATION_ROUNDS = 2
"""Rounds before the repetitions in which each setting is tried: one would mislead, as a first call is slower."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to save into, or load from, a folder: the system with one choice of its settings."""

    setting: str
    run: Callable[[Path], None]


class Destination(Protocol):
    """Memory that is loaded into, allocated and touched beforehand."""

    def spoil(self) -> None:
        """Overwrite all of it, so that a load that does nothing is found out."""
        ...

    def check(self) -> None:
        """Raise unless every byte is what was saved."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """The ways to load a checkpoint into one destination; `phase` names it in the report ("load")."""

    phase: str
    into: Destination
    ways: Sequence[Way]


@dataclass(frozen=True, slots=True)
class System:
    name: str
    saves: Sequence[Way]
    loads: Sequence[Load]
    all_ways: bool = False
    """Whether every way is measured, as for the raw limit, or the best of the calibration only."""


@dataclass(slots=True)
class Measure:
    """The times of one way: `seconds` has one entry per repetition, comparable with others' in it."""

    phase: str
    system: str
    setting: str
    first: float
    """Seconds of the very first call in fresh processes: of this way if the system runs all ways, else of any."""
    seconds: list[float] = field(default_factory=list)


_Key = tuple[str, str, str]
_T = TypeVar("_T")


class Interleaving:
    """A run: every rank makes one with equal arguments and calls `run` together with the others."""

    def __init__(self, group: Group, systems: Sequence[System], folder: Path, *, settle: float, seed: int) -> None:
        self._group = group
        self._systems = {system.name: system for system in systems}
        self._folder = folder
        self._settle = settle
        # Equal seeds on all ranks draw equal orders, without a word between them.
        self._random = random.Random(seed)
        self._first: dict[_Key, float] = {}

    def run(self, repetitions: int) -> list[Measure]:
        """First calls and calibration, then the repetitions; the measures in the systems' order, saves first."""
        tried: dict[_Key, list[float]] = {}
        for number in range(_CALIBRATION_ROUNDS):
            chosen = [s for s in self._systems.values() if number == 0 or _has_choice(s)]
            for key, seconds in self._round(f"calibration {number + 1}/{_CALIBRATION_ROUNDS}", chosen):
                tried.setdefault(key, []).append(seconds)
        self._systems = {name: _with_best_ways(system, tried) for name, system in self._systems.items()}

        measures = {
            key: Measure(*key, first=self._first[_first_key(system, *key)])
            for system in self._systems.values()
            for key in _keys(system)
        }
        for number in range(repetitions):
            for key, seconds in self._round(f"repetition {number + 1}/{repetitions}", list(self._systems.values())):
                measures[key].seconds.append(seconds)
        return list(measures.values())

    def _round(self, title: str, systems: list[System]) -> Iterator[tuple[_Key, float]]:
        for system in self._shuffled(systems):
            self._group.say(f"{title}: {system.name}")
            folder = self._folder / "".join(c if c.isalnum() else "_" for c in system.name)
            for way in self._shuffled(system.saves):
                self._fresh(folder)
                yield self._timed("save", system, way, folder)
            self._recache(folder)
            for load in system.loads:
                for way in self._shuffled(load.ways):
                    self._warm(folder)
                    load.into.spoil()
                    yield self._timed(load.phase, system, way, folder)
                    load.into.check()
            self._group.barrier()
            if self._group.rank == 0:
                shutil.rmtree(folder)

    def _timed(self, phase: str, system: System, way: Way, folder: Path) -> tuple[_Key, float]:
        gc.collect()
        self._group.barrier()
        start = time.monotonic()
        way.run(folder)
        stop = time.monotonic()
        seconds = self._group.span(start, stop)
        key = (phase, system.name, way.setting)
        self._first.setdefault(_first_key(system, *key), seconds)
        return key, seconds

    def _fresh(self, folder: Path) -> None:
        """An empty folder on a disk that has nothing left to do: no write-back, no discarding of removed files."""
        self._group.barrier()
        if self._group.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            time.sleep(self._settle)

    def _recache(self, folder: Path) -> None:
        """Drop what the write left in the page cache, so that files get there by reading, whoever wrote them.

        Some ways of writing leave nothing there, others leave it in larger pieces, which are faster to read.
        """
        self._group.barrier()
        if self._group.rank == 0:
            os.sync()  # a page that waits to be written can't be dropped
            time.sleep(self._settle)
            drop(folder)

    def _warm(self, folder: Path) -> None:
        """All of the folder's files in the page cache."""
        self._group.barrier()
        if self._group.rank == 0:
            warm(folder)
        self._group.barrier()

    def _shuffled(self, items: Iterable[_T]) -> list[_T]:
        result = list(items)
        self._random.shuffle(result)
        return result


def _first_key(system: System, phase: str, name: str, setting: str) -> _Key:
    # What a first call pays for (imports, allocations, thread pools) it pays once, whichever setting came first.
    return phase, name, setting if system.all_ways else ""


def _has_choice(system: System) -> bool:
    return not system.all_ways and any(len(ways) > 1 for ways in (system.saves, *(load.ways for load in system.loads)))


def _keys(system: System) -> list[_Key]:
    saves = [("save", system.name, way.setting) for way in system.saves]
    return saves + [(load.phase, system.name, way.setting) for load in system.loads for way in load.ways]


def _with_best_ways(system: System, tried: dict[_Key, list[float]]) -> System:
    if system.all_ways:
        return system

    def best(phase: str, ways: Sequence[Way]) -> list[Way]:
        # The least, not the mean: what a setting can do, not what a neighbour did to it.
        return sorted(ways, key=lambda way: min(tried[phase, system.name, way.setting]))[:1]

    loads = [Load(load.phase, load.into, best(load.phase, load.ways)) for load in system.loads]
    return System(system.name, best("save", system.saves), loads)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value, that value three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def fastest(measures: Iterable[Measure]) -> Measure:
    """The measure with the least median."""
    return min(measures, key=lambda measure: statistics.median(measure.seconds))
