"""The agent that commits: what it knows of each save, and what it tells the other nodes' agents.

A save is committed when every rank's part is on stable storage, whoever has died by then; it fails when a rank ended
before its part was captured, or an agent before its ranks' parts were written. Nobody but this agent decides, so
that whoever does not hear of its decision keeps what he wrote.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt import network
from ckpt.agent import peers
from ckpt.agent.aftermath import Aftermath, Committed
from ckpt.agent.crew import KEPT, Crew, Past, ranks_text
from ckpt.agent.wire import BLOBS, Channel, Message
from ckpt.events import Operation, Phase
from ckpt.events.json_lines import as_json
from ckpt.saving.commit import Contents, Part, commit
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, discard, is_linked, remove_folders
from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError, RankError
from ckpt_formats.native import names
from ckpt_formats.native.reader import read_root

BEGIN = 60.0
"""Seconds that another rank's part waits for rank 0 to open the save."""
PUBLISH = 120.0
"""Seconds that a commit waits until the other nodes have the root too, on node-local disks."""

_FOLDERS = (names.DATA, names.INDEX)

log = logging.getLogger("ckpt.agent")


@dataclass(slots=True)
class Save:
    """One save, as the leading agent knows it."""

    attempt: str
    world_size: int
    folder: Folder
    operation: Operation
    """What it tells of itself: the phases of this node's ranks, and the commit."""
    contents: Contents | None
    """Until it is over."""
    node_local: bool
    """Whether each node has a folder of its own."""
    events: list[Message]
    """What the operation has told so far, for the sinks of rank 0's process."""
    captured: set[int] = field(default_factory=set)
    prepared: set[int] = field(default_factory=set)
    parts: dict[int, Part] = field(default_factory=dict)
    """What those ranks wrote; forgotten when the save is over, for the index of a large save is large itself."""
    failing: bool = False
    """It is decided that it fails, and what was written for it is being removed."""
    error: str | None = None
    kind: str = ""
    """The error's class."""
    committed: bool = False
    linked: bool = False
    """The manifest has its name: also that of a save that fails later nobody takes back."""
    unpublished: set[str] = field(default_factory=set)
    """Nodes that do not have the root yet, once it is committed."""
    bytes: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        return self.committed or self.error is not None


class Leader:
    """See Committer. Several agents of one run: `listen` lets the others connect."""

    def __init__(
        self, crew: Crew, files: Files, aftermath: Aftermath, broken: Callable[[], None] = lambda: None
    ) -> None:
        """`broken` is called when another agent is lost: no further save can be done with this crew."""
        self._crew = crew
        self._files = files
        self._aftermath = aftermath
        self._broken = broken
        self._changed = threading.Condition()
        self._saves: OrderedDict[str, Save] = OrderedDict()
        self._past = Past()
        self._refused: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Why saves that are not open yet will fail: why, and the error's class."""
        self._gone: set[int] = set()
        """Ranks that have ended."""
        self._lost: set[str] = set()
        """Nodes whose agents are gone."""
        self._news: dict[str, peers.News] = {}
        self._listener: socket.socket | None = None

    # the other agents

    def listen(self, secret: bytes, *, loopback: bool) -> int:
        """Let the other agents connect. Returns the port."""
        self._listener = listener = network.listen(loopback=loopback)
        threading.Thread(target=self._accept, args=(listener, secret), name="ckpt-agent-peers", daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, secret: bytes) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection, secret), name="ckpt-agent-peer", daemon=True).start()

    def _admit(self, connection: socket.socket, secret: bytes) -> None:
        try:
            channel, node, purpose = peers.admit(connection, secret, self._crew.node)
        except OSError as error:
            log.warning("a connection from outside was refused: %s", error)
            return
        if purpose == "news":
            news = peers.News(channel, lambda error: self._lose(node, str(error)))
            with self._changed:
                self._news[node] = news
            # what this agent tells from now on arrives
            news.tell({"op": "welcome"})
        else:
            self._answer(channel, node)

    def _answer(self, channel: Channel, node: str) -> None:
        """Answer another agent's requests until it leaves."""
        channel.wait_at_most(None)
        try:
            while (message := channel.receive()) is not None:
                try:
                    answer = self._do(node, message)
                except (CheckpointError, OSError) as error:
                    answer = {"error": str(error), "kind": type(error).__name__}
                channel.send(answer)
            why = "has ended"
        except OSError as error:
            why = f"is gone ({error.strerror or error})"
        channel.close()
        self._lose(node, f"the agent of node {node} {why}")

    def _do(self, node: str, message: Message) -> Message:
        match message["op"]:
            case "captured":
                self.captured(message["save"], int(message["rank"]))
                save = self._known(message["save"])
                return {"outcome": self._outcome(save) if save.over else None}
            case "prepared":
                self.prepared(message["save"], int(message["rank"]), Part.decode(message[BLOBS][0]))
            case "failed":
                self.failed(message["save"], message["why"], message["kind"])
            case "left":
                self.left(int(message["rank"]))
            case "published":
                self._published(message["save"], node, message["why"])
            case _:
                return {"status": self.wait(message["save"], "committed", 0.0)}
        return {}

    def _tell(self, message: Message, nodes: list[str] | None = None) -> None:
        """Tell all other nodes, or some."""
        with self._changed:
            news = [self._news[node] for node in (self._news if nodes is None else nodes) if node in self._news]
        for peer in news:
            peer.tell(message)

    def _lose(self, node: str, why: str) -> None:
        """Another agent is gone, in good order or not: what its ranks have not written will never be."""
        with self._changed:
            if node in self._lost:
                return
            self._lost.add(node)
            ranks = set(self._crew.ranks(node))
            lost = [save for save in self._saves.values() if not save.over and not ranks <= save.prepared]
            for save in self._saves.values():
                save.unpublished.discard(node)
            self._changed.notify_all()
        for save in lost:
            missing = ranks_text(ranks - save.prepared)
            self._fail(
                save,
                f"{save.folder.path}: {why}, before it had written the part of {missing} on node {node}; nothing was "
                "committed, and the next save starts agents anew",
                "RankError",
            )
        self._tell({"op": "broken"})
        self._broken()

    # Committer

    def begin(self, message: Message) -> None:
        """Open a save."""
        contents = message["contents"]
        world_size = int(message["world_size"])
        events: list[Message] = []
        save = Save(
            attempt=message["save"],
            world_size=world_size,
            folder=Folder(message["path"], message["made"]),
            operation=Operation(
                "save",
                message["path"],
                step=contents["step"],
                world_size=world_size,
                also=lambda event: events.append(as_json(event)),
            ),
            events=events,
            contents=Contents(
                step=contents["step"],
                tensors={name: (dtype, tuple(shape), cut) for name, (dtype, shape, cut) in contents["tensors"].items()},
                aliases=contents["aliases"],
                values=contents["values"],
                entries=contents["entries"],
                layout=contents["layout"],
                provenance=contents["provenance"],
            ),
            node_local=bool(message.get("node_local")),
        )
        with self._changed:
            self._saves[save.attempt] = save
            self._changed.notify_all()
            self._past.forget(self._saves)
            gone, lost = sorted(self._gone), sorted(self._lost)
            refused = self._refused.pop(save.attempt, None)
        why = f"the agent of node {', '.join(lost)} is gone" if lost else self._crew.ended(gone) if gone else ""
        if why:
            self._fail(save, f"{save.folder.path}: {why} before the save began; nothing was committed", "RankError")
            raise RankError(str(save.error), path=save.folder.path)
        if refused is not None:
            self._fail(save, *refused)

    def expect(self, attempt: str, path: str, step: int | None) -> None:  # noqa: ARG002 - known
        """See Committer."""
        self._begun(attempt)

    def captured(self, attempt: str, rank: int, path: str = "", step: int | None = None) -> None:  # noqa: ARG002 - known
        """See Committer."""
        save = self._begun(attempt)
        with self._changed:
            save.captured.add(rank)
            everyone = len(save.captured) == save.world_size
            self._changed.notify_all()
        if everyone:
            self._tell({"op": "captured", "save": attempt})

    def phase(self, attempt: str, rank: int) -> Phase:
        """See Committer."""
        return self._known(attempt).operation.phase("write", rank=rank)

    def prepared(self, attempt: str, rank: int, part: Part) -> None:
        """See Committer."""
        save = self._known(attempt)
        with self._changed:
            if save.over or save.failing:
                return
            save.prepared.add(rank)
            save.parts[rank] = part
            complete = len(save.parts) == save.world_size
        if complete:
            threading.Thread(target=self._commit, args=(save,), name="ckpt-agent-commit").start()

    def failed(self, attempt: str, why: str, kind: str) -> None:
        """See Committer."""
        with self._changed:
            save = self._saves.get(attempt)
            if save is None:
                # rank 0 may be about to open it
                self._refused[attempt] = (why, kind)
                while len(self._refused) > KEPT:
                    self._refused.popitem(last=False)
                return
        self._fail(save, why, kind)

    def failing(self, attempt: str) -> bool:
        """See Committer."""
        save = self._saves.get(attempt)
        return save is not None and save.failing

    def discard(self, attempt: str) -> None:
        """See Committer."""
        with contextlib.suppress(OSError):
            discard(self._files, self._known(attempt).folder, attempt)

    def left(self, rank: int) -> None:
        """See Committer."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()
            lost = [save for save in self._saves.values() if not save.over and rank not in save.captured]
        for save in lost:
            where = self._crew.where(rank)
            why = f"{save.folder.path}: rank {rank}{where} ended before its part of the save was captured"
            self._fail(save, why, "RankError")

    def wait(self, attempt: str, until: str, timeout: float) -> Message:
        """See Committer."""
        deadline = time.monotonic() + timeout
        with self._changed:
            past = self._past.status(attempt)
            if past is not None:
                return past
            self._changed.wait_for(lambda: attempt in self._saves or 0 in self._gone, min(timeout, BEGIN))
            save = self._known(attempt)
            while not (save.over or (until == "captured" and len(save.captured) == save.world_size)):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._status(save)

    def busy(self) -> bool:
        """See Committer."""
        with self._changed:
            return any(not save.over for save in self._saves.values())

    def close(self) -> None:
        """See Committer."""
        if self._listener is not None:
            self._listener.close()
        everyone = list(self._news.values())
        for news in everyone:
            news.end()
        deadline = time.monotonic() + peers.SILENCE
        for news in everyone:
            # until what was told is acknowledged, or the other end is lost
            news.join(max(0.0, deadline - time.monotonic()))

    # work

    def _begun(self, attempt: str) -> Save:
        """A save that rank 0 has opened, or will in a moment: it does not let the others wait for that."""
        with self._changed:
            self._changed.wait_for(lambda: attempt in self._saves or 0 in self._gone, BEGIN)
        return self._known(attempt)

    def _known(self, attempt: str) -> Save:
        save = self._saves.get(attempt)
        if save is None:
            raise RankError("the agent knows no such save: it is too long ago, or was never begun")
        return save

    def _status(self, save: Save) -> Message:
        ranks = range(save.world_size)
        return {
            "captured": len(save.captured) == save.world_size,
            "committed": save.committed,
            "error": save.error,
            "kind": save.kind,
            "bytes": save.bytes,
            "seconds": save.seconds,
            "waits_for": [f"{rank}{self._crew.where(rank)}" for rank in ranks if rank not in save.captured],
            "writes": [f"{rank}{self._crew.where(rank)}" for rank in ranks if rank not in save.prepared],
            "events": list(save.events) if save.over else [],
        }

    def _outcome(self, save: Save) -> Message:
        known = ("committed", "linked", "error", "kind", "bytes", "seconds")
        folder = {"path": save.folder.path, "made": list(save.folder.made)}
        return {"op": "ended", "save": save.attempt, **folder, **{key: getattr(save, key) for key in known}}

    def _commit(self, save: Save) -> None:
        contents, parts = save.contents, [save.parts[rank] for rank in sorted(save.parts)]
        if contents is None:
            return  # it has failed meanwhile
        try:
            with save.operation.phase("commit"):
                try:
                    commit(self._files, save.folder, save.attempt, contents, parts)
                    save.linked = True
                except Exception:
                    # it may be committed all the same, which nodes with disks of their own do not see
                    save.linked = is_linked(save.folder.path, save.attempt)
                    raise
                finally:
                    if save.linked and save.node_local:
                        self._spread(save)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainers learn it
            kind = type(error).__name__ if isinstance(error, CheckpointError) else "SaveFailedError"
            self._fail(save, f"{save.folder.path}: could not be committed: {error}", kind)
            return
        nbytes = sum(int(file.rows.length.sum()) for part in parts for file in part.files)
        save.operation.bytes = nbytes
        save.operation.end()
        self._aftermath.committed(Committed(save.folder.path, contents.step, save.attempt, leads=True))
        with self._changed:
            save.bytes = nbytes
            save.seconds = time.monotonic() - save.began
            save.committed = True
            save.contents, save.parts = None, {}
            self._changed.notify_all()
        self._tell(self._outcome(save))

    def _spread(self, save: Save) -> None:
        """It is committed: give the other nodes root and index, so that each folder says what it belongs to."""
        folder = save.folder.path
        blobs = []
        try:
            root = read_root(folder)
            inside = [*(page.path for page in root.pages), names.MANIFEST]
            for name in inside:
                with open(os.path.join(folder, name), "rb") as stream:
                    blobs.append(stream.read())
        except (CheckpointError, OSError) as error:
            log.warning("%s: committed, but other nodes get no copy of its manifest yet: %s", folder, error)
            return
        with self._changed:
            save.unpublished = set(self._crew.others) - self._lost
            nodes = list(save.unpublished)
        self._tell({"op": "publish", "save": save.attempt, "files": inside, BLOBS: blobs}, nodes)
        deadline = time.monotonic() + PUBLISH
        with self._changed:
            while save.unpublished and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())
            late = sorted(save.unpublished)
        if late:
            log.warning("%s: committed, but node %s has no copy of its manifest yet", folder, ", ".join(late))

    def _published(self, attempt: str, node: str, why: str) -> None:
        save = self._known(attempt)
        if why:
            log.warning("%s: committed, but node %s could not keep a copy: %s", save.folder.path, node, why)
        with self._changed:
            save.unpublished.discard(node)
            self._changed.notify_all()

    def _fail(self, save: Save, why: str, kind: str) -> None:
        with self._changed:
            if save.over or save.failing:
                return
            save.failing = True
        log.warning("the save to %s failed: %s", save.folder.path, why)
        self.discard(save.attempt)
        # perhaps another agent, which may be gone, was the first to need them
        remove_folders(self._files, [save.folder.path, *(os.path.join(save.folder.path, name) for name in _FOLDERS)])
        kind = kind if kind in errors.__all__ else "SaveFailedError"
        save.operation.end(getattr(errors, kind)(why))
        with self._changed:
            # whoever hears of it finds nothing left behind on this node
            save.error = why
            save.kind = kind
            save.contents, save.parts = None, {}
            self._changed.notify_all()
        self._tell(self._outcome(save))
