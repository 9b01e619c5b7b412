"""The bytes of live tensors as chunks' sources: any device, any strides, read in row-major order a range at a time.

So a chunk of any size goes through staging buffers of a fixed size, without a contiguous copy of the tensor.
"""

from __future__ import annotations

import numpy as np
import torch

from ckpt.state.torch_dtypes import as_carrier, bytes_view
from ckpt_formats.geometry import flat_boxes


class TensorSource:
    """The elements of a tensor (shape and strides of any kind) in row-major order."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop; both are multiples of the element size."""
        tensor = self.tensor
        if start == 0 and stop == tensor.nbytes < 1 << 16 and tensor.is_cpu and tensor.is_contiguous():
            into[:] = bytes_view(tensor)
            return
        if tensor.is_conj() or tensor.is_neg():
            # once, not for every range
            tensor = self.tensor = tensor.resolve_conj().resolve_neg()
        if tensor.is_cpu and tensor.is_contiguous():
            # numpy copies without the interpreter lock, so that the writing threads go on
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(bytes_view(tensor)[start:stop], np.uint8))
            return
        itemsize = tensor.element_size()
        at = 0
        for box in flat_boxes(tuple(tensor.shape), start // itemsize, stop // itemsize):
            part = tensor.detach()[box.slices()]
            if part.device.type != "cpu":
                part = part.contiguous().cpu()
            array = as_carrier(part)
            nbytes = box.numel * itemsize
            target = np.frombuffer(into[at : at + nbytes], dtype=array.dtype).reshape(box.sizes)
            target[...] = array
            at += nbytes


class BytesSource:
    """Bytes that lie in memory."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def read(self, start: int, stop: int, into: memoryview) -> None:
        """Fill `into` with bytes start..stop."""
        into[:] = self._data[start:stop]
