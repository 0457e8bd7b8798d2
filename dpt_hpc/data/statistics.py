"""Counts and ranges of a dataset, gathered while it is written, one structure at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.errors import DataError
from dpt_hpc.structure import SYMBOLS, Structure

EDGE_CUTOFF = 8.0
EDGE_MAX_NEIGHBORS = 250
EDGE_FORMULA = "N min(max_neighbors, 4/3 pi cutoff^3 N / V)"


def estimate_edges(num_atoms: int, volume: float) -> int:
    """Directed edges to expect: N min(250, mean density x sphere of 8 Å), the paper's cutoff and neighbour limit.

    An estimate for balancing work: vacuum in the cell makes it too low, clustering too high.
    """
    density = num_atoms / volume if volume > 0 else math.inf
    neighbors = min(float(EDGE_MAX_NEIGHBORS), 4 / 3 * math.pi * EDGE_CUTOFF**3 * density)
    return max(1, round(num_atoms * neighbors))


@dataclass
class Range:
    """Count, minimum, mean, maximum and mean absolute value of the numbers it was shown."""

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    total_absolute: float = 0.0

    def show(self, values: NDArray[np.float64]) -> None:
        """Take in an array of any shape."""
        self.count += values.size
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        self.total += float(values.sum())
        self.total_absolute += float(np.abs(values).sum())

    def summary(self) -> dict[str, float]:
        """As numbers for the manifest."""
        return {
            "count": self.count,
            "min": self.minimum,
            "mean": self.total / self.count,
            "max": self.maximum,
            "mean_absolute": self.total_absolute / self.count,
        }


@dataclass
class Statistics:
    """Element counts and ranges of sizes, labels and properties."""

    ranges: dict[str, Range] = field(default_factory=dict)
    structures_with: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SYMBOLS), dtype=np.int64))
    atoms_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SYMBOLS), dtype=np.int64))
    current: str = ""
    labelled: dict[str, int] = field(default_factory=lambda: {"energy": 0, "forces": 0, "stress": 0})

    def show(self, structure: Structure) -> None:
        """Take in one structure. Raises DataError for a value that is not finite."""
        counts = np.bincount(structure.atomic_numbers.numpy(), minlength=len(SYMBOLS))
        self.atoms_of += counts
        self.structures_with += counts > 0
        n = structure.num_atoms
        self.current = structure.structure_id
        self._show("num_atoms", n)
        self._show("volume_per_atom", structure.volume / n)
        if structure.energy is not None:
            self.labelled["energy"] += 1
            self._show("energy_per_atom", structure.energy / n)
        if structure.forces is not None:
            self.labelled["forces"] += 1
            self._show("forces", structure.forces.numpy())
        if structure.stress is not None:
            self.labelled["stress"] += 1
            self._show("stress", structure.stress.numpy())
        for name, value in structure.properties.items():
            self._show(f"properties/{name}", value)

    def _show(self, name: str, value: float | NDArray[np.float64]) -> None:
        values = np.asarray(value, dtype=np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"structure {self.current}: {name} is not finite.\nLeave it out, or mend it.")
        self.ranges.setdefault(name, Range()).show(values)

    def summary(self) -> Mapping[str, Any]:
        """As JSON for the manifest. Ranges of forces and stress are of their components."""
        return {
            "labels": dict(self.labelled),
            "elements": {
                SYMBOLS[z]: {"structures": int(self.structures_with[z]), "atoms": int(self.atoms_of[z])}
                for z in np.flatnonzero(self.atoms_of)
            },
            "ranges": {name: r.summary() for name, r in self.ranges.items()},
        }
