"""Agents that are watched: forked from the trainer that launches them, which takes a hundredth of a second.

Such an agent tells each of its system calls and messages to a file, and comes to the harm that it was given.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - an agent's first connection has it imported, which a fork may have begun and never ends
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ckpt.agent import client, following, leading, peers, server, writing
from tests.crash.operations import Fault, Spot, Watch
from tests.crash.runs import WINDOW
from tests.crash.syscalls import unwatch, watch_channels, watch_process

LINGER = 0.05
"""Seconds that a watched agent stays when there is nobody and nothing left."""
STARTUP = 2.0
"""Seconds that it waits for its first trainer."""
LIFE = 20.0
"""Seconds after which one is taken to hang, and writes to its log where its threads stand."""
_Popen = subprocess.Popen


@dataclass
class Agents:
    """What becomes of the agents that this process launches from now on.

    Attributes:
        root: the folder below which system calls are watched.
        faults: what the next agent comes to; one or two.
        told: where it writes the spots that it comes to.
        reads: whether reading calls are watched, too.
        homes: a file that gets the folder of each agent, a line for each.
        watch: what watches them instead of all this; for None, and without a root, nothing does.
    """

    root: str
    faults: Sequence[Fault] = ()
    told: str | None = None
    reads: bool = False
    homes: str | None = None
    watch: Watch | None = None
    running: list[_Forked] = field(default_factory=list)

    def install(self) -> None:
        """Fork agents instead of starting interpreters."""

        def popen(command: Sequence[str], **options: Any) -> Any:
            if "-m" not in command[:3] or not command[(module := command.index("-m") + 1)].startswith("ckpt."):
                return _Popen(command, **options)
            if self.homes is not None:
                with open(self.homes, "a", encoding="utf-8") as homes:
                    homes.write(command[command.index("--home") + 1] + "\n")
            forked = _Forked(self, command[module:], options)
            self.running.append(forked)
            return forked

        setattr(subprocess, "Popen", popen)  # noqa: B010

    def ended(self, seconds: float = 30.0) -> None:
        """Wait until all of them have ended; those that are frozen, or will be, are ended."""
        deadline = time.monotonic() + seconds
        for forked in self.running:
            while forked.poll() is None:
                if forked.frozen():
                    forked.kill()
                assert time.monotonic() < deadline, f"the agent in process {forked.pid} does not end:\n{forked.log()}"
                time.sleep(0.005)
        self.running.clear()

    def become(self, command: Sequence[str], options: dict[str, Any]) -> None:
        """In the forked process: be the agent."""
        # what the trainer has left to collect stays: a process group would wait there for threads that no fork has
        gc.freeze()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            given = options.get(stream)
            os.dup2(given.fileno() if hasattr(given, "fileno") else null, number)
        _shut_all_but({0, 1, 2, null, *options["pass_fds"]}, null)
        os.environ.clear()
        os.environ.update(options["env"])
        for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        unwatch()
        faulthandler.dump_traceback_later(LIFE, repeat=True)
        server.LINGER = LINGER
        server.STARTUP = STARTUP
        for module in (writing, server):
            if hasattr(module, "BUFFER"):
                module.BUFFER = WINDOW
        if self.root:
            watch = self.watch or self._faulty()
            watch_process(watch, reads=self.reads)
            watch_channels(watch)
        sys.argv = list(command)
        import_module(command[0]).main()

    def _faulty(self) -> Watch:
        watch = Watch(*self.faults[:1], root=self.root)
        watch.second = self.faults[1] if len(self.faults) > 1 else None
        if self.told is not None:
            trace = os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            watch.tell = lambda spot: _tell(trace, spot)
        return watch


def short_waits() -> None:
    """Have this process, and agents that it forks, wait for each other for seconds where they would for minutes."""
    waits = {
        client: {"ANSWER": 2.0, "ASKED_EVERY": 0.5, "SILENCE": 2.0},
        following: {"ANSWER": 4.0, "LOSE": 1.0},
        leading: {"BEGIN": 3.0, "PUBLISH": 3.0},
        peers: {"PING": 0.3, "SILENCE": 2.0, "HANDSHAKE": 2.0},
    }
    for module, constants in waits.items():
        for name, seconds in constants.items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, seconds)
    client.AgentClient._ask.__defaults__ = (client.ANSWER,)


def _tell(trace: int, spot: Spot) -> None:
    os.write(trace, json.dumps(spot).encode() + b"\n")


def spots(told: str | os.PathLike[str]) -> list[Spot]:
    """What an agent came to."""
    return [Spot(*json.loads(line)) for line in Path(told).read_text().splitlines()]


def _shut_all_but(kept: set[int], null: int) -> None:
    """Let go of what the trainer has open. The numbers stay taken: its objects, which this process has inherited, close
    them whenever they are collected, and would close what is the agent's by then.
    """
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.fstat(int(name))
                os.dup2(null, int(name))


class _Forked:
    """As much of a Popen as launching an agent needs."""

    def __init__(self, agents: Agents, command: Sequence[str], options: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self._home = command[list(command).index("--home") + 1]
        # as an interpreter that is started inherits it; a fork gives up what is the trainer's
        inherited = {fd: os.dup(fd) for fd in options["pass_fds"]}
        self.pid = os.fork()
        if self.pid:
            for copy in inherited.values():
                os.close(copy)
            return
        code = 1
        try:
            for fd, copy in inherited.items():
                os.dup2(copy, fd)
            agents.become(command, options)
            code = 0
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent would
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def log(self) -> str:
        """The end of what it wrote there."""
        with contextlib.suppress(OSError):
            return Path(self._home, "log").read_text()[-10_000:]
        return ""

    def frozen(self) -> bool:
        """Whether it is stopped by a signal."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False  # another thread waits for it, too
        return stat.rpartition(")")[2].split()[0] == "T"

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the agent", timeout or 0.0)
            time.sleep(0.005)
        return self.returncode or 0

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
