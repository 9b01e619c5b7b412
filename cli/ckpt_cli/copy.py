"""`ckpt copy`: a checkpoint or a run, byte for byte, every byte verified."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from ckpt_cli.output import Output, count_text, json_option, print_json, size_text
from ckpt_cli.progress import reporting
from ckpt_formats.native.reader import is_native

if TYPE_CHECKING:
    from ckpt.transfer.copy import CopyResult


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--step", "steps", type=click.IntRange(0), multiple=True, help="Of a run, only this step; repeatable.")
@json_option
def copy(source: str, target: str, steps: tuple[int, ...], as_json: bool) -> None:
    """Copy a checkpoint or a run, every byte verified.

    SRC is a checkpoint and DST the folder of its copy; or SRC is a run, and DST the run that its committed checkpoints
    are copied to, each under its own name. The copy is the same byte for byte, tags, pin and metrics included. It is
    committed when all of it is there, so that nobody finds a part of it.

    A copy that was interrupted goes on when it is called again: files that are whole at DST are verified, not copied.
    Checkpoints that are at DST already are passed over.

    \b
    Exit codes:
      0  done
      1  a checkpoint at SRC is damaged, or DST could not be written
      2  the request is wrong: no checkpoint at SRC, another one at DST already
    """
    from ckpt.transfer.copy import copy as copy_checkpoint  # here, because it imports torch
    from ckpt.transfer.copy import copy_run

    if is_native(source):
        if steps:
            raise click.UsageError(f"--step chooses from a run, but {source} is a checkpoint itself")
        with reporting("Copying", wanted=not as_json) as progress:
            copies, failed = [copy_checkpoint(source, target, progress=progress)], []
        uncommitted: list[str] = []
    else:
        with reporting("Copying", wanted=not as_json) as progress:
            result = copy_run(source, target, steps=set(steps) if steps else None, progress=progress)
        copies, failed, uncommitted = list(result.copies), list(result.failed), list(result.uncommitted)
    if as_json:
        print_json(
            {
                "source": source,
                "target": target,
                "copies": [_facts(item) for item in copies],
                "failed": [{"path": path, "problem": problem} for path, problem in failed],
                "uncommitted": uncommitted,
            }
        )
    else:
        _print(source, copies, failed, uncommitted)
    if failed:
        raise click.exceptions.Exit(1)


def _print(source: str, copies: list[CopyResult], failed: list[tuple[str, str]], uncommitted: list[str]) -> None:
    out = Output()
    for item in copies:
        if item.present:
            out.line(f"{item.path} is there already.")
        else:
            again = f", {size_text(item.verified)} were there" if item.verified else ""
            out.line(
                ("Copied ", "bold green"),
                f"{os.path.basename(item.source)} to {item.path}: {size_text(item.bytes)}{again}, "
                f"in {item.seconds:.1f} s.",
            )
        if item.note is not None:
            out.line(("Note: ", "yellow"), item.note)
    for path, problem in failed:
        out.line(("Not copied: ", "bold red"), problem if path in problem else f"{path}: {problem}")
    if uncommitted:
        out.line((f"Passed over {count_text(len(uncommitted), 'save')} that did not end, or has not ended yet.", "dim"))
    if not copies and not failed:
        out.line(f"{source} holds no checkpoints.")


def _facts(item: CopyResult) -> dict[str, object]:
    return {
        "source": item.source,
        "path": item.path,
        "step": item.step,
        "bytes": item.bytes,
        "copied": item.copied,
        "verified": item.verified,
        "present": item.present,
        "note": item.note,
        "seconds": round(item.seconds, 6),
    }
