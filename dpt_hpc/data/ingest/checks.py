"""What makes a record broken, whatever its format: labels or geometry that no calculation can have given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.ingest.record import Record
from dpt_hpc.structure import CLOSEST_ATOMS, MAX_ATOMIC_NUMBER, SYMBOLS

SMALLEST_VOLUME_PER_ATOM = 0.05
"""Å³. A cell below is degenerate: no element is within a factor of ten at any pressure that a DFT code reaches."""


def fault(record: Record) -> str | None:
    """Why the record is broken, or None. Labels must be converted before."""
    for what, text in (("structure_id", record.structure_id), ("group", record.group)):
        if not _storable(text):
            return f"{what}: {text!r:.60} is no text that a file can hold"
    numbers = np.asarray(record.numbers)
    n = len(numbers)
    if n == 0:
        return "has no atoms"
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        return f"atomic_numbers: {numbers.dtype} of shape {numbers.shape}, expected N integers"
    unknown = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
    if len(unknown):
        return f"atomic number {unknown[0]} is no element (1 to {MAX_ATOMIC_NUMBER})"
    for what, got, want in (
        ("positions", record.positions, (n, 3)),
        ("cell", record.cell, (3, 3)),
        ("pbc", record.pbc, (3,)),
        ("forces", record.forces, (n, 3)),
    ):
        if got is not None and np.shape(got) != want:
            return f"{what}: shape is {np.shape(got)}, expected {want}"
    for what, values in (
        ("positions", record.positions),
        ("cell", record.cell),
        ("energy", record.energy),
        ("forces", record.forces),
        ("stress", record.stress),
        *record.properties.items(),
    ):
        if values is not None and (reason := not_finite(what, np.asarray(values, dtype=np.float64))):
            return reason
    volume = abs(float(np.linalg.det(record.cell)))
    if volume < SMALLEST_VOLUME_PER_ATOM * n:
        return f"cell: volume is {volume:.3g} Å³ for {n} atoms; give a molecule or slab a cell with vacuum around it"
    return coincidence(record)


def _storable(text: str) -> bool:
    """No NUL, which ends a text in HDF5, and no half of a character."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def not_finite(what: str, values: NDArray[np.float64]) -> str | None:
    """Where `values` hold the first NaN or infinity."""
    if np.isfinite(values).all():
        return None
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    where = f"[{', '.join(map(str, place))}]" if place else ""
    return f"{what}{where} is {values[place]}"


def coincidence(record: Record) -> str | None:
    """Two atoms, or an atom and its own image along a periodic axis, at the same place.

    Atoms of the same place differ by nearly a lattice vector, so rounding their fractional difference finds it.
    """
    pbc = np.asarray(record.pbc, dtype=bool)
    shortest = float(np.linalg.norm(record.cell[pbc], axis=1).min(initial=np.inf))
    if shortest < CLOSEST_ATOMS:
        return f"cell: a lattice vector is {shortest:.3g} Å long"
    inverse = np.linalg.inv(record.cell)
    fractional = record.positions @ inverse
    n = len(fractional)
    # Sorted along the normal of one pair of cell faces, such atoms lie next to each other: O(N log N).
    axis = int(np.argmin(np.linalg.norm(inverse, axis=0)))
    height = 1 / float(np.linalg.norm(inverse[:, axis]))
    along = (fractional[:, axis] % 1.0 if pbc[axis] else fractional[:, axis]) * height
    order = np.argsort(along, kind="stable")
    ring = along[order]
    for step in range(1, n):
        gap = np.roll(ring, -step) - ring
        gap[n - step :] += height if pbc[axis] else np.inf
        near = np.flatnonzero(gap < CLOSEST_ATOMS)
        if not len(near):
            return None
        first, second = order[near], order[(near + step) % n]
        delta = fractional[second] - fractional[first]
        distance = np.linalg.norm((delta - np.round(delta) * pbc) @ record.cell, axis=1)
        close = int(np.argmin(distance))
        if distance[close] < CLOSEST_ATOMS:
            i, j = sorted((int(first[close]), int(second[close])))
            kinds = f"{SYMBOLS[record.numbers[i]]} and {SYMBOLS[record.numbers[j]]}"
            return f"atoms {i} and {j} ({kinds}) are {distance[close]:.3g} Å apart"
    return None
