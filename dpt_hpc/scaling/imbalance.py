"""How unequal the ranks' shares of a step are, by running the sampler itself for any number of ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.sampler import Sampler

STEPS = 4
"""Steps that are simulated for each number of ranks."""


class SimulatedImbalance:
    """Edges of the rank that has most over the mean of all, as a function of the number of ranks.

    edges (S,): of the dataset's structures; each simulated dataset is drawn from them with replacement. structures: of
    a step of one rank; weak: of every rank, else of all ranks together. With more ranks than structures of a step some
    ranks have nothing to do, and the others are that much above the mean.
    """

    def __init__(self, edges: NDArray[np.int64], structures: int, *, weak: bool, seed: int = 0) -> None:
        self._edges, self._structures, self._weak, self._seed = edges, structures, weak, seed
        self._known = lru_cache(maxsize=None)(self._simulate)

    def __call__(self, ranks: int) -> float:
        """The mean over a few steps, >= 1."""
        return self._known(ranks)

    def _simulate(self, ranks: int) -> float:
        if ranks == 1:
            return 1.0
        batch = self._structures * (ranks if self._weak else 1)
        drawn = np.random.default_rng([self._seed, ranks]).choice(self._edges, STEPS * batch)
        sampler = Sampler(np.arange(len(drawn)), drawn, batch, self._seed, window=len(drawn))
        return float(np.mean([sampler.imbalance(sampler.parts(1, step, ranks, 1)) for step in range(STEPS)]))
