"""Structures in memory, packed for batches: one table of structures and one of atoms, rows of plain bytes.

Whatever holds data holds it like this: what was read from disk for a rank, what a node keeps for all of its ranks, and
what came from another node, where two stretches of bytes make a structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.data.columns import LABELS, Array
from dpt_hpc.structure import Batch

Indices = NDArray[np.int64]
SHAPES: dict[str, tuple[int, ...]] = {"positions": (3,), "forces": (3,), "cell": (3, 3), "stress": (3, 3)}


@dataclass(frozen=True)
class Layout:
    """Which columns are kept, and in which precision: what batches of one run need.

    labels: of energy, forces, stress, those that the dataset has. target: the property to learn.
    """

    dtype: torch.dtype
    labels: tuple[str, ...]
    target: str | None

    @property
    def structures(self) -> np.dtype[np.void]:
        """One row of the table of structures."""
        real = self._real("cell", *(label for label in ("energy", "stress") if label in self.labels))
        masks = [f"has_{label}" for label in self.labels]
        if self.target is not None:
            real.append((f"properties/{self.target}", self._kind, ()))
            masks.append(f"properties/has_{self.target}")
        flags = [("pbc", np.dtype(bool), (3,)), *((name, np.dtype(bool), ()) for name in masks)]
        return np.dtype([*real, *flags], align=True)

    @property
    def atoms(self) -> np.dtype[np.void]:
        """One row of the table of atoms."""
        real = self._real("positions", *(["forces"] if "forces" in self.labels else []))
        return np.dtype([*real, ("atomic_numbers", np.dtype(np.uint8), ())], align=True)

    @property
    def _kind(self) -> np.dtype[np.floating]:
        return np.dtype(np.float64 if self.dtype == torch.float64 else np.float32)

    def _real(self, *names: str) -> list[tuple[str, np.dtype[np.floating], tuple[int, ...]]]:
        return [(name, self._kind, SHAPES.get(name, ())) for name in names]


@dataclass(frozen=True)
class Tables:
    """Structures of a dataset in memory.

    index (S,): which ones, ascending; a range where they follow each other. atom_ptr (S+1,): rows of their atoms, from
    0. structures (S,), atoms (A,): rows as `layout` has them.
    """

    layout: Layout
    index: Indices | range
    atom_ptr: Indices
    structures: Array
    atoms: Array

    @classmethod
    def empty(cls, layout: Layout, index: Indices | range, atom_ptr: Indices) -> Tables:
        """Tables to be filled."""
        structures = np.zeros(len(index), dtype=layout.structures)
        return cls(layout, index, atom_ptr, structures, np.zeros(int(atom_ptr[-1]), dtype=layout.atoms))

    def batch(self, indices: Sequence[int] | Indices) -> Batch:
        """The structures `indices` (B,) of the dataset, in that order; each must be here."""
        wanted = np.asarray(indices, dtype=np.int64)
        at = wanted - self.index.start if isinstance(self.index, range) else np.searchsorted(self.index, wanted)
        count = self.atom_ptr[at + 1] - self.atom_ptr[at]
        atom_ptr = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        rows = np.arange(atom_ptr[-1]) + np.repeat(self.atom_ptr[at] - atom_ptr[:-1], count)
        structures, atoms = self.structures[at], self.atoms[rows]
        dtype, target = self.layout.dtype, self.layout.target

        def of(table: Array, name: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
            if name not in (table.dtype.names or ()):
                return torch.zeros((len(table), *shape), dtype=dtype)
            return torch.from_numpy(np.ascontiguousarray(table[name])).to(dtype)

        def flags(name: str) -> torch.Tensor:
            kept = name in (structures.dtype.names or ())
            return torch.from_numpy(structures[name].copy() if kept else np.zeros(len(at), dtype=bool))

        masks = {f"{label}_mask": flags(f"has_{label}") for label in LABELS}
        return Batch(
            positions=of(atoms, "positions"),
            cell=of(structures, "cell"),
            pbc=flags("pbc"),
            atomic_numbers=torch.from_numpy(atoms["atomic_numbers"].astype(np.int64)),
            atom_ptr=torch.from_numpy(atom_ptr),
            structure_index=torch.from_numpy(wanted.copy()),
            energy=of(structures, "energy"),
            forces=of(atoms, "forces", (3,)),
            stress=of(structures, "stress", (3, 3)),
            target=of(structures, f"properties/{target}"),
            target_mask=flags(f"properties/has_{target}"),
            **masks,
        )
