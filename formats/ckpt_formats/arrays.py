"""Names for the array and buffer types that signatures use. No code."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64Array: TypeAlias = NDArray[np.int64]
UInt8Array: TypeAlias = NDArray[np.uint8]
AnyArray: TypeAlias = NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview
