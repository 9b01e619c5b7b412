"""numpy arrays and scalars as values: names of dtypes, and bytes of elements.

It knows neither JSON nor paths. What it is handed when decoding comes from a file and is not
trusted: a dtype is one of a closed list, and a shape has to fit the bytes that are there.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any, Final

import ml_dtypes
import numpy as np

__all__ = ["SCALAR_TYPES", "array_bytes", "array_dtype", "array_of", "dtype_name"]

Array = np.ndarray[Any, np.dtype[Any]]

# numpy calls all of these "V1" or the like in `dtype.str`, so they go by their names
_EXTENSIONS: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "float4_e2m1fn",
        "int1",
        "int2",
        "int4",
        "uint1",
        "uint2",
        "uint4",
        "complex32",
        "bcomplex32",
    )
    if hasattr(ml_dtypes, name)
}

SCALAR_TYPES: Final[frozenset[type]] = frozenset(np.dtype(code).type for code in np.typecodes["All"] if code != "O") | {
    dtype.type for dtype in _EXTENSIONS.values()
}
"""The types of numpy's scalars. Some have a dtype that can't be stored."""

# numpy's array interface strings of the dtypes that mean the same on every machine; the count in a unit of time is
# bounded because numpy takes it as a C int without looking
_NAME: Final = re.compile(
    r"\|[biu]1|[<>](?:[iu][248]|f[248]|c(?:8|16))"
    r"|\|[SV][1-9][0-9]{0,8}|[<>]U[1-9][0-9]{0,8}"
    r"|[<>][mM]8(?:\[(?:[1-9][0-9]{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?",
    re.ASCII,
)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name a numpy dtype is stored under.

    Raises TypeError, with the remedy, for the dtypes that can't be stored: objects, records, variable-length strings,
    long doubles, and strings of length 0.
    """
    extension = _EXTENSIONS.get(dtype.name)
    if extension is not None and extension == dtype:
        return dtype.name
    if dtype.kind == "O":
        raise TypeError("is an array of Python objects; convert it with .tolist(), or to an array of numbers")
    if dtype.fields is not None:
        raise TypeError(f"is an array of records ({dtype}); save one array per field")
    name = dtype.str
    if not _NAME.fullmatch(name) or np.dtype(name) != dtype:
        raise TypeError(f"is of numpy dtype {dtype}, which has no portable form; convert it with .astype(...)")
    return name


def array_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a stored name. Raises ValueError for names that are not on the list."""
    extension = _EXTENSIONS.get(name)
    if extension is not None:
        return extension
    if not _NAME.fullmatch(name):
        raise ValueError(f"unknown numpy dtype {name[:64]!r}")
    return np.dtype(name)


def array_bytes(array: Array) -> tuple[bytes, bool]:
    """The elements of an array, one after the other, and whether they go in column-major ("Fortran") order."""
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return array.tobytes("F" if fortran else "C"), fortran


def array_of(dtype: np.dtype[Any], shape: list[int], data: bytes, fortran: bool) -> Array:
    """A new writable array of these elements.

    Raises ValueError unless `shape` accounts for exactly the bytes in `data`; nothing is allocated before that.
    """
    if len(shape) > 64 or any(size < 0 for size in shape):
        raise ValueError(f"no array has {len(shape)} dimensions with sizes {shape[:64]}")
    if prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"shape {shape} of dtype {dtype} does not fit the {len(data)} bytes that are there")
    array: Array = np.ndarray(shape, dtype, buffer=bytearray(data), order="F" if fortran else "C")
    if dtype.kind == "b":
        # any byte but 0 and 1 would be a bool that is neither
        raw = array.view(np.uint8)
        np.minimum(raw, 1, out=raw)
    elif dtype.kind == "U" and array.size:
        codes = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))
        if codes.max() > 0x10FFFF:
            raise ValueError("a string has a code point beyond Unicode")
    return array
