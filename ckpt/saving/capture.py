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
from contextlib import AbstractContextManager
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

BATCH = 16 << 20
"""Bytes that are copied by one call, between which the thread lets others run."""
ROOMS = 8
"""Places in an arena of which a form keeps the rooms."""

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
            self.forget_rooms()
            self._arena = arena
        if start not in self._rooms:
            if len(self._rooms) == ROOMS:
                del self._rooms[next(iter(self._rooms))]
            self._rooms[start] = self._make_rooms(memory)
        return self._rooms[start]

    def forget_rooms(self) -> None:
        """Let go of the memory of slots: as long as one is referred to, its whole arena stays mapped."""
        self._arena = None
        self._rooms = {}

    # they outlive this call, and whatever mode it is made in
    @torch.inference_mode(False)
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


class _Batch(NamedTuple):
    """What is copied by one call."""

    start: int
    """Where in the slot its first room begins."""
    pairs: _Pairs
    versions: Sequence[int]
    """Of the sources, when the capture began."""


class Capture:
    """One rank's part of one save on its way into a slot: `begin` where the training waits, then `finish` in a thread.

    Whoever needs the tensors before that is done does not wait for the thread, which may have much else to do, but
    copies what it has not begun with.
    """

    def __init__(
        self,
        form: Form,
        sources: Sequence[Readable],
        memory: memoryview,
        rooms: Sequence[torch.Tensor | None],
        during: AbstractContextManager[object],
    ) -> None:
        """Args:
        sources: of each chunk of the form.
        memory: the slot.
        rooms: of the form, in the slot.
        during: a context for what is copied lazily.
        """
        self._form = form
        self._sources = sources
        self._memory = memory
        self._rooms = rooms
        self._during = during
        self._lock = threading.Lock()
        self._batches: Sequence[_Batch] = ()
        """What is copied lazily."""
        self._next = 0
        """The first batch that nobody copies yet."""
        self._in_hand: set[int] = set()
        self._failure: BaseException | None = None
        self._side: SideCopies | None = None
        """Copies from GPUs."""
        self._judged = False
        self._started = threading.Event()
        """All is copied, but for what GPUs still copy; or it has failed."""

    def begin(self, lazily: Callable[[torch.Tensor], bool]) -> None:
        """Copy everything but the tensors that may be copied `lazily`."""
        now: _Pairs = []
        later: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        others = []
        for position, (source, room) in enumerate(zip(self._sources, self._rooms, strict=True)):
            if room is None or not isinstance(source, TensorSource):
                others.append(position)
            elif lazily(source.tensor):
                later.append((position, room, source.tensor))
            else:
                now.append((room, source.tensor))
        if others or later:
            places = list(self._form.places())
            for position in others:
                chunk, at = places[position]
                self._sources[position].read(0, chunk.nbytes, self._memory[at : at + chunk.nbytes])
            self._batches = _batches([(places[position][1], room, source) for position, room, source in later])
        on_gpus = [source for _, source in now if on_gpu(source)] + [source for *_, source in later if on_gpu(source)]
        if on_gpus:
            self._side = SideCopies(on_gpus)
        self._copy(now)
        if self._side is not None:
            # the host goes on at once; what it has the GPU do next comes after these copies
            self._side.hold()
        if not self._batches:
            self._started.set()

    def finish(self, ready: Callable[[int], None], timeout: float) -> None:
        """Copy the rest, and what lies between the chunks. `ready` is told up to where the slot is filled, again and
        again.

        Raises SaveFailedError if a tensor was changed meanwhile, or if another thread did not finish what it copies.
        """
        for laid in self._form.files:
            self._frame(laid)
        if self._batches:
            with self._during:
                while self._copy_next():
                    if self._side is None:
                        ready(self._filled())
                self.help(timeout)
        if self._side is not None:
            self._side.wait()
            self._judge()
        if self._failure is not None:
            raise self._failure
        self._let_go()

    def settle(self, timeout: float) -> None:
        """Let the training change any tensor from now on: when all is copied, or what the training has GPUs do next
        will wait for that, or the capture has failed; on the training's thread.

        Raises SaveFailedError after `timeout` seconds.
        """
        self.help(timeout)
        if self._side is not None:
            self._judge()
            self._side.hold()

    def help(self, timeout: float) -> None:
        """Copy what nobody copies yet, and wait for what others copy. Raises SaveFailedError after `timeout` s."""
        while self._copy_next():
            pass
        if not self._started.wait(timeout):
            raise SaveFailedError(f"a capture was not done within {timeout} s; the machine may be overloaded")

    def stop(self, why: BaseException, timeout: float) -> None:
        """It has failed: nothing more is copied, and when this returns, nobody writes to the slot."""
        with self._lock:
            self._failure = self._failure or why
            if not self._in_hand:
                self._started.set()
        self._started.wait(timeout)
        if self._side is not None:
            self._side.wait()
        self._let_go()

    def _let_go(self) -> None:
        """Nothing here shall keep the tensors, which the model may not need any more."""
        self._batches, self._sources, self._rooms = (), (), ()

    @property
    def copied(self) -> bool:
        """Whether everything is copied, or the capture has failed."""
        return self._started.is_set() and (self._side is None or self._side.done())

    def _copy_next(self) -> bool:
        """Copy a batch; False if there is none left."""
        with self._lock:
            if self._failure is not None or self._next >= len(self._batches):
                return False
            number = self._next
            batch = self._batches[number]
            self._next += 1
            self._in_hand.add(number)
        failure: BaseException | None = None
        try:
            self._copy(batch.pairs)
            if self._side is None:
                # before anybody who waits may change them
                _require_unchanged(batch)
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                self._in_hand.discard(number)
                if failure is not None:
                    self._failure = failure
                over = self._failure is not None or self._next == len(self._batches)
                if over and not self._in_hand:
                    self._started.set()
        return failure is None

    def _copy(self, pairs: _Pairs) -> None:
        """Copy pairs on CPUs; have those on GPUs copied."""
        if self._side is None:
            _copy(pairs)
            return
        self._side.enqueue([pair for pair in pairs if on_gpu(pair[1])])
        _copy([pair for pair in pairs if not on_gpu(pair[1])])

    def _judge(self) -> None:
        """Once, before the training may change tensors on GPUs: find one that was changed too early."""
        with self._lock:
            if self._judged:
                return
            self._judged = True
            try:
                for batch in self._batches:
                    _require_unchanged(batch)
            except SaveFailedError as error:
                self._failure = self._failure or error

    def _filled(self) -> int:
        """Up to where the slot is filled."""
        with self._lock:
            first = min(self._in_hand, default=self._next)
            return self._batches[first].start if first < len(self._batches) else self._form.nbytes

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


def _batches(later: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> list[_Batch]:
    """Divide (where it begins, room, source) into batches of BATCH bytes: a call per tensor would slow the main
    thread.
    """
    batches: list[_Batch] = []
    pairs: _Pairs = []
    start = size = 0
    for whole in later:
        for at, room, source in _parts(*whole):
            if not pairs:
                start = at
            pairs.append((room, source))
            size += source.nbytes
            if size >= BATCH:
                batches.append(_Batch(start, pairs, _versions(pairs)))
                pairs, size = [], 0
    if pairs:
        batches.append(_Batch(start, pairs, _versions(pairs)))
    return batches


def _parts(at: int, room: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A large tensor in parts, if its memory can be divided."""
    if source.nbytes < 2 * BATCH or not source.is_contiguous():
        yield at, room, source
        return
    room, source = room.view(-1), source.view(-1)
    count = BATCH // source.element_size()
    for first in range(0, source.numel(), count):
        start = at + first * source.element_size()
        yield start, room[first : first + count], source[first : first + count]


def _versions(pairs: _Pairs) -> list[int]:
    return [source._version for _, source in pairs]


def _require_unchanged(batch: _Batch) -> None:
    if _versions(batch.pairs) != batch.versions:
        changed = next(s for (_, s), version in zip(batch.pairs, batch.versions, strict=True) if s._version != version)
        raise SaveFailedError(
            f"a tensor of shape {list(changed.shape)} was changed while it was captured, by something other than its "
            'optimizer\'s step; wait for pending.captured() before changing it, or pass capture="eager"'
        )


@torch.no_grad()
def _copy(pairs: _Pairs) -> None:
    """Copy pairs (room, source)."""
    if pairs:
        torch._foreach_copy_([room for room, _ in pairs], [source for _, source in pairs])
