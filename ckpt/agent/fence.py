"""The fence: optimizers wait for what is still being copied before they step.

What only an optimizer changes may be copied while the training goes on, because a hook of ours runs before each step.
If parameters change between two saves although no hook has run, somebody else changes them: that is told, and from then
on nothing is copied lazily.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch.distributed.tensor import DTensor

from ckpt.state.dtensor import local_tensor
from ckpt.state.entries import entries_of
from ckpt.state.optimizers import state_of
from ckpt_formats.errors import SaveFailedError

log = logging.getLogger("ckpt")


class Trusted(Protocol):
    """A save whose lazy capture somebody may have waited for, who then may change everything."""

    trusted: bool


class _Guarded(NamedTuple):
    """A tensor that was captured lazily, and how many changes it had seen then."""

    tensor: torch.Tensor
    version: int
    owner: weakref.ref[torch.optim.Optimizer]
    entry: str


class Fence:
    """Hooks on the optimizers of states that are saved."""

    def __init__(self, settle: Callable[[], None]) -> None:
        """`settle` returns when nothing is being copied any more."""
        self._settle = settle
        self._hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that have stepped since the last lazy capture began."""
        self._guarded: list[_Guarded] = []
        self._save: Trusted | None = None
        self._eager = False
        self._unsure = False

    def problem(self) -> SaveFailedError | None:
        """Why lazy capture can't be trusted, if it is found out now: what was captured lazily by the last save has
        changed since, and its optimizer has not stepped. From then on everything is captured eagerly.
        """
        guarded, self._guarded = self._guarded, []
        save, self._save = self._save, None
        self._unsure = bool(guarded) and not self._stepped and save is not None and not save.trusted
        if save is None or save.trusted:
            return None
        for tensor, version, owner, entry in guarded:
            optimizer = owner()
            # one that is gone, with its model or for another, may have stepped before
            if optimizer is not None and optimizer not in self._stepped and tensor._version != version:
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
        owned = self._hook(state)
        # a loop that did not step may be one whose steps are not seen
        if self._eager or self._unsure:
            return lambda _: False
        self._stepped.clear()
        self._save = save
        guarded = self._guarded

        def lazily(tensor: torch.Tensor) -> bool:
            owner = owned.get(tensor.untyped_storage().data_ptr())
            if owner is None:
                return False
            guarded.append(_Guarded(tensor, tensor._version, *owner))
            return True

        return lazily

    def _hook(self, state: Mapping[str, object]) -> dict[int, tuple[weakref.ref[torch.optim.Optimizer], str]]:
        """Address of each storage that an optimizer of the state owns -> the optimizer, and its name."""
        owned: dict[int, tuple[weakref.ref[torch.optim.Optimizer], str]] = {}
        for entry in entries_of(state):
            optimizer = entry.value
            if entry.kind != "optimizer" or not isinstance(optimizer, torch.optim.Optimizer):
                continue
            if optimizer not in self._hooked:
                self._hooked.add(optimizer)
                optimizer.register_step_pre_hook(self._before_step)
            owner = (weakref.ref(optimizer), entry.key)
            kept = state_of(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owned[_address(parameter)] = owner
                    slots = kept.get(parameter)
                    for value in (slots or {}).values():
                        if isinstance(value, torch.Tensor):
                            owned[_address(value)] = owner
        return owned

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._settle()
        self._stepped.add(optimizer)


def _address(tensor: torch.Tensor) -> int:
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage().data_ptr())
