"""The dtypes a stored tensor may have: their names, sizes, and how numpy and safetensors call them.

Names are torch's (`"bfloat16"`, `"float8_e4m3fn"`), but this module does not know torch: `ckpt.state.torch_dtypes` maps
`torch.dtype` objects to these. Every dtype of torch 2.13 that a CPU tensor can hold is here; the quantised ones
(`qint8` and its kin) are not, because their bytes mean nothing without the scale that torch keeps beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np

from ckpt_formats.errors import UnknownDtypeError
from ckpt_formats.values.tree import brief

__all__ = ["DTYPES", "DType", "carrier_dtype", "dtype", "from_safetensors"]


@dataclass(frozen=True, slots=True)
class DType:
    """What one element of a stored tensor is.

    Two `DType`s are equal when their names are. Elements are stored little-endian, row-major, without padding.
    """

    name: str
    """torch's name, without `torch.`"""
    itemsize: int
    """bytes per element"""
    safetensors: str | None
    """the name in a safetensors header, or None: such a chunk is stored as `U8`, and the index says what it is"""
    numpy: np.dtype[np.generic] | None
    """the numpy dtype of the same values (from ml_dtypes where numpy has none), or None where nobody has one"""
    carrier: np.dtype[np.generic]
    """a numpy dtype of the same itemsize for copying elements bit for bit, without looking at them"""

    @property
    def array(self) -> np.dtype[np.generic]:
        """The dtype to give elements to a reader in: `numpy`, or `carrier` where there is none."""
        return self.carrier if self.numpy is None else self.numpy

    def __str__(self) -> str:
        return self.name


# Unsigned integers are copied as they are whatever the bits, where floats might be quieted or bools normalised. Numpy
# has no 16-byte integer; a void of that size is copied by memcpy, as fast.
_CARRIERS: Final[dict[int, np.dtype[np.generic]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype("V16"),
}


def carrier_dtype(itemsize: int) -> np.dtype[np.generic]:
    """The numpy dtype in which elements of `itemsize` bytes (1, 2, 4, 8 or 16) are copied bit for bit."""
    return _CARRIERS[itemsize]


def _numpy(name: str) -> np.dtype[np.generic] | None:
    # complex32 came to ml_dtypes late; with an older one it is read through its carrier
    scalar = getattr(np, name, None) or getattr(ml_dtypes, name, None)
    return None if scalar is None else np.dtype(scalar)


def _known(name: str, itemsize: int, safetensors: str | None) -> DType:
    return DType(name, itemsize, safetensors, _numpy(name), _CARRIERS[itemsize])


def _raw(name: str, itemsize: int) -> DType:
    """A dtype whose bits only torch knows how to read."""
    return DType(name, itemsize, None, None, _CARRIERS[itemsize])


# safetensors 0.8 names. float4_e2m1fn_x2 is None on purpose: safetensors' F4 counts half elements, so that the shape in
# the header is not the tensor's, a 0-d tensor can't be written at all, and its own slices of F4 fail.
_ALL: Final = [
    _known("float64", 8, "F64"),
    _known("float32", 4, "F32"),
    _known("float16", 2, "F16"),
    _known("bfloat16", 2, "BF16"),
    _known("float8_e4m3fn", 1, "F8_E4M3"),
    _known("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
    _known("float8_e5m2", 1, "F8_E5M2"),
    _known("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    _known("float8_e8m0fnu", 1, "F8_E8M0"),
    _raw("float4_e2m1fn_x2", 1),
    _known("complex32", 4, None),
    _known("complex64", 8, "C64"),
    _known("complex128", 16, None),
    _known("bool", 1, "BOOL"),
    _known("uint8", 1, "U8"),
    _known("uint16", 2, "U16"),
    _known("uint32", 4, "U32"),
    _known("uint64", 8, "U64"),
    _known("int8", 1, "I8"),
    _known("int16", 2, "I16"),
    _known("int32", 4, "I32"),
    _known("int64", 8, "I64"),
    _raw("bits8", 1),
    _raw("bits16", 2),
    _raw("bits1x8", 1),
    _raw("bits2x4", 1),
    _raw("bits4x2", 1),
    # torch's sub-byte integers are shells: a byte per element, whose meaning is their users'
    *(_raw(f"{sign}int{bits}", 1) for sign in ("", "u") for bits in range(1, 8)),
]

DTYPES: Final[dict[str, DType]] = {known.name: known for known in _ALL}
"""Every dtype, by name."""

_BY_SAFETENSORS: Final = {known.safetensors: known for known in _ALL if known.safetensors is not None}


def dtype(name: str) -> DType:
    """The dtype of that name. Raises UnknownDtypeError."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise UnknownDtypeError(
            f"unknown dtype {brief(name)}: the checkpoint may have been written by a newer release; update this one"
        ) from None


def from_safetensors(name: str) -> DType:
    """The dtype that a safetensors header calls `name`. Raises UnknownDtypeError.

    Sub-byte dtypes (`F4`, `F6_E2M3`, `F6_E3M2`) are refused: their headers count elements that have no address.
    """
    try:
        return _BY_SAFETENSORS[name]
    except (KeyError, TypeError):
        raise UnknownDtypeError(
            f"safetensors dtype {brief(name)} can't be read; those that can are {', '.join(_BY_SAFETENSORS)}"
        ) from None
