"""RUN/levels.json: where the checkpoints of a run lie, for whoever lists them later.

Without options of stores, which may have secrets in them. The run's own folder is "." there, since runs are moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace

from ckpt.levels.tiers import Level, levels_from_json, levels_to_json
from ckpt_formats.errors import FormatError

__all__ = ["NAME", "read_levels", "write_levels"]

NAME = "levels.json"
FORMAT = "ckpt-levels"
VERSION = 1
MAX_SIZE = 1 << 20
"""Bytes of the largest such file."""


def write_levels(run: str, levels: Sequence[Level]) -> None:
    """Say which levels the run has, in place of what was said before. Raises OSError."""
    items = levels_to_json(levels, options=False)
    for item in items:
        if item["place"] == run:
            item["place"] = "."
    tree = {"format": FORMAT, "version": VERSION, "levels": items}
    path = os.path.join(run, NAME)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="ascii") as stream:
        json.dump(tree, stream, indent=1)
    os.replace(temporary, path)


def read_levels(run: str | os.PathLike[str]) -> list[Level] | None:
    """The levels of a run; None when nothing says so.

    Raises:
        FormatError: the file says something that can't be understood.
    """
    path = os.path.join(os.fspath(run), NAME)
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(MAX_SIZE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, error) from error
    try:
        tree = json.loads(text)
        if tree["format"] != FORMAT or tree["version"] != VERSION:
            raise ValueError("it is of another kind or of a newer release")
        levels = levels_from_json(tree["levels"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _wrong(path, error) from error
    own = os.path.abspath(os.fspath(run))
    return [replace(level, place=own) if level.place == "." else level for level in levels]


def _wrong(path: str, error: Exception) -> FormatError:
    return FormatError(
        f"{path}: which levels the run has can't be read ({error}). The checkpoints are not touched by that; remove "
        "the file, and the next job writes it anew",
        path=path,
    )
