"""`ckpt tag`: names, a pin and metrics beside a checkpoint."""

from __future__ import annotations

import math

import click

from ckpt_cli.output import Output, json_option, print_json
from ckpt_formats.facts import Facts, read_facts
from ckpt_formats.native.reader import is_native, read_root


@click.command()
@click.argument("checkpoint")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="Take this tag off; repeatable.")
@click.option("--pin/--unpin", "pinned", default=None, help="Pin it, so that it is never pruned; or take the pin off.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME=VALUE", help="Record a metric, such as loss=2.31; repeatable."
)
@json_option
def tag(
    checkpoint: str,
    names: tuple[str, ...],
    removed: tuple[str, ...],
    pinned: bool | None,
    metrics: tuple[str, ...],
    as_json: bool,
) -> None:
    """Give a checkpoint names, pin it, record metrics beside it; without any of these, show them.

    A tagged or pinned checkpoint is not pruned. All this is kept in a small file of its own beside the manifest: the
    checkpoint itself is never changed.

    \b
    Exit codes:
      0  done
      1  they are damaged or could not be recorded; or a tag to be taken off is not there
      2  the request is wrong: no checkpoint there, a name or number that can't be recorded
    """
    values = dict(map(_metric, metrics))
    if not is_native(checkpoint):
        read_root(checkpoint)  # says what is there instead
    if names or removed or values or pinned is not None:
        from ckpt.storage.facts import update_facts  # here, because it imports torch

        missing: list[str] = []

        def change(facts: Facts) -> Facts:
            missing.extend(name for name in removed if name not in facts.tags)
            return facts.changed(metrics=values, tags=names, untag=removed, pinned=pinned)

        facts = update_facts(checkpoint, change)
    else:
        missing = []
        facts = read_facts(checkpoint)
    if as_json:
        print_json(_tree(checkpoint, facts))
    else:
        _print(checkpoint, facts, missing)
    if missing:
        raise click.exceptions.Exit(1)


def _metric(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        equals = ""
        value = 0.0
    if not equals or not name:
        raise click.UsageError(f"--metric {text!r}: write NAME=NUMBER, such as loss=2.31")
    return name, value


def _print(checkpoint: str, facts: Facts, missing: list[str]) -> None:
    out = Output()
    for name in missing:
        out.line(("Not there: ", "yellow"), f"the tag {name}")
    if not facts:
        out.line(f"{checkpoint} has no tags, no pin and no metrics.")
        return
    out.line((checkpoint, "bold"), ": pinned" if facts.pinned else "")
    if facts.tags:
        out.line(f"  tags: {', '.join(facts.tags)}")
    for name, value in sorted(facts.metrics.items()):
        out.line(f"  {name} = {value:.6g}")


def _tree(checkpoint: str, facts: Facts) -> dict[str, object]:
    return {
        "path": checkpoint,
        "tags": list(facts.tags),
        "pinned": facts.pinned,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in facts.metrics.items()},
    }
