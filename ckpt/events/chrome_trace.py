"""Events as a trace to look at: Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

A rank is a process there. Its operations have tracks of their own, because several may be in flight; phases, and waits
in them, nest on the threads that they ran on; a counter for each kind of operation has the bytes so far. Begin and end
are entries of their own, not one entry at the end (`X`), so that the trace of a process that died shows what it was at.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from ckpt.events.process_file import ProcessFile
from ckpt.events.types import (
    Event,
    OperationEnded,
    OperationStarted,
    PhaseEnded,
    PhaseStarted,
    WaitEnded,
    WaitStarted,
)

__all__ = ["ChromeTraceSink"]


class ChromeTraceSink:
    """Appends each event at once to `FOLDER/rank00003-HOST-PID.trace.json`; see ProcessFile for what that promises.

    Each line is an entry of a JSON array. The array is closed when the sink is; the format allows one that is not, as a
    process leaves it that dies. Times are the machine's clock as it was when the sink was made, running on without
    being set, so that traces of several ranks lie right beside each other.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._file = ProcessFile(folder, ".trace.json")
        self._epoch = time.time() - time.monotonic()
        self._named: set[tuple[int, int, int]] = set()
        self._bytes: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Write an entry, or two. Raises OSError."""
        entries = [*self._names(event), *self._entries(event)]
        text = "".join(f"{json.dumps(entry, separators=(',', ':'))},\n" for entry in entries)
        self._file.write(event.rank, text, first="[\n")

    def close(self) -> None:
        """Close the array; write nothing more."""
        # an entry that means nothing, because the one before it ends with a comma
        self._file.close('{"name":"end","ph":"M","pid":0,"tid":0}\n]\n')

    def _names(self, event: Event) -> list[dict[str, Any]]:
        """What the rank and the thread are called, when they are new."""
        # a forked child begins a file of its own, so it must name them again
        key = (os.getpid(), event.rank, event.thread)
        if key in self._named:
            return []
        self._named.add(key)
        where = {"ph": "M", "pid": event.rank, "tid": event.thread}
        return [
            {"name": "process_name", **where, "args": {"name": f"rank {event.rank}"}},
            {"name": "process_sort_index", **where, "args": {"sort_index": event.rank}},
            {"name": "thread_name", **where, "args": {"name": event.thread_name}},
        ]

    def _entries(self, event: Event) -> list[dict[str, Any]]:
        of = {"cat": "ckpt", "pid": event.rank, "tid": event.thread, "ts": self._microseconds(event)}
        title = event.operation if event.step is None else f"{event.operation} step {event.step}"
        match event:
            case OperationStarted():
                args: dict[str, Any] = {"path": event.path, "step": event.step}
                return [{"name": event.operation, "ph": "b", "id": self._id(event), **of, "args": args}]
            case OperationEnded():
                args = {"title": title, "bytes": event.bytes, "waited": event.waited, "error": event.error}
                return [{"name": event.operation, "ph": "e", "id": self._id(event), **of, "args": args}]
            case PhaseStarted():
                return [{"name": event.phase, "ph": "B", **of, "args": {"of": title}}]
            case PhaseEnded():
                args = {"bytes": event.bytes, "waited": event.waited, "error": event.error}
                entries = [{"name": event.phase, "ph": "E", **of, "args": args}]
                if event.bytes:
                    entries.append({"name": event.operation, "ph": "C", **of, "args": {"bytes": self._count(event)}})
                return entries
            case WaitStarted():
                return [{"name": f"wait for {event.reason}", "ph": "B", **of}]
            case WaitEnded():
                return [{"name": f"wait for {event.reason}", "ph": "E", **of}]
        return []

    def _microseconds(self, event: Event) -> int:
        return int((self._epoch + event.monotonic) * 1e6)

    def _id(self, event: Event) -> str:
        """Unlike any other operation's, also in a trace put together from those of several processes."""
        return f"{event.rank}.{os.getpid()}.{event.id}"

    def _count(self, event: PhaseEnded) -> int:
        """Bytes of this kind of operation so far, on this rank."""
        key = (event.operation, event.rank)
        with self._lock:
            self._bytes[key] = self._bytes.get(key, 0) + event.bytes
            return self._bytes[key]

    def __repr__(self) -> str:
        return f"ChromeTraceSink({self._file.folder!r})"
