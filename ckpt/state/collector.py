"""Pausing Python's garbage collector while a great many objects are made that are all still needed.

It would walk all objects of the process again and again meanwhile, and find nothing: for a model of 20,000 tensors that
takes three times as long as the work itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_collector"]


@contextmanager
def paused_collector() -> Iterator[None]:
    """Collect no garbage within the block; go on afterwards if it was on before. Also a decorator."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
