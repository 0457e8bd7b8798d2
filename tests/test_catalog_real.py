"""The catalog on the real files, where a mirror of them is at hand: DPT_HPC_MIRROR, or ../shared/data."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from dpt_hpc.data.catalog import Catalog, Sources, fill_mirror, get_dataset
from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.leaks import find_leaks
from dpt_hpc.data.shards import Dataset

MIRROR = Path(os.environ.get("DPT_HPC_MIRROR") or Path(__file__).resolve().parents[2] / "shared" / "data")
needs_mirror = pytest.mark.skipif(
    not list(MIRROR.glob("**/jdft.json")), reason=f"no real files in {MIRROR}: DPT_HPC_MIRROR names a mirror"
)


def quiet(_: str) -> None:
    pass


@needs_mirror
def test_the_files_are_those_that_are_pinned(tmp_path: Path) -> None:
    names = [entry for entry in Catalog.read() if entry.ingested or entry.name == "matbench_folds_small"]
    assert fill_mirror(names, tmp_path, Sources(MIRROR), quiet) == []
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == sum(len(entry.files) for entry in names)


@needs_mirror
@pytest.mark.parametrize("name", ["jdft", "phonons", "elastic_subset"])  # the others take too long
def test_a_real_dataset_is_made_with_the_units_of_the_catalog(name: str, tmp_path: Path) -> None:
    entry = Catalog.read()[name]
    report = get_dataset(entry, tmp_path, Sources(MIRROR), quiet)
    assert report is not None
    assert entry.options is not None
    assert report.manifest.num_structures == entry.structures
    assert report.manifest.property_units == entry.options.targets
    assert sum(source.records for source in report.sources) == entry.records
    labels = set(report.manifest.property_units) | {k for k, n in report.manifest.statistics["labels"].items() if n}
    assert all(label in entry.labels for label in labels)
    assert labels


@needs_mirror
def test_the_folds_name_the_rows_of_their_sets(tmp_path: Path) -> None:
    entry = Catalog.read()["matbench_folds_small"]
    get_dataset(entry, tmp_path, Sources(MIRROR), quiet, raw=True)
    file = tmp_path / "raw" / entry.name / entry.files[0].name
    folds = json.loads(gzip.decompress(file.read_bytes()))
    for name, records in (("jdft2d", 636), ("phonons", 1265), ("dielectric", 4764), ("log_gvrh", 10987)):
        assert Catalog.read()[f"matbench_{name}"].records == records
        rows = [f"mb-{name.replace('_', '-')}-{row:0{len(str(records))}d}" for row in range(1, records + 1)]
        tested = [one for fold in folds[f"matbench_{name}"].values() for one in fold["test"]]
        assert sorted(tested) == rows


@needs_mirror
def test_leaks_of_real_sets_are_counted(tmp_path: Path) -> None:
    (file,) = MIRROR.glob("**/alexandria-random-1k.xyz")
    ingest([file], tmp_path / "alexandria", IngestOptions(check=False))
    held = Dataset.open(tmp_path / "alexandria")
    for name, same_composition, found in (("phonons", 3, 1), ("jdft", 0, 0)):
        get_dataset(Catalog.read()[name], tmp_path, Sources(MIRROR), quiet)
        leaks = find_leaks(held, Dataset.open(tmp_path / name))
        assert (leaks.same_composition, len(leaks.matches)) == (same_composition, found)
