"""An agent that does not commit: it tells the one that does what its ranks captured and wrote, and learns the outcome.

It decides nothing about a save. When the leading agent is gone before it has told the outcome, what was written stays:
it may be committed, and is debris otherwise, which `ckpt prune` removes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.agent import peers
from ckpt.agent.aftermath import Aftermath, Committed
from ckpt.agent.crew import Crew, Past, ranks_text
from ckpt.agent.wire import BLOBS, Message, failure
from ckpt.events import Operation, Phase
from ckpt.saving.commit import Part
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, discard, publish_encoded
from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError, RankError
from ckpt_formats.native import names
from ckpt_formats.native.reader import read_root

ANSWER = 120.0
"""Seconds within which the leading agent has to answer; longer than it waits for rank 0 to begin a save."""
LOSE = 10.0
"""Seconds within which it is found out what the loss of the leading agent means for a save."""

log = logging.getLogger("ckpt.agent")


@dataclass(slots=True)
class Save:
    """One save, as far as this agent knows it."""

    attempt: str
    folder: Folder
    """This node's: its own, or the one that all share."""
    step: int | None
    operation: Operation
    captured: bool = False
    """By all ranks."""
    failing: bool = False
    """The leading agent has decided that it fails."""
    committed: bool = False
    published: bool = False
    """This node has index and root."""
    error: str | None = None
    kind: str = ""
    bytes: int = 0
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        return self.committed or self.error is not None


class Follower:
    """See Committer."""

    def __init__(
        self,
        crew: Crew,
        leader: peers.Address,
        secret: bytes,
        files: Files,
        aftermath: Aftermath,
        broken: Callable[[], None],
    ) -> None:
        """Connect to the leading agent. `broken` is called when some agent of the crew is lost.

        Raises:
            RankError: it can't be reached.
        """
        self._crew = crew
        self._files = files
        self._aftermath = aftermath
        self._broken = broken
        self._changed = threading.Condition()
        self._saves: OrderedDict[str, Save] = OrderedDict()
        self._past = Past()
        self._welcome = threading.Event()
        self._requests = peers.connect(leader, secret, crew.node, "requests")
        self._news = peers.connect(leader, secret, crew.node, "news")
        threading.Thread(target=self._listen, name="ckpt-agent-news", daemon=True).start()
        if not self._welcome.wait(peers.HANDSHAKE):
            self.close()
            raise RankError(f"the agent of node {leader.node} let node {crew.node} connect, and then said nothing")

    # what the leading agent says

    def _listen(self) -> None:
        error = peers.hear(self._news, self._hear)
        self._lose(error)

    def _hear(self, message: Message) -> None:
        match message["op"]:
            case "welcome":
                self._welcome.set()
            case "broken":
                self._broken()
            case "captured":
                with self._changed:
                    save = self._saves.get(message["save"])
                    if save is not None:
                        save.captured = True
                    self._changed.notify_all()
            case "publish":
                # by a thread, so that signs of life are answered meanwhile
                threading.Thread(target=self._publish, args=(message,), name="ckpt-agent-publish").start()
            case "ended":
                save = self._saves.get(message["save"])
                if save is not None:
                    self._end(save, message)

    def _end(self, save: Save, outcome: Message) -> None:
        """What became of a save."""
        error, kind = outcome["error"], outcome["kind"]
        with self._changed:
            if save.over or save.failing:
                return
            save.failing = error is not None
        if error is not None and not outcome["linked"]:
            if outcome["path"] == save.folder.path:
                # shared: whoever of all nodes is the last to remove his files removes the folders
                ours = [made for made in save.folder.made if made not in outcome["made"]]
                save.folder = Folder(save.folder.path, [*outcome["made"], *ours])
            self.discard(save.attempt)
        save.operation.end(None if error is None else getattr(errors, kind)(error))
        with self._changed:
            save.committed = bool(outcome["committed"])
            save.bytes, save.seconds = int(outcome["bytes"]), float(outcome["seconds"])
            save.error, save.kind = error, kind
            published = save.published and save.committed
            self._changed.notify_all()
        if published:
            self._follow_up(save)

    def _follow_up(self, save: Save) -> None:
        """It is committed, and this node's folder says so."""
        self._aftermath.committed(Committed(save.folder.path, save.step, save.attempt, leads=False))

    def _publish(self, message: Message) -> None:
        """Keep a copy of the index and the root beside this node's files: the checkpoint is committed already."""
        save = self._saves.get(message["save"])
        why = ""
        try:
            if save is None:
                raise RankError("it does not know the save")
            *pages, (_, root) = zip(message["files"], message[BLOBS], strict=True)
            for name, data in pages:
                with self._files.create(os.path.join(save.folder.path, name), direct=False) as file:
                    file.write(memoryview(data), 0)
                    file.sync()
            publish_encoded(self._files, save.folder, save.attempt, root)
            with self._changed:
                save.published = True
                late = save.committed
            if late:
                self._follow_up(save)
        except (CheckpointError, OSError) as error:
            why = str(error)
        with contextlib.suppress(RankError):
            self._ask({"op": "published", "save": message["save"], "why": why})

    def _lose(self, error: RankError | None) -> None:
        """The leading agent is gone: look whether it has committed, which on a shared file system can be seen."""
        self._requests.close()
        with self._changed:
            lost = [save for save in self._saves.values() if not save.over]
        ranks = ranks_text(self._crew.ranks(self._crew.leader))
        for save in lost:
            committed = False
            with contextlib.suppress(CheckpointError, OSError):
                committed = read_root(save.folder.path).attempt == save.attempt
            why = (
                f"{save.folder.path}: the agent of node {self._crew.leader} ({ranks}), which commits, is gone"
                f"{'' if error is None else f' ({error})'}; the save was not committed as far as node "
                f"{self._crew.node} can see, and what was written of it stays until `ckpt prune`. The next save starts "
                "agents anew"
            )
            save.operation.end(None if committed else RankError(why))
            with self._changed:
                save.committed = committed
                save.error, save.kind = (None, "") if committed else (why, "RankError")
                self._changed.notify_all()
        self._broken()

    # Committer

    def begin(self, message: Message) -> None:
        """See Committer."""
        raise RankError(f"{message['path']}: rank 0 is not on node {self._crew.node}")

    def expect(self, attempt: str, path: str, step: int | None) -> None:
        """See Committer."""
        unmade = ""
        with self._changed:
            save = self._saves.get(attempt)
            if save is None:
                made: list[str] = []
                ours = self._crew.ranks(self._crew.node)
                self._saves[attempt] = Save(
                    attempt=attempt,
                    folder=Folder(path, made),
                    step=step,
                    operation=Operation("save", path, step=step, rank=ours[0], world_size=len(self._crew.nodes)),
                )
                self._past.forget(self._saves)
                try:
                    for name in (names.DATA, names.INDEX):
                        self._files.make_folders(os.path.join(path, name), made)
                except OSError as error:
                    unmade = f"{path}: can't be made on node {self._crew.node} ({error.strerror or error})"
        if unmade:
            self.failed(attempt, unmade, "SaveFailedError")

    def captured(self, attempt: str, rank: int, path: str, step: int | None) -> None:
        """See Committer."""
        self.expect(attempt, path, step)
        save = self._known(attempt)
        try:
            outcome = self._ask({"op": "captured", "save": attempt, "rank": rank})["outcome"]
        except RankError as error:
            # never begun, or the leading agent is gone; if it goes on nevertheless, it tells nobody here
            with self._changed:
                if not save.over:
                    save.error, save.kind = str(error), "RankError"
                self._changed.notify_all()
            raise
        if outcome is not None:
            # it was over before this node had anything to do with it
            self._end(save, outcome)

    def phase(self, attempt: str, rank: int) -> Phase:
        """See Committer."""
        return self._known(attempt).operation.phase("write", rank=rank)

    def prepared(self, attempt: str, rank: int, part: Part) -> None:
        """See Committer."""
        save = self._known(attempt)
        # the leading agent syncs its own folders, which on node-local disks are others
        self._files.sync_folder(os.path.join(save.folder.path, names.DATA))
        for made in save.folder.made:
            self._files.sync_folder(os.path.dirname(made))
        self._ask({"op": "prepared", "save": attempt, "rank": rank, BLOBS: [part.encode()]})

    def failed(self, attempt: str, why: str, kind: str) -> None:
        """See Committer."""
        self._ask({"op": "failed", "save": attempt, "why": why, "kind": kind})

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
        with contextlib.suppress(RankError):
            self._ask({"op": "left", "rank": rank})

    def wait(self, attempt: str, until: str, timeout: float) -> Message:
        """See Committer."""
        deadline = time.monotonic() + timeout
        with self._changed:
            past = self._past.status(attempt)
            if past is not None:
                return past
            save = self._known(attempt)
            while not (save.over or (until == "captured" and save.captured)):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if save.over or not timeout or (until == "captured" and save.captured):
                return self._status(save)
        try:
            # who is waited for is known to the one that waits
            return dict(self._ask({"op": "status", "save": attempt})["status"])
        except RankError:
            # it is gone; what that means for the save is being found out
            with self._changed:
                self._changed.wait_for(lambda: save.over, LOSE)
                return self._status(save)

    def busy(self) -> bool:
        """See Committer."""
        with self._changed:
            return any(not save.over for save in self._saves.values())

    def close(self) -> None:
        """See Committer."""
        self._requests.close()
        self._news.close()

    def _status(self, save: Save) -> Message:
        known = ("captured", "committed", "error", "kind", "bytes", "seconds")
        return {**{key: getattr(save, key) for key in known}, "waits_for": [], "writes": []}

    def _known(self, attempt: str) -> Save:
        save = self._saves.get(attempt)
        if save is None:
            raise RankError("the agent knows no such save: it is too long ago, or was never captured on this node")
        return save

    def _ask(self, message: Message) -> Message:
        answer = self._requests.ask(message, ANSWER)
        if "error" in answer:
            raise failure(answer)
        return answer
