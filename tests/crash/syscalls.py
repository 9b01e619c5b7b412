"""Every system call of a process on what lies below a folder, and every message that it sends or gets, watched.

`Faulty` watches what is handed `Files`; this watches a whole process, whatever code calls, reads included, so that an
agent and all that works in it can be failed and killed anywhere. Nothing is synced, as in `Faulty`.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ckpt.agent.wire import Channel, Message
from tests.crash.operations import Watch

_BLOCK = 4096
_CALLS = (
    *("open", "pwrite", "preadv", "ftruncate", "fsync", "mkdir", "rmdir"),
    *("link", "rename", "replace", "unlink", "listdir", "scandir"),
)
_real = SimpleNamespace(**{name: getattr(os, name) for name in _CALLS})
_send, _receive = Channel.send, Channel.receive


def watch_process(watch: Watch, *, reads: bool = False) -> None:
    """Watch the system calls of this process below `watch.root`, from now on; reading ones only if asked."""
    calls = _Calls(watch)
    for name in _CALLS:
        reading = name in ("preadv", "listdir", "scandir")
        setattr(os, name, getattr(_real if reading and not reads else calls, name))
    calls.reads = reads


def watch_channels(watch: Watch) -> None:
    """Watch the messages between this process and its agent, or the agent's trainers, from now on."""
    last: dict[int, str] = {}

    def named(channel: Channel, message: Message) -> str:
        if "op" not in message:
            return f"answer to {last.get(id(channel), 'nothing')}"
        rank = f" {message['rank']}" if "rank" in message else ""
        last[id(channel)] = f"{message['op']}{rank}"
        return last[id(channel)]

    def send(self: Channel, message: Message) -> None:
        watch.step("send", named(self, message), lambda: _send(self, message), lambda: _cut(self, message))

    def receive(self: Channel, *limit: int) -> Message | None:
        message = _receive(self, *limit)
        if message is None:
            return None
        got: Message = watch.step("receive", named(self, message), lambda: message)
        return got

    setattr(Channel, "send", send)  # noqa: B010 - mypy allows no assignment
    setattr(Channel, "receive", receive)  # noqa: B010


def unwatch() -> None:
    """Watch this process no more."""
    for name in _CALLS:
        setattr(os, name, getattr(_real, name))
    setattr(Channel, "send", _send)  # noqa: B010
    setattr(Channel, "receive", _receive)  # noqa: B010


def _cut(channel: Channel, message: Message) -> None:
    """Send half of a message, and hang up."""
    sent = bytearray()
    tap = SimpleNamespace(sendall=sent.extend)
    connection: socket.socket = channel._connection
    _send(SimpleNamespace(_connection=tap), message)  # type: ignore[arg-type]
    connection.sendall(sent[: len(sent) // 2])
    connection.shutdown(socket.SHUT_RDWR)


class _Calls:
    """What stands in for the calls of `os`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._paths: dict[int, str] = {}
        self.reads = False

    def _ours(self, path: Any) -> str | None:
        """The path as text, if it is one below the root."""
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        return text if text == self._watch.root or text.startswith(self._watch.root + os.sep) else None

    def open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        def act() -> int:
            fd: int = _real.open(path, flags, *args, **options)
            self._paths.pop(fd, None)
            if ours is not None:
                self._paths[fd] = ours
            return fd

        ours = self._ours(path)
        creates = bool(flags & os.O_CREAT)
        if ours is None or not (creates or self.reads):
            return act()
        opened: int = self._watch.step("create" if creates else "open", ours, act)
        return opened

    def pwrite(self, fd: int, data: Any, at: int) -> int:
        path = self._paths.get(fd)
        view = memoryview(data)
        if path is None:
            return int(_real.pwrite(fd, data, at))
        half = len(view) // 2
        if len(view) % _BLOCK == 0:
            half -= half % _BLOCK  # whole blocks, for what is open for direct writes
        less = (lambda: _real.pwrite(fd, view[:half], at)) if half else None
        return int(self._watch.step("write", path, lambda: _real.pwrite(fd, data, at), less))

    def preadv(self, fd: int, into: Any, at: int) -> int:
        path = self._paths.get(fd)
        if path is None:
            return int(_real.preadv(fd, into, at))
        first = memoryview(into[0])
        less = (lambda: _real.preadv(fd, [first[: len(first) // 2]], at)) if len(first) > 1 else None
        return int(self._watch.step("read", path, lambda: _real.preadv(fd, into, at), less))

    def ftruncate(self, fd: int, size: int) -> None:
        self._change("truncate", self._paths.get(fd), lambda: _real.ftruncate(fd, size))

    def fsync(self, fd: int) -> None:
        path = self._paths.get(fd)
        if path is not None:
            folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            self._watch.step("sync_folder" if folder else "sync", path, lambda: None)

    def mkdir(self, path: Any, *args: Any, **options: Any) -> None:
        self._change("mkdir", self._ours(path), lambda: _real.mkdir(path, *args, **options))

    def rmdir(self, path: Any, **options: Any) -> None:
        self._change("rmdir", self._ours(path), lambda: _real.rmdir(path, **options))

    def link(self, source: Any, target: Any, **options: Any) -> None:
        self._change("link", self._ours(target), lambda: _real.link(source, target, **options))

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        self._change("rename", self._ours(target), lambda: _real.rename(source, target, **options))

    replace = rename

    def unlink(self, path: Any, **options: Any) -> None:
        self._change("remove", self._ours(path), lambda: _real.unlink(path, **options))

    def listdir(self, path: Any = ".") -> list[str]:
        ours = self._ours(path)
        if ours is None:
            return list(_real.listdir(path))
        return list(self._watch.step("list", ours, lambda: _real.listdir(path)))

    def scandir(self, path: Any = ".") -> Any:
        ours = self._ours(path)
        return _real.scandir(path) if ours is None else self._watch.step("list", ours, lambda: _real.scandir(path))

    def _change(self, kind: str, path: str | None, act: Callable[[], None]) -> None:
        if path is None:
            act()
        else:
            self._watch.step(kind, path, act)
