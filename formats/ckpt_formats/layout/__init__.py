"""The layout language: how frameworks cut tensors over named axes of a mesh, and the boxes that this comes to.

docs/layout.md tells the language. A `Layout` is written in Python or TOML; `Layout.resolve` applies it to tensors'
shapes on a `Mesh`; the `Resolved` says what each rank holds, and where each tensor is. Knows names and shapes, and no
files of a checkpoint, processes or torch.
"""

from ckpt_formats.layout.layout import Layout
from ckpt_formats.layout.mesh import Mesh, Where
from ckpt_formats.layout.replicas import assemble
from ckpt_formats.layout.resolved import Holder, LocalTensor, Piece, Resolved
from ckpt_formats.layout.rules import Boxes, Cut, Flat, Held, Pad, Part, Rule, Split, Spread
from ckpt_formats.layout.short import Cuts, boxes, cut_words

__all__ = [
    "Boxes",
    "Cut",
    "Cuts",
    "Flat",
    "Held",
    "Holder",
    "Layout",
    "LocalTensor",
    "Mesh",
    "Pad",
    "Part",
    "Piece",
    "Resolved",
    "Rule",
    "Split",
    "Spread",
    "Where",
    "assemble",
    "boxes",
    "cut_words",
]
