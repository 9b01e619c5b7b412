"""The agent of a run with levels: `python -m ckpt.levels.main --home FOLDER --ready FD --levels FD`.

The agent of ckpt.agent, which after each commit lets the checkpoint flow to the further levels, and prunes. What starts
it is launching.py, which needs torch; this does not.
"""

from __future__ import annotations

import argparse
import json

from ckpt.agent.main import add_arguments, serve
from ckpt.levels.flow import Flow
from ckpt.levels.tiers import levels_from_json

__all__ = ["main"]


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
    flow = Flow(tree["run"], levels, tree["claim"])
    serve(arguments.home, arguments.ready, after_commit=flow)


if __name__ == "__main__":
    main()
