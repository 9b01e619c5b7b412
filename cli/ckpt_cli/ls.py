"""`ckpt ls`: the checkpoints of a run."""

from __future__ import annotations

import os

import click

from ckpt_cli.output import Column, Output, age_text, json_option, print_json, size_text
from ckpt_formats.runs import Found, State, find_checkpoints

_STYLES = {
    State.WHOLE: "green",
    State.PARTIAL: "red",
    State.NOT_COMMITTED: "yellow",
    State.DAMAGED: "bold red",
    State.UNKNOWN_VERSION: "yellow",
}


@click.command()
@click.argument("run")
@json_option
def ls(run: str, as_json: bool) -> None:
    """List the checkpoints of a run.

    RUN is a folder with checkpoints in it, or a single checkpoint. They are listed by step, oldest first, with what is
    left of saves that did not end. The state comes from the manifest and the sizes of the files; `ckpt verify` reads
    the bytes.

    \b
    Exit codes:
      0  listed, whatever the states are
      2  there is no such folder
    """
    found = find_checkpoints(run)
    if as_json:
        print_json({"path": run, "checkpoints": [_facts(item) for item in found]})
        return
    out = Output()
    if not found:
        out.line(f"{run} holds no checkpoints.")
        return
    columns = [
        Column("checkpoint", fold=True),
        Column("step", right=True),
        Column("size", right=True),
        Column("tensors", right=True),
        Column("saved"),
        Column("by", fold=True),
        Column("state", fold=True),
    ]
    out.table(columns, [_row(item) for item in found])
    for item in found:
        if item.problem and item.state is not State.NOT_COMMITTED:
            out.line((f"{_name(item)}: {item.problem}", "dim"))


def _name(item: Found) -> str:
    return os.path.basename(os.path.abspath(item.path))


def _row(item: Found) -> list[str | tuple[str, str]]:
    return [
        _name(item),
        "" if item.step is None else f"{item.step:,}",
        size_text(item.bytes),
        "" if item.tensors is None else f"{item.tensors:,}",
        "" if item.created is None else age_text(item.created),
        item.writers or "",
        (item.state.value, _STYLES[item.state]),
    ]


def _facts(item: Found) -> dict[str, object]:
    return {
        "path": item.path,
        "state": item.state.value,
        "problem": item.problem,
        "step": item.step,
        "bytes": item.bytes,
        "tensors": item.tensors,
        "created": None if item.created is None else item.created.isoformat(),
        "world_size": item.world_size,
        "by": item.writers,
    }
