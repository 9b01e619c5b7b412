"""Makes of two processes of this machine two nodes: each in a network namespace of its own, one link between them.

The link is a pair of virtual Ethernet devices, whose rate is limited in each direction by a token bucket. Both go when
the processes end. Needs root and iproute2. Knows nothing of what the nodes do.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

DEVICE = "ckpt{}"
"""Name of the device at rank 0's end and at rank 1's."""
ADDRESS = "10.213.77.{}"
_CLONE_NEWNET = 0x40000000
_PATIENCE_S = 20.0


def enter(rank: int, folder: Path, mbit: int) -> None:
    """Take this process, rank 0 or 1, to a node of its own, and wait for the link to the other.

    Call it while the process has one thread: others stay where they are.

    Args:
        rank: of this process.
        folder: where the two find each other; empty, and seen by both.
        mbit: the rate of the link in each direction, in 10^6 bits per second.

    Raises:
        OSError: this is not allowed here, or there is no iproute2.
        TimeoutError: the other did not come.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace can't be made")
    device = DEVICE.format(rank)
    if rank == 0:
        _tell(folder / "first", str(os.getpid()))
        _await(folder / "second")
    else:
        other = _await(folder / "first")
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", DEVICE.format(0), "netns", other)
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "addr", "add", f"{ADDRESS.format(rank + 1)}/24", "dev", device)
    _run("ip", "link", "set", device, "up")
    # a burst has to last from one tick of the kernel's clock to the next
    burst = max(256 << 10, mbit * 1_000_000 // 8 // 250)
    _run(
        "tc",
        "qdisc",
        "add",
        "dev",
        device,
        "root",
        "tbf",
        "rate",
        f"{mbit}mbit",
        "burst",
        str(burst),
        "latency",
        "50ms",
    )
    os.environ["GLOO_SOCKET_IFNAME"] = device
    if rank == 1:
        _tell(folder / "second", "")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _tell(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text, encoding="ascii")
    path.with_suffix(".new").rename(path)


def _await(path: Path) -> str:
    until = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError("the other node did not come")
        time.sleep(0.01)
    return path.read_text(encoding="ascii")
