"""Write the energies, forces and stresses that ship with dpt_hpc as extended XYZ, for benchmarks that want a file.

python benchmarks/export_sample.py OUT.xyz
"""

from __future__ import annotations

import sys
from pathlib import Path

import ase
import ase.io
from ase.calculators.singlepoint import SinglePointCalculator

import dpt_hpc
from dpt_hpc.data.shards import Dataset


def main() -> None:
    """Structures in a fixed shuffled order, so that the first few are of several elements and sizes."""
    sample = Dataset.open(Path(dpt_hpc.__file__).parent / "sample" / "mlearn")
    stride = 101  # coprime to the number of structures: visits each once
    frames = []
    for i in range(len(sample)):
        structure = sample.get(i * stride % len(sample))
        atoms = ase.Atoms(
            numbers=structure.atomic_numbers.numpy(),
            positions=structure.positions.numpy(),
            cell=structure.cell.numpy(),
            pbc=structure.pbc.numpy(),
        )
        assert structure.forces is not None
        assert structure.stress is not None
        atoms.calc = SinglePointCalculator(
            atoms, energy=structure.energy, forces=structure.forces.numpy(), stress=structure.stress.numpy()
        )
        frames.append(atoms)
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(out, frames, format="extxyz")


if __name__ == "__main__":
    main()
