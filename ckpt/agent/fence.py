"""The fence: optimizers wait for what is still being copied before they step.

What only an optimizer changes may be copied while the training goes on, because a hook of ours runs before each step.
If parameters change between two saves although no hook has run, somebody else changes them: that is told, and from then
on nothing is copied lazily.
"""

from __future__ import annotations

import logging
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch.distributed.tensor import DTensor
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
    """Hooks on the optimizers of states that are saved. Close it, so that they are let go."""

    def __init__(self, settle: Callable[[], None]) -> None:
        """`settle` returns when nothing is being copied any more."""
        self._settle = settle
        self._process = 0
        """The one that saves."""
        self._hooks: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[RemovableHandle, RemovableHandle]] = (
            weakref.WeakKeyDictionary()
        )
        self._stepping: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that are within a step, as far as is seen."""
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that have stepped since the last lazy capture began."""
        self._guarded: dict[weakref.ref[torch.optim.Optimizer], _Guarded] = {}
        """Until the optimizer steps, or is gone: nothing here keeps a model alive."""
        self._lazily = False
        """Whether the last save captured anything lazily."""
        self._save: Trusted | None = None
        self._eager = False
        self._unsure = False

    def problem(self) -> SaveFailedError | None:
        """Why lazy capture can't be trusted, if it is found out now: what was captured lazily by the last save has
        changed since, and its optimizer has not stepped. From then on everything is captured eagerly.
        """
        guarded, self._guarded = self._guarded, {}
        save, self._save = self._save, None
        trusted = save is None or save.trusted
        self._unsure = self._lazily and not self._stepped and not trusted
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
                    "the last async_save, but no step of that optimizer was seen: lazy capture can't tell when it may "
                    "copy. From now on everything is copied before async_save returns. Pass "
                    'capture="eager" to say that it is meant, or wait for pending.captured() before changing tensors'
                )
                log.warning("%s", why)
                return SaveFailedError(f"nothing was saved: {why}")
        return None

    def around(self, state: Mapping[str, object], save: Trusted) -> Callable[[torch.Tensor], bool]:
        """Hook the optimizers of a state. Returns what says whether a tensor may be copied lazily for this save."""
        self._process = os.getpid()
        owned = self._hook(state)
        # a loop that did not step may be one whose steps are not seen; and what saves from within a step (a closure, a
        # hook) is behind the fence already
        if self._eager or self._unsure or self._stepping:
            return lambda _: False
        self._stepped.clear()
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
        for hooks in list(self._hooks.values()):
            for hook in hooks:
                hook.remove()
        self._hooks.clear()
        self._guarded = {}

    def _hook(self, state: Mapping[str, object]) -> _Owned:
        owned = _Owned()
        for entry in entries_of(state):
            optimizer = steps_by(entry.value)
            if entry.kind != "optimizer" or not isinstance(optimizer, torch.optim.Optimizer):
                continue
            if optimizer not in self._hooks:
                self._hooks[optimizer] = (
                    optimizer.register_step_pre_hook(self._before_step),
                    optimizer.register_step_post_hook(self._after_step),
                )
            owner = (weakref.ref(optimizer, self._forget), entry.key)
            kept = state_of(entry.value)
            for group in groups_of(entry.value):
                for parameter in group["params"]:
                    owned.add(parameter, owner)
                    slots = kept.get(parameter)
                    for value in (slots or {}).values():
                        if isinstance(value, torch.Tensor):
                            owned.add(value, owner)
        return owned

    def _forget(self, optimizer: weakref.ref[torch.optim.Optimizer]) -> None:
        self._guarded.pop(optimizer, None)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if os.getpid() != self._process:
            # a process that was forked off has copies of the tensors, and nobody who copies them
            return
        self._settle()
        self._stepping.add(optimizer)
        self._stepped.add(optimizer)
        self._guarded.pop(weakref.ref(optimizer), None)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._stepping.discard(optimizer)


class _Owned:
    """The memory that optimizers own: its ranges, by address. What lies beside them in a storage is not theirs."""

    def __init__(self) -> None:
        self._ranges: dict[int, tuple[int, _Owner]] = {}
        """Where each begins -> where it ends, and whose it is."""
        self._starts: list[int] | None = None

    def add(self, tensor: torch.Tensor, owner: _Owner) -> None:
        """A tensor of an optimizer's: one of its parameters, or something that it keeps for one."""
        start, stop = _range(local_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
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


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and behind its last one; equal for one without memory."""
    address = tensor.untyped_storage().data_ptr()
    if not address or not tensor.numel():
        return 0, 0
    size = tensor.element_size()
    start = address + int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((count - 1) * int(stride) for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size
