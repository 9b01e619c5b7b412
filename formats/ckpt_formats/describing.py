"""Words for people about parts of a checkpoint: plain values, meshes, cuts. Nothing depends on them.

What it is given may come from a hostile file, so nothing here trusts types or fails. Knows no terminals.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckpt_formats.manifest import Manifest, TensorMeta
from ckpt_formats.values import Opaque

__all__ = ["cut_of", "mesh_text", "value_text", "writers_text"]


class _Repr(reprlib.Repr):
    """A short repr that says of large things what they are, not what is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxset = self.maxfrozenset = self.maxdeque = 8

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Opaque):
            # the engine's reference to what each rank has of its own
            return "<each rank's own>" if x.tag == "per_rank" else f"<{x.tag} {super().repr1(x.payload, level)}>"
        if isinstance(x, (bytes, bytearray)) and len(x) > 32:
            return f"<{type(x).__name__} of length {len(x)}>"
        if isinstance(x, np.ndarray) and x.size > 8:
            return f"<array of {x.dtype} {list(x.shape)}>"
        try:
            return super().repr1(x, level)
        except Exception:  # noqa: BLE001 - whatever a user's own type does in its repr
            return f"<{type(x).__name__}>"


_repr = _Repr()


def value_text(value: object, limit: int = 120) -> str:
    """A plain value, decoded, in one line of at most `limit` characters."""
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def mesh_text(mesh: object) -> str | None:
    """A mesh of a manifest's layout as `dp=2,tp=4`; None when it is not one."""
    if not isinstance(mesh, Mapping):
        return None
    names, shape = mesh.get("names"), mesh.get("shape")
    if not isinstance(names, list) or not isinstance(shape, list) or len(names) != len(shape):
        return None
    return ",".join(f"{name}={size}" for name, size in zip(names, shape, strict=True)) or None


def writers_text(layout: Mapping[str, Any]) -> str:
    """Who wrote a checkpoint, by its manifest's layout: `8 ranks (dp=2,tp=4)`."""
    count = layout.get("world_size", 1)
    text = "1 rank" if count == 1 else f"{count} ranks"
    meshes = layout.get("meshes")
    known = [mesh_text(mesh) for mesh in meshes] if isinstance(meshes, list) else []
    listed = " and ".join(mesh for mesh in known if mesh)
    return f"{text} ({listed})" if listed else text


def cut_of(manifest: Manifest, meta: TensorMeta) -> str | None:
    """How a tensor was cut when it was saved, such as `S(0)@dp R@tp`; None when nothing is said."""
    cuts = manifest.layout.get("cuts")
    if meta.cut is None or not isinstance(cuts, list) or meta.cut >= len(cuts):
        return None
    cut = cuts[meta.cut]
    text = cut.get("cut") if isinstance(cut, Mapping) else None
    return text if isinstance(text, str) and text else None
