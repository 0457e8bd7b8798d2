"""Random labelled crystals, written in each format that is read: shared by the tests of ingest."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal

from dpt_hpc.structure import GPA_PER_EV_A3


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
    return (-10 * GPA_PER_EV_A3 * results(atoms)["stress"]).tolist()


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


def write_ase_json(path: Path, items: list[Atoms]) -> Path:
    ase.io.write(path / "some.json", items)
    return path / "some.json"


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
