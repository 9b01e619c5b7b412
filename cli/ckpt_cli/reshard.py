"""`ckpt reshard`: a checkpoint written anew, cut for another mesh."""

from __future__ import annotations

import click

from ckpt_cli.output import Output, count_text, json_option, print_json, size_text
from ckpt_cli.progress import reporting
from ckpt_formats.layout import Layout, Mesh


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--mesh", required=True, metavar="AXES", help="The new mesh, outermost axis first: dp=2,tp=4.")
@click.option("--layout", metavar="FILE", help="TOML file: how tensors lie on the ranks.")
@json_option
def reshard(source: str, target: str, mesh: str, layout: str | None, as_json: bool) -> None:
    """Write a checkpoint anew, cut for another mesh.

    SRC is a checkpoint, DST the folder of the new one. In DST the bytes of each rank of the mesh lie together, in a
    file of its own. Nothing needs this: any checkpoint loads into any mesh. It makes loading again and again quicker.

    What an axis cuts is said by the table of its name in the layout file. Without one, dp and fsdp cut dimension 0,
    and an axis that SRC was saved with cuts what it did then. A layout may also be made of rules, for fused, padded,
    flat or stacked tensors, stages and experts (docs/layout.md); `ckpt show --mesh … --layout …` shows what it comes
    to. Such a file may say:

    \b
      [tp]
      "model.*.qkv.weight" = 0
      "model.*.out.weight" = 1
      "model.*.norm.*" = "replicate"

    \b
    Exit codes:
      0  done
      1  SRC is damaged, or DST could not be written; nothing is left of DST
      2  the request is wrong: no checkpoint at SRC, one at DST already, a mesh or layout that does not fit
    """
    axes = Mesh.parse(mesh)
    rules = Layout.read(layout) if layout is not None else None
    from ckpt.transfer.reshard import reshard as reshard_checkpoint  # here, because it imports torch

    with reporting("Resharding", wanted=not as_json) as progress:
        result = reshard_checkpoint(source, target, axes, rules, progress=progress)
    if as_json:
        print_json(
            {
                "path": result.path,
                "mesh": {"names": list(axes.names), "shape": list(axes.shape)},
                "tensors": result.tensors,
                "bytes": result.bytes,
                "bytes_per_rank": list(result.bytes_per_rank),
                "seconds": round(result.seconds, 6),
            }
        )
        return
    out = Output()
    low, high = min(result.bytes_per_rank), max(result.bytes_per_rank)
    each = size_text(low) if size_text(low) == size_text(high) else f"{size_text(low)} to {size_text(high)}"
    out.line(
        ("Wrote ", "bold green"),
        f"{result.path}: {count_text(result.tensors, 'tensor')}, {size_text(result.bytes)}, for "
        f"{count_text(axes.size, 'rank')} ({axes}), {each} each, in {result.seconds:.1f} s.",
    )
