"""The learning rate: ReduceLROnPlateau for all weights, times what a group of them has of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dpt_hpc.train.config import ScheduleOptions

SCALE = "scale"
"""Key of an optimiser's parameter group: its share of the learning rate."""


class PlateauSchedule:
    """One rate falls as ReduceLROnPlateau has it; every parameter group gets `scale` of it, its lower bound, too.

    So groups keep their ratios for the whole run, which a plateau schedule over the groups themselves does not grant:
    it leaves those alone whose step would be below its threshold of 1e-8.
    """

    def __init__(self, optimizer: Optimizer, options: ScheduleOptions, learning_rate: float) -> None:
        self._groups = optimizer.param_groups
        self._whole = SGD([torch.zeros(1)], lr=learning_rate)  # holds the rate, and updates nothing
        self._plateau = ReduceLROnPlateau(
            self._whole,
            factor=options.factor,
            patience=options.patience,
            threshold=options.threshold,
            min_lr=options.min_learning_rate,
        )

    @property
    def learning_rate(self) -> float:
        return float(self._whole.param_groups[0]["lr"])

    def step(self, loss: float) -> None:
        """After an epoch with this training loss."""
        self._plateau.step(loss)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._plateau.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], learning_rate: float) -> None:
        """Stand where `state_dict` was taken, at that rate."""
        self._plateau.load_state_dict(state)
        self._whole.param_groups[0]["lr"] = learning_rate
        self._share()

    def _share(self) -> None:
        for group in self._groups:
            group["lr"] = self.learning_rate * group.get(SCALE, 1.0)
