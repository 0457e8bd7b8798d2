"""What several test files share: the dataset, the run, and the emulated CUDA kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import emulated as emulation
import pytest
import torch
from slurm import Cluster, cluster
from small_runs import Options, run, small_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.quickstart import PACKAGE

# The tests are small: more threads gain nothing, and wait for each other where others work, too.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """DeepSpeed in this process takes rank and world size from the environment: ranks started later must not."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 48 smallest crystals of the sample, with energies, forces, stresses, and a property: volume per atom."""
    sample = Dataset.open(PACKAGE / "sample" / "mlearn")
    smallest = sample.num_atoms.argsort(kind="stable")[:48]
    structures = []
    for index in smallest.tolist():
        structure = sample.get(index)
        volume = structure.volume / structure.num_atoms
        structures.append(replace(structure, properties={"volume_per_atom": volume}))
    out = tmp_path_factory.mktemp("data") / "small"
    write_dataset(structures, out, provenance={"source": "sample/mlearn"}, property_units={"volume_per_atom": "A^3"})
    return out


@pytest.fixture(scope="session")
def partly_labelled(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same crystals, every third without energy, forces and stress."""
    dataset = Dataset.open(small_dataset)
    structures = [
        replace(dataset.get(i), **({"energy": None, "forces": None, "stress": None} if i % 3 == 0 else {}))
        for i in range(len(dataset))
    ]
    out = tmp_path_factory.mktemp("data") / "partly"
    write_dataset(structures, out, provenance={"source": "sample/mlearn"}, property_units={"volume_per_atom": "A^3"})
    return out


@pytest.fixture(scope="session")
def finished(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, Path]:
    """The options of a small pre-training run, and its directory. Read it; do not write there."""
    options = small_options(small_dataset)
    return options, run(options, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Slurm cluster."""
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The CUDA kernels, compiled as host C++: they take tensors of the CPU."""
    return emulation.load()
