"""Do the stated units and signs agree with physics? Four tests on the first structures of a source.

None needs a model. A test speaks only where the source allows it, and refuses only what is far outside: the thresholds
were set with eight published sets, in every wrong unit and sign (`tests/test_ingest_consistency.py` repeats that).

Volume   A compressed crystal is small. Each volume, against that of its atoms at zero pressure, is compared with what a
         Murnaghan solid would have at the stated pressure; another unit or sign that explains the volumes much better
         proves the stated one wrong.
Groups   Within one formula, pressure falls with volume: the median bulk modulus is positive, and that of a solid.
Work     Between two frames of one material, the energy changes by the work of forces and stress (trapezoid rule).
Size     Total energies grow in proportion to the number of atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.ingest.atomic_volumes import LOG_VOLUME
from dpt_hpc.data.ingest.units import GPA_PER_EV_A3, STRESS_SIGNS, STRESS_UNITS, Units
from dpt_hpc.errors import DataError
from dpt_hpc.structure import SYMBOLS, Structure

SHOWN = 5000
"""Structures that are looked at: the verdict does not wait for the end of a large file."""
BULK_MODULUS, ITS_DERIVATIVE = 60.0, 4.0
"""GPa and 1: a soft solid. The compression at megabars hardly depends on them, and a wrong unit is a factor of ten."""
MUCH_BETTER = 0.72
"""A unit and sign must fit the volumes this much better than the stated ones; those reach 0.85 where right."""
SOLID = (1.0, 2000.0)
"""GPa: bulk moduli from molecular crystals to diamond under megabars."""
WORK = (0.4, 2.5)
"""Energy change over work, its median; 0.73 to 1.0 where right."""
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
        self.sizes: list[tuple[int, float]] = []
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
            self.sizes.append((n, structure.energy))
            self._compare_with_last(structure, structure.energy)
        if self.seen == SHOWN:
            self.conclude()

    def conclude(self) -> list[str]:
        """What the tests found, a line each. Raises DataError if they prove a unit or a sign wrong."""
        if self.verdict is None:
            self.verdict = []
            tests = (self._size, self._volume, self._groups, self._work)
            self.verdict = [line for test in tests if (line := test()) is not None]
            self.frames.clear()
        return self.verdict

    def _refuse(self, finding: str, remedy: str) -> None:
        raise DataError(
            f"{self.path}: {finding}\n"
            f"Stated: {self.units}. A network trained on wrong units or signs is worthless.\n"
            f"{remedy}; --no-check ingests it nevertheless."
        )

    def _volume(self) -> str | None:
        rows = [(p, x) for _, p, _, x in self.pressures if np.isfinite(x) and abs(x) < 1]
        if len(rows) < FEWEST:
            return None
        pressure, excess = np.array(rows).T
        stated = STRESS_UNITS[self.units.stress_unit] * STRESS_SIGNS[self.units.stress_sign]
        misfit = {
            (unit, sign): _misfit(pressure * STRESS_UNITS[unit] * STRESS_SIGNS[sign] / stated, excess)
            for unit in STRESS_UNITS
            for sign in STRESS_SIGNS
        }
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

    def _size(self) -> str | None:
        atoms, energy = np.array([row for row in self.sizes if row[1]] or np.zeros((0, 2))).T
        if len(atoms) < 100 or np.log(atoms).std() < 0.3:
            return None
        power = float(np.polyfit(np.log(atoms), np.log(np.abs(energy)), 1)[0])
        if abs(power - 1) > 0.5:
            other = "per_atom" if power < 1 else "total"
            self._refuse(
                f"the energies are not total energies: they grow as N^{power:.2f} with the number of atoms N.",
                f"State --energy-kind {other}, or name another field with --energy-key",
            )
        return f"energies grow as N^{power:.2f} with the number of atoms N"

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


def _misfit(pressure: Array, excess: Array) -> float:
    """Distance of ln(V/V0) from a Murnaghan solid's at `pressure` (GPa), relative to taking no notice of pressure."""
    compression = np.log1p(ITS_DERIVATIVE * np.abs(pressure) / BULK_MODULUS) / ITS_DERIVATIVE
    deviation = np.minimum(np.abs(excess + np.sign(pressure) * compression), 1)
    return float(deviation.mean() / max(float(np.abs(excess).mean()), 1e-6))
