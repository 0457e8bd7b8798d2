"""Named structures that break neighbour lists, shared by the tests of graphs, messages and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class System:
    """positions (N,3) Å · cell (3,3) Å · pbc (3,) bool; all float64."""

    positions: Tensor
    cell: Tensor
    pbc: Tensor

    @property
    def num_atoms(self) -> int:
        return int(self.positions.shape[0])


def system(positions: object, cell: object, pbc: Sequence[bool] = (True, True, True)) -> System:
    kind = torch.float64
    return System(
        torch.as_tensor(positions, dtype=kind).reshape(-1, 3), torch.as_tensor(cell, dtype=kind), torch.tensor(pbc)
    )


def batch_of(systems: Sequence[System], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positions (N,3), cell (B,3,3), pbc (B,3), atom_ptr (B+1,): the first arguments of radius_graph."""
    positions = torch.cat([torch.empty(0, 3, dtype=torch.float64), *(s.positions for s in systems)])
    cell = torch.stack([s.cell for s in systems]) if systems else torch.empty(0, 3, 3, dtype=torch.float64)
    pbc = torch.stack([s.pbc for s in systems]) if systems else torch.empty(0, 3, dtype=torch.bool)
    atom_ptr = torch.tensor([0] + [s.num_atoms for s in systems]).cumsum(0)
    return positions.to(dtype), cell.to(dtype), pbc, atom_ptr


def supercell(basis: object, constant: float, repeats: int, rattle: float = 0.0, seed: int = 0) -> System:
    """A cubic crystal of repeats^3 cells; basis in fractions of the cell."""
    steps = torch.arange(repeats, dtype=torch.float64)
    corners = torch.cartesian_prod(steps, steps, steps)
    fractions = torch.as_tensor(basis, dtype=torch.float64)
    positions = constant * (corners[:, None, :] + fractions[None, :, :]).reshape(-1, 3)
    noise = torch.randn(positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return system(positions + rattle * noise, constant * repeats * torch.eye(3))


FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
ROCKSALT = [*FCC, [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]]
CUBE = [[4.1, 0, 0], [0, 4.3, 0], [0, 0, 3.9]]
THREE = [[0.1, 0.2, 0.3], [1.9, 2.1, 0.4], [0.6, 3.0, 2.8]]

NASTY: dict[str, System] = {
    "one atom with its own images": system([[0.3, -0.2, 9.0]], 2 * torch.eye(3)),
    "primitive fcc": system([[0, 0, 0]], [[0, 2.0, 2.0], [2.0, 0, 2.0], [2.0, 2.0, 0]]),
    "triclinic, smaller than the cutoff": system(THREE, [[3.1, 0.2, -0.4], [1.3, 3.9, 0.1], [-0.9, 1.2, 3.3]]),
    "left-handed": system(THREE, [[0, 4.1, 0], [4.3, 0.3, 0], [0.2, 0, 3.9]]),
    "needle": system([[0, 0, 0], [0.7, 0.9, 17], [0.1, 0.2, 30]], [[1.6, 0, 0], [0.3, 1.5, 0], [0, 2.0, 41]]),
    "flat, height 0.5 Å": system([[0, 0, 0], [4, 5, 0.2]], [[9, 0, 0], [1, 8, 0], [3, 2, 0.5]]),
    "sheared, far from reduced": system(THREE, [[3.5, 0, 0], [21.7, 3.4, 0], [-9.1, 15.3, 3.6]]),
    "atoms far outside the cell": system([[0.1 - 410, 0.2, 0.3], [1.9, 2.1 + 4300, 0.4], [0.6, 3.0, 2.8 - 7.8]], CUBE),
    "unit cell at a large offset": system(torch.tensor(THREE) + 12345.678, CUBE),
    "slab, third vector zero": system(THREE, [[3.2, 0, 0], [1.0, 3.0, 0], [0, 0, 0]], (True, True, False)),
    "slab, first axis open": system(THREE, [[0.1, 0, 0], [0, 2.9, 0.7], [0, 0.4, 3.1]], (False, True, True)),
    "slab, middle axis open": system(THREE, [[3.0, 0, 0.5], [3.0, 0, 0.5], [0, 0.4, 3.1]], (True, False, True)),
    "wire along a diagonal": system(THREE, [[0, 0, 0], [1.5, 1.1, -0.8], [0, 0, 0]], (False, True, False)),
    "molecule without a cell": system(THREE, torch.zeros(3, 3), (False, False, False)),
    "molecule with a useless cell": system(THREE, torch.eye(3), (False, False, False)),
    "isolated atoms": system([[0, 0, 0], [40, 40, 40]], 80 * torch.eye(3)),
    "two atoms 1e7 Å apart, open": system([[0, 0, 0], [1e7, 1, 1], [1e7, 2, 1]], torch.eye(3), (False, False, False)),
    "no atoms": system([], torch.eye(3)),
    "perfect rocksalt, ties everywhere": supercell(ROCKSALT, 4.0, 1),
    "rattled fcc, through bins": supercell(FCC, 3.6, 3, rattle=0.1),
    "liquid in a sheared box, through bins": system(
        torch.rand(150, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 40,
        [[12, 0, 0], [7, 11, 0], [-8, 5, 13]],
    ),
}


def random_system(seed: int) -> System:
    """Up to eight atoms in a random cell of any handedness, heights from 0.5 Å, some axes open, some atoms outside."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    num_atoms = int(uniform(1) * 8) + 1
    pbc = uniform(3) < 0.75
    scale = 10 ** (uniform(3, 1) * 1.6 - 0.1)
    while True:
        cell = (2 * uniform(3, 3) - 1) * scale
        if float((1 / torch.linalg.inv(cell).norm(dim=0)).min()) >= 0.5:
            break
    fractions = uniform(num_atoms, 3) * 10 ** (uniform(1) * 2) - 0.3
    return System(fractions @ cell, torch.where(pbc[:, None] | (uniform(1) < 0.5), cell, 0.0), pbc)
