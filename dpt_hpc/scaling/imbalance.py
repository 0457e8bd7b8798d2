"""How unequal the ranks' shares of a step are, and how long dividing it takes, by running the sampler itself for any
number of ranks."""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.sampler import Sampler

STEPS = 4
"""Steps that are simulated for each number of ranks."""
WINDOW = 65_536
"""Structures of the default window."""


class SimulatedImbalance:
    """Edges of the rank that has most over the mean of all, as a function of the number of ranks.

    edges (S,): of the dataset's structures; each simulated dataset is drawn from them with replacement. structures: of
    a step of one rank; weak: of every rank, else of all ranks together. With more ranks than structures of a step some
    ranks have nothing to do, and the others are that much above the mean. similar_sizes: as the run's batching.
    """

    def __init__(
        self, edges: NDArray[np.int64], structures: int, *, weak: bool, similar_sizes: bool = False, seed: int = 0
    ) -> None:
        self._edges, self._structures, self._weak, self._seed = edges, structures, weak, seed
        self._similar_sizes = similar_sizes
        self._known = lru_cache(maxsize=None)(self._simulate)

    def __call__(self, ranks: int) -> float:
        """The mean over a few steps, >= 1."""
        return self._known(ranks)[0]

    def seconds(self, ranks: int) -> float:
        """Of a step, in which each rank divides it over `ranks`, on this machine's processor; 0 for one rank."""
        return self._known(ranks)[1]

    def _simulate(self, ranks: int) -> tuple[float, float]:
        if ranks == 1:
            return 1.0, 0.0
        batch = self._structures * (ranks if self._weak else 1)
        similar = self._similar_sizes
        steps = max(STEPS, WINDOW // batch) if similar else STEPS  # alike are those of a window
        drawn = np.random.default_rng([self._seed, ranks]).choice(self._edges, steps * batch)
        sampler = Sampler(np.arange(len(drawn)), drawn, batch, self._seed, window=len(drawn), similar_sizes=similar)
        began = time.thread_time()  # of this thread alone: what else runs on the machine is not counted
        unequal = [sampler.imbalance(sampler.parts(1, step, ranks, 1)) for step in range(STEPS)]
        return float(np.mean(unequal)), (time.thread_time() - began) / STEPS
