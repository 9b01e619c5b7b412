"""The states that are saved and loaded: random tensors whose right content is known by its digests.

Knows nothing of the systems that save them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.ranks import Group


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """Tensors by name, plain or DTensors, with the digests of this rank's part of each; a Destination."""

    tensors: Mapping[str, torch.Tensor]
    locals: Mapping[str, torch.Tensor]
    """The same by this rank's memory: plain tensors that share the DTensors' storage."""
    digests: Mapping[str, bytes]

    @property
    def local_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.locals.values())

    def spoil(self) -> None:
        for tensor in self.locals.values():
            tensor.detach().zero_()

    def check(self) -> None:
        for name, tensor in self.locals.items():
            if _digest(tensor) != self.digests[name]:
                raise AssertionError(f"{name} was loaded with other bytes than were saved")


def _digest(tensor: torch.Tensor) -> bytes:
    return xxhash.xxh3_64_digest(tensor.detach().numpy().data)


def _random(shape: tuple[int, ...], seed: int, index: int) -> torch.Tensor:
    generator = np.random.Generator(np.random.SFC64([seed, index]))
    return torch.from_numpy(generator.random(shape, dtype=np.float32))


def sharded_tensors(
    group: Group, count: int, shape: tuple[int, int], *, seed: int, dimensions: tuple[int, ...]
) -> list[NamedTensors]:
    """`count` global fp32 tensors of `shape`, once for each of `dimensions`: cut there over all ranks, as FSDP cuts.

    The same seed gives the same global tensors whatever the cut. One process gets plain tensors.
    """
    mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("fsdp",)) if group.size > 1 else None
    cuts: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = [({}, {}) for _ in dimensions]
    for index in range(count):
        whole = _random(shape, seed, index)
        for dimension, (tensors, local_tensors) in zip(dimensions, cuts, strict=True):
            part = whole.chunk(group.size, dimension)[group.rank]
            # Memory of torch's own: another library's is aligned differently.
            local = torch.empty(part.shape).copy_(part)
            name = f"layers.{index}.weight"
            local_tensors[name] = local
            tensors[name] = (
                local if mesh is None else DTensor.from_local(local, mesh, [Shard(dimension)], run_check=False)
            )
    return [NamedTensors(tensors, local, {n: _digest(t) for n, t in local.items()}) for tensors, local in cuts]


def many_tensors(count: int, elements: int, *, seed: int) -> NamedTensors:
    """`count` one-dimensional fp32 tensors, each with storage of its own."""
    tensors = {f"layers.{i // 8}.weight_{i % 8}": _random((elements,), seed, i).clone() for i in range(count)}
    return NamedTensors(tensors, tensors, {n: _digest(t) for n, t in tensors.items()})


def many_parameters(count: int, elements: int, *, seed: int) -> tuple[nn.Module, NamedTensors]:
    """A module of `count` such parameters, eight to a layer, and the parameters by name."""
    layers = nn.ModuleList()
    for first in range(0, count, 8):
        layer = nn.Module()
        for i in range(first, min(first + 8, count)):
            layer.register_parameter(f"weight_{i % 8}", nn.Parameter(_random((elements,), seed, i).clone()))
        layers.append(layer)
    model = nn.Module()
    model.add_module("layers", layers)
    parameters = dict(model.named_parameters())
    return model, NamedTensors(parameters, parameters, {n: _digest(t) for n, t in parameters.items()})
