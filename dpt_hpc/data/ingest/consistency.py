"""Do the stated units and signs agree with physics? Four tests on the first structures of a source.

None needs a model. A test speaks only where the source allows it, and refuses only what is far outside: the thresholds
were set with eight published sets, in every wrong unit and sign (`tests/test_ingest_consistency.py` repeats that).

Volume   A compressed crystal is small. Each volume, against that of its atoms at zero pressure, is compared with what a
         Murnaghan solid would have at the stated pressure; another unit or sign that explains the volumes much better
         proves the stated one wrong.
Groups   Within one formula, pressure falls with volume: the median bulk modulus is positive, and that of a solid.
Work     Between two frames of one material, the energy changes by the work of forces and stress (trapezoid rule).
Energies Divided by the number of atoms, total energies are about a sum over the elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.ingest.atomic_volumes import LOG_VOLUME
from dpt_hpc.data.ingest.units import STRESS_SIGNS, STRESS_UNITS, Units
from dpt_hpc.errors import DataError
from dpt_hpc.structure import GPA_PER_EV_A3, SYMBOLS, Structure

SHOWN = 5000
"""Structures that are looked at: the verdict does not wait for the end of a large file."""
BULK_MODULUS, ITS_DERIVATIVE = 60.0, 4.0
"""GPa and 1: a soft solid. The compression at megabars hardly depends on them, and a wrong unit is a factor of ten."""
MUCH_BETTER = 0.68
"""Another unit and sign must explain the volumes so much better than the stated ones; right ones keep above 0.88."""
FORMULAS = 50
"""Different materials that the volume test needs: the volumes of single ones may be off by 15 % for other reasons."""
IMPOSSIBLE = 0.9
"""ln(V0/V) of half of the structures that pressure implies and volumes do not show; at most 0.2 where right."""
SOLID = (1.0, 2000.0)
"""GPa: bulk moduli from molecular crystals to diamond under megabars."""
WORK = (0.4, 2.5)
"""Energy change over work, its median; 0.73 to 1.0 where right."""
MUCH_SMALLER = 0.4
"""Another kind of energy must follow the composition so much more closely than the stated one."""
FEWEST = 20

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Frame:
    cell: Array
    fractional: Array
    energy: float
    forces: Array | None
    stress: Array | None


class Consistency:
    """Collects the first structures of one source and judges them, at the latest when it is concluded."""

    def __init__(self, path: Path, units: Units) -> None:
        self.path = path
        self.units = units
        self.seen = 0
        self.verdict: list[str] | None = None
        self.pressures: list[tuple[str, float, float, float]] = []
        self.energies: list[tuple[NDArray[np.uint16], int, float]] = []
        self.works: list[tuple[float, float, float]] = []
        self.frames: dict[tuple[str, bytes], _Frame] = {}

    def show(self, structure: Structure) -> None:
        """Take in a structure. Raises DataError as soon as enough were seen to prove the labels wrong."""
        if self.verdict is not None:
            return
        self.seen += 1
        n = structure.num_atoms
        if structure.stress is not None:
            reference = [LOG_VOLUME.get(SYMBOLS[z], np.nan) for z in structure.atomic_numbers.tolist()]
            volume = float(np.log(structure.volume / n))
            pressure = -float(structure.stress.trace()) / 3 * GPA_PER_EV_A3
            self.pressures.append((structure.group, pressure, volume, volume - float(np.mean(reference))))
        if structure.energy is not None:
            counts = np.bincount(structure.atomic_numbers.numpy(), minlength=len(SYMBOLS)).astype(np.uint16)
            self.energies.append((counts, n, structure.energy))
            self._compare_with_last(structure, structure.energy)
        if self.seen == SHOWN:
            self.conclude()

    def conclude(self) -> list[str]:
        """What the tests found, a line each. Raises DataError if they prove a unit or a sign wrong."""
        if self.verdict is None:
            self.verdict = []
            tests = (self._energies, self._volume, self._groups, self._work)
            self.verdict = [line for test in tests if (line := test()) is not None]
            self.frames.clear()
            self.energies.clear()
        return self.verdict

    def _refuse(self, finding: str, remedy: str) -> None:
        raise DataError(
            f"{self.path}: {finding}\n"
            f"Stated: {self.units}. A network trained on wrong units or signs is worthless.\n"
            f"{remedy}; --no-check ingests it nevertheless."
        )

    def _volume(self) -> str | None:
        rows = [(group, p, x) for group, p, _, x in self.pressures if np.isfinite(x) and abs(x) < 1]
        if len(rows) < FEWEST:
            return None
        pressure, excess = (np.array([row[k] for row in rows]) for k in (1, 2))
        implied = float(np.median(_compression(pressure) - np.abs(excess)))
        if implied > IMPOSSIBLE:
            self._refuse(
                f"the stress is too large for a solid: {len(rows)} pressures have a median size of "
                f"{np.median(np.abs(pressure)):.3g} GPa, at ordinary volumes.",
                "Look up how the source states its stress, then set --stress-unit",
            )
        formulas, member = np.unique([row[0] for row in rows], return_inverse=True)
        if len(formulas) < FORMULAS:
            return None
        weight = 1 / np.bincount(member)[member] / len(formulas)
        stated = STRESS_UNITS[self.units.stress_unit] * STRESS_SIGNS[self.units.stress_sign]
        misfit = {}
        for unit, sign in product(STRESS_UNITS, STRESS_SIGNS):
            factor = STRESS_UNITS[unit] * STRESS_SIGNS[sign] / stated
            misfit[unit, sign] = _misfit(pressure * factor, excess, weight)
        ours = misfit[self.units.stress_unit, self.units.stress_sign]
        best = min(misfit, key=lambda key: misfit[key])
        if misfit[best] < MUCH_BETTER * ours:
            self._refuse(
                f"the stress contradicts the volumes: as stated, {len(rows)} pressures have a median size of "
                f"{np.median(np.abs(pressure)):.3g} GPa, which their volumes per atom do not show; "
                f"{best[0]}, {best[1]} fits {ours / misfit[best]:.1f} times better.",
                f"Look up how the source states its stress, then e.g. --stress-unit {best[0]} --stress-sign {best[1]}",
            )
        opposite = next(sign for sign in STRESS_SIGNS if sign != self.units.stress_sign)
        if ours < MUCH_BETTER * misfit[self.units.stress_unit, opposite]:
            return f"stress unit and sign agree with the volumes of {len(rows)} structures"
        return f"pressures are too small to tell the stress sign from {len(rows)} volumes; the unit is not too large"

    def _groups(self) -> str | None:
        by_group: dict[str, list[tuple[float, float]]] = {}
        for group, pressure, volume, _ in self.pressures:
            by_group.setdefault(group, []).append((volume, pressure))
        moduli = []
        for rows in by_group.values():
            volume, pressure = np.array(rows).T
            if len(rows) > 1 and volume.std() > 0.01:
                offset = volume - volume.mean()
                moduli.append(-float(offset @ pressure) / float(offset @ offset))
        if len(moduli) < 5:
            return None
        median, negative = float(np.median(moduli)), float(np.mean(np.array(moduli) < 0))
        if negative > 0.8:
            self._refuse(
                f"the stress sign is wrong: for {negative:.0%} of {len(moduli)} formulas pressure rises with volume.",
                "State the other sign with --stress-sign",
            )
        if negative < 0.2 and not SOLID[0] < median < SOLID[1]:
            self._refuse(
                f"the stress has the wrong unit: pressure and volume of {len(moduli)} formulas give a median bulk "
                f"modulus of {median:.3g} GPa, expected {SOLID[0]:g} to {SOLID[1]:g}.",
                "State the unit with --stress-unit",
            )
        return f"median bulk modulus of {len(moduli)} formulas, from pressure and volume: {median:.3g} GPa"

    def _energies(self) -> str | None:
        atoms = np.array([n for _, n, _ in self.energies], dtype=np.float64)
        energy = np.array([e for _, _, e in self.energies])
        composition = np.array([x for x, _, _ in self.energies]).reshape(len(atoms), len(SYMBOLS))
        composition = composition[:, composition.any(0)]
        if len(atoms) < 3 * composition.shape[1] + FEWEST or not energy.any():
            return None
        residual = {
            "stated": _relative_residual(energy / atoms, composition),
            "per_atom": _relative_residual(energy, composition),
            "total": _relative_residual(energy / atoms**2, composition),
        }
        better = min(residual, key=lambda kind: residual[kind])
        if residual[better] < MUCH_SMALLER * residual["stated"]:
            found = "energies per atom" if better == "per_atom" else "total energies multiplied by the number of atoms"
            self._refuse(
                f"the energies are not total energies: taken as {found}, they follow the composition "
                f"{residual['stated'] / residual[better]:.1f} times more closely.",
                f"State --energy-kind {better}, or name another field with --energy-key",
            )
        if residual["stated"] > MUCH_SMALLER * max(residual.values()):
            return None
        return f"energies per atom follow the composition within {residual['stated']:.1%}"

    def _compare_with_last(self, structure: Structure, energy: float) -> None:
        """Energy change, work of the forces and of the stress, per atom, since the last frame of the material."""
        cell, n = structure.cell.numpy(), structure.num_atoms
        forces = None if structure.forces is None else structure.forces.numpy()
        stress = None if structure.stress is None else structure.stress.numpy()
        frame = _Frame(cell, structure.positions.numpy() @ np.linalg.inv(cell), energy, forces, stress)
        key = (structure.group, structure.atomic_numbers.numpy().tobytes())
        last = self.frames.get(key)
        self.frames[key] = frame
        if last is None or np.abs(np.linalg.inv(last.cell) @ cell - np.eye(3)).max() > 0.1:
            return
        mean_cell = (cell + last.cell) / 2
        gradient = np.linalg.inv(mean_cell) @ (cell - last.cell)
        step = frame.fractional - last.fractional
        step -= np.round(step)
        moved = (step - step.mean(0)) @ mean_cell
        if np.abs(moved).max() > 0.5:  # Å: beyond, the trapezoid rule is too coarse
            return
        by_forces = by_stress = 0.0
        if forces is not None and last.forces is not None:
            by_forces = -float(((forces + last.forces) / 2 * moved).sum()) / n
        if stress is not None and last.stress is not None:
            volume = abs(float(np.linalg.det(mean_cell)))
            by_stress = volume * float(((stress + last.stress) / 2 * (gradient + gradient.T) / 2).sum()) / n
        self.works.append(((energy - last.energy) / n, by_forces, by_stress))

    def _work(self) -> str | None:
        if not self.works:
            return None
        change, by_forces, by_stress = np.array(self.works).T
        found = []
        for label, work, other in (("forces", by_forces, by_stress), ("stress", by_stress, by_forces)):
            chosen = (np.abs(work) > 1e-3) & (np.abs(work) > np.abs(other))
            if chosen.sum() < FEWEST:
                continue
            ratio = float(np.median((change - other)[chosen] / work[chosen]))
            if not WORK[0] < ratio < WORK[1]:
                self._refuse(
                    f"energy and {label} contradict each other: over {chosen.sum()} pairs of frames of one material, "
                    f"the energy changes by {ratio:.3g} times the work of the {label}, expected about 1.",
                    f"Check unit and sign of the {label}, and unit and kind of the energy",
                )
            found.append(f"{ratio:.2f} times the work of the {label} ({chosen.sum()} pairs)")
        return f"between frames of one material the energy changes by {' and '.join(found)}" if found else None


def _compression(pressure: Array) -> Array:
    """ln(V0/V) of a Murnaghan solid at the size of a pressure, GPa."""
    return np.log1p(ITS_DERIVATIVE * np.abs(pressure) / BULK_MODULUS) / ITS_DERIVATIVE


def _misfit(pressure: Array, excess: Array, weight: Array) -> float:
    """Mean distance of ln(V/V0) from that of a Murnaghan solid at `pressure`; beyond 1 it counts as 1."""
    return float(weight @ np.minimum(np.abs(excess + np.sign(pressure) * _compression(pressure)), 1))


def _relative_residual(energy_per_atom: Array, composition: NDArray[np.uint16]) -> float:
    """What a sum over the elements leaves of the energies per atom, relative to their mean size; at least 1 %."""
    fractions = composition / composition.sum(1, keepdims=True)
    offset = energy_per_atom - energy_per_atom.mean()
    normal = fractions.T @ fractions + 1e-3 * np.eye(fractions.shape[1])
    left = offset - fractions @ np.linalg.solve(normal, fractions.T @ offset)
    return max(0.01, float(left.std() / np.abs(energy_per_atom).mean()))
