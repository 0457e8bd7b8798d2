"""Time on a device: CUDA events around each run, the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(run: Callable[[], Any], repeats: int, device: str = "cuda") -> float:
    """Median over `repeats` runs, after one that is not counted. Includes whatever the CPU does between launches."""
    run()
    seconds = []
    for _ in range(repeats):
        if device == "cpu":
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
