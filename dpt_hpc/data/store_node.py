"""The store `node`: one copy of the dataset in the memory of each node, for all of its ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.group import Group, agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.shared_memory import shared_bytes
from dpt_hpc.data.store import Store
from dpt_hpc.data.tables import Indices, Layout, Tables

ALIGNMENT = 64


class NodeStore(Store):
    """Collective among the ranks of `node`, each of which reads its share of the shards.

    Raises EnvironmentFault if the memory is not there, DataError if a shard cannot be read, on every rank.
    """

    kind = "node"

    def __init__(self, dataset: Dataset, layout: Layout, node: Group) -> None:
        super().__init__(dataset, layout)
        self._tables = hold(dataset, layout, range(len(dataset)), node)[1]

    def fetch(self, indices: Indices) -> Tables:
        return self._tables


def size_of(dataset: Dataset, layout: Layout, index: range) -> tuple[int, int]:
    """Bytes of the structures `index` in memory, and where among them their atoms begin."""
    atoms = int(dataset.atom_ptr[index.stop] - dataset.atom_ptr[index.start])
    before = -(-len(index) * layout.structures.itemsize // ALIGNMENT) * ALIGNMENT
    return before + atoms * layout.atoms.itemsize, before


def hold(dataset: Dataset, layout: Layout, index: range, node: Group) -> tuple[NDArray[np.uint8], Tables]:
    """The structures `index` in memory that the ranks of `node` share: its bytes, and the tables that lie there."""
    size, before = size_of(dataset, layout, index)
    held = shared_bytes(size, node, f"a dataset of {len(index)} structures")
    atom_ptr = dataset.atom_ptr[index.start : index.stop + 1] - dataset.atom_ptr[index.start]
    structures = held[: len(index) * layout.structures.itemsize].view(layout.structures)
    tables = Tables(layout, index, atom_ptr, structures, held[before:].view(layout.atoms))
    # Shares of equal bytes: a shard of few large structures takes as long as one of many small ones.
    bounds = np.searchsorted(atom_ptr, np.linspace(0, atom_ptr[-1], node.size + 1)).tolist()
    bounds[0], bounds[-1] = 0, len(index)
    agree(node, lambda: dataset.fill(tables, bounds[node.rank], bounds[node.rank + 1]))
    return held, tables
