"""Checkpoints on node-local disks: a folder per node, each with the index, the root, and the data of its own ranks.

Their place is named with `{node}` in the path, which stands for the name of a node: `/local/{node}/run/step_100`. The
root says which ranks' files lie on which node, so that whoever reaches several nodes' folders reads one whole
checkpoint from them, and knows what is missing when a node is gone. docs/format.md, "Node-local disks". Knows no bytes.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.native import names
from ckpt_formats.urls import is_url

NODE = "{node}"
"""Stands in a path for the name of a node."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]*")
_WRITER = re.compile(rf"{names.DATA}/(\d+)[.-].*")


def folders_of(path: str) -> list[str]:
    """The folders of all nodes that can be reached here, of a path with `{node}` in it; the path itself without."""
    if NODE not in path or is_url(path):
        return [path]
    before, _, after = path.partition(NODE)
    pattern = glob.escape(before) + "*" + glob.escape(after)
    # the same name everywhere: what * stands for must be one node's
    found = [folder for folder in glob.glob(pattern) if _NAME.fullmatch(folder[len(before) : len(folder) - len(after)])]
    return sorted(folder for folder in found if os.path.isdir(folder))


def root_folder(path: str) -> str:
    """The folder to read the root from: of a path with `{node}` in it, the first that has one.

    Raises:
        CheckpointNotFoundError: no node's folder can be reached, or none has a root.
    """
    if NODE not in path or is_url(path):
        return path
    folders = folders_of(path)
    for folder in folders:
        if os.path.isfile(os.path.join(folder, names.MANIFEST)):
            return folder
    if not folders:
        raise CheckpointNotFoundError(f"{path}: no node's folder can be reached from here; check the path", path=path)
    raise CheckpointNotFoundError(
        f"{path}: none of the nodes' folders has a {names.MANIFEST} ({', '.join(folders)}): the save was never "
        "committed; use an earlier checkpoint",
        path=path,
    )


class NodeFolders:
    """Where the files of a checkpoint lie, on one disk or on several nodes'.

    Args:
        path: how the checkpoint was named, with `{node}` or without.
        folder: where its root was read.
        layout: the root's.

    Attributes:
        own: the node whose folder this is; None if it is not known to be one's.
    """

    def __init__(self, path: str, folder: str, layout: Mapping[str, Any]) -> None:
        self._folder = folder
        self._nodes = _nodes(layout)
        self._pattern = path if NODE in path else str(layout.get("folder", ""))
        here = os.path.abspath(folder)
        self.own = next((node for node in set(self._nodes.values()) if self._in(node) == here), None)
        if self.own is None:
            # the root's word is not enough: nothing is looked for but in folders that differ by a node's name
            self._pattern = ""

    def node(self, file: str) -> str | None:
        """The node whose ranks wrote a file; None where that is not said, and so of whatever lies on every node."""
        writer = _WRITER.fullmatch(file)
        return self._nodes.get(int(writer.group(1))) if writer else None

    def find(self, file: str) -> str:
        """The path of a file: in the folder of the root, or else in that of its node, whether it is there or not."""
        here = os.path.join(self._folder, file)
        node = self.node(file)
        if node is None or not self._pattern or os.path.lexists(here):
            return here
        return os.path.join(self._in(node), file)

    def missing(self, files: Iterable[str]) -> dict[str, list[str]]:
        """Node -> those of the files that it should have and that can't be reached."""
        lost: dict[str, list[str]] = {}
        for file in files:
            node = self.node(file)
            if node is not None and not os.path.lexists(self.find(file)):
                lost.setdefault(node, []).append(file)
        return lost

    def _in(self, node: str) -> str:
        return self._pattern.replace(NODE, node)


def missing_text(lost: Mapping[str, list[str]]) -> str:
    """`node b's files are not here: data/00002-….safetensors, …`, for the nodes that are missing."""
    return "; ".join(
        f"node {node}'s files are missing: {', '.join(files[:3])}{f' and {len(files) - 3} more' * (len(files) > 3)}"
        for node, files in sorted(lost.items())
    )


def _nodes(layout: Mapping[str, Any]) -> dict[int, str]:
    """Rank -> name of its node, as far as the layout says it in a way that can be trusted."""
    nodes: dict[int, str] = {}
    said = layout.get("nodes")
    for node, ranks in said.items() if isinstance(said, dict) else ():
        if isinstance(ranks, list) and _NAME.fullmatch(node):
            nodes.update((rank, node) for rank in ranks if isinstance(rank, int))
    return nodes
