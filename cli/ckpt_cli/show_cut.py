"""What `ckpt show --mesh` prints: for each tensor its rule, and what of it lies where on the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt_cli.output import Column, Output, count_text, print_json
from ckpt_formats.layout import Holder, Resolved
from ckpt_formats.manifest import Manifest

__all__ = ["show_cut"]


def show_cut(manifest: Manifest, resolved: Resolved, names: Sequence[str], *, as_json: bool) -> None:
    """Print what a layout comes to for some tensors, as text or as one JSON document."""
    if as_json:
        print_json(_facts(manifest, resolved, names))
        return
    out = Output()
    mesh = resolved.mesh
    out.line((manifest.path, "bold"), f" for {count_text(mesh.size, 'rank')} ({mesh})")
    for name in names:
        out.line()
        out.line((name, "bold"), f"  {list(resolved.tensors[name])}")
        out.line(f"  {resolved.rule(name)}")
        rows = [
            [mesh.text(holder.where), str(holder.piece.box), _place(holder), "copy" if holder.piece.copy else ""]
            for holder in resolved.holders(name)
        ]
        if not rows:
            out.line("  It has no elements, so no rank holds any.")
            continue
        out.table([Column("ranks", lead=True), Column("box"), Column("lies in", fold=True), Column("")], rows, indent=2)


def _place(holder: Holder) -> str:
    piece = holder.piece
    strides = f", strides {list(piece.strides)}" if piece.strides else ""
    return f"{holder.local} {list(holder.shape)} from {piece.start}{strides}"


def _facts(manifest: Manifest, resolved: Resolved, names: Sequence[str]) -> dict[str, Any]:
    mesh = resolved.mesh
    return {
        "path": manifest.path,
        "mesh": {"names": list(mesh.names), "shape": list(mesh.shape)},
        "tensors": {
            name: {
                "shape": list(resolved.tensors[name]),
                "rule": resolved.rule(name),
                "cut": resolved.cut(name),
                "pieces": [
                    {
                        "where": {
                            axis: index
                            for axis, index in zip(mesh.names, holder.where, strict=True)
                            if index is not None
                        },
                        "box": str(holder.piece.box),
                        "local": holder.local,
                        "local_shape": list(holder.shape),
                        "start": holder.piece.start,
                        "strides": list(holder.piece.strides),
                        "copy": holder.piece.copy,
                    }
                    for holder in resolved.holders(name)
                ],
            }
            for name in names
        },
        "aliases": dict(resolved.aliases),
    }
