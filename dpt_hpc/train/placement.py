"""Which GPU, or which cores, a rank works on: one GPU each, or its own share of the node's cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.interfaces import host_name
from dpt_hpc.train.ranks import Ranks


def place(ranks: Ranks, device: torch.device, *, pin: bool) -> None:
    """Bind this rank to its cores and make sure that its GPU is its own; every rank calls it.

    Raises EnvironmentFault, on every rank, if two ranks were given the same GPU.
    """
    if ranks.size == 1:
        return
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = str(getattr(properties, "uuid", device.index))
    if fault := shared_gpus(ranks.all_gather((host_name(), gpu))):
        raise EnvironmentFault(fault)
    allowed = ranks.node.all_gather(_cores())
    shares = divide_cores(allowed)
    if warning := crowded_cores(shares, allowed, ranks.world.node):
        if ranks.node.rank == 0:
            print(f"warning: {warning}", file=sys.stderr)
    elif pin:
        cores = shares[ranks.node.rank]
        if bound(ranks.world.place, cores) and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(len(cores))


def shared_gpus(gpus: Sequence[tuple[str, str | None]]) -> str | None:
    """A message if two ranks have the same GPU. gpus: host and GPU of every rank; None for one on the CPU."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, (host, gpu) in enumerate(gpus):
        if gpu is not None:
            ranks_of.setdefault((host, gpu), []).append(rank)
    shared = {place: ranks for place, ranks in ranks_of.items() if len(ranks) > 1}
    if not shared:
        return None
    (host, gpu), ranks = next(iter(shared.items()))
    more = f"; {len(shared) - 1} more GPU(s) are shared" if len(shared) > 1 else ""
    return (
        f"ranks {', '.join(map(str, ranks))} share a GPU of {host} ({gpu}){more}.\n"
        "NCCL refuses that, and they would only wait for each other. Start as many ranks per node as it has GPUs "
        "(Slurm: --ntasks-per-node and --gpus-per-node alike), or set engine.device=cpu."
    )


def crowded_cores(shares: Sequence[Sequence[int]], allowed: Sequence[Sequence[int]], node: str) -> str | None:
    """A warning if a rank of a node has no core of its own. shares: what `divide_cores` makes of `allowed`."""
    if all(shares):
        return None
    cores = allowed[next(rank for rank, share in enumerate(shares) if not share)]
    some = ", ".join(map(str, sorted(cores)[:8]))
    ranks = sum(set(other) <= set(cores) for other in allowed)
    return (
        f"{ranks} of the {len(allowed)} ranks of node {node} may run on {len(cores)} core(s) only ({some}): they will"
        " wait for each other.\n"
        "Ask for more cores per rank (Slurm: --cpus-per-task, Open MPI: --bind-to none), or start fewer ranks."
    )


def divide_cores(allowed: Sequence[Sequence[int]]) -> list[list[int]]:
    """The cores of each of a node's ranks: none is two ranks', and where a launcher has bound a rank, it stays there.

    allowed: the cores that each of them may run on, neighbours side by side, as they then stay. Ranks that may run on
    the same ones divide them; what ranks with fewer cores need (a set within a set) is left to these. An empty share
    is that of a rank for which no core is left.
    """
    shares: list[list[int]] = [[] for _ in allowed]
    taken: set[int] = set()
    for cores in sorted({tuple(cores) for cores in allowed}, key=lambda cores: (len(cores), cores)):
        group = [rank for rank, own in enumerate(allowed) if tuple(own) == cores]
        free = [core for core in cores if core not in taken]
        for i, rank in enumerate(group):
            first, last = (len(free) * k // len(group) for k in (i, i + 1))
            shares[rank] = free[first:last]
        taken.update(free)
    return shares


def bound(place: str, cores: Sequence[int]) -> bool:
    """Bind this process to `cores`; where that cannot be (a container forbids it, the node's cores have changed) a
    warning names the rank's `place`, and it is not."""
    try:
        bind(cores)
    except OSError as error:
        some = ", ".join(map(str, cores[:8])) + (", ..." if len(cores) > 8 else "")
        print(
            f"warning: {place} cannot be bound to its core(s) {some}: {error.strerror or error}.\n"
            "It trains all the same, perhaps more slowly; engine.pin=false does not try.",
            file=sys.stderr,
        )
        return False
    return True


def bind(cores: Sequence[int]) -> None:
    """Let every thread of this process, and those that they will start, run on `cores` only.

    The pool of OpenMP may be there already: it would keep the cores that it began with. Raises OSError where the system
    does not allow it.
    """
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has come to its end meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def _cores() -> list[int]:
    """The logical cores that this process may run on; those of one socket, and of one physical core, side by side."""

    def place_of(core: int) -> tuple[int, int, int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
        try:
            socket, physical = (int((topology / n).read_text()) for n in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            return 0, core, core
        return socket, physical, core

    return sorted(os.sched_getaffinity(0), key=place_of)
