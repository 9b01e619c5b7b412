"""Saving, from live state to a committed checkpoint: describe, plan, write, prepare, commit.

All ranks of a process group take part; rank 0 plans and commits. Every phase ends with an exchange in which failures
travel, so a failure anywhere is an error everywhere, nothing is committed, and what was written is removed.
"""

from __future__ import annotations

import json
import operator
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ckpt import collector
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation, Phase
from ckpt.provenance import provenance
from ckpt.saving.commit import Contents, FileNames, Part, commit, split_files
from ckpt.saving.plan import Assigned, Plan, decode_assignment, describe, encode_assignment, make_plan, merge_entries
from ckpt.saving.side_copies import finish_gpus
from ckpt.saving.sources import BytesSource, TensorSource
from ckpt.saving.values import merge_values
from ckpt.state import LocalState, Piece, flatten
from ckpt.state.references import encode_leaf
from ckpt.state.torch_dtypes import dtype_of
from ckpt.storage.compressing import require_compress
from ckpt.storage.data_file import Chunk, Staging, layout_of, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import Folder, discard, prepare_folder, require_free
from ckpt_formats.digest import hexdigest
from ckpt_formats.dtypes import dtype as dtype_named
from ckpt_formats.errors import CheckpointError, SaveFailedError, StateError
from ckpt_formats.geometry import Box
from ckpt_formats.manifest import BLOB_PREFIX, rank_blob
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE
from ckpt_formats.safetensors_file import FileLayout
from ckpt_formats.urls import folder_of
from ckpt_formats.values import encode

PLANS = 4
"""Plans that are kept for the next save: more than one, for states that are saved in turns."""

_UINT8 = dtype_named("uint8")
_ROUND = 256
"""Per-rank values take a multiple of so many bytes, filled up with spaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """What a save did."""

    path: str
    """The checkpoint's folder."""
    step: int | None
    """The training step it is of."""
    bytes: int
    """Bytes of tensors and values that all ranks together wrote, compressed if they were."""
    seconds: float
    """From the call to the commit, on this rank."""
    phases: Mapping[str, float]
    """Seconds of this rank in each phase, waiting for other ranks included."""


@dataclass(slots=True)
class _Known:
    """A plan that this process took part in before."""

    assignment: Sequence[Assigned]
    plan: Plan | None
    """On rank 0 only."""
    blobs: Sequence[tuple[str, int]] = ()
    """Names and sizes of the payloads beside its tensors when it was last laid out."""
    layouts: Sequence[FileLayout] = ()

    def lay_out(self, chunks: Sequence[Chunk], blobs: Sequence[tuple[str, int]]) -> Sequence[FileLayout]:
        """Where this rank's chunks go in its files; worked out only when something has changed."""
        if not self.layouts or self.blobs != blobs:
            self.layouts = [layout_of(some) for some in split_files(chunks)]
            self.blobs = blobs
        return self.layouts


class Saver:
    """Saves states; keeps between saves what makes the next one cheap: plans and staging buffers."""

    def __init__(self, files: Files | None = None, staging: Staging | None = None) -> None:
        self.files = files or Files()
        self.staging = staging or Staging()
        self.plans: OrderedDict[str, _Known] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def save(
        self,
        state: Mapping[str, object],
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        process_group: ProcessGroup | None = None,
        compress: bool = False,
    ) -> SaveResult:
        """See ckpt.save."""
        compress = bool(require_compress(compress, auto=False))
        # one at a time: threads that share the staging buffers could each wait for the others'
        with self._one_at_a_time, collector.paused():
            group = Collective(process_group)
            attempt = Attempt(self, group, path, step)
            with attempt.operation, group.needed():
                return attempt.run(state, compress=compress)

    def remember(self, key: str, known: _Known) -> None:
        """Keep a plan, and forget the one that was not used for longest."""
        self.plans[key] = known
        self.plans.move_to_end(key)
        while len(self.plans) > PLANS:
            self.plans.popitem(last=False)


class Taken(NamedTuple):
    """What one rank holds: tensors as they are, values as they will be stored."""

    local: LocalState
    values: Mapping[str, Any]
    """Path -> encoded value, equal on all ranks that have it."""
    blobs: Mapping[str, bytes]
    """What is too large for the root, or this rank's own, by the name of its tensor."""


class Planned(NamedTuple):
    """What one rank has to write."""

    attempt: str
    chunks: Sequence[Chunk]
    assignment: Sequence[Assigned]
    """What the chunks are of, but for the last ones, which are `blobs`."""
    blobs: Sequence[str]
    """Names of what this rank writes of what was taken as blobs."""
    plan: Plan | None
    """On rank 0 only."""
    failure: Exception | None
    """Why this rank can't write it; to be told to the others at the end of the next phase."""
    answer: bool
    """Whether `question` was true on any rank."""
    layouts: Callable[[], Sequence[FileLayout]]
    """Where the chunks go in this rank's files."""


class Attempt:
    """One attempt at one checkpoint, on one rank.

    Attributes:
        given: the path as it was given, the same on all ranks.
        path: the checkpoint's folder, on this node.
        node_local: whether each node has its own: the path was given with `{node}` in it.
        step: the training step, if there is one.
        operation: what it tells of itself.
        folder: on rank 0, the folder that was made for it.
    """

    def __init__(
        self,
        saver: Saver,
        group: Collective,
        path: str | os.PathLike[str],
        step: int | None,
        name: str = "save",
        nodes: Sequence[str] = (),
    ) -> None:
        """`nodes` has the name of each rank's node, where they are known."""
        self._saver = saver
        self._group = group
        self.given = folder_of(path)
        self._nodes = nodes
        self.node_local = NODE in self.given
        if self.node_local and not nodes:
            raise StateError(
                f"{self.given}: a folder per node is for ckpt.async_save, whose agents know the nodes; give a path "
                f"without {NODE}, on storage that all nodes share"
            )
        self.path = self.given.replace(NODE, nodes[group.rank]) if self.node_local else self.given
        self.step = names.step_of(os.path.basename(self.path)) if step is None else _step(step)
        self.operation = Operation(name, self.path, step=self.step, rank=group.rank, world_size=group.world_size)
        group.waiting = self.operation.waiting
        self._taken = Taken(LocalState(), {}, {})
        self._failure: BaseException | None = None
        # what follows is rank 0's
        self.folder: Folder | None = None
        self._attempt = ""
        self._values: dict[str, Any] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._blob_sizes: dict[str, int] = {}

    def run(self, state: Mapping[str, object], *, compress: bool = False) -> SaveResult:
        """Describe, plan, write, commit."""
        try:
            self.take(state)
            planned = self.plan()
            finish_gpus(chunk.source.tensor for chunk in planned.chunks if isinstance(chunk.source, TensorSource))
            with self.operation.phase("write") as phase:
                part, phase.failure = self._write(planned, phase, compress)
            with self.operation.phase("commit"):
                finish = partial(self._finish, planned.plan)
                total = int(self._group.exchange(part, phase.failure, finish))
            self.operation.bytes = total
        except BaseException:
            self.discard()
            raise
        return SaveResult(
            path=self.path,
            step=self.step,
            bytes=total,
            seconds=self.operation.total,
            phases=self.operation.seconds,
        )

    def take(self, state: Mapping[str, object]) -> Taken | None:
        """Take the state apart; None if that can't be done, of which ranks hear when they next meet, in `plan`."""
        with self.operation.phase("describe") as phase:
            try:
                self._taken = _take(state, self._group.rank)
            except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
                phase.failure = self._failure = error
                return None
        return self._taken

    def plan(self, failure: BaseException | None = None, *, question: bool = False) -> Planned:
        """Agree with the other ranks on who writes what was taken, and make the folders. Collective.

        A `failure` of this rank, from before, ends the attempt on every rank. Whether any rank's `question` is true is
        answered on the way.
        """
        taken = self._taken
        failure = failure or self._failure
        with self.operation.phase("plan"):
            description = hello = b""
            try:
                if failure is None:
                    description = describe(taken.local)
                    hello = self._hello(taken, hexdigest(description), question)
            except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
                failure = error
            opened = json.loads(self._group.exchange(hello, failure, self._open))
            known = self._agree_on_plan(opened["key"], opened["cached"], description)
        chunks: list[Chunk] = []
        unreadable: Exception | None = None
        try:
            chunks = chunks_of(taken.local, known.assignment)
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            unreadable = error
        blobs = [name for name in taken.blobs if opened["blobs"][name] == self._group.rank]
        for name in blobs:
            data = taken.blobs[name]
            chunks.append(Chunk(name, _UINT8, (len(data),), Box((0,), (len(data),)), BytesSource(data)))
        layouts = partial(known.lay_out, chunks, [(name, len(taken.blobs[name])) for name in blobs])
        return Planned(
            opened["attempt"], chunks, known.assignment, blobs, known.plan, unreadable, opened["answer"], layouts
        )

    def discard(self) -> None:
        """On rank 0, remove what the attempt has left behind."""
        if self.folder is not None:
            discard(self._saver.files, self.folder, self._attempt)

    def _hello(self, taken: Taken, digest: str, question: bool) -> bytes:
        """This rank's greeting to rank 0: everything that changes from save to save."""
        return _json(
            {
                "path": self.given,
                "step": self.step,
                "question": question,
                "digest": digest,
                "plans": list(self._saver.plans),
                "values": taken.values,
                "entries": taken.local.entries,
                "blobs": {name: len(data) for name, data in taken.blobs.items()},
            }
        )

    def _open(self, payloads: list[bytes]) -> bytes:
        """On rank 0: join the values, see whether the plan is known, make the folders."""
        hellos = [json.loads(payload) for payload in payloads]
        for rank, hello in enumerate(hellos):
            if hello["path"] != self.given:
                raise StateError(
                    f"rank {rank} saves to {hello['path']} but rank 0 to {self.given}; give all ranks the same path",
                    rank=rank,
                )
            if hello["step"] != self.step:
                raise StateError(
                    f"rank {rank} saves step {hello['step']} but rank 0 step {self.step}; let ranks agree on it first",
                    rank=rank,
                )
        require_free(self.path)
        self._entries = merge_entries([hello["entries"] for hello in hellos])
        self._values = merge_values([hello["values"] for hello in hellos], self._entries)
        writers: dict[str, int] = {}
        for rank, hello in enumerate(hellos):
            for name, size in hello["blobs"].items():
                writers.setdefault(name, rank)
                self._blob_sizes[name] = size
        key = hexdigest("".join(hello["digest"] for hello in hellos).encode())
        self._attempt = secrets.token_hex(8)
        self.folder = prepare_folder(self._saver.files, self.path)
        return _json(
            {
                "attempt": self._attempt,
                "key": key,
                "cached": all(key in hello["plans"] for hello in hellos),
                "blobs": writers,
                "answer": any(hello["question"] for hello in hellos),
            }
        )

    def _agree_on_plan(self, key: str, cached: bool, description: bytes) -> _Known:
        if cached:
            known = self._saver.plans[key]
        else:
            plan: Plan | None = None

            def decide(descriptions: list[bytes]) -> list[bytes]:
                nonlocal plan
                plan = make_plan(descriptions)
                return [encode_assignment(assignment) for assignment in plan.assignments]

            assignment = decode_assignment(self._group.exchange_each(description, None, decide))
            known = _Known(assignment, plan)
        self._saver.remember(key, known)
        return known

    def _write(self, planned: Planned, phase: Phase, compress: bool) -> tuple[bytes, BaseException | None]:
        """Write this rank's files. Returns its part, encoded."""
        rank = self._group.rank
        if planned.failure is not None:
            return b"", planned.failure
        try:
            written = [
                write_data_file(
                    self._saver.files,
                    self.path,
                    names.data_path(rank, number, planned.attempt),
                    some,
                    self._saver.staging,
                    compress=compress,
                    layout=None if compress else planned.layouts()[number],
                )
                for number, some in enumerate(split_files(planned.chunks))
            ]
            phase.bytes = sum(file.size for file in written)
            chunk_names = [FileNames.of([chunk.name for chunk in some]) for some in split_files(planned.chunks)]
            return Part(written, chunk_names).encode(), None
        except Exception as error:  # noqa: BLE001 - whatever it is, it travels to the other ranks
            return b"", _explain(error, self.path, rank)

    def contents(self, plan: Plan) -> Contents:
        """On rank 0: what the checkpoint says beside its chunks."""
        tensors: dict[str, tuple[str, tuple[int, ...], int | None]] = dict(plan.tensors)
        tensors.update({name: ("uint8", (size,), None) for name, size in self._blob_sizes.items()})
        return Contents(
            step=self.step,
            tensors=tensors,
            aliases=plan.aliases,
            values=self._values,
            entries=self._entries,
            layout={"world_size": self._group.world_size, "meshes": plan.meshes, "cuts": plan.cuts} | self.places(),
            provenance=provenance(),
        )

    def places(self) -> dict[str, Any]:
        """On node-local disks: which ranks' files lie on which node, and where."""
        if not self.node_local:
            return {}
        ranks: dict[str, list[int]] = {}
        for rank, node in enumerate(self._nodes):
            ranks.setdefault(node, []).append(rank)
        return {"nodes": ranks, "folder": self.given}

    def _finish(self, plan: Plan | None, payloads: list[bytes]) -> bytes:
        """On rank 0: commit what everybody wrote."""
        if plan is None or self.folder is None:
            raise AssertionError("only rank 0, which planned, commits")
        parts = [Part.decode(payload) for payload in payloads]
        try:
            commit(self._saver.files, self.folder, self._attempt, self.contents(plan), parts)
        except OSError as error:
            raise _explain(error, self.path, 0) from error
        return str(sum(int(file.rows.length.sum()) for part in parts for file in part.files)).encode()


def _take(state: Mapping[str, object], rank: int) -> Taken:
    local = flatten(state)
    blobs: dict[str, bytes] = {}

    def keep(data: bytes) -> str:
        name = BLOB_PREFIX + hexdigest(data)
        blobs[name] = bytes(data)
        return name

    values = {path: encode(value, path, blob=keep, leaf=encode_leaf) for path, value in local.values.items()}
    own = {path: encode(value, path, leaf=encode_leaf) for path, value in local.per_rank.items()}
    if own:
        text = _json(own)
        # numbers of a digit more or less shall not change the form of the checkpoint
        blobs[rank_blob(rank)] = text + b" " * (-len(text) % _ROUND)
    return Taken(local, values, blobs)


def chunks_of(local: LocalState, assignment: Sequence[Assigned]) -> list[Chunk]:
    """What this rank writes, as chunks over the live tensors."""
    tensors = list(local.tensors.values())
    chunks = []
    for position, number, box in assignment:
        tensor = tensors[position]
        view = view_of(tensor.pieces[number], box)
        chunks.append(Chunk(tensor.name, dtype_of(tensor.dtype), tensor.shape, box, TensorSource(view)))
    return chunks


def view_of(piece: Piece, box: Box) -> torch.Tensor:
    """The live memory of a box within a piece."""
    return piece.view if box == piece.box else piece.view[box.relative_to(piece.box.offsets).slices()]


def _step(step: object) -> int:
    """A step as it can be stored, from any kind of integer."""
    try:
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(step, bool) or not 0 <= number < 1 << 63:
        raise StateError(f"step={step!r} is no training step; give a non-negative integer, or None for no step")
    return number


def _explain(error: Exception, path: str, rank: int) -> Exception:
    """An error of the file system as one that says what it means for the checkpoint."""
    if not isinstance(error, OSError) or isinstance(error, CheckpointError):
        return error
    failed = SaveFailedError(
        f"{path}: rank {rank} could not write ({error.strerror or error}); nothing was committed and earlier "
        "checkpoints are untouched. Free space or choose another place, then save again",
        path=path,
        rank=rank,
    )
    failed.__cause__ = error
    return failed


def _json(tree: object) -> bytes:
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode("ascii")
