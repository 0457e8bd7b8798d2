"""Which store serves a run: the one that was asked for, or the fastest that fits."""

from __future__ import annotations

import sys
from typing import Literal

from dpt_hpc.data.group import Group, agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.shared_memory import free_memory, free_shared_memory
from dpt_hpc.data.store import DiskStore, Store
from dpt_hpc.data.store_cluster import ClusterStore, mpi_missing
from dpt_hpc.data.store_node import NodeStore, size_of
from dpt_hpc.data.tables import Layout
from dpt_hpc.errors import EnvironmentFault

MANY_RANKS = 64
"""Among so many, a read of the store `disk` brings 1.6 structures (train/config.py)."""

StoreKind = Literal["auto", "disk", "node", "cluster"]


def open_store(
    dataset: Dataset,
    layout: Layout,
    kind: StoreKind,
    memory: float,
    *,
    everyone: Group,
    node: Group,
    node_rank: int,
) -> Store:
    """The store `kind` for batches of `layout`. Collective among all ranks of `everyone`; `node`: those of this node.

    memory: what auto may use of a node's free memory, as a part of it up to 1, above in GB. What auto takes to fit and
    does not, after all, is read from disk, with a warning. Raises EnvironmentFault, on
    every rank, if what was asked for is not there; DataError if a shard cannot be read.
    """
    if kind == "auto":
        chosen = choose_store(dataset, layout, memory, everyone, node)
        try:
            return open_store(dataset, layout, chosen, memory, everyone=everyone, node=node, node_rank=node_rank)
        except EnvironmentFault as fault:  # on all ranks
            if everyone.rank == 0:
                print(f"warning: data.store is auto, took {chosen}, and now reads from disk: {fault}", file=sys.stderr)
            kind = "disk"
    if kind == "cluster":
        return ClusterStore(dataset, layout, everyone, node, node_rank)
    if kind == "node":
        return agree(everyone, lambda: NodeStore(dataset, layout, node))
    if everyone.rank == 0 and everyone.size >= MANY_RANKS:
        print(
            f"warning: data.store is disk, with {everyone.size} ranks: each reads almost structure by "
            "structure.\nTake enough nodes for data.store=cluster (or node), or set data.stage to their own disks.",
            file=sys.stderr,
        )
    return DiskStore(dataset, layout)


def choose_store(
    dataset: Dataset, layout: Layout, memory: float, everyone: Group, node: Group
) -> Literal["disk", "node", "cluster"]:
    """node where the dataset fits into every node's memory, cluster where it fits into that of all, else disk."""
    free = free_memory()
    room = min(memory * free if memory <= 1 else memory * 1e9, free)
    if node.size > 1:
        room = min(room, free_shared_memory())
    nodes = sum(local == 0 for local in everyone.all_gather(node.rank))
    # Every node is asked, and every rank's MPI: all must come to the same answer.
    answers = everyone.all_gather((room, nodes > 1 and mpi_missing(everyone.size) is None))
    room = min(room for room, _ in answers)
    size, _ = size_of(dataset, layout, range(len(dataset)))
    if size <= room:
        return "node"
    if nodes > 1 and size / nodes <= room and all(mpi for _, mpi in answers):
        return "cluster"
    return "disk"
