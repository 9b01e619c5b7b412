"""Run a function as the ranks of a real process group: real processes, real gloo, nothing left behind.

Ranks are forked from one server process that has imported torch, so a world of four starts in a fraction of a second.
This module knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

# What each rank would otherwise import itself, every time. torch._dynamo is what the first optimizer imports.
_PRELOADED = [
    "pytest",
    "hypothesis",
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "ckpt.api",
]
_SERVER_START_S = 180.0
# After the first failure, how long the others have to fail too, as they do when they wait for the one that did.
_GRACE_S = 2.0
_STACK_WAIT_S = 2.0


@dataclass(frozen=True)
class Killed:
    """Stands in the place of the result of a rank that a signal killed, where the caller allows deaths."""

    signal: signal.Signals


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, allow_death: bool = False
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` processes that share a gloo process group.

    Returns what each rank returned, in rank order. `fn` is a function at a module's top level; its arguments and
    results are pickled. Each rank runs one thread per operation, in a session of its own, with the caller's
    environment variables and working folder.

    With `allow_death`, the result of a rank that dies by a signal is `Killed(signal)`, and the others go on; else its
    death is a failure.

    Raises AssertionError, once no process is left, when a rank raises (with the traceback of every rank that did),
    dies, or is not done after `timeout` seconds (with the stack of each Python thread of every rank still there).
    """
    payload = pickle.dumps((fn, args, dict(os.environ), timeout))
    context = _fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks: list[_Rank] = []
        try:
            ranks.extend(_start(context, index, world_size, payload, folder) for index in range(world_size))
            _wait(ranks, time.monotonic() + timeout, allow_death=allow_death)
            _raise_failures(ranks, folder, timeout)
        finally:
            for rank in ranks:
                rank.kill()
        return [rank.result for rank in ranks]


# --- the caller's side ---


@dataclass(eq=False)
class _Rank:
    """One rank's process, as its starter sees it."""

    index: int
    process: ForkServerProcess
    messages: connection.Connection
    result: Any = None
    failure: str | None = None
    listening: bool = True
    answered: bool = False
    ended: bool = False
    failed_at: float = field(default=float("inf"))

    def fail(self, text: str) -> None:
        self.failure = text
        self.failed_at = time.monotonic()

    def receive(self) -> None:
        """Take the rank's answer, or note that none will come."""
        if not self.listening or not self.messages.poll():
            return
        self.listening = False
        try:
            ok, value = pickle.loads(self.messages.recv_bytes())
        except (EOFError, OSError):  # it died without an answer, or in the middle of it
            return
        self.answered = True
        if ok:
            self.result = value
        else:
            self.fail(value)

    def reap(self, *, allow_death: bool) -> None:
        """Note how the rank's process ended."""
        self.receive()
        self.process.join()
        self.ended = True
        code = self.process.exitcode or 0
        if self.failure is not None or (self.answered and code == 0):
            return
        if code < 0 and allow_death:
            self.result = Killed(signal.Signals(-code))
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self.fail(f"its process {how} {'after' if self.answered else 'without'} an answer\n")

    def kill(self) -> None:
        """End the rank's process and whatever it has started."""
        pid = self.process.pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.process.kill()  # it may not have had the time to make a session of its own
        self.process.join()
        self.messages.close()


def start_server() -> ForkServerContext:
    """Start the server that ranks are forked from, if it does not run, and do not wait for what it imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()
    return context


@functools.cache
def _fork_server() -> ForkServerContext:
    """The server that ranks are forked from, when it has imported what they need."""
    context = start_server()
    first = context.Process(target=_nothing, name="fork server's first")
    first.start()
    first.join(_SERVER_START_S)
    if first.exitcode != 0:
        first.kill()
        raise AssertionError(
            f"the fork server did not start within {_SERVER_START_S:.0f} s (exit code {first.exitcode})"
        )
    return context


def _start(context: ForkServerContext, index: int, world_size: int, payload: bytes, folder: Path) -> _Rank:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_rank_main, args=(index, world_size, payload, str(folder), sending), name=f"rank {index}"
    )
    process.start()
    sending.close()
    return _Rank(index, process, receiving)


def _wait(ranks: list[_Rank], deadline: float, *, allow_death: bool) -> None:
    """Wait until every rank has ended, one has failed and the others had their grace, or the time is up."""
    while running := [rank for rank in ranks if not rank.ended]:
        limit = min([deadline, *(rank.failed_at + _GRACE_S for rank in ranks)])
        watched: list[Any] = [rank.process.sentinel for rank in running]
        watched += [rank.messages for rank in running if rank.listening]
        ready = connection.wait(watched, max(0.0, limit - time.monotonic()))
        if not ready:
            return
        for rank in running:
            if rank.process.sentinel in ready:
                rank.reap(allow_death=allow_death)
            else:
                rank.receive()


def _raise_failures(ranks: list[_Rank], folder: Path, timeout: float) -> None:
    failed = sorted((rank for rank in ranks if rank.failure is not None), key=lambda rank: rank.failed_at)
    running = [rank for rank in ranks if not rank.ended and rank.failure is None]
    if not failed and not running:
        return
    lines = []
    for position, rank in enumerate(failed):
        lines.append(f"rank {rank.index} failed{' first' if position == 0 and len(failed) > 1 else ''}: {rank.failure}")
    if failed:
        lines += [f"rank {rank.index} was still running, and was stopped\n" for rank in running]
    else:
        lines.append(f"not done after {timeout:g} s: {', '.join(f'rank {rank.index}' for rank in running)}\n")
        stacks = _dump_stacks(running, folder)
        lines += [f"rank {rank.index} stands at:\n{stack}" for rank, stack in zip(running, stacks, strict=True)]
    raise AssertionError("\n".join([f"{len(failed) or len(running)} of {len(ranks)} ranks failed", *lines]))


def _dump_stacks(ranks: list[_Rank], folder: Path) -> list[str]:
    """Ask each rank for the stacks of its threads, and wait a little for those that can answer."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid or 0, signal.SIGUSR1)
    files = [_stack_file(folder, rank.index) for rank in ranks]
    until = time.monotonic() + _STACK_WAIT_S
    sizes = [-1] * len(files)
    while time.monotonic() < until:
        before, sizes = sizes, [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes == before and all(sizes):
            break
        time.sleep(0.05)
    texts = [file.read_text() if file.exists() else "" for file in files]
    return [text or "(it does not answer: frozen, or not yet started)\n" for text in texts]


# --- the rank's side ---


def _nothing() -> None:
    """The fork server's first child: it runs once everything is imported."""


def _rank_main(index: int, world_size: int, payload: bytes, folder: str, answers: connection.Connection) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, name="die with parent", daemon=True).start()
    with _stack_file(Path(folder), index).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        try:
            answer = pickle.dumps((True, _call(index, world_size, payload, folder)))
        except BaseException:  # noqa: BLE001 - whatever it was, the caller must hear of it
            answer = pickle.dumps((False, traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        answers.send_bytes(answer)
        answers.close()
        faulthandler.unregister(signal.SIGUSR1)


def _call(index: int, world_size: int, payload: bytes, folder: str) -> Any:
    import torch
    from torch import distributed

    fn, args, environment, timeout = pickle.loads(payload)
    os.environ.clear()
    # The loopback interface, whatever this machine's name resolves to.
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.update(environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback})
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder, "store")), world_size)
    patience = timedelta(seconds=timeout + 60)  # longer than the caller's, whose report shows every stack
    distributed.init_process_group("gloo", store=store, rank=index, world_size=world_size, timeout=patience)
    if world_size > 1:
        # who has joined could be gone already, or dead, while another still connects to it, which would then fail
        store.set(f"joined/{index}", b"")
        store.wait([f"joined/{rank}" for rank in range(world_size)], patience)
    result = fn(index, world_size, *args)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return result


def _die_with_parent() -> None:
    """End this rank and what it has started when the process that asked for it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpid(), signal.SIGKILL)


def _stack_file(folder: Path, index: int) -> Path:
    return folder / f"rank{index}.stacks"
