"""A node of the demo's cluster: a Ray actor that forks workers, watches them, and stops them.

Workers are forked from one server process that has imported torch, so they start in a few hundredths of a second. This
module is imported by Ray's own processes too and stays free of torch. It knows nothing of what its workers do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from ckpt_cli.demo.protocol import Event, Reporter, Task

_WORK = "ckpt_cli.demo.worker"
_START_LIMIT_S = 120.0
# One thread per worker: four of them share what may be two cores. Sockets on loopback: nothing here leaves the machine.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
}


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker as its node sees it."""

    rank: int
    process: ForkServerProcess
    pipe: connection.Connection
    listening: bool = True


class Node:
    """Runs the workers of one node. Calls come from the driver, by Ray; `stop` may come while `events` waits."""

    def __init__(self) -> None:
        os.environ.update(_ENVIRONMENT)
        # Workers would otherwise run the script that Ray started this process with, which imports all of Ray.
        if hasattr(sys.modules["__main__"], "__file__"):
            del sys.modules["__main__"].__file__
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([_WORK])
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Start the server process and wait until it has imported what workers need."""
        process = self._context.Process(target=os.getpid, daemon=True)
        process.start()
        process.join(_START_LIMIT_S)
        if process.exitcode != 0:
            process.kill()
            raise TimeoutError(f"the process that workers are forked from was not ready after {_START_LIMIT_S:.0f} s")

    def start(self, tasks: list[Task]) -> dict[int, int]:
        """Start a worker for each task. Returns the process id of each rank."""
        started = {}
        for task in tasks:
            receiver, sender = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_begin, args=(task, sender), name=f"rank {task.rank}", daemon=True)
            process.start()
            sender.close()
            with self._lock:
                self._workers.append(_Worker(task.rank, process, receiver))
            started[task.rank] = process.pid or 0
        return started

    def events(self, limit_s: float) -> list[Event]:
        """What the workers have reported and which have ended. Waits for that, at most `limit_s` seconds."""
        watched: dict[object, _Worker] = {}
        for worker in self._workers:
            watched[worker.process.sentinel] = worker
            if worker.listening:
                watched[worker.pipe] = worker
        if not watched:
            time.sleep(limit_s)
            return []
        events = []
        for ready in connection.wait(list(watched), limit_s):  # type: ignore[arg-type]
            worker = watched[ready]
            events += _receive(worker)
            if ready == worker.process.sentinel:
                worker.process.join()
                worker.pipe.close()
                with self._lock:
                    self._workers.remove(worker)
                events.append(Event("exited", worker.rank, time.monotonic(), {"code": worker.process.exitcode}))
        return events

    def stop(self) -> None:
        """Kill every worker that is left. `events` will tell of each one's end."""
        with self._lock:
            for worker in self._workers:
                worker.process.kill()


def _receive(worker: _Worker) -> list[Event]:
    """All that the worker's pipe holds."""
    events = []
    try:
        while worker.listening and worker.pipe.poll():
            events.append(worker.pipe.recv())
    except (EOFError, OSError):  # it has ended, perhaps in the middle of a report
        worker.listening = False
    return events


# --- in the worker's process ---


def _begin(task: Task, pipe: connection.Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; the driver stops these
    _die_with_node()
    _redirect_output(task.log)
    report = Reporter(task.rank, pipe)
    report("up")
    try:
        from ckpt_cli.demo.worker import work

        work(task, report)
    except Exception as error:  # noqa: BLE001 - told to the driver; the stack is in the log
        traceback.print_exc()
        sys.stderr.flush()
        report("failed", message=f"{type(error).__name__}: {error}")
        os._exit(1)  # a thread of the process group may be waiting for a rank that is gone


def _die_with_node() -> None:
    """End this process when its node's process has ended, however that came about."""
    node = parent_process()
    if node is None:
        raise RuntimeError("a worker is started by its node")

    def watch() -> None:
        connection.wait([node.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-node", daemon=True).start()


def _redirect_output(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
