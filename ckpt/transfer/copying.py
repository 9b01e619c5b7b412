"""One copy of one checkpoint: each file checked on its way to a folder or a store, and the commit behind them."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import numpy as np

from ckpt.storage.data_file import Staging
from ckpt.storage.facts import write_facts
from ckpt.storage.files import ALIGNMENT, File, Files
from ckpt.storage.publish import discard, prepare_folder, publish_encoded
from ckpt.transfer.checking import Check, pieces
from ckpt.transfer.uploading import Uploading
from ckpt_formats.codecs import require_known
from ckpt_formats.digest import Hasher
from ckpt_formats.errors import CheckpointError, CheckpointExistsError, CorruptionError, SaveFailedError, StoreError
from ckpt_formats.facts import Facts, read_facts
from ckpt_formats.locks import held
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NodeFolders, folders_of, missing_text, root_folder
from ckpt_formats.native.reader import is_native, load_page, read_root, require_size
from ckpt_formats.native.regions import ChunkTable, Segment
from ckpt_formats.native.root import MAX_SIZE, PageFile, Root, decode
from ckpt_formats.sources import ByteSource, open_source, read_small
from ckpt_formats.urls import is_url

BUFFERS = 3
"""Buffers of a copy: while one is written, the next is read and checked."""
AHEAD = 4
"""Buffers that are being filled at once from a store, where each read waits for an answer."""

Checks = Iterator[tuple[str, int, Iterable[Segment]]]
"""Path and size of each file of a checkpoint, and the segments that it must consist of."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@contextmanager
def open_copy(
    path: str,
    place: str,
    progress: Progress | None,
    files: Files | None,
    staging: Staging | None,
    bandwidth: float | None,
) -> Iterator[Copying]:
    """A copy that is to be made, its source held meanwhile. `bandwidth` limits what is sent to a store."""
    folder = root_folder(path)
    if not is_native(folder):
        read_root(folder)  # says what is there instead
    with ExitStack() as stack:
        for each in {folder, *folders_of(path)}:
            if each == folder or is_native(each):
                stack.enter_context(held(each))
        kind = Uploaded if is_url(place) else Copying
        yield kind(path, folder, place, progress, files or Files(), staging or Staging(buffers(path)), bandwidth)


def buffers(source: str) -> int:
    """How many buffers a copy of what lies there needs."""
    return AHEAD + BUFFERS if is_url(source) else BUFFERS


class Copying:
    """One copy of one checkpoint, which is held meanwhile.

    Attributes:
        root: of the checkpoint.
        total, copied, verified: bytes, see CopyResult.
        note: see CopyResult.
    """

    def __init__(
        self,
        path: str,
        source: str,
        target: str,
        progress: Progress | None,
        files: Files,
        staging: Staging,
        bandwidth: float | None,
    ) -> None:
        """`source` is the folder of the root, to which `path` leads."""
        self._source = source
        self._target = target
        self._progress = progress
        self._files = files
        self._staging = staging
        self._bandwidth = bandwidth
        self._manifest = _manifest_of(source)
        self._attempt = secrets.token_hex(8)
        self.root: Root = decode(self._manifest, os.path.join(source, names.MANIFEST))
        self._where = NodeFolders(path, source, self.root.layout)
        self._absent: list[str] = []
        """Files that lie on other nodes, and that these have not brought yet."""
        listed = sum(file.size for file in self.root.files) + sum(page.size for page in self.root.pages)
        self.total = listed + len(self._manifest)
        self.copied = self.verified = 0
        self.note: str | None = None

    def is_there(self) -> bool:
        """Whether this very checkpoint is committed at the target. Raises CheckpointExistsError if another thing is."""
        if os.path.lexists(os.path.join(self._target, names.MANIFEST)):
            try:
                same = _manifest_of(self._target) == self._manifest
            except OSError:
                same = False
            if same:
                return True
            raise self._other()
        if os.path.isdir(self._target):
            known = (names.DATA, names.INDEX, names.FACTS)
            foreign = sorted(
                name for name in os.listdir(self._target) if name not in known and names.attempt_of(name) is None
            )
            if foreign:
                raise CheckpointExistsError(
                    f"{self._target} holds other things ({', '.join(foreign[:3])}); a checkpoint needs a folder of its "
                    f"own, such as {os.path.join(self._target, os.path.basename(self._source))}",
                    path=self._target,
                )
        return False

    def _other(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            f"{self._target} holds another checkpoint, and checkpoints are never overwritten; copy to another path, or "
            "remove that one first",
            path=self._target,
        )

    def run(self, *, part: bool = False) -> None:
        """Copy and commit, or only copy the `part` that lies in this folder."""
        checks = self._checks()
        facts = self._facts()
        if part:
            checks = (check for check in checks if os.path.lexists(os.path.join(self._source, check[0])))
        self._commit(checks, facts, part)
        if not part:
            self.copied += len(self._manifest)
        self._report(0)

    def _commit(self, checks: Checks, facts: Facts, part: bool) -> None:
        folder = prepare_folder(self._files, self._target)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="ckpt-copy") as pool:
                for path, size, segments in checks:
                    self._bring(path, size, segments, pool)
            if part:
                return
            self._require_all()
            if facts:
                write_facts(self._files, self._target, facts)
            publish_encoded(self._files, folder, self._attempt, self._manifest)
        except BaseException as error:
            discard(self._files, folder, self._attempt)
            if isinstance(error, OSError) and not isinstance(error, CheckpointError):
                raise SaveFailedError(
                    f"{self._target}: could not be written ({error.strerror or error}); nothing was committed. "
                    "Free space or make the place writable, then copy again: that goes on from what is there already",
                    path=self._target,
                    step=self.root.step,
                ) from error
            raise

    def _require_all(self) -> None:
        if self._absent:
            lost = missing_text(self._where.missing(self._absent))
            raise SaveFailedError(
                f"{self._target}: not all is there yet: {lost}. Copy where they can be reached, or wait until their "
                "nodes have brought them",
                path=self._target,
                step=self.root.step,
            )

    def _is_absent(self, path: str) -> bool:
        """Whether a file lies on another node, whose disk can't be reached here."""
        absent = bool(self._where.missing([path]))
        if absent:
            self._absent.append(path)
        return absent

    def _checks(self) -> Checks:
        """Each file that the root lists."""
        root = self.root
        pages = [load_page(self._source, root, number) for number in range(len(root.pages))]
        for page in pages:
            for codec in np.unique(page.codec).tolist():
                require_known(root.codecs[codec], where="a chunk", path=self._source)
        table = ChunkTable(root, pages)

        def each() -> Checks:
            for page in root.pages:
                yield page.path, page.size, list(_blocks(page, root.block_size))
            for number, file in enumerate(root.files):
                header = Segment(0, file.header, bytes.fromhex(file.digest), None)
                chunks = table.of_file(number)
                yield file.path, file.size, [header, *table.segments(file, chunks, None)]

        return each()

    def _facts(self) -> Facts:
        try:
            return read_facts(self._source)
        except CheckpointError as error:
            self.note = f"not copied with it: {error}"
            return Facts()

    def _bring(self, path: str, size: int, segments: Iterable[Segment], pool: ThreadPoolExecutor) -> None:
        """Have a file of the checkpoint at the target, whole and on stable storage."""
        segments = list(segments)
        final = os.path.join(self._target, path)
        if self._is_whole(final, size, segments):
            self._files.sync_file(final)
            self.verified += size
            self._report(0)
            return
        if self._is_absent(path):
            return
        folder, _, _ = path.rpartition("/")
        temporary = os.path.join(self._target, folder, names.temporary("copy", self._attempt))
        source = open_source(self._where.find(path))
        try:
            require_size(source, size)
            with self._files.create(temporary, direct=size >= ALIGNMENT) as file:
                self._write(file, source, size, self._check(source, segments), pool)
                file.sync()
        finally:
            source.close()
        # not before it is whole and safe: whoever finds the name finds the file, another copy to this place included
        self._files.rename(temporary, final)
        self.copied += size

    def _windows(self, source: ByteSource, size: int) -> Iterator[tuple[int, memoryview, int]]:
        """The bytes of a file in order: position, a buffer, which is the caller's to release, and how much is in it."""
        ahead = AHEAD if is_url(self._source) else 1
        reading: deque[tuple[int, memoryview, int, Future[None]]] = deque()
        starts = iter(range(0, size, self._staging.size))
        with ThreadPoolExecutor(ahead, thread_name_prefix="ckpt-copy-read") as pool:
            try:
                for start in starts:
                    buffer = self._staging.acquire()
                    stop = min(start + self._staging.size, size)
                    window = buffer[: stop - start]
                    reading.append((start, buffer, stop - start, pool.submit(source.read, start, stop, window)))
                    if len(reading) == ahead:
                        yield self._next(reading)
                while reading:
                    yield self._next(reading)
            finally:
                wait([read for _, _, _, read in reading])
                for _, buffer, _, _ in reading:
                    self._staging.release(buffer)

    def _next(self, reading: deque[tuple[int, memoryview, int, Future[None]]]) -> tuple[int, memoryview, int]:
        start, buffer, length, read = reading[0]
        read.result()
        reading.popleft()
        return start, buffer, length

    def _write(self, file: File, source: ByteSource, size: int, check: Check, pool: ThreadPoolExecutor) -> None:
        writes: deque[Future[None]] = deque()
        try:
            for start, buffer, length in self._windows(source, size):
                try:
                    check.update(buffer[:length])
                except BaseException:
                    self._staging.release(buffer)
                    raise
                writes.append(pool.submit(self._write_window, file, buffer, start, length))
                while writes and writes[0].done():
                    writes.popleft().result()
                self._report(start + length)
            check.finish(size)
            while writes:
                writes.popleft().result()
        finally:
            wait(writes)
        if file.direct and size % ALIGNMENT:
            file.truncate(size)

    def _write_window(self, file: File, buffer: memoryview, at: int, length: int) -> None:
        """Write what is in a buffer, and give the buffer back."""
        try:
            if file.direct and length % ALIGNMENT:
                padded = -(-length // ALIGNMENT) * ALIGNMENT
                buffer[length:padded] = bytes(padded - length)
                length = padded
            file.write(buffer[:length], at)
        finally:
            self._staging.release(buffer)

    def _is_whole(self, path: str, size: int, segments: Sequence[Segment]) -> bool:
        """Whether an earlier copy left this file, and every byte of it is right."""
        if not is_url(path) and not os.path.isfile(path):
            return False
        source = open_source(path)
        try:
            if source.size() != size:
                return False
            check = self._check(source, segments)
            for start, buffer, length in self._windows(source, size):
                try:
                    check.update(buffer[:length])
                finally:
                    self._staging.release(buffer)
                self._report(start + length)
            check.finish(size)
        except CorruptionError:
            return False
        finally:
            source.close()
        return True

    def _check(self, source: ByteSource, segments: Iterable[Segment]) -> Check:
        return Check(source.name, pieces(source, segments, self.root.block_size))

    def _report(self, more: int) -> None:
        if self._progress is not None:
            self._progress(self.copied + self.verified + more, self.total)


class Uploaded(Copying):
    """A copy to a store."""

    def is_there(self) -> bool:
        try:
            there = _manifest_of(self._target)
        except FileNotFoundError:
            return False
        except CorruptionError:
            there = b""
        if there != self._manifest:
            raise self._other()
        return True

    def _commit(self, checks: Checks, facts: Facts, part: bool) -> None:
        with Uploading(self._target, self._bandwidth) as uploading:
            for path, size, segments in checks:
                self._bring_up(uploading, path, size, list(segments))
            uploading.wait()
            self.copied -= uploading.found
            self.verified += uploading.found
            if part:
                return
            self._require_all()
            if not uploading.commit(self._manifest, facts):
                raise self._other()

    def _bring_up(self, uploading: Uploading, path: str, size: int, segments: Sequence[Segment]) -> None:
        contents = _contents(segments)
        there = uploading.is_there(path, size, contents)
        if there is None:
            there = self._is_whole(os.path.join(self._target, path), size, segments)
        if there:
            self.verified += size
            self._report(0)
            return
        if self._is_absent(path):
            return
        source = open_source(self._where.find(path))
        try:
            require_size(source, size)
            check = self._check(source, segments)
            with uploading.file(path, size, contents) as file:
                for start, buffer, length in self._windows(source, size):
                    try:
                        window = buffer[:length]
                        check.update(window)
                        if start + length == size:
                            # before the last part goes: an object of a single part is there as soon as it is sent
                            check.finish(size)
                        file.write(window)
                    finally:
                        self._staging.release(buffer)
                    self._report(start + length)
        finally:
            source.close()
        self.copied += size


def _contents(segments: Sequence[Segment]) -> str:
    """What says what the bytes of a file are: the digest of all that the index says of them."""
    hasher = Hasher()
    for start, stop, expected, chunk in segments:
        of_chunk = b"" if chunk is None else chunk.rows.digest[chunk.row].tobytes()
        hasher.update(memoryview(f"{start} {stop} ".encode() + of_chunk + (expected or b"")))
    return hasher.digest().hex()


def _blocks(page: PageFile, block_size: int) -> Iterator[Segment]:
    for number, expected in enumerate(page.digests):
        start = number * block_size
        yield Segment(start, min(start + block_size, page.size), bytes.fromhex(expected), None)


def _manifest_of(folder: str) -> bytes:
    """The bytes of a checkpoint's manifest. Raises FileNotFoundError, CorruptionError, StoreError."""
    file = os.path.join(folder, names.MANIFEST)
    try:
        data = read_small(file, MAX_SIZE)
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        raise CorruptionError(f"{file}: the manifest can't be read ({error.strerror})", path=file) from error
    if data is None:
        raise CorruptionError(f"{file}: has more bytes than a manifest may have", path=file)
    return data
