"""Every format is read: geometry, labels, ids, units and sign, against one set of crystals written in each."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal

from dpt_hpc.data.ingest import IngestOptions, ingest
from dpt_hpc.data.ingest.json_stream import JsonError, stream_items
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError

GPA = 160.2176634
"""1 eV/Å³."""


def crystals(count: int = 6, seed: int = 0) -> list[Atoms]:
    """Random labelled crystals, as ASE atoms."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        n = int(rng.integers(2, 6))
        atoms = Atoms(
            numbers=rng.choice([1, 3, 6, 8, 11, 14, 26, 29, 47, 79], n),
            scaled_positions=rng.random((n, 3)),
            cell=4 * np.eye(3) + 0.5 * rng.normal(size=(3, 3)),
            pbc=True,
        )
        stress = 0.01 * rng.normal(size=(3, 3))
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(-5 * n), forces=rng.normal(size=(n, 3)), stress=(stress + stress.T) / 2
        )
        found.append(atoms)
    return found


def results(atoms: Atoms) -> dict[str, Any]:
    assert atoms.calc is not None
    return atoms.calc.results


def as_pymatgen(atoms: Atoms) -> Crystal:
    return Crystal(
        Lattice(np.asarray(atoms.cell)), atoms.get_chemical_symbols(), atoms.get_scaled_positions(wrap=False)
    )


def vasp_stress(atoms: Atoms) -> list[list[float]]:
    return (-10 * GPA * results(atoms)["stress"]).tolist()


def write_extxyz(path: Path, items: list[Atoms]) -> Path:
    ase.io.write(path / "some.extxyz", items, format="extxyz")
    return path / "some.extxyz"


def write_extxyz_gz(path: Path, items: list[Atoms]) -> Path:
    text = write_extxyz(path, items).read_bytes()
    (path / "some.xyz.gz").write_bytes(gzip.compress(text))
    return path / "some.xyz.gz"


def write_db(path: Path, items: list[Atoms]) -> Path:
    with ase.db.connect(path / "some.db") as db:
        for atoms in items:
            db.write(atoms)
    return path / "some.db"


def write_traj(path: Path, items: list[Atoms]) -> Path:
    ase.io.write(path / "some.traj", items)
    return path / "some.traj"


def dump(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_mlearn(path: Path, items: list[Atoms]) -> Path:
    records = [
        {
            "jid": f"X-{i}",
            "atoms": {
                "lattice_mat": atoms.cell.tolist(),
                "coords": atoms.get_scaled_positions(wrap=False).tolist(),
                "elements": atoms.get_chemical_symbols(),
                "cartesian": False,
            },
            "energy": results(atoms)["energy"],
            "total_energy": results(atoms)["energy"] / len(atoms),
            "forces": results(atoms)["forces"].tolist(),
            "stresses": vasp_stress(atoms),
        }
        for i, atoms in enumerate(items)
    ]
    return dump(path / "id_prop.json", records)


def write_mptrj(path: Path, items: list[Atoms]) -> Path:
    frames: dict[str, dict[str, Any]] = {"mp-1": {}, "mp-2": {}}
    for i, atoms in enumerate(items):
        frames["mp-1" if i < 4 else "mp-2"][f"mp-1-{i}-0"] = {
            "structure": as_pymatgen(atoms).as_dict(),
            "uncorrected_total_energy": results(atoms)["energy"],
            "corrected_total_energy": results(atoms)["energy"] - 1,
            "energy_per_atom": results(atoms)["energy"] / len(atoms),
            "force": results(atoms)["forces"].tolist(),
            "stress": vasp_stress(atoms),
            "magmom": None,
        }
    return dump(path / "MPtrj_2022.9_full.json", frames)


def write_pymatgen(path: Path, items: list[Atoms]) -> Path:
    records = [
        {
            "structure": as_pymatgen(atoms).as_dict(),
            "energy": results(atoms)["energy"],
            "forces": results(atoms)["forces"].tolist(),
            "stress": vasp_stress(atoms),
        }
        for atoms in items
    ]
    return dump(path / "records.json", records)


def write_matdeeplearn(path: Path, items: list[Atoms]) -> Path:
    records = [
        {
            "structure_id": str(i),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.tolist(),
            "atomic_numbers": atoms.numbers.tolist(),
            "energy": results(atoms)["energy"],
            "forces": results(atoms)["forces"].tolist(),
            "stress": vasp_stress(atoms),
        }
        for i, atoms in enumerate(items)
    ]
    return dump(path / "raw.json", records)


def write_pickle(path: Path, items: list[Atoms], protocol: int = 4) -> Path:
    materials: dict[str, Any] = {}
    for i, atoms in enumerate(items):
        columns = materials.setdefault(
            "mp-1" if i < 4 else "mp-2", {"structure": [], "energy": [], "force": [], "stress": [], "id": []}
        )
        columns["structure"].append(as_pymatgen(atoms))
        columns["energy"].append(np.float64(results(atoms)["energy"]))
        columns["force"].append(results(atoms)["forces"].tolist())
        columns["stress"].append(np.array(vasp_stress(atoms)))
        columns["id"].append(f"{i}-0")
    (path / "block_0.p").write_bytes(pickle.dumps(materials, protocol=protocol))
    return path / "block_0.p"


STATED = IngestOptions(stress_unit="kbar", stress_sign="compression_positive")


@pytest.mark.parametrize(
    ("write", "name", "options"),
    [
        (write_extxyz, "extxyz", IngestOptions()),
        (write_extxyz_gz, "extxyz", IngestOptions()),
        (write_db, "ase", IngestOptions()),
        (write_traj, "ase", IngestOptions()),
        (write_mlearn, "mlearn", IngestOptions()),
        (write_mptrj, "mptrj", IngestOptions()),
        (write_pymatgen, "pymatgen", STATED),
        (write_matdeeplearn, "matdeeplearn", STATED),
        (write_pickle, "mpf-pickle", IngestOptions()),
        (lambda path, items: write_pickle(path, items, protocol=2), "mpf-pickle", IngestOptions()),
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
        np.testing.assert_allclose(found.stress, -results(atoms)["stress"] / GPA, rtol=1e-6)


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


MEMORY = """
import resource, sys
from dpt_hpc.data.ingest.json_readers import read_mptrj
from dpt_hpc.data.ingest import IngestOptions
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_mptrj(Path(sys.argv[1]), IngestOptions()))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_mptrj_is_streamed(tmp_path: Path) -> None:
    frames = json.loads(write_mptrj(tmp_path, crystals()).read_text())["mp-1"]
    path, text = tmp_path / "large.json", json.dumps(frames)
    with path.open("w") as out:
        out.write("{" + ",".join(f'"mp-{i}": {text}' for i in range(1000)) + "}")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 4_000
    assert path.stat().st_size > 8e6
    assert kilobytes < 8_000, "memory grows with the file"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.lists(JSON_VALUES, max_size=8) | st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=8),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_streamed_json_is_json(content: Any, window: int) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch("dpt_hpc.data.ingest.json_stream.FIRST_READ", window):
        path = dump(Path(folder) / "a.json", content)
        found = list(stream_items(path))
        assert found == (list(content.items()) if isinstance(content, dict) else [(None, v) for v in content])
        text = path.read_text().rstrip()
        for cut in {len(text) // 3, len(text) - 1} - {0}:
            path.write_text(text[:cut])
            with pytest.raises(JsonError):
                list(stream_items(path))


def test_nan_in_json_reaches_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"energy": NaN}]')
    ((_, item),) = stream_items(path)
    assert np.isnan(item["energy"])
