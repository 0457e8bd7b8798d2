"""One of two ranks, each a node of its own: fetch the other's structures while it waits in a collective call.

python cluster_ranks.py DATASET
"""

from __future__ import annotations

import sys
import threading
from dataclasses import fields

import numpy as np
import torch

from dpt_hpc.data.loader import Loader, Step
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.store import DiskStore
from dpt_hpc.data.store_choice import choose_store
from dpt_hpc.data.store_cluster import ClusterStore
from dpt_hpc.data.tables import Indices
from dpt_hpc.structure import Batch
from dpt_hpc.train.ranks import Ranks, enter_world, leave_world

PATIENCE = 3.0
"""Seconds: an answer takes some milliseconds."""


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch))


def without_the_thread(store: ClusterStore, ranks: Ranks, wanted: Indices) -> None:
    """A request to a rank that waits in a collective call waits with it, until that rank's thread answers again."""
    expected = store.read(wanted)
    ranks.barrier()
    store._stop.set()
    store._progress.join()
    ranks.barrier()
    found: list[Batch] = []
    late = threading.Thread(target=lambda: found.append(store.read(wanted)), daemon=True)
    if ranks.rank == 0:
        late.start()
        late.join(PATIENCE)
        print(f"rank 0, the other without its thread: {len(found)} answers", flush=True)
    ranks.barrier()
    store._stop = threading.Event()
    store._progress = threading.Thread(target=store._serve, daemon=True)
    store._progress.start()
    if ranks.rank == 0:
        late.join(60)
        assert same(found[0], expected)
    ranks.barrier()


def main(path: str) -> None:
    ranks = enter_world()
    assert ranks.world.num_nodes == ranks.size == 2
    dataset = Dataset.open(path, node=ranks.node)
    layout = dataset.layout(torch.float32, "gap")
    here = DiskStore(dataset, layout)
    tiny = 1e-9
    assert choose_store(dataset, layout, tiny, ranks, ranks.node) == "disk"
    with ClusterStore(dataset, layout, ranks, ranks.node, ranks.world.node_rank) as store:
        held = store._tables.index
        assert len(held) < len(dataset)
        beyond = np.setdiff1d(np.arange(len(dataset)), np.asarray(held))
        random = np.random.default_rng(ranks.rank)
        for turn in range(2):
            # The other rank is already in the collective call, or on its way there, and stays until this one comes.
            if ranks.rank == turn:
                print(f"rank {ranks.rank} fetches", flush=True)
                for _ in range(10):
                    wanted = random.permutation(beyond)[:20]
                    assert same(store.read(wanted), here.read(wanted))
            ranks.barrier()
        # As in training: batches come in the background of steps that each end in a collective call.
        order = random.permutation(len(dataset)).reshape(-1, 1, 1, 10)
        windows = [[Step(k + j, [[order[k + j, 0, 0]]]) for j in range(4)] for k in range(0, len(order), 4)]
        with Loader(store, windows) as loader:
            for step, (batch,) in loader:
                assert same(batch, here.read(step.mine[0]))
                ranks.sum({"atoms": float(batch.num_atoms)})
        assert same(store.read(np.arange(len(dataset))), here.read(np.arange(len(dataset))))
        without_the_thread(store, ranks, beyond[:20])
    ranks.barrier()
    print(f"rank {ranks.rank} done", flush=True)
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
