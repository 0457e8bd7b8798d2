"""Objectives: exact for any division of a step, and their noise, signs and references are what they say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Options, run

from dpt_hpc.data.manifest import Manifest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.data.store import DiskStore
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import DataError
from dpt_hpc.models import CGCNNOptions, EnergyModel, build_model
from dpt_hpc.quickstart import PACKAGE
from dpt_hpc.structure import Structure
from dpt_hpc.train.checkpoint import load_card, load_model
from dpt_hpc.train.config import DenoisingOptions, DerivativesOptions, MixedOptions, SplitOptions
from dpt_hpc.train.data import Data
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.parts import make_split
from dpt_hpc.train.references import Triangle, fit_scaling

SMALL = CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8)


def test_micro_batches_and_ranks_change_no_gradient(small_dataset: Path) -> None:
    """Local sums over global counts: parts of very unequal size give the gradient of the whole."""
    dataset = Dataset.open(small_dataset)
    torch.manual_seed(0)
    model = build_model(SMALL).double()
    objective = build_objective(model, DerivativesOptions(), seed=0)

    def gradient(parts: list[np.ndarray]) -> list[torch.Tensor]:
        batches = [dataset.read(p, dtype=torch.float64) for p in parts]
        counts = {k: sum(objective.counts(b)[k] for b in batches) for k in objective.terms}
        model.zero_grad()
        for batch in batches:
            objective(batch, 1, counts)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradient([np.arange(20)])
    nothing = np.array([], dtype=np.int64)
    parts = gradient([np.arange(1), nothing, np.arange(1, 4), np.arange(4, 20)])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def with_molecule(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crystals with their labels, and at 5 a molecule with neither labels nor a cell."""
    items = [replace(Dataset.open(small_dataset).get(i), properties={}) for i in range(12)]
    items[5] = Structure(
        positions=torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.1]], dtype=torch.float64),
        cell=torch.zeros(3, 3, dtype=torch.float64),
        pbc=torch.zeros(3, dtype=torch.bool),
        atomic_numbers=torch.tensor([8, 6]),
        structure_id="carbon monoxide",
        group="CO",
    )
    write_dataset(items, out := tmp_path_factory.mktemp("data") / "molecule", provenance={}, property_units={})
    return out


@pytest.mark.parametrize("options", [DerivativesOptions(), DerivativesOptions(stress_weight=0), MixedOptions()])
def test_stress_is_learnt_beside_structures_without_a_cell(
    options: DerivativesOptions | MixedOptions, with_molecule: Path
) -> None:
    dataset = Dataset.open(with_molecule)
    torch.manual_seed(0)
    objective = build_objective(build_model(SMALL).double(), options, seed=0)
    alone, beside = (dataset.read(np.array(i), dtype=torch.float64) for i in ([2], [5, 2]))
    labels = {"energy", "forces", "stress", "energy_per_atom"}
    for mode in (True, False):
        objective.train(mode)
        found = []
        for batch in (alone, beside):
            objective.zero_grad()
            loss, sums = objective(batch, 1, objective.counts(batch))
            if mode:
                loss.backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
            found.append({k: float(v) for k, v in sums.items() if k.rsplit("_", 1)[0] in labels})
        assert found[0] == pytest.approx(found[1], rel=1e-10)
        assert ("stress_error" in found[0]) == (not mode or options.stress_weight > 0)


def test_stress_of_what_has_no_volume_is_refused_by_id_before_anything_is_computed(
    with_molecule: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(with_molecule)
    split = SplitOptions(train=0.5, validation=0.25, test=0.25, by="structure")
    assert len(make_split(dataset, split, DerivativesOptions(), 0).train) == 6
    items = [dataset.get(i) for i in range(12)]
    items[5] = replace(items[5], stress=torch.zeros(3, 3, dtype=torch.float64))
    write_dataset(items, tmp_path / "flat", provenance={}, property_units={})
    flat = Dataset.open(tmp_path / "flat")
    message = r"1 structures have stress, but a cell of zero volume: carbon monoxide\.\nStress is per volume"
    for weight in (1.0, 0.0):
        with pytest.raises(DataError, match=message):
            make_split(flat, split, DerivativesOptions(stress_weight=weight), 0)
    make_split(flat, split, DerivativesOptions(), 0, excluded=np.array([5]))


def test_energies_of_unlike_references_are_not_learnt_together(small_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(small_dataset)
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path, reference in zip(paths, ("PBE as of A", "PBE as of B"), strict=True):
        items = [replace(dataset.get(i), structure_id=f"{path} {i}", properties={}) for i in range(12)]
        write_dataset(items, Path(path), provenance={"energy_reference": reference}, property_units={})
    both = Dataset.open(paths)
    split = SplitOptions(train=0.5, validation=0.25, test=0.25, by="structure")
    with pytest.raises(DataError, match=r"energies of .*a are PBE as of A, those of .*b PBE as of B: they differ"):
        make_split(both, split, DerivativesOptions(), 0, paths)
    make_split(both, split, DerivativesOptions(energy_weight=0), 0, paths)
    make_split(both, split, MixedOptions(noise_scale=0.1, denoise_datasets=("b",)), 0, paths)
    make_split(Dataset.open(paths[:1]), split, DerivativesOptions(), 0, paths[:1])
    for path, name in zip(paths, ("pretrain", "mlearn"), strict=True):  # of an early version, which knew the name alone
        manifest = Manifest.read(Path(path))
        replace(manifest, provenance={"catalog": name}).write(Path(path))
    with pytest.raises(DataError, match=r"energies of .*a are VASP .* of the Materials Project, those of .* of mlearn"):
        make_split(Dataset.open(paths), split, DerivativesOptions(), 0, paths)


def test_noise_is_fresh_in_every_epoch_and_belongs_to_its_structure(small_dataset: Path) -> None:
    dataset = Dataset.open(small_dataset)
    objective: Any = build_objective(build_model(SMALL).double(), DenoisingOptions(noise_scale=0.1), seed=3)
    batch = dataset.read(np.array([4, 9, 2]), dtype=torch.float64)
    first = objective.noise(batch, 1)
    alone = objective.noise(dataset.read(np.array([9]), dtype=torch.float64), 1)
    torch.testing.assert_close(first[batch.batch == 1], alone)
    assert not torch.equal(first, objective.noise(batch, 2))
    many = objective.noise(dataset.read(np.arange(48), dtype=torch.float64), 1)
    assert float(many.std()) == pytest.approx(0.1, rel=0.1)


def test_denoising_signs_are_opposite(small_dataset: Path) -> None:
    batch = Dataset.open(small_dataset).read(np.arange(4), dtype=torch.float64)
    model = build_model(SMALL).double()
    for sign in ("paper", "physical"):
        objective: Any = build_objective(model, DenoisingOptions(sign=sign), seed=3)
        predicted, target, _ = objective.predictions(batch, 1)["noise"]
        noise = objective.noise(batch, 1)
        assert torch.equal(target, noise if sign == "paper" else -noise)
        assert predicted.shape == noise.shape


def test_denoising_trains(finished: tuple[Options, Path], tmp_path: Path) -> None:
    """The noise of the training part is predicted better than by predicting none, and better than before."""
    options = finished[0]
    path = run(
        options,
        tmp_path / "denoise",
        objective={"kind": "derivative_denoising"},
        training={"epochs": 12, "batch_size": 4},
        checkpoint={},
    )
    results = json.loads((path / "results.json").read_text())
    dataset = Dataset.open(options["data"]["path"])
    train = np.flatnonzero(np.isin(dataset.structure_ids.astype(str), np.load(path / "split.npz")["train"]))

    def noise_mae(model: EnergyModel) -> tuple[float, float]:
        """Of the model, and of predicting no noise; in eval mode the noise is one that is never trained on."""
        objective = build_objective(model, DenoisingOptions(), seed=options["seed"]).eval()
        predicted, true, _ = objective.predictions(dataset.read(train), epoch=1)["noise"]
        return float((predicted - true).abs().mean()), float(true.abs().mean())

    torch.manual_seed(options["seed"])
    before, _ = noise_mae(build_model(load_card(path).options))
    trained, nothing = noise_mae(load_model(path / "checkpoints" / "last"))
    assert trained < 0.9 * nothing
    assert trained < 0.9 * before
    assert results["validation"]["noise_mae"] < results["validation_before"]["noise_mae"]
    assert results["test"]["noise_mae"] > 0


def test_sums_of_parts_are_the_metrics_of_the_whole(small_dataset: Path) -> None:
    dataset = Dataset.open(small_dataset)
    objective = build_objective(build_model(SMALL), DerivativesOptions(), seed=0).eval()
    ones = dict.fromkeys(objective.terms, 1.0)

    def metrics(parts: list[np.ndarray]) -> dict[str, float]:
        total: Counter[str] = Counter()
        for part in parts:
            _, sums = objective(dataset.read(part), 0, ones)
            total.update({k: float(v) for k, v in sums.items()})
        return objective.metrics_of(total)

    whole = metrics([np.arange(30)])
    assert whole.keys() == {"loss", "energy_mae", "energy_per_atom_mae", "forces_mae", "stress_mae"}
    assert metrics([np.arange(1), np.arange(1, 30)]) == pytest.approx(whole, rel=1e-5)


def references_of(composition: np.ndarray, energy: np.ndarray, at_once: int) -> np.ndarray:
    rows = np.column_stack([composition, energy])
    triangle = Triangle(rows.shape[1])
    for start in range(0, len(rows), at_once):
        triangle.add(rows[start : start + at_once])
    assert triangle.values.shape == (120, 120)  # whatever the number of rows
    return triangle.solve()


def test_element_references_are_the_least_squares_solution() -> None:
    generator = np.random.default_rng(0)
    composition = np.zeros((40, 119))
    composition[:, [3, 8, 22]] = generator.integers(0, 5, size=(40, 3))
    true = np.zeros(119)
    true[[3, 8, 22]] = [-1.9, -4.9, -7.8]
    found = references_of(composition, composition @ true, 7)
    np.testing.assert_allclose(found, true, atol=1e-10)
    # Elements that only occur together: the least-norm solution, which still reproduces the energies.
    together = np.zeros((5, 119))
    together[:, [11, 17]] = np.arange(1, 6)[:, None]
    np.testing.assert_allclose(references_of(together, together.sum(1) * -3.0, 2)[[11, 17]], -3.0, atol=1e-10)


def test_references_and_spread_block_by_block_are_those_of_the_whole_matrix() -> None:
    """On the real structures of the samples, 577 of metals and semiconductors, some elements never with others."""
    dataset = Dataset.open(PACKAGE / "sample" / "mlearn")
    batch = dataset.read(range(len(dataset)), dtype=torch.float64)
    composition = np.zeros((len(dataset), 119))
    np.add.at(composition, (batch.batch.numpy(), batch.atomic_numbers.numpy()), 1)
    energy = batch.energy.numpy()
    dense = np.linalg.lstsq(composition, energy, rcond=None)[0]
    everything = Split(*[np.arange(len(dataset))] * 3)
    data = Data(DiskStore(dataset, dataset.layout(torch.float64, None)), everything, torch.device("cpu"))
    scaling = build_model(SMALL).double()
    fit_scaling(scaling, DerivativesOptions(element_references=True, normalise=True), data)
    np.testing.assert_allclose(scaling.element_references.numpy(), dense, rtol=1e-10, atol=1e-10)
    spread = np.std((energy - composition @ dense) / composition.sum(1))
    assert float(scaling.scale) == pytest.approx(float(spread), rel=1e-10)
    fit_scaling(scaling, DerivativesOptions(normalise=True), data)
    assert float(scaling.scale) == pytest.approx(float(np.std(energy / composition.sum(1))), rel=1e-10)


def test_a_spread_is_safe_far_from_zero_and_zero_where_all_is_the_same() -> None:
    deviations = np.random.default_rng(0).normal(size=1000)
    values = np.column_stack([np.ones(1000), 1e6 + 1e-3 * deviations])
    triangle = Triangle(2)
    for block in np.array_split(values, 9):
        triangle.add(block)
    assert triangle.spread(np.array([0.0, 1.0])) == pytest.approx(1e-3 * deviations.std(), rel=1e-6)
    same = Triangle(2)
    same.add(np.column_stack([np.ones(100), np.full(100, 0.1)]))
    assert same.spread(np.array([0.0, 1.0])) == 0
