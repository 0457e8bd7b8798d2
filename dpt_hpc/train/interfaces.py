"""This host on the network: its name, and its address and interface towards another host."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def host_name() -> str:
    """The name of this machine, as it gives it itself; other hosts need not know it."""
    return socket.gethostname()


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """What tells this node from others: Slurm's name for it (two slurmd on one machine are two nodes), else the host's.
    DPT_HPC_NODE overrides."""
    return environment.get("DPT_HPC_NODE") or environment.get("SLURMD_NODENAME") or host_name()


def own_address_towards(host: str) -> str | None:
    """This host's own IPv4 address on the way to `host`; None if there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str | None) -> str | None:
    """The name of this host's network interface on the way to `host`; None if there is no way."""
    address = own_address_towards(host) if host else None
    return next((name for name, own in interfaces().items() if own == address), None)


def interfaces() -> dict[str, str]:
    """This host's network interfaces and their IPv4 addresses."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(asked, _GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # no IPv4 address
                continue
            found[name] = socket.inet_ntoa(reply[20:24])
    return found
