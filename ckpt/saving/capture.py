"""Capturing: copying what a rank has to write into a slot of shared memory, part of it while the training goes on.

The slot gets the data files as they will be on disk, header and padding included. What only an optimizer changes is
copied by a thread under the next forward and backward pass, in few large batches (DataStates-LLM, HPDC'24, calls this
lazy); everything else before `start` returns. Whoever changes those tensors meanwhile is found out by their version
counters, and the capture fails rather than mix two steps. Knows no agent: it is given memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from ckpt.saving.commit import split_files
from ckpt.saving.sources import TensorSource
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


class Laid(NamedTuple):
    """A file as it will lie in a slot."""

    chunks: Sequence[Chunk]
    layout: FileLayout
    at: int
    """Where the file begins in the slot: at a page."""


def lay_files(chunks: Sequence[Chunk]) -> tuple[list[Laid], int]:
    """Where everything goes, and the bytes that it takes."""
    files = []
    at = 0
    for some in split_files(chunks):
        layout = layout_of(some)
        files.append(Laid(some, layout, at))
        at += -(-layout.size // ALIGNMENT) * ALIGNMENT
    return files, at


class Capture:
    """One rank's part of one save on its way into a slot.

    Attributes:
        files: where everything lies.

    What is copied lazily is copied within the context `later`.
    """

    def __init__(
        self,
        files: Sequence[Laid],
        slot: memoryview,
        lazily: Callable[[torch.Tensor], bool],
        later: AbstractContextManager[object],
    ) -> None:
        self.files = files
        self._slot = slot
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lazily = lazily
        self._during = later
        self._copied = threading.Event()

    def start(self, then: Callable[[BaseException | None], None]) -> None:
        """Copy what must be copied now, and the rest in a thread; `then` is called at the end, with the error if it
        failed.
        """
        now: list[tuple[torch.Tensor, torch.Tensor]] = []
        for laid in self.files:
            self._frame(laid)
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True):
                at = laid.at + start
                source = chunk.source
                nbytes = chunk.nbytes
                if not isinstance(source, TensorSource) or source.tensor.dtype not in _COPIED or not nbytes:
                    source.read(0, nbytes, self._slot[at : at + nbytes])
                    continue
                tensor = source.tensor
                room = torch.frombuffer(self._slot, dtype=tensor.dtype, count=tensor.numel(), offset=at)
                (self._later if self._lazily(tensor) else now).append((room.view(tensor.shape), tensor))
        _copy(now)
        if not self._later:
            self._end(then, None)
            return
        versions = [source._version for _, source in self._later]
        threading.Thread(target=self._copy_later, args=(versions, then), name="ckpt-capture", daemon=True).start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until everything is copied. Raises SaveFailedError after `timeout` seconds."""
        if not self._copied.wait(timeout):
            raise SaveFailedError(f"a capture was not done within {timeout} s; the machine may be overloaded")

    @property
    def copied(self) -> bool:
        """Whether everything is copied, or the capture has failed."""
        return self._copied.is_set()

    def _frame(self, laid: Laid) -> None:
        """Write the header, and zeros between the chunks: the slot may hold another file's bytes."""
        at = laid.at
        header = laid.layout.header
        self._slot[at : at + len(header)] = header
        end = len(header)
        for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True):
            if start > end:
                self._slot[at + end : at + start] = bytes(start - end)
            end = start + chunk.nbytes

    def _copy_later(self, versions: Sequence[int], then: Callable[[BaseException | None], None]) -> None:
        error: BaseException | None = None
        try:
            with self._during:
                _copy(self._later)
            for (_, source), version in zip(self._later, versions, strict=True):
                if source._version != version:
                    raise SaveFailedError(
                        f"a tensor of shape {list(source.shape)} was changed while it was captured, by something other "
                        "than its optimizer's step; wait for pending.captured() before changing it, or pass "
                        'capture="eager"'
                    )
        except Exception as failure:  # noqa: BLE001 - it is told to whoever waits
            error = failure
        self._end(then, error)

    def _end(self, then: Callable[[BaseException | None], None], error: BaseException | None) -> None:
        self._later = []
        self._copied.set()
        then(error)


@torch.no_grad()
def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
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
