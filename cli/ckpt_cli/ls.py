"""`ckpt ls`: the checkpoints of a run, at each of its levels."""

from __future__ import annotations

import os
from typing import NamedTuple

import click

from ckpt_cli.output import Column, Output, age_text, json_option, print_json, size_text
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError
from ckpt_formats.runs import Found, State, find_checkpoints
from ckpt_formats.urls import is_url

_STYLES = {
    State.WHOLE: "green",
    State.PARTIAL: "red",
    State.NOT_COMMITTED: "yellow",
    State.DAMAGED: "bold red",
    State.UNKNOWN_VERSION: "yellow",
}


class _Level(NamedTuple):
    """A place where checkpoints of the run lie."""

    name: str
    place: str
    every: str | None
    """How often it is due, for people."""
    found: list[Found]
    problem: str | None
    """Why it can't be listed."""


@click.command()
@click.argument("run")
@json_option
def ls(run: str, as_json: bool) -> None:
    """List the checkpoints of a run.

    RUN is a folder or URL with checkpoints in it, or a single checkpoint. They are listed by step, oldest first, with
    what is left of saves that did not end. Of a run that a Checkpointer saves to several levels, all levels are listed.
    The state comes from the manifest and the sizes of the files; `ckpt verify` reads the bytes.

    \b
    Exit codes:
      0  listed, whatever the states are
      2  there is no such folder
    """
    levels = _levels(run)
    several = len(levels) > 1
    rows = [(level, item) for level in levels for item in level.found]
    rows.sort(key=lambda row: -1 if row[1].step is None else row[1].step)
    if as_json:
        tree: dict[str, object] = {"path": run, "checkpoints": [_facts(item, level, several) for level, item in rows]}
        if several:
            tree["levels"] = [level._replace(found=[])._asdict() | {"found": len(level.found)} for level in levels]
        print_json(tree)
        return
    out = Output()
    if rows:
        columns = [
            Column("checkpoint", fold=True),
            *([Column("level")] if several else []),
            Column("step", right=True),
            Column("size", right=True),
            Column("tensors", right=True),
            Column("saved"),
            Column("by", fold=True),
            Column("state", fold=True),
        ]
        out.table(columns, [_row(item, level, several) for level, item in rows])
    else:
        out.line(f"{run} holds no checkpoints.")
    for level, item in rows:
        if item.problem and item.state is not State.NOT_COMMITTED:
            where = f" on {level.name}" if several else ""
            out.line((f"{_name(item)}{where}: {item.problem}", "dim"))
    for level in levels if several else []:
        every = f", {level.every}" if level.every else ""
        out.line((f"{level.name}: {level.place}{every}", "dim"))
        if level.problem is not None:
            out.line((f"{level.name} can't be listed: ", "bold red"), level.problem)


def _levels(run: str) -> list[_Level]:
    """The levels of a run with what lies there; one without a name for anything else.

    Raises CheckpointNotFoundError when there is nothing at all.
    """
    known = None
    if not is_url(run):
        from ckpt.levels.record import read_levels

        known = read_levels(run)
    if known is None or (len(known) == 1 and known[0].place == os.path.abspath(run)):
        return [_Level("", run, None, find_checkpoints(run), None)]
    levels = []
    for level in known:
        found: list[Found] = []
        problem = None
        try:
            found = find_checkpoints(level.place)
        except CheckpointNotFoundError:
            pass  # nothing is there yet
        except (CheckpointError, OSError) as error:
            problem = str(error)
        levels.append(_Level(level.name, level.place, str(level.every) if level.every else None, found, problem))
    return levels


def _name(item: Found) -> str:
    return os.path.basename(os.path.abspath(item.path))


def _row(item: Found, level: _Level, several: bool) -> list[str | tuple[str, str]]:
    return [
        _name(item),
        *([level.name] if several else []),
        "" if item.step is None else f"{item.step:,}",
        size_text(item.bytes),
        "" if item.tensors is None else f"{item.tensors:,}",
        "" if item.created is None else age_text(item.created),
        item.writers or "",
        (item.state.value, _STYLES[item.state]),
    ]


def _facts(item: Found, level: _Level, several: bool) -> dict[str, object]:
    return {
        "path": item.path,
        **({"level": level.name} if several else {}),
        "state": item.state.value,
        "problem": item.problem,
        "step": item.step,
        "bytes": item.bytes,
        "tensors": item.tensors,
        "created": None if item.created is None else item.created.isoformat(),
        "world_size": item.world_size,
        "by": item.writers,
    }
