"""An agent's main program for tests: it writes no data while the file `hold` (or `hold-NODE`) lies in a folder, fails
to while `full-NODE` does, keeps as many finished saves in mind as the file `kept` says, and takes seconds, not half a
minute, to notice that another agent is frozen.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ckpt.agent import crew, peers
from ckpt.agent import main as agent
from ckpt.storage.files import File, Files


class Held(Files):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def create(self, path: str, *, direct: bool) -> File:
        if "/data/" in path:
            node = os.environ.get("CKPT_NODE", "")
            deadline = time.monotonic() + 60
            while any(os.path.exists(f"{self._folder}/{name}") for name in ("hold", f"hold-{node}")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if os.path.exists(f"{self._folder}/full-{node}"):
                raise OSError(28, "No space left on device", path)
        return super().create(path, direct=direct)


def main() -> None:
    parser = argparse.ArgumentParser()
    agent.add_arguments(parser)
    parser.add_argument("--folder", required=True)
    arguments = parser.parse_args()
    peers.PING, peers.SILENCE = 0.2, 2.0
    kept = Path(arguments.folder, "kept")
    if kept.exists():
        crew.KEPT = int(kept.read_text())
    agent.serve(arguments.home, arguments.ready, files=Held(arguments.folder))


if __name__ == "__main__":
    main()
