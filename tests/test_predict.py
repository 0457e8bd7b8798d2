"""Predictions of any structures: the same numbers as the evaluation, in batches, streams and files; clear refusals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from pymatgen.core import Lattice, Molecule
from pymatgen.core import Structure as Crystal
from small_runs import Options, finetune_options, run
from test_cli import fails

import dpt_hpc
from dpt_hpc.cli import run_command_line
from dpt_hpc.data.progress import Progress, count_structures
from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.models import predict_noise
from dpt_hpc.structure import Batch, Structure
from dpt_hpc.train.checkpoint import load_card, load_weights
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.use import as_structure

CU = {"lattice": Lattice.cubic(3.6), "species": ["Cu"] * 4}
FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]


@pytest.fixture(scope="module")
def model(finished: tuple[Options, Path]) -> dpt_hpc.Model:
    return dpt_hpc.load(finished[1])


def of(model: dpt_hpc.Model, symbol: str, **cell: object) -> Atoms:
    """A crystal of one element, rattled."""
    atoms = ase.build.bulk(symbol, cubic=True)
    atoms.rattle(0.05, seed=3)
    return atoms


def same(a: dpt_hpc.use.Predicted, b: dpt_hpc.use.Predicted) -> None:
    """Up to the rounding of float32: a batch is not one structure."""
    assert a.energy == pytest.approx(b.energy, abs=1e-4)
    for name in ("forces", "stress"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-5)


def test_predictions_are_those_of_the_evaluation(
    finished: tuple[Options, Path], model: dpt_hpc.Model, small_dataset: Path, tmp_path: Path
) -> None:
    evaluate_checkpoint(str(finished[1]), (str(small_dataset),), out=tmp_path / "e")
    known = np.load(tmp_path / "e" / "predictions_test.npz")
    found = model.predict(small_dataset)
    assert [p.structure_id for p in found] == known["structure_ids"].tolist()
    np.testing.assert_allclose([p.energy for p in found], known["energy_pred"], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p.forces for p in found]), known["forces_pred"], atol=2e-5)
    np.testing.assert_allclose(np.stack([p.stress for p in found]), known["stress_pred"], atol=2e-5)


def test_a_property_comes_with_its_unit(finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path) -> None:
    options, _ = finished
    finetune(finetune_options(options, tmp_path / "run", seeds=[0]), Ranks(), quiet=True)
    network = dpt_hpc.load(tmp_path / "run" / "seed_0")
    assert network.units == {"volume_per_atom": "A^3"}
    evaluate_checkpoint(str(network.path), (str(small_dataset),), out=tmp_path / "e")
    known = np.load(tmp_path / "e" / "predictions_test.npz")["target_pred"]
    found = network.predict(small_dataset)
    np.testing.assert_allclose([p.properties["volume_per_atom"] for p in found], known, rtol=1e-5)
    assert (found[0].energy, found[0].forces, found[0].stress) == (None, None, None)
    out = tmp_path / "volumes.csv"
    run_command_line(["predict", str(tmp_path / "run" / "seed_0"), str(small_dataset), "-o", str(out), "-q"])
    rows = list(csv.DictReader(out.open()))
    np.testing.assert_allclose([float(r["volume_per_atom (A^3)"]) for r in rows], known, rtol=1e-5)
    with pytest.raises(DataError, match=r"energies per atom: .* gives volume_per_atom, no energy"):
        network.predict(small_dataset, energies=True)


@pytest.mark.parametrize("sign", ["paper", "physical"])
def test_noise_points_away_from_equilibrium(sign: str, finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, _ = finished
    objective = {"kind": "derivative_denoising", "sign": sign}
    path = run(options, tmp_path / "run", objective=objective, training={"epochs": 1, "batch_size": 12})
    network = dpt_hpc.load(path)
    assert list(network.units) == ["noise"]
    atoms = of(network, "Si")
    found = network.predict(atoms)
    energies = replace(network.card, trained_on={"objective": {"kind": "derivatives"}})
    forces = dpt_hpc.Model(network.network, energies, path).predict(atoms).forces
    np.testing.assert_array_equal(found.noise, forces if sign == "paper" else -forces)
    assert found.energy is None


def test_the_noise_of_a_head_is_in_angstroms(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, _ = finished
    objective = {"kind": "head_denoising", "noise_scale": 0.04}
    path = run(options, tmp_path / "run", objective=objective, training={"epochs": 1, "batch_size": 12})
    network = dpt_hpc.load(path)
    ours = as_structure(of(network, "Si"))
    head = predict_noise(network.network, Batch.from_structures([ours]))
    np.testing.assert_allclose(network.predict(ours).noise, 0.04 * head.detach().numpy(), rtol=1e-5)


def test_every_kind_of_structure_is_taken(model: dpt_hpc.Model, tmp_path: Path) -> None:
    crystal = Crystal(coords=FCC, **CU).perturb(0.05)
    atoms = Atoms("Cu4", positions=crystal.cart_coords, cell=crystal.lattice.matrix, pbc=True)
    ours = Structure(
        torch.tensor(atoms.positions), torch.tensor(atoms.cell[:]), torch.tensor([True] * 3), torch.tensor([29] * 4)
    )
    ase.io.write(tmp_path / "a.extxyz", [atoms, atoms])
    crystal.to(str(tmp_path / "b.cif"))
    first = model.predict(atoms)
    for what in (crystal, ours, tmp_path / "a.extxyz", str(tmp_path / "b.cif"), [crystal, tmp_path / "a.extxyz"]):
        found = model.predict(what)
        for one in found if isinstance(found, list) else [found]:
            same(one, first)
    assert [p.structure_id for p in model.predict(tmp_path)] == ["a.extxyz:0", "a.extxyz:1", "b"]
    assert len(model.predict([])) == 0
    assert model.predict(atoms, forces=False, stress=False).forces is None


def test_batches_change_nothing(model: dpt_hpc.Model, small_dataset: Path, finished: tuple[Options, Path]) -> None:
    every = model.predict(small_dataset, energies=True)
    one_by_one = dpt_hpc.load(finished[1], edge_budget=1).predict(small_dataset, energies=True)
    for a, b in zip(every, one_by_one, strict=True):
        same(a, b)
        np.testing.assert_allclose(a.energies, b.energies, atol=1e-4)
        assert a.energies.sum() == pytest.approx(a.energy, abs=1e-9)


def test_a_batch_that_is_denser_than_expected_is_divided(
    finished: tuple[Options, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = dpt_hpc.load(finished[1], edge_budget=40)
    sizes = []
    actual = network._predict
    monkeypatch.setattr(
        network, "_predict", lambda part, *rest, **how: sizes.append(len(part)) or actual(part, *rest, **how)
    )
    # Clusters in large cells: at the mean density of the cell none would have a neighbour.
    cells = [ase.build.bulk("Cu", cubic=True) for _ in range(8)]
    for atoms in cells:
        atoms.set_cell([30, 30, 30])
    found = network.predict(cells)
    assert len(found) == 8
    assert max(sizes) < 8
    same(found[0], network.predict(cells[0]))


def test_embeddings_are_features_that_no_rotation_changes(
    model: dpt_hpc.Model, small_dataset: Path, tmp_path: Path
) -> None:
    atoms = of(model, "Si")
    found = model.embed(atoms)
    assert found.atoms.shape == (8, model.network.num_scalars)
    np.testing.assert_allclose(found.structure, found.atoms.mean(0))
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    np.testing.assert_allclose(model.embed(turned * (2, 1, 1)).structure, found.structure, atol=1e-5)
    out = tmp_path / "f.npz"
    run_command_line(["embed", str(model.path), str(small_dataset), "-o", str(out), "--atoms", "-q"])
    arrays = np.load(out)
    known = model.embed(small_dataset)
    np.testing.assert_array_equal(arrays["structures"], np.stack([e.structure for e in known]))
    np.testing.assert_array_equal(arrays["atoms"], np.concatenate([e.atoms for e in known]))
    assert arrays["structure_ids"].tolist() == [e.structure_id for e in known]
    assert arrays["num_atoms"].sum() == len(arrays["atomic_numbers"]) == len(arrays["atoms"])
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]


def test_files_hold_what_was_predicted(
    model: dpt_hpc.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [of(model, "Cu"), of(model, "Si")]
    frames[0].info["structure_id"] = '=a "b<script>'
    ase.io.write(tmp_path / "in.extxyz", frames)
    known = model.predict(tmp_path / "in.extxyz", energies=True)
    for name in ("out.extxyz", "out.csv", "out.json"):
        command = ["predict", str(model.path), str(tmp_path / "in.extxyz"), "-o", str(tmp_path / name), "--energies"]
        run_command_line([*command, "--json"])
        summary = json.loads(capsys.readouterr().out)
        assert (summary["structures"], summary["atoms"], summary["warnings"]) == (2, 12, 0)
        assert summary["units"]["energy"] == "eV, total of the cell"
    for atoms, before, predicted in zip(ase.io.read(tmp_path / "out.extxyz", ":"), frames, known, strict=True):
        np.testing.assert_allclose(atoms.positions, before.positions, atol=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(predicted.energy, rel=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), predicted.forces, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(atoms.get_stress(voigt=False), predicted.stress, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(atoms.get_potential_energies(), predicted.energies, rtol=1e-6)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [r["formula"] for r in rows] == ["Cu4", "Si8"]
    assert rows[0]["structure_id"].startswith("'=a")  # no spreadsheet computes it
    assert float(rows[1]["energy_eV"]) == pytest.approx(known[1].energy, rel=1e-8)
    assert float(rows[1]["stress_xy_eV_per_A3"]) == pytest.approx(known[1].stress[0, 1], rel=1e-6)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [s["num_atoms"] for s in found["structures"]] == [4, 8]
    np.testing.assert_allclose(found["structures"][1]["forces"], known[1].forces)


def test_an_exported_model_is_the_same_model(
    finished: tuple[Options, Path], model: dpt_hpc.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = finished
    atoms = of(model, "Cu")
    for out in (tmp_path / "model", tmp_path / "model.safetensors"):
        run_command_line(["export", str(path), "-o", str(out)])
        again = dpt_hpc.load(out)
        assert all(torch.equal(v, load_weights(path)[k]) for k, v in again.network.state_dict().items())
        assert again.predict(atoms).energy == model.predict(atoms).energy
        results = json.loads((path / "results.json").read_text())
        assert again.card.training["test"] == results["test"]
        assert str(path.parent) not in again.card.text()
        assert "is there already" in fails(capsys, 1, "export", str(path), "-o", str(out))
        run_command_line(["export", str(path), "-o", str(out), "--force"])
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.safetensors", "model.yaml"]
    assert evaluate_checkpoint(str(tmp_path / "model.safetensors"), tuple(load_card(path).config["data"]["path"]))


def test_float64_is_asked_for_at_loading(finished: tuple[Options, Path], model: dpt_hpc.Model) -> None:
    double = dpt_hpc.load(finished[1], dtype="float64")
    assert double.dtype == torch.float64
    same(double.predict(of(model, "Cu")), model.predict(of(model, "Cu")))
    with pytest.raises(ConfigError, match="dtype is 'half', expected float32 or float64"):
        dpt_hpc.load(finished[1], dtype="half")
    with pytest.raises(ConfigError, match="device is 'gpu', expected auto, cpu, cuda"):
        dpt_hpc.load(finished[1], device="gpu")
    with pytest.raises(ConfigError, match="edge_budget is 0"):
        dpt_hpc.load(finished[1], edge_budget=0)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="torch finds no GPU here"):
            dpt_hpc.load(finished[1], device="cuda")


DISORDERED = Crystal(Lattice.cubic(4), [{"Cu": 0.5, "Ni": 0.5}], [[0, 0, 0]])
NOT_FINITE = Atoms("Cu", positions=[[np.nan, 0, 0]], cell=[3, 3, 3], pbc=True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Atoms("Xe", cell=[5, 5, 5], pbc=True), r"structure: contains Xe, unknown to .*\n.*random weights"),
        (Atoms("Cf", cell=[5, 5, 5], pbc=True), r"contains Cf, unknown to"),
        (Atoms("Og", cell=[5, 5, 5], pbc=True), r"contains Og, beyond the 100 elements"),
        (Atoms("X", cell=[5, 5, 5], pbc=True), r"atomic number 0 is no element \(1 to 118\)"),
        (Atoms(cell=[5, 5, 5], pbc=True), r"structure: has no atoms"),
        (NOT_FINITE, r"positions\[0, 0\] is nan, expected a finite number"),
        (Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.001]], cell=[3, 3, 3], pbc=True), r"are 0\.001 Å apart"),
        (Atoms("Cu", cell=[3, 3, 0], pbc=True), r"structure: cell: expected periodic vectors that span a volume"),
        (Atoms("Cu", cell=[1e-3, 3, 3], pbc=True), r"structure: "),
        (DISORDERED, r"structure: is disordered \(partial occupancy\)"),
        (3, r"structure: is a builtins\.int, which is no structure"),
        ([Atoms("Cu", cell=[3, 3, 3], pbc=True), {"a": 1}], r"structure 1: is a builtins\.dict"),
    ],
)
def test_what_cannot_be_answered_is_refused(what: object, message: str, model: dpt_hpc.Model) -> None:
    with pytest.raises(DataError, match=message):
        model.predict(what)


def test_doubtful_structures_are_answered_with_a_warning(finished: tuple[Options, Path]) -> None:
    network = dpt_hpc.load(finished[1], allow_unknown_elements=True)
    close = Atoms("CuSi", positions=[[0, 0, 0], [0, 0, 0.3]], cell=[4, 4, 4], pbc=True)
    with pytest.warns(UserWarning, match=r"close atoms: 0 and 1 \(Cu and Si\), 0\.3 Å apart: a unit other than Å"):
        network.predict(close)
    far = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 8]], cell=[30, 30, 30], pbc=True)
    with pytest.warns(
        UserWarning, match=r"no neighbour: there is no atom within 4 Å of 0 \(Cu\), 1 \(Cu\), and so no force on them"
    ):
        found = network.predict(far)
    assert not found.forces.any()
    with pytest.warns(UserWarning, match="new elements: the network was not trained on Xe"):
        network.predict(Atoms("Xe2", positions=[[0, 0, 0], [0, 0, 3]], cell=[5, 5, 6], pbc=True))
    with pytest.warns(UserWarning, match="not periodic: it has no stress"):
        found = network.predict(Molecule(["Cu", "Cu"], [[0, 0, 0], [0, 0, 2.3]]))
    assert found.stress is None
    assert found.forces is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.predict(of(network, "Cu"))


def test_broken_files_are_named_and_leave_nothing(
    model: dpt_hpc.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.extxyz"
    ase.io.write(good, [of(model, "Cu"), Atoms("Xe", cell=[9, 9, 9], pbc=True), of(model, "Si")])
    (tmp_path / "empty.cif").touch()
    (tmp_path / "half.extxyz").write_text(good.read_text()[:200])
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "double.extxyz").write_text(
        '2\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nCu 0 0 0\nCu 0 0 0\n'
    )
    out = tmp_path / "out" / "o.csv"
    command = ["predict", str(model.path)]

    def told(code: int, *files: Path) -> str:
        return fails(capsys, code, *command, *map(str, files), "-o", str(out))

    assert "good.extxyz:1: contains Xe, unknown to" in told(3, good)
    assert "empty.cif: is empty." in told(3, tmp_path / "empty.cif")
    assert "half.extxyz: record 0: the file ends within the record" in told(3, tmp_path / "half.extxyz")
    assert "none.json: is empty" in told(3, tmp_path / "none.json")
    assert "double.extxyz:0: atoms 1 and 0 are 0 Å apart" in told(3, tmp_path / "double.extxyz")
    assert "nowhere.cif: no such file" in told(3, tmp_path / "nowhere.cif")
    assert not out.parent.exists() or not list(out.parent.iterdir())
    run_command_line([*command, str(good), str(tmp_path / "double.extxyz"), "-o", str(out), "--skip-broken"])
    captured = capsys.readouterr()
    assert "left out: good.extxyz:1: contains Xe" in captured.err
    assert "left out: double.extxyz:0: atoms 1 and 0" in captured.err
    assert "2 structures, 12 atoms" in captured.out
    assert "2 left out" in captured.out
    run_command_line([*command, str(good), "-o", str(out), "--force", "--allow-unknown-elements"])
    captured = capsys.readouterr()
    assert "warning: good.extxyz:1: new elements: the network was not trained on Xe" in captured.err
    assert len(list(csv.DictReader(out.open()))) == 3


def test_a_wrong_request_is_told_before_anything_is_computed(
    model: dpt_hpc.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.extxyz"
    ase.io.write(good, of(model, "Cu"))
    command = ["predict", str(model.path), str(good), "-o"]
    assert "expected a name that ends with .extxyz, .xyz, .csv, .json" in fails(capsys, 1, *command, "a.txt")
    assert "is one of the files to read" in fails(capsys, 1, *command, str(good))
    assert "--dtype float16: expected one of float32, float64" in fails(
        capsys, 1, *command, "a.csv", "--dtype", "float16"
    )
    assert "expected a name that ends with .npz" in fails(capsys, 1, "embed", str(model.path), str(good), "-o", "a.csv")
    assert "no such file or directory" in fails(capsys, 3, "predict", "nowhere", str(good), "-o", "a.csv")


def test_progress_knows_the_end(model: dpt_hpc.Model, small_dataset: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", [of(model, "Cu")] * 3)
    ase.io.write(tmp_path / "b.cif", of(model, "Cu"))
    assert count_structures([tmp_path, small_dataset]) == 3 + 1 + 48
    (tmp_path / "c.json").write_text("[]")
    assert count_structures([tmp_path]) is None
    progress = Progress(4, quiet=True)
    progress.step()
    progress.started -= 10
    assert progress.line().startswith("1 of 4 structures, 0.1/s, 0:00:3")
    assert "left (until " in progress.line()


LIGHT = """
import sys, dpt_hpc
assert not {"torch", "numpy", "yaml"} & set(sys.modules), "import dpt_hpc is light"
assert dpt_hpc.load.__name__ == "load"
assert not {"ase", "pymatgen", "deepspeed", "typer"} & set(sys.modules), "structures in memory need neither"
"""


def test_the_package_imports_at_once() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = dpt_hpc.laod


MEASURED = """
import resource, sys
from pathlib import Path
import dpt_hpc
from dpt_hpc.use.work import predict_files
model = dpt_hpc.load(sys.argv[1], edge_budget=20_000)
peaks = []
for name in ("few", "many"):
    files, out = [sys.argv[2] + name + ".extxyz"], Path(sys.argv[2] + name + ".json")
    summary = predict_files(model, files, out, forces=False, stress=False, quiet=True)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(summary["structures"], peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_structures(model: dpt_hpc.Model, tmp_path: Path) -> None:
    """10,000 structures in the memory that 1,000 need."""
    ase.io.write(tmp_path / "one.extxyz", ase.build.bulk("Cu"))
    text = (tmp_path / "one.extxyz").read_text()
    for name, count in (("few", 1000), ("many", 10_000)):
        (tmp_path / f"{name}.extxyz").write_text(text * count)
    arguments = [sys.executable, "-c", MEASURED, str(model.path), f"{tmp_path}/"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    structures, more = done.stdout.split()
    assert int(structures) == 10_000
    assert float(more) < 4, "MB"
