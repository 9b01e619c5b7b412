"""torch's small objects as plain values: dtypes, devices, sizes, layouts, memory formats, generators with their state.

Importing this module registers them with `ckpt_formats.values`. Tensors are not values; whoever encodes a state that
may hold some passes a `leaf` for them.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import numpy as np
import torch

from ckpt.state.torch_dtypes import bytes_view, from_carrier
from ckpt_formats.values import register_value

__all__: list[str] = []

_T = TypeVar("_T")


def _named(kind: type[_T]) -> dict[str, _T]:
    """The constants of that type that torch has, by name."""
    constants = {name: value for name, value in vars(torch).items() if type(value) is kind}
    # `torch.half` is the same object as `torch.float16`, which is what it calls itself
    return {str(value).removeprefix("torch."): value for value in constants.values()}


def _register_constants(kind: type[Any], tag: str) -> None:
    constants: Final = _named(kind)
    names: Final = {value: name for name, value in constants.items()}

    def decode(name: object) -> Any:
        if not isinstance(name, str) or name not in constants:
            raise ValueError(f"torch {torch.__version__} has no {tag.removeprefix('torch.')} {name!r}")
        return constants[name]

    register_value(kind, names.__getitem__, decode, tag=tag)


def _encode_generator(generator: torch.Generator) -> dict[str, object]:
    return {"device": str(generator.device), "state": bytes(bytes_view(generator.get_state()))}


def _decode_generator(content: object) -> torch.Generator:
    match content:
        case {"device": str(device), "state": bytes(state), **others} if not others:
            generator = torch.Generator(device=device)
            # not torch.tensor, which would follow the default device
            generator.set_state(from_carrier(np.frombuffer(bytearray(state), np.uint8), torch.uint8))
            return generator
    raise ValueError("a generator is a device and the bytes of a state")


def _decode_device(content: object) -> torch.device:
    if not isinstance(content, str):
        raise ValueError("a device is a string such as 'cuda:0'")  # noqa: TRY004 - the content is wrong, not the call
    return torch.device(content)


def _decode_size(content: object) -> torch.Size:
    if not isinstance(content, list) or not all(type(size) is int and -(2**63) <= size < 2**63 for size in content):
        raise ValueError("a size is a list of 64-bit integers")
    return torch.Size(content)


_register_constants(torch.dtype, "torch.dtype")
_register_constants(torch.layout, "torch.layout")
_register_constants(torch.memory_format, "torch.memory_format")
register_value(torch.device, str, _decode_device, tag="torch.device")
register_value(torch.Size, list, _decode_size, tag="torch.Size")
register_value(torch.Generator, _encode_generator, _decode_generator, tag="torch.Generator")
