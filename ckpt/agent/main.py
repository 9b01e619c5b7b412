"""The agent's process: `python -m ckpt.agent.main --home FOLDER --ready FD`.

It is in a session of its own, so that signals to the trainers' group do not reach it, and it ignores Ctrl-C: it ends
when its trainers have ended and everything that they captured is written.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket

from ckpt.agent.server import Agent

SOCKET = "socket"
"""Name of the socket in the agent's folder."""


def main() -> None:
    """Serve until done, and remove everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", required=True, help="a folder in a memory file system, made for this agent")
    parser.add_argument("--ready", type=int, required=True, help="a file descriptor to write to when it listens")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    home = arguments.home
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.path.join(home, SOCKET))
            listener.listen(128)
            os.write(arguments.ready, b"1")
            os.close(arguments.ready)
            Agent(home).serve(listener)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
