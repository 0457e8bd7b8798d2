"""Large arrays that every rank reads, once in the memory of each node: no rank has a copy of its own, not even for the
moment in which they are handed round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.shared_memory import shared_or_own
from dpt_hpc.train.ranks import Ranks


def assembled(size: int, ranks: Ranks, fill: Callable[[NDArray[np.int64]], None]) -> NDArray[np.int64]:
    """(size,) numbers, of which each rank writes its own places by `fill`; not to be written to afterwards. Collective.

    `fill` is given zeros, or what other ranks of the node have written by then: no two write to the same place.
    """
    node = ranks.node
    held, shared = shared_or_own(8 * size, node, f"{size} numbers")
    values = held.view(np.int64)
    fill(values)
    if shared:
        node.barrier()
    else:
        node.add_up(values)
    if ranks.leaders is not None:
        ranks.leaders.add_up(values)
    if shared:
        node.barrier()
    else:
        if node.rank:
            values[:] = 0
        node.add_up(values)
    values.flags.writeable = False
    return values


def from_first(values: NDArray[np.int64] | None, ranks: Ranks) -> NDArray[np.int64]:
    """Rank 0's `values` (S,), on every rank (others' are not looked at). Collective."""
    size: int = ranks.broadcast(None if values is None else len(values))

    def fill(into: NDArray[np.int64]) -> None:
        if values is not None and ranks.rank == 0:
            into[:] = values

    return assembled(size, ranks, fill)
