"""Facts for people about what made a checkpoint. Nothing depends on them."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def provenance(**more: str) -> dict[str, str]:
    """Who wrote it, with what, when; and whatever else the caller knows."""
    try:
        release = version("anyckpt")
    except PackageNotFoundError:
        release = "unknown"
    return {
        "writer": f"anyckpt {release}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }
