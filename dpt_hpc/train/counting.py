"""How many edges each training structure really has: what ranks are balanced by, and what the edge budget limits."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.models import EnergyModel
from dpt_hpc.models.derivatives import build_graph
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.data import Data
from dpt_hpc.train.monitor import write_arrays
from dpt_hpc.train.once_a_node import assembled, from_first
from dpt_hpc.train.ranks import Ranks

FILE = "edges.npz"
AT_ONCE = 64
"""Structures per graph that is built for counting."""


@dataclass(frozen=True)
class Counts:
    """edges (S,) int64: of each training structure, in the split's order. key: what they were counted from."""

    edges: NDArray[np.int64]
    key: str

    def save(self, run_dir: Path) -> None:
        """Keep them, so that a resumed run has them at once."""
        write_arrays(run_dir / FILE, {"edges": self.edges, "key": np.array(self.key)})


def needs_counts(config: RunConfig, ranks: Ranks) -> bool:
    """Whether anything is divided by edges: one rank that takes each step whole does not care how many there are."""
    training = config.training
    divided = ranks.size > 1 or training.grad_accumulation > 1 or training.edge_budget is not None
    return divided or training.batching == "similar_sizes"


def count_edges(model: EnergyModel, data: Data, ranks: Ranks, run_dir: Path) -> Counts:
    """The edges of `data`'s training part at the model's cutoff: those kept in `run_dir`, else counted now.

    Every rank counts a share, and all have the same result, once in the memory of each node. Writes nothing.
    """
    key = _key(model, data)
    train = data.split.train
    kept = _kept(run_dir, key) if ranks.rank == 0 else None
    if ranks.broadcast(kept is not None):
        return Counts(from_first(kept, ranks), key)

    def fill(edges: NDArray[np.int64]) -> None:
        at = len(train) * ranks.rank // ranks.size
        mine = train[at : len(train) * (ranks.rank + 1) // ranks.size]
        for batch in data.batches(mine, AT_ONCE):
            counted = _count(model, data, batch)
            edges[at : at + len(counted)] = counted
            at += len(counted)

    return Counts(assembled(len(train), ranks, fill), key)


def _count(model: EnergyModel, data: Data, batch: Batch) -> NDArray[np.int64]:
    with data.naming(batch):
        before = build_graph(model, batch).target_ptr[batch.atom_ptr]
    counted: NDArray[np.int64] = (before[1:] - before[:-1]).cpu().numpy()
    return counted


def _kept(run_dir: Path, key: str) -> NDArray[np.int64] | None:
    try:
        with np.load(run_dir / FILE) as file:
            return file["edges"] if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # not there, or cut off: counting again costs less than a failed run


def _key(model: EnergyModel, data: Data) -> str:
    graph = f"cutoff {model.cutoff!r}, max_neighbors {model.max_neighbors}, max_images {model.max_images}"
    parts = hashlib.sha256(np.ascontiguousarray(data.split.train).data).hexdigest()
    return "; ".join([graph, f"training part {parts}", *(manifest.digest for manifest in data.dataset.manifests)])
