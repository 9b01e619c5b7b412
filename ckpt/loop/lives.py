"""RUN/lives.json: how long a run was trained, and how often it was interrupted, over all the jobs that trained it.

A job that leaves in good order says so. One that does not, because it was killed or ended with an error, counts as
interrupted; from when it wrote this file to the last heartbeat of its claim it lived. Nobody relies on this: what can't
be read or written counts as nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time

from ckpt.levels.claim import Claim
from ckpt.planning.interval import expected_mtbf

__all__ = ["NAME", "Lives"]

NAME = "lives.json"
FORMAT = "ckpt-lives"
VERSION = 1
MAX_SIZE = 1 << 16
"""Bytes of the largest such file."""

log = logging.getLogger("ckpt")


class Lives:
    """The lives of a run whose claim was just taken: those before, and from `begin` on this one.

    Attributes:
        failures: how often the run was interrupted.
        node_seconds: for how long it ran, times the nodes on which it did; without this life.
    """

    def __init__(self, run: str, claim: Claim, nodes: int) -> None:
        self.failures = 0
        self.node_seconds = 0.0
        self._path = os.path.join(run, NAME)
        self._claim = claim
        self._nodes = nodes
        self._begin: float | None = None
        self._read()

    def begin(self) -> None:
        """From now on the run is trained."""
        self._begin = time.monotonic()
        self._write(self._nodes)

    def end(self, *, failed: bool) -> None:
        """The job leaves. Does nothing the second time, or if it did not begin."""
        if self._begin is None:
            return
        self.node_seconds += self._seconds() * self._nodes
        self._begin = None
        self.failures += failed
        self._write(0)

    def mtbf(self) -> float:
        """Mean seconds between failures of this job, as far as is known."""
        return expected_mtbf(self._nodes, self.failures, self.node_seconds + self._seconds() * self._nodes)

    def _seconds(self) -> float:
        """Of this life so far."""
        return 0.0 if self._begin is None else time.monotonic() - self._begin

    def _read(self) -> None:
        try:
            with open(self._path, encoding="ascii") as stream:
                tree = json.loads(stream.read(MAX_SIZE))
                began = os.fstat(stream.fileno()).st_mtime
            if tree["format"] != FORMAT or tree["version"] != VERSION:
                raise ValueError("it is of another kind or of a newer release")
            failures, node_seconds, nodes = int(tree["failures"]), float(tree["node_seconds"]), int(tree["nodes"])
            if min(failures, nodes) < 0 or not 0 <= node_seconds < math.inf:
                raise ValueError("it counts what can't be")
            if nodes:
                # the job before never said that it had ended
                failures += 1
                node_seconds += nodes * max(0.0, (self._claim.before or began) - began)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("%s: how often the run was interrupted can't be read (%s)", self._path, error)
            return
        self.failures, self.node_seconds = failures, node_seconds
        if nodes:
            # the heartbeat is this job's from now on
            self._write(0)

    def _write(self, nodes: int) -> None:
        """Say what is known; `nodes` are those on which the run is being trained."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "failures": self.failures,
            "node_seconds": self.node_seconds,
            "nodes": nodes,
        }
        temporary = f"{self._path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="ascii") as stream:
                json.dump(tree, stream)
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("%s: how often the run is interrupted can't be noted (%s)", self._path, error.strerror)
