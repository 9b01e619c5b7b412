"""Tensors inside values: hyperparameters that are tensors (a learning rate), and tensors in per-rank values.

All other tensors are kept apart, under names of their own; these are no part of the global model. Importing this module
registers them with `ckpt_formats.values`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ckpt.state import torch_values  # noqa: F401 - registers the dtypes
from ckpt.state.torch_dtypes import bytes_view, dtype_of, from_carrier
from ckpt_formats.values import register_value

__all__ = ["copied"]


def copied(value: Any) -> Any:
    """A value with its tensors, lists and dicts copied, so that training may go on changing them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def _encode(tensor: torch.Tensor) -> dict[str, object]:
    data = tensor.detach().cpu().contiguous()
    return {"dtype": data.dtype, "shape": list(data.shape), "data": bytes(bytes_view(data))}


def _decode(content: object) -> torch.Tensor:
    match content:
        case {"dtype": torch.dtype() as dtype, "shape": list(shape), "data": bytes(data), **others} if not others:
            itemsize = dtype_of(dtype).itemsize
            if all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) * itemsize == len(data):
                flat = np.frombuffer(bytearray(data), dtype=np.dtype((np.void, itemsize)))
                if data:
                    return from_carrier(flat.reshape(shape), dtype)
                return torch.empty(shape, dtype=dtype, device="cpu")
    raise ValueError("a tensor in a value is a dtype, a shape and as many bytes")


register_value(torch.Tensor, _encode, _decode, tag="torch.Tensor")
