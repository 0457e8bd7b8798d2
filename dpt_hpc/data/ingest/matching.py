"""Whether two structures are the same material: pymatgen's StructureMatcher behind our own structures."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from ase.geometry import complete_cell
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal
from pymatgen.core.structure_matcher import StructureMatcher

from dpt_hpc.structure import Structure

LENGTHS, SITES, ANGLES = 0.2, 0.3, 5.0
"""pymatgen's own tolerances: of lattice lengths (relative), of sites (in units of the cube root of the volume per
atom), of lattice angles (degrees)."""
CONVENTION = {
    "ltol": LENGTHS,
    "stol": SITES,
    "angle_tol": ANGLES,
    "primitive_cell": True,
    "scale": True,
    "attempt_supercell": True,
}
"""Primitive cells, scaled to one volume per atom; where one has a multiple of the other's atoms, with a supercell."""


VACUUM = 20.0
"""Å between the images of a slab, a wire or a molecule along its open axes."""


class Matcher:
    """Compares structures of like composition; what is open along other axes is another material."""

    def __init__(self) -> None:
        self._matcher: Any = StructureMatcher(**CONVENTION)

    def same(self, a: Structure, b: Structure) -> bool:
        """Whether `a` and `b` are the same material, by the tolerances of CONVENTION."""
        if sorted(a.pbc.tolist()) != sorted(b.pbc.tolist()):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(self._matcher.fit(_crystal(a), _crystal(b)))


def _crystal(structure: Structure) -> Crystal:
    cell, open_axes = structure.cell.numpy(), ~structure.pbc.numpy()
    if open_axes.any():
        cell = complete_cell(np.where(open_axes[:, None], 0.0, cell))
        cell[open_axes] *= VACUUM + np.ptp(structure.positions.numpy(), axis=0).max()
    return Crystal(
        Lattice(cell), structure.atomic_numbers.tolist(), structure.positions.numpy(), coords_are_cartesian=True
    )
