"""Facts for people about what made a checkpoint. Nothing depends on them."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch


@cache
def _release() -> str:
    """Looked up once: that reads files."""
    try:
        return version("anyckpt")
    except PackageNotFoundError:
        return "unknown"


def provenance(**more: str) -> dict[str, str]:
    """Who wrote it, with what, when; and whatever else the caller knows."""
    return {
        "writer": f"anyckpt {_release()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }
