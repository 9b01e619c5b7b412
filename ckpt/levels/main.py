"""The agent of a run with levels: `python -m ckpt.levels.main --home FOLDER --ready FD --levels FD`.

The agent of ckpt.agent, which after each commit lets the checkpoint flow to the further levels, and prunes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from ckpt.agent.client import Launcher, launch
from ckpt.agent.main import add_arguments, serve
from ckpt.levels.flow import Flow
from ckpt.levels.tiers import Level, levels_from_json, levels_to_json

__all__ = ["launcher", "main"]


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


def main() -> None:
    """Serve until done."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--levels", type=int, required=True, help="a file descriptor to read the levels from")
    arguments = parser.parse_args()
    with open(arguments.levels, encoding="ascii") as stream:
        tree = json.load(stream)
    levels = levels_from_json(tree["levels"])
    for level in levels:
        level.configure()
    flow = Flow(tree["run"], levels, arguments.home, tree["claim"])
    serve(arguments.home, arguments.ready, after_commit=flow)


if __name__ == "__main__":
    main()
