"""Progress of long work on stderr: a bar on a terminal, a line every few seconds elsewhere, nothing when not wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ckpt_cli.output import size_text

__all__ = ["reporting"]

EVERY_S = 5.0
"""Seconds between two lines where there is no terminal."""

Report = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@contextmanager
def reporting(what: str, *, wanted: bool = True) -> Iterator[Report | None]:
    """Show the progress of work while the block runs; gives the function to tell it to.

    Args:
        what: one word that says what is done.
        wanted: False gives None and shows nothing.
    """
    if not wanted:
        yield None
    elif sys.stderr.isatty():
        with _bar(what) as report:
            yield report
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # transient: what stays on the screen is the result
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        task = progress.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report


def _lines(what: str) -> Report:
    due = time.monotonic() + EVERY_S

    def report(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            due = now + EVERY_S
            share = f"{100 * done // total} %" if total else "0 %"
            click.echo(f"{what}: {size_text(done)} of {size_text(total)} ({share})", err=True)

    return report
