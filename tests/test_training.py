"""Training: exact for any division of a step, resumable bit for bit, honest about what it loads and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dpt_hpc.data.shards import Dataset, write_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import CGCNNOptions, build_model
from dpt_hpc.structure import Structure
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_model, load_weights
from dpt_hpc.train.config import (
    DenoisingOptions,
    DerivativesOptions,
    FinetuneConfig,
    PretrainConfig,
    check_config,
)
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.finetune import finetune, load_pretrained
from dpt_hpc.train.loop import DivergedError
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.references import element_references
from dpt_hpc.train.world import World

Options = dict[str, Any]


def config_of(options: Options, run_dir: Path, **changes: Any) -> PretrainConfig:
    content = deepcopy(options) | {"run_dir": str(run_dir)} | changes
    return check_config(content, PretrainConfig, "test")


def run(options: Options, run_dir: Path, *, resume: bool = False, **changes: Any) -> Path:
    return pretrain(config_of(options, run_dir, **changes), World(), resume=resume, quiet=True)


def finetune_options(pre: Options, run_dir: Path, **changes: Any) -> FinetuneConfig:
    content = deepcopy(pre) | {"run_dir": str(run_dir), "objective": {"kind": "property", "target": "volume_per_atom"}}
    content["training"]["epochs"] = 1
    del content["seed"]
    return check_config(content | {"seeds": [0, 1]} | changes, FinetuneConfig, "test")


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.fixture(scope="module")
def finished(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, Path]:
    options: Options = {
        "data": {
            "path": str(small_dataset),
            "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "by": "structure"},
        },
        "model": {"name": "cgcnn", "cutoff": 4.0, "hidden": 16, "layers": 2, "gaussians": 12, "readout_hidden": 16},
        "training": {"epochs": 3, "batch_size": 5},
        "checkpoint": {"every_steps": 2},
        "seed": 7,
    }
    return options, run(options, tmp_path_factory.mktemp("runs") / "finished")


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
    options, path = finished
    errors = evaluate_checkpoint(str(path), (options["data"]["path"],))
    model = load_model(path)
    assert all(torch.equal(v, load_weights(path)[k]) for k, v in model.state_dict().items())
    assert load_card(path).elements == tuple(Dataset.open(options["data"]["path"]).elements)
    assert errors["forces_mae"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kill_and_resume_equals_uninterrupted_bit_for_bit(
    finished: tuple[Options, Path], tmp_path: Path, ema_decay: float | None
) -> None:
    options = deepcopy(finished[0])
    options["training"] |= {"epochs": 8, "ema_decay": ema_decay}
    whole = run(options, tmp_path / "whole")
    broken = tmp_path / "broken"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(broken)}))
    command = [sys.executable, "-m", "dpt_hpc", "pretrain", str(tmp_path / "config.yaml"), "--quiet"]
    with subprocess.Popen(command) as process:
        checkpoints = broken / "checkpoints"
        while process.poll() is None and len(list(checkpoints.glob("step_*/model.yaml"))) < 2:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run([*command, "--resume"], check=True)
    for name in ("last", "best"):
        a, b = load_weights(whole / "checkpoints" / name), load_weights(broken / "checkpoints" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [r["loss"] for r in records(whole, "step")] == [r["loss"] for r in records(broken, "step")]


def test_resume_refuses_other_options(finished: tuple[Options, Path]) -> None:
    options, path = finished
    with pytest.raises(ConfigError, match=r"already holds a run.*\n.*--resume"):
        run(options, path)
    changed = options | {"optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: was 0\.002, now 0\.001"):
        run(changed, path, resume=True)


def test_micro_batches_and_ranks_change_no_gradient(small_dataset: Path) -> None:
    """Local sums over global counts: parts of very unequal size give the gradient of the whole."""
    dataset = Dataset.open(small_dataset)
    torch.manual_seed(0)
    model = build_model(CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8)).double()
    objective = build_objective(model, DerivativesOptions(), seed=0)

    def gradient(parts: list[np.ndarray]) -> list[torch.Tensor]:
        batches = [dataset.read(p, dtype=torch.float64) for p in parts]
        counts = {k: sum(objective.counts(b)[k] for b in batches) for k in objective.weights}
        model.zero_grad()
        for batch in batches:
            objective(batch, 1, counts)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradient([np.arange(20)])
    nothing = np.array([], dtype=np.int64)
    parts = gradient([np.arange(1), nothing, np.arange(1, 4), np.arange(4, 20)])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_noise_is_fresh_in_every_epoch_and_belongs_to_its_structure(small_dataset: Path) -> None:
    dataset = Dataset.open(small_dataset)
    model = build_model(CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8)).double()
    objective = build_objective(model, DenoisingOptions(noise_scale=0.1), seed=3)
    batch = dataset.read(np.array([4, 9, 2]), dtype=torch.float64)
    first = objective.noise(batch, 1)  # type: ignore[attr-defined]
    alone = objective.noise(dataset.read(np.array([9]), dtype=torch.float64), 1)  # type: ignore[attr-defined]
    torch.testing.assert_close(first[batch.batch == 1], alone)
    assert not torch.equal(first, objective.noise(batch, 2))  # type: ignore[attr-defined]
    many = objective.noise(dataset.read(np.arange(48), dtype=torch.float64), 1)  # type: ignore[attr-defined]
    assert float(many.std()) == pytest.approx(0.1, rel=0.1)


def test_denoising_signs_are_opposite(small_dataset: Path) -> None:
    batch = Dataset.open(small_dataset).read(np.arange(4), dtype=torch.float64)
    model = build_model(CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8)).double()
    targets = {}
    for sign in ("paper", "physical"):
        objective = build_objective(model, DenoisingOptions(sign=sign), seed=3)
        predicted, targets[sign], _ = objective.predictions(batch, 1)["noise"]
        noise = objective.noise(batch, 1)  # type: ignore[attr-defined]
        assert torch.equal(targets[sign], noise if sign == "paper" else -noise)
        assert predicted.shape == noise.shape


def test_denoising_trains(finished: tuple[Options, Path], tmp_path: Path) -> None:
    path = run(finished[0], tmp_path / "denoise", objective={"kind": "derivative_denoising"})
    assert json.loads((path / "results.json").read_text())["test"]["noise_mae"] > 0


def test_element_references_are_the_least_squares_solution() -> None:
    generator = np.random.default_rng(0)
    composition = np.zeros((40, 119))
    composition[:, [3, 8, 22]] = generator.integers(0, 5, size=(40, 3))
    true = np.zeros(119)
    true[[3, 8, 22]] = [-1.9, -4.9, -7.8]
    found = element_references(composition, composition @ true)
    np.testing.assert_allclose(found, true, atol=1e-10)
    # Elements that only occur together: the least-norm solution, which still reproduces the energies.
    together = np.zeros((5, 119))
    together[:, [11, 17]] = np.arange(1, 6)[:, None]
    np.testing.assert_allclose(element_references(together, together.sum(1) * -3.0)[[11, 17]], -3.0, atol=1e-10)


def test_references_and_normalisation_keep_forces_the_derivative(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    path = run(
        finished[0],
        tmp_path / "scaled",
        objective={"kind": "derivatives", "element_references": True, "normalise": True},
    )
    weights = load_weights(path)
    assert float(weights["scale"]) != 1
    assert weights["element_references"].any()
    results = json.loads((path / "results.json").read_text())
    assert results["validation"]["energy_per_atom_mae"] < 0.5  # without references: eV of six elements' energies


def test_finetuning_loads_every_weight_and_says_so(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, path = finished
    config = finetune_options(options, tmp_path / "fine", pretrained=str(path))
    model = build_model(config.model)
    loaded = load_pretrained(model, config.model, str(path))
    assert set(loaded.loaded) == {k for k in model.state_dict() if k.startswith("network.")}
    assert set(loaded.reset) == {"scale", "shift", "element_references"}
    assert all(torch.equal(model.state_dict()[k], load_weights(path)[k]) for k in loaded.loaded)
    summary = finetune(config, World())
    assert f"tensors {len(loaded.loaded)} loaded, 3 reset, 0 skipped" in capsys.readouterr().out
    assert len(summary["test_mae"]) == 2
    assert summary["mean"] == pytest.approx(np.mean(summary["test_mae"]))
    assert summary["std"] == pytest.approx(np.std(summary["test_mae"], ddof=1))
    assert summary["unit"] == "A^3"
    errors = evaluate_checkpoint(str(tmp_path / "fine" / "seed_0"), config.data.path, target="volume_per_atom")
    assert errors["target_mae"] > 0


def test_finetuning_refuses_another_network(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, path = finished
    config = finetune_options(options, tmp_path / "fine", pretrained=str(path), model={"name": "cgcnn", "hidden": 20})
    with pytest.raises(ConfigError, match=r"model\.hidden: pre-trained with 16, configured 20"):
        finetune(config, World(), quiet=True)
    missing = finetune_options(options, tmp_path / "fine2", pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="neither a checkpoint"):
        finetune(missing, World(), quiet=True)


def test_labels_and_targets_that_are_not_there_are_refused(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path
) -> None:
    options, _ = finished
    wrong = finetune_options(options, tmp_path / "a", objective={"kind": "property", "target": "band_gap"})
    with pytest.raises(DataError, match=r"objective\.target is 'band_gap', but the dataset has volume_per_atom"):
        finetune(wrong, World(), quiet=True)
    sample = Dataset.open(small_dataset)
    unlabelled = [replace(sample.get(i), stress=None) for i in range(12)]
    write_dataset(unlabelled, tmp_path / "d", provenance={}, property_units={"volume_per_atom": "A^3"})
    with pytest.raises(DataError, match=r"objective\.stress_weight is 500, but no structure of the dataset has stress"):
        run(options | {"data": options["data"] | {"path": str(tmp_path / "d")}}, tmp_path / "b")


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


def test_a_checkpoint_directory_is_whole_or_absent(finished: tuple[Options, Path]) -> None:
    _, path = finished
    directory = path / "checkpoints"
    assert not list(directory.glob(".partial*"))
    assert find_checkpoint(path) == (directory / "best").resolve()
    steps = sorted(p.name for p in directory.glob("step_*"))
    assert (directory / "last").resolve().name == steps[-1] == "step_00000015"
    assert len(steps) <= 3  # two latest, and the best
