"""Pausing Python's cyclic garbage collector for as long as a save or load makes many small objects.

They are freed by reference counting; but every few thousand of them trigger a collection, and with a training program's
heap those cost as much as the whole rest of saving many small tensors (benchmarks/many_tensors.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No cyclic collections within the block, unless they were off already."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
