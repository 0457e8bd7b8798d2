"""Ingest as a whole: filters, duplicates, ids, provenance, and the project's real data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.pipeline import reduced_formula
from dpt_hpc.data.shards import Dataset
from dpt_hpc.quickstart import PACKAGE

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
STATED: dict[str, Any] = {"stress_unit": "GPa", "stress_sign": "tension_positive"}


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data")
    return path


def record(index: int, atoms: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "structure_id": f"s{index}",
        "positions": [[2.0 * i, 0, 0] for i in range(atoms)],
        "cell": [[2.0 * atoms, 0, 0], [0, 4.0, 0], [0, 0, 4.0]],
        "atomic_numbers": [29] * atoms,
        "energy": -3.0 * atoms - index,
        "forces": [[0.0, 0.0, 0.0]] * atoms,
        **fields,
    }


def dump(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_filters_count_what_they_drop_and_say_so_in_the_manifest(tmp_path: Path) -> None:
    diagonal = [[-30.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    records = [
        record(0, 2),
        record(1, 1),
        record(2, 9),
        record(3, 2, forces=[[0, -5.5, 0], [0, 0, 0]]),
        record(4, 2, stress=diagonal),
        record(5, 2, stress=[[29.0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ]
    path = dump(tmp_path / "a.json", records)
    report = ingest(
        [path], tmp_path / "out", IngestOptions(min_atoms=2, max_atoms=8, max_force=5.0, max_stress=29.5, **STATED)
    )
    dropped = {
        "under 2 atoms": 1,
        "over 8 atoms": 1,
        "with a force component over 5 eV/Å": 1,
        "with a stress component over 29.5 GPa": 1,
    }
    assert report.sources[0].dropped == dropped
    assert "; 1 over 8 atoms" in report.lines()[1]
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.structure_ids.tolist() == ["s0", "s5"]
    provenance = dataset.manifests[0].provenance
    assert provenance["sources"][0]["dropped"] == dropped
    assert provenance["options"]["max_force"] == 5.0
    assert provenance["sources"][0]["sha256"]


def test_duplicates_are_told_by_file_and_record_and_kept_out(tmp_path: Path) -> None:
    one = dump(tmp_path / "one.json", [record(0), record(1), record(0), record(2, energy=-9.0)])
    two = dump(tmp_path / "two.json", [record(7), record(1), record(8, energy=-9.0, pbc=[True, True, True])])
    report = ingest([one, two], tmp_path / "out")
    assert report.sources[0].duplicates == ["one.json: record 2 repeats record 0 of one.json"]
    assert report.sources[1].duplicates == [
        "two.json: record 1 repeats record 1 of one.json",
        "two.json: record 2 repeats record 3 of one.json",
    ]
    assert report.sources[0].relabelled == ["one.json: record 1", "one.json: record 3"]
    assert len(Dataset.open(tmp_path / "out")) == 4
    kept = ingest([one, two], tmp_path / "kept", IngestOptions(keep_duplicates=True))
    assert kept.sources[1].repeated == 2
    ids = Dataset.open(tmp_path / "kept").structure_ids.tolist()
    assert len(set(ids)) == len(ids) == 7


def test_ids_are_unique_and_groups_are_formulas_unless_named(tmp_path: Path) -> None:
    one = dump(tmp_path / "one.json", [record(0, mp="mp-1"), record(0, 2, mp="mp-1")])
    two = dump(
        tmp_path / "two.json", [record(0, 3, mp="mp-2"), {k: v for k, v in record(1, 4).items() if k[-2:] != "id"}]
    )
    ingest([one, two], tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.structure_ids.tolist() == ["s0", "one:s0", "two:s0", "two:1"]
    assert dataset.groups.tolist() == ["Cu"] * 4
    ingest([one, two], tmp_path / "grouped", IngestOptions(group_key="mp", id_key="mp"))
    dataset = Dataset.open(tmp_path / "grouped")
    assert dataset.groups.tolist() == ["mp-1", "mp-1", "mp-2", "Cu"]
    assert dataset.structure_ids.tolist()[:2] == ["mp-1", "one:mp-1"]


@pytest.mark.parametrize(
    ("numbers", "formula"), [([29], "Cu"), ([11, 17] * 4, "ClNa"), ([1, 1, 8], "H2O"), ([22, 8, 8, 22, 8, 8], "O2Ti")]
)
def test_reduced_formula(numbers: list[int], formula: str) -> None:
    assert reduced_formula(np.array(numbers)) == formula


def test_stride_and_limit(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.json", [record(i) for i in range(10)])
    ingest([path], tmp_path / "out", IngestOptions(stride=3, limit=3))
    assert Dataset.open(tmp_path / "out").structure_ids.tolist() == ["s0", "s3", "s6"]


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpt_hpc.data.ingest.pipeline.PROGRESS_EVERY", 4)
    path = dump(tmp_path / "a.json", [record(i) for i in range(10)])
    seen: list[int] = []
    ingest([path], tmp_path / "out", progress=lambda report: seen.append(report.records))
    assert seen == [0, 4, 8]


def test_fields_that_look_like_labels_and_were_not_read_are_named(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.json", [record(i, dft_energy=1.0) for i in range(3)])
    lines = ingest([path], tmp_path / "out").lines()
    assert "  not read, though they look like labels: dft_energy (3)" in lines


def test_no_machine_path_gets_into_a_dataset(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.json", [record(i) for i in range(3)])
    ingest([path], tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_elastic_sample_is_whole_and_states_its_units(tmp_path: Path) -> None:
    report = ingest([PACKAGE / "sample" / "elastic.json.gz"], tmp_path / "out")
    assert (report.manifest.num_structures, report.manifest.num_atoms) == (1181, 14675)
    assert report.sources[0].dropped == {}
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.property_units == {"log10_k_vrh": "log10(GPa)", "log10_g_vrh": "log10(GPa)"}
    bulk = 10 ** dataset.property_values("log10_k_vrh")
    assert 6 < bulk.min() < 7
    assert 430 < bulk.max() < 440


def test_the_mlearn_sample_is_what_its_readme_says() -> None:
    dataset = Dataset.open(PACKAGE / "sample" / "mlearn")
    assert (len(dataset), int(dataset.num_atoms.sum())) == (577, 42707)
    assert dataset.has_energy.all()
    assert dataset.has_forces.all()
    assert dataset.has_stress.all()
    folder = PACKAGE / "sample"
    assert sum(p.stat().st_size for p in (folder / "mlearn").iterdir()) < 2e6
    assert (folder / "elastic.json.gz").stat().st_size < 1e6
    assert {p.name for p in (folder / "licenses").iterdir()} == {"alignn.txt", "matminer.txt", "mlearn.txt"}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "10.1021/acs.jpca.9b08723" in readme
    assert "10.1038/sdata.2015.9" in readme


def test_the_mlearn_sample_is_a_third_of_the_file_with_its_units(tmp_path: Path) -> None:
    """Totals per cell, not the field total_energy; -kbar/1602.1766; the same numbers as in the source."""
    with gzip.open(shared("pretrain/mlearn.json.gz"), "rt") as stream:
        records = json.load(stream)[::3]
    dataset = Dataset.open(PACKAGE / "sample" / "mlearn")
    assert dataset.structure_ids.tolist() == [r["jid"] for r in records]
    for i in range(0, 577, 40):
        found, raw = dataset.get(i), records[i]
        assert found.energy == pytest.approx(raw["energy"])
        assert found.energy == pytest.approx(raw["total_energy"] * found.num_atoms)
        assert found.stress is not None
        assert found.forces is not None
        np.testing.assert_allclose(found.stress, -np.array(raw["stresses"]) / 1602.176634, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.forces, raw["forces"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("jdft.json", {"targets": {"exfoliation_energy": "meV/atom"}}, 636),
        ("phonons.json", {"targets": {"last_phdos_peak": "1/cm"}}, 1265),
        ("elastic_subset.json", {"targets": {"log10K": "log10(GPa)", "log10G": "log10(GPa)"}}, 820),
    ],
)
def test_downstream_sets_keep_every_structure_and_value(
    tmp_path: Path, name: str, options: dict[str, Any], count: int
) -> None:
    path = shared(f"downstream/{name}")
    report = ingest([path], tmp_path / "out", IngestOptions(**options))
    assert (report.manifest.num_structures, report.sources[0].dropped) == (count, {})
    raw = json.loads(path.read_text())
    dataset = Dataset.open(tmp_path / "out")
    for target in options["targets"]:
        expected = [r["y"][0] if "y" in r else r[f"y_{target}"] for r in raw]
        np.testing.assert_array_equal(dataset.property_values(target), expected)
    assert dataset.num_atoms.tolist() == [len(r["atomic_numbers"]) for r in raw]


@pytest.mark.slow
def test_the_six_pretraining_files_filtered_as_their_readme_says(tmp_path: Path) -> None:
    names = [
        "mptrj-random-1k",
        "mptrj-highest-stress-1k",
        "mpf-TP",
        "mpf-alkali-TP",
        "random-TP",
        "alexandria-random-1k",
    ]
    paths = [shared(f"pretrain/{name}.xyz") for name in names]
    report = ingest(paths, tmp_path / "out", IngestOptions(max_atoms=64, max_force=25, max_stress=200))
    assert [s.records for s in report.sources] == [1000, 1000, 1069, 460, 693, 1000]
    assert [s.kept for s in report.sources] == [884, 828, 884, 402, 562, 996]
    snapshot = "mptrj-highest-stress-1k.xyz: record 958 repeats record 63 of mptrj-random-1k.xyz"
    assert report.sources[1].duplicates == [snapshot]
    assert report.sources[2].duplicates == ["mpf-TP.xyz: record 852 repeats record 128 of mpf-TP.xyz"]
    assert report.manifest.num_structures == 4556
