"""The agent's process: `python -m ckpt.agent.main --home FOLDER --ready FD`.

It is in a session of its own, so that signals to the trainers' group do not reach it, and ignores those that ask it to
end: it does when its trainers have ended, everything that they captured is written, and what is to be done after
commits is done. A higher floor that has something to do after commits has a main program of its own, which calls
`serve`.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket

from ckpt.agent.aftermath import AfterCommit, Aftermath
from ckpt.agent.server import Agent
from ckpt.agent.wire import SOCKET
from ckpt.storage.files import Files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `launch` gives to every agent: those of `serve`."""
    parser.add_argument("--home", required=True, help="a folder in a memory file system, made for this agent")
    parser.add_argument("--ready", type=int, required=True, help="a file descriptor to write to when it listens")


def serve(
    home: str, ready: int, *, after_commit: AfterCommit | Aftermath | None = None, files: Files | None = None
) -> None:
    """Be an agent until done, and remove everything.

    Args:
        home: a folder in a memory file system, made for this agent.
        ready: a file descriptor to write to when it listens.
        after_commit: called with every checkpoint that was committed, one after the other, on a thread of its own. The
            agent stays until the last call has returned, or has been given up (see aftermath.py). Or an Aftermath that
            decides itself what it does when, and until when the agent stays.
        files: how it changes the file system.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    # schedulers signal whole jobs, in whatever session a process is; this one ends when the trainers have ended
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.path.join(home, SOCKET))
            listener.listen(128)
            os.write(ready, b"1")
            os.close(ready)
            aftermath = after_commit if isinstance(after_commit, Aftermath) else Aftermath(after_commit)
            Agent(home, files, aftermath).serve(listener)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    """An agent that does nothing after commits."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args()
    serve(arguments.home, arguments.ready)


if __name__ == "__main__":
    main()
