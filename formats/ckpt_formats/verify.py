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
from dataclasses import replace

import numpy as np

from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.codecs import require_known
from ckpt_formats.damage import Damage, Debris, VerifyReport, in_order, reason, unreadable
from ckpt_formats.digest import hexdigest
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
from ckpt_formats.native import names, spans
from ckpt_formats.native.index import IndexRows
from ckpt_formats.native.node_folders import NodeFolders, root_folder
from ckpt_formats.native.reader import load_page, read_root
from ckpt_formats.native.regions import ChunkTable, disagreements
from ckpt_formats.native.root import DataFile, Root
from ckpt_formats.remote import Store
from ckpt_formats.safetensors_file import MAX_HEADER, Entry, parse_header
from ckpt_formats.sources import ByteSource, InMemory, open_source
from ckpt_formats.urls import is_url, tidy

__all__ = ["Damage", "Debris", "VerifyReport", "verify"]

STORE_THREADS = 8
"""How many read from a store, where each waits for answers."""

Progress = Callable[[int, int], None]
"""Called with bytes checked so far and bytes in all."""


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


class _Verification:
    """One call of `verify`."""

    def __init__(self, folder: str, progress: Progress | None, threads: int) -> None:
        self._path = folder
        self._folder = root_folder(folder)
        self._progress = progress
        self._threads = threads
        self._damage: list[Damage] = []
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
        listed = [names.MANIFEST]
        tensors = chunks = 0
        debris: list[Debris] = []
        if root is not None:
            self._where = NodeFolders(self._path, self._folder, root.layout)
            self._total += sum(page.size for page in root.pages) + sum(file.size for file in root.files)
            pages = [self._read_page(root, number) for number in range(len(root.pages))]
            tensors = self._check_coverage(root, pages)
            table = ChunkTable(root, pages)
            chunks = table.count
            self._check_files(root, table)
            self._check_values(root)
            listed += [*(page.path for page in root.pages), *(file.path for file in root.files)]
            debris = list(self._find_debris(listed))
        return VerifyReport(
            path=self._path,
            step=root.step if root else None,
            files=len(listed),
            tensors=tensors,
            chunks=chunks,
            bytes=self._done,
            seconds=time.perf_counter() - begin,
            damage=in_order(self._damage, listed),
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
            what = f"{reason(error, file)} (nothing else of the checkpoint can be checked without it)"
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
                    rows = load_page(self._folder, root, number, lambda name: InMemory(name, data))
            except CorruptionError as error:
                self._report(Damage(page.path, unreadable(error)))
            except FormatError as error:
                self._report(Damage(page.path, reason(error, source.name)))
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

    def _find_debris(self, listed: Sequence[str]) -> Iterator[Debris]:
        known = {*listed, names.FACTS}
        if is_url(self._folder):
            for entry in Store(self._folder).walk(self._folder):
                if entry.name not in known and not is_lease(entry.name):
                    yield Debris(entry.name, entry.size)
            return
        for folder, _, files in os.walk(self._folder):
            for file in sorted(files):
                path = os.path.join(folder, file)
                relative = os.path.relpath(path, self._folder)
                if relative not in known:
                    try:
                        yield Debris(relative, os.lstat(path).st_size)
                    except OSError:
                        continue  # gone meanwhile: debris is cleared by whoever made it

    # data files

    def _check_files(self, root: Root, table: ChunkTable) -> None:
        waiting: deque[tuple[spans.Span, Future[list[Damage]]]] = deque()
        local = threading.local()

        def run(span: spans.Span) -> list[Damage]:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(spans.SPAN))
            return spans.check(span, local.buffer)

        def collect() -> None:
            span, future = waiting.popleft()
            self._damage.extend(future.result())
            self._advance(span.there)
            if not waiting or waiting[0][0].source is not span.source:
                span.source.close()  # a later read would open it again

        with ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-verify") as pool:
            try:
                for number in range(len(root.files)):
                    for span in self._spans(root, number, table):
                        waiting.append((span, pool.submit(run, span)))
                        if len(waiting) > 2 * self._threads:
                            collect()
                while waiting:
                    collect()
            finally:
                for span, future in waiting:
                    future.cancel()
                    span.source.close()

    def _spans(self, root: Root, number: int, table: ChunkTable) -> Iterator[spans.Span]:
        """Check a file's size and header; its bytes, which are left to check."""
        file, chunks = root.files[number], table.of_file(number)
        available = self._size(file.path, file.size)
        if available is None:
            for chunk in chunks:
                self._report(spans.damage_at(file.path, "is lost with its file", chunk.start, chunk.stop, chunk))
            return
        source = open_source(self._where.find(file.path))
        entries = self._read_header(file, source, available)
        if entries is not None:
            for found in disagreements(entries, chunks, complete=table.complete):
                self._report(spans.damage_at(file.path, *found))
        segments = table.segments(file, chunks, entries)
        yield from spans.cut(file.path, source, available, root.block_size, segments)

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
            bad(f"the header {unreadable(error)}")
            return None
        self._advance(file.header)
        if hexdigest(data) != file.digest:
            bad("the header does not fit its checksum")
            return None
        try:
            entries = parse_header(data, file.size, source.name)
        except FormatError as error:
            bad(f"the header is wrong: {reason(error, source.name)}")
            return None
        if 8 + int.from_bytes(data[:8], "little") != file.header:
            bad("the header has not the length that the manifest says")
            return None
        return entries
