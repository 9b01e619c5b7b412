"""The parts of saves on their way from slots to disk: a thread for each, which writes its pieces in order.

A part is what one rank writes of one save. It mostly comes in one slot; where the state is larger than the memory for
captures, piece by piece, each of which frees its slot for the next. Knows no trainers.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ckpt.agent.arena import Arena
from ckpt.agent.crew import Committer
from ckpt.agent.link import Link, LinkedFiles
from ckpt.agent.writing import Captured, CapturedFile, FileWriter
from ckpt.saving.commit import FileNames, Part
from ckpt.storage.data_file import Chunk, Staging, WrittenFile, write_data_file
from ckpt.storage.files import ALIGNMENT, Files
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.errors import CheckpointError, SaveFailedError

AT_ONCE = 4
"""Parts of which bytes are written at the same time; the others wait for their turn."""

BUFFERS = 8
"""Staging buffers of an agent: each part that is written at a time fills one, and the disk shall not wait meanwhile."""


class Piece(NamedTuple):
    """Bytes of one file or of several, in a slot, where each of them begins at a page."""

    arena: Arena
    slot: int
    offset: int
    """Where in the slot it begins, at a page."""
    begin: Sequence[CapturedFile]
    """Files that begin in it; without any, it goes on with the one before."""
    nbytes: int
    compress: bool | str = False
    """"auto" for as long as the link is slow."""
    keep: bool = False
    """Whether more will come in this slot, which is not given back."""


class Output:
    """What all parts of an agent share on their way out.

    Attributes:
        files: the file system, by way of the link.
        link: how fast it is, and may be.
        staging: buffers that bytes are written from.
        turn: held by a part while it writes.
    """

    def __init__(self, files: Files) -> None:
        self.link = Link()
        self.files = LinkedFiles(files, self.link)
        self.turn = threading.Semaphore(AT_ONCE)
        self.staging = Staging(BUFFERS)
        self._compressing = threading.Lock()

    def write_compressed(self, folder: str, captured: CapturedFile, memory: memoryview) -> WrittenFile:
        """Write a file that lies whole in memory, compressed: one at a time, by all CPUs. Raises OSError."""
        chunks = [
            Chunk(chunk.name, dtype_named(chunk.dtype), chunk.shape, chunk.box, Captured(memory, chunk.start))
            for chunk in captured.chunks
        ]
        with self._compressing:
            return write_data_file(self.files, folder, captured.path, chunks, self.staging, compress=True)


class PartWriter:
    """Writes the part of one rank. Ends with `finish` or `stop`, and then calls `ended`."""

    def __init__(
        self,
        output: Output,
        committer: Committer,
        attempt: str,
        path: str,
        rank: int,
        release: Callable[[Arena, int], None],
        ended: Callable[[], None],
    ) -> None:
        """`release` gives a slot back that was written."""
        self._output = output
        self._committer = committer
        self._attempt = attempt
        self._path = path
        self._rank = rank
        self._release = release
        self._ended = ended
        self._queue: queue.SimpleQueue[Piece | bool] = queue.SimpleQueue()
        self._names: list[FileNames] = []
        self._written: list[WrittenFile] = []
        self._writer: FileWriter | None = None
        self._left = 0
        """Bytes of the file at hand that have not come yet."""
        self.failure: Exception | None = None
        threading.Thread(target=self._run, name="ckpt-agent-write").start()

    def add(self, piece: Piece) -> None:
        """Write a piece; it belongs to this writer from now on."""
        self._queue.put(piece)

    def finish(self) -> None:
        """There are no more pieces: the part is prepared when all are on stable storage."""
        self._queue.put(True)

    def stop(self) -> None:
        """The rest will never come."""
        self._queue.put(False)

    def _run(self) -> None:
        committer = self._committer
        try:
            with contextlib.ExitStack() as stack:
                complete = self._take(stack)
                if complete and self.failure is None:
                    committer.prepared(self._attempt, self._rank, Part(self._written, self._names))
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainers learn it
            self._tell(error)
        finally:
            if committer.failing(self._attempt):
                # what this wrote after the save had failed
                committer.discard(self._attempt)
            self._ended()

    def _take(self, stack: contextlib.ExitStack) -> bool:
        """Write pieces as they come; returns whether they were all that there will be."""
        while not isinstance(what := self._queue.get(), bool):
            try:
                if self.failure is None and not self._committer.failing(self._attempt):
                    with self._output.turn, self._committer.phase(self._attempt, self._rank) as phase:
                        phase.bytes = what.nbytes
                        self._write(what, stack)
            except Exception as error:  # noqa: BLE001 - it is told at the end, and to whoever brings the next piece
                self._tell(error)
                # whoever hears of it finds nothing left behind
                self.failure = error
            finally:
                if not what.keep:
                    self._release(what.arena, what.slot)
        return what

    def _write(self, piece: Piece, stack: contextlib.ExitStack) -> None:
        memory = piece.arena.view(piece.slot + piece.offset, piece.nbytes)
        if not piece.begin and piece.nbytes:
            self._go_on(memory, piece, piece.nbytes, stack)
        at = 0
        for captured in piece.begin:
            self._names.append(FileNames.of([chunk.name for chunk in captured.chunks]))
            if self._compresses(piece, captured):
                self._written.append(self._output.write_compressed(self._path, captured, memory[at:]))
                at += -(-captured.size // ALIGNMENT) * ALIGNMENT
                continue
            writer = FileWriter(self._output.files, self._path, captured, self._output.staging)
            self._writer = stack.enter_context(writer)
            self._left = captured.size
            count = min(captured.size, piece.nbytes - at)
            self._go_on(memory[at:], piece, count, stack)
            at += -(-count // ALIGNMENT) * ALIGNMENT

    def _compresses(self, piece: Piece, captured: CapturedFile) -> bool:
        """Whether a file that begins in a piece is compressed: what comes in pieces is not."""
        wanted = self._output.link.slow if piece.compress == "auto" else bool(piece.compress)
        return wanted and captured.size <= piece.nbytes

    def _go_on(self, memory: memoryview, piece: Piece, nbytes: int, stack: contextlib.ExitStack) -> None:
        if self._writer is None:
            raise AssertionError("a part begins with a file")
        self._writer.write(memory, nbytes, keeps=piece.keep)
        self._left -= nbytes
        if not self._left:
            self._written.append(self._writer.finish())
            self._writer = None
            stack.close()

    def _tell(self, error: Exception) -> None:
        known = isinstance(error, CheckpointError)
        why = f"{self._path}: rank {self._rank}'s part could not be written: {error}"
        with contextlib.suppress(CheckpointError):
            self._committer.failed(self._attempt, why, type(error).__name__ if known else SaveFailedError.__name__)
