"""One rank's part of one save on its way from a slot to the agent.

The agent can begin to write while the end of a large slot is still being copied: it is told again and again up to where
a file is complete. A state that is larger than the memory for captures goes slot by slot. Knows no live state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from ckpt.agent.arena import PAGE
from ckpt.agent.client import AgentClient, Slot
from ckpt.saving.capture import Form, Laid, fill
from ckpt.storage.compressing import Compress, Readable
from ckpt_formats.native import names

PIECES = 4
"""Into so many pieces memory is divided for a state that is larger: some are filled while others are written."""
STREAMED = 64 << 20
"""Bytes that must be ready before the agent is told of them: a message costs the thread that copies some 0.2 ms."""


class Parcel:
    """See above. It ends with `end`, or with `abandon`."""

    def __init__(
        self,
        client: AgentClient,
        attempt: str,
        path: str,
        step: int | None,
        form: Form,
        open_save: Callable[[], None] | None,
        *,
        compress: Compress = False,
        bandwidth: float | None = None,
    ) -> None:
        """Args:
        open_save: opens the save at the agent, where this is rank 0 and that was not done yet.
        compress, bandwidth: see ckpt.async_save.
        """
        self._client = client
        self._attempt = attempt
        self._path = path
        self._step = step
        self._form = form
        self._open_save = open_save
        self._compress = compress
        self._bandwidth = bandwidth
        self._slot: Slot | None = None
        self._table: list[Any] = []
        self._sent = 0
        """Up to where in the slot the agent was told that it is filled."""

    def into(self, slot: Slot) -> None:
        """It will lie in this slot, which from now on belongs to it."""
        self._slot = slot

    def ready(self, filled: int) -> None:
        """The slot is filled up to there. Raises CheckpointError if the save has failed, or the agent is gone."""
        # what is compressed is compressed as a whole; and where all is filled, the end comes next
        if not self._compress and self._sent + STREAMED <= filled < self._form.nbytes:
            self._tell_up_to(filled // PAGE * PAGE)

    def end(self) -> None:
        """The slot is filled: the rank is not needed any more. Raises as `ready`."""
        if self._sent:
            self._tell_up_to(self._form.nbytes)
        else:
            slot, self._slot = self._slot, None
            self._tell(slot, 0, self._form.nbytes, [row for _, row in self._rows()])

    def _rows(self) -> list[tuple[Laid, Any]]:
        """The files, and what the agent is told of each."""
        files = self._form.files
        self._table = self._table or _table(files, self._attempt, self._client.rank)
        return list(zip(files, self._table, strict=True))

    def _tell_up_to(self, filled: int) -> None:
        """Tell of what lies up to there and was not told of, file by file."""
        whole = self._form.nbytes
        for laid, row in self._rows():
            stop = min(laid.at + laid.layout.size, filled)
            begin = max(laid.at, self._sent)
            if begin >= stop:
                continue
            self._sent = -(-stop // PAGE) * PAGE
            slot = self._slot
            if self._sent == whole:
                self._slot = None
            more = self._sent < whole
            self._tell(slot, begin, stop - begin, [row] if begin == laid.at else [], more=more, keep=more)

    def _tell(
        self, slot: Slot | None, begin: int, nbytes: int, rows: list[Any], *, more: bool = False, keep: bool = False
    ) -> None:
        """Tell the agent of bytes in a slot, which it gives back when they are written unless it is to `keep` it."""
        if slot is None:
            raise AssertionError("a parcel lies in a slot until its end was sent")
        self.open()
        self._client.captured(
            self._attempt,
            slot,
            nbytes,
            rows,
            self._path,
            self._step,
            begin=begin,
            keep=keep,
            more=more,
            compress=self._compress,
            bandwidth=self._bandwidth,
        )

    def open(self) -> None:
        """Open the save, if that is for this rank to do and was not done yet. Raises what that raises."""
        open_save, self._open_save = self._open_save, None
        if open_save is not None:
            open_save()

    def abandon(self, why: BaseException) -> None:
        """It can't be captured: the save fails, and the slot, to which nobody writes any more, is given back.

        Raises CheckpointError if the agent is gone.
        """
        slot, self._slot = self._slot, None
        try:
            # the other ranks wait for that
            self.open()
        finally:
            self._client.abandon(self._attempt, slot, why)

    def send_in_pieces(self, sources: Sequence[Readable], memory: int, take: Callable[[int], Slot]) -> None:
        """Capture a state that is larger than the memory for captures: each piece is written before its memory can take
        another one.

        Args:
            sources: of all chunks of the form.
            memory: bytes that all pieces together may take.
            take: gives a slot of so many bytes, when there is one.

        Raises:
            CheckpointError: the save has failed, or the agent is gone.
        """
        size = memory // PIECES // PAGE * PAGE
        every = iter(sources)
        rows = self._rows()
        for laid, row in rows:
            own = list(islice(every, len(laid.chunks)))
            for at in range(0, laid.layout.size, size):
                nbytes = min(size, laid.layout.size - at)
                self._slot = take(nbytes)
                fill(laid, own, at, self._slot.view[:nbytes])
                slot, self._slot = self._slot, None
                more = laid is not rows[-1][0] or at + nbytes < laid.layout.size
                self._tell(slot, 0, nbytes, [] if at else [row], more=more)


def _table(files: Sequence[Laid], attempt: str, rank: int) -> list[Any]:
    """What will lie in a slot, for the agent."""
    table = []
    for number, laid in enumerate(files):
        chunks = [
            [chunk.name, *chunk.box, start, chunk.nbytes, chunk.dtype.name, chunk.shape]
            for chunk, start in zip(laid.chunks, laid.layout.starts, strict=True)
        ]
        table.append([names.data_path(rank, number, attempt), len(laid.layout.header), laid.layout.size, chunks])
    return table
