"""The structures that every benchmark runs on, read with nothing but torch where they are JSON."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dpt_hpc
from dpt_hpc.structure import Structure

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real data that does not ship with the project, where it lies beside the checkout."""
SAMPLE = Path(dpt_hpc.__file__).parent / "sample" / "elastic.json.gz"

SMALL, MEDIUM, LARGE = "small cells", "cells of 20-100 atoms", "8,000 atoms"


def benchmark_sets(data: Path = DATA) -> dict[str, list[Structure]]:
    """At most 500 small cells, 300 cells of 20 to 100 atoms, drawn with a fixed seed, and one supercell.

    With `data`: 5-atom perovskites and the DFT structures of pretrain/; without: the crystals that ship with dpt_hpc.
    """
    if (data / "pretrain").is_dir():
        small = read_json(data / "downstream" / "perovskites.json.gz")
        cells = [s for path in sorted((data / "pretrain").glob("*.xyz")) for s in read_xyz(path)]
    else:
        cells = read_json(SAMPLE)
        small = [s for s in cells if s.num_atoms <= 10]
    return {SMALL: small[:500], MEDIUM: drawn([s for s in cells if 20 <= s.num_atoms <= 100], 300), LARGE: [silicon()]}


def drawn(structures: list[Structure], count: int) -> list[Structure]:
    """`count` of them, or all, in an order that a fixed seed shuffles."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(0))
    return [structures[k] for k in order[:count].tolist()]


def silicon(repeats: int = 10) -> Structure:
    """Diamond of 8 repeats^3 atoms, 5.43 Å, every coordinate displaced by 0.05 Å (standard deviation)."""
    corners = torch.cartesian_prod(*[torch.arange(repeats, dtype=torch.float64)] * 3)
    fcc = torch.tensor([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]], dtype=torch.float64) / 4
    basis = torch.cat([fcc, fcc + 0.25])
    positions = 5.43 * (corners[:, None, :] + basis).reshape(-1, 3)
    noise = torch.randn(positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return _structure(positions + 0.05 * noise, 5.43 * repeats * torch.eye(3, dtype=torch.float64), [14] * len(noise))


def fcc_box(occupied: int) -> Structure:
    """`occupied` of the 108 sites (or 256, beyond that) of an fcc box, lattice constant 4 Å, the rest left empty.

    The boxes of nvalchemi-toolkit-ops' published figures (benchmarks/systems.py, read): 64 and 128 atoms.
    """
    repeats = 3 if occupied <= 108 else 4
    corners = torch.cartesian_prod(*[torch.arange(repeats, dtype=torch.float64)] * 3)
    basis = torch.tensor([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]], dtype=torch.float64) / 4
    positions = 4.0 * (corners[:, None, :] + basis).reshape(-1, 3)[:occupied]
    return _structure(positions, 4.0 * repeats * torch.eye(3, dtype=torch.float64), [29] * occupied)


def read_json(path: Path) -> list[Structure]:
    """A JSON list of records with positions, cell (rows) and atomic_numbers, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        records: list[dict[str, Any]] = json.load(file)
    return [
        _structure(torch.tensor(r["positions"], dtype=torch.float64), torch.tensor(r["cell"]), r["atomic_numbers"])
        for r in records
    ]


def _structure(positions: torch.Tensor, cell: torch.Tensor, numbers: list[int]) -> Structure:
    return Structure(
        positions=positions,
        cell=cell.double(),
        pbc=torch.ones(3, dtype=torch.bool),
        atomic_numbers=torch.tensor(numbers),
    )


def read_xyz(path: Path) -> list[Structure]:
    """Extended XYZ with energy, forces and stress, by ASE."""
    import ase.io

    return [
        Structure(
            positions=torch.tensor(atoms.positions),
            cell=torch.tensor(atoms.cell.array),
            pbc=torch.tensor(atoms.pbc),
            atomic_numbers=torch.tensor(atoms.numbers).long(),
            energy=float(atoms.get_potential_energy()),
            forces=torch.tensor(atoms.get_forces()),
            stress=torch.tensor(atoms.get_stress(voigt=False)),
        )
        for atoms in ase.io.iread(path)
    ]


def labelled(structure: Structure) -> Structure:
    """With labels of zero where it has none: a training step costs the same."""
    if structure.energy is not None:
        return structure
    return replace(
        structure, energy=0.0, forces=torch.zeros_like(structure.positions), stress=torch.zeros_like(structure.cell)
    )
