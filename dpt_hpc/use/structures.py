"""Anything that is a structure to its user, as a `Structure`: Atoms of ASE, structures of pymatgen, ours.

They are known by their attributes, so that neither library is imported here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.structure import MAX_ATOMIC_NUMBER, Structure

ROOM = 2.0
"""Å added to the extent of the atoms along an open axis, for the estimate of edges: an atom is not a point."""


def as_structure(what: Any, name: str = "structure") -> Structure:
    """`what` as a Structure, without labels; `name` stands for it in messages where it has no id of its own.

    Takes ASE Atoms, pymatgen Structure and Molecule, and a Structure of dpt_hpc (returned as it is). Raises DataError
    for anything else, for disorder, no atoms, numbers that are not finite, and what is no element.
    """
    if isinstance(what, Structure):
        structure = what
    elif all(hasattr(what, key) for key in ("numbers", "positions", "cell", "pbc")):
        structure = _structure(what.positions, np.asarray(what.cell[:]), what.pbc, what.numbers)
    elif hasattr(what, "cart_coords"):
        if not getattr(what, "is_ordered", True):
            raise DataError(
                f"{name}: is disordered (partial occupancy), but a network reads one element at each place.\n"
                "Order it first, for example with pymatgen's OrderDisorderedStructureTransformation."
            )
        lattice = getattr(what, "lattice", None)
        cell = np.zeros((3, 3)) if lattice is None else lattice.matrix
        pbc = (False,) * 3 if lattice is None else lattice.pbc
        structure = _structure(what.cart_coords, cell, pbc, what.atomic_numbers)
    else:
        raise DataError(
            f"{name}: is a {type(what).__module__}.{type(what).__qualname__}, which is no structure.\n"
            "Give Atoms of ASE, a Structure or Molecule of pymatgen, a path, or a list of them."
        )
    check(structure, name)
    return structure


def _structure(positions: Any, cell: Any, pbc: Any, numbers: Any) -> Structure:
    return Structure(
        positions=torch.tensor(np.asarray(positions), dtype=torch.float64).reshape(-1, 3),
        cell=torch.tensor(np.asarray(cell), dtype=torch.float64),
        pbc=torch.tensor(np.asarray(pbc), dtype=torch.bool),
        atomic_numbers=torch.tensor(np.asarray(numbers), dtype=torch.int64),
    )


def check(structure: Structure, name: str) -> None:
    """Raise DataError if a structure has no atoms, something that is no element, or a number that is not finite."""
    numbers = structure.atomic_numbers
    if structure.num_atoms == 0:
        raise DataError(f"{name}: has no atoms.\nLeave it out.")
    unknown = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
    if len(unknown):
        raise DataError(f"{name}: atomic number {int(unknown[0])} is no element (1 to {MAX_ATOMIC_NUMBER}).\nMend it.")
    for what, values in (("positions", structure.positions), ("cell", structure.cell)):
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise DataError(
                f"{name}: {what}[{place[0]}, {place[1]}] is {float(values[place])}, expected a finite number.\n"
                "A calculation that diverged writes such numbers; so does a broken file."
            )


def has_stress(structure: Structure) -> bool:
    """Whether stress means something: a periodic axis, and a volume to divide by."""
    return bool(structure.pbc.any()) and structure.volume > 0


def spanning(structure: Structure) -> Tensor:
    """(3,3) Å: the cell, with vectors of its open axes put in where it spans no volume. No network reads those."""
    if structure.volume > 0:
        return structure.cell
    cell = structure.cell.clone()
    closed = structure.pbc
    _, _, axes = torch.linalg.svd(cell[closed], full_matrices=True)
    cell[~closed] = axes[int(closed.sum()) :]
    return cell


def edges_to_expect(structure: Structure, cutoff: float, max_neighbors: int | None) -> int:
    """Directed edges at the mean density of the space that the atoms take: to fill batches, not to allocate."""
    cell, atoms = spanning(structure), structure.num_atoms
    if not bool(structure.pbc.all()):
        lengths = torch.linalg.vector_norm(cell, dim=1)
        along = structure.positions @ (cell / lengths[:, None]).T
        extents = along.amax(0) - along.amin(0) + ROOM
        cell = torch.where(structure.pbc[:, None], cell, cell / lengths[:, None] * extents[:, None])
    volume = float(torch.linalg.det(cell).abs())
    neighbors = 4 / 3 * math.pi * cutoff**3 * atoms / volume if volume > 0 else math.inf
    if not bool(structure.pbc.any()):
        neighbors = min(neighbors, atoms - 1)
    if max_neighbors is not None:
        neighbors = min(neighbors, max_neighbors)
    return max(1, round(min(atoms * neighbors, 2.0**31)))
