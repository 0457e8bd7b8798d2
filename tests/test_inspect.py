"""What `inspect` tells of a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from crystals import crystals, write_extxyz
from rich.console import Console

from dpt_hpc.cli import run_command_line
from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.inspect import bars, inspect_dataset, render_summary
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import DataError
from dpt_hpc.quickstart import PACKAGE

SAMPLE = PACKAGE / "sample" / "mlearn"


def text_of(path: Path) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_summary(inspect_dataset(path)))
    return console.export_text()


def test_the_summary_has_the_dataset_s_numbers() -> None:
    dataset, summary = Dataset.open(SAMPLE), inspect_dataset(SAMPLE)
    assert (summary.num_structures, summary.num_atoms, summary.num_groups) == (577, 42707, 6)
    assert summary.labels == {"energy": 577, "forces": 577, "stress": 577}
    assert summary.elements["Mo"]["structures"] == int((dataset.groups == "Mo").sum())
    assert summary.num_edges_estimated == dataset.edge_estimate.sum()
    columns = {c.name: c for c in summary.columns}
    batch = dataset.read(np.arange(577))
    energy = batch.energy.numpy() / dataset.num_atoms
    assert columns["energy per atom"].minimum == pytest.approx(energy.min(), rel=1e-6)
    assert columns["energy per atom"].mean == pytest.approx(energy.mean(), rel=1e-6)
    assert columns["force components"].maximum == pytest.approx(float(batch.forces.max()), rel=1e-6)
    assert columns["force components"].count == 3 * 42707
    assert sum(columns["atoms"].histogram) == 577
    assert json.loads(json.dumps(summary.as_json()))["num_atoms"] == 42707


def test_it_is_printed_with_units_histograms_and_origin() -> None:
    text = text_of(SAMPLE)
    for part in (
        "577 structures of 6 groups, 42,707 atoms",
        "labels: energy 577, forces 577, stress 577",
        "eV/Å³",
        "6 elements, by number of structures: Ni 109",
        "from id_prop.json (mlearn): 577 of 1,730 records",
    ):
        assert part in text
    assert "█" in text


def test_properties_and_unlabelled_datasets(tmp_path: Path) -> None:
    ingest([PACKAGE / "sample" / "elastic.json.gz"], tmp_path / "elastic", IngestOptions(limit=100))
    assert "log10_k_vrh 100" in text_of(tmp_path / "elastic")
    assert "log10(GPa)" in text_of(tmp_path / "elastic")
    crystal = Dataset.open(SAMPLE).get(0)
    bare = type(crystal)(crystal.positions, crystal.cell, crystal.pbc, crystal.atomic_numbers, structure_id="a")
    write_dataset([bare], tmp_path / "bare", provenance={})
    text = text_of(tmp_path / "bare")
    assert "labels: none" in text
    assert "of unknown origin" in text


def test_a_large_dataset_is_sampled_by_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Dataset.open(SAMPLE)
    write_dataset(map(sample.get, range(300)), tmp_path / "d", provenance={}, shard_atoms=1000)
    whole = inspect_dataset(tmp_path / "d")
    monkeypatch.setattr("dpt_hpc.data.inspect.SAMPLE_ATOMS", 5000)
    part = inspect_dataset(tmp_path / "d")
    assert part.num_structures == 300
    for one, other in zip(whole.columns, part.columns, strict=True):
        assert (one.minimum, one.mean, one.maximum) == (other.minimum, other.mean, other.maximum)
        assert sum(other.histogram) < sum(one.histogram)


def test_bars_show_what_is_not_empty() -> None:
    assert bars((0, 1, 1000)) == " ▁█"
    assert bars((0, 0)) == "  "


def test_a_damaged_dataset_is_not_summarised(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        inspect_dataset(tmp_path / "none")


def test_licence_and_citation_stated_at_ingest_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = write_extxyz(tmp_path, crystals())
    stated = ["--licence", "CC BY 4.0", "--citation", "Somebody (2026)", "--no-check"]
    run_command_line(["ingest", str(sample), "--out", str(tmp_path / "out"), *stated])
    capsys.readouterr()
    run_command_line(["inspect", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "licence: CC BY 4.0\ncite: Somebody (2026)\n" in shown
