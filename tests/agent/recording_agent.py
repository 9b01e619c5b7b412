"""An agent's main program that writes down what was committed: as a floor above the agent's would have it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ckpt.agent import main as agent
from ckpt.agent.aftermath import Committed


def main() -> None:
    parser = argparse.ArgumentParser()
    agent.add_arguments(parser)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()

    def after_commit(what: Committed) -> None:
        assert Path(what.path, "manifest.json").exists()
        time.sleep(arguments.seconds)
        with arguments.record.open("a") as stream:
            stream.write(f"{what.step}\n")
        if what.step == 1:
            raise RuntimeError("nothing else is stopped by this")

    agent.serve(arguments.home, arguments.ready, after_commit=after_commit)


if __name__ == "__main__":
    main()
