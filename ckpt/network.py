"""The network between the nodes of a run: where a process listens for others, under which addresses they reach it.

And which file systems lie behind it. Knows nothing of what is said or stored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct

_SHARED = {"9p", "afs", "beegfs", "ceph", "cifs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"}
_SHARED |= {"orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs"}
"""Types of file systems that a node reaches over a network; those in user space, `fuse.something`, count too."""


def over_network(path: str) -> bool:
    """Whether a path lies in a file system that this node reaches over a network; False where nobody says."""
    target = os.fsencode(os.path.realpath(path)) + b"/"
    longest, kind = b"", ""
    try:
        with open("/proc/self/mounts", "rb") as stream:
            for line in stream:
                _, where, what, *_ = line.split(b" ")
                # what would end a word is written as its octal number
                where = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), where).rstrip(b"/") + b"/"
                # what was mounted later lies above
                if len(where) >= len(longest) and target.startswith(where):
                    longest, kind = where, what.decode()
    except OSError:
        return False
    return kind in _SHARED or kind.startswith("fuse.")


def listen(*, loopback: bool) -> socket.socket:
    """A socket for other agents to connect to; with `loopback` for those of this machine only."""
    if loopback:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def own_hosts() -> list[str]:
    """Addresses under which other nodes may reach this one, the likeliest first."""
    hosts: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        said = os.environ.get(variable, "")
        # as NCCL reads it: beginnings of names, unless exact names follow a "=", or excluded ones a "^"
        wanted = [] if said.startswith("^") else [name for name in said.lstrip("=").split(",") if name]
        for _, interface in socket.if_nameindex():
            if any(interface == name or (interface.startswith(name) and said[0] != "=") for name in wanted):
                hosts += _address_of_interface(interface)
    # the address from which this machine reaches rank 0's, which is where most runs put their store
    master = os.environ.get("MASTER_ADDR")
    if master:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))
            hosts.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        hosts += [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    hosts.append(socket.gethostname())
    return list(dict.fromkeys(hosts))


def _address_of_interface(interface: str) -> list[str]:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        return [socket.inet_ntoa(answer[20:24])]
    return []


def keep_alive(connection: socket.socket) -> None:
    """Notice a machine that was switched off, also where nobody waits for an answer of it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
