"""`ckpt verify`: every byte of a checkpoint against its checksum."""

from __future__ import annotations

from itertools import groupby

import click

from ckpt_cli.output import Column, Output, count_text, json_option, print_json, size_text
from ckpt_cli.progress import reporting
from ckpt_formats.verify import Damage, VerifyReport
from ckpt_formats.verify import verify as verify_checkpoint

LISTED = 10
"""Places of damage of one kind that are listed for each file; --json lists all."""


@click.command()
@click.argument("checkpoint")
@click.option("--threads", type=click.IntRange(1, 64), help="Threads that read and check; by default up to 4.")
@json_option
def verify(checkpoint: str, threads: int | None, as_json: bool) -> None:
    """Check every byte of a checkpoint against its checksum.

    Reads all of its files once and lists everything that is damaged: the file, the bytes, the tensor and the part of
    it, and what is wrong. Files that do not belong to the checkpoint are told, but are no damage.

    \b
    Exit codes:
      0  the checkpoint is intact
      1  it is damaged
      2  there is no checkpoint, or one that this release can't check
    """
    with reporting("Verifying", wanted=not as_json) as progress:
        report = verify_checkpoint(checkpoint, progress=progress, threads=threads)
    if as_json:
        print_json(_facts(report))
    else:
        _print(report)
    if not report.intact:
        raise click.exceptions.Exit(1)


def _print(report: VerifyReport) -> None:
    out = Output()
    speed = f" ({size_text(int(report.bytes / report.seconds))}/s)" if report.seconds >= 1 else ""
    checked = (
        f"Checked {size_text(report.bytes)} in {count_text(report.files, 'file')}, "
        f"{count_text(report.chunks, 'chunk')} of {count_text(report.tensors, 'tensor')}, "
        f"in {report.seconds:.1f} s{speed}."
    )
    if report.intact:
        out.line(f"{report.path} is ", ("intact", "bold green"), ".")
        out.line((checked, "dim"))
    else:
        tensors = len({damage.tensor for damage in report.damage} - {None})
        places = count_text(len(report.damage), "place")
        touched = f", {count_text(tensors, 'tensor')}" if tensors else ""
        out.line(f"{report.path} is ", ("damaged", "bold red"), f": {places}{touched}.")
        for file, group in groupby(report.damage, key=lambda damage: damage.file):
            _print_file(out, file, list(group))
        if report.bytes:
            out.line((checked, "dim"))
    if report.debris:
        foreign = f"{count_text(len(report.debris), 'file')}, {size_text(sum(item.size for item in report.debris))}"
        out.line((f"Not part of the checkpoint, and harmless: {foreign}", "yellow"))
        for debris in report.debris[:LISTED]:
            out.line(f"  {debris.path}")
        if len(report.debris) > LISTED:
            out.line(f"  … and {len(report.debris) - LISTED:,} more")


def _print_file(out: Output, file: str, damage: list[Damage]) -> None:
    whole = [item.what for item in damage if item.start is None and item.tensor is None]
    out.line((f"  {file}", "bold"), f": {'; '.join(whole)}" if whole else "")
    parts = [item for item in damage if item.start is not None or item.tensor is not None]
    for what in dict.fromkeys(item.what for item in parts):
        out.line(f"    {what}")
        found = [item for item in parts if item.what == what]
        out.table([Column(""), Column("", fold=True)], [[_place(item), _tensor(item)] for item in found[:LISTED]], 6)
        if len(found) > LISTED:
            out.line(f"      … and {len(found) - LISTED:,} more (--json lists all)")


def _place(damage: Damage) -> str:
    return "" if damage.start is None else f"bytes {damage.start}-{damage.stop}"


def _tensor(damage: Damage) -> str:
    return "" if damage.tensor is None else f"{damage.tensor} {damage.box}"


def _facts(report: VerifyReport) -> dict[str, object]:
    return {
        "path": report.path,
        "intact": report.intact,
        "step": report.step,
        "files": report.files,
        "tensors": report.tensors,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 6),
        "damage": [
            {
                "file": damage.file,
                "start": damage.start,
                "stop": damage.stop,
                "tensor": damage.tensor,
                "box": None if damage.box is None else str(damage.box),
                "what": damage.what,
            }
            for damage in report.damage
        ],
        "debris": [{"path": debris.path, "bytes": debris.size} for debris in report.debris],
    }
