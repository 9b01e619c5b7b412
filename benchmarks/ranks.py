"""Starts the processes of a benchmark: forked from one server that has imported torch, joined in a gloo group.

Knows nothing of what they do. One process gets no group, as a script that is not distributed has none.
"""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

_PATIENCE_S = 600.0
"""How long a collective, and the parent, wait for anything at all to happen."""


class BenchmarkFailedError(RuntimeError):
    """A rank raised, died or went silent; the message has its rank and its traceback."""


@dataclass(frozen=True, slots=True)
class Group:
    """One process's place among those that work together."""

    rank: int
    size: int
    say: Callable[[str], None]
    """Shows a line of progress; only rank 0's lines are shown."""

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def span(self, start: float, stop: float) -> float:
        """Seconds from the first rank's start to the last rank's stop, the same on all ranks.

        The times are `time.monotonic()`'s, one clock for all processes of a machine.
        """
        if self.size == 1:
            return stop - start
        ends = torch.tensor([-start, stop], dtype=torch.float64)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return float(ends[0] + ends[1])


class RankFunction(Protocol):
    """What every rank runs; defined at the top level of a module, so that a new process finds it."""

    def __call__(self, group: Group, *args: Any) -> Any: ...


def run_ranks(
    fn: RankFunction,
    size: int,
    *args: Any,
    say: Callable[[str], None],
    children: bool = False,
    prepare: Callable[[int], None] | None = None,
) -> Any:
    """Run `fn(group, *args)` in `size` new processes and return rank 0's result. With `children` they may have some.

    Each calls `prepare(rank)`, defined like `fn`, before they join.

    Raises BenchmarkFailedError when a rank does, after the others were stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with tempfile.TemporaryDirectory(prefix="benchmark-") as rendezvous:
        pipes: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(fn, rank, size, rendezvous, theirs, args, prepare),
                    name=f"rank {rank}",
                    daemon=not children,
                )
                process.start()
                theirs.close()
                pipes[ours] = rank
                processes.append(process)
            return _listen(pipes, say)
        finally:
            for process in processes:
                if pipes:  # somebody has not said goodbye: a failure, or Ctrl-C
                    process.terminate()
                process.join()


def _listen(pipes: dict[Connection, int], say: Callable[[str], None]) -> Any:
    """Take what the ranks send until each has said goodbye, and closed its pipe; empties `pipes`."""
    result = None
    while pipes:
        ready = wait(list(pipes), timeout=_PATIENCE_S)
        if not ready:
            raise BenchmarkFailedError(f"ranks {sorted(pipes.values())} said nothing for {_PATIENCE_S:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes[pipe]
            try:
                kind, content = pipe.recv()
            except EOFError:
                raise BenchmarkFailedError(f"rank {rank} died without a word; was it killed for memory?") from None
            if kind == "says":
                say(content)
            elif kind == "failed":
                raise BenchmarkFailedError(f"rank {rank} failed:\n{content}")
            else:
                if rank == 0:
                    result = content
                del pipes[pipe]
    return result


def _rank_main(
    fn: RankFunction,
    rank: int,
    size: int,
    rendezvous: str,
    pipe: Connection,
    args: tuple[Any, ...],
    prepare: Callable[[int], None] | None,
) -> None:
    def say(line: str) -> None:
        if rank == 0:
            pipe.send(("says", line))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the terminal; it is the parent that stops us
    try:
        if prepare is not None:
            prepare(rank)
        # As torchrun does it: ranks that share a machine share its cores.
        os.environ["LOCAL_WORLD_SIZE"] = str(size)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
        if size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo",
                init_method=(Path(rendezvous) / "store").as_uri(),
                rank=rank,
                world_size=size,
                timeout=dt.timedelta(seconds=_PATIENCE_S),
            )
        result = fn(Group(rank, size, say), *args)
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except Exception:  # noqa: BLE001  (it is the parent that has to know, whatever it was)
        pipe.send(("failed", traceback.format_exc()))
    else:
        pipe.send(("done", result if rank == 0 else None))
