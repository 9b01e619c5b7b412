"""Starting the agent of a run with levels (main.py), from a trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ckpt.agent.client import Launcher, launch
from ckpt.levels.tiers import Level, levels_to_json

__all__ = ["launcher"]


def launcher(run: str, levels: Sequence[Level], claim: int | None) -> Launcher:
    """What starts such an agent on this node.

    Args:
        run: the run's folder.
        levels: its levels. They go to the agent in memory, since their options may have secrets in them.
        claim: on rank 0, the file that has the lock of the run, which the agent shares.
    """

    def start() -> str:
        tree = {"run": run, "levels": levels_to_json(levels, options=True), "claim": claim}
        fd = os.memfd_create("ckpt-levels", os.MFD_CLOEXEC)
        try:
            os.write(fd, json.dumps(tree).encode("ascii"))
            os.lseek(fd, 0, os.SEEK_SET)
            return launch("ckpt.levels.main", ["--levels", str(fd)], [fd] if claim is None else [fd, claim])
        finally:
            os.close(fd)

    return start
