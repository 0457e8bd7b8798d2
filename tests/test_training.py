"""Training: what a run leaves, what its weights are, and what it refuses."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import Options, of_steps, records, run, same_weights

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import DataError
from dpt_hpc.models import EnergyModel, predict
from dpt_hpc.structure import Batch, Structure
from dpt_hpc.train.checkpoint import load_card, load_model, load_state, load_weights
from dpt_hpc.train.config import DerivativesOptions
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.failures import DivergedError
from dpt_hpc.train.objective import build_objective


def test_a_run_leaves_everything_that_a_reader_needs(finished: tuple[Options, Path]) -> None:
    _, path = finished
    results = json.loads((path / "results.json").read_text())
    facts = json.loads((path / "run.json").read_text())
    assert results["validation_before"]["loss"] > results["validation"]["loss"]
    assert {"energy_mae", "energy_per_atom_mae", "forces_mae", "stress_mae"} <= results["test"].keys()
    assert facts["wall_seconds"] > 0
    assert facts["split"] == {"train": 24, "validation": 12, "test": 12}
    assert [r["epoch"] for r in records(path, "epoch")] == [0, 1, 2, 3]
    assert [r["step"] for r in records(path, "step")] == list(range(1, 16))
    predictions = np.load(path / "predictions_test.npz")
    assert predictions["forces_pred"].shape == predictions["forces_true"].shape == (predictions["num_atoms"].sum(), 3)
    assert predictions["energy_true"].shape == (12,)
    split = np.load(path / "split.npz")
    assert len(set(split["train"]) | set(split["validation"]) | set(split["test"])) == 48
    assert list((path / "tensorboard").iterdir())
    # The numbers of results.json are those of the arrays beside it.
    error = np.abs(predictions["forces_pred"] - predictions["forces_true"]).mean()
    assert results["test"]["forces_mae"] == pytest.approx(error, rel=1e-5)


def test_exported_weights_give_the_same_network(finished: tuple[Options, Path]) -> None:
    """load_model predicts what the run wrote down, and evaluate finds the same errors."""
    options, path = finished
    model = load_model(path)
    assert all(torch.equal(v, load_weights(path)[k]) for k, v in model.state_dict().items())
    dataset = Dataset.open(options["data"]["path"])
    assert load_card(path).elements == tuple(sorted(set(part_of(path, "train")[1].atomic_numbers.tolist())))
    indices, batch = part_of(path, "test")
    written = np.load(path / "predictions_test.npz")
    assert written["structure_ids"].tolist() == dataset.structure_ids[indices].astype(str).tolist()
    found = predict(model, batch)
    assert found.forces is not None
    assert found.stress is not None
    for label, value, true in (
        ("energy", found.energy, batch.energy),
        ("forces", found.forces, batch.forces),
        ("stress", found.stress, batch.stress),
    ):
        np.testing.assert_array_equal(written[f"{label}_true"], true.numpy())
        np.testing.assert_allclose(written[f"{label}_pred"], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=label)
    errors = evaluate_checkpoint(str(path), (options["data"]["path"],))
    whole = predict(model, dataset.read(np.arange(len(dataset))))
    assert errors["forces_mae"] == pytest.approx(
        float((whole.forces - dataset.read(np.arange(len(dataset))).forces).abs().mean()), rel=1e-5
    )


def part_of(run_dir: Path, part: str) -> tuple[np.ndarray, Batch]:
    """Indices and structures of one part of a run's split."""
    path = json.loads((run_dir / "run.json").read_text())["dataset"][0]["path"]
    dataset = Dataset.open(path)
    indices = np.flatnonzero(np.isin(dataset.structure_ids.astype(str), np.load(run_dir / "split.npz")[part]))
    return indices, dataset.read(indices)


def validation_of(model: EnergyModel, run_dir: Path) -> dict[str, float]:
    """Loss and errors of `model` on the validation part of a run."""
    objective = build_objective(model, DerivativesOptions(), seed=0).eval()
    _, sums = objective(part_of(run_dir, "validation")[1], 0, dict.fromkeys(objective.terms, 1.0))
    return objective.metrics_of({k: float(v) for k, v in sums.items()})


def test_a_run_is_a_function_of_its_config(finished: tuple[Options, Path], tmp_path: Path) -> None:
    """The same config gives the same bits, whatever random numbers were drawn before; another seed gives others."""
    options, path = finished
    torch.manual_seed(12345)
    torch.rand(10)
    again = run(options, tmp_path / "again")
    same_weights(path, again)
    for name in ("loss", "learning_rate", "grad_norm"):
        assert of_steps(path, name) == of_steps(again, name)
    assert [r["validation"] for r in records(path, "epoch")] == [r["validation"] for r in records(again, "epoch")]
    other = run(options, tmp_path / "other", seed=8, training={"epochs": 1, "batch_size": 5})
    assert of_steps(other, "loss")[0] != of_steps(path, "loss")[0]


def test_the_exported_weights_are_the_moving_average(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options = deepcopy(finished[0])
    decay = 0.8
    options["training"] |= {"epochs": 2, "batch_size": 8, "ema_decay": decay}
    path = run(options, tmp_path / "average", checkpoint={"every_steps": 1, "keep": 100})
    steps = sorted((path / "checkpoints").glob("step_*"))
    assert [p.name for p in steps] == [f"step_{n:08d}" for n in range(1, 7)]
    average: dict[str, torch.Tensor] = {}
    for step in steps:
        raw = load_state(step)["weights"]
        # It begins with the weights after the first step.
        average = {k: decay * average[k].double() + (1 - decay) * w if average else w.double() for k, w in raw.items()}
        exported = load_weights(step)
        assert exported.keys() == average.keys()
        for name, weight in average.items():
            torch.testing.assert_close(exported[name].double(), weight, rtol=1e-5, atol=1e-7)
    # Validation looks at the average, not at the weights of the last step.
    logged = records(path, "epoch")[2]["validation"]
    model = load_model(path / "checkpoints" / "last")
    assert validation_of(model, path) == pytest.approx(logged, rel=1e-5)
    model.load_state_dict(raw)
    assert validation_of(model, path)["loss"] != pytest.approx(logged["loss"], rel=1e-3)


def test_references_and_normalisation_keep_forces_the_derivative(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    path = run(
        finished[0],
        tmp_path / "scaled",
        objective={"kind": "derivatives", "element_references": True, "normalise": True},
    )
    weights = load_weights(path)
    scale = float(weights["scale"])
    assert abs(scale - 1) > 0.01
    assert weights["element_references"].any()
    results = json.loads((path / "results.json").read_text())
    assert results["validation"]["energy_per_atom_mae"] < 0.5  # without references: eV of six elements' energies
    # The network that the run exports: what it predicts as forces is the derivative of what it predicts as energy.
    model = load_model(path).double()
    batch = part_of(path, "test")[1].to(dtype=torch.float64)
    found = predict(model, batch)
    assert found.forces is not None
    step = 1e-5  # Å
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(batch.positions.shape, generator=generator, dtype=torch.float64)
        up, down = (
            predict(
                model, replace(batch, positions=batch.positions + sign * step * direction), forces=False, stress=False
            ).energy.detach()
            for sign in (1, -1)
        )
        numeric = -(up - down) / (2 * step)
        along = torch.zeros_like(numeric).index_add(0, batch.batch, (found.forces * direction).sum(1))
        torch.testing.assert_close(along, numeric, rtol=1e-5, atol=1e-6 * float(numeric.abs().max()))
    # And the references are in the energy: without them and the scale, it is the bare network's.
    unscaled = predict(model.network, batch)
    references = model.element_references.index_select(0, batch.atomic_numbers)
    offset = torch.zeros_like(found.energy).index_add(0, batch.batch, references)
    torch.testing.assert_close(found.energy, scale * unscaled.energy + offset, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.forces, scale * unscaled.forces, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options = finished[0]
    out = tmp_path / "run"
    data = options["data"]
    with pytest.raises(DataError, match=r"dataset .*nowhere: no such directory"):
        run(options | {"data": data | {"path": str(tmp_path / "nowhere")}}, out)
    split = {"train": 0.979, "validation": 0.001, "test": 0.02, "by": "structure"}
    with pytest.raises(DataError, match=r"split: the validation part is empty: 0\.001 of 48 structures.*\nUse more"):
        run(options | {"data": data | {"split": split}}, out)
    assert not out.exists()


def test_labels_that_are_not_there_are_refused(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path
) -> None:
    options, _ = finished
    sample = Dataset.open(small_dataset)
    unlabelled = [replace(sample.get(i), stress=None) for i in range(12)]
    write_dataset(unlabelled, tmp_path / "none", provenance={}, property_units={"volume_per_atom": "A^3"})
    with pytest.raises(DataError, match=r"objective\.stress_weight is 500, but no structure of the dataset has stress"):
        run(options | {"data": options["data"] | {"path": str(tmp_path / "none")}}, tmp_path / "a")
    one = [sample.get(12), *unlabelled]
    write_dataset(one, tmp_path / "one", provenance={}, property_units={"volume_per_atom": "A^3"})
    with pytest.raises(DataError, match=r"no structure of the \w+ part has stress \(1 of 13 in the dataset have\)"):
        run(options | {"data": options["data"] | {"path": str(tmp_path / "one")}}, tmp_path / "b")


def test_elements_that_the_network_does_not_know_are_refused(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path
) -> None:
    options, path = finished
    sample = Dataset.open(small_dataset)
    first: Structure = sample.get(0)
    heavy = [
        replace(first, atomic_numbers=torch.full_like(first.atomic_numbers, z), structure_id=f"z{z}") for z in (92, 105)
    ]
    write_dataset(heavy, tmp_path / "heavy", provenance={}, property_units={"volume_per_atom": "A^3"})
    with pytest.raises(DataError, match=r"contains U, Db, unknown to"):
        evaluate_checkpoint(str(path), (str(tmp_path / "heavy"),))
    split = {"train": 0.4, "validation": 0.3, "test": 0.3, "by": "structure"}
    with pytest.raises(DataError, match=r"model\.num_elements is 100, but the dataset contains Db"):
        run(options | {"data": {"path": [str(small_dataset), str(tmp_path / "heavy")], "split": split}}, tmp_path / "x")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_structures(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"(?s)epoch 1, step \d+: loss .*not finite.*Structures of the step: "):
        run(
            finished[0],
            tmp_path / "diverged",
            optimizer={"learning_rate": 1e25},
            training={"epochs": 3, "batch_size": 5},
        )
