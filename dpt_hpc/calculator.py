"""A trained network as a calculator of ASE: relaxations, molecular dynamics, elastic constants, phonons run on it.

    from dpt_hpc.calculator import DPTCalculator
    atoms.calc = DPTCalculator("runs/pretrain")

Its energy is that of DFT as its data state it, in eV; forces are in eV/Å; stress is ASE's own: eV/Å³, tension positive,
Voigt order xx yy zz yz xz xy. The neighbours are found anew, exactly, at every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from dpt_hpc.errors import DataError
from dpt_hpc.use import Model, as_structure, load
from dpt_hpc.use.doubts import reason

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


class DPTCalculator(Calculator):
    """Energy, free_energy (the same), forces, stress, and energies of the atoms, of a network that learnt energies.

    model: a `dpt_hpc.Model`, or what `dpt_hpc.load` takes. device, dtype, allow_unknown_elements: as there; float64 by
    default, because a relaxation to small forces and a long trajectory show the rounding of float32, which is about
    twice as fast.

    Stress needs a periodic structure with a volume; for others ASE's PropertyNotImplementedError says so. energies add
    up to the energy (see `dpt_hpc.use.shares` for what they mean); a network that takes the mean over its atoms has
    none. Raises DataError for a network that did not learn energies, and for a structure that it cannot answer.

    A network that did not learn energies, forces or stress (their weight was 0) is warned of. CGCNN and the transformer
    without `model.envelope` have a small step in their energy wherever an atom enters or leaves another one's
    neighbourhood: relaxations and trajectories feel it. SchNet and PaiNN have none: all their messages end with the
    cutoff.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]  # noqa: RUF012 - as ASE has it
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012 - no network here reads them

    def __init__(
        self,
        model: Model | str | Path,
        *,
        device: str = "auto",
        dtype: str | None = "float64",
        allow_unknown_elements: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        if not isinstance(model, Model):
            model = load(model, device=device, dtype=dtype, allow_unknown_elements=allow_unknown_elements)
        if model.gives != "energy":
            raise DataError(
                f"calculator: {model.path} gives {', '.join(model.units)}, no energy whose derivatives are forces.\n"
                "Use model.predict for it, or load a network that was pre-trained on energies and forces."
            )
        if unlearnt := model.card.unlearnt:
            warnings.warn(
                f"calculator: {model.path} did not learn {' and '.join(unlearnt)}: the loss of its training gave no "
                "weight to that. What is answered is only what follows from the rest.",
                stacklevel=2,
            )
        self.model = model
        self._told: set[str] = set()

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill `results` for `atoms`: what ASE calls."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        structure = as_structure(self.atoms, "atoms")
        energies = "energies" in properties
        try:
            self.model.check_request(energies=energies)
        except DataError as error:
            raise PropertyNotImplementedError(str(error)) from None
        ((_, found),) = self.model.stream([structure], energies=energies)
        for text in found.warnings:
            if reason(text) not in self._told:  # a trajectory would say it a thousand times
                self._told.add(reason(text))
                warnings.warn(text, stacklevel=2)
        self.results = {"energy": found.energy, "free_energy": found.energy}
        if found.forces is not None:
            self.results["forces"] = found.forces.astype(np.float64)
        if found.energies is not None:
            self.results["energies"] = found.energies.astype(np.float64)
        if found.stress is not None:
            self.results["stress"] = np.array([found.stress[i, j] for i, j in VOIGT], dtype=np.float64)
        elif "stress" in properties:
            raise PropertyNotImplementedError(
                f"stress: pbc is {structure.pbc.tolist()}, and the cell has {structure.volume:g} Å³, "
                "but stress is energy per strain and volume of a periodic cell."
            )
