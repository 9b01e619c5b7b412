"""Copying a checkpoint byte for byte, every byte verified on the way, committed at the target as a save commits.

A file gets its name at the target when it is whole and on stable storage; so a copy that was cut short goes on from the
files that are there. Memory is a few buffers beside the index. Source and target are folders or URLs of stores. The
work itself is in copying.py.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ckpt.events import Operation
from ckpt.storage.data_file import Staging
from ckpt.storage.files import Files
from ckpt.transfer.copying import Progress, buffers, open_copy
from ckpt_formats.errors import CheckpointNotFoundError, CorruptionError, FormatError
from ckpt_formats.runs import Found, State, find_checkpoints
from ckpt_formats.urls import normal

__all__ = ["CopyResult", "RunCopyResult", "copy", "copy_part", "copy_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """What a copy did."""

    source: str
    path: str
    """The copy's folder."""
    step: int | None
    bytes: int
    """Bytes of all files of the checkpoint."""
    copied: int
    """Of these, the bytes that were written now."""
    verified: int
    """Of these, the bytes that were there already, whole, and were only verified."""
    present: bool
    """Whether the same checkpoint was committed there already; then nothing was done."""
    note: str | None
    """What could not be copied although the checkpoint was: its damaged facts."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCopyResult:
    """What the copy of a run did."""

    copies: Sequence[CopyResult]
    """By step, the oldest first."""
    failed: Sequence[tuple[str, str]]
    """Path and what is wrong: checkpoints that could not be copied because they are damaged, partial, or gone."""
    uncommitted: Sequence[str]
    """Folders of saves that did not end, or have not ended yet; they are not copied."""


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    files: Files | None = None,
    staging: Staging | None = None,
    bandwidth: float | None = None,
) -> CopyResult:
    """Copy the checkpoint in folder `source` to folder `target`, its metrics, tags and pin included.

    While it is copied it is not pruned. When the same checkpoint lies at the target already, nothing is done.

    Args:
        source: a checkpoint's folder, or its URL in a store; on node-local disks with `{node}` in it, or any node's.
        target: the copy's folder or URL. Files of an earlier copy that did not end are used again if they are whole;
            on S3, the parts of files too.
        progress: called after each buffer.
        files: what writes to folders.
        staging: buffers to copy through, AHEAD more of them than are written at once if the source is in a store.
        bandwidth: bytes per second that are sent to a store at most; by default as many as it takes.

    Raises:
        CheckpointNotFoundError: no checkpoint was committed at the source.
        CorruptionError, FormatError: the source is damaged; nothing was committed.
        UnknownVersionError, UnknownCodecError, UnknownDtypeError: this release can't verify it.
        CheckpointExistsError: another checkpoint, or something else, lies at the target.
        SaveFailedError: writing failed; nothing was committed. The same call goes on where this one ended.
        StoreError: so did a store; what is said of SaveFailedError holds.
    """
    path, place = normal(source), normal(target)
    with Operation("copy", place) as operation, open_copy(path, place, progress, files, staging, bandwidth) as work:
        operation.step = work.root.step
        present = work.is_there()
        if not present:
            with operation.phase("copy") as phase:
                work.run()
                phase.bytes = operation.bytes = work.copied
    return CopyResult(
        source=path,
        path=place,
        step=work.root.step,
        bytes=work.total,
        copied=work.copied,
        verified=work.verified,
        present=present,
        note=work.note,
        seconds=operation.total,
    )


def copy_part(source: str | os.PathLike[str], target: str | os.PathLike[str], *, bandwidth: float | None = None) -> int:
    """Of a checkpoint on node-local disks, copy what lies in one node's folder, and commit nothing: `copy` does on some
    node, when all others have brought their parts. Returns the bytes that were written now. Raises as `copy`.
    """
    path, place = normal(source), normal(target)
    with Operation("copy", place) as operation, open_copy(path, place, None, None, None, bandwidth) as work:
        operation.step = work.root.step
        if not work.is_there():
            with operation.phase("copy") as phase:
                work.run(part=True)
                phase.bytes = operation.bytes = work.copied
    return work.copied


def copy_run(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    steps: Collection[int] | None = None,
    progress: Progress | None = None,
    files: Files | None = None,
) -> RunCopyResult:
    """Copy the committed checkpoints of the run in folder `source`, each to its own name in folder `target`.

    They are copied one after the other, the oldest first; those that are at the target already are passed over. A
    damaged one is told in the result and does not keep the others from being copied.

    Args:
        steps: only those of these steps.

    Raises:
        CheckpointNotFoundError: no such run, or it has no checkpoint of one of `steps`.
        CheckpointExistsError, SaveFailedError: see `copy`. What was copied before that stays.
    """
    run, place = normal(source), normal(target)
    # a link to a checkpoint of the run would be a second copy of it
    found = [item for item in find_checkpoints(run) if not os.path.islink(item.path)]
    if any(item.path == run for item in found):
        raise CheckpointNotFoundError(f"{run} is a checkpoint itself and no run; copy it by itself", path=run)
    chosen = [item for item in found if item.state is not State.NOT_COMMITTED]
    if steps is not None:
        chosen = [item for item in chosen if item.step in steps]
        missing = sorted(set(steps) - {item.step for item in chosen})
        if missing:
            raise CheckpointNotFoundError(
                f"{run} has no checkpoint of step {missing[0]}; `ckpt ls` lists those that it has",
                path=run,
                step=missing[0],
            )
    files, staging = files or Files(), Staging(buffers(run))
    total = sum(item.bytes for item in chosen)
    before = 0

    def report(done: int, _total: int) -> None:
        if progress is not None:
            progress(before + done, total)

    copies: list[CopyResult] = []
    failed: list[tuple[str, str]] = []
    for item in chosen:
        try:
            if item.problem is not None:
                raise CorruptionError(_problem(item), path=item.path)
            to = os.path.join(place, os.path.basename(item.path))
            copies.append(copy(item.path, to, progress=report, files=files, staging=staging))
        except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
            failed.append((item.path, str(error)))
        before += item.bytes
    return RunCopyResult(
        copies=copies,
        failed=failed,
        uncommitted=[item.path for item in found if item.state is State.NOT_COMMITTED],
    )


def _problem(item: Found) -> str:
    return f"{item.path}: {item.problem}" if item.path not in (item.problem or "") else str(item.problem)
