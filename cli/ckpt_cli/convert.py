"""`ckpt convert`: a checkpoint, or a part of it, anew: under other names, in another dtype, as another format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from ckpt_cli.output import Output, count_text, json_option, plain, print_json, size_text
from ckpt_cli.progress import reporting
from ckpt_formats.errors import LayoutError
from ckpt_formats.layout import Layout, Mesh


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--to", "kind", type=click.Choice(["native", "safetensors"]), required=True, help="The format that is written."
)
@click.option("--select", multiple=True, metavar="PATTERN", help="Take only what matches. May be given several times.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Other names; without NEW, what is left out.")
@click.option("--dtype", multiple=True, metavar="[PATTERN=]DTYPE", help="Convert floating-point tensors, or some.")
@click.option("--mesh", metavar="AXES", help="For native: cut for a mesh, as by `ckpt reshard`.")
@click.option("--layout", metavar="FILE", help="For native: TOML file, how tensors lie on the ranks.")
@click.option("--shard-size", metavar="BYTES", type=click.IntRange(1), help="For safetensors: bytes in a file at most.")
@json_option
def convert(
    source: str,
    target: str,
    kind: str,
    select: Sequence[str],
    rename: Sequence[str],
    dtype: Sequence[str],
    mesh: str | None,
    layout: str | None,
    shard_size: int | None,
    as_json: bool,
) -> None:
    """Write a checkpoint, or a part of it, anew: under other names, in another dtype, as another format.

    SRC is a checkpoint, DST a new folder. native is this project's format. safetensors is a folder of whole tensors, as
    Hugging Face's libraries write and read it: it has no values, and of tied tensors only one. Memory is bounded
    whatever the size, and every byte is verified on the way.

    PATTERN is as in layouts (docs/layout.md): * is any text, {layer} a part without dots. OLD is a name, for all that
    is below it too, or a pattern, and NEW may have a * for each wildcard. --select goes by the names in SRC, --dtype by
    the new ones. The first rule that matches counts. Give quotes around them.

    DTYPE alone (bfloat16, float16, float32, float64) is for all floating-point tensors but for what optimizers keep as
    scalars; it rounds as torch does. With a pattern it is for those of any dtype, but then nothing but floats may
    lose anything.

    \b
      ckpt convert runs/a/step_500 weights --to safetensors \\
          --select "model.*" --rename "model.*=*" --dtype bfloat16

    \b
    Exit codes:
      0  done
      1  SRC is damaged, or DST could not be written; nothing is left of DST
      2  the request is wrong: no checkpoint at SRC, something at DST, a pattern that matches nothing, two names that
         become one, a dtype that can't be
    """
    chosen: dict[str, Any] = {
        "select": list(select) or None,
        "rename": {old: new or None for old, new in _pairs("--rename", rename)} or None,
        "dtype": _dtypes(dtype),
    }
    axes = Mesh.parse(mesh or "dp=1")
    rules = Layout.read(layout) if layout is not None else None
    if kind == "native" and shard_size is not None:
        raise LayoutError("--shard-size is for --to safetensors; here each rank of the mesh has its file")
    if kind == "safetensors" and (mesh is not None or layout is not None):
        raise LayoutError("--mesh and --layout are for --to native; safetensors files have whole tensors")
    # imported here, because they import torch
    from ckpt.transfer.export import SHARD, export
    from ckpt.transfer.reshard import reshard

    facts: dict[str, Any]
    left_out: Sequence[str] = ()
    with reporting("Converting", wanted=not as_json) as progress:
        if kind == "native":
            made = reshard(source, target, axes, rules, progress=progress, **chosen)
            facts = {"path": made.path, "mesh": {"names": list(axes.names), "shape": list(axes.shape)}}
            tensors, nbytes, seconds, overflowed = made.tensors, made.bytes, made.seconds, made.overflowed
        else:
            done = export(source, target, shard=shard_size or SHARD, progress=progress, **chosen)
            facts = {"path": done.path, "files": list(done.files)}
            tensors, nbytes, seconds, overflowed = done.tensors, done.bytes, done.seconds, done.overflowed
            left_out = done.left_out
    if as_json:
        facts |= {"to": kind, "tensors": tensors, "bytes": nbytes, "left_out": list(left_out)}
        print_json({**facts, "overflowed": list(overflowed), "seconds": round(seconds, 6)})
        return
    out = Output()
    out.line(
        ("Wrote ", "bold green"),
        f"{facts['path']}: {count_text(tensors, 'tensor')}, {size_text(nbytes)}, in {seconds:.1f} s.",
    )
    if left_out:
        out.line(f"Left out, since safetensors files have no place for them: {_some(left_out)}.")
    if overflowed:
        out.line(
            ("Too large for the dtype", "bold yellow"), f", so infinite or NaN now: elements of {_some(overflowed)}."
        )


def _pairs(option: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        old, equals, new = text.rpartition("=")
        if not equals or not old:
            raise LayoutError(f"{option} {text!r} has no OLD=NEW in it; give both, or OLD= to leave it out")
        pairs.append((old, new))
    return pairs


def _dtypes(texts: Sequence[str]) -> str | dict[str, str] | None:
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    return dict(_pairs("--dtype", texts)) or None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(plain, names[:5])) + more
