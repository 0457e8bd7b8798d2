"""What an epoch costs beside the work itself: ranks that wait for the fullest one, and for data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpt_hpc.train.ranks import Ranks


@dataclass
class EpochCosts:
    """Sums over the steps of an epoch up to now; a checkpoint holds them, so that an interrupted epoch is told whole.

    waited: seconds that this rank (before an interruption: rank 0) was without data. imbalance, imbalance_max: sum and
    maximum over the steps of the fullest rank's edges over the mean of all ranks.
    """

    waited: float = 0.0
    steps: int = 0
    imbalance: float = 0.0
    imbalance_max: float = 0.0

    def add(self, imbalance: float) -> None:
        """One step."""
        self.steps += 1
        self.imbalance += imbalance
        self.imbalance_max = max(self.imbalance_max, imbalance)

    def record(self, seconds: float, ranks: Ranks, device: torch.device) -> dict[str, Any]:
        """For the log of an epoch that took `seconds`; collective. data_wait: the share of them in which the rank that
        waited most was without data. gpu_memory_gb, on GPUs: the most that PyTorch has held on one so far."""
        found: dict[str, Any] = {
            "imbalance": {"mean": self.imbalance / self.steps, "max": self.imbalance_max},
            "data_wait": max(ranks.all_gather(self.waited)) / seconds,
        }
        if device.type == "cuda":
            found["gpu_memory_gb"] = max(ranks.all_gather(torch.cuda.max_memory_reserved(device) / 1e9))
        return found
