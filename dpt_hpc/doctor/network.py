"""The interconnect: sums over all ranks, and gets from another rank's memory."""

from __future__ import annotations

import torch

from dpt_hpc.doctor.finding import Finding, ok
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.interconnect import measure_all_reduce
from dpt_hpc.train.one_sided import measure_get
from dpt_hpc.train.ranks import Ranks

SLOW = 10e6
"""Bytes/s of an all-reduce, under which something is broken: a gigabit is twelve times that."""


def all_reduce(ranks: Ranks, device: torch.device) -> Finding:
    """Latency and bandwidth of a sum over all ranks. Collective."""
    if ranks.size == 1:
        return ok("all-reduce", "one rank: nothing to send")
    found = measure_all_reduce(ranks, device)
    said = f"{found['seconds']['8'] * 1e6:.0f} µs for 8 bytes, {found['bandwidth'] / 1e9:.2f} GB/s for 16 MB (ring)"
    if found["bandwidth"] < SLOW:
        todo = "Look which network the ranks talk over: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name an interface."
        return Finding("all-reduce", "bad", said, todo, found)
    return ok("all-reduce", said, **found)


def one_sided_get(config: RunConfig, ranks: Ranks) -> Finding:
    """Of MPI, which only data.store=cluster needs. Collective."""
    if ranks.size == 1:
        return ok("one-sided get", "one rank: nothing to get")
    try:
        found = measure_get(ranks)
    except EnvironmentFault as error:
        if config.data.store == "cluster":
            raise
        reason = str(error).splitlines()[0].partition(", but ")[2]
        return ok("one-sided get", f"not possible, and needed by data.store=cluster alone: {reason}", possible=False)
    record, rate = found["seconds_of_a_record"], found["bytes_per_second"]
    said = f"{record * 1e6:.0f} µs for each 4 kB of a batch, {rate / 1e9:.2f} GB/s"
    return ok("one-sided get", said, **found)
