"""Shows what was measured: tables on the terminal, the same facts and every single time as JSON.

Knows measures, yardsticks and targets; not what was measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.interleave import Measure, quartiles


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a time is told as, one value per repetition: a ratio to the raw limit there, or time per tensor."""

    title: str
    of: Callable[[Measure], Sequence[float]]

    @classmethod
    def ratio(cls, title: str, limits: Sequence[float]) -> Yardstick:
        """Ratios to other times, repetition by repetition: a moment in which the machine was slow was slow for both."""
        return cls(title, lambda measure: [ours / limit for ours, limit in zip(measure.seconds, limits, strict=True)])


@dataclass(frozen=True, slots=True)
class Section:
    """One table: the measures of one phase, with targets for the median of the yardstick by system."""

    title: str
    measures: Sequence[Measure]
    nbytes: int
    yardstick: Yardstick
    targets: Mapping[str, float]
    notes: Sequence[str] = ()

    def met(self, measure: Measure) -> bool | None:
        """Whether the target is met; None where there is none."""
        target = self.targets.get(measure.system)
        return None if target is None else quartiles(self.yardstick.of(measure))[1] <= target


class Report:
    """What a benchmark prints: facts of the machine, progress, tables, and whether targets were met.

    Attributes:
        console: for results; progress goes to the standard error.
        facts: of the machine.
    """

    def __init__(self, **facts: object) -> None:
        """`facts` of the machine beside those that are known."""
        # a table that goes to a file is not cut to a terminal's width
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self._progress = Console(stderr=True)
        self.facts = machine() | facts
        self._sections: list[Section] = []
        show_machine(self.console, self.facts)

    def progress(self, line: str) -> None:
        self._progress.print(f"[dim]{line}[/]", highlight=False)

    def say(self, processes: int) -> Callable[[str], None]:
        """What prints the progress of a run of so many processes."""
        return lambda line: self.progress(f"{processes} x {line}")

    def show(self, sections: Iterable[Section]) -> None:
        for section in sections:
            show(self.console, section)
            self._sections.append(section)

    def end(self, benchmark: str, parameters: Mapping[str, Any], path: Path | None) -> None:
        """The verdict, and everything as JSON if there is a `path` for it."""
        show_verdict(self.console, self._sections)
        if path is not None:
            write_json(path, benchmark, parameters, self.facts, self._sections)


def show(console: Console, section: Section) -> None:
    table = Table(
        title=section.title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD
    )
    table.caption = "\n".join(section.notes)
    table.add_column("system, setting")
    for title in ("first s", "median s (quartiles)", "GB/s", f"{section.yardstick.title} (quartiles)", "target"):
        table.add_column(title, justify="right")
    for measure in section.measures:
        table.add_row(
            f"{measure.system}: {measure.setting}",
            f"{measure.first:.3f}",
            _spread(measure.seconds, 3),
            f"{section.nbytes / quartiles(measure.seconds)[1] / 1e9:.2f}",
            _spread(section.yardstick.of(measure), 2),
            _verdict(section, measure),
        )
    console.print(table)
    console.print()


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _verdict(section: Section, measure: Measure) -> str:
    target = section.targets.get(measure.system)
    if target is None:
        return ""
    return f"<= {target:g} " + ("[green]met[/]" if section.met(measure) else "[bold red]MISSED[/]")


def show_verdict(console: Console, sections: Sequence[Section]) -> None:
    """One line at the end that can't be overlooked."""
    judged = [(section, m) for section in sections for m in section.measures if section.met(m) is not None]
    missed = [f"{section.title}: {measure.system}" for section, measure in judged if not section.met(measure)]
    if missed:
        console.print(f"[bold red]{len(missed)} of {len(judged)} targets MISSED[/]")
        for line in missed:
            console.print(f"  {line}")
    elif judged:
        console.print(f"[green]All {len(judged)} targets met.[/]")


def machine() -> dict[str, Any]:
    """What the figures depend on: cores, memory, versions, and how busy the machine was at the start."""
    names = ("torch", "safetensors", "numpy", "anyckpt")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "load_average": os.getloadavg()[0],
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_machine(console: Console, facts: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.print(
        f"{facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {versions}"
    )
    if facts["load_average"] > 0.5 * facts["cores"]:
        console.print(
            f"[yellow]The machine is busy (load average {facts['load_average']:.1f}): "
            "trust ratios more than times, and neither much.[/]"
        )
    console.print()


def write_json(
    path: Path, benchmark: str, parameters: Mapping[str, Any], facts: Mapping[str, Any], sections: Sequence[Section]
) -> None:
    document = {
        "benchmark": benchmark,
        "parameters": dict(parameters),
        "machine": dict(facts),
        "sections": [
            {
                "title": section.title,
                "bytes": section.nbytes,
                "yardstick": section.yardstick.title,
                "notes": list(section.notes),
                "measures": [_as_json(section, measure) for measure in section.measures],
            }
            for section in sections
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _as_json(section: Section, measure: Measure) -> dict[str, Any]:
    low, middle, high = quartiles(measure.seconds)
    told = section.yardstick.of(measure)
    told_low, told_middle, told_high = quartiles(told)
    return {
        "phase": measure.phase,
        "system": measure.system,
        "setting": measure.setting,
        "first_s": measure.first,
        "seconds": measure.seconds,
        "median_s": middle,
        "quartiles_s": [low, high],
        "yardstick": list(told),
        "yardstick_median": told_middle,
        "yardstick_quartiles": [told_low, told_high],
        "target": section.targets.get(measure.system),
        "met": section.met(measure),
    }
