"""Units and signs of sources, and their conversion to the conventions of `dpt_hpc.structure`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Array, Record, RecordError, numeric
from dpt_hpc.structure import GPA_PER_EV_A3

# CODATA 2018, as in ase.units and pymatgen.
HARTREE = 27.211386245988
BOHR = 0.529177210903
KCAL_PER_MOL = 0.043364106370
KJ_PER_MOL = 0.010364269656

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "Ha": HARTREE,
    "Ry": HARTREE / 2,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KJ_PER_MOL,
}
FORCES_UNITS = {
    "eV/A": 1.0,
    "meV/A": 1e-3,
    "Ha/Bohr": HARTREE / BOHR,
    "Ry/Bohr": HARTREE / 2 / BOHR,
    "kcal/mol/A": KCAL_PER_MOL,
}
STRESS_UNITS = {"eV/A^3": 1.0, "GPa": 1 / GPA_PER_EV_A3, "kbar": 0.1 / GPA_PER_EV_A3}
STRESS_SIGNS = {"tension_positive": 1.0, "compression_positive": -1.0}
ENERGY_KINDS = ("total", "per_atom")


@dataclass(frozen=True)
class Units:
    """How a source states its labels. virial is taken in the energy unit."""

    energy_kind: str = "total"
    energy_unit: str = "eV"
    forces_unit: str = "eV/A"
    stress_unit: str = "eV/A^3"
    stress_sign: str = "tension_positive"

    def __str__(self) -> str:
        kind = self.energy_kind.replace("_", " ")
        sign = self.stress_sign.replace("_", " ")
        return f"energy {self.energy_unit} ({kind}), forces {self.forces_unit}, stress {self.stress_unit} ({sign})"


def contradiction(stated: Mapping[str, str], units: Units, options: IngestOptions) -> str | None:
    """Why the units that a record states (`Record.stated_units`) are not those it is read in, or None.

    A spelling that is not known passes only if the user names the unit with an option.
    """
    for label, text in stated.items():
        option, read = f"{label}_unit", getattr(units, f"{label}_unit")
        known = {_plain(name): name for name in KNOWN[label]} | SPELLINGS[label]
        plain, per_atom = _plain(text), False
        if label == "energy" and plain.endswith("/atom"):
            plain, per_atom = plain.removesuffix("/atom"), True
        meant = known.get(plain)
        if meant is None and getattr(options, option) is None:
            choices = ", ".join(KNOWN[label])
            return f"{option} says {text}, which is none of {choices}; read as {read}: state it with --{label}-unit"
        if meant is not None and meant != read:
            return f"{option} says {text}, read as {read}: use --{label}-unit {meant}"
        if per_atom and units.energy_kind != "per_atom":
            return f"{option} says {text}, read as the total energy: use --energy-kind per_atom"
    return None


def _plain(unit: str) -> str:
    """A unit without the differences of spelling: eV/Å³, eV/Ang^3, ev / A**3 -> ev/a3."""
    text = re.sub(r"[\s^*_()]", "", unit).lower().replace("³", "3").replace("å", "a")
    return re.sub(r"angstroms?|ang", "a", text)


KNOWN: Mapping[str, Mapping[str, float]] = {"energy": ENERGY_UNITS, "forces": FORCES_UNITS, "stress": STRESS_UNITS}
SPELLINGS: Mapping[str, dict[str, str]] = {
    "energy": {"hartree": "Ha", "rydberg": "Ry", "electronvolt": "eV"},
    "forces": {"hartree/bohr": "Ha/Bohr", "rydberg/bohr": "Ry/Bohr", "ry/au": "Ry/Bohr"},
    "stress": {"gigapascal": "GPa", "kb": "kbar", "kilobar": "kbar"},
}
"""Other names of the units, without the differences of spelling."""


def convert(record: Record, units: Units) -> None:
    """Bring the labels of a record to eV, eV/Å and eV/Å³ with tension positive, in place.

    Voigt stresses become 3x3, symmetric up to rounding; a virial becomes stress. Raises RecordError for a wrong shape.
    """
    if record.energy is not None:
        record.energy *= ENERGY_UNITS[units.energy_unit] * (
            len(record.numbers) if units.energy_kind == "per_atom" else 1
        )
    if record.forces is not None:
        record.forces = record.forces * FORCES_UNITS[units.forces_unit]
    if record.stress is not None:
        record.stress = square(record.stress, "stress") * STRESS_UNITS[units.stress_unit]
        record.stress = record.stress * STRESS_SIGNS[units.stress_sign]
    elif record.virial is not None:
        volume = abs(float(np.linalg.det(record.cell)))
        virial = square(record.virial, "virial") * ENERGY_UNITS[units.energy_unit]
        record.stress = -virial / volume if volume > 0 else None  # such a cell is refused
    record.virial = None


def square(tensor: Array, what: str) -> Array:
    """A symmetric (3,3) tensor of nine or six numbers (Voigt order xx yy zz yz xz xy)."""
    tensor = numeric(tensor, what)
    if tensor.shape in ((3, 3), (9,)):
        full = tensor.reshape(3, 3)
        largest = float(np.abs(full).max())
        if np.isfinite(largest) and float(np.abs(full - full.T).max()) > max(1e-3 * largest, 1e-6):
            raise RecordError(f"{what}: not symmetric: {full.tolist()}")
        return (full + full.T) / 2
    if tensor.shape == (6,):
        xx, yy, zz, yz, xz, xy = tensor
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    raise RecordError(f"{what}: shape is {tensor.shape}, expected 3x3 or 6")
