"""What a trained network does as a calculator: relaxations, a trajectory at constant energy, elasticity, supercells.

    python benchmarks/calculator.py MODEL DATASET [--crystals 20] [--steps 1000] [--out FILE.json]

MODEL is anything that `dpt_hpc.load` takes, DATASET from `dpt-hpc ingest`. All in float64, on one thread.

relaxations    crystals of DATASET (of the test part where MODEL is a run that has kept its split), their atoms
               displaced by 0.05 Å (standard deviation of every coordinate), relaxed twice: atoms alone
               (BFGS with a line search, which takes no step uphill), then atoms and cell (FIRE on the Frechet cell
               filter). Told: whether the energy fell in every step, and the largest force in the end.
trajectory     velocity Verlet at constant energy from velocities of 600 K, which a solid at its minimum would halve:
               drift of the total energy, and its largest step.
elasticity     bulk modulus from the stress, and from the curvature of the energy: they agree where both are right.
supercells     energy per atom of a doubled crystal against the crystal: equal for an energy that is extensive.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE, BFGSLineSearch
from measuring import facts, write

import dpt_hpc
from dpt_hpc.calculator import DPTCalculator
from dpt_hpc.data.shards import Dataset
from dpt_hpc.structure import GPA_PER_EV_A3

LARGEST_FORCE = 0.05
"""eV/Å, of a relaxed structure."""
NOISE = 1e-6
"""eV: a smaller rise is rounding."""
ATOMS = (4, 16)
"""Of a crystal that is relaxed: smaller ones are fixed by symmetry, larger ones take long."""


EVALUATIONS = 200
"""Of a relaxation: what takes more does not relax."""


class Limited(DPTCalculator):
    """A calculator that ends what asks it too often."""

    def __init__(self, model: dpt_hpc.Model) -> None:
        super().__init__(model)
        self.left = EVALUATIONS

    def calculate(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError(f"not relaxed after {EVALUATIONS} evaluations")
        super().calculate(*arguments, **options)


def crystals(model: dpt_hpc.Model, dataset: Dataset, count: int, seed: int) -> list[tuple[str, Atoms]]:
    """Crystals of as many groups of DATASET, drawn at random, of the test part where it is known."""
    split = model.path.parent.parent / "split.npz"
    allowed = set(np.load(split)["test"].tolist()) if split.is_file() else None
    groups, taken = dataset.groups, set()
    found: list[tuple[str, Atoms]] = []
    for index in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        structure = dataset.get(index)
        known = set(structure.atomic_numbers.tolist()) <= set(model.card.elements)
        wanted = allowed is None or structure.structure_id in allowed
        if not (ATOMS[0] <= structure.num_atoms <= ATOMS[1] and known and wanted) or groups[index] in taken:
            continue
        taken.add(groups[index])
        atoms = Atoms(
            structure.atomic_numbers.numpy(),
            positions=structure.positions.numpy(),
            cell=structure.cell.numpy(),
            pbc=structure.pbc.numpy(),
        )
        found.append((structure.structure_id, atoms))
        if len(found) == count:
            break
    return found


def relax(model: dpt_hpc.Model, atoms: Atoms, *, cell: bool) -> dict[str, Any]:
    """One relaxation: the energies on its way, and where it ends."""
    atoms.calc = Limited(model)
    energies: list[float] = []
    began, before = time.monotonic(), atoms.get_volume()
    # FIRE copes with a cell, whose energy is stiff in some directions; its inertia may overshoot.
    relaxation = FIRE(FrechetCellFilter(atoms), logfile=None) if cell else BFGSLineSearch(atoms, logfile=None)
    relaxation.attach(lambda: energies.append(atoms.get_potential_energy()))
    failed = None
    try:
        relaxation.run(fmax=LARGEST_FORCE, steps=EVALUATIONS)
    except (RuntimeError, dpt_hpc.errors.DataError) as error:
        failed = str(error).partition("\n")[0]
    rises = np.diff(energies)
    forces = model.predict(atoms).forces
    return {
        "energy_change": (energies[-1] - energies[0]) / len(atoms),
        "largest_rise": float(max(rises.max(initial=0.0), 0.0)),
        "monotonic": bool((rises <= NOISE).all()),
        "largest_force": float(np.linalg.norm(forces, axis=1).max()),
        "volume_ratio": atoms.get_volume() / before,
        "steps": relaxation.nsteps,
        "evaluations": EVALUATIONS - max(atoms.calc.left, 0),
        "seconds": time.monotonic() - began,
        "failed": failed,
    }


def relaxations(model: dpt_hpc.Model, chosen: Sequence[tuple[str, Atoms]]) -> list[dict[str, Any]]:
    found = []
    for name, original in chosen:
        row: dict[str, Any] = {"structure": name, "formula": original.get_chemical_formula(), "atoms": len(original)}
        for cell in (False, True):
            atoms = original.copy()
            atoms.rattle(0.05, seed=1)
            row["force_before"] = float(np.linalg.norm(model.predict(atoms).forces, axis=1).max())
            row["atoms_and_cell" if cell else "atoms_alone"] = relax(model, atoms, cell=cell)
        found.append(row)
        a, c = row["atoms_alone"], row["atoms_and_cell"]
        print(
            f"{row['formula']:>18} {row['force_before']:6.2f} | atoms {a['largest_force']:.3f} eV/Å in {a['steps']}, "
            f"{'falls' if a['monotonic'] else 'RISES'} | and cell {c['largest_force']:.3f} in {c['steps']:3d}, "
            f"{'falls' if c['monotonic'] else 'rises'}, volume x {c['volume_ratio']:.3f}",
            flush=True,
        )
    return found


def trajectory(model: dpt_hpc.Model, atoms: Atoms, steps: int, femtoseconds: float, kelvin: float) -> dict[str, Any]:
    """At constant energy, from `atoms` as they are, with velocities of twice the temperature that is to come."""
    atoms = atoms.copy()
    atoms.calc = DPTCalculator(model)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * kelvin, rng=np.random.default_rng(0))
    Stationary(atoms)
    total, kinetic, began = [], [], time.monotonic()
    for _ in VelocityVerlet(atoms, femtoseconds * units.fs).irun(steps):
        kinetic.append(atoms.get_temperature())
        total.append(atoms.get_total_energy() / len(atoms))
    energies = np.array(total) * 1e3
    picoseconds = np.arange(len(energies)) * femtoseconds / 1e3
    slope, start = np.polyfit(picoseconds, energies, 1)
    return {
        "formula": atoms.get_chemical_formula(),
        "atoms": len(atoms),
        "steps": steps,
        "femtoseconds": femtoseconds,
        "mean_temperature": float(np.mean(kinetic)),
        "drift_meV_per_atom_per_ps": float(slope),
        "deviation_meV_per_atom": float((energies - slope * picoseconds - start).std()),
        "largest_step_meV_per_atom": float(np.abs(np.diff(energies)).max()),
        "change_meV_per_atom": float(energies[-1] - energies[0]),
        "steps_per_second": steps / (time.monotonic() - began),
    }


def elasticity(model: dpt_hpc.Model, original: Atoms, strain: float = 2e-3) -> dict[str, Any]:
    """Bulk modulus in GPa, from the pressure and from the energy, of a cell that is not relaxed."""
    pressures, energies = [], []
    for step in (-1, 0, 1):
        atoms = original.copy()
        atoms.set_cell(atoms.cell * (1 + step * strain), scale_atoms=True)
        atoms.calc = DPTCalculator(model)
        energies.append(atoms.get_potential_energy())
        pressures.append(-atoms.get_stress()[:3].mean())
    volumes = original.get_volume() * (1 + strain * np.array([-1, 0, 1])) ** 3
    from_stress = -volumes[1] * (pressures[2] - pressures[0]) / (volumes[2] - volumes[0])
    curvature = 2 * np.polyfit(volumes - volumes[1], energies, 2)[0]
    return {
        "formula": original.get_chemical_formula(),
        "from_stress": from_stress * GPA_PER_EV_A3,
        "from_energy": volumes[1] * curvature * GPA_PER_EV_A3,
    }


def supercells(model: dpt_hpc.Model, chosen: Sequence[tuple[str, Atoms]]) -> dict[str, Any]:
    """Energy per atom of two cells against one, and the difference of the forces."""
    energies, forces = [], []
    for _, atoms in chosen:
        one, two = model.predict(atoms), model.predict(atoms * (2, 1, 1))
        energies.append((two.energy / 2 - one.energy) / len(atoms) * 1e3)
        forces.append(np.abs(two.forces[: len(atoms)] - one.forces).max())
    return {
        "mean_energy_difference_meV_per_atom": float(np.abs(energies).mean()),
        "largest_energy_difference_meV_per_atom": float(np.abs(energies).max()),
        "largest_force_difference_eV_per_A": float(np.max(forces)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--crystals", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--timestep", type=float, default=1.0, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = dpt_hpc.load(arguments.model, dtype="float64")
    dataset = Dataset.open(arguments.dataset, verify=False)
    chosen = crystals(model, dataset, arguments.crystals, arguments.seed)
    options = model.card.options
    print(f"{options.name}, cutoff {options.cutoff} Å; {len(chosen)} crystals of {arguments.dataset.name}")

    rows = relaxations(model, chosen)
    # From a relaxed crystal, doubled: its own minimum, so that the temperature is that of a solid.
    relaxed = chosen[0][1].copy()
    relax(model, relaxed, cell=False)
    run = trajectory(model, relaxed * (2, 1, 1), arguments.steps, arguments.timestep, arguments.temperature)
    elastic = [elasticity(model, atoms) for _, atoms in chosen[:5]]
    doubled = supercells(model, chosen)

    summary = {
        kind: {
            "energy_fell_in_every_step": sum(row[kind]["monotonic"] for row in rows),
            "energy_lower_at_the_end": sum(row[kind]["energy_change"] < 0 for row in rows),
            f"force_below_{LARGEST_FORCE}": sum(row[kind]["largest_force"] < LARGEST_FORCE for row in rows),
            "of": len(rows),
            "median_steps": float(np.median([row[kind]["steps"] for row in rows])),
        }
        for kind in ("atoms_alone", "atoms_and_cell")
    }
    for kind, counts in summary.items():
        print(kind, ", ".join(f"{name} {value:g}" for name, value in counts.items()))
    print("trajectory", ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items()))
    for row in elastic:
        print(
            f"bulk modulus {row['formula']}: {row['from_stress']:.2f} GPa (stress), {row['from_energy']:.2f} (energy)"
        )
    print("supercells", ", ".join(f"{name} {value:.3g}" for name, value in doubled.items()))
    if arguments.out:
        results = {
            **facts(),
            "model": {"name": model.path.name, "network": options.name, "cutoff": options.cutoff},
            "envelope": getattr(options, "envelope", None),
            "dataset": arguments.dataset.name,
            "summary": summary,
            "relaxations": rows,
            "trajectory": run,
            "elasticity": elastic,
            "supercells": doubled,
        }
        write(arguments.out, results)


if __name__ == "__main__":
    main()
