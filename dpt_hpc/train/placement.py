"""Which GPU, or which cores, a rank works on: one GPU each, or its own share of the node's cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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
    if warning := crowded_cores(allowed, ranks.world.node):
        if ranks.node.rank == 0:
            print(f"warning: {warning}", file=sys.stderr)
    elif pin and (cores := share_of_cores(allowed, ranks.node.rank)):
        os.sched_setaffinity(0, cores)
        if "OMP_NUM_THREADS" not in os.environ:
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


def crowded_cores(allowed: Sequence[Sequence[int]], node: str) -> str | None:
    """A warning if the ranks of a node have fewer cores than there are ranks. allowed: the cores of each of them."""
    cores = set().union(*allowed)
    if len(cores) >= len(allowed):
        return None
    some = ", ".join(map(str, sorted(cores)[:8]))
    return (
        f"the {len(allowed)} ranks of node {node} may run on {len(cores)} core(s) only ({some}): they will wait for"
        " each other.\n"
        "Ask for more cores per rank (Slurm: --cpus-per-task, Open MPI: --bind-to none), or start fewer ranks."
    )


def share_of_cores(allowed: Sequence[Sequence[int]], local_rank: int) -> list[int] | None:
    """The cores of one of a node's ranks, where all may run on the same ones, that is, where the launcher has bound
    none; neighbours stay together. None where it has, or where a rank is alone."""
    if len(allowed) == 1 or len({tuple(cores) for cores in allowed}) > 1:
        return None
    cores = allowed[local_rank]
    first, last = (len(cores) * i // len(allowed) for i in (local_rank, local_rank + 1))
    return list(cores[first:last])


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
