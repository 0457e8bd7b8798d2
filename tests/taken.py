"""What the ranks of a run computed, as tests/several_runs.py notes it, against what the run was to do and tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import Options, records

from dpt_hpc.data.shards import Dataset
from dpt_hpc.models import CGCNNOptions, build_model
from dpt_hpc.models.derivatives import build_graph


def edges_of(options: Options, dataset: Path) -> np.ndarray:
    """Of each structure, at the cutoff of the model."""
    batch = Dataset.open(dataset).read(np.arange(48))
    graph = build_graph(build_model(CGCNNOptions(**options["model"])), batch)
    found: np.ndarray = graph.target_ptr[batch.atom_ptr].diff().numpy()
    return found


def told_and_taken(path: Path, ranks: int, options: Options, small_dataset: Path) -> None:
    """What the ranks of a run really computed are the steps of its training part, and its log tells their cost."""
    dataset = Dataset.open(small_dataset)
    with np.load(path / "split.npz") as split:
        train = np.flatnonzero(np.isin(dataset.structure_ids, split["train"]))
    taken = [
        [json.loads(line) for line in (path / f"batches_{rank}.jsonl").read_text().splitlines()]
        for rank in range(ranks)
    ]
    assert all(len(own) == 20 for own in taken)
    edges = edges_of(options, small_dataset)
    for epoch, record in enumerate(records(path, "epoch")[1:], start=1):
        steps = [[own[4 * (epoch - 1) + k] for own in taken] for k in range(4)]
        assert {(step["epoch"], step["step"]) for own in steps for step in own} == {(epoch, k) for k in range(4)}
        structures = [step["structures"] for own in steps for step in own]
        assert sorted(index for share in structures for index in share) == train.tolist()
        assert [sum(len(step["structures"]) for step in own) for own in steps] == [7, 7, 7, 1]
        loads = np.array([[edges[step["structures"]].sum() for step in own] for own in steps])
        imbalance = loads.max(axis=1) / loads.mean(axis=1)
        assert record["imbalance"] == pytest.approx({"mean": imbalance.mean(), "max": ranks})  # one has the last alone
        assert 0 < record["data_wait"] < 1
