"""How fast the ranks can talk: the all-reduce, measured."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import distributed

from dpt_hpc.train.ranks import Ranks

SMALL, LARGE = 8, 16 << 20
"""Bytes of a message whose time is latency, and of one whose time is bandwidth."""
REPEATS = {SMALL: 30, LARGE: 5}


def measure_all_reduce(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Median seconds of an all-reduce of few and of many bytes over all ranks; every rank calls it.

    Also as what a prediction needs: latency (seconds) of one message, if small sums go by tree; bandwidth (bytes/s) of
    one rank, if large ones go by ring. A single rank has neither: None.
    """
    if ranks.size == 1:
        return {"seconds": {}, "latency": None, "bandwidth": None}
    seconds = {}
    for size, repeats in REPEATS.items():
        tensor = torch.zeros(size // 4, device=device)
        times = []
        for _ in range(repeats + 2):  # the first ones open connections
            ranks.barrier()
            began = time.perf_counter()
            distributed.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        seconds[size] = max(ranks.all_gather(statistics.median(times[2:])))
    hops = 2 * math.ceil(math.log2(ranks.size))
    through = 2 * (ranks.size - 1) / ranks.size * LARGE
    return {
        "seconds": {str(size): value for size, value in seconds.items()},
        "latency": seconds[SMALL] / hops,
        "bandwidth": through / max(seconds[LARGE] - seconds[SMALL], 1e-9),
    }
