"""Modules on torch's meta device: memory for what a checkpoint will fill, in their place.

Only parameters and persistent buffers get memory; what no checkpoint has stays on the meta device, where using it is an
error, rather than become whatever lay in the memory. Knows no checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ckpt.state.entries import entries_of
from ckpt.state.modules import fsdp_groups

__all__ = ["Materialised"]


class Materialised:
    """What was given memory, and can be put back as it was.

    Attributes:
        names: names of the tensors, tied ones under each of their names.
        left: names of buffers that are not saved and so stay on the meta device.
    """

    def __init__(self, state: Mapping[str, object], device: torch.device | str | None) -> None:
        """Give memory to the meta tensors of every module of a state.

        Args:
            device: where; by default the CPU, and for a DTensor the device of its mesh.
        """
        self.names: list[str] = []
        self.left: list[str] = []
        self._undo: list[tuple[nn.Module, str, bool, torch.Tensor]] = []
        self._roots: list[nn.Module] = []
        for entry in entries_of(state):
            if entry.kind == "module" and isinstance(entry.value, nn.Module):
                self._module(entry.key, entry.value, device)

    def _module(self, key: str, root: nn.Module, device: torch.device | str | None) -> None:
        made: dict[int, torch.Tensor] = {}
        for fqn, module, name, parameter, tensor in _meta_tensors(root):
            if not parameter and name in module._non_persistent_buffers_set:
                self.left.append(f"{key}.{fqn}")
                continue
            new = made.get(id(tensor))
            if new is None:
                where = device or (tensor.device_mesh.device_type if isinstance(tensor, DTensor) else "cpu")
                with torch.no_grad():
                    new = torch.empty_like(tensor, device=where)
                if parameter:
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                made[id(tensor)] = new
            self.names.append(f"{key}.{fqn}")
            self._undo.append((module, name, parameter, tensor))
            _set(module, name, parameter, new)
        if made:
            self._roots.append(root)
            _tell_fsdp(root)

    def undo(self) -> None:
        """Put everything back on the meta device."""
        for module, name, parameter, tensor in self._undo:
            _set(module, name, parameter, tensor)
        for root in self._roots:
            _tell_fsdp(root)
        self._undo.clear()


def _meta_tensors(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, bool, torch.Tensor]]:
    """Name in the model, module, name in it, whether it is a parameter, and the tensor: each under all its names."""
    for prefix, module in root.named_modules(remove_duplicate=True):
        for table, parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_meta:
                    yield f"{prefix}.{name}" if prefix else name, module, name, parameter, tensor


def _set(module: nn.Module, name: str, parameter: bool, tensor: torch.Tensor) -> None:
    if parameter:
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        module._buffers[name] = tensor


def _tell_fsdp(root: nn.Module) -> None:
    """Let FSDP2 take up the parameters that its modules have now, as it does after `to_empty`."""
    for module in root.modules():
        for group in fsdp_groups(module):
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()
