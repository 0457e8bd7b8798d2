"""This host on the network: its name, its address and interface towards another host, and what that one is called."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dpt_hpc.errors import EnvironmentFault

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def host_name() -> str:
    """The name of this machine, as it gives it itself; other hosts need not know it."""
    return socket.gethostname()


def host_identity() -> str:
    """What tells this machine from another one that calls itself the same (localhost)."""
    try:
        return f"{host_name()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return host_name()


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


def resolves(host: str) -> bool:
    """Whether `host` is a name, or an address, that leads somewhere from here."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def reachable(host: str) -> str:
    """`host` if its name resolves here, else the address that Slurm knows it by.

    Raises EnvironmentFault if neither leads to an address.
    """
    if resolves(host):
        return host
    address = _address_in_slurm(host)
    if address and resolves(address):
        return address
    slurm = f"and Slurm knows no other address of it (scontrol -o show node {host}: NodeAddr={address})"
    raise EnvironmentFault(
        f"the host of rank 0, {host}, does not resolve on {host_name()}, {slurm}.\n"
        "Set MASTER_ADDR to an address of it that all nodes reach, or add the name to /etc/hosts."
    )


def _address_in_slurm(host: str) -> str | None:
    try:
        command = ["scontrol", "-o", "show", "node", host]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((word.partition("=")[2] for word in told.split() if word.startswith("NodeAddr=")), None)
