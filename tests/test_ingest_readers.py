"""Every format is read: geometry, labels, ids, units and sign, against one set of crystals written in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from crystals import (
    as_pymatgen,
    crystals,
    dump,
    results,
    write_ase_json,
    write_db,
    write_extxyz,
    write_extxyz_gz,
    write_matdeeplearn,
    write_mlearn,
    write_mptrj,
    write_pickle,
    write_pymatgen,
    write_traj,
)

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.structure import GPA_PER_EV_A3

STATED = IngestOptions(stress_unit="kbar", stress_sign="compression_positive")


@pytest.mark.parametrize(
    ("write", "name", "options"),
    [
        (write_extxyz, "extxyz", IngestOptions()),
        (write_extxyz_gz, "extxyz", IngestOptions()),
        (write_db, "ase", IngestOptions()),
        (write_traj, "ase", IngestOptions()),
        (write_ase_json, "ase", IngestOptions()),
        (write_mlearn, "mlearn", IngestOptions()),
        (write_mptrj, "mptrj", IngestOptions()),
        (write_pymatgen, "pymatgen", STATED),
        (write_matdeeplearn, "matdeeplearn", STATED),
        (write_pickle, "mpf-pickle", IngestOptions()),
        (lambda path, items: write_pickle(path, items, protocol=0), "mpf-pickle", IngestOptions()),
        (lambda path, items: write_pickle(path, items, protocol=2), "mpf-pickle", IngestOptions()),
        (lambda path, items: write_pickle(path, items, protocol=5), "mpf-pickle", IngestOptions()),
    ],
)
def test_a_format_is_detected_and_read(
    tmp_path: Path, write: Callable[[Path, list[Atoms]], Path], name: str, options: IngestOptions
) -> None:
    items = crystals()
    report = ingest([write(tmp_path, items)], tmp_path / "out", options)
    assert report.sources[0].format == name
    assert report.sources[0].labels == {"energy": 6, "forces": 6, "stress": 6}
    dataset = Dataset.open(tmp_path / "out")
    assert len(set(dataset.structure_ids)) == 6
    for i, atoms in enumerate(items):
        found = dataset.get(i)
        assert found.atomic_numbers.tolist() == atoms.numbers.tolist()
        assert found.energy == pytest.approx(results(atoms)["energy"])
        for tensor, expected in (
            (found.cell, np.asarray(atoms.cell)),
            (found.positions, atoms.positions),
            (found.forces, results(atoms)["forces"]),
            (found.stress, results(atoms)["stress"]),
        ):
            assert tensor is not None
            np.testing.assert_allclose(tensor, expected, atol=2e-8)


def test_voigt_stress_virial_and_named_keys_of_extended_xyz(tmp_path: Path) -> None:
    text = (
        '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3:mace_f:R:3 REF_energy=-2.0 '
        'virial="1 0.5 0 0.5 2 0 0 0 3" pbc="T T F" mp=mp-7\nCu 0 0 0 0.1 0.2 0.3\n'
    )
    (tmp_path / "a.xyz").write_text(text)
    ingest(
        [tmp_path / "a.xyz"],
        tmp_path / "out",
        IngestOptions(energy_key="REF_energy", forces_key="mace_f", group_key="mp"),
    )
    found = Dataset.open(tmp_path / "out").get(0)
    assert found.energy == -2.0
    assert found.group == "mp-7"
    assert found.pbc.tolist() == [True, True, False]
    assert found.forces is not None
    assert found.forces.tolist() == [[0.1, 0.2, 0.3]]
    assert found.stress is not None
    np.testing.assert_allclose(found.stress, -np.array([[1, 0.5, 0], [0.5, 2, 0], [0, 0, 3]]) / 27)


def test_voigt_order_is_that_of_ase(tmp_path: Path) -> None:
    atoms = crystals(1)[0]
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, stress=np.array([1, 2, 3, 4, 5, 6]) * 1e-3)
    ase.io.write(tmp_path / "a.traj", atoms)
    ingest([tmp_path / "a.traj"], tmp_path / "out")
    stress = Dataset.open(tmp_path / "out").get(0).stress
    assert stress is not None
    np.testing.assert_allclose(stress, 1e-3 * np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]]))


def test_units_are_converted(tmp_path: Path) -> None:
    items = crystals(3)
    options = IngestOptions(
        energy_kind="per_atom",
        energy_unit="Ha",
        forces_unit="Ha/Bohr",
        stress_unit="GPa",
        stress_sign="compression_positive",
        check=False,
    )
    ingest([write_extxyz(tmp_path, items)], tmp_path / "out", options)
    for i, atoms in enumerate(items):
        found = Dataset.open(tmp_path / "out").get(i)
        assert found.energy == pytest.approx(results(atoms)["energy"] * 27.211386245988 * len(atoms))
        assert found.forces is not None
        assert found.stress is not None
        np.testing.assert_allclose(found.forces, results(atoms)["forces"] * 51.4220674763, rtol=1e-6)
        np.testing.assert_allclose(found.stress, -results(atoms)["stress"] / GPA_PER_EV_A3, rtol=1e-6)


def test_mptrj_may_take_the_corrected_energy_and_names_frames(tmp_path: Path) -> None:
    items = crystals()
    path = write_mptrj(tmp_path, items)
    ingest([path], tmp_path / "out", IngestOptions(energy_key="corrected_total_energy"))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.get(0).energy == pytest.approx(results(items[0])["energy"] - 1)
    assert dataset.structure_ids[5] == "mp-2/mp-1-5-0"


@pytest.mark.parametrize("shape", ["one", "list", "object", "entry"])
def test_pymatgen_json_of_any_shape(tmp_path: Path, shape: str) -> None:
    raw = [as_pymatgen(a).as_dict() for a in crystals(3)]
    entry = {"@module": "pymatgen.entries.computed_entries", "@class": "ComputedStructureEntry", "energy": -3.5}
    content: dict[str, object] = {
        "one": raw[0],
        "list": raw,
        "object": {f"mp-{i}": r for i, r in enumerate(raw)},
        "entry": {**entry, "entry_id": "mp-9", "correction": -1.0, "data": {"gap": 1.5}, "structure": raw[0]},
    }
    report = ingest([dump(tmp_path / "a.json", content[shape])], tmp_path / "out", IngestOptions(targets={"gap": "eV"}))
    assert report.sources[0].format == "pymatgen"
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset) == (1 if shape in ("one", "entry") else 3)
    if shape == "entry":
        assert dataset.structure_ids[0] == "mp-9"
        assert (dataset.get(0).energy, dict(dataset.get(0).properties)) == (-3.5, {"gap": 1.5})


def test_a_directory_of_cif_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifs"
    folder.mkdir()
    for i, atoms in enumerate(crystals(3)):
        as_pymatgen(atoms).to(filename=str(folder / f"crystal_{i}.cif"))
    report = ingest([folder], tmp_path / "out")
    assert [s.format for s in report.sources] == ["cif"] * 3
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.structure_ids.tolist() == ["crystal_0", "crystal_1", "crystal_2"]
    assert dataset.num_atoms.tolist() == [len(a) for a in crystals(3)]
    assert dataset.get(1).volume == pytest.approx(crystals(3)[1].get_volume(), rel=1e-5)


RECORD = {"positions": [[0.0, 0.0, 0.0]], "cell": [[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]], "atomic_numbers": [29]}


@pytest.mark.parametrize(
    ("fields", "targets", "found"),
    [
        ({"y": [1.5]}, {"gap": "eV"}, {"gap": 1.5}),
        ({"y": 1.5}, {"gap": "eV"}, {"gap": 1.5}),
        ({"y": [[1.5, 2.5]]}, {"gap": "eV", "bulk": "GPa"}, {"gap": 1.5, "bulk": 2.5}),
        ({"y_gap": 1.5, "y_bulk": 2.5}, {"bulk": "GPa"}, {"bulk": 2.5}),
        ({"y": [9.0], "heat": 1.5}, {"heat": "eV"}, {"heat": 1.5}),
        ({"gap": 1.5, "property_units": {"gap": "eV"}}, {}, {"gap": 1.5}),
    ],
)
def test_targets_of_matdeeplearn_json(
    tmp_path: Path, fields: dict[str, object], targets: dict[str, str], found: dict[str, float]
) -> None:
    path = dump(tmp_path / "a.json", [{"structure_id": "a", **RECORD, **fields}])
    ingest([path], tmp_path / "out", IngestOptions(targets=targets))
    dataset = Dataset.open(tmp_path / "out")
    assert dict(dataset.get(0).properties) == found
    assert set(dataset.property_units) == set(found)


@pytest.mark.parametrize(
    ("fields", "targets", "message"),
    [
        ({"y": [1.5]}, {}, r"no label was read, but its records have y.\nSay what they are: --target NAME=UNIT"),
        ({"y": [1.5, 2.0]}, {"gap": "eV"}, r"record 0: y has 2 entries, but the targets named are gap"),
        ({"gap": "wide"}, {"gap": "eV"}, r"record 0: gap: not numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    tmp_path: Path, fields: dict[str, object], targets: dict[str, str], message: str
) -> None:
    path = dump(tmp_path / "a.json", [{**RECORD, **fields}])
    with pytest.raises(DataError, match=message):
        ingest([path], tmp_path / "out", IngestOptions(targets=targets))


def test_a_stress_of_unstated_unit_is_refused(tmp_path: Path) -> None:
    path = write_matdeeplearn(tmp_path, crystals())
    with pytest.raises(
        DataError, match=r"record 0: has a stress, but matdeeplearn files state no unit or sign.\nState"
    ):
        ingest([path], tmp_path / "out")


def test_unknown_formats_and_units_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = write_extxyz(tmp_path, crystals(1))
    with pytest.raises(ConfigError, match=r"--format is 'xyz', expected one of extxyz, ase"):
        ingest([path], tmp_path / "out", IngestOptions(format="xyz"))
    with pytest.raises(ConfigError, match=r"--stress-unit is 'GPA', expected one of eV/A\^3, GPa, kbar"):
        ingest([path], tmp_path / "out", IngestOptions(stress_unit="GPA"))
    with pytest.raises(
        DataError, match=r"no known JSON format .*it holds foo.*\nName the format: --format extxyz\|ase"
    ):
        ingest([dump(tmp_path / "b.json", [{"foo": 1}])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_format_may_be_stated_against_the_name(tmp_path: Path) -> None:
    path = write_extxyz(tmp_path, crystals(2)).rename(tmp_path / "labels.dat")
    report = ingest([path], tmp_path / "out", IngestOptions(format="extxyz"))
    assert "extxyz (as stated)" in report.lines()[0]
