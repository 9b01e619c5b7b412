"""`ckpt show`: what is in a checkpoint, how it is cut, and what made it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from difflib import get_close_matches
from fnmatch import translate
from pprint import pformat
from typing import Any

import click
import numpy as np

from ckpt_cli.output import Column, Output, count_text, json_option, print_json, size_text
from ckpt_cli.show_cut import show_cut
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.codecs import RAW
from ckpt_formats.describing import cut_of, value_text, writers_text
from ckpt_formats.geometry import Box
from ckpt_formats.layout import Layout, Mesh
from ckpt_formats.layout.applying import resolve
from ckpt_formats.manifest import TensorMeta
from ckpt_formats.values import Opaque

LISTED = 12
"""Values that are listed without --values."""


@click.command()
@click.argument("checkpoint")
@click.argument("pattern", required=False)
@click.option("--values", is_flag=True, help="Print plain values in full, each rank's own included.")
@click.option("--mesh", metavar="AXES", help="Show what each rank of this mesh would hold, such as dp=2,tp=4.")
@click.option("--layout", metavar="FILE", help="With --mesh: TOML file that says how tensors lie on the ranks.")
@json_option
def show(
    checkpoint: str, pattern: str | None, values: bool, mesh: str | None, layout: str | None, as_json: bool
) -> None:
    """Show what is in a checkpoint, how it is cut, and what made it.

    PATTERN limits tensors and values to names that match it, as in a shell: 'model.*.weight' (* matches dots too). The
    exact name of a tensor shows its chunks too: which file has them, and where.

    With --mesh it shows for each tensor what a layout comes to instead: the rule, and for each place on the mesh the
    boxes that ranks hold there, and where these lie in the ranks' tensors.

    \b
    Exit codes:
      0  shown
      1  nothing matches PATTERN, or the checkpoint is damaged
      2  there is no checkpoint, or the mesh or layout does not fit it
    """
    if layout is not None and mesh is None:
        raise click.UsageError("--layout says how tensors lie on a mesh; say which by --mesh")
    axes = Mesh.parse(mesh) if mesh is not None else None
    rules = Layout.read(layout) if layout is not None else Layout()
    with open_checkpoint(checkpoint, held=False) as opened:
        chosen = _Chosen(opened, pattern)
        if not chosen:
            near = get_close_matches(pattern or "", [*list(opened.tensors)[:5000], *opened.manifest.values], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            click.echo(f"No tensor or value of {checkpoint} matches {pattern!r}{hint}", err=True)
            raise click.exceptions.Exit(1)
        if axes is not None:
            names = sorted(chosen.tensors)
            names += sorted({name for alias, name in chosen.aliases.items() if name not in chosen.tensors})
            show_cut(opened.manifest, resolve(opened.manifest, axes, rules), names, as_json=as_json)
        elif as_json:
            print_json(_facts(opened, chosen, values=values))
        else:
            _print(opened, chosen, values=values)


class _Chosen:
    """The part of a checkpoint that was asked for.

    Attributes:
        tensors: stored tensors by name.
        aliases: tied names -> stored names.
        values: paths of plain values -> encoded values.
        exact: the tensor that was asked for by its exact name, if it was.
    """

    def __init__(self, checkpoint: Checkpoint, pattern: str | None) -> None:
        manifest = checkpoint.manifest
        self.pattern = pattern
        self.exact = manifest.meta(pattern) if pattern is not None and pattern in checkpoint.tensors else None
        matches: Callable[[str], object]
        if self.exact is not None:
            matches = {pattern, self.exact.name}.__contains__
        else:
            matches = re.compile(translate(pattern)).match if pattern is not None else lambda _: True
        self.tensors = {name: meta for name, meta in manifest.model_tensors.items() if matches(name)}
        self.aliases = {alias: name for alias, name in manifest.aliases.items() if matches(alias)}
        self.values = {path: value for path, value in manifest.values.items() if matches(path) or path == pattern}

    def __bool__(self) -> bool:
        return self.pattern is None or bool(self.tensors or self.aliases or self.values)


# --- text


def _print(checkpoint: Checkpoint, chosen: _Chosen, *, values: bool) -> None:
    out = Output()
    if chosen.pattern is None:
        _print_summary(out, checkpoint)
    if chosen.values:
        _print_values(out, checkpoint, chosen, full=values)
    if values and chosen.pattern is None:
        _print_per_rank(out, checkpoint)
    if chosen.tensors or chosen.aliases:
        _print_tensors(out, checkpoint, chosen)
    if chosen.exact is not None:
        _print_chunks(out, checkpoint, chosen.exact)


def _print_summary(out: Output, checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    metas = manifest.model_tensors.values()
    step = "" if manifest.step is None else f", step {manifest.step:,}"
    out.line((manifest.path, "bold"), step)
    facts = [
        ("tensors", f"{len(metas):,}, {size_text(sum(meta.nbytes for meta in metas))}"),
        ("files", f"{len(checkpoint.locations.sources):,}"),
        *(("codec", text) for text in _codec_texts(checkpoint)),
        ("saved by", writers_text(manifest.layout)),
    ]
    per_rank = manifest.per_rank_world_size
    if manifest.aliases:
        facts.append(("tied", count_text(len(manifest.aliases), "name")))
    if per_rank:
        facts.append(("per rank", f"values of {count_text(per_rank, 'rank')}"))
    provenance = dict(manifest.provenance)
    created = provenance.pop("created", None)
    if created is not None:
        facts.append(("created", _local_time(created)))
    made_by = [f"{key} {value}" if key != "writer" else str(value) for key, value in provenance.items()]
    if made_by:
        facts.append(("made by", ", ".join(made_by)))
    for title, text in facts:
        out.line((f"  {title:<10}", "dim"), text)
    totals = _totals(checkpoint)
    if totals:
        out.line()
        rows = [[name, *_total_cells(total)] for name, total in totals.items()]
        columns = [Column("entry", fold=True), Column("kind"), Column("tensors", True), Column("size", True)]
        out.table([*columns, Column("values", True)], rows, indent=2)


def _codec_texts(checkpoint: Checkpoint) -> list[str]:
    texts = []
    for name, (chunks, nbytes, stored) in _codecs(checkpoint).items():
        size = f"{size_text(nbytes)} in {count_text(chunks, 'chunk')}"
        texts.append(f"{name}: {size}, stored in {size_text(stored)}{_ratio_text(nbytes, stored)}")
    return texts


def _ratio_text(nbytes: int, stored: int) -> str:
    return f" ({nbytes / stored:.2f}x)" if stored else ""


def _total_cells(total: Mapping[str, Any]) -> list[str]:
    counted = total["tensors"] > 0
    return [
        str(total["kind"]),
        f"{total['tensors']:,}" if counted else "",
        size_text(total["bytes"]) if counted else "",
        f"{total['values']:,}" if total["values"] else "",
    ]


def _print_values(out: Output, checkpoint: Checkpoint, chosen: _Chosen, *, full: bool) -> None:
    _space(out, chosen)
    items = list(chosen.values.items())
    shown = items if full or chosen.pattern is not None else items[:LISTED]
    decoded = [(path, checkpoint.decode(encoded, path, lenient=True)) for path, encoded in shown]
    if full:
        for path, value in decoded:
            _print_full(out, path, value)
    else:
        rows = [[path, value_text(value)] for path, value in decoded]
        out.table([Column("value", lead=True), Column("", fold=True)], rows, indent=2)
    if len(shown) < len(items):
        out.line((f"  … and {count_text(len(items) - len(shown), 'value')} more (--values prints all, in full)", "dim"))


def _print_per_rank(out: Output, checkpoint: Checkpoint) -> None:
    for rank in range(checkpoint.manifest.per_rank_world_size):
        for path, encoded in checkpoint.per_rank(rank).items():
            _print_full(out, f"{path} (rank {rank})", checkpoint.decode(encoded, path, lenient=True))


def _print_full(out: Output, path: str, value: object) -> None:
    text = value_text(value) if isinstance(value, Opaque) else pformat(value, width=100, compact=True, sort_dicts=False)
    lines = text.split("\n")
    out.line((f"  {path}", "bold"), f" = {lines[0]}" if len(lines) == 1 else " =")
    for line in lines if len(lines) > 1 else []:
        out.line(f"    {line}")


def _print_tensors(out: Output, checkpoint: Checkpoint, chosen: _Chosen) -> None:
    _space(out, chosen)
    manifest = checkpoint.manifest
    rows = []
    for name in sorted([*chosen.tensors, *chosen.aliases]):
        meta = manifest.meta(name)
        tied = chosen.aliases.get(name)
        rows.append(
            [
                name,
                meta.dtype.name,
                _shape_text(meta),
                "" if tied is not None else size_text(meta.nbytes),
                f"= {tied}" if tied is not None else cut_of(manifest, meta) or "",
                "" if tied is not None else f"{meta.rows:,}",
            ]
        )
    columns = [Column("tensor", lead=True), Column("dtype"), Column("shape"), Column("size", right=True)]
    out.table([*columns, Column("cut"), Column("chunks", right=True)], rows, indent=2)


def _print_chunks(out: Output, checkpoint: Checkpoint, meta: TensorMeta) -> None:
    out.line()
    chunks = _chunks(checkpoint, meta)
    if not chunks:
        out.line("  It has no elements, so it has no chunks.")
        return
    columns = [Column("chunk", lead=True), Column("file", fold=True), Column("bytes")]
    rows = [[chunk["box"], chunk["file"], f"{chunk['start']}-{chunk['stop']}"] for chunk in chunks]
    if any(chunk["codec"] != RAW for chunk in chunks):
        columns.append(Column("codec"))
        for row, chunk in zip(rows, chunks, strict=True):
            ratio = _ratio_text(chunk["bytes"], chunk["stop"] - chunk["start"])
            row.append(chunk["codec"] if chunk["codec"] == RAW else f"{chunk['codec']}{ratio}")
    out.table(columns, rows, indent=2)


def _space(out: Output, chosen: _Chosen) -> None:
    if chosen.pattern is None:
        out.line()


def _shape_text(meta: TensorMeta) -> str:
    return "[" + ", ".join(map(str, meta.shape)) + "]"


def _local_time(created: object) -> str:
    try:
        when = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created)
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


# --- facts


def _facts(checkpoint: Checkpoint, chosen: _Chosen, *, values: bool) -> dict[str, object]:
    manifest = checkpoint.manifest
    tree: dict[str, object] = {
        "path": manifest.path,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "files": len(checkpoint.locations.sources),
        "codecs": {
            name: {"chunks": chunks, "bytes": nbytes, "stored": stored}
            for name, (chunks, nbytes, stored) in _codecs(checkpoint).items()
        },
        "layout": {"world_size": manifest.world_size, "meshes": manifest.layout.get("meshes", [])},
        "provenance": dict(manifest.provenance),
        "entries": _totals(checkpoint),
        "tensors": {
            name: {
                "dtype": meta.dtype.name,
                "shape": list(meta.shape),
                "bytes": meta.nbytes,
                "cut": cut_of(manifest, meta),
                "chunks": meta.rows,
            }
            for name, meta in chosen.tensors.items()
        },
        "aliases": chosen.aliases,
        "values": chosen.values,
    }
    if values:
        tree["per_rank"] = {str(rank): checkpoint.per_rank(rank) for rank in range(manifest.per_rank_world_size)}
    if chosen.exact is not None:
        tree["chunks"] = _chunks(checkpoint, chosen.exact)
    return tree


def _chunks(checkpoint: Checkpoint, meta: TensorMeta) -> list[dict[str, Any]]:
    """The chunks of a tensor and where they lie."""
    if not meta.rows:
        return []
    manifest, locations = checkpoint.manifest, checkpoint.locations
    offsets, sizes = manifest.chunks(meta)
    digests = manifest.page(meta.page).digest
    places = locations.places(meta.page)[0]
    chunks = []
    for number, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        row = meta.row + number
        box = Box(tuple(offset), tuple(size))
        start = int(places.start[row])
        source = locations.sources[int(places.source[row])].name
        chunks.append(
            {
                "box": str(box),
                "file": os.path.relpath(source, manifest.path),
                "start": start,
                "stop": start + int(places.length[row]),
                "bytes": box.numel * meta.dtype.itemsize,
                "codec": locations.codecs[int(places.codec[row])],
                "digest": None if digests is None else digests[row].tobytes().hex(),
            }
        )
    return chunks


def _codecs(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """For each codec in use: chunks, their bytes, and the bytes that are stored of them. Nothing if all are raw.

    Reads the whole index, and that only if there is another codec than raw.
    """
    manifest, locations = checkpoint.manifest, checkpoint.locations
    if all(codec == RAW for codec in locations.codecs):
        return {}
    totals = np.zeros((len(locations.codecs), 3), np.int64)
    itemsizes: dict[int, dict[int, int]] = {}
    for meta in manifest.tensors.values():
        if meta.rows:
            itemsizes.setdefault(meta.page, {})[meta.row] = meta.dtype.itemsize
    for number, of_row in itemsizes.items():
        page, places = manifest.page(number), locations.places(number)[0]
        firsts = sorted(of_row)
        counts = np.diff([*firsts, len(places.length)])
        nbytes = np.prod(page.size, axis=1) * np.repeat([of_row[first] for first in firsts], counts)
        for column, values in enumerate((np.ones_like(nbytes), nbytes, places.length)):
            np.add.at(totals[:, column], places.codec, values)
    return {
        name: (chunks, nbytes, stored)
        for name, (chunks, nbytes, stored) in zip(locations.codecs, totals.tolist(), strict=True)
        if chunks
    }


def _totals(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """For each top-level name of the saved state: what it was, and how much of the checkpoint is its."""
    manifest = checkpoint.manifest
    totals: dict[str, dict[str, Any]] = {
        name: {"kind": entry.get("kind"), "tensors": 0, "bytes": 0, "values": 0}
        for name, entry in manifest.entries.items()
    }

    def of(name: str) -> dict[str, Any] | None:
        # names of entries may have dots in them: the longest that fits
        while name not in totals:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return totals[name]

    for name, meta in manifest.model_tensors.items():
        total = of(name)
        if total is not None:
            total["tensors"] += 1
            total["bytes"] += meta.nbytes
    for path in manifest.values:
        total = of(path)
        if total is not None:
            total["values"] += 1
    return totals
