"""Every operation of a save on the file system, counted, and one or two of them made to fail or to kill.

`Faulty` is the `Files` of a save; which operation comes to harm, and how, is a `Fault`.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckpt.storage import files
from ckpt.storage.files import ALIGNMENT, File, Files

# trials lie in memory to be quick, and are written as disks are
setattr(files, "_memory_file_systems", frozenset)  # noqa: B010


class Operation(NamedTuple):
    """One operation."""

    kind: str
    """mkdir, create, write, truncate, sync, sync_folder, link, rename, remove or rmdir."""
    path: str


class Spot(NamedTuple):
    """An operation by what it is: the same in each run, whatever the order in which threads come."""

    kind: str
    name: str
    """What it is done to, without what differs from run to run."""
    nth: int
    """How many like it came before."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" ({self.nth + 1})" if self.nth else "")


FROZEN = -1
"""Stands in the place of an errno for a process that is stopped, and never goes on: nobody answers, nobody hangs up."""


class Fault(NamedTuple):
    """What happens to operation `point`: the one of that number, counted from 0, or the one at that spot."""

    point: int | Spot
    when: str
    """`before` the operation, `after` it, or `half`way through it, which only writes and messages can be."""
    error: int | None
    """The errno of the OSError that it ends in; None for a kill -9, FROZEN for a process that stops there; 0 for no
    error at all: it was not done, or half, and nobody is told.
    """

    @property
    def survived(self) -> bool:
        """Whether the process lives on."""
        return self.error is not None and self.error >= 0

    def __str__(self) -> str:
        what = {None: "killed", FROZEN: "frozen", 0: "lost"}.get(self.error) or os.strerror(self.error or 0)
        return f"{what} {self.when} operation {self.point}"


_CHANCE = re.compile(r"[0-9a-f]{16}")
"""Attempt ids."""


@dataclass
class Watch:
    """Counts operations, and lets faults happen.

    Attributes:
        fault, second: what is to happen; the second one for pairs.
        seen: the operations so far.
        spots: the same by what they are, relative to the folder `root`.
        happened: whether a fault did happen.
        tell: called with each spot before anything happens there.
    """

    fault: Fault | None = None
    seen: list[Operation] = field(default_factory=list)
    happened: bool = False
    second: Fault | None = None
    root: str = ""
    spots: list[Spot] = field(default_factory=list)
    tell: Callable[[Spot], None] | None = None
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, kind: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do one operation, and return what it returns."""
        with self._lock:
            point = len(self.seen)
            self.seen.append(Operation(kind, path))
            name = _CHANCE.sub("*", os.path.relpath(path, self.root) if os.path.isabs(path) and self.root else path)
            spot = Spot(kind, name, self._counts[kind, name])
            self._counts[kind, name] += 1
            self.spots.append(spot)
        if self.tell is not None:
            self.tell(spot)
        for fault in (self.fault, self.second):
            if fault is not None and fault.point in (point, spot) and (fault.when != "half" or half is not None):
                return self._harm(fault, path, act, half)
        return act()

    def _harm(self, fault: Fault, path: str, act: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        self.happened = True
        done = None
        if fault.when == "half" and half is not None:
            done = half()
        elif fault.when == "after":
            done = act()
        if not fault.survived:
            os.kill(os.getpid(), signal.SIGSTOP if fault.error == FROZEN else signal.SIGKILL)
            while True:
                # another thread may have taken the signal, and this one not be stopped yet
                time.sleep(1)
        elif fault.error:
            raise OSError(fault.error, os.strerror(fault.error), path)
        return done


class _WatchedFile(File):
    def __init__(self, path: str, fd: int, direct: bool, watch: Watch) -> None:
        super().__init__(path, fd, direct)
        self._watch = watch

    def write(self, data: memoryview, at: int) -> None:
        half = len(data) // 2
        if self.direct:
            half -= half % ALIGNMENT
        write = super().write
        self._watch.step("write", self.path, lambda: write(data, at), lambda: write(data[:half], at))

    def truncate(self, size: int) -> None:
        self._watch.step("truncate", self.path, lambda: os.ftruncate(self._fd, size))

    def sync(self) -> None:
        self._watch.step("sync", self.path, _nothing)


def _nothing() -> None:
    """In the place of a sync: neither kill -9 nor an error loses what was written, and waiting for disks takes long."""


class Faulty(Files):
    """The file system, watched. It syncs nothing."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def make_folder(self, path: str) -> None:
        self.watch.step("mkdir", path, lambda: os.mkdir(path))

    def create(self, path: str, *, direct: bool) -> File:
        made: list[File] = []
        create = super().create
        try:
            self.watch.step("create", path, lambda: made.append(create(path, direct=direct)))
        except OSError:
            for file in made:
                file.close()
            raise
        (file,) = made
        return _WatchedFile(path, file._fd, file.direct, self.watch)

    def sync_folder(self, path: str) -> None:
        self.watch.step("sync_folder", path, _nothing)

    def link(self, source: str, target: str) -> None:
        self.watch.step("link", target, lambda: os.link(source, target))

    def rename(self, source: str, target: str) -> None:
        self.watch.step("rename", target, lambda: os.replace(source, target))

    def sync_file(self, path: str) -> None:
        self.watch.step("sync", path, _nothing)

    def remove(self, path: str) -> None:
        self.watch.step("remove", path, lambda: os.unlink(path))

    def remove_folder(self, path: str) -> None:
        self.watch.step("rmdir", path, lambda: os.rmdir(path))


def watch_messages(watch: Watch) -> None:
    """Count what this rank sends and receives, too: between two messages the others wait for it."""
    from torch import distributed

    for name in ("all_gather_into_tensor", "all_reduce", "gather", "scatter", "broadcast"):
        send = getattr(distributed, name)

        def watched(*args: Any, name: str = name, send: Callable[..., Any] = send, **options: Any) -> Any:
            return watch.step("message", name, lambda: send(*args, **options))

        setattr(distributed, name, watched)


def kills(operations: list[Operation]) -> Iterator[Fault]:
    """A kill at each point of a save; what comes after an operation comes before the next one."""
    for point, operation in enumerate(operations):
        yield Fault(point, "before", None)
        if operation.kind == "write":
            yield Fault(point, "half", None)
    yield Fault(len(operations) - 1, "after", None)


def errors(operations: list[Operation], code: int) -> Iterator[Fault]:
    """An error of each operation: nothing of it was done, or half of it, or it was done and the error came too late."""
    for point, operation in enumerate(operations):
        yield Fault(point, "before", code)
        yield Fault(point, "after", code)
        if operation.kind == "write":
            yield Fault(point, "half", code)
