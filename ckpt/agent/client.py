"""The trainers' side of the agent: starting one per node, and talking to it.

Knows no live state: it hands out slots to capture into, and says what became of a save.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ckpt.agent.arena import MappedArena
from ckpt.agent.homes import make_home
from ckpt.agent.wire import SOCKET, Channel, Message, failure
from ckpt.collective import Collective
from ckpt.loading.node import NODE, boot
from ckpt.storage.compressing import Compress
from ckpt.storage.publish import Folder
from ckpt_formats.errors import ConfigurationError, RankError, SaveFailedError

START = 60.0
"""Seconds within which an agent has to start."""
ALLOCATE = 300.0
"""Seconds within which memory has to be made: a machine that has never used it may take its time."""
ANSWER = 60.0
"""Seconds within which an agent has to answer what needs no waiting."""
ASKED_EVERY = 10.0
"""Seconds after which somebody who waits asks again."""
SILENCE = 30.0
"""Seconds without an answer after which the agent counts as gone."""


Launcher = Callable[[], str]
"""Starts an agent on this node, in whatever way, and returns its address."""


class Slot(NamedTuple):
    """A slot of this rank's arena."""

    arena: str
    """The arena's path."""
    start: int
    """Where in it the slot begins."""
    view: memoryview
    """Up to the end of its last page."""


class AgentClient:
    """One rank's connection to the agent of its node. The agent notices when it breaks.

    Attributes:
        address: of the agent's socket.
        nodes: for each rank, the name of its node.
        pid: the agent's process.
    """

    def __init__(
        self, address: str, rank: int, nodes: Sequence[str] = ("",), mapped: Callable[[memoryview], None] | None = None
    ) -> None:
        self.address = address
        self.rank = rank
        self.nodes = nodes
        node = nodes[rank] if len(set(nodes)) > 1 else ""
        self._name = f"the agent of node {node}, which rank {rank} saves through," if node else "the agent"
        self._arena: MappedArena | None = None
        self._when_mapped = mapped
        self._asides: Channel | None = None
        self._left = False
        self._leaving = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._channel = stack.enter_context(contextlib.closing(Channel.connect(address, ANSWER, self._name)))
            self.pid = int(self._ask({"op": "hello", "rank": rank})["pid"])
            # closed by the agent, or with it, when no further save can be begun
            self._watch = stack.enter_context(contextlib.closing(Channel.connect(address, ANSWER, self._name)))
            self._watch.send({"op": "watch"})
            stack.pop_all()

    @classmethod
    def join(
        cls, group: Collective, launcher: Launcher, mapped: Callable[[memoryview], None] | None = None
    ) -> AgentClient:
        """Start an agent on every node, make them know each other, and connect every rank to its node's. Collective.

        Args:
            launcher: starts an agent on this node and returns its address.
            mapped: called with each arena's memory as soon as it can be captured into.

        Raises, on every rank:
            SaveFailedError: an agent does not start.
            RankError: the agents can't reach each other.
        """
        problem: BaseException | None = None
        identity = b""
        try:
            identity = json.dumps(_own_node()).encode()
        except ConfigurationError as error:
            problem = error
        plan = json.loads(group.exchange(identity, problem, _name_nodes))
        nodes: list[str] = plan["nodes"]
        secret = plan["secret"]
        node = nodes[group.rank]
        first = nodes.index(node) == group.rank
        client: AgentClient | None = None
        mine: Message = {}
        try:
            try:
                if first:
                    client = cls(launcher(), group.rank, nodes, mapped)
                    mine = {"address": client.address}
                    if group.rank == 0:
                        crew = {"node": node, "nodes": nodes, "secret": secret, "loopback": plan["one_machine"]}
                        mine |= client._ask({"op": "lead", **crew})
            except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
                problem = error
            where = json.loads(group.exchange(json.dumps(mine).encode(), problem, _joined))
            try:
                if client is None:
                    client = cls(where[nodes.index(node)]["address"], group.rank, nodes, mapped)
                elif group.rank:
                    leader = {"node": nodes[0], "hosts": where[0]["hosts"], "port": where[0]["port"]}
                    client._ask({"op": "follow", "node": node, "nodes": nodes, "secret": secret, "leader": leader})
            except Exception as error:  # noqa: BLE001 - as above
                problem = error
            group.agree(problem)
        except BaseException:
            if client is not None:
                client.close()
            raise
        if client is None:
            raise AssertionError("a rank that could not connect has failed")
        return client

    def alive(self) -> bool:
        """Whether saves can be begun: neither the agent of this node nor another has been lost. Never waits."""
        if self._channel.fileno() < 0:
            return False  # it did not answer once
        if not os.path.exists(self.address):
            return False  # its folder was removed, so that nobody else reaches it
        poll = select.poll()
        # an agent that dies hangs up on one connection after the other
        poll.register(self._channel.fileno(), select.POLLHUP)
        poll.register(self._watch.fileno(), select.POLLIN)
        return not poll.poll(0)

    def slot(self, nbytes: int, memory: int | None, timeout: float) -> Slot | None:
        """Free memory for so many bytes; None if none is given back in time.

        With `memory`, the arena is exactly so large, whatever is captured; else larger than what is asked for, and
        another one when that grows.
        """
        answer = self._from_arena({"op": "slot", "bytes": nbytes, "memory": memory}, timeout)
        if answer["slot"] is None:
            return None
        arena = self._mapped(answer["arena"])
        return Slot(arena.path, answer["slot"], arena.view(answer["slot"], nbytes))

    def reserve(self, nbytes: int, memory: int | None) -> None:
        """Have the arena made, as large as `slot` with the same arguments would, so that that need not wait."""
        self._mapped(self._from_arena({"op": "reserve", "bytes": nbytes, "memory": memory}, 0.0)["arena"])

    def _from_arena(self, message: Message, timeout: float) -> Message:
        """Ask for the arena, or for a slot in it for at most `timeout` seconds from when it is made.

        It is asked again and again, so that an agent that hangs is found out, and so that others may ask meanwhile.
        """
        made_by = time.monotonic() + ALLOCATE
        deadline: float | None = None
        while True:
            now = time.monotonic()
            left = timeout if deadline is None else max(0.0, deadline - now)
            waits = {"timeout": min(left, ASKED_EVERY), "patience": ASKED_EVERY}
            answer = self._ask({**message, **waits, "rank": self.rank}, 2 * ASKED_EVERY + SILENCE)
            if answer.get("making"):
                if now > made_by:
                    raise SaveFailedError(
                        f"memory for the captures of rank {self.rank} was not made within {ALLOCATE:.0f} s; declare "
                        "less with memory=…"
                    )
                continue
            deadline = deadline or now + timeout
            if left <= ASKED_EVERY or answer.get("slot") is not None or "slot" not in answer:
                return answer

    def _mapped(self, path: str) -> MappedArena:
        if self._arena is None or self._arena.path != path:
            self._arena = MappedArena(path)
            if self._when_mapped is not None:
                self._when_mapped(self._arena.all)
        return self._arena

    def begin(self, save: str, folder: Folder, world_size: int, contents: Message, *, node_local: bool = False) -> None:
        """Open a save; rank 0 does, before any rank captures. With `node_local`, each node has a folder of its own."""
        self._ask(
            {
                "op": "begin",
                "save": save,
                "path": folder.path,
                "made": list(folder.made),
                "world_size": world_size,
                "contents": contents,
                "node_local": node_local,
            }
        )

    def captured(
        self,
        save: str,
        slot: Slot,
        nbytes: int,
        files: list[Any],
        path: str,
        step: int | None,
        *,
        begin: int = 0,
        keep: bool = False,
        more: bool = False,
        compress: Compress = False,
        bandwidth: float | None = None,
    ) -> None:
        """Hand a filled slot to the agent, for the checkpoint in folder `path`.

        Args:
            nbytes: what lies in it, from byte `begin` of the slot on, at a page.
            files: the files that begin there, with their chunks.
            keep: whether the slot stays this rank's, for more will be handed over in it.
            more: whether more of the part will come, where this ends; until then, the rank is not done.
            compress, bandwidth: see ckpt.async_save.
        """
        self._ask(
            {
                "op": "piece" if more else "captured",
                "rank": self.rank,
                "save": save,
                "arena": slot.arena,
                "slot": slot.start,
                "begin": begin,
                "bytes": nbytes,
                "keep": keep,
                "files": files,
                "path": path,
                "step": step,
                "compress": compress,
                "bandwidth": bandwidth,
            }
        )

    def abandon(self, save: str, slot: Slot | None, error: BaseException) -> None:
        """Say that this rank can't capture its part: the save fails."""
        message = {"op": "abandon", "rank": self.rank, "save": save, "why": str(error), "kind": type(error).__name__}
        if slot is not None:
            message |= {"arena": slot.arena, "slot": slot.start}
        self._ask(message)

    def release(self, slot: Slot) -> None:
        """Give a slot back that was not filled."""
        self._ask({"op": "release", "arena": slot.arena, "slot": slot.start})

    def wait(self, save: str, until: str, timeout: float) -> Message:
        """What became of a save, when it is captured by all ranks or over, or the time is up.

        Over a connection of its own, so that several threads can wait. Raises RankError if the agent is gone or hangs.
        """
        channel = Channel.connect(self.address, ANSWER, self._name)
        deadline = time.monotonic() + timeout
        try:
            while True:
                # asked again and again, so that one that hangs is found out
                left = max(0.0, deadline - time.monotonic())
                message = {"op": "wait", "save": save, "until": until, "timeout": min(left, ASKED_EVERY)}
                status = channel.ask(message, min(left, ASKED_EVERY) + SILENCE)
                if left <= ASKED_EVERY or status.get("error") or status["committed"] or status[until]:
                    return status
        finally:
            channel.close()

    def aftermath(self) -> Message:
        """How far the agent is with what it does after commits; empty if it does nothing, or does not answer."""
        try:
            asides = self._asides
            if asides is None or asides.fileno() < 0:
                asides = Channel.connect(self.address, ANSWER, self._name)
                with self._leaving:
                    self._asides = asides
                    if self._left:
                        # another thread has left meanwhile
                        asides.close()
            return dict(asides.ask({"op": "aftermath"}, SILENCE)["aftermath"])
        except RankError:
            return {}

    def close(self) -> None:
        """Leave: the agent ends when all have left and everything is written."""
        self._channel.close()
        self._watch.close()
        with self._leaving:
            self._left = True
            if self._asides is not None:
                self._asides.close()
        # handles of saves refer to this, and would keep the memory
        self._arena = None

    def _ask(self, message: Message, timeout: float = ANSWER) -> Message:
        answer = self._channel.ask(message, timeout)
        if "error" in answer:
            raise failure(answer)
        return answer


def launch(module: str = "ckpt.agent.main", arguments: Sequence[str] = (), keep_open: Sequence[int] = ()) -> str:
    """Start an agent on this node in a session of its own. Returns its address.

    Args:
        module: its main program, which calls ckpt.agent.main.serve.
        arguments: what it gets behind those of ckpt.agent.main.add_arguments.
        keep_open: file descriptors that it inherits under the same numbers.

    Raises:
        SaveFailedError: it did not start in time.
    """
    home, lock = make_home()
    ready, other_end = os.pipe()
    try:
        with open(os.path.join(home, "log"), "wb") as log:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, and arguments of our own
                # -P: modules are found where this process finds them, not also in the folder where it happens to be
                [sys.executable, "-P", "-m", module, "--home", home, "--ready", str(other_end), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[other_end, lock, *keep_open],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        os.close(other_end)
        other_end = -1
        # select() knows no descriptors above 1023, and trainings may have more open
        answer = select.poll()
        answer.register(ready, select.POLLIN)
        if not answer.poll(START * 1000) or os.read(ready, 1) != b"1":
            process.kill()
            process.wait()
            with open(os.path.join(home, "log"), encoding="utf-8", errors="replace") as log_text:
                last = log_text.read().strip().splitlines()[-1:]
            shutil.rmtree(home, ignore_errors=True)
            raise SaveFailedError(f"the agent did not start: {' '.join(last) or 'no answer'}; ckpt.save needs none")
    finally:
        os.close(lock)
        os.close(ready)
        if other_end >= 0:
            os.close(other_end)
    threading.Thread(target=_reap, args=(process, home), name="ckpt-agent-reaper", daemon=True).start()
    return os.path.join(home, SOCKET)


def _reap(process: subprocess.Popen[bytes], home: str) -> None:
    """When an agent ends, should this process live that long: if it was killed, its memory is still there."""
    process.wait()
    shutil.rmtree(home, ignore_errors=True)


_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a node's name may be: it may be a part of paths."""


def _own_node() -> list[str]:
    """What tells this node from others, its name, and its machine."""
    named = os.environ.get(NODE, "")
    if named and not _NODE.fullmatch(named):
        raise ConfigurationError(
            f"the environment variable {NODE} is {named!r}, which is no name of a node: use letters, digits and . _ -"
        )
    host = socket.gethostname()
    machine = f"{host} {boot()}"
    return [named or machine, named or re.sub(r"[^A-Za-z0-9._-]", "-", host)[:64] or "node", boot() or host]


def _name_nodes(payloads: list[bytes]) -> bytes:
    """On rank 0: a name for each rank's node, no two alike, and a secret for their agents."""
    given: dict[str, str] = {}
    nodes, machines = [], set()
    for payload in payloads:
        identity, name, machine = json.loads(payload)
        if identity not in given:
            number = sum(other == name or other.startswith(f"{name}~") for other in given.values())
            given[identity] = f"{name}~{number + 1}" if number else name
        nodes.append(given[identity])
        machines.add(machine)
    return json.dumps({"nodes": nodes, "secret": secrets.token_hex(32), "one_machine": len(machines) == 1}).encode()


def _joined(payloads: list[bytes]) -> bytes:
    return b"[" + b",".join(payloads) + b"]"
