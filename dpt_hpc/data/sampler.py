"""Which structures make up a step, and which rank computes which of them: a pure function of seed, epoch and step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Sampler:
    """Random batches of an epoch, each divided over ranks and accumulation steps with nearly equal numbers of edges.

    indices (S,): the structures to draw from. edge_estimate: one number per structure of the dataset, indexed by
    `indices`. The structures of a step do not depend on the number of ranks; the union over ranks and steps of an
    epoch is `indices`, each once.
    """

    def __init__(self, indices: Indices, edge_estimate: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self.indices = indices
        self.edge_estimate = edge_estimate
        self.batch_size = batch_size
        self.seed = seed
        # The order of the epoch at hand: derived, kept because drawing it at every step would cost more than the step.
        self._epoch: int | None = None
        self._order = indices

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def step(self, epoch: int, step: int, parts: int) -> list[Indices]:
        """Structures of step `step` of `epoch`, divided into `parts` micro-batches (a part may be empty)."""
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.indices)
        return balance(self._order[step * self.batch_size : (step + 1) * self.batch_size], self.edge_estimate, parts)


def balance(indices: Indices, weight: NDArray[np.int64], parts: int) -> list[Indices]:
    """Divide `indices` into `parts` of nearly equal total weight: heaviest first, each to the lightest part so far."""
    if parts == 1:
        return [indices]
    bins: list[list[int]] = [[] for _ in range(parts)]
    load = np.zeros(parts)
    for index in sorted(indices.tolist(), key=lambda i: (-int(weight[i]), i)):
        lightest = int(load.argmin())
        bins[lightest].append(index)
        load[lightest] += max(int(weight[index]), 1)
    return [np.array(b, dtype=np.int64) for b in bins]
