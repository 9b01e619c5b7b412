"""Capturing: copying what a rank has to write into a slot of shared memory, part of it while the training goes on.

The slot gets the data files as they will be on disk, header and padding included. What only an optimizer changes is
copied by a thread under the next forward and backward pass, in few large batches (DataStates-LLM, HPDC'24, calls this
lazy); everything else before the training goes on. Whoever changes those tensors meanwhile is found out by their
version counters, and the capture fails rather than mix two steps. Knows no agent: it is given memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from ckpt.saving.commit import split_files
from ckpt.saving.side_copies import SideCopies, on_gpu
from ckpt.saving.sources import BytesSource, TensorSource
from ckpt.storage.compressing import Readable
from ckpt.storage.data_file import Chunk, layout_of
from ckpt.storage.files import ALIGNMENT
from ckpt_formats.errors import SaveFailedError
from ckpt_formats.safetensors_file import FileLayout

BATCH = 64 << 20
"""Bytes that are copied by one call, between which the thread lets others run."""

_COPIED = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2"),
    )
)
"""Dtypes that torch copies many at a time; others go one by one."""

_Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Rooms in a slot, and what is copied there."""


class Laid(NamedTuple):
    """A file as it will lie in a slot."""

    chunks: Sequence[Chunk]
    layout: FileLayout
    at: int
    """Where the file begins in the slot: at a page."""


class Form:
    """Where everything that a rank writes will lie. It holds for every save of a state whose form stays the same.

    Attributes:
        files: one after the other; their chunks have no sources.
        nbytes: what they take in a slot.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.files: list[Laid] = []
        at = 0
        # what is kept must not keep tensors alive
        bare = [chunk._replace(source=BytesSource(b"")) for chunk in chunks]
        for some in split_files(bare):
            layout = layout_of(some)
            self.files.append(Laid(some, layout, at))
            at += -(-layout.size // ALIGNMENT) * ALIGNMENT
        self.nbytes = at
        self._arena: object = None
        self._rooms: dict[int, list[torch.Tensor | None]] = {}
        self._dtypes = [_copied_as(chunk) for chunk in chunks]

    def rooms(self, memory: memoryview, arena: object, start: int) -> list[torch.Tensor | None]:
        """For each chunk a tensor over its place in a slot, which is `start` in an arena; None for a chunk that is not
        copied as a tensor.

        They are kept, for making them costs as much as all the rest of a save.
        """
        if arena != self._arena:
            self._arena = arena
            self._rooms = {}
        if start not in self._rooms:
            self._rooms[start] = self._make_rooms(memory)
        return self._rooms[start]

    def _make_rooms(self, memory: memoryview) -> list[torch.Tensor | None]:
        rooms: list[torch.Tensor | None] = []
        for (chunk, at), dtype in zip(self.places(), self._dtypes, strict=True):
            if dtype is None:
                rooms.append(None)
                continue
            flat = torch.frombuffer(memory, dtype=dtype, count=chunk.box.numel, offset=at)
            rooms.append(flat.view(chunk.box.sizes))
        return rooms

    def places(self) -> Iterator[tuple[Chunk, int]]:
        """Every chunk, and where in the slot it begins."""
        for laid in self.files:
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True):
                yield chunk, laid.at + start


def _copied_as(chunk: Chunk) -> torch.dtype | None:
    """The dtype of a chunk that is copied together with others; None for one that its source has to read."""
    source = chunk.source
    if not isinstance(source, TensorSource) or source.tensor.dtype not in _COPIED or not chunk.nbytes:
        return None
    return source.tensor.dtype


class Capture:
    """One rank's part of one save on its way into a slot: `begin` where the training waits, then `finish` in a thread.

    What is copied lazily is copied within the context `during`.
    """

    def __init__(
        self,
        form: Form,
        sources: Sequence[Readable],
        memory: memoryview,
        rooms: Sequence[torch.Tensor | None],
        during: AbstractContextManager[object],
    ) -> None:
        """Args: `sources`: of each chunk of the form; `rooms`: of the form, in `memory`, the slot."""
        self._form = form
        self._sources = sources
        self._memory = memory
        self._rooms = rooms
        self._during = during
        self._later: _Pairs = []
        self._versions: list[int] = []
        self._side: SideCopies | None = None
        """Copies from GPUs."""
        self._changed: torch.Tensor | None = None
        self._judged = False
        self._lock = threading.Lock()
        self._started = threading.Event()
        """All is copied, or failed, but for what GPUs still copy."""

    def begin(self, lazily: Callable[[torch.Tensor], bool]) -> None:
        """Copy everything but the tensors that may be copied `lazily`."""
        now: _Pairs = []
        others = []
        for position, (source, room) in enumerate(zip(self._sources, self._rooms, strict=True)):
            if room is None or not isinstance(source, TensorSource):
                others.append(position)
            elif lazily(source.tensor):
                self._later.append((room, source.tensor))
            else:
                now.append((room, source.tensor))
        self._versions = [source._version for _, source in self._later]
        on_gpus = [source for _, source in (*now, *self._later) if on_gpu(source)]
        if on_gpus:
            self._side = SideCopies(on_gpus)
        if others:
            places = list(self._form.places())
            for position in others:
                chunk, at = places[position]
                self._sources[position].read(0, chunk.nbytes, self._memory[at : at + chunk.nbytes])
        self._copy(now)
        if self._side is not None:
            # the host goes on at once; what it has the GPU do next comes after these copies
            self._side.hold()
        if not self._later:
            self._started.set()

    def finish(self) -> None:
        """Copy the rest, and what lies between the chunks.

        Raises SaveFailedError if a tensor was changed meanwhile.
        """
        try:
            with self._during if self._later else nullcontext():
                self._copy(self._later)
                if self._side is not None:
                    self._started.set()
                    self._side.wait()
            self._judge()
            if self._changed is not None:
                raise SaveFailedError(
                    f"a tensor of shape {list(self._changed.shape)} was changed while it was captured, by something "
                    "other than its optimizer's step; wait for pending.captured() before changing it, or pass "
                    'capture="eager"'
                )
        finally:
            self._started.set()
        for laid in self._form.files:
            self._frame(laid)

    def settle(self, timeout: float | None = None) -> None:
        """Let the training change any tensor from now on: wait until all is copied, or until what the training has GPUs
        do next will wait for that; on the training's thread. Raises SaveFailedError after `timeout` seconds.
        """
        if not self._started.wait(timeout):
            raise SaveFailedError(f"a capture was not done within {timeout} s; the machine may be overloaded")
        if self._side is not None:
            self._judge()
            self._side.hold()

    @property
    def copied(self) -> bool:
        """Whether everything is copied, or the capture has failed."""
        return self._started.is_set() and (self._side is None or self._side.done())

    def _copy(self, pairs: _Pairs) -> None:
        """Copy pairs on CPUs; have those on GPUs copied."""
        if self._side is None:
            _copy(pairs)
            return
        self._side.enqueue([pair for pair in pairs if on_gpu(pair[1])])
        _copy([pair for pair in pairs if not on_gpu(pair[1])])

    def _judge(self) -> None:
        """Once, before the training may change tensors: find one that was changed too early."""
        with self._lock:
            if self._judged:
                return
            self._judged = True
            for (_, source), version in zip(self._later, self._versions, strict=True):
                if source._version != version:
                    self._changed = source

    def _frame(self, laid: Laid) -> None:
        """Write the header, and zeros between the chunks: the slot may hold another file's bytes."""
        at = laid.at
        header = laid.layout.header
        self._memory[at : at + len(header)] = header
        end = len(header)
        for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True):
            if start > end:
                self._memory[at + end : at + start] = bytes(start - end)
            end = start + chunk.nbytes


def fill(laid: Laid, sources: Sequence[Readable], at: int, memory: memoryview) -> None:
    """Put the bytes of a file from position `at` on into memory, which begins and ends at a page, or with the file.

    For states that no slot is large enough for: `sources` are those of the file's chunks.
    """
    end = at + len(memory)
    header, starts = laid.layout.header, laid.layout.starts
    filled = at
    if at < len(header):
        filled = min(end, len(header))
        memory[: filled - at] = header[at:filled]
    for position in range(max(0, bisect_right(starts, at) - 1), len(starts)):
        start = starts[position]
        if start >= end:
            break
        low, high = max(start, at), min(start + laid.chunks[position].nbytes, end)
        if low >= high:
            continue
        memory[filled - at : low - at] = bytes(low - filled)
        sources[position].read(low - start, high - start, memory[low - at : high - at])
        filled = high
    memory[filled - at :] = bytes(end - filled)


@torch.no_grad()
def _copy(pairs: _Pairs) -> None:
    """Copy pairs (room, source), batches of BATCH bytes by one call each: a call per tensor would slow the main
    thread.
    """
    rooms: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    size = 0
    for room, source in pairs:
        rooms.append(room)
        sources.append(source)
        size += source.nbytes
        if size >= BATCH:
            torch._foreach_copy_(rooms, sources)
            rooms, sources, size = [], [], 0
    if rooms:
        torch._foreach_copy_(rooms, sources)
