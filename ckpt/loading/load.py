"""Loading a checkpoint into live state, in place, whatever cut either has.

Every rank reads the root, intersects what it holds with what is stored, and reads only those ranges, straight into the
live memory where it can. Where several ranks need the same blocks, one of them reads these for all (sharing.py); else
they take part in each other's load only to learn of failures.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ckpt import collector
from ckpt.collective import Collective, ProcessGroup
from ckpt.events import Operation
from ckpt.loading.bounce import Bounced, read_bounced
from ckpt.loading.exchange import ElsewhereError
from ckpt.loading.node import patience_s
from ckpt.loading.sharing import share
from ckpt.loading.together import identity, listed, prefixes, refuse_mixture, unexpected_by_all
from ckpt.network import over_network
from ckpt.state import SavedState, SavedTensor, Target, build_target
from ckpt.state.given import Others
from ckpt.state.meta import Materialised
from ckpt.state.references import LEAVES
from ckpt.state.torch_dtypes import as_carrier, can_cast, dtype_of, torch_dtype
from ckpt_formats.checkpoint import Checkpoint, open_checkpoint
from ckpt_formats.errors import (
    CheckpointError,
    DtypeMismatchError,
    FormatError,
    MissingTensorError,
    RankError,
    ShapeMismatchError,
    StateError,
    StateMismatchError,
)
from ckpt_formats.reading import BUFFERS, ReadPlan, ReadStats, Request
from ckpt_formats.renaming import Rename
from ckpt_formats.urls import is_url, tidy

SHARED = 1.1
"""Ranks share what they read when they would read so many times what is stored, all together."""
LITTLE = 16 << 20
"""Bytes that are read twice rather than shared."""
EXCHANGES = ("auto", "always", "never")
PARTLY = "Tensors of the state may have been overwritten in part"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load did, on this rank."""

    path: str
    """The checkpoint's folder."""
    step: int | None
    """The training step it is of."""
    bytes_needed: int
    """Bytes of the elements that this rank holds."""
    bytes_read: int
    """Bytes that this rank read from the checkpoint, to get and verify them; what ranks of a node have in common one of
    them reads, so this may be less than was needed."""
    bytes_received: int
    """Bytes that came to this rank from other nodes, which had read them."""
    seconds: float
    """From the call to the end, on this rank."""
    phases: Mapping[str, float]
    """Seconds of this rank in each phase, waiting for other ranks included."""
    missing: Sequence[str] = field(default_factory=list)
    """Names that the state has and the checkpoint does not; left as they were. Only with strict=False."""
    unexpected: Sequence[str] = field(default_factory=list)
    """Names that the checkpoint has below the entries of the state, and the state does not. Only with strict=False."""
    per_rank_skipped: Sequence[str] = field(default_factory=list)
    """Per-rank values (such as states of random generators) that were left as they were, because the checkpoint was
    written by another number of ranks."""
    per_rank_derived: Sequence[str] = field(default_factory=list)
    """Per-rank values that were made, by their rule, of those that another number of ranks had saved."""
    retied: Mapping[str, str] = field(default_factory=dict)
    """Names that are stored apart from another one and are one tensor with it in the state -> the name whose elements
    were taken for both."""
    still_meta: Sequence[str] = field(default_factory=list)
    """Buffers on the meta device that are not saved (`persistent=False`), and so are there still: make them anew."""


def load(
    state: MutableMapping[str, object],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    cast: bool = False,
    rename: Rename | None = None,
    buffers: int = BUFFERS,
    exchange: str = "auto",
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
) -> LoadResult:
    """See ckpt.load."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is one of {', '.join(EXCHANGES)}, not {exchange!r}")
    folder, group = tidy(path), Collective(process_group)
    operation = Operation("load", folder, rank=group.rank, world_size=group.world_size)
    group.waiting = operation.waiting
    load = _Load(
        state,
        folder,
        strict=strict,
        cast=cast,
        rename=rename,
        group=group,
        buffers=buffers,
        exchange=exchange,
        device=device,
    )
    with collector.paused(), operation, closing(load), group.needed():
        _prepare(load, folder, operation)
        try:
            return _fill(load, folder, group, operation)
        except BaseException as error:
            _half_loaded(error)
            raise


def _prepare(load: _Load, folder: str, operation: Operation) -> None:
    """Find out whether every rank can load. If any can't, nothing was touched."""
    failure: BaseException | None = None
    try:
        try:
            with operation.phase("plan"):
                load.plan()
                operation.step = load.checkpoint.step
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks learn it
            failure = _named(error, folder)
        with operation.phase("agree"):
            load.agree(failure)
    except BaseException:
        load.untouched()
        raise


def _fill(load: _Load, folder: str, group: Collective, operation: Operation) -> LoadResult:
    failure: BaseException | None = None
    try:
        with operation.phase("read") as phase:
            load.read()
            phase.bytes = operation.bytes = load.stats.bytes_read
    except ElsewhereError:
        pass  # that rank says what it was
    except RankError as error:
        # a rank died, so there is nobody to agree with
        group.give_up(error)
        raise
    except Exception as error:  # noqa: BLE001 - as above
        failure = error
    with operation.phase("agree"):
        group.agree(failure)
    with operation.phase("apply"):
        try:
            load.apply()
        except Exception as error:  # noqa: BLE001 - as above
            failure = error
        # else others would wait for this rank, in what is collective of `refresh` or in what follows the load
        group.agree(failure)
        load.target.refresh()
    target, stats = load.target, load.stats
    return LoadResult(
        path=folder,
        step=load.checkpoint.step,
        bytes_needed=stats.bytes_needed,
        bytes_read=stats.bytes_read,
        bytes_received=load.received,
        seconds=operation.total,
        phases=operation.seconds,
        missing=target.missing,
        unexpected=load.unexpected,
        per_rank_skipped=target.per_rank_skipped,
        per_rank_derived=target.per_rank_derived,
        retied=target.retied,
        still_meta=load.still_meta,
    )


def _named(error: Exception, folder: str) -> Exception:
    """Say in an error about what is stored, which may come from where no files are known, which checkpoint it is."""
    if isinstance(error, FormatError | MissingTensorError | StateMismatchError) and folder not in error.message:
        error.path = error.path or folder
        error.message = f"{folder}: {error.message}"
    return error


def _half_loaded(error: BaseException) -> None:
    why = f"{PARTLY}: load another checkpoint before training on"
    if isinstance(error, CheckpointError):
        error.message += f". {why}"
    else:
        error.add_note(why)


class _Load:
    """One load on one rank."""

    def __init__(
        self,
        state: MutableMapping[str, object],
        path: str,
        *,
        strict: bool,
        cast: bool,
        rename: Rename | None,
        group: Collective,
        buffers: int,
        exchange: str,
        device: torch.device | str | None,
    ) -> None:
        self._state = state
        self._path = path
        self._strict = strict
        self._cast = cast
        self._rename = rename
        self._group = group
        self._buffers = buffers
        self._exchange = exchange
        self._device = device
        self._made: Materialised | None = None
        self.checkpoint: Checkpoint
        self._stack = ExitStack()
        self.target: Target
        self.stats = ReadStats()
        self.received = 0
        self._plan = ReadPlan()
        self._bounced: list[Bounced] = []
        """What is on devices, if each rank reads for itself."""
        self._to_devices = ReadPlan()
        """The same block by block, as ranks share it."""
        self._shares = False
        self._past_cache = True
        self.unexpected: list[str] = []
        self._lost: list[str] = []
        """What is stored of tensors that are tied in the state to others, and differs from those."""

    def plan(self) -> None:
        """Open the checkpoint and match it with the state. Touches nothing."""
        patience_s()  # what it refuses, all ranks learn now
        # in a store, one rank holds it for all, until the last has read
        held = self._group.rank == 0 or not is_url(self._path)
        self.checkpoint = self._stack.enter_context(open_checkpoint(self._path, rename=self._rename, held=held))
        manifest = self.checkpoint.manifest
        self._values = {
            path: self.checkpoint.decode(value, path, leaf=LEAVES)
            for path, value in manifest.values.items()
            if any(prefix in self._state for prefix in prefixes(path))
        }
        metas = manifest.model_tensors
        dtypes = {name: torch_dtype(name) for name in {meta.dtype.name for meta in metas.values()}}
        saved = SavedState(
            tensors={name: SavedTensor(dtypes[meta.dtype.name], meta.shape) for name, meta in metas.items()},
            aliases=manifest.aliases,
            values=self._values,
            entries=manifest.entries,
            require=self.checkpoint.reader.require,
        )
        same_world = manifest.per_rank_world_size == self._group.world_size
        self._per_rank = self._per_rank_of(self._group.rank) if same_world else None
        self._made = Materialised(self._state, self._device)
        self.target = build_target(self._state, saved)
        self._check_made(self._made)
        self.unexpected = list(self.target.unexpected)
        # equal ones were tied where they were saved too, but on two stages of a pipeline
        self._lost = [
            f"{name} ({taken} was taken)" for name, taken in self.target.retied.items() if manifest.differ(name, taken)
        ]
        if self._group.world_size == 1 or self.target.missing:
            self._check_names()
        self._check_tensors(saved)
        reader = self.checkpoint.reader
        self._plan = reader.plan(self._to_host(self._bounced))
        if self._group.world_size > 1:
            self._to_devices = reader.plan(item.request for item in self._bounced)

    def _per_rank_of(self, rank: int) -> dict[str, Any]:
        """Path -> decoded value of what a rank saved as its own."""
        own = self.checkpoint.per_rank(rank)
        return {path: self.checkpoint.decode(value, path, leaf=LEAVES) for path, value in own.items()}

    def agree(self, failure: BaseException | None) -> None:
        """Raise on every rank if any can't load, if they have opened different checkpoints, or if there are names that
        no rank expects.
        """
        covered = mark = 0
        if failure is None:
            covered = self._plan.bytes_covered + self._to_devices.bytes_covered
            mark = identity(self.checkpoint)
        group = self._group
        question, covered, marks = group.tally(failure, bool(self.unexpected), covered, mark)
        if group.world_size == 1:
            return
        if marks != group.world_size * mark:
            refuse_mixture(group, self.checkpoint)
        # more than there is: several ranks need the same blocks. All know that, so who shares nothing asks nobody
        most = SHARED * self._stored() + LITTLE
        self._shares = covered > most
        # what others of this node read too is left to them in the page cache
        self._past_cache = not self._shares
        if question:
            self.unexpected = unexpected_by_all(group, self.target.entries, self.unexpected)
            self._check_names()

    def _stored(self) -> int:
        """Bytes of all tensors below the entries of the state, whichever ranks need them."""
        heads = {entry.partition(".")[0] for entry in self._state}
        metas = self.checkpoint.manifest.model_tensors
        return sum(meta.nbytes for name, meta in metas.items() if name.partition(".")[0] in heads)

    @property
    def still_meta(self) -> Sequence[str]:
        """Buffers that are on the meta device still."""
        return self._made.left if self._made is not None else ()

    def untouched(self) -> None:
        """Leave the state as it was before `plan`."""
        if self._made is not None:
            self._made.undo()

    def _check_made(self, made: Materialised) -> None:
        absent = sorted(made.unfilled(self.target.tensors, self.target.filled()))
        if absent:
            raise self._misfit(
                StateMismatchError,
                listed("On the meta device and not in the checkpoint", absent),
                "They would be left without values; make them on a real device",
            )

    def _check_names(self) -> None:
        target = self.target
        if self._strict and (target.missing or self.unexpected):
            raise self._misfit(
                StateMismatchError,
                listed("In the state but not in the checkpoint", target.missing)
                + listed("In the checkpoint but not in the state", self.unexpected),
                "Give the state that was saved, or strict=False to load what they have in common",
            )

    def _check_tensors(self, saved: SavedState) -> None:
        shapes, dtypes, unlike = [], [], []
        for name, local in self.target.tensors.items():
            stored = saved.find(name)
            if stored is None:
                continue
            if local.overlaps:
                raise StateError(
                    f"the tensor {name!r} of the state can't be written, since elements of it share memory (was it "
                    "expanded?); put its .clone() into the state",
                    tensor=name,
                )
            if stored.shape != local.shape:
                shapes.append(f"{name} ({list(stored.shape)} stored, {list(local.shape)} in the state)")
            elif stored.dtype != local.dtype:
                both = f"{name} ({stored.dtype} stored, {local.dtype} in the state)"
                if not can_cast(dtype_of(stored.dtype), dtype_of(local.dtype)):
                    unlike.append(both)
                elif not self._cast:
                    dtypes.append(both)
        if shapes:
            raise self._misfit(ShapeMismatchError, listed("Other shapes", shapes), "Build the model as it was saved")
        if unlike:
            raise self._misfit(
                DtypeMismatchError,
                listed("Not all values of what is stored can be had in the dtype of", unlike),
                "Give them the dtypes that were saved; cast=True converts no such tensors",
            )
        if dtypes:
            raise self._misfit(DtypeMismatchError, listed("Other dtypes", dtypes), "Pass cast=True to convert them")

    def _misfit(self, kind: type[CheckpointError], what: str, remedy: str) -> CheckpointError:
        """The error that the checkpoint is not one of this state."""
        return kind(f"{self._path} does not fit the state.{what} {remedy}", path=self._path)

    def read(self) -> None:
        """Read everything that this rank holds into its live memory."""
        manifest, reader = self.checkpoint.manifest, self.checkpoint.reader
        plan, devices = self._plan, {item.view.device for item in self._bounced if item.view.is_cuda}
        if self._shares:
            plan.add_all(self._to_devices)
            self._bounced.clear()
            shared = share(
                self._group,
                reader,
                plan,
                far=self.checkpoint.locations.far,
                block_size=manifest.block_size,
                buffers=self._buffers,
                exchange=self._exchange,
                shared_store=is_url(self._path) or over_network(self._path),
            )
            if shared is not None:
                stats, self.received, plan = shared
                self._add(stats)
        self._add(reader.execute(plan, threads=_threads(), buffers=self._buffers, past_cache=self._past_cache))
        for device in devices if self._shares else ():
            torch.cuda.synchronize(device)
        self.stats.bytes_needed = self._plan.bytes_needed
        self._add(
            read_bounced(reader, self._bounced, threads=_threads(), buffers=self._buffers, past_cache=self._past_cache)
        )

    def _to_host(self, bounced: list[Bounced]) -> Iterator[Request]:
        """What goes to host memory, straight where that can be; the rest goes to `bounced`."""
        tensors, aliases = self.checkpoint.manifest.tensors, self.checkpoint.manifest.aliases
        for local in self.target.tensors.values():
            name = local.name
            meta = tensors.get(name) or tensors.get(aliases.get(name, name))
            if meta is None:
                continue
            same = meta.dtype is dtype_of(local.dtype)
            for piece in local.pieces:
                view = piece.view
                if same and view.is_cpu and not (view.is_conj() or view.is_neg()):
                    yield Request(name, piece.box, as_carrier(view))
                    continue
                copied = Bounced(name, meta.dtype, piece.box, view)
                if view.is_cpu:
                    yield copied.request
                else:
                    bounced.append(copied)

    def _add(self, stats: ReadStats) -> None:
        self.stats.bytes_read += stats.bytes_read
        self.stats.bytes_needed += stats.bytes_needed

    def apply(self) -> None:
        """Attach what was made and restore the values."""
        manifest = self.checkpoint.manifest
        saved = manifest.per_rank_world_size or manifest.world_size
        rank, world_size = self._group.rank, self._group.world_size
        # several values have rules, and each of them asks for what every rank saved
        others = Others(cache(self._per_rank_of), saved, rank, world_size) if saved != world_size else None
        self.target.apply(self._values, self._per_rank, others)
        if self._lost:
            warnings.warn(
                f"{self._path} has of some tensors two that differ, and they are one in the state:"
                + listed("Not loaded", self._lost)
                + " Untie them in the model to load both",
                stacklevel=4,
            )
        skipped = self.target.per_rank_skipped
        if skipped and saved != world_size:
            warnings.warn(
                f"{self._path} has the per-rank values of {saved} ranks, and there are {world_size} now:"
                + listed("These have no rule for that and stay as they were", skipped)
                + " Give ckpt.PerRank a `resize`, or set them yourself",
                stacklevel=4,
            )

    def close(self) -> None:
        """Let the checkpoint go."""
        self._stack.close()


def _threads() -> int:
    """How many threads a rank reads with: the node's ranks share its CPUs. torchrun says how many ranks those are."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(4, (os.cpu_count() or 1) // max(1, int(ranks) if ranks.isdecimal() else 1)))
