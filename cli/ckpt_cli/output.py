"""What all verbs print alike: sizes, ages, tables, JSON, and text from files made harmless. Knows no checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import click
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ckpt_formats.errors import FormatError

__all__ = ["Cell", "Column", "Output", "age_text", "count_text", "json_option", "plain", "print_json", "size_text"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(command: _Command) -> _Command:
    """The option --json, alike for all verbs."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")(command)


def plain(text: str, *, lines: bool = False) -> str:
    """Text that may come from a hostile file, with everything that could steer a terminal escaped.

    That is whatever is not printable: control characters, such as those that begin an escape sequence; characters that
    turn the direction of text; halves of surrogate pairs. `lines` keeps line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or (lines and character == "\n")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def print_json(tree: object) -> None:
    """One JSON document on stdout. ASCII, so that it is harmless and valid whatever the names in it are."""
    try:
        text = json.dumps(tree, indent=2, allow_nan=False)
    except ValueError as error:
        # 1e999 in a manifest is read as infinity
        raise FormatError(
            f"a number in the checkpoint is too large for JSON ({error}); it was written wrongly"
        ) from error
    click.echo(text)


def size_text(count: int) -> str:
    """Bytes for people: `4.2 GiB`."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if round(size, 1) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.1f} PiB"


def count_text(count: int, what: str) -> str:
    """`1 file`, `12,345 files`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def age_text(when: datetime, now: datetime | None = None) -> str:
    """How long ago, roughly: `5 min ago`."""
    seconds = ((now or datetime.now(UTC)) - when).total_seconds()
    if seconds < -60:
        return "in the future"
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86400 * 2, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds // divisor))} {unit} ago"
    return f"{int(seconds // 86400)} days ago"


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False
    """Numbers stand right."""
    fold: bool = False
    """Broken over lines when the terminal is too narrow; the others never are."""
    lead: bool = False
    """The first column may be: stands on a line of its own, above the others, where folding would not help."""


Cell = str | tuple[str, str]
"""Text, or (text, style)."""


class Output:
    """Text on stdout: coloured and folded on a terminal, whole lines elsewhere, so that `grep` finds names.

    Everything printed goes through `plain`. Styles are rich's, such as `bold red`.
    """

    def __init__(self) -> None:
        # markup and emoji codes may occur in names of tensors, and [0] would be markup
        self._console = Console(markup=False, emoji=False, highlight=False)

    def line(self, *cells: Cell) -> None:
        """One line of parts."""
        self._console.print(Text.assemble(*map(_styled, cells)), soft_wrap=not self._console.is_terminal)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], indent: int = 0) -> None:
        """Rows of cells under their titles. Columns in which all cells are empty are left out."""
        cells = [[_styled(cell) for cell in row] for row in rows]
        used = [k for k in range(len(columns)) if any(row[k][0] for row in cells)]
        columns = [columns[k] for k in used]
        cells = [[row[k] for k in used] for row in cells]
        if any(column.title for column in columns):
            cells.insert(0, [(column.title, "dim") for column in columns])
        if not cells:
            return
        widths = [max(cell_len(row[k][0]) for row in cells) for k in range(len(columns))]
        fits = indent + sum(widths) + 2 * (len(widths) - 1) <= self._console.width
        if not self._console.is_terminal:
            # a listing may be long, and rich takes its time
            for row in cells:
                line = "".join(text for text, _ in _aligned(row, columns, widths))
                click.echo((" " * indent + line).rstrip())
        elif fits:
            for row in cells:
                self._print(_aligned(row, columns, widths), indent)
        elif columns[0].lead and (not any(c.fold for c in columns) or widths[0] > self._console.width // 2):
            for row in cells:
                self._print(row[:1], indent)
                self._print(_aligned(row[1:], columns[1:], widths[1:]), indent + 4)
        else:
            self._folded(columns, cells, indent)

    def _print(self, parts: Sequence[tuple[str, str]], indent: int) -> None:
        """A line whose continuation, if it has one, is indented too."""
        text = Text.assemble(*parts, overflow="fold")
        text.rstrip()
        if text.plain:
            self._console.print(Padding(text, (0, 0, 0, indent), expand=False))

    def _folded(self, columns: Sequence[Column], rows: Sequence[Sequence[tuple[str, str]]], indent: int) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for column in columns:
            table.add_column(justify="right" if column.right else "left", overflow="fold", no_wrap=not column.fold)
        for row in rows:
            table.add_row(*(Text(*cell) for cell in row))
        self._console.print(Padding(table, (0, 0, 0, indent), expand=False))


def _styled(cell: Cell) -> tuple[str, str]:
    return (plain(cell), "") if isinstance(cell, str) else (plain(cell[0]), cell[1])


def _aligned(row: Sequence[tuple[str, str]], columns: Sequence[Column], widths: Sequence[int]) -> list[tuple[str, str]]:
    parts = []
    for k, ((text, style), column, width) in enumerate(zip(row, columns, widths, strict=True)):
        gap = " " * (width - cell_len(text))
        before = ("  " if k else "") + (gap if column.right else "")
        parts += [(before, ""), (text, style), ("" if column.right else gap, "")]
    return parts
