"""torch dtypes as the formats name them, and the memory of CPU tensors as numpy arrays of raw elements.

Nothing here looks at values: every storable dtype is seen through a *carrier*, an unsigned or void numpy dtype of the
same itemsize, so that a copy is bit for bit. It does not know checkpoints, and never copies between devices.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from ckpt_formats.dtypes import DTYPES, DType
from ckpt_formats.errors import UnknownDtypeError, UnsupportedValueError

__all__ = ["as_carrier", "bytes_view", "can_cast", "dtype_of", "from_carrier", "torch_dtype"]

Array = np.ndarray[Any, np.dtype[Any]]

_TORCH: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
_DTYPES: Final[dict[torch.dtype, DType]] = {known: DTYPES[name] for name, known in _TORCH.items()}
_CARRIERS: Final = {known: of.carrier for known, of in _DTYPES.items()}

# The dtypes that `Tensor.numpy` refuses are seen as an integer of their size first. (complex128 has no integer of its
# size, and needs none.)
_INTEGERS: Final = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_NUMPY_KNOWS: Final = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
)
_VIEWED_AS: Final = {known: _INTEGERS[of.itemsize] for known, of in _DTYPES.items() if known not in _NUMPY_KNOWS}


def dtype_of(dtype: torch.dtype) -> DType:
    """The stored dtype of a `torch.dtype`. Raises UnsupportedValueError for quantised ones, which no chunk can hold."""
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise UnsupportedValueError(_refusal(dtype)) from None


def torch_dtype(name: str) -> torch.dtype:
    """The `torch.dtype` of a stored dtype's name. Raises UnknownDtypeError."""
    try:
        return _TORCH[name]
    except (KeyError, TypeError):
        raise UnknownDtypeError(
            f"torch {torch.__version__} has no dtype {name!r}; update it, or read the tensor with ckpt.open"
        ) from None


def can_cast(source: DType, to: DType) -> bool:
    """Whether it is a cast between floats, or between complex numbers, which rounds, or one that loses nothing."""
    if source.numpy is None or to.numpy is None:
        return False
    one, other = torch_dtype(source.name), torch_dtype(to.name)
    if one.is_floating_point and other.is_floating_point:
        # scales are exponents only
        return "float8_e8m0fnu" not in (source.name, to.name)
    return (one.is_complex and other.is_complex) or np.can_cast(source.numpy, to.numpy, "safe")


def as_carrier(tensor: torch.Tensor) -> Array:
    """The memory of a CPU tensor as a numpy array of raw elements: its shape and strides, nothing copied, writable.

    Whether the tensor requires a gradient makes no difference, and writing does not count as an in-place change for
    autograd. A conjugated or negated view (`is_conj()`, `is_neg()`) is refused, since its memory holds other values
    than the tensor: call `.resolve_conj().resolve_neg()` first, which copies it.

    Raises UnsupportedValueError for tensors without plain CPU memory: on another device, meta, sparse, nested,
    quantised.
    """
    dtype = tensor.dtype
    try:
        if tensor.requires_grad:
            tensor = tensor.detach()
        viewed_as = _VIEWED_AS.get(dtype)
        if viewed_as is None:
            return tensor.numpy().view(_CARRIERS[dtype])
        if tensor.is_conj() or tensor.is_neg():
            raise RuntimeError("its conjugate or negative bit is set: call .resolve_conj().resolve_neg() first")
        # .view of a dtype that numpy knows has the same size, hence works for any strides
        return tensor.view(viewed_as).numpy().view(_CARRIERS[dtype])
    except (TypeError, RuntimeError, KeyError) as error:
        reason = _refusal(dtype) if dtype not in _DTYPES else f"a tensor's memory can't be viewed: {error}"
        raise UnsupportedValueError(reason) from error


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, as a one-dimensional writable memoryview of unsigned bytes.

    It shares the tensor's memory and keeps it alive; only a conjugated or negated tensor is copied first, since its
    memory holds other values. Raises ValueError if the tensor is not contiguous, and what `as_carrier` raises.
    """
    if not tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    try:
        array = as_carrier(tensor)
    except UnsupportedValueError:
        if not (tensor.is_conj() or tensor.is_neg()):
            raise
        array = as_carrier(tensor.resolve_conj().resolve_neg().contiguous())
    return (array if array.ndim == 1 else array.reshape(-1)).view(np.uint8).data


def from_carrier(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `as_carrier`: the array's memory as a CPU tensor of that dtype, shape and strides, nothing copied.

    `array` has any numpy dtype of the same itemsize. Raises ValueError if it is read-only, has negative strides or
    another itemsize, UnsupportedValueError for quantised dtypes.
    """
    of = dtype_of(dtype)
    if array.dtype.itemsize != of.itemsize or not array.flags.writeable:
        raise ValueError(f"a writable array of {of.itemsize}-byte elements is needed for {dtype}, not {array.dtype}")
    if of.itemsize == 16:
        return torch.from_numpy(array.view(np.complex128))
    return torch.from_numpy(array.view(of.carrier)).view(dtype)


def _refusal(dtype: torch.dtype) -> str:
    return (
        f"a tensor of dtype {dtype} can't be saved, because its scale and zero point lie outside its elements: "
        "save tensor.int_repr() together with its q_scale() and q_zero_point(), or tensor.dequantize()"
    )
