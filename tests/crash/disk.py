"""What a disk may hold after the power was cut: operations recorded, what was not synced lost in every way there is.

The model is what POSIX promises and no more. A file's bytes and size are safe once the file is synced; a name is safe
once the folder that has it is synced. Everything else may be there or not, each block and each name by itself: bytes
without size, size without bytes, a name whose file is empty. (Real file systems are kinder, each in its own way.)
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ckpt.storage.files import File, Files

BLOCK = 4096
"""Bytes that a disk writes as one."""


class Recorded(NamedTuple):
    """One operation on the file system."""

    kind: str
    """mkdir, create, write, truncate, sync, sync_folder, link, rename, remove or rmdir."""
    path: str
    source: str = ""
    """What is linked to `path`, or gets its name."""
    at: int = 0
    """Where is written, or the size that a file gets."""
    data: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class Recorder(Files):
    """Does what a save wants, and records it, with paths relative to a root; what is above the root is not recorded."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.trace: list[Recorded] = []
        self._root = str(root)

    def note(self, kind: str, path: str, source: str = "", at: int = 0, data: bytes = b"") -> None:
        if path == self._root or path.startswith(self._root + os.sep):
            relative = os.path.relpath(path, self._root)
            self.trace.append(Recorded(kind, relative, source and os.path.relpath(source, self._root), at, data))

    def make_folder(self, path: str) -> None:
        super().make_folder(path)
        self.note("mkdir", path)

    def create(self, path: str, *, direct: bool) -> File:
        file = super().create(path, direct=direct)
        self.note("create", path)
        return _RecordedFile(path, file._fd, file.direct, self)

    def sync_folder(self, path: str) -> None:
        super().sync_folder(path)
        self.note("sync_folder", path)

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self.note("link", target, source)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.note("rename", target, source)

    def sync_file(self, path: str) -> None:
        super().sync_file(path)
        self.note("sync", path)

    def remove(self, path: str) -> None:
        super().remove(path)
        self.note("remove", path)

    def remove_folder(self, path: str) -> None:
        super().remove_folder(path)
        self.note("rmdir", path)


class _RecordedFile(File):
    def __init__(self, path: str, fd: int, direct: bool, recorder: Recorder) -> None:
        super().__init__(path, fd, direct)
        self._recorder = recorder

    def write(self, data: memoryview, at: int) -> None:
        super().write(data, at)
        self._recorder.note("write", self.path, at=at, data=bytes(data))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self._recorder.note("truncate", self.path, at=size)

    def sync(self) -> None:
        super().sync()
        self._recorder.note("sync", self.path)


# --- the disk


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    """Content that is safe."""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Since the last sync: writes (at, data), and new sizes (size, None)."""


@dataclass(eq=False)
class _Folder:
    durable: dict[str, _Node] = field(default_factory=dict)
    """Names that are safe."""
    pending: list[dict[str, _Node | None]] = field(default_factory=list)
    """Since the last sync: names given and, with None, taken. A rename does both at once."""
    now: dict[str, _Node] = field(default_factory=dict)
    """Names as a running system sees them."""


_Node = _File | _Folder

Keep = Callable[[], bool]
"""Asked for each thing that was not synced: whether it got to the disk all the same."""


@dataclass(frozen=True)
class Loss:
    """One way of losing what was not synced.

    Attributes:
        name: what to call it.
        names, blocks, sizes: asked for each name, each block of data, each change of a size.
    """

    name: str
    names: Keep
    blocks: Keep
    sizes: Keep


class Disk:
    """A file system in memory that remembers what is safe."""

    def __init__(self) -> None:
        self.root = _Folder()

    def do(self, operation: Recorded) -> None:
        """Do one operation."""
        kind, path = operation.kind, operation.path
        if kind == "sync_folder":
            folder = self._find(path)
            assert isinstance(folder, _Folder), operation
            _settle(folder)
            return
        if kind in ("write", "truncate", "sync"):
            file = self._find(path)
            assert isinstance(file, _File), operation
            if kind == "sync":
                file.durable = _content(file, _always, _always)
                file.pending.clear()
            else:
                file.pending.append((operation.at, operation.data if kind == "write" else None))
            return
        parent = self._find(os.path.dirname(path))
        assert isinstance(parent, _Folder), operation
        name = os.path.basename(path)
        if kind in ("remove", "rmdir"):
            del parent.now[name]
            parent.pending.append({name: None})
            return
        if kind == "rename":
            assert os.path.dirname(operation.source) == os.path.dirname(path), operation
            old = os.path.basename(operation.source)
            parent.now[name] = parent.now.pop(old)
            parent.pending.append({name: parent.now[name], old: None})
            return
        assert name not in parent.now, operation
        node = {"mkdir": _Folder, "create": _File}[kind]() if kind != "link" else self._find(operation.source)
        parent.now[name] = node
        parent.pending.append({name: node})

    def sync_all(self) -> None:
        """Make everything safe, as a long time does."""
        nodes: list[_Node] = [self.root]
        while nodes:
            node = nodes.pop()
            if isinstance(node, _Folder):
                _settle(node)
                nodes.extend(node.now.values())
            else:
                node.durable = _content(node, _always, _always)
                node.pending.clear()

    def unsynced(self) -> tuple[int, int]:
        """How many names, and how many writes and sizes, are not safe."""
        names = contents = 0
        seen: set[int] = set()
        nodes: list[_Node] = [self.root]
        while nodes:
            node = nodes.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, _Folder):
                names += len(node.pending)
                nodes += [*node.now.values(), *node.durable.values()]
            else:
                contents += len(node.pending)
        return names, contents

    def after(self, loss: Loss) -> dict[str, bytes | None]:
        """What is found after a power cut: path -> content, None for a folder."""
        found: dict[str, bytes | None] = {}
        kept: dict[int, bytes] = {}

        def walk(folder: _Folder, prefix: str) -> None:
            names = dict(folder.durable)
            for change in folder.pending:
                if not loss.names():
                    continue
                for name, node in change.items():
                    if node is None:
                        names.pop(name, None)
                    else:
                        names[name] = node
            for name, node in sorted(names.items()):
                path = prefix + name
                if isinstance(node, _Folder):
                    found[path] = None
                    walk(node, path + "/")
                else:
                    # a file of two names is one file
                    if id(node) not in kept:
                        kept[id(node)] = _content(node, loss.blocks, loss.sizes)
                    found[path] = kept[id(node)]

        walk(self.root, "")
        return found

    def _find(self, path: str) -> _Node:
        node: _Node = self.root
        for part in path.split("/"):
            if part not in ("", "."):
                assert isinstance(node, _Folder)
                node = node.now[part]
        return node


def _settle(folder: _Folder) -> None:
    folder.durable = dict(folder.now)
    folder.pending.clear()


def _content(file: _File, blocks: Keep, sizes: Keep) -> bytes:
    """A file's bytes after a power cut."""
    content = bytearray(file.durable)
    size = len(content)
    for at, data in file.pending:
        if data is None:
            if sizes():
                size = at
            continue
        if len(content) < at + len(data):
            content.extend(bytes(at + len(data) - len(content)))
        for start in range(0, len(data), BLOCK):
            if blocks():
                content[at + start : at + start + BLOCK] = data[start : start + BLOCK]
        if at + len(data) > size and sizes():
            size = at + len(data)
    return bytes(content[:size].ljust(size, b"\0"))


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _only(chosen: int) -> Keep:
    """Keep one thing alone, the one that is asked for at this turn."""
    turns = iter(range(1 << 30))
    return lambda: next(turns) == chosen


def _all_but(chosen: int) -> Keep:
    turns = iter(range(1 << 30))
    return lambda: next(turns) != chosen


def losses(disk: Disk, seeds: Sequence[int] = range(24)) -> Iterator[Loss]:
    """Ways of losing what is not safe: the extremes, each name alone kept or lost, and some at random."""
    names, contents = disk.unsynced()
    yield Loss("nothing lost", _always, _always, _always)
    if not names and not contents:
        return
    yield Loss("all lost", _never, _never, _never)
    yield Loss("only names kept", _always, _never, _never)
    yield Loss("names and sizes kept", _always, _never, _always)
    yield Loss("names and blocks kept", _always, _always, _never)
    yield Loss("names lost", _never, _always, _always)
    for chosen in range(names if names > 1 else 0):
        yield Loss(f"all names but number {chosen} kept", _all_but(chosen), _always, _always)
        yield Loss(f"only name number {chosen} kept", _only(chosen), _always, _always)
    for seed in seeds:
        generator = random.Random(seed)
        share = generator.choice([0.5, 0.8, 0.95])
        coin = lambda generator=generator, share=share: generator.random() < share  # noqa: E731 - one per seed
        yield Loss(f"at random, seed {seed}", coin, coin, coin)


def restore(found: dict[str, bytes | None], folder: Path) -> None:
    """Write what was found after a power cut into a folder."""
    folder.mkdir()
    for path, content in found.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
