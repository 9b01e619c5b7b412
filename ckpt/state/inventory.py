"""An inventory of live tensors and values under their names, as boxes over their memory.

Every tensor gets one name; a second name of the same memory becomes an alias, a second thing of the same name an error.
This module knows kinds of tensors and of containers, and nothing of modules, optimizers or checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt.state.dtensor import local_tensor, lower
from ckpt.state.rng import RNG
from ckpt.state.types import (
    Disassembled,
    LocalState,
    LocalTensor,
    Lowered,
    PerRank,
    PerRankRef,
    Piece,
    Shard,
    TensorRef,
)
from ckpt_formats.errors import StateError, UnsupportedValueError
from ckpt_formats.geometry import Box
from ckpt_formats.values import encode

__all__ = ["Inventory", "NameTakenError"]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_SCALARS = frozenset((type(None), bool, int, float, str, bytes, complex))
_ORIGINS = [(0,) * ndim for ndim in range(65)]


class NameTakenError(StateError):
    """Two things of a state have the same name."""


class Inventory:
    """What was found so far.

    Attributes:
        local: the names and what they stand for.
        live: name of a tensor, aliases included -> the live tensor itself.
    """

    def __init__(self) -> None:
        self.local = LocalState()
        self.live: dict[str, torch.Tensor] = {}
        self._at: dict[int, str] = {}  # address -> name of the first plain tensor that begins there
        self._geometries: dict[tuple[Any, ...], str] = {}  # the same for others that begin at a taken address
        self._objects: dict[int, str] = {}  # id of a tensor that isn't plain -> its name
        self._whole: dict[tuple[int, ...], Box] = {}  # by shape

    def tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Enter a tensor, whole on every rank, or a DTensor, or a subclass that can be taken apart.

        Raises StateError, naming the tensor and the remedy, when its memory can't be seen as boxes, and NameTakenError.
        """
        self._claim(name, tensor)
        kind = type(tensor)
        if kind in _PLAIN:
            self._plain(name, tensor)
        elif isinstance(tensor, DTensor):
            self._dtensor(name, tensor)
        else:
            self._subclass(name, tensor)

    def shard(self, name: str, shard: Shard) -> None:
        """Enter a tensor that was cut by hand."""
        self.part(name, shard.local, shard.lowered, tied_by=shard.local)

    def part(self, name: str, local: torch.Tensor, lowered: Lowered, *, tied_by: object = None) -> None:
        """Enter a plain tensor as what is held of a larger one.

        Two that are entered with the same `tied_by` are the same tensor.
        """
        self._claim(name, local)
        if tied_by is not None and self._known(name, tied_by):
            return
        _require_memory(name, local)
        self.local.tensors[name] = LocalTensor(
            name, local.dtype, lowered.shape, lowered.pieces_of(local), lowered.cut, lowered.mesh
        )

    def tie(self, name: str, first: str) -> None:
        """Enter a second name of a tensor that is in the inventory."""
        self._claim(name, self.live[first])
        self.local.aliases[name] = self.local.aliases.get(first, first)

    def value(self, path: str, value: object) -> None:
        """Enter a value; tensors, shards and per-rank values in it become entries of their own, `<path>.<key>`."""
        local = self.local
        if path in local.values or path in self.live or path in local.per_rank:
            raise _taken(path)
        if type(value) in _SCALARS:
            local.values[path] = value
            return
        marked = self.mark(path, value)
        if type(marked) is not TensorRef:  # the name of a tensor says it all
            local.values[path] = marked

    def mark(self, path: str, value: Any) -> Any:
        """Enter what is in a value, and return the value with marks in its place; the value itself if it has none."""
        kind = type(value)
        if kind in _SCALARS:
            return value
        if isinstance(value, torch.Tensor):
            self.tensor(path, value)
            return TensorRef(path)
        if isinstance(value, dict):
            marked = {key: self.mark(f"{path}.{key}", item) for key, item in value.items()}
            return value if all(marked[key] is item for key, item in value.items()) else marked
        if isinstance(value, list | tuple):
            items = [self.mark(f"{path}.{index}", item) for index, item in enumerate(value)]
            if all(mark is item for mark, item in zip(items, value, strict=True)):
                return value
            if kind is list:
                return items
            if kind is tuple:
                return tuple(items)
            raise StateError(
                f"{path} is a {kind.__qualname__} with tensors in it, whose type could not be restored; "
                "convert it to a plain list, tuple or dict",
                tensor=path,
            )
        if isinstance(value, Shard):
            self.shard(path, value)
            return TensorRef(path)
        if isinstance(value, PerRank):
            return self._per_rank(path, value.take())
        if isinstance(value, RNG):
            return self._per_rank(path, value.state_dict())
        return value

    def adopt(self, name: str, other: Inventory) -> None:
        """Enter a tensor as another inventory has it, under the same name."""
        self._claim(name, other.live[name])
        known = other.local.tensors[other.local.aliases.get(name, name)]
        self.local.tensors[name] = dataclasses.replace(known, name=name)

    def drop(self, name: str) -> None:
        """Forget a tensor that was entered; what is tied to it is not forgotten."""
        self.local.tensors.pop(name, None)
        self.local.aliases.pop(name, None)

    def _per_rank(self, path: str, value: object) -> PerRankRef:
        local = self.local
        if path in local.per_rank or path in local.values or path in self.live:
            raise _taken(path)
        local.per_rank[path] = value
        return PerRankRef(path)

    def _claim(self, name: str, tensor: torch.Tensor) -> None:
        local = self.local
        if name in self.live or name in local.values or name in local.per_rank:
            raise _taken(name)
        self.live[name] = tensor  # also keeps it alive, so that no other can get its id or address

    def _plain(self, name: str, tensor: torch.Tensor) -> None:
        try:
            pointer = tensor.data_ptr()
            shape = tuple(tensor.shape)
        except (RuntimeError, ValueError):
            _require_memory(name, tensor)
            raise
        if not pointer:
            _require_memory(name, tensor)  # a meta tensor has no address, nor has one without elements
            if 0 not in shape:
                raise _unusable(name, "has no memory (its storage was freed)", "save it before its storage is resized")
        elif self._tied(name, tensor, pointer):
            return
        if 0 in shape:
            self.local.tensors[name] = LocalTensor(name, tensor.dtype, shape, [])
            return
        box = self._whole.get(shape)
        if box is None:
            box = self._whole[shape] = Box(_ORIGINS[len(shape)], shape)
        self.local.tensors[name] = LocalTensor(name, tensor.dtype, shape, [Piece(box, _view(tensor))])

    def _tied(self, name: str, tensor: torch.Tensor, pointer: int) -> bool:
        """Whether the same elements at the same address are in the inventory; then enters an alias."""
        first = self._at.setdefault(pointer, name)
        if first is name:
            return False
        known = self.live[first]
        if known is not tensor and _geometry(known) != _geometry(tensor):
            # Views of one storage that begin together: each is stored by itself, and has its own ties
            first = self._geometries.setdefault((pointer, *_geometry(tensor)), name)
            if first is name:
                return False
        self.local.aliases[name] = first
        return True

    def _dtensor(self, name: str, tensor: DTensor) -> None:
        if self._known(name, tensor):
            return
        lowered = lower(tensor, name)
        local = local_tensor(tensor)
        if type(local) not in _PLAIN:
            raise _unusable(
                name,
                f"is a DTensor of {type(local).__qualname__}, which can't be taken apart",
                "save its parts as DTensors of their own",
            )
        if local.is_meta or local.layout is not torch.strided:
            _require_memory(name, local)
        self.local.tensors[name] = LocalTensor(
            name, local.dtype, lowered.shape, lowered.pieces_of(local), lowered.cut, lowered.mesh
        )

    def _subclass(self, name: str, tensor: torch.Tensor) -> None:
        if self._known(name, tensor):
            return
        kind = type(tensor)
        if torch.nn.parameter.is_lazy(tensor):
            raise _unusable(name, "has no shape yet (a lazy module's parameter)", "run the module once first")
        if hasattr(tensor, "trigger_wait"):  # the result of a collective that may still run
            del self.live[name]
            self.tensor(name, tensor.trigger_wait())
        elif hasattr(kind, "__tensor_flatten__"):
            parts, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            for part in parts:
                self.tensor(f"{name}.{part}", getattr(tensor, part))
            self.local.values[name] = Disassembled(kind.__qualname__, tuple(parts), _encodable(context))
        elif kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            with torch._C.DisableTorchFunctionSubclass():
                plain = torch.Tensor.detach(tensor).as_subclass(torch.Tensor)
            self._plain(name, plain)
        else:
            raise _unusable(
                name,
                f"is a {kind.__qualname__}, a tensor subclass without __tensor_flatten__",
                "give the class __tensor_flatten__, or save the tensors that it is made of",
            )

    def _known(self, name: str, tensor: object) -> bool:
        """Whether this very object is in the inventory; then enters an alias.

        Objects are compared, not addresses: a rank with an empty shard would come to another result than the others.
        """
        first = self._objects.setdefault(id(tensor), name)
        if first is name:
            return False
        self.local.aliases[name] = first
        return True


def _view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _encodable(context: object) -> object:
    """The context of a subclass, or None if it is of types that have no encoding."""
    try:
        encode(context, "")
    except UnsupportedValueError:
        return None
    return context


def _require_memory(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise _unusable(
            name,
            "is on the meta device and holds no data",
            "materialise it first: module.to_empty(device=…), then initialise it",
        )
    if tensor.layout is not torch.strided:
        remedy = (
            "save .coalesce().indices() and .values() in its place"
            if tensor.layout is torch.sparse_coo
            else "save the dense tensors that it is made of, or .to_dense()"
        )
        raise _unusable(name, f"has layout {tensor.layout}, not a dense one", remedy)
    if tensor.is_nested:
        raise _unusable(name, "is a nested tensor", "save the tensors that it is made of (.unbind())")


def _unusable(name: str, what: str, remedy: str) -> StateError:
    return StateError(f"the tensor {name!r} {what}; {remedy}", tensor=name)


def _taken(name: str) -> NameTakenError:
    return NameTakenError(f"two things in the state are called {name!r}; rename one of them", tensor=name)
