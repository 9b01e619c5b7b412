"""The slots of a flat parameter: one tensor for those of all parameters that are in it.

FSDP1 without `use_orig_params` gives optimizers such parameters. What was saved of each parameter finds its place in
the tensor; what can't have one of its own, the number of steps for example, must be equal for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ckpt.state.containers import references
from ckpt.state.given import Given
from ckpt.state.optimizers import flat_numel
from ckpt.state.types import Lowered, SavedTensor, TensorRef
from ckpt_formats.errors import StateError, StateMismatchError
from ckpt_formats.geometry import Box

__all__ = ["FlatSlots", "equal", "scalar_device"]


class Maker(Protocol):
    """What slots are entered with."""

    def saved(self, mark: TensorRef) -> SavedTensor | None:
        """What a mark stands for, if it is one tensor."""

    def kind(
        self, found: SavedTensor, parameter: torch.dtype, whole: tuple[int, ...], name: str, slot: str
    ) -> tuple[torch.dtype, bool]:
        """The dtype that a slot is to have, and whether it has the shape of its parameter, which is `whole` now."""

    def enter(self, name: str, tensor: torch.Tensor, lowered: Lowered) -> None:
        """Enter a tensor that was made elsewhere."""


class FlatSlots:
    """The slots of a flat parameter of FSDP1: one tensor for those of all parameters that are in it."""

    def __init__(self, parameter: torch.Tensor, members: list[tuple[str, Lowered]], there: Mapping[str, Any]) -> None:
        """`members`: what the checkpoint calls what is in it, and where in it; `there`: its slots now."""
        self.parameter = parameter
        self._members = members
        self._there = there
        self._made: dict[str, Any] = {}
        """Slot -> the tensor, or for each parameter its own marked value, all of which must turn out to be equal."""

    def plan(self, maker: Maker, slots: Mapping[str, dict[str, Any]], hyper: Mapping[str, Any]) -> None:
        """Enter every slot. `slots`: name -> what was saved for it.

        Raises StateMismatchError if they have not the same slots, StateError for slots that are no flat ones.
        """
        first = self._members[0][0]
        for slot in dict.fromkeys(slot for saved in slots.values() for slot in saved):
            values = {}
            for name, within in self._members:
                if slot not in slots[name]:
                    raise StateMismatchError(
                        f"{first!r} and {name!r} are in one flat parameter here, but {slot!r} was saved of only one of "
                        "them; wrap with use_orig_params=True",
                        tensor=name,
                    )
                values[name] = slots[name][slot]
                self._enter(maker, name, within, slot, values[name], hyper)
            if slot not in self._made:
                self._made[slot] = values

    def _enter(
        self, maker: Maker, name: str, within: Lowered, slot: str, marked: Any, hyper: Mapping[str, Any]
    ) -> None:
        marks = list(references(marked))
        if not marks:
            return
        found = maker.saved(marked) if marks == [marked] else None
        if found is None or (found.shape and not maker.kind(found, self.parameter.dtype, within.shape, name, slot)[1]):
            raise StateError(
                f"the slot {slot!r} that was saved of {name!r} has no place in a flat parameter; wrap with "
                "use_orig_params=True, or use fully_shard",
                tensor=name,
            )
        dtype, _ = maker.kind(found, self.parameter.dtype, within.shape, name, slot)
        if not found.shape:
            made = torch.empty((), dtype=dtype, device=scalar_device(self.parameter, slot, hyper))
            maker.enter(marked.name, made, Lowered((), ((Box((), ()), Box((), ())),)))
            return
        flat = self._made.get(slot, self._there.get(slot))
        size = (flat_numel(self.parameter),)
        if not (isinstance(flat, torch.Tensor) and flat.shape == size and flat.dtype == dtype):
            # zeros, for there is padding too
            flat = torch.zeros(size, dtype=dtype, device=self.parameter.device)
        self._made[slot] = flat
        maker.enter(marked.name, flat, within)

    def filled(self, given: Given) -> dict[str, Any]:
        """The slots, once all bytes have arrived. StateMismatchError if parameters have different values of one."""
        slots: dict[str, Any] = {}
        for slot, made in self._made.items():
            if isinstance(made, torch.Tensor):
                slots[slot] = made
                continue
            values = {name: given.fill(marked) for name, marked in made.items()}
            (first, slots[slot]), *others = values.items()
            for name, value in others:
                if not equal(value, slots[slot]):
                    raise StateMismatchError(
                        f"{first!r} and {name!r} are in one flat parameter here, but were saved with {slot} = "
                        f"{slots[slot]!r} and {value!r}; wrap with use_orig_params=True",
                        tensor=name,
                    )
        return slots


def scalar_device(parameter: torch.Tensor, slot: str, hyper: Mapping[str, Any]) -> torch.device:
    """Where torch.optim's own load_state_dict puts a slot of one element: only `step` may stay on the CPU."""
    moves = slot != "step" or hyper.get("capturable") or hyper.get("fused")
    return parameter.device if moves else torch.device("cpu")


def equal(one: Any, other: Any) -> bool:
    """Whether two values are alike, tensors in them bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other or one != one)  # noqa: PLR0124 - nan is itself
