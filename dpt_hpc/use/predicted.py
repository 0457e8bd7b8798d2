"""What a network says of one structure, as plain numbers and arrays of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predicted:
    """The numbers of one structure; None for what the network does not give, or was not asked for.

    energy: eV, of the whole cell · forces (N,3) eV/Å · stress (3,3) eV/Å³, tension positive; None for a structure that
    is not periodic · energies (N,) eV: each atom's share of the energy · noise (N,3) Å: how far each atom is from its
    place at equilibrium, of a network that learnt to denoise · properties: what else it learnt, by name, in the units
    of `Model.units` · warnings: what makes the numbers doubtful.
    """

    structure_id: str
    num_atoms: int
    energy: float | None = None
    forces: Array | None = None
    stress: Array | None = None
    energies: Array | None = None
    noise: Array | None = None
    properties: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as plain lists and numbers, without what is not there."""
        found: dict[str, Any] = {"structure_id": self.structure_id, "num_atoms": self.num_atoms}
        if self.energy is not None:
            found |= {"energy": self.energy, "energy_per_atom": self.energy / self.num_atoms}
        found |= self.properties
        for name in ("forces", "stress", "energies", "noise"):
            values = getattr(self, name)
            if values is not None:
                found[name] = values.tolist()
        return found | ({"warnings": list(self.warnings)} if self.warnings else {})


@dataclass(frozen=True)
class Embedding:
    """What a network knows of one structure before its read-out: the scalars of its last layer.

    atoms (N,F) · structure (F,): their mean, whatever the size of the cell.
    """

    structure_id: str
    atoms: Array

    @property
    def structure(self) -> Array:
        mean: Array = self.atoms.mean(0)
        return mean
