"""`ckpt prune`: what a run need not keep."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from ckpt_cli.output import Cell, Column, Output, count_text, json_option, print_json, size_text

if TYPE_CHECKING:
    from ckpt.levels.policies import Policy
    from ckpt.levels.report import PruneReport

LISTED = 10
"""Items of debris that are listed; --json lists all."""


@click.command()
@click.argument("run")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Keep the N newest.")
@click.option("--every", type=click.IntRange(1), metavar="STEPS", help="Keep the steps that are multiples of this.")
@click.option(
    "--best",
    type=(click.IntRange(1), str, click.Choice(["min", "max"])),
    multiple=True,
    metavar="N METRIC min|max",
    help="Keep the N steps with the least or greatest METRIC, as `ckpt tag --metric` recorded it; repeatable.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="MINUTES",
    help="Leave debris that changed within this time: a save or copy may be under way.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@json_option
def prune(
    run: str,
    keep: int | None,
    every: int | None,
    best: tuple[tuple[int, str, str], ...],
    grace: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove old checkpoints of a run by a rule, and debris.

    RUN is the folder that holds the checkpoints. One stays if any of the rules keeps it. Whatever the rules say, these
    stay: the newest, pinned and tagged ones, those that a copy or reader holds now, and those that are not whole.
    Without a rule only debris goes: what saves, copies and prunes that were interrupted left.

    \b
    Exit codes:
      0  done
      1  something could not be removed
      2  the request is wrong: no such run, a checkpoint in its place
    """
    from ckpt.levels.prune import prune as prune_run  # here, because it imports torch

    report = prune_run(run, _policy(keep, every, best), dry_run=dry_run, grace=60 * grace)
    if as_json:
        print_json(_facts(report))
    else:
        _print(report)
    if report.failed:
        raise click.exceptions.Exit(1)


def _policy(keep: int | None, every: int | None, best: tuple[tuple[int, str, str], ...]) -> Policy | None:
    from ckpt.levels.policies import Any, BestN, EveryN, LatestN

    policies: list[Policy] = []
    if keep is not None:
        policies.append(LatestN(keep))
    if every is not None:
        policies.append(EveryN(every))
    policies += [BestN(n, metric, "min" if mode == "min" else "max") for n, metric, mode in best]
    return Any(*policies) if policies else None


def _print(report: PruneReport) -> None:
    out = Output()
    rows: list[list[Cell]] = []
    for path, step, _ in report.removed:
        rows.append([os.path.basename(path), _step(step), (_gone(report), "yellow"), ""])
    for path, step, why in report.kept:
        rows.append([os.path.basename(path), _step(step), ("kept", "green"), why])
    out.table([Column("checkpoint", fold=True), Column("step", right=True), Column(""), Column("why", fold=True)], rows)
    if report.debris:
        size = size_text(sum(item.bytes for item in report.debris))
        out.line(f"{'Debris to be removed' if report.dry_run else 'Removed debris'}: {size}")
        for item in report.debris[:LISTED]:
            out.line(f"  {os.path.relpath(item.path, report.path)}")
        if len(report.debris) > LISTED:
            out.line(f"  … and {len(report.debris) - LISTED:,} more (--json lists all)")
    if report.recent:
        out.line((f"Left, because a save or copy may be under way: {count_text(len(report.recent), 'item')}", "dim"))
        for path in report.recent[:LISTED]:
            out.line((f"  {os.path.relpath(path, report.path)}", "dim"))
    for path, reason in report.failed:
        out.line(("Could not be removed: ", "bold red"), f"{path}: {reason}")
    for why in report.unmeasured.values():
        out.line((why, "yellow"))
    done = "Would free" if report.dry_run else "Freed"
    out.line(
        (f"{done} {size_text(report.bytes)}", "bold"),
        f": {count_text(len(report.removed), 'checkpoint')} of {len(report.removed) + len(report.kept):,}.",
    )


def _gone(report: PruneReport) -> str:
    return "would go" if report.dry_run else "removed"


def _step(step: int | None) -> str:
    return "" if step is None else f"{step:,}"


def _facts(report: PruneReport) -> dict[str, object]:
    return {
        "path": report.path,
        "dry_run": report.dry_run,
        "removed": [item._asdict() for item in report.removed],
        "kept": [item._asdict() for item in report.kept],
        "debris": [{"path": item.path, "bytes": item.bytes} for item in report.debris],
        "recent": list(report.recent),
        "failed": [{"path": path, "reason": reason} for path, reason in report.failed],
        "unmeasured": list(report.unmeasured),
        "bytes": report.bytes,
    }
