"""Verifying: every byte of a native checkpoint against its checksum, and all damage named, not only the first.

Each file is read once, in order, in spans of bounded size, by several threads. Knows no ranks and needs no torch; what
a checkpoint says is not trusted beyond what its own root's checksum covers.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.codecs import RAW, require_known, word_size
from ckpt_formats.digest import Hasher, digest, hexdigest
from ckpt_formats.encoded import EncodedChunk, damaged_blocks
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    CoverageError,
    FormatError,
    StoreError,
    UnknownDtypeError,
    UnknownVersionError,
)
from ckpt_formats.geometry import Box, check_cover
from ckpt_formats.leases import is_lease
from ckpt_formats.locks import hold
from ckpt_formats.manifest import RANK_PREFIX
from ckpt_formats.native import names
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.node_folders import NodeFolders, root_folder
from ckpt_formats.native.reader import load_page, read_root
from ckpt_formats.native.regions import ChunkAt, ChunkTable, Segment, disagreements
from ckpt_formats.native.root import DataFile, Root
from ckpt_formats.remote import Store, is_url, tidy
from ckpt_formats.safetensors_file import MAX_HEADER, Entry, parse_header
from ckpt_formats.sources import ByteSource, open_source

__all__ = ["Damage", "Debris", "VerifyReport", "verify"]

SPAN = 8 << 20
"""Bytes that a thread reads at once, and the size of its buffer."""
STORE_THREADS = 8
"""How many read from a store, where each waits for answers."""

Progress = Callable[[int, int], None]
"""Called with bytes checked so far and bytes in all."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One place where a checkpoint is not what was written."""

    file: str
    """Path of the file, relative to the checkpoint's folder."""
    what: str
    """What is wrong with these bytes, as the rest of a sentence that begins with them."""
    start: int | None = None
    """First byte in the file; None when it is about the file as a whole."""
    stop: int | None = None
    """The byte after the last one."""
    tensor: str | None = None
    """Name of the tensor whose bytes they are, if they are some tensor's."""
    box: Box | None = None
    """The chunk's box in that tensor."""


class Debris(NamedTuple):
    """A file in the checkpoint's folder that it does not list: left by an attempt that failed, or foreign."""

    path: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    path: str
    """The checkpoint's folder."""
    step: int | None
    """The training step it is of; None also when the manifest is damaged."""
    files: int
    """Files that the checkpoint lists, its manifest included."""
    tensors: int
    """Tensors whose chunks were checked to cover them, the format's own included."""
    chunks: int
    """Chunks that the readable part of the index lists."""
    bytes: int
    """Bytes that were read and checked."""
    seconds: float
    damage: Sequence[Damage]
    """Everything that is wrong, file by file, in order of position."""
    debris: Sequence[Debris]
    """Not damage: a reader ignores these files."""

    @property
    def intact(self) -> bool:
        return not self.damage


def verify(
    path: str | os.PathLike[str], *, progress: Progress | None = None, threads: int | None = None
) -> VerifyReport:
    """Check every byte of the checkpoint in folder `path`, and that what it says fits together.

    That is: the root; the index; of each data file its size, its header, that header and index agree, each block of
    each chunk, and that paddings are zero; that the chunks of each tensor cover it exactly; that plain values decode.

    Args:
        path: a checkpoint's folder, or its URL in a store.
        progress: called as work proceeds, from the calling thread.
        threads: how many to read and hash with; default one per CPU, at most 4, and in a store STORE_THREADS.

    Raises:
        CheckpointNotFoundError: no checkpoint was committed there.
        UnknownVersionError, UnknownDtypeError, UnknownCodecError: it can't be checked by this release. Damage is never
            raised, only reported.
        StoreError: its store can't be read, which says nothing of it.
    """
    folder = tidy(path)
    return _Verification(folder, progress, threads or (STORE_THREADS if is_url(folder) else _threads())).run()


def _threads() -> int:
    return min(4, os.cpu_count() or 1)


class _Task(NamedTuple):
    """Segments of one file without gaps between them, together no longer than SPAN unless it is a single one."""

    file: DataFile
    source: ByteSource
    available: int
    """Bytes that the file really has."""
    segments: list[Segment]


class _Verification:
    """One call of `verify`."""

    def __init__(self, folder: str, progress: Progress | None, threads: int) -> None:
        self._path = folder
        self._folder = root_folder(folder)
        self._progress = progress
        self._threads = threads
        self._damage: list[Damage] = []
        self._local = threading.local()
        self._block_size = 0
        self._done = 0
        self._total = 0

    def run(self) -> VerifyReport:
        try:
            using = hold(self._folder)
        except StoreError:
            raise
        except OSError:
            return self._run()  # why it can't be read is found out anew
        try:
            return self._run()
        finally:
            using.release()

    def _run(self) -> VerifyReport:
        begin = time.perf_counter()
        root = self._read_root()
        tensors = chunks = 0
        debris: list[Debris] = []
        if root is not None:
            self._where = NodeFolders(self._path, self._folder, root.layout)
            self._block_size = root.block_size
            self._total += sum(page.size for page in root.pages) + sum(file.size for file in root.files)
            pages = [self._read_page(root, number) for number in range(len(root.pages))]
            tensors = self._check_coverage(root, pages)
            table = ChunkTable(root, pages)
            chunks = table.count
            self._check_files(root, table)
            self._check_values(root)
            debris = list(self._find_debris(root))
        return VerifyReport(
            path=self._path,
            step=root.step if root else None,
            files=1 + len(root.files) + len(root.pages) if root else 1,
            tensors=tensors,
            chunks=chunks,
            bytes=self._done,
            seconds=time.perf_counter() - begin,
            damage=self._in_order(root),
            debris=debris,
        )

    def _report(self, damage: Damage) -> None:
        self._damage.append(damage)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    # metadata

    def _read_root(self) -> Root | None:
        file = os.path.join(self._folder, names.MANIFEST)
        try:
            root = read_root(self._folder)
            size = Store(file).size(file) if is_url(file) else os.path.getsize(file)
        except (CheckpointNotFoundError, UnknownVersionError, UnknownDtypeError):
            raise
        except (CorruptionError, FormatError) as error:
            what = f"{_reason(error, file)} (nothing else of the checkpoint can be checked without it)"
            self._report(Damage(names.MANIFEST, what))
            return None
        self._total = size
        self._advance(size)
        return root

    def _size(self, path: str, expected: int) -> int | None:
        """The size of a listed file, None if it is none; reported unless it is as expected."""
        try:
            if is_url(self._folder):
                size, plain = Store(self._folder).size(os.path.join(self._folder, path)), True
            else:
                info = os.stat(self._where.find(path))
                size, plain = info.st_size, stat.S_ISREG(info.st_mode)
        except StoreError:
            raise
        except FileNotFoundError:
            node = self._where.node(path)
            self._report(Damage(path, "the file is missing" + (f", which lies on node {node}" if node else "")))
            return None
        except OSError as error:
            self._report(Damage(path, f"the file can't be read ({error.strerror})"))
            return None
        if not plain:
            # opening a pipe would wait for whoever writes into it
            self._report(Damage(path, "is not a plain file"))
            return None
        if size < expected:
            self._report(Damage(path, f"the file is truncated: it has {size} of {expected} bytes"))
        elif size > expected:
            self._report(Damage(path, f"the file is too long: it has {size} bytes instead of {expected}"))
        return size

    def _read_page(self, root: Root, number: int) -> IndexRows | None:
        """The rows of a page, None if not all of it can be trusted."""
        page = root.pages[number]
        reported = len(self._damage)
        size = self._size(page.path, page.size)
        rows: IndexRows | None = None
        if size is not None:
            data = memoryview(bytearray(min(size, page.size)))
            source = open_source(os.path.join(self._folder, page.path))
            try:
                source.read(0, len(data), data)
                for block, expected in enumerate(page.digests):
                    start = block * root.block_size
                    stop = min(start + root.block_size, page.size)
                    if stop <= len(data) and hexdigest(data[start:stop]) != expected:
                        self._report(Damage(page.path, "does not fit its checksum", start, stop))
                if len(self._damage) == reported:
                    rows = load_page(self._folder, root, number, lambda name: _InMemory(name, data))
            except CorruptionError as error:
                self._report(Damage(page.path, _unreadable(error)))
            except FormatError as error:
                self._report(Damage(page.path, _reason(error, source.name)))
            finally:
                source.close()
            self._advance(len(data))
        if rows is None:
            affected = sum(meta.rows > 0 and meta.page == number for meta in root.tensors.values())
            last = self._damage[-1]
            what = f"{last.what}; so {page.rows} chunks of {affected} tensors could not be checked"
            self._damage[-1] = replace(last, what=what)
        else:
            for codec in np.unique(rows.codec).tolist():
                require_known(root.codecs[codec], where=f"a chunk listed in {page.path}", path=self._folder)
        return rows

    def _check_coverage(self, root: Root, pages: Sequence[IndexRows | None]) -> int:
        """How many tensors could be checked to be covered by their chunks."""
        checked = 0
        for meta in root.tensors.values():
            ndim = len(meta.shape)
            if not meta.rows:
                offsets = sizes = np.empty((0, ndim), dtype=np.int64)
            else:
                page = pages[meta.page]
                if page is None:
                    continue
                rows = slice(meta.row, meta.row + meta.rows)
                offsets, sizes = page.offset[rows, :ndim], page.size[rows, :ndim]
            checked += 1
            try:
                check_cover(meta.shape, offsets, sizes)
            except CoverageError as error:
                file = root.pages[meta.page].path if meta.rows else names.MANIFEST
                what = f"its chunks do not cover it: {error}"
                self._report(Damage(file, what, tensor=meta.name, box=Box.whole(meta.shape)))
        return checked

    def _check_values(self, root: Root) -> None:
        """Decode every plain value, those kept in data files included."""
        with open_checkpoint(self._path, held=False) as checkpoint:
            for path, encoded in root.values.items():
                self._check_value(checkpoint, encoded, path, path)
            for name in root.tensors:
                rank = name.removeprefix(RANK_PREFIX)
                if rank == name:
                    continue
                if not rank.isdecimal() or len(rank) > 9:
                    self._report(Damage(names.MANIFEST, "has values of a rank that is not a number", tensor=name))
                    continue
                try:
                    own = checkpoint.per_rank(int(rank))
                except CorruptionError:
                    continue  # of bytes that were reported before
                except (CheckpointError, ValueError, RecursionError) as error:
                    self._report(Damage(names.MANIFEST, f"the values of rank {int(rank)} do not decode: {error}"))
                    continue
                for path, encoded in own.items():
                    self._check_value(checkpoint, encoded, path, f"{path} of rank {int(rank)}")

    def _check_value(self, checkpoint: Checkpoint, encoded: object, path: str, what: str) -> None:
        try:
            checkpoint.decode(encoded, path, lenient=True)
        except CorruptionError as error:
            if not self._damage:  # otherwise its bytes were reported before
                self._report(Damage(names.MANIFEST, f"the value {what!r} can't be read: {error}"))
        except (CheckpointError, ValueError, RecursionError) as error:
            self._report(Damage(names.MANIFEST, f"the value {what!r} does not decode: {error}"))

    def _find_debris(self, root: Root) -> Iterator[Debris]:
        listed = {names.MANIFEST, names.FACTS, *(file.path for file in root.files), *(page.path for page in root.pages)}
        if is_url(self._folder):
            for entry in Store(self._folder).walk(self._folder):
                if entry.name not in listed and not is_lease(entry.name):
                    yield Debris(entry.name, entry.size)
            return
        for folder, _, files in os.walk(self._folder):
            for file in sorted(files):
                path = os.path.join(folder, file)
                relative = os.path.relpath(path, self._folder)
                if relative not in listed:
                    try:
                        yield Debris(relative, os.lstat(path).st_size)
                    except OSError:
                        continue  # gone meanwhile: debris is cleared by whoever made it

    # data files

    def _check_files(self, root: Root, table: ChunkTable) -> None:
        waiting: deque[tuple[_Task, Future[list[Damage]]]] = deque()

        def collect() -> None:
            task, future = waiting.popleft()
            self._damage.extend(future.result())
            self._advance(sum(min(s.stop, task.available) - min(s.start, task.available) for s in task.segments))
            if not waiting or waiting[0][0].source is not task.source:
                task.source.close()  # a later read would open it again

        with ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-verify") as pool:
            try:
                for number, file in enumerate(root.files):
                    for task in self._tasks(file, table.of_file(number), table):
                        waiting.append((task, pool.submit(self._check, task)))
                        if len(waiting) > 2 * self._threads:
                            collect()
                while waiting:
                    collect()
            finally:
                for task, future in waiting:
                    future.cancel()
                    task.source.close()

    def _tasks(self, file: DataFile, chunks: list[ChunkAt], table: ChunkTable) -> Iterator[_Task]:
        """Check a file's size and header; what is left to do for its bytes."""
        available = self._size(file.path, file.size)
        if available is None:
            for chunk in chunks:
                self._report(_damage(file.path, "is lost with its file", chunk.start, chunk.stop, chunk))
            return
        source = open_source(self._where.find(file.path))
        entries = self._read_header(file, source, available)
        if entries is not None:
            for found in disagreements(entries, chunks, complete=table.complete):
                self._report(_damage(file.path, *found))
        run: list[Segment] = []
        for segment in table.segments(file, chunks, entries):
            if run and (segment.start != run[-1].stop or segment.stop - run[0].start > SPAN):
                yield _Task(file, source, available, run)
                run = []
            run.append(segment)
        if run:
            yield _Task(file, source, available, run)

    def _read_header(self, file: DataFile, source: ByteSource, available: int) -> list[Entry] | None:
        """The entries of a file whose header is as it was written, else None, and reported."""

        def bad(what: str) -> None:
            self._report(Damage(file.path, what, 0, file.header))

        if available < file.header:
            return None  # reported as truncated
        if file.header > MAX_HEADER + 8:
            bad("the header is longer than the format allows")
            return None
        data = memoryview(bytearray(file.header))
        try:
            source.read(0, file.header, data)
        except CorruptionError as error:
            bad(f"the header {_unreadable(error)}")
            return None
        self._advance(file.header)
        if hexdigest(data) != file.digest:
            bad("the header does not fit its checksum")
            return None
        try:
            entries = parse_header(data, file.size, source.name)
        except FormatError as error:
            bad(f"the header is wrong: {_reason(error, source.name)}")
            return None
        if 8 + int.from_bytes(data[:8], "little") != file.header:
            bad("the header has not the length that the manifest says")
            return None
        return entries

    def _check(self, task: _Task) -> list[Damage]:
        """Read and check a task's segments; runs in a thread of the pool, touches nothing shared."""
        segments = task.segments
        start, stop = segments[0].start, segments[-1].stop
        buffer = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(SPAN))
        together = stop - start <= SPAN and stop <= task.available
        if together:
            try:
                task.source.read(start, stop, buffer[: stop - start])
            except CorruptionError:
                together = False  # perhaps only a part of it can't be read
        found: list[Damage] = []
        for segment in segments:
            if segment.chunk is not None and segment.chunk.codec != RAW:
                whole = buffer[segment.start - start : segment.stop - start] if together else None
                found.extend(self._check_encoded(task, segment.chunk, whole))
                continue
            if together:
                data = buffer[segment.start - start : segment.stop - start]
                what = None if _fits(data, segment.digest) else _misfit(segment)
            else:
                what = _check_alone(task, segment, buffer)
            if what is not None:
                found.append(_damage(task.file.path, what, segment.start, segment.stop, segment.chunk))
        return found

    def _check_encoded(self, task: _Task, chunk: ChunkAt, whole: memoryview | None) -> Iterator[Damage]:
        """What is wrong with a chunk that has a codec; `whole` are its stored bytes if they were read before."""
        path = task.file.path
        if chunk.stop > task.available:
            what = f"is missing: the file ends at byte {task.available}"
            yield _damage(path, what, chunk.start, chunk.stop, chunk)
            return
        nbytes = chunk.box.numel * chunk.meta.dtype.itemsize
        word = word_size(chunk.meta.dtype)
        stored = EncodedChunk(chunk.start, chunk.stop - chunk.start, nbytes, self._block_size, word)
        first = int(chunk.rows.block[chunk.row])
        if first < 0:
            digests = chunk.rows.digest[chunk.row : chunk.row + 1]
        else:
            digests = chunk.rows.block_digest[first : first + stored.blocks]
        source = task.source if whole is None else _InMemory(task.source.name, whole, chunk.start)
        for start, stop, error in damaged_blocks(source, stored, digests, SPAN):
            what = _unreadable(error) if isinstance(error, CorruptionError) else f"can't be decoded: {error}"
            yield _damage(path, what, start, stop, chunk)

    # the report

    def _in_order(self, root: Root | None) -> list[Damage]:
        """Damage by file and position; neighbouring blocks of one chunk with the same complaint made one."""
        listed = [*(page.path for page in root.pages), *(file.path for file in root.files)] if root else []
        position = {path: number for number, path in enumerate(listed, 1)}
        ordered: list[Damage] = []
        for damage in sorted(self._damage, key=lambda d: (position.get(d.file, 0), -1 if d.start is None else d.start)):
            last = ordered[-1] if ordered else None
            if (
                last is not None
                and last.stop is not None
                and last.stop == damage.start
                and damage.tensor is not None
                and (last.file, last.what, last.tensor, last.box)
                == (damage.file, damage.what, damage.tensor, damage.box)
            ):
                ordered[-1] = replace(last, stop=damage.stop)
            else:
                ordered.append(damage)
        return ordered


class _InMemory:
    """A byte source of bytes that were read before, those from `origin` on."""

    def __init__(self, name: str, data: memoryview, origin: int = 0) -> None:
        self.name = name
        self._data = data
        self._origin = origin

    def size(self) -> int:
        return self._origin + len(self._data)

    def read(self, start: int, stop: int, into: memoryview) -> None:
        into[: stop - start] = self._data[start - self._origin : stop - self._origin]

    def close(self) -> None:
        pass


def _fits(data: memoryview, expected: bytes | None) -> bool:
    if expected is None:
        return not np.frombuffer(data, np.uint8).any()
    return digest(data) == expected


def _misfit(segment: Segment) -> str:
    return "is padding, but not all zero" if segment.digest is None else "does not fit its checksum"


def _check_alone(task: _Task, segment: Segment, buffer: memoryview) -> str | None:
    """What is wrong with a segment that is too large to be read at once, or could not be read with its neighbours."""
    if segment.stop > task.available:
        return None if segment.chunk is None else f"is missing: the file ends at byte {task.available}"
    hasher = Hasher()
    zero = True
    for start in range(segment.start, segment.stop, len(buffer)):
        data = buffer[: min(len(buffer), segment.stop - start)]
        try:
            task.source.read(start, start + len(data), data)
        except CorruptionError as error:
            return _unreadable(error)
        if segment.digest is None:
            zero = zero and _fits(data, None)
        else:
            hasher.update(data)
    fits = zero if segment.digest is None else hasher.digest() == segment.digest
    return None if fits else _misfit(segment)


def _damage(file: str, what: str, start: int, stop: int, chunk: ChunkAt | None) -> Damage:
    if chunk is None:
        return Damage(file, what, start, stop)
    return Damage(file, what, start, stop, chunk.meta.name, chunk.box)


def _unreadable(error: CorruptionError) -> str:
    cause = error.__cause__
    return f"can't be read ({cause.strerror})" if isinstance(cause, OSError) else "ends too early"


def _reason(error: CheckpointError, name: str) -> str:
    """An error's message without the name of the file that a Damage has anyway."""
    return error.message.removeprefix(f"{name}: ")
