"""Denoising by a head, and denoising mixed with labels: losses, units, masks and runs."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Options, config_of, of_steps, records, run, same_weights, small_options

from dpt_hpc import load
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import CGCNNOptions, ModelOptions, TorchMDETOptions, predict, predict_noise
from dpt_hpc.structure import Batch
from dpt_hpc.train.checkpoint import find_checkpoint
from dpt_hpc.train.config import (
    DenoisingOptions,
    DerivativesOptions,
    HeadDenoisingOptions,
    MixedOptions,
    ObjectiveOptions,
    PropertyOptions,
    SplitOptions,
)
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.finetune import load_pretrained
from dpt_hpc.train.objective import Objective, build_network, build_objective
from dpt_hpc.train.parts import make_split
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks

CGCNN = CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8)
ET_SIZES: Options = {"cutoff": 4.0, "hidden": 16, "layers": 2, "heads": 2, "radial": 12, "readout_hidden": 16}
ET = TorchMDETOptions(**ET_SIZES)
SEED = 3


def objective_of(options: ObjectiveOptions, model: ModelOptions = CGCNN, denoised: tuple[range, ...] = ()) -> Objective:
    torch.manual_seed(0)
    return build_objective(build_network(model, options).double(), options, SEED, denoised)


def batch_of(dataset: Path, *indices: int) -> Batch:
    return Dataset.open(dataset).read(np.array(indices), dtype=torch.float64)


def loss_and_metrics(objective: Objective, batch: Batch) -> tuple[float, dict[str, float]]:
    """Of a whole step of one batch in training mode, and as they are reported."""
    loss, sums = objective.train()(batch, 1, objective.counts(batch))
    return float(loss.detach()), objective.metrics_of({k: float(v) for k, v in sums.items()})


@pytest.mark.parametrize("kind", ["mse", "mae"])
def test_the_head_learns_noise_of_unit_variance_and_reports_angstroms(kind: Any, small_dataset: Path) -> None:
    options = HeadDenoisingOptions(loss=kind)
    assert options.noise_scale == 0.04
    objective: Any = objective_of(options, ET)
    batch = batch_of(small_dataset, 0, 5, 9)
    predicted, noise, mask = objective.train().predictions(batch, 1)["noise"]
    assert mask.all()
    assert float(noise.std()) == pytest.approx(0.04, rel=0.4)
    output = predict_noise(objective.model, replace(batch, positions=batch.positions + noise))
    difference = output - noise / 0.04
    expected = difference.square().mean() if kind == "mse" else difference.abs().mean()
    loss, metrics = loss_and_metrics(objective, batch)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    assert metrics.keys() == {"loss", "noise_mae"}
    assert metrics["loss"] == pytest.approx(loss, rel=1e-10)
    assert metrics["noise_mae"] == pytest.approx(float((predicted - noise).detach().abs().mean()), rel=1e-10)


def test_squares_are_an_option_of_derivative_denoising(small_dataset: Path) -> None:
    batch = batch_of(small_dataset, 0, 5)
    objective = objective_of(DenoisingOptions(loss="mse"))
    predicted, true, _ = objective.train().predictions(batch, 1)["noise"]
    loss, metrics = loss_and_metrics(objective, batch)
    assert loss == pytest.approx(float((predicted - true).detach().square().mean()), rel=1e-10)
    assert metrics["noise_mae"] == pytest.approx(float((predicted - true).detach().abs().mean()), rel=1e-10)


def without_labels(dataset: Path, out: Path, single: set[int]) -> Path:
    """The structures of `dataset` without labels; of those in `single` only the first atom is left."""
    items = [Dataset.open(dataset).get(i) for i in range(48)]
    items = [replace(s, energy=None, forces=None, stress=None, properties={}) for s in items]
    for i in single:
        items[i] = replace(items[i], positions=items[i].positions[:1], atomic_numbers=items[i].atomic_numbers[:1])
    write_dataset(items, out, provenance={}, property_units={})
    return out


@pytest.mark.parametrize("options", [DenoisingOptions(), HeadDenoisingOptions(), MixedOptions()])
def test_noise_of_one_atom_does_not_count(options: ObjectiveOptions, small_dataset: Path, tmp_path: Path) -> None:
    dataset = without_labels(small_dataset, tmp_path / "single", {1, 2})
    objective = objective_of(options, ET if isinstance(options, HeadDenoisingOptions) else CGCNN)
    for training in (True, False):
        objective.train(training)
        found = []
        for batch in (batch_of(dataset, 0, 5), batch_of(dataset, 1, 0, 2, 5)):
            counts = objective.counts(batch)
            assert counts["noise"] == 3 * sum(n for n in batch.atoms_per_structure.tolist() if n > 1) > 0
            loss, sums = objective(batch, 1, counts)
            found.append((float(loss.detach()), float(sums["noise_error"]), float(sums["noise_count"])))
        assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_run_tells_what_it_cannot_denoise(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = small_options(without_labels(small_dataset, tmp_path / "single", {1, 2, 7}))
    content["objective"] = {"kind": "derivative_denoising"}
    content["training"]["epochs"] = 1
    pretrain(config_of(content, tmp_path / "run"), Ranks())
    assert "  3 of the structures to denoise have one atom, which moves with all its images" in capsys.readouterr().out


@pytest.mark.parametrize("options", [HeadDenoisingOptions(), MixedOptions(forces_weight=0, stress_weight=0)])
def test_a_part_of_single_atoms_is_refused(options: ObjectiveOptions, small_dataset: Path, tmp_path: Path) -> None:
    alone = without_labels(small_dataset, tmp_path / "single", set(range(48)))
    labelled = Dataset.open(small_dataset)
    items = [replace(labelled.get(i), structure_id=f"labelled {i}", properties={}) for i in range(48)]
    write_dataset(items, tmp_path / "labelled", provenance={}, property_units={})
    split = SplitOptions(train=0.5, validation=0.25, test=0.25, by="structure")
    paths = [str(alone), *([str(tmp_path / "labelled")] if options.kind == "mixed" else [])]
    message = rf"kind is {options.kind}, but all structures of the train part that are denoised have one atom\."
    with pytest.raises(DataError, match=message):
        make_split(Dataset.open(paths), split, options, 0, paths)


@pytest.mark.parametrize("kind", ["mse", "mae"])
def test_mixed_is_both_objectives_each_on_its_own_structures(kind: Any, partly_labelled: Path) -> None:
    """One forward pass gives the loss, and the gradient, of two: structures 0, 3, 6 have no labels."""
    mixed = MixedOptions(denoising_weight=3.0, noise_scale=0.05, stiffness=2.0, loss=kind)
    together = objective_of(mixed)
    loss, sums = together.train()(batch := batch_of(partly_labelled, 0, 1, 2, 3, 4, 6), 1, together.counts(batch))
    loss.backward()

    labels = objective_of(DerivativesOptions())
    labelled = batch_of(partly_labelled, 1, 2, 4)
    first, of_labels = labels.train()(labelled, 1, labels.counts(labelled))
    first.backward()
    relaxed = batch_of(partly_labelled, 0, 3, 6)
    objective: Any = objective_of(DenoisingOptions(noise_scale=0.05))
    noise = objective.noise(relaxed, 1)
    moved = replace(relaxed, positions=relaxed.positions + noise)
    forces = predict(labels.model.train(), moved, stress=False).forces
    assert forces is not None
    off = forces + 2.0 * noise
    second = 3.0 * (off.square().mean() if kind == "mse" else off.abs().mean())
    second.backward()

    assert float(loss.detach()) == pytest.approx(float((first + second).detach()), rel=1e-10)
    assert float(sums["noise_error"]) == pytest.approx(float(off.detach().abs().sum()) / 2.0, rel=1e-10)
    for name in ("energy_error", "forces_error", "stress_error", "forces_count", "energy_per_atom_error"):
        assert float(sums[name]) == pytest.approx(float(of_labels[name]), rel=1e-10), name
    for a, b in zip(together.model.parameters(), labels.model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_labels_of_datasets_that_are_denoised_are_not_learnt(partly_labelled: Path) -> None:
    batch = batch_of(partly_labelled, 0, 1, 4)
    objective: Any = objective_of(MixedOptions(denoise_datasets=("x",)), denoised=(range(4, 5),))
    assert objective.denoised(batch).tolist() == [True, False, True]
    atoms = batch.atoms_per_structure.tolist()
    assert objective.counts(batch) == {
        "energy": 1, "energy_per_atom": 1, "forces": 3 * atoms[1], "stress": 9, "noise": 3 * (atoms[0] + atoms[2])
    }  # fmt: skip
    found = objective.eval().predictions(batch, 1)
    assert found["energy"][2].tolist() == [False, True, False]
    noise = found["noise"][1]
    assert not noise[batch.batch == 1].any()
    assert noise[batch.batch != 1].all()


@pytest.mark.parametrize("options", [HeadDenoisingOptions(), MixedOptions()], ids=lambda o: o.kind)
def test_micro_batches_and_ranks_change_no_gradient(options: ObjectiveOptions, partly_labelled: Path) -> None:
    """Parts of very unequal size, one of them empty, one of denoised structures only, one without any."""
    objective = objective_of(options, ET if options.kind == "head_denoising" else CGCNN).train()

    def gradient(parts: list[tuple[int, ...]]) -> list[torch.Tensor]:
        batches = [batch_of(partly_labelled, *part) for part in parts]
        counts = {k: sum(objective.counts(b)[k] for b in batches) for k in objective.terms}
        objective.zero_grad()
        for batch in batches:
            objective(batch, 1, counts)[0].backward()
        return [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    whole = gradient([tuple(range(12))])
    parts = gradient([(0, 3), (), (1, 2, 4), (5,), tuple(range(6, 12))])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_papers_sign_is_refused_beside_real_forces(small_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.sign: is 'paper', by which forces point away from equilibrium"):
        config_of(small_options(small_dataset), tmp_path, objective={"kind": "mixed", "sign": "paper"})


def test_mixed_without_anything_to_denoise_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    options = small_options(small_dataset) | {"objective": {"kind": "mixed"}}
    with pytest.raises(
        DataError, match=r"no structure of the train part is denoised: 0 of 48 have no energy.*\nSet .*max_force"
    ):
        run(options, tmp_path / "run")
    options["objective"]["denoise_datasets"] = ["relaxed"]
    with pytest.raises(DataError, match=r"denoise_datasets names 'relaxed', but data\.path has small\.\n"):
        run(options, tmp_path / "run")


def test_the_labels_of_a_mixed_run_must_be_there(partly_labelled: Path, tmp_path: Path) -> None:
    options = small_options(partly_labelled) | {"objective": {"kind": "mixed", "denoise_datasets": ["partly"]}}
    with pytest.raises(DataError, match=r"energy_weight is 1, but no structure of the dataset has energy"):
        run(options, tmp_path / "run")


def test_structures_at_rest_are_denoised_within_one_dataset(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the longest force of each; not those of one atom, whose forces vanish by symmetry. Their labels do not
    count: others give the same weights."""
    source = Dataset.open(small_dataset)
    items = [source.get(i) for i in range(48)]
    first = items[4]
    assert first.forces is not None
    one = {"positions": first.positions[:1], "atomic_numbers": first.atomic_numbers[:1]}
    items[4] = replace(first, **one, forces=torch.zeros(1, 3, dtype=torch.float64))
    items[5] = replace(items[5], forces=None)
    largest = [0.0 if s.forces is None else float(s.forces.norm(dim=1).max()) for s in items]
    limit = float(np.median(largest))
    write_dataset(items, tmp_path / "data", provenance={}, property_units={"volume_per_atom": "A^3"})
    expected = {i for i in range(48) if largest[i] <= limit and i not in (4, 5)}
    assert 15 < len(expected) < 30

    chosen = MixedOptions(denoise_max_force=limit)
    objective: Any = objective_of(chosen)
    batch = batch_of(tmp_path / "data", *range(48))
    assert set(np.flatnonzero(objective.denoised(batch)).tolist()) == expected
    assert not objective_of(MixedOptions()).denoised(batch).any()  # type: ignore[operator]

    options = small_options(tmp_path / "data")
    options["objective"] = {"kind": "mixed", "denoise_max_force": limit, "element_references": True}
    options["training"]["epochs"] = 1
    monkeypatch.setattr("dpt_hpc.train.parts.BLOCK", 7)
    path = run(options, tmp_path / "run")
    seen = np.load(path / "predictions_test.npz")
    tested = {str(name) for name in seen["structure_ids"]}
    places = {str(name): i for i, name in enumerate(Dataset.open(tmp_path / "data").structure_ids)}
    assert {places[str(seen["structure_ids"][i])] for i in set(seen["noise_structure"].tolist())} == {
        places[name] for name in tested if places[name] in expected
    }
    assert len(seen["energy_true"]) == sum(places[name] not in expected for name in tested)
    shares = json.loads((path / "results.json").read_text())["test"]
    assert {"noise_mae", "energy_mae", "forces_mae"} <= shares.keys()

    for i in expected:
        items[i] = replace(items[i], energy=1e3, stress=None)
    write_dataset(items, tmp_path / "others", provenance={}, property_units={"volume_per_atom": "A^3"})
    options["data"]["path"] = str(tmp_path / "others")
    same_weights(path, run(options, tmp_path / "again"))


def test_an_ambiguous_name_of_a_dataset_is_refused_and_a_resumed_run_denoises_the_same(
    small_dataset: Path, tmp_path: Path
) -> None:
    source = Dataset.open(small_dataset)
    for place, part in {"a/relaxed": range(0, 48, 2), "b/relaxed": range(1, 48, 2)}.items():
        items = [source.get(i) for i in part]
        write_dataset(items, tmp_path / place, provenance={}, property_units={"volume_per_atom": "A^3"})
    options = small_options(small_dataset)
    options["data"]["path"] = [str(tmp_path / "a" / "relaxed"), str(tmp_path / "b" / "relaxed")]
    options["objective"] = {"kind": "mixed", "denoise_datasets": ["relaxed"]}
    options["training"]["epochs"] = 1
    with pytest.raises(DataError, match=r"'relaxed', but data\.path has it 2 times: .*a/relaxed, .*b/relaxed\.\n"):
        run(options, tmp_path / "run")
    (tmp_path / "b" / "relaxed").rename(tmp_path / "b" / "forces")
    options["data"]["path"][1] = str(tmp_path / "b" / "forces")
    path = run(options, tmp_path / "run")
    (noted,) = json.loads((path / "run.json").read_text())["denoised"]
    assert noted["path"] == options["data"]["path"][0]
    (tmp_path / "a" / "relaxed").rename(tmp_path / "a" / "forces")
    (tmp_path / "b" / "forces").rename(tmp_path / "b" / "relaxed")
    options["data"]["path"] = [str(tmp_path / "a" / "forces"), str(tmp_path / "b" / "relaxed")]
    options["training"]["epochs"] = 2
    with pytest.raises(ConfigError, match="its denoised has changed since it began"):
        run(options, path, resume=True)


@pytest.mark.slow
def test_the_transformer_learns_to_denoise_by_its_head_and_goes_on_bit_for_bit(
    small_dataset: Path, tmp_path: Path
) -> None:
    """204 steps on real crystals; zero would have a loss of 1."""
    options = small_options(small_dataset)
    network = {"name": "torchmd_et", **ET_SIZES, "vector_norm": "whitened"}
    options |= {"model": network, "objective": {"kind": "head_denoising"}}
    options |= {"training": {"epochs": 17, "batch_size": 2}, "checkpoint": {}, "optimizer": {"learning_rate": 4e-3}}
    path = run(options, tmp_path / "whole")
    losses = [r["train"]["loss"] for r in records(path, "epoch")[1:]]
    assert np.isfinite(of_steps(path, "loss")).all()
    assert losses[-1] < 0.9

    broken = deepcopy(options)
    broken["training"]["epochs"] = 3
    run(broken, tmp_path / "broken")
    run(options, tmp_path / "broken", resume=True)
    same_weights(path, tmp_path / "broken")

    errors = evaluate_checkpoint(str(path), (str(small_dataset),), out=tmp_path / "out")
    assert errors.keys() == {"noise_mae"}
    saved = np.load(tmp_path / "out" / "predictions_test.npz")
    assert (
        saved["noise_true"].shape == saved["noise_pred"].shape == (int(Dataset.open(small_dataset).num_atoms.sum()), 3)
    )
    error = float(np.abs(saved["noise_true"] - saved["noise_pred"]).mean())
    assert error == pytest.approx(errors["noise_mae"], rel=1e-5)

    model = load(path)
    batch = Dataset.open(small_dataset).read(np.array([4]))
    expected = 0.04 * predict_noise(model.network, batch)
    found = model.predict(Dataset.open(small_dataset).get(4))
    assert found.noise is not None
    np.testing.assert_allclose(found.noise, expected.detach().numpy(), rtol=1e-5, atol=1e-8)
    assert found.forces is None

    # Fine-tuning reads no vectors: it may leave out their norm.
    taken = load_pretrained(build_network(ET, PropertyOptions(target="x")), ET, find_checkpoint(path))
    assert "network.vector_norm.weight" in taken.skipped
    assert all(name.startswith(("network.vector_norm.", "noise_head.")) for name in taken.skipped)


@pytest.mark.slow
def test_the_transformer_learns_to_denoise_by_derivatives(small_dataset: Path, tmp_path: Path) -> None:
    """204 steps on real crystals, by second derivatives of a network whose vectors may vanish: no number is lost."""
    options = small_options(small_dataset)
    options |= {"model": {"name": "torchmd_et", **ET_SIZES, "hidden": 8}, "checkpoint": {}}
    options |= {"training": {"epochs": 17, "batch_size": 2, "max_skipped_steps": 0}}
    path = run(options, tmp_path / "run", objective={"kind": "derivative_denoising"})
    assert len(of_steps(path, "loss")) == 204
    assert np.isfinite(of_steps(path, "loss")).all()
    assert np.isfinite(of_steps(path, "grad_norm")).all()
    losses = [r["train"]["loss"] for r in records(path, "epoch")[1:]]
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_mixes_two_datasets(small_dataset: Path, tmp_path: Path) -> None:
    """One with labels; one whose labels are not to be learnt. Both errors fall, and both are evaluated."""
    dataset = Dataset.open(small_dataset)
    structures = [dataset.get(i) for i in range(len(dataset))]
    paths = []
    for name, part in {"forces": structures[::2], "relaxed": structures[1::2]}.items():
        write_dataset(part, tmp_path / name, provenance={}, property_units={"volume_per_atom": "A^3"})
        paths.append(str(tmp_path / name))
    options = small_options(small_dataset)
    options["data"]["path"] = paths
    options["training"]["epochs"] = 6
    options["objective"] = {"kind": "mixed", "denoise_datasets": ["relaxed"], "element_references": True}
    path = run(options, tmp_path / "run")
    results = json.loads((path / "results.json").read_text())
    before, after = results["validation_before"], results["validation"]
    assert after.keys() == {"loss", "energy_mae", "energy_per_atom_mae", "forces_mae", "stress_mae", "noise_mae"}
    assert after["loss"] < before["loss"]
    assert after["noise_mae"] < before["noise_mae"]

    both = evaluate_checkpoint(str(path), tuple(paths), out=tmp_path / "out")
    saved = np.load(tmp_path / "out" / "predictions_test.npz")
    assert len(saved["energy_true"]) == 24
    assert set(saved["noise_structure"].tolist()) == set(range(24, 48))
    assert {"noise_mae", "forces_mae"} <= both.keys()
    assert evaluate_checkpoint(str(path), (paths[1],)).keys() == {"noise_mae"}
    assert "noise_mae" not in evaluate_checkpoint(str(path), (paths[0],))
