"""Going on from the newest checkpoint that is whole and verified, on whatever level it lies.

A load verifies every byte that it reads. When it finds damage, the one before is loaded over it, loudly; what was found
damaged is moved aside once another one is loaded, so that its step can be saved again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

from ckpt.collective import Collective, ProcessGroup
from ckpt.levels.tiers import Level
from ckpt.loading.load import load
from ckpt.loop.roots import share_roots
from ckpt.storage.objects import ObjectStore
from ckpt_formats.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    UnknownCodecError,
    UnknownDtypeError,
    UnknownVersionError,
)
from ckpt_formats.leases import is_lease
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE, folders_of
from ckpt_formats.runs import State, find_checkpoints
from ckpt_formats.urls import is_url

__all__ = ["DAMAGED", "Resumed", "resume"]

DAMAGED = "damaged"
"""The folder in a level that takes what was found damaged."""

MOVERS = 8
"""Objects that are moved aside at once."""

log = logging.getLogger("ckpt")


class Resumed(NamedTuple):
    """Where the training goes on."""

    step: int
    path: str
    """The checkpoint."""


class _Candidate(NamedTuple):
    level: str
    path: str
    step: int
    problem: str | None
    """What can be seen to be wrong with it without reading it all."""


def resume(
    state: MutableMapping[str, object], levels: Sequence[Level], process_group: ProcessGroup | None
) -> Resumed | None:
    """Load the newest checkpoint that can be loaded into the state; None when there is none at all. Collective.

    Raises:
        CorruptionError: there are checkpoints, and all of them are damaged. The state may have been overwritten in
            part.
        StateMismatchError and what else `ckpt.load` raises: the state is another one.
    """
    group = Collective(process_group)
    for level in levels:
        if NODE in level.place:
            share_roots(level.place, group)
    failure: BaseException | None = None
    mine = b"[]"
    try:
        mine = json.dumps(_candidates(levels, everywhere=group.rank == 0)).encode()
    except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
        failure = error
    candidates = [_Candidate(*item) for item in json.loads(group.exchange(mine, failure, _joined))]
    bad: list[_Candidate] = []
    for candidate in candidates:
        try:
            if candidate.problem is not None:
                raise CorruptionError(candidate.problem, path=candidate.path)
            _load(state, candidate, process_group)
        except (UnknownVersionError, UnknownCodecError, UnknownDtypeError):
            raise
        except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
            bad.append(candidate)
            if group.rank == 0:
                log.error("step %d on %s can't be used: %s", candidate.step, candidate.level, error)  # noqa: TRY400
            continue
        _clear([item for item in bad if group.rank == 0 or NODE in item.path])
        if group.rank == 0:
            _say(candidate, bad)
        return Resumed(candidate.step, candidate.path)
    if bad:
        raise CorruptionError(
            f"none of the checkpoints of this run can be loaded ({', '.join(item.path for item in bad)}); look at them "
            "with `ckpt verify`, and remove them, or choose another folder, to begin anew",
            path=bad[0].path,
        )
    return None


def _load(state: MutableMapping[str, object], candidate: _Candidate, process_group: ProcessGroup | None) -> None:
    """Load it, at the second attempt if need be: to take for damaged what could not be read for a moment costs the
    steps since the one before. Collective.
    """
    try:
        load(state, candidate.path, process_group=process_group)
    except CorruptionError as error:
        # it is the same on all ranks
        log.warning("step %d on %s is read once more: %s", candidate.step, candidate.level, error)
        load(state, candidate.path, process_group=process_group)


def _candidates(levels: Sequence[Level], *, everywhere: bool) -> list[tuple[int, int, _Candidate]]:
    """Everything that was committed, with the number of its level; on node-local disks, as far as this rank sees it.
    The rest is told by one rank, for `everywhere`.
    """
    found: list[tuple[int, int, _Candidate]] = []
    others: list[str] = []
    for number, level in enumerate(levels):
        node_local = NODE in level.place
        if not (node_local or everywhere):
            continue
        try:
            items = find_checkpoints(level.place)
        except CheckpointNotFoundError:
            continue  # nothing has been saved there yet
        for item in items:
            if not item.of_loop:
                # an export that somebody put there, say
                others += [] if item.state is State.NOT_COMMITTED else [item.path]
                continue
            if item.state is State.UNKNOWN_VERSION:
                raise UnknownVersionError(str(item.problem), path=item.path)
            if item.step is None or item.state is State.NOT_COMMITTED:
                continue
            problem = item.problem
            if node_local and item.state is State.PARTIAL:
                problem = None  # what lies on other nodes, other ranks may see
            if problem is not None and item.path not in problem:
                problem = f"{item.path}: {problem}"
            found.append((item.step, number, _Candidate(level.name, item.path, item.step, problem)))
    if others and everywhere and not found:
        log.warning(
            "the run begins anew, though there are checkpoints: %s. To go on from one, call it after its step, as %s",
            ", ".join(others),
            names.step_folder(100),
        )
    return found


def _joined(payloads: Sequence[bytes]) -> bytes:
    """What all ranks see, the newest first, and of one step the fastest level's first."""
    found: dict[tuple[int, int, str], list[Any]] = {}
    for payload in payloads:
        for step, number, candidate in json.loads(payload):
            key = (-step, number, candidate[1])
            # one that some rank finds whole, or may
            if key not in found or candidate[3] is None:
                found[key] = candidate
    return json.dumps([candidate for _, candidate in sorted(found.items())]).encode()


def _say(candidate: _Candidate, bad: Sequence[_Candidate]) -> None:
    lost = {item.step for item in bad} - {candidate.step}
    log.log(
        logging.WARNING if bad else logging.INFO,
        "goes on after step %d, from %s (%s)%s",
        candidate.step,
        candidate.path,
        candidate.level,
        f", after {len(lost)} newer that can't be used" if lost else "",
    )


def _clear(bad: Sequence[_Candidate]) -> None:
    """Clear the way for the steps that are trained again."""
    for item in bad:
        for folder in [item.path] if is_url(item.path) else folders_of(item.path):
            try:
                aside = _move_aside_in_store(folder) if is_url(folder) else _move_aside(folder)
            except FileNotFoundError:
                continue  # another rank of this node was faster
            except OSError as error:
                why = error.strerror or error
                log.error("%s is damaged and can't be moved aside (%s); remove it", folder, why)  # noqa: TRY400
            else:
                log.warning("moved aside what is damaged: %s", aside)


def _move_aside(path: str) -> str:
    run, name = os.path.split(path)
    os.makedirs(os.path.join(run, DAMAGED), exist_ok=True)
    number = 0
    while os.path.lexists(aside := os.path.join(run, DAMAGED, f"{name}.{number}")):
        number += 1
    os.rename(path, aside)
    return aside


def _move_aside_in_store(url: str) -> str:
    """The store makes the copies. The step is free when the manifest, which goes first, is gone: whoever dies after
    that leaves debris.
    """
    store = ObjectStore(url)
    run, name = os.path.split(url)
    taken = {entry.name.partition("/")[0] for entry in store.walk(os.path.join(run, DAMAGED))}
    aside = next(path for number in count() if (path := f"{name}.{number}") not in taken)
    aside = os.path.join(run, DAMAGED, aside)
    there = {entry.name: entry.size for entry in store.walk(url)}
    # a lease is of a reader, which is where it is
    files = [entry for entry in there if entry != names.MANIFEST and not is_lease(entry)]

    def move(relative: str) -> None:
        store.copy(os.path.join(url, relative), os.path.join(aside, relative), there[relative])
        store.remove(os.path.join(url, relative))

    move(names.MANIFEST)
    with ThreadPoolExecutor(MOVERS, thread_name_prefix="ckpt-aside") as pool:
        list(pool.map(move, files))
    return aside
