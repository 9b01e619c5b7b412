"""What the demo shows: a line per event, and on a terminal a last line that moves. Knows nothing of jobs."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

_INDENT = 12


class Screen:
    """Prints to a console. A context manager: the moving line is there inside, and gone afterwards."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        # Without a terminal there is no moving line: whoever reads a file wants lines that stay.
        self._progress = Progress(
            TextColumn("          "),
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            refresh_per_second=8,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, note="")

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def title(self, title: str, *lines: str) -> None:
        self._console.print(Text(title, style="bold"))
        for line in lines:
            self._console.print(Text(line, style="dim"), soft_wrap=True)

    def heading(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, style="bold cyan"))

    def say(self, text: str, style: str = "") -> None:
        """A line about something that has just happened."""
        self._print(Text(f"{self.seconds:8.1f} s  ", style="dim"), Text(text, style=style))

    def claims(self, claims: list[tuple[bool, str, str]]) -> None:
        """Claims, each with whether it held and the evidence."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        for holds, claim, detail in claims:
            mark = Text("✓", "bold green") if holds else Text("✗", "bold red")
            table.add_row(mark, claim, Text(detail, "dim"))
        self._console.print(Padding(table, (0, 0, 0, _INDENT - 2)))

    def quote(self, text: str, style: str = "dim") -> None:
        """Lines that somebody else wrote."""
        for line in text.rstrip().splitlines():
            self._print(Text(" " * _INDENT), Text(line, style=style))

    def _print(self, margin: Text, text: Text) -> None:
        """A line whose continuation, on a terminal too narrow for it, is indented; elsewhere it is never broken."""
        if not self._console.is_terminal:
            self._console.print(margin + text, soft_wrap=True)
            return
        grid = Table.grid()
        grid.add_column(width=_INDENT)
        grid.add_column(overflow="fold")
        grid.add_row(margin, text)
        self._console.print(grid)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Two columns; the second is right-aligned."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(Padding(table, (0, 0, 0, _INDENT)))

    def waiting_for(self, what: str) -> None:
        """On the moving line: something whose progress is not known."""
        self._progress.update(self._task, description=what, total=None, note="")

    def at_step(self, step: int, steps: int, note: str) -> None:
        """On the moving line: how far the training is."""
        self._progress.update(self._task, description=f"step {step:>3}/{steps}", completed=step, total=steps, note=note)


def duration(seconds: float) -> str:
    """A time as one would say it: 4 ms, 0.31 s, 12.4 s."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
