"""Edges are counted with the model's own graph, by all ranks together, and once per run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import Options, config_of, run, same_weights

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.data.store import DiskStore
from dpt_hpc.models import CGCNNOptions, EnergyModel, build_model
from dpt_hpc.ops import reference
from dpt_hpc.train.counting import FILE, Counts, count_edges, needs_counts
from dpt_hpc.train.data import Data
from dpt_hpc.train.ranks import Ranks

INDICES = np.arange(0, 48, 2)


@pytest.fixture
def data(small_dataset: Path) -> Data:
    empty = np.zeros(0, dtype=np.int64)
    dataset = Dataset.open(small_dataset)
    store = DiskStore(dataset, dataset.layout(torch.float32, None))
    return Data(store, Split(INDICES, empty, empty), torch.device("cpu"))


def model(**options: float | int) -> EnergyModel:
    return build_model(CGCNNOptions(hidden=4, layers=1, gaussians=4, readout_hidden=4, **options))


@pytest.mark.parametrize("options", [{"cutoff": 4.0}, {"cutoff": 6.0, "max_neighbors": 20}])
def test_counts_are_those_of_each_structure_alone(options: dict[str, float], data: Data, tmp_path: Path) -> None:
    counts = count_edges(model(**options), data, Ranks(), tmp_path)
    alone = []
    for index in INDICES:
        batch = data.dataset.read([index], dtype=torch.float64)
        graph = reference.radius_graph(
            batch.positions, batch.cell, batch.pbc, batch.atom_ptr, options["cutoff"], options.get("max_neighbors")
        )
        alone.append(graph.num_edges)
    assert counts.edges.tolist() == alone
    assert not (tmp_path / FILE).exists()


def test_kept_counts_are_used_only_for_what_they_were_counted_from(data: Data, tmp_path: Path) -> None:
    counted = count_edges(model(cutoff=4.0), data, Ranks(), tmp_path)
    Counts(counted.edges + 1, counted.key).save(tmp_path)
    assert np.array_equal(count_edges(model(cutoff=4.0), data, Ranks(), tmp_path).edges, counted.edges + 1)
    # Another graph, another training part: counted anew.
    assert count_edges(model(cutoff=5.0), data, Ranks(), tmp_path).edges.sum() > counted.edges.sum()
    fewer = replace(data, split=replace(data.split, train=INDICES[:5]))
    assert np.array_equal(count_edges(model(cutoff=4.0), fewer, Ranks(), tmp_path).edges, counted.edges[:5])
    # A file that a killed run or a full disk has cut off.
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:200])
    assert np.array_equal(count_edges(model(cutoff=4.0), data, Ranks(), tmp_path).edges, counted.edges)


@pytest.mark.parametrize(
    ("training", "needed"),
    [
        ({}, False),
        ({"grad_accumulation": 2}, True),
        ({"edge_budget": 500}, True),
        ({"batching": "similar_sizes"}, True),
    ],
)
def test_a_run_counts_where_it_divides_by_edges(
    training: Options, needed: bool, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options, path = finished
    config = config_of(options, tmp_path, training={**options["training"], **training})
    assert needs_counts(config, Ranks()) == needed
    done = run(options, tmp_path / "run", training={**options["training"], **training})
    assert (done / FILE).exists() == needed
    if training.get("batching") is None:
        same_weights(done, path, within=1e-6)
