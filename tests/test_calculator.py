"""The calculator of ASE: derivatives by finite differences, ASE's signs and order, shares of the energy, refusals."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from calculator import elasticity, main, trajectory
from networks import NETWORKS
from small_runs import Options

from dpt_hpc import Model
from dpt_hpc.calculator import DPTCalculator
from dpt_hpc.errors import DataError
from dpt_hpc.models import ModelOptions, build_model
from dpt_hpc.train.card import ModelCard

ENERGIES = {"objective": {"kind": "derivatives"}}
EVERY_ELEMENT = tuple(range(1, 101))
EXACT = {name: options for name, options in NETWORKS.items() if name.endswith("exact")}


def model_of(options: ModelOptions, **trained_on: object) -> Model:
    """A network of random weights, in float64, that knows every element."""
    torch.manual_seed(5)
    network = build_model(options).double()
    network.set(scale=0.7, shift=0.3, element_references=torch.linspace(-2, 2, 119, dtype=torch.float64))
    return Model(network, ModelCard(options, EVERY_ELEMENT, ENERGIES | trained_on), Path("nowhere"))


def crystal() -> Atoms:
    """Three kinds of atoms in a sheared cell, nothing at its place."""
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    atoms.symbols[3] = "K"
    atoms.rattle(0.1, seed=2)
    atoms.set_cell(atoms.cell @ np.array([[1.02, 0.05, 0], [0, 0.97, 0.03], [0.02, 0, 1.0]]), scale_atoms=True)
    return atoms


def test_what_the_card_says_was_not_learnt_is_warned_of() -> None:
    options = EXACT["cgcnn, exact"]
    weights = {"energy_weight": 0, "forces_weight": 1, "stress_weight": 0}
    forces_only = model_of(options, objective={"kind": "derivatives", **weights})
    with pytest.warns(UserWarning, match=r"calculator: nowhere did not learn energy and stress: the loss of its"):
        DPTCalculator(forces_only)
    with pytest.warns(UserWarning, match=r"did not learn forces:"):
        DPTCalculator(model_of(options, objective={"kind": "derivatives", "forces_weight": 0.0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DPTCalculator(model_of(options, objective={"kind": "derivatives", "forces_weight": 1}))


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_forces_and_stress_are_derivatives_of_the_energy(options: ModelOptions) -> None:
    atoms = crystal()
    atoms.calc = DPTCalculator(model_of(options))
    forces, stress = atoms.get_forces(), atoms.get_stress()
    step = 1e-4
    for atom, axis in ((0, 0), (3, 1), (5, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.calc = atoms.calc
            moved.positions[atom, axis] += sign * step
            energies.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=2e-6)
    for component, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / (1 if i == j else 2)
            strain[j, i] = strain[i, j]
            strained = atoms.copy()
            strained.calc = atoms.calc
            strained.set_cell(atoms.cell @ strain, scale_atoms=True)
            energies.append(strained.get_potential_energy())
        assert stress[component] == pytest.approx(
            (energies[0] - energies[1]) / (2 * step) / atoms.get_volume(), abs=2e-6
        )
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_energies_of_atoms_add_up(options: ModelOptions) -> None:
    atoms = crystal()
    atoms.calc = DPTCalculator(model_of(options))
    energies = atoms.get_potential_energies()
    assert energies.shape == (8,)
    assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    alike = ase.build.bulk("Cu", "fcc", 3.6, cubic=True)
    alike.calc = atoms.calc
    np.testing.assert_allclose(alike.get_potential_energies(), alike.get_potential_energy() / 4, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cgcnn", "schnet", "painn"])
def test_where_the_read_out_is_a_sum_a_share_is_the_term_of_the_atom(name: str) -> None:
    options = NETWORKS[f"{name}, exact"]
    if name == "cgcnn":
        options = replace(options, readout_layers=0)  # type: ignore[call-arg]
    model = model_of(options)
    first, second = Atoms("Cu"), Atoms("AuAg", positions=[[0, 0, 0], [0, 0, 2.5]])
    both = first + Atoms("AuAg", positions=[[90, 0, 0], [90, 0, 2.5]])
    alone = [model.predict(a, energies=True).energies for a in (first, second)]
    together = model.predict(both, energies=True)
    # The constants of a structure belong to none of its atoms: they are divided evenly.
    constant = float(model.network.shift)
    if name == "cgcnn":
        constant += float(model.network.scale * model.network.network.output.bias.detach())
    expected = np.concatenate([alone[0] - constant, alone[1] - constant / 2]) + constant / 3
    np.testing.assert_allclose(together.energies, expected, atol=1e-7)


def test_a_mean_over_atoms_has_no_energies_of_atoms() -> None:
    atoms = crystal()
    atoms.calc = DPTCalculator(model_of(replace(NETWORKS["cgcnn, exact"], pooling="mean")))  # type: ignore[call-arg]
    with pytest.raises(PropertyNotImplementedError, match=r"takes the mean over its atoms.*\n.*model\.pooling=add"):
        atoms.get_potential_energies()
    assert np.isfinite(atoms.get_potential_energy())


def test_molecules_and_slabs() -> None:
    model = model_of(NETWORKS["cgcnn, exact"])
    water = Atoms("OH2", positions=[[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
    water.calc = DPTCalculator(model)
    with pytest.warns(UserWarning, match="not periodic: it has no stress"):
        forces = water.get_forces()
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        water.rattle(0.01)
        water.get_forces()
    with pytest.raises(PropertyNotImplementedError, match=r"stress: pbc is \[False, False, False\].*0 Å³"):
        water.get_stress()

    slab = ase.build.fcc111("Al", (1, 1, 3), vacuum=8.0)
    slab.calc = DPTCalculator(model)
    boxed = slab.copy()
    boxed.pbc = True  # 16 Å of vacuum are more than the cutoff: the same neighbours
    boxed.calc = DPTCalculator(model)
    assert slab.pbc.tolist() == [True, True, False]
    np.testing.assert_allclose(slab.get_forces(), boxed.get_forces(), atol=1e-10)
    np.testing.assert_allclose(slab.get_stress(), boxed.get_stress(), atol=1e-10)
    flat = slab.copy()
    flat.cell[2] = 0
    flat.calc = DPTCalculator(model)
    assert flat.get_potential_energy() == pytest.approx(boxed.get_potential_energy(), abs=1e-10)
    with pytest.raises(PropertyNotImplementedError, match="stress: pbc is"):
        flat.get_stress()


def test_float32_is_near_float64(finished: tuple[Options, Path]) -> None:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    found = []
    for dtype in ("float32", "float64"):
        atoms.calc = DPTCalculator(finished[1], dtype=dtype, allow_unknown_elements=True)
        found.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
        assert all(np.asarray(v).dtype == np.float64 for v in found[-1])
    for single, double in zip(*found, strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-5)


def test_a_relaxation_of_cell_and_atoms_runs(finished: tuple[Options, Path]) -> None:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = DPTCalculator(finished[1], allow_unknown_elements=True)
    energies = []
    relaxation = FIRE(FrechetCellFilter(atoms), logfile=None)
    relaxation.attach(lambda: energies.append(atoms.get_potential_energy()))
    relaxation.run(fmax=1e-6, steps=5)
    assert len(energies) == 6
    assert energies[-1] < energies[0]


@pytest.mark.filterwarnings("ignore")
def test_with_an_envelope_a_trajectory_keeps_its_energy() -> None:
    """Velocity Verlet on a smooth energy: half the step, a quarter of the deviation; no drift to be seen."""
    options = replace(NETWORKS["cgcnn, exact"], envelope="gate")  # type: ignore[call-arg]
    model = model_of(options)
    model.network.set(scale=20.0)
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=4)
    runs = [trajectory(model, atoms, int(20 / step), step, kelvin=300.0) for step in (1.0, 0.5)]
    assert runs[0]["mean_temperature"] > 50
    coarse, fine = (run["deviation_meV_per_atom"] for run in runs)
    assert coarse / fine == pytest.approx(4, rel=0.15)
    assert fine < 0.5


def test_the_bulk_modulus_of_stress_is_that_of_energy() -> None:
    options = replace(NETWORKS["cgcnn, exact"], envelope="gate")  # type: ignore[call-arg]
    found = elasticity(model_of(options), ase.build.bulk("Cu", cubic=True))
    assert found["from_stress"] == pytest.approx(found["from_energy"], rel=2e-2, abs=0.02)


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "calculator.json"
    command = ["calculator.py", str(finished[1]), str(small_dataset), "--crystals", "1", "--steps", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out)])
    monkeypatch.setattr("calculator.EVALUATIONS", 5)
    main()
    results = json.loads(out.read_text())
    assert results["summary"]["atoms_alone"]["of"] == 1
    assert results["relaxations"][0]["atoms_alone"]["evaluations"] <= 5
    assert results["trajectory"]["steps"] == 3


def test_only_a_network_of_energies_is_a_calculator() -> None:
    options = NETWORKS["cgcnn, exact"]
    gap = model_of(options, objective={"kind": "property", "target": "gap"}, unit="eV")
    with pytest.raises(DataError, match=r"calculator: nowhere gives gap, no energy.*\n.*pre-trained on energies"):
        DPTCalculator(gap)
    noise = model_of(options, objective={"kind": "derivative_denoising", "sign": "paper"})
    with pytest.raises(DataError, match="gives noise, no energy"):
        DPTCalculator(noise)


def test_what_cannot_be_answered_is_told(finished: tuple[Options, Path]) -> None:
    atoms = Atoms("CuCu", positions=[[0, 0, 0], [0, 0, 0.001]])
    atoms.calc = DPTCalculator(model_of(NETWORKS["cgcnn, exact"]))
    with pytest.raises(DataError, match=r"^structure: atoms 1 and 0 are 0\.001 Å apart, expected more than 0\.01 Å"):
        atoms.get_potential_energy()
    xenon = Atoms("Xe", cell=[5, 5, 5], pbc=True)
    xenon.calc = DPTCalculator(finished[1])
    with pytest.raises(
        DataError, match=r"contains Xe, unknown to .*\n.*random weights.*\n.*allow_unknown_elements=True"
    ):
        xenon.get_forces()
