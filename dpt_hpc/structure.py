"""Structures and batches, and THE CONVENTIONS of dpt_hpc (stated here, nowhere else).

Units       energy eV (always the TOTAL of the cell), length Å, forces eV/Å, stress eV/Å³.
Cell        rows are lattice vectors (as in ASE); fractional f and Cartesian r: r = f @ cell.
Edges       edge_index[0] = source j (the neighbour), edge_index[1] = target i (the centre), sorted by target;
            edge_vectors = positions[j] + cell_shifts @ cell - positions[i], edge_lengths their norms.
Strain      symmetric, acts on positions and cell alike: r -> r @ (1 + strain).
Forces      forces = -dE/dpositions.
Stress      stress = (1/V) dE/dstrain with V = |det(cell)|, tension positive: a compressed crystal has a negative
            trace. virial = -V * stress exists only at the border (readers, writers).
Missing     a label that a structure does not have is None in a Structure; in a Batch its values are 0 and its
            mask is False. NaN never stands for "missing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

MAX_ATOMIC_NUMBER = 118
GPA_PER_EV_A3 = 160.2176634
"""1 eV/Å³ in GPa; exact since the SI of 2019 (CODATA 2018)."""
CLOSEST_ATOMS = 1e-2
"""Å. Two atoms (or images) closer than this are one for the paper: no direction between them, a broken structure."""

SYMBOLS: tuple[str, ...] = tuple(
    """X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr
    Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au
    Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts
    Og""".split()
)
"""Chemical symbols by atomic number; index 0 is no element."""


@dataclass(frozen=True)
class Structure:
    """One structure with its labels, on the CPU, in float64.

    positions (N,3) Å · cell (3,3) Å · pbc (3,) bool · atomic_numbers (N,) int64 · energy eV · forces (N,3) eV/Å ·
    stress (3,3) eV/Å³ · properties: named scalars in the units their dataset declares · structure_id: unique within a
    dataset · group: structures of one material share it, and a split never parts them.
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    atomic_numbers: Tensor
    energy: float | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None
    properties: Mapping[str, float] = field(default_factory=dict)
    structure_id: str = ""
    group: str = ""

    @property
    def num_atoms(self) -> int:
        return int(self.atomic_numbers.shape[0])

    @property
    def volume(self) -> float:
        """|det(cell)| in Å³."""
        return float(torch.linalg.det(self.cell).abs())


@dataclass(frozen=True)
class Batch:
    """B structures with N atoms in all, as flat tensors on one device.

    positions (N,3) Å · cell (B,3,3) Å · pbc (B,3) bool · atomic_numbers (N,) int64 · atom_ptr (B+1,) int64, offsets of
    the structures' atoms · structure_index (B,) int64, each structure's index in its dataset · energy (B,) eV ·
    forces (N,3) eV/Å · stress (B,3,3) eV/Å³ · target (B,), the property to learn · *_mask (B,) bool: which structures
    have the label (its values are 0 where they do not).
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    atomic_numbers: Tensor
    atom_ptr: Tensor
    structure_index: Tensor
    energy: Tensor
    energy_mask: Tensor
    forces: Tensor
    forces_mask: Tensor
    stress: Tensor
    stress_mask: Tensor
    target: Tensor
    target_mask: Tensor

    @property
    def num_structures(self) -> int:
        return int(self.atom_ptr.shape[0]) - 1

    @property
    def num_atoms(self) -> int:
        return int(self.atomic_numbers.shape[0])

    @property
    def atoms_per_structure(self) -> Tensor:
        """(B,) int64."""
        return self.atom_ptr[1:] - self.atom_ptr[:-1]

    @property
    def batch(self) -> Tensor:
        """(N,) int64: the structure of each atom."""
        index = torch.arange(self.num_structures, device=self.atom_ptr.device)
        return torch.repeat_interleave(index, self.atoms_per_structure, output_size=self.num_atoms)

    @property
    def volume(self) -> Tensor:
        """(B,) Å³."""
        return torch.linalg.det(self.cell).abs()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on `device`, its floating tensors in `dtype`."""
        moved = {}
        for f in fields(self):
            value: Tensor = getattr(self, f.name)
            moved[f.name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        return replace(self, **moved)

    @classmethod
    def from_structures(
        cls, structures: Sequence[Structure], dtype: torch.dtype = torch.float32, target: str | None = None
    ) -> Batch:
        """Concatenate structures; `target` names the property that becomes `Batch.target`."""
        num_atoms = torch.tensor([0] + [s.num_atoms for s in structures], dtype=torch.int64)
        zeros = torch.zeros

        def mask(values: Sequence[object]) -> Tensor:
            return torch.tensor([v is not None for v in values], dtype=torch.bool)

        def stack(values: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
            return torch.stack(list(values)).to(dtype) if values else zeros(shape, dtype=dtype)

        def concatenate(values: Sequence[Tensor], shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.cat(list(values)).to(kind) if values else zeros(shape, dtype=kind)

        energy = [s.energy for s in structures]
        forces = [s.forces for s in structures]
        stress = [s.stress for s in structures]
        targets = [s.properties.get(target) if target is not None else None for s in structures]
        double = torch.float64
        return cls(
            positions=concatenate([s.positions for s in structures], (0, 3), dtype),
            cell=stack([s.cell for s in structures], (0, 3, 3)),
            pbc=torch.stack([s.pbc for s in structures]) if structures else zeros((0, 3), dtype=torch.bool),
            atomic_numbers=concatenate([s.atomic_numbers for s in structures], (0,), torch.int64),
            atom_ptr=num_atoms.cumsum(0),
            structure_index=torch.arange(len(structures)),
            energy=torch.tensor([0.0 if v is None else v for v in energy], dtype=double).to(dtype),
            energy_mask=mask(energy),
            forces=concatenate(
                [
                    zeros((s.num_atoms, 3), dtype=double) if f is None else f
                    for s, f in zip(structures, forces, strict=True)
                ],
                (0, 3),
                dtype,
            ),
            forces_mask=mask(forces),
            stress=stack([zeros((3, 3), dtype=double) if v is None else v for v in stress], (0, 3, 3)),
            stress_mask=mask(stress),
            target=torch.tensor([0.0 if v is None else v for v in targets], dtype=double).to(dtype),
            target_mask=mask(targets),
        )
