"""Writing a checkpoint to a store: files in parts, several on their way at once, then the manifest, conditionally.

Nobody finds any of it before the manifest is there, and that is put only when every file was seen in the store at its
full size. What was sent stays when it fails, so that the next attempt goes on from it. Knows no checksums of
checkpoints; what comes here was verified.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from ckpt.storage.objects import ObjectStore, Upload
from ckpt.storage.throttle import Throttle, require_bandwidth
from ckpt_formats.errors import CorruptionError, StoreError
from ckpt_formats.facts import Facts, encode
from ckpt_formats.leases import busy
from ckpt_formats.native import names

__all__ = ["Uploading"]

SENDERS = 4
"""Parts that are sent at once."""
WAITING = 2
"""Parts more that may wait to be sent."""


class Uploading:
    """A checkpoint on its way to a URL. Use it in a `with` block, whose end waits for what is being sent.

    Attributes:
        found: bytes of parts that were there already, when `wait` has returned.
    """

    def __init__(self, url: str, bandwidth: float | None = None) -> None:
        """Sends at most `bandwidth` bytes per second, on average over some parts; for None, as many as it can."""
        self._throttle = Throttle(require_bandwidth(bandwidth))
        self._url = url
        self._store = ObjectStore(url)
        self._over = threading.Event()
        self._stack: ExitStack
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._there: dict[str, int] = {}
        self._sending: deque[Future[object]] = deque()
        self.found = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(busy(self._url))
            self._there = {entry.name: entry.size for entry in self._store.walk(self._url)}
            self._pool = stack.enter_context(ThreadPoolExecutor(SENDERS, thread_name_prefix="ckpt-upload"))
            self._finishing = stack.enter_context(ThreadPoolExecutor(SENDERS, thread_name_prefix="ckpt-finish"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        for future in self._sending:
            future.cancel()
        self._stack.close()

    def is_there(self, path: str, size: int, contents: str) -> bool | None:
        """Whether a file is there from before; None if it has its size and the store can't tell more."""
        self._sizes[path] = size
        if self._there.get(path) != size:
            return False
        return self._store.upload(os.path.join(self._url, path), size, contents).is_there()

    @contextmanager
    def file(self, path: str, size: int, contents: str) -> Iterator[_Parts]:
        """Send a file: write all of its bytes within the block. It is there when `wait` has returned."""
        upload = self._store.upload(os.path.join(self._url, path), size, contents)
        upload.begin()
        parts = _Parts(self, upload)
        try:
            yield parts
            parts.flush()
        except BaseException as error:
            wait(parts.sent)
            # with what is damaged, nobody will go on
            upload.stop(for_good=isinstance(error, CorruptionError))
            raise
        self._await(self._finishing.submit(self._finish, upload, parts.sent))

    def send(self, upload: Upload, number: int, data: bytes) -> Future[object]:
        """Send a part when its turn comes; waits as long as too many are waiting."""
        future: Future[object]
        if upload.ordered:
            self._send(upload, number, data)
            future = Future()
            future.set_result(True)
            return future
        future = self._pool.submit(self._send, upload, number, data)
        self._await(future)
        return future

    def _send(self, upload: Upload, number: int, data: bytes) -> bool:
        """Send a part, and take the time for it that it must take at least. Whether that was needed."""
        due = self._throttle.take(len(data))
        needed = upload.send(number, data)
        if needed:
            self._over.wait(max(0.0, due - time.monotonic()))
        else:
            self._throttle.give_back(len(data))
        return needed

    def _await(self, future: Future[object]) -> None:
        self._sending.append(future)
        while len(self._sending) > SENDERS + WAITING:
            # any of them: one that takes long does not keep the others from going on
            done, _ = wait(self._sending, return_when=FIRST_COMPLETED)
            for one in done:
                self._sending.remove(one)
                one.result()

    def _finish(self, upload: Upload, sent: list[Future[object]]) -> None:
        try:
            needed = [future.result() for future in sent]
            upload.finish()
            with self._lock:
                self.found += sum(
                    min(upload.part, upload.size - number * upload.part)
                    for number, was_needed in enumerate(needed)
                    if not was_needed
                )
        except FileNotFoundError as error:
            # somebody else who brings the same file was faster, or gave it up
            if not upload.is_there():
                why = f"{upload.url}: its upload was given up by somebody else meanwhile; copy again"
                raise StoreError(why, path=upload.url) from error

    def wait(self) -> None:
        """Return when all files are there. Raises StoreError."""
        while self._sending:
            self._sending.popleft().result()

    def commit(self, manifest: bytes, facts: Facts) -> bool:
        """Publish the manifest; False if another checkpoint is there. Raises StoreError."""
        if facts:
            self._store.put(os.path.join(self._url, names.FACTS), encode(facts))
        there = {entry.name: entry.size for entry in self._store.walk(self._url)}
        missing = [path for path, size in self._sizes.items() if there.get(path) != size]
        if missing:
            why = f"{self._url}: {len(missing)} files that were sent are not there, such as {missing[0]}; copy again"
            raise StoreError(why, path=self._url)
        return self._store.create(os.path.join(self._url, names.MANIFEST), manifest)


class _Parts:
    """The bytes of a file on their way, cut into parts."""

    def __init__(self, uploading: Uploading, upload: Upload) -> None:
        self._uploading = uploading
        self._upload = upload
        self._gathered = bytearray()
        self.sent: list[Future[object]] = []

    def write(self, data: memoryview) -> None:
        """Take the next bytes; they may be overwritten as soon as this returns."""
        self._gathered += data
        while len(self._gathered) >= self._upload.part:
            part = bytes(memoryview(self._gathered)[: self._upload.part])
            del self._gathered[: self._upload.part]
            self._send(part)

    def flush(self) -> None:
        """Send what is left."""
        if self._gathered or not self.sent:
            self._send(bytes(self._gathered))
            self._gathered = bytearray()

    def _send(self, part: bytes) -> None:
        self.sent.append(self._uploading.send(self._upload, len(self.sent), part))
