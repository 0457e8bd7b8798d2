"""Fixtures that several test files share: a small real dataset, and a small network to train on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from dpt_hpc.data.shards import Dataset, write_dataset

from dpt_hpc.quickstart import PACKAGE

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""More real data than ships with the project; tests that need it skip without it."""


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


@pytest.fixture
def small_options(small_dataset: Path) -> dict[str, object]:
    """A pre-training config's content, without its run_dir: seconds for an epoch."""
    return {
        "data": {
            "path": str(small_dataset),
            "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "by": "structure"},
        },
        "model": {"name": "cgcnn", "cutoff": 4.0, "hidden": 16, "layers": 2, "gaussians": 12, "readout_hidden": 16},
        "objective": {"kind": "derivatives"},
        "training": {"epochs": 3, "batch_size": 5},
        "seed": 7,
    }
