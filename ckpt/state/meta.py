"""Modules on torch's meta device: memory for what a checkpoint will fill, in their place.

Only parameters and persistent buffers get memory; what no checkpoint has stays on the meta device, where using it is an
error, rather than become whatever lay in the memory. Knows no checkpoints.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ckpt.state.entries import entries_of
from ckpt.state.modules import fsdp_groups, modules_in, padded

__all__ = ["Materialised"]


class _Place(NamedTuple):
    """Where a tensor was on the meta device."""

    fqn: str
    module: nn.Module
    name: str
    parameter: bool
    tensor: torch.Tensor

    @property
    def table(self) -> dict[str, Any]:
        return self.module._parameters if self.parameter else self.module._buffers


class Materialised:
    """What was given memory, and can be put back as it was.

    Attributes:
        left: names of buffers that are not saved and so stay on the meta device.
    """

    def __init__(self, state: Mapping[str, object], device: torch.device | str | None) -> None:
        """Give memory to the meta tensors of every module of a state: to all, or if that fails to none.

        Args:
            device: where; by default the CPU, and for a DTensor the device of its mesh.
        """
        self.left: list[str] = []
        self._made: dict[int, torch.Tensor] = {}
        """id of a tensor on the meta device -> the one in its place, wherever in the state it is."""
        self._places: list[_Place] = []
        self._roots: list[nn.Module] = []
        try:
            for entry in entries_of(state):
                if entry.kind == "module" and isinstance(entry.value, nn.Module):
                    self._roots.append(entry.value)
                    self._module(entry.key, entry.value, device)
            self._tell_fsdp()
        except BaseException:
            self.undo()
            raise

    def _module(self, key: str, root: nn.Module, device: torch.device | str | None) -> None:
        for place in _on_meta(key, root):
            fqn, module, name, parameter, tensor = place
            if not parameter and name in module._non_persistent_buffers_set:
                self.left.append(fqn)
                continue
            new = self._made.get(id(tensor))
            if new is None:
                where = device or (tensor.device_mesh.device_type if isinstance(tensor, DTensor) else "cpu")
                make = torch.zeros_like if padded(module, name) else torch.empty_like
                with torch.no_grad():
                    new = make(tensor, device=where)
                if parameter:
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                self._made[id(tensor)] = new
            self._places.append(place)
            place.table[name] = new

    def unfilled(self, names: Container[str], memory: Iterable[torch.Tensor]) -> list[str]:
        """Names of what was made and gets no values, a tied tensor under each of its names.

        Args:
            names: of the tensors that get values. A module may call its tensors by other names as it is saved, so
                these do not tell it all.
            memory: tensors in the memory that gets values.
        """
        if not self._places:
            return []
        filled = {address for tensor in memory for address in _addresses(tensor)}
        named = {id(place.tensor) for place in self._places if place.fqn in names}
        return [
            place.fqn
            for place in self._places
            if id(place.tensor) not in named and not filled.issuperset(_addresses(place.table[place.name]))
        ]

    def undo(self) -> None:
        """Put everything back on the meta device."""
        for place in self._places:
            place.table[place.name] = place.tensor
        self._tell_fsdp()
        self._places.clear()
        self._made.clear()

    def _tell_fsdp(self) -> None:
        """Let FSDP2 take up the parameters that its modules have now, as it does after `to_empty`."""
        for module in (module for root in self._roots if self._places for module in root.modules()):
            for group in fsdp_groups(module):
                for parameter in group.fsdp_params if group.is_sharded else ():
                    parameter.reset_sharded_param()


def _on_meta(key: str, root: nn.Module) -> Iterator[_Place]:
    """What is on the meta device in a module, also what is tied, until it was replaced."""
    for prefix, module in modules_in(root, f"{key}."):
        for table, parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_meta:
                    yield _Place(prefix + name, module, name, parameter, tensor)


def _addresses(tensor: torch.Tensor) -> Iterator[int]:
    """Where the memory of a tensor is, or that of what it is made of; none if it has no elements."""
    if hasattr(type(tensor), "__tensor_flatten__"):  # DTensors too
        for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _addresses(getattr(tensor, part))
    elif tensor.numel():
        yield tensor.untyped_storage().data_ptr()
