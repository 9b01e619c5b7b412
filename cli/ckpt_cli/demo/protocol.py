"""What the demo's driver, nodes and workers tell each other. Plain data; no torch, no Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one worker is to do. A `prompt` makes it write a line of text instead of training."""

    rank: int
    dp: int
    tp: int
    rendezvous: Path
    """The absolute path of a file that does not exist yet, where the ranks of an attempt meet."""
    log: Path
    """Takes the process's stdout and stderr."""
    checkpoint: Path | None
    """Where to start from; None: at step 0."""
    batch: int = 1
    """The samples of one step, over all ranks; divides by `dp`."""
    stop: int = 0
    """The step to stop after."""
    steps: int = 1
    """The steps of the whole training, which the learning rate's schedule depends on."""
    save_every: int = 0
    """0: save nothing."""
    run: Path | None = None
    """The folder that takes the checkpoints."""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a worker.

    Workers report the kinds `up`, `ready`, `loaded`, `step`, `saved`, `text`, `done` and `failed`; `exited` is what the
    node says of one that has ended. `at` is in seconds of `time.monotonic`, which the processes of a machine share.
    """

    kind: str
    rank: int
    at: float
    facts: dict[str, Any] = field(default_factory=dict)


class Reporter:
    """Sends a worker's events to its node."""

    def __init__(self, rank: int, pipe: connection.Connection) -> None:
        self._rank = rank
        self._pipe = pipe

    def __call__(self, kind: str, **facts: Any) -> None:
        self._pipe.send(Event(kind, self._rank, time.monotonic(), facts))
