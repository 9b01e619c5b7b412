"""Manifests for nodes that have their part of a checkpoint on a disk of their own, but not what says that it is one.

On node-local disks a checkpoint is committed when the leading node has published it; the others keep copies of index
and manifest. A node that was lost in that moment, or whose disk failed, has none. Before a job goes on, the nodes give
each other what is missing.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
from collections.abc import Sequence
from typing import Any

from ckpt.collective import Collective
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, publish_encoded
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NodeFolders, folders_of
from ckpt_formats.native.reader import load_page, read_root
from ckpt_formats.native.root import decode

__all__ = ["share_roots"]

log = logging.getLogger("ckpt")


def share_roots(place: str, group: Collective) -> None:
    """Give nodes that lack it the manifest of what others see committed. Collective.

    What can't be written is logged, and that checkpoint is not to be had there.

    Args:
        place: the folder of the checkpoints, with `{node}` in it.
    """
    failure: BaseException | None = None
    mine = b"[[], []]"
    try:
        mine = json.dumps(_seen(place)).encode()
    except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
        failure = error
    plan = json.loads(group.exchange(mine, failure, _plan))
    if not plan["heal"]:
        return
    given: dict[str, dict[str, str]] = {}
    try:
        given = {name: _read(place, name) for name, rank in plan["give"].items() if rank == group.rank}
    except Exception as error:  # noqa: BLE001 - as above
        failure = error
    roots = json.loads(group.exchange(json.dumps(given).encode(), failure, _merged))
    for path, rank in plan["heal"].items():
        if rank == group.rank:
            _write(place, path, roots[os.path.basename(path)])
    group.agree(None)


def _seen(place: str) -> tuple[list[str], list[str]]:
    """Names of what is committed in the folders that are reached here, and the paths of what has files alone."""
    committed: set[str] = set()
    begun: list[str] = []
    for folder in folders_of(place):
        with os.scandir(folder) as entries:
            below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        for entry in below:
            if os.path.isfile(os.path.join(entry.path, names.MANIFEST)):
                committed.add(entry.name)
            elif os.path.isdir(os.path.join(entry.path, names.DATA)):
                begun.append(entry.path)
    return sorted(committed), begun


def _plan(payloads: Sequence[bytes]) -> bytes:
    """Who gives what he has, and who writes it where: one rank each."""
    give: dict[str, int] = {}
    lacking: dict[str, int] = {}
    for rank, payload in enumerate(payloads):
        committed, begun = json.loads(payload)
        for name in committed:
            give.setdefault(name, rank)
        for path in begun:
            lacking.setdefault(path, rank)
    heal = {path: rank for path, rank in lacking.items() if os.path.basename(path) in give}
    wanted = {os.path.basename(path) for path in heal}
    return json.dumps({"give": {name: give[name] for name in wanted}, "heal": heal}).encode()


def _read(place: str, name: str) -> dict[str, str]:
    """Index and manifest of a checkpoint that is committed in some folder that is reached here; empty if it is gone."""
    path = os.path.join(place, name)
    for folder in folders_of(path):
        try:
            root = read_root(folder)
            files = {}
            for file in [*(page.path for page in root.pages), names.MANIFEST]:
                with open(os.path.join(folder, file), "rb") as stream:
                    files[file] = base64.b64encode(stream.read()).decode("ascii")
        except (CheckpointError, OSError) as error:
            if not isinstance(error, CheckpointNotFoundError):
                log.warning("%s: its manifest can't be given to other nodes (%s)", folder, error)
            continue
        return files
    return {}


def _merged(payloads: Sequence[bytes]) -> bytes:
    given: dict[str, Any] = {}
    for payload in payloads:
        given |= json.loads(payload)
    return json.dumps(given).encode()


def _write(place: str, path: str, given: dict[str, str]) -> None:
    """Publish a checkpoint in a folder that has its node's part of it."""
    files = {name: base64.b64decode(data) for name, data in given.items()}
    if names.MANIFEST not in files:
        return
    try:
        manifest = files.pop(names.MANIFEST)
        root = decode(manifest, os.path.join(path, names.MANIFEST))
        where = NodeFolders(os.path.join(place, os.path.basename(path)), path, root.layout)
        ours = {file.path: file.size for file in root.files if where.node(file.path) == where.own}
        if where.own is None or any(_size(os.path.join(path, name)) != size for name, size in ours.items()):
            return  # what lies there is of a save that failed
        disk = Files()
        os.makedirs(os.path.join(path, names.INDEX), exist_ok=True)
        for number, (name, data) in enumerate(files.items()):
            try:
                load_page(path, root, number)
            except CheckpointError:
                _replace(disk, os.path.join(path, name), data)
        publish_encoded(disk, Folder(path, ()), secrets.token_hex(8), manifest)
    except (CheckpointError, OSError) as error:
        log.warning("%s: committed, but this node can't keep a copy of its manifest: %s", path, error)
    else:
        log.warning("%s: this node had no copy of its manifest, and got one from another", path)


def _replace(disk: Files, path: str, data: bytes) -> None:
    if os.path.lexists(path):
        disk.remove(path)
    with disk.create(path, direct=False) as file:
        file.write(memoryview(data), 0)
        file.sync()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
