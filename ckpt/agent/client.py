"""The trainers' side of the agent: starting one per node, and talking to it.

Knows no live state: it hands out slots to capture into, and says what became of a save.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ckpt.agent.arena import MappedArena
from ckpt.agent.main import SOCKET
from ckpt.agent.wire import Channel, Message
from ckpt.collective import Collective
from ckpt.storage.publish import Folder
from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError, RankError, SaveFailedError

SLOTS = 3
"""Captures of a rank that are kept at once: one is filled, one is written, one is spare."""
START = 60.0
"""Seconds within which an agent has to start."""
ANSWER = 60.0
"""Seconds within which an agent has to answer what needs no waiting."""
MEMORY = "/dev/shm"  # noqa: S108 - a folder of our own is made in it, which only this user can enter
"""Where arenas lie; the temporary folder where there is no such file system."""


Launcher = Callable[[], str]
"""Starts an agent on this node, in whatever way, and returns its address."""


class Slot(NamedTuple):
    """A slot of this rank's arena."""

    arena: str
    """The arena's path."""
    number: int
    view: memoryview


class AgentClient:
    """One rank's connection to the agent of its node. The agent notices when it breaks."""

    def __init__(self, address: str, rank: int) -> None:
        self.address = address
        self.rank = rank
        self._arena: MappedArena | None = None
        self._channel = Channel.connect(address, ANSWER)
        self.pid = int(self._ask({"op": "hello", "rank": rank})["pid"])

    @classmethod
    def join(cls, group: Collective, launcher: Launcher) -> AgentClient:
        """Start an agent on this node, once, and connect every rank to it. Collective.

        Args:
            launcher: starts an agent on this node and returns its address.

        Raises:
            SaveFailedError: it does not start, or the ranks are on several nodes, which is not supported yet.
        """
        failure: BaseException | None = None
        mine = b""
        try:
            host = f"{socket.gethostname()} {_boot()}"
            mine = json.dumps([host, launcher() if group.rank == 0 else ""]).encode()
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            failure = error

        def address(payloads: list[bytes]) -> bytes:
            hosts = [json.loads(payload) for payload in payloads]
            for rank, (host, _) in enumerate(hosts):
                if host != hosts[0][0]:
                    raise SaveFailedError(
                        f"rank {rank} is on another node than rank 0; async_save works on one node for now, "
                        "ckpt.save on any number",
                        rank=rank,
                    )
            return str(hosts[0][1]).encode()

        return cls(group.exchange(mine, failure, address).decode(), group.rank)

    def slot(self, nbytes: int, timeout: float) -> Slot | None:
        """A free slot of at least so many bytes; None if none is given back in time."""
        message = {"op": "slot", "rank": self.rank, "bytes": nbytes, "slots": SLOTS, "timeout": timeout}
        answer = self._ask(message, timeout + ANSWER)
        if answer["slot"] is None:
            return None
        if self._arena is None or self._arena.path != answer["arena"]:
            self._arena = MappedArena(answer["arena"], answer["slot_bytes"])
        return Slot(answer["arena"], answer["slot"], self._arena.view(answer["slot"]))

    def begin(self, save: str, folder: Folder, world_size: int, contents: Message) -> None:
        """Open a save; rank 0 does, before any rank captures."""
        self._ask(
            {
                "op": "begin",
                "save": save,
                "path": folder.path,
                "made": list(folder.made),
                "world_size": world_size,
                "contents": contents,
            }
        )

    def captured(self, save: str, slot: Slot, files: list[Any]) -> None:
        """Hand a filled slot to the agent, with what lies in it."""
        self._ask(
            {
                "op": "captured",
                "rank": self.rank,
                "save": save,
                "arena": slot.arena,
                "slot": slot.number,
                "files": files,
            }
        )

    def abandon(self, save: str, slot: Slot | None, error: BaseException) -> None:
        """Say that this rank can't capture its part: the save fails."""
        message = {"op": "abandon", "rank": self.rank, "save": save, "why": str(error), "kind": type(error).__name__}
        if slot is not None:
            message |= {"arena": slot.arena, "slot": slot.number}
        self._ask(message)

    def release(self, slot: Slot) -> None:
        """Give a slot back that was not filled."""
        self._ask({"op": "abandon", "rank": self.rank, "save": "", "arena": slot.arena, "slot": slot.number})

    def wait(self, save: str, until: str, timeout: float) -> Message:
        """What became of a save, when it is captured by all ranks or over, or the time is up.

        Over a connection of its own, so that several threads can wait.
        """
        channel = Channel.connect(self.address, ANSWER)
        try:
            return channel.ask({"op": "wait", "save": save, "until": until, "timeout": timeout}, timeout + ANSWER)
        finally:
            channel.close()

    def close(self) -> None:
        """Leave: the agent ends when all have left and everything is written."""
        self._channel.close()

    def _ask(self, message: Message, timeout: float = ANSWER) -> Message:
        answer = self._channel.ask(message, timeout)
        if "error" in answer:
            raise failure(answer)
        return answer


def failure(answer: Message) -> CheckpointError:
    """The error that an answer tells of."""
    kind = answer.get("kind", "")
    known = getattr(errors, kind, RankError) if kind in errors.__all__ else SaveFailedError
    error: CheckpointError = known(answer["error"])
    return error


def launch(module: str = "ckpt.agent.main", arguments: Sequence[str] = (), keep_open: Sequence[int] = ()) -> str:
    """Start an agent on this node in a session of its own. Returns its address.

    Args:
        module: its main program, which calls ckpt.agent.main.serve.
        arguments: what it gets behind those of ckpt.agent.main.add_arguments.
        keep_open: file descriptors that it inherits under the same numbers.

    Raises:
        SaveFailedError: it did not start in time.
    """
    shared = MEMORY if os.access(MEMORY, os.W_OK) else tempfile.gettempdir()
    home = tempfile.mkdtemp(prefix=f"ckpt-agent-{os.getuid()}-", dir=shared)
    ready, other_end = os.pipe()
    try:
        with open(os.path.join(home, "log"), "wb") as log:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, and arguments of our own
                [sys.executable, "-m", module, "--home", home, "--ready", str(other_end), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[other_end, *keep_open],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        os.close(other_end)
        other_end = -1
        answered, _, _ = select.select([ready], [], [], START)
        if not answered or os.read(ready, 1) != b"1":
            process.kill()
            process.wait()
            with open(os.path.join(home, "log"), encoding="utf-8", errors="replace") as log_text:
                last = log_text.read().strip().splitlines()[-1:]
            shutil.rmtree(home, ignore_errors=True)
            raise SaveFailedError(f"the agent did not start: {' '.join(last) or 'no answer'}; ckpt.save needs none")
    finally:
        os.close(ready)
        if other_end >= 0:
            os.close(other_end)
    # reaped when it ends, should this process live that long
    threading.Thread(target=process.wait, name="ckpt-agent-reaper", daemon=True).start()
    return os.path.join(home, SOCKET)


def _boot() -> str:
    """What tells two nodes with the same name apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""
