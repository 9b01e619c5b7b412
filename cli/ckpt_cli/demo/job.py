"""The demo's supervisor: starts an attempt of the training, watches it, and ends it when a worker is lost.

An attempt is one life of the job on one mesh. What follows upon what is the story's business (story.py).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_cli.demo.cluster import Cluster
from ckpt_cli.demo.protocol import Event, Task

# The longest time in which nothing at all may be heard of an attempt. A step takes a fraction of a second.
_SILENCE_LIMIT_S = 60.0
# A rank whose collective breaks may say so before the death of its neighbour, which is why, is known.
_GRACE_S = 2.0
_POLL_S = 1.0


class JobError(Exception):
    """An attempt failed for a reason that is not part of the demo."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks arranged by data parallelism (dp) and tensor parallelism (tp)."""

    dp: int
    tp: int

    @property
    def size(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"dp={self.dp} tp={self.tp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One life of the job: on which mesh, from where, and how far."""

    name: str
    mesh: Mesh
    checkpoint: Path | None
    stop: int
    save_every: int = 0
    prompt: str = ""
    kill_at: int | None = None
    """After this step, the worker with the highest rank gets SIGKILL."""


@dataclass(slots=True)
class Save:
    step: int
    seconds: float
    bytes: int


@dataclass(slots=True)
class Outcome:
    """What became of an attempt. Times are of `time.monotonic`, in seconds; sizes in bytes."""

    mesh: Mesh
    began: float
    losses: dict[int, float] = field(default_factory=dict)
    """Of each step, the mean over the global batch, in nats per byte."""
    step_seconds: list[float] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    up: float = 0.0
    """When the last worker's process was running; likewise `ready`, `loaded` and `first_step`."""
    ready: float = 0.0
    loaded: float = 0.0
    first_step: float = 0.0
    load_seconds: float = 0.0
    samples: int = 0
    """How many samples had been drawn where it started."""
    parameters: int = 0
    symbols: int = 0
    threads: int = 0
    rows: dict[int, int] = field(default_factory=dict)
    """Of the tensor whose cut is shown, the rows on each rank."""
    text: str = ""
    killed_rank: int | None = None
    killed: float = 0.0
    noticed: float = 0.0
    aborted: float = 0.0
    """When the last of the other workers was gone."""
    ended: float = 0.0


class Job:
    """Runs attempts on a cluster, one after another.

    Args:
        cluster: a started one.
        out: the demo's folder; takes checkpoints (run/), logs and rendezvous files.
        steps: of the whole training.
        batch: samples of one step, over all ranks.
    """

    def __init__(self, cluster: Cluster, out: Path, *, steps: int, batch: int) -> None:
        self.run_folder = out / "run"
        self.logs = out / "logs"
        self._cluster = cluster
        self._rendezvous = out / "rendezvous"
        self._steps = steps
        self._batch = batch
        for folder in (self.run_folder, self.logs, self._rendezvous):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, attempt: Attempt, tell: Callable[[Event, Outcome], None]) -> Outcome:
        """Run an attempt to its end, which may be the loss of the worker that it kills. No worker is left then.

        `tell` is called with each event as it arrives and what is known of the attempt so far.

        Raises JobError when it ends otherwise or falls silent, ClusterError when a node does.
        """
        outcome = Outcome(attempt.mesh, time.monotonic())
        nodes = self._start(attempt)
        try:
            _Watch(self._cluster, tell, self.logs, attempt, outcome, nodes).to_the_end()
        except BaseException:
            self._abandon(nodes)
            raise
        return outcome

    def _start(self, attempt: Attempt) -> dict[int, dict[int, int]]:
        """Start the workers, as many per node as it has processors. Returns the process id of each rank, by node.

        Paths go out absolute: the workers' working folder is Ray's affair.
        """
        tasks: dict[int, list[Task]] = {}
        for rank in range(attempt.mesh.size):
            task = Task(
                rank=rank,
                dp=attempt.mesh.dp,
                tp=attempt.mesh.tp,
                rendezvous=self._rendezvous.absolute() / attempt.name,
                log=log_of(self.logs, attempt, rank).absolute(),
                checkpoint=attempt.checkpoint.absolute() if attempt.checkpoint else None,
                batch=self._batch,
                stop=attempt.stop,
                steps=self._steps,
                save_every=attempt.save_every,
                run=self.run_folder.absolute(),
                prompt=attempt.prompt,
            )
            tasks.setdefault(rank // self._cluster.workers_per_node, []).append(task)
        return {node: self._cluster.ask(node, "start", its) for node, its in tasks.items()}

    def _abandon(self, nodes: dict[int, dict[int, int]]) -> None:
        for node in nodes:
            self._cluster.call(node, "stop")


class _Watch:
    """Follows one attempt from its start to the end of its last worker."""

    def __init__(
        self,
        cluster: Cluster,
        tell: Callable[[Event, Outcome], None],
        logs: Path,
        attempt: Attempt,
        outcome: Outcome,
        nodes: dict[int, dict[int, int]],
    ) -> None:
        self._cluster = cluster
        self._tell = tell
        self._logs = logs
        self._attempt = attempt
        self._outcome = outcome
        self._nodes = nodes
        self._pids = {rank: pid for its in nodes.values() for rank, pid in its.items()}
        self._alive = set(self._pids)
        self._done: set[int] = set()
        self._failed: dict[int, str] = {}
        self._failed_at = 0.0

    def to_the_end(self) -> None:
        pending = {self._listen(node): node for node in self._nodes}
        heard = time.monotonic()
        while self._alive:
            for reference, events in self._cluster.wait(list(pending), _POLL_S * 2):
                node = pending.pop(reference)
                if self._alive & self._nodes[node].keys() - {e.rank for e in events if e.kind == "exited"}:
                    pending[self._listen(node)] = node
                for event in events:
                    heard = time.monotonic()
                    self._take(event)
            if self._failed and not self._outcome.noticed and time.monotonic() - self._failed_at > _GRACE_S:
                break
            if time.monotonic() - heard > _SILENCE_LIMIT_S:
                raise JobError(
                    f"nothing was heard of rank {_names(self._alive)} for {_SILENCE_LIMIT_S:.0f} s "
                    f"in '{self._attempt.name}'; see {self._logs}"
                )
        if self._failed and not self._outcome.noticed:
            rank, message = next(iter(self._failed.items()))
            raise self._failure(rank, f"failed: {message}")

    def _listen(self, node: int) -> Any:
        return self._cluster.call(node, "events", _POLL_S)

    def _take(self, event: Event) -> None:
        outcome, facts = self._outcome, event.facts
        match event.kind:
            case "up":
                outcome.up = max(outcome.up, event.at)
            case "ready":
                outcome.ready = max(outcome.ready, event.at)
                outcome.rows[event.rank] = facts["rows"]
                outcome.parameters, outcome.symbols = facts["parameters"], facts["symbols"]
                outcome.threads = max(outcome.threads, facts["threads"])
            case "loaded":
                outcome.loaded = max(outcome.loaded, event.at)
                outcome.load_seconds = max(outcome.load_seconds, facts["seconds"])
                outcome.samples = facts.get("samples", 0)
            case "step":
                outcome.first_step = outcome.first_step or event.at
                outcome.losses[facts["step"]] = facts["loss"]
                outcome.step_seconds.append(facts["seconds"])
            case "saved":
                outcome.saves.append(Save(facts["step"], facts["seconds"], facts["bytes"]))
            case "text":
                outcome.text = facts["text"]
            case "done":
                self._done.add(event.rank)
            case "failed":
                self._failed.setdefault(event.rank, facts["message"])
                self._failed_at = self._failed_at or time.monotonic()
            case "exited":
                self._exited(event)
        self._tell(event, outcome)
        if event.kind == "step" and facts["step"] == self._attempt.kill_at:
            self._kill()

    def _kill(self) -> None:
        """What the demo is about: a worker dies without a word. Nothing below knows that it was us."""
        rank = max(self._pids)
        self._outcome.killed_rank = rank
        self._outcome.killed = time.monotonic()
        os.kill(self._pids[rank], signal.SIGKILL)
        self._tell(Event("killed", rank, self._outcome.killed, {"pid": self._pids[rank]}), self._outcome)

    def _exited(self, event: Event) -> None:
        self._alive.discard(event.rank)
        self._outcome.ended = event.at
        outcome, code = self._outcome, event.facts["code"]
        if outcome.noticed:
            outcome.aborted = max(outcome.aborted, event.at)
        elif event.rank not in self._failed and (event.rank not in self._done or code != 0):
            # The others wait for it in a collective, most of them for ever: they are to be stopped from outside.
            outcome.noticed = outcome.aborted = time.monotonic()
            for node in self._nodes:
                self._cluster.call(node, "stop")
            if event.rank != outcome.killed_rank:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise self._failure(event.rank, f"{how}, which is not part of the demo")

    def _failure(self, rank: int, what: str) -> JobError:
        return JobError(f"rank {rank} of '{self._attempt.name}' {what}; see {log_of(self._logs, self._attempt, rank)}")


def log_of(logs: Path, attempt: Attempt, rank: int) -> Path:
    """The file that takes what a worker prints."""
    return logs / f"{attempt.name}-rank{rank}.log"


def _names(ranks: set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
