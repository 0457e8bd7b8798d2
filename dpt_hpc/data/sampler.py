"""Which structures make up a step, and which rank computes which of them: a pure function of seed, epoch and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.tables import Indices

BLOCK = 64
"""Structures that stay neighbours until their window is shuffled: they are read from disk in one piece."""


class Sampler:
    """The steps of an epoch, each divided over ranks and micro-batches with nearly equal numbers of edges.

    indices (S,): the structures to draw from, ascending. edges: how many each structure of the dataset has, indexed by
    `indices`. window: how many structures are shuffled among themselves (rounded down to whole steps); a larger dataset
    is cut into blocks of 64 neighbours, and the windows are made of blocks in random order. similar_sizes: the steps of
    a window consist of structures with like numbers of edges, in random order. edge_budget: how many edges a
    micro-batch may have; None: any number.

    The structures of a step do not depend on the number of ranks or on the budget; the union over the steps of an epoch
    is `indices`, each once.
    """

    def __init__(
        self,
        indices: Indices,
        edges: NDArray[np.int64],
        batch_size: int,
        seed: int,
        *,
        window: int = 65_536,
        similar_sizes: bool = False,
        edge_budget: int | None = None,
    ) -> None:
        self.indices = indices
        self.edges = edges
        self.batch_size = batch_size
        self.seed = seed
        self.similar_sizes = similar_sizes
        self.edge_budget = edge_budget
        self._shuffled_at_once = len(indices) <= window
        self._window_steps = self.steps_per_epoch if self._shuffled_at_once else max(window // batch_size, 1)
        # The window at hand: derived, kept because drawing it at every step would cost more than the step.
        self._at: tuple[int, int] | None = None
        self._steps: list[Indices] = []

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def windows(self) -> list[range]:
        """The steps of an epoch that draw from the same window, window by window."""
        every, total = self._window_steps, self.steps_per_epoch
        return [range(start, min(start + every, total)) for start in range(0, total, every)]

    def step(self, epoch: int, step: int) -> Indices:
        """The structures of step `step` of `epoch`, over all ranks."""
        window = step // self._window_steps
        if self._at != (epoch, window):
            self._at, self._steps = (epoch, window), self._draw(epoch, window)
        return self._steps[step - window * self._window_steps]

    def parts(self, epoch: int, step: int, world_size: int, accumulation: int) -> Parts:
        """The structures of a step, per micro-batch and rank: parts[m][r]; a part may be empty.

        There are `accumulation` micro-batches, or as many more as the edge budget needs, the same on every rank. A
        structure above the budget is alone in its part.
        """
        structures = self.step(epoch, step)
        if world_size == accumulation == 1 and self.edge_budget is None:
            return Parts(structures, np.array([[len(structures)]]))
        return divide(structures, self.edges, world_size, accumulation, self.edge_budget)

    def imbalance(self, parts: Sequence[Sequence[Indices]]) -> float:
        """Edges of the rank that has most, over the mean of all ranks."""
        if not isinstance(parts, Parts):
            sizes = np.array([[len(part) for part in micro] for micro in parts])
            parts = Parts(np.concatenate([part for micro in parts for part in micro]), sizes)
        ranks = parts.sizes.shape[1]
        rank = np.repeat(np.arange(parts.sizes.size) % ranks, parts.sizes.ravel())
        loads = np.bincount(rank, weights=self.edges[parts.structures], minlength=ranks)
        return float(loads.max() * ranks / max(loads.sum(), 1))

    def above_budget(self) -> Indices:
        """Structures that have more edges than the budget."""
        budget = np.inf if self.edge_budget is None else self.edge_budget
        return self.indices[self.edges[self.indices] > budget]

    def _draw(self, epoch: int, window: int) -> list[Indices]:
        """The steps of one window."""
        if self._shuffled_at_once:
            random = np.random.default_rng([self.seed, epoch])
            drawn = random.permutation(self.indices)
        else:
            random = np.random.default_rng([self.seed, epoch, 1 + window])
            drawn = random.permutation(self._members(epoch, window))
        cuts = np.arange(self.batch_size, len(drawn), self.batch_size)
        if not self.similar_sizes:
            return np.split(drawn, cuts)
        # Neighbours in the order of sizes, moved by up to half a step, so that no two epochs have the same steps. The
        # short step, if there is one, is cut at random: in the same place it would favour the same structures for ever.
        place = np.argsort(np.argsort(self.edges[drawn], kind="stable"), kind="stable")
        drawn = drawn[np.argsort(place + random.uniform(0, self.batch_size, len(drawn)), kind="stable")]
        short = len(drawn) % self.batch_size
        if short:
            cuts[random.integers(len(cuts) + 1) :] -= self.batch_size - short
        steps = np.split(drawn, cuts)
        return [steps[k] for k in random.permutation(len(steps))]

    def _members(self, epoch: int, window: int) -> Indices:
        """The structures of a window: a stretch of the blocks in the epoch's order."""
        total = len(self.indices)
        starts = np.random.default_rng([self.seed, epoch]).permutation(np.arange(0, total, BLOCK))
        ends = np.minimum(starts + BLOCK, total)
        position = np.cumsum(ends - starts)
        first = window * self._window_steps * self.batch_size
        last = min(first + self._window_steps * self.batch_size, total)
        blocks = range(int(np.searchsorted(position, first, "right")), int(np.searchsorted(position, last)) + 1)
        before = int(position[blocks[0]] - (ends - starts)[blocks[0]])
        stretch = np.concatenate([self.indices[starts[b] : ends[b]] for b in blocks])
        return stretch[first - before : last - before]


class Parts(Sequence[Sequence[Indices]]):
    """The structures of a step, divided: parts[m][r], of micro-batch m and rank r, is cut out when it is asked for.

    structures (S,): part after part · sizes (M,R): of each.
    """

    def __init__(self, structures: Indices, sizes: NDArray[np.int64]) -> None:
        self.structures, self.sizes = structures, sizes
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, m: Any) -> Any:
        m = range(len(self))[m]
        ranks = self.sizes.shape[1]
        last = int(self._ends[(m + 1) * ranks - 1])
        sizes = self.sizes[m]
        return MicroBatch(self.structures[last - int(sizes.sum()) : last], np.cumsum(sizes))


class MicroBatch(Sequence[Indices]):
    """One of `Parts`: its structures (S,) rank after rank, ends (R,) of each rank's."""

    def __init__(self, structures: Indices, ends: NDArray[np.int64]) -> None:
        self._structures, self._ends = structures, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, r: Any) -> Any:
        r = range(len(self))[r]
        return self._structures[int(self._ends[r - 1]) if r else 0 : int(self._ends[r])]


def divide(
    structures: Indices, edges: NDArray[np.int64], world_size: int, accumulation: int, budget: int | None
) -> Parts:
    """Divide a step over ranks, then each rank's share over micro-batches: heaviest first, each to the lightest so far.

    edges: indexed by `structures`. Returns parts[m][r], see `Sampler.parts`; O(S log S) and no loop over ranks.
    """
    # A structure without edges costs something too, and counting it keeps ranks and micro-batches from being piled up.
    weight = np.maximum(edges[structures], 1)
    # To one part in 2**16: what is nearly as heavy may as well come first.
    heaviest = int(weight.max())
    order = _order((heaviest - weight) >> max(heaviest.bit_length() - 16, 0))
    rank = _to_the_lightest(weight[order], world_size)
    order = order[by_rank := _order(rank)]
    held = np.bincount(rank, minlength=world_size)
    if accumulation == 1 and budget is None:
        return Parts(structures[order], held[None])

    # One row per rank, its structures from the left, heaviest first.
    rank = rank[by_rank]
    column = np.arange(len(rank)) - np.repeat(np.cumsum(held) - held, held)
    weights = np.zeros((world_size, int(held.max())), dtype=np.int64)
    weights[rank, column] = weight[order]
    micro = _micro_batches(weights, accumulation, budget)[rank, column]
    count = max(accumulation, int(micro.max()) + 1)
    part = micro * world_size + rank
    sizes = np.bincount(part, minlength=count * world_size).reshape(count, world_size)
    return Parts(structures[order[_order(part)]], sizes)


def _order(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of `key` (S,), >= 0, in ascending order of its values, equal ones in their order."""
    # Sixteen bits are sorted by counting, ten times as fast as by comparing.
    return np.argsort(key.astype(np.uint16) if int(key.max()) < 1 << 16 else key, kind="stable")


def _to_the_lightest(weight: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """The bin of each item: in the order given, each goes to the bin that is lightest so far, the first of equal ones.

    Among many bins a quarter of them is served at a time: thousands of ranks then cost a sort each time, and the loads
    are as equal as with one at a time.
    """
    chosen = np.zeros(len(weight), dtype=np.int64)
    load = np.arange(bins)  # times `bins`, plus the number of the bin: sorted together, with no detour over places
    at_once = max(bins // 4, 1)
    for start in range(0, len(weight), at_once):
        items = weight[start : start + at_once]
        lightest = load[: len(items)]
        chosen[start : start + at_once] = lightest % bins
        lightest += items * bins
        lightest.sort(kind="stable")
        load.sort(kind="stable")  # of two sorted stretches: it merges them
    return chosen


def _micro_batches(weights: NDArray[np.int64], least: int, budget: int | None) -> NDArray[np.int64]:
    """The micro-batch of each item of each row, with as few micro-batches as all rows fit into, but `least`."""
    if budget is not None:
        least = max(least, -(-int(np.minimum(weights, budget).sum(axis=1).max()) // budget))
        # Of those above a half of the budget a micro-batch takes one, above a third two, and so on.
        for k in range(1, 9):
            least = max(least, -(-int((weights * (k + 1) > budget).sum(axis=1).max()) // k))
    chosen, fits = _filled(weights, least, budget)
    tried, step = least, 1
    while not fits:  # ever further, and back by halves: a step of many structures must not be tried dozens of times
        least, tried, step = tried, tried + step, 2 * step
        chosen, fits = _filled(weights, tried, budget)
    while tried - least > 1:
        middle = (least + tried) // 2
        fewer, fits = _filled(weights, middle, budget)
        if fits:
            chosen, tried = fewer, middle
        else:
            least = middle
    return chosen


def _filled(weights: NDArray[np.int64], count: int, budget: int | None) -> tuple[NDArray[np.int64], bool]:
    """The micro-batch of each item of each row, always the lightest of `count`, and whether all are within the budget
    or hold one item."""
    rows = np.arange(len(weights))
    chosen = np.zeros_like(weights)
    load = np.zeros((len(weights), count), dtype=np.int64)
    held = np.zeros_like(load)
    for k in range(weights.shape[1]):
        chosen[:, k] = load.argmin(axis=1)
        load[rows, chosen[:, k]] += weights[:, k]
        held[rows, chosen[:, k]] += weights[:, k] > 0
    return chosen, budget is None or not ((load > budget) & (held > 1)).any()
