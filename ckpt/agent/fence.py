"""The fence: optimizers wait for what is still being copied before they step.

What only an optimizer changes may be copied while the training goes on, because a hook of ours runs before each step,
of whichever optimizer of this process: one that is made after the save may change the same parameters. If parameters
change between two saves although no hook has run, somebody else changes them: that is told, and from then on nothing is
copied lazily.
"""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ckpt.state.deepspeed import groups_of, steps_by
from ckpt.state.dtensor import local_tensor
from ckpt.state.entries import entries_of
from ckpt.state.optimizers import state_of
from ckpt_formats.errors import SaveFailedError

log = logging.getLogger("ckpt")

_Owner = tuple[weakref.ref[torch.optim.Optimizer], str]
"""An optimizer, and its name in the state."""


class Trusted(Protocol):
    """A save whose lazy capture somebody may have waited for, who then may change everything."""

    trusted: bool


class _Guarded(NamedTuple):
    """What was captured lazily of what an optimizer owns: tensors, and how many changes each had seen then."""

    entry: str
    tensors: list[tuple[torch.Tensor, int]]


class Fence:
    """Hooks on every step of any optimizer, from the first lazy capture on. Close it, so that steps are let go."""

    def __init__(self, settle: Callable[[], None]) -> None:
        """`settle` returns when nothing is being copied any more."""
        self._settle = settle
        self._hooks: list[RemovableHandle] = []
        self._stepping: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that are within a step, as far as is seen."""
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that have stepped since the last lazy capture began."""
        self._guarded: dict[weakref.ref[torch.optim.Optimizer], _Guarded] = {}
        """Until a step has changed them, or the optimizer is gone: nothing here keeps a model alive."""
        self._announced = False
        """Whether a step has changed anything of that."""
        self._unwatched: set[str] = set()
        """Names of optimizers of which it was told that their steps can't be seen."""
        self._lazily = False
        """Whether the last save captured anything lazily."""
        self._save: Trusted | None = None
        self._eager = False
        self._unsure = False

    def problem(self) -> SaveFailedError | None:
        """Why lazy capture can't be trusted, if it is found out now: what was captured lazily by the last save has
        changed since, and no optimizer that owns it has stepped. From then on everything is captured eagerly.
        """
        guarded, self._guarded = self._guarded, {}
        save, self._save = self._save, None
        trusted = save is None or save.trusted
        self._unsure = self._lazily and not self._announced and not trusted
        self._lazily = False
        if trusted:
            return None
        for entry, tensors in guarded.values():
            for tensor, version in tensors:
                if tensor._version == version:
                    continue
                self._eager = True
                why = (
                    f"a tensor of shape {list(tensor.shape)} that belongs to the optimizer {entry!r} was changed since "
                    "the last async_save, but no step of an optimizer that owns it was seen: lazy capture can't tell "
                    "when it may copy. From now on everything is copied before async_save returns. Pass "
                    'capture="eager" to say that it is meant, or wait for pending.captured() before changing tensors'
                )
                log.warning("%s", why)
                return SaveFailedError(f"nothing was saved: {why}")
        return None

    def around(self, state: Mapping[str, object], save: Trusted) -> Callable[[torch.Tensor], bool]:
        """Returns what says whether a tensor may be copied lazily for this save, and sees to it that steps wait."""
        owned = self._owned(state)
        # a loop that did not step may be one whose steps are not seen; and what saves from within a step (a closure, a
        # hook) is behind the fence already
        if self._eager or self._unsure or self._stepping:
            return lambda _: False
        self._stepped.clear()
        self._announced = False
        self._save = save
        guarded = self._guarded = {}

        def lazily(tensor: torch.Tensor) -> bool:
            owner = owned.of(tensor)
            # the changes of tensors that were made for inference are not counted
            if owner is None or tensor.is_inference():
                return False
            optimizer, entry = owner
            if optimizer not in guarded:
                guarded[optimizer] = _Guarded(entry, [])
            guarded[optimizer].tensors.append((tensor, tensor._version))
            self._lazily = True
            return True

        return lazily

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._guarded = {}

    def _owned(self, state: Mapping[str, object]) -> _Owned:
        """What the optimizers of a state own whose steps are seen, from now on at the latest."""
        owned = _Owned()
        for entry in entries_of(state):
            if entry.kind != "optimizer":
                continue
            optimizer = _watched(steps_by(entry.value))
            if optimizer is None:
                self._tell_unwatched(entry.key, entry.value)
                continue
            if not self._hooks:
                # what compiles a step must not compile these, which do something else every time
                self._hooks = [
                    register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step)),
                    register_optimizer_step_post_hook(torch.compiler.disable(self._after_step)),
                ]
            owner = (weakref.ref(optimizer, self._forget), entry.key)
            for tensor in _tensors_of(entry.value):
                owned.add(tensor, owner)
        return owned

    def _tell_unwatched(self, entry: str, optimizer: object) -> None:
        if entry not in self._unwatched:
            self._unwatched.add(entry)
            log.warning(
                "the steps of the optimizer %r can't be seen, so what it owns is copied before async_save returns: a "
                "%s is made without torch.optim.Optimizer.__init__, which its __init__ should call",
                entry,
                type(optimizer).__qualname__,
            )

    def _forget(self, optimizer: weakref.ref[torch.optim.Optimizer]) -> None:
        self._guarded.pop(optimizer, None)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._settle()
        self._stepping.add(optimizer)
        if optimizer not in self._stepped:
            self._stepped.add(optimizer)
            self._announce(optimizer)

    def _announce(self, optimizer: torch.optim.Optimizer) -> None:
        """A step changes what its optimizer owns, whichever one that was guarded for."""
        if self._guarded.pop(weakref.ref(optimizer), None) is not None:
            self._announced = True
        if not self._guarded:
            return
        # by storage: the changes of all that lies in one may be counted together
        changed = {_storage(_local(tensor)) for tensor in _tensors_of(optimizer)}
        for guarded in list(self._guarded.values()):
            kept = [(tensor, version) for tensor, version in guarded.tensors if _storage(tensor) not in changed]
            if len(kept) < len(guarded.tensors):
                self._announced = True
                guarded.tensors[:] = kept

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._stepping.discard(optimizer)


def _watched(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer whose steps are seen when this one steps; None if none is.

    Torch sees to the hooks when an optimizer is made. There are wrappers (Accelerate's, for one) that are optimizers by
    their class alone, and call the step of the one in them.
    """
    while isinstance(optimizer, torch.optim.Optimizer):
        if getattr(type(optimizer).step, "hooked", False):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _tensors_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """What an optimizer owns: its parameters, and what it keeps for each."""
    kept = state_of(optimizer)
    for group in groups_of(optimizer):
        for parameter in group["params"]:
            yield parameter
            slots = kept.get(parameter)
            if isinstance(slots, Mapping):
                yield from (value for value in slots.values() if isinstance(value, torch.Tensor))


class _Owned:
    """The memory that optimizers own: its ranges, by address. What lies beside them in a storage is not theirs."""

    def __init__(self) -> None:
        self._ranges: dict[int, tuple[int, _Owner]] = {}
        """Where each begins -> where it ends, and whose it is."""
        self._starts: list[int] | None = None

    def add(self, tensor: torch.Tensor, owner: _Owner) -> None:
        """A tensor of an optimizer's: one of its parameters, or something that it keeps for one."""
        start, stop = _range(_local(tensor))
        if start < stop > self._ranges.get(start, (0, owner))[0]:
            self._ranges[start] = (stop, owner)
            self._starts = None

    def of(self, tensor: torch.Tensor) -> _Owner | None:
        """Who owns all of a tensor's memory; None for one that has none."""
        start, stop = _range(tensor)
        if start == stop:
            return None
        if start not in self._ranges:
            # perhaps a part of one
            if self._starts is None:
                self._starts = sorted(self._ranges)
            before = bisect_right(self._starts, start)
            if not before:
                return None
            end, owner = self._ranges[self._starts[before - 1]]
        else:
            end, owner = self._ranges[start]
        return owner if stop <= end else None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor


def _storage(tensor: torch.Tensor) -> int:
    """The address of the storage that a tensor lies in; 0 for one without memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        # sparse, or of a kind that consists of other tensors: those of optimizers that are not saved may be anything
        return 0


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and behind its last one; equal for one without memory."""
    address = _storage(tensor)
    if not address or not tensor.numel():
        return 0, 0
    size = tensor.element_size()
    start = address + int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((count - 1) * int(stride) for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size
