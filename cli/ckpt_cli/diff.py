"""`ckpt diff`: what differs between two checkpoints."""

from __future__ import annotations

import math

import click

from ckpt_cli.output import Column, Output, count_text, json_option, print_json, size_text
from ckpt_cli.progress import reporting
from ckpt_formats.comparing import Numbers
from ckpt_formats.diff import Difference, DiffReport
from ckpt_formats.diff import diff as diff_checkpoints

LISTED = 50
"""Differences that are listed of each kind; --json lists all."""


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--rtol", type=click.FloatRange(0), default=0.0, help="Relative tolerance for elements of tensors.")
@click.option("--atol", type=click.FloatRange(0), default=0.0, help="Absolute tolerance for elements of tensors.")
@click.option("--only", "pattern", metavar="PATTERN", help="Compare only names that match, as in a shell: 'model.*'.")
@json_option
def diff(a: str, b: str, rtol: float, atol: float, pattern: str | None, as_json: bool) -> None:
    """Tell what differs between two checkpoints.

    Compares the names, shapes, dtypes and elements of tensors, which names are tied, and plain values, each rank's own
    included. How they are cut is no difference. Tensors are equal when all bits are; with --rtol or --atol, when every
    pair of elements has |a - b| <= atol + rtol * |b|. Plain values are always compared exactly.

    \b
    Exit codes:
      0  they are equal
      1  they differ, or one is damaged
      2  there is no checkpoint, or nothing matches PATTERN
    """
    with reporting("Comparing", wanted=not as_json) as progress:
        report = diff_checkpoints(a, b, rtol=rtol, atol=atol, pattern=pattern, progress=progress)
    if as_json:
        print_json(_facts(report))
    else:
        _print(report, tolerant=rtol > 0 or atol > 0)
    if not report.equal:
        raise click.exceptions.Exit(1)


def _print(report: DiffReport, *, tolerant: bool) -> None:
    out = Output()
    out.line(("A ", "bold"), report.a)
    out.line(("B ", "bold"), report.b)
    counts = [(report.tensors, "tensor"), (report.values, "value")]
    compared = " and ".join(count_text(count, what) for count, what in counts if count)
    if report.equal:
        within = " within the tolerance" if report.close else ""
        out.line("They are ", (f"equal{within}", "bold green"), f": {compared}.")
    else:
        out.line("They ", ("differ", "bold red"), ":")
        for title, subject in (("entry", "entry"), ("tensor", "tensor"), ("value", "value")):
            found = [item for item in report.differences if item.subject == subject]
            _table(out, title, found, tolerant=tolerant)
        if compared:
            out.line((f"Compared {compared} that both have.", "dim"))
    if report.close:
        out.line(f"Within the tolerance: {count_text(len(report.close), 'tensor')}")
        _table(out, "tensor", sorted(report.close, key=_distance, reverse=True), tolerant=True)
    if report.bytes_compared:
        out.line((f"{size_text(report.bytes_compared)} of each had to be read; checksums told the rest.", "dim"))
    for note in report.notes:
        out.line((f"No difference, but: {note}.", "dim"))


def _table(out: Output, title: str, found: list[Difference], *, tolerant: bool) -> None:
    if not found:
        return
    rows = [[_name(item), _text(item, tolerant=tolerant)] for item in found[:LISTED]]
    out.table([Column(title, lead=True), Column("", fold=True)], rows, indent=2)
    if len(found) > LISTED:
        out.line(f"  … and {len(found) - LISTED:,} more (--json lists all)")


def _name(item: Difference) -> str:
    return item.name if item.rank is None else f"{item.name} (rank {item.rank})"


def _text(item: Difference, *, tolerant: bool) -> str:
    match item.kind:
        case "only_a":
            return f"only in A: {item.a}"
        case "only_b":
            return f"only in B: {item.b}"
        case "shape" | "dtype":
            return f"{item.kind} {item.a} in A, {item.b} in B"
    if item.numbers is not None:
        return _numbers_text(item.numbers, tolerant=tolerant)
    if item.a == item.b:
        return f"another {item.a}"
    return f"{item.a} in A, {item.b} in B"


def _numbers_text(numbers: Numbers, *, tolerant: bool) -> str:
    count = numbers.beyond or numbers.differing
    how = " beyond the tolerance" if tolerant and numbers.beyond else ""
    text = f"{count:,} of {count_text(numbers.elements, 'element')}{how}"
    if numbers.max_abs is None:
        return f"{text}, first at {list(numbers.where or ())}"
    # without a tolerance it says little: some |b| is next to 0 in most tensors
    relative = f" (relative {numbers.max_rel:.2g})" if tolerant and numbers.max_rel is not None else ""
    return f"{text}, at most by {numbers.max_abs:.3g} at {list(numbers.where or ())}{relative}"


def _distance(item: Difference) -> float:
    return item.numbers.max_abs or 0.0 if item.numbers else 0.0


def _facts(report: DiffReport) -> dict[str, object]:
    return {
        "a": report.a,
        "b": report.b,
        "equal": report.equal,
        "differences": [_difference_facts(item) for item in report.differences],
        "within_tolerance": [_difference_facts(item) for item in report.close],
        "notes": list(report.notes),
        "tensors": report.tensors,
        "values": report.values,
        "bytes_compared": report.bytes_compared,
        "seconds": round(report.seconds, 6),
    }


def _difference_facts(item: Difference) -> dict[str, object]:
    numbers = item.numbers
    return {
        "subject": item.subject,
        "name": item.name,
        "kind": item.kind,
        "a": item.a,
        "b": item.b,
        "rank": item.rank,
        "numbers": None
        if numbers is None
        else {
            "elements": numbers.elements,
            "differing": numbers.differing,
            "beyond": numbers.beyond,
            "max_abs": _number(numbers.max_abs),
            "max_rel": _number(numbers.max_rel),
            "where": None if numbers.where is None else list(numbers.where),
        },
    }


def _number(value: float | None) -> float | str | None:
    # JSON has no infinity
    return "inf" if value is not None and math.isinf(value) else value
