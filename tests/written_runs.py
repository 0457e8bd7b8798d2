"""Run directories of every kind and in every state, written here in the trainer's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HOSTILE = '<script>alert("1")</script>&$x^2$'
DERIVATIVES = {"kind": "derivatives", "energy_weight": 1.0, "forces_weight": 500.0, "stress_weight": 500.0}


def predictions(kind: str, structures: int = 40, seed: int = 0, identity: str = "s") -> dict[str, Any]:
    """What the trainer stores of `structures` random ones; every label but the target misses the last structure."""
    rng = np.random.default_rng(seed)
    num_atoms = rng.integers(2, 9, structures)
    found: dict[str, Any] = {
        "structure_ids": np.array([f"{identity}{i}" for i in range(structures)]),
        "num_atoms": num_atoms,
        "atomic_numbers": rng.integers(1, 95, num_atoms.sum()),
    }

    def label(name: str, shape: tuple[int, ...], structure: np.ndarray, error: float) -> None:
        true = rng.normal(size=shape)
        found.update({f"{name}_true": true, f"{name}_pred": true + rng.normal(scale=error, size=shape)})
        found[f"{name}_structure"] = structure

    labelled = np.arange(structures - 1)
    atoms = np.repeat(labelled, num_atoms[:-1])
    if kind in ("derivatives", "mixed"):
        label("energy", (len(labelled),), labelled, 0.3)
        label("forces", (len(atoms), 3), atoms, 0.2)
        label("stress", (len(labelled), 3, 3), labelled, 0.01)
    if kind in ("derivative_denoising", "head_denoising", "mixed"):
        label("noise", (len(atoms), 3), atoms, 0.05)
    if kind == "property":
        label("target", (structures,), np.arange(structures), 20.0)
    return found


def write_run(
    path: Path,
    objective: dict[str, Any],
    *,
    epochs: int = 3,
    finished: bool = True,
    task: str = "pretrain",
    seed: int = 0,
    pretrained: str | None = None,
    identity: str = "s",
    dataset: str = "data/jdft",
    structures: int = 636,
    mae: float = 50.0,
) -> Path:
    """A run directory as the trainer leaves it after `epochs` epochs of 4 steps."""
    path.mkdir(parents=True)
    config = {
        "task": task,
        "run_dir": str(path),
        "objective": objective,
        "training": {"epochs": 3, "batch_size": 50},
        "seed": seed,
    }
    config["model"] = {"name": "cgcnn", "pooling": "add"}
    config["data"] = {"path": [dataset], "split": {"train": 0.6, "validation": 0.2, "test": 0.2, "by": "structure"}}
    if task == "finetune":
        config |= {"pretrained": pretrained, "seeds": [0, 1]}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment: dict[str, Any] = {"command": f"dpt-hpc {task}", "started": "2026-11-22T16:00:00+00:00", "cores": 2}
    environment |= {"versions": {"torch": "2.13.0"}, "parameters": 1234, "world_size": 1, "seed": seed}
    environment["dataset"] = [{"path": dataset, "structures": structures, "digest": "d1"}]
    names = {"derivatives": ["energy", "energy_per_atom", "forces", "stress"], "derivative_denoising": ["noise"]}
    names |= {"head_denoising": ["noise"], "mixed": [*names["derivatives"], "noise"]}
    labels = names.get(objective["kind"], ["target"])
    lines = []
    for epoch in range(epochs + 1):
        errors = {
            "loss": 2.0 / (epoch + 1),
            **{f"{k}_mae": (mae if k == "target" else 0.5) / (epoch + 1) for k in labels},
        }
        record: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "step": 4 * epoch, "learning_rate": 2e-3}
        record |= {"time": 1.79e9 + epoch, "validation": errors}
        if epoch:
            record |= {"train": errors, "seconds": 1.5, "structures_per_second": 10.0, "atoms_per_second": 90.0}
            lines += [
                {"kind": "step", "epoch": epoch, "step": 4 * (epoch - 1) + i, "loss": 1.0, "learning_rate": 2e-3}
                for i in range(1, 5)
            ]
        lines.append(record)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = np.array(["a", "b"])
    np.savez(path / "split.npz", train=ids, validation=ids[:1], test=ids[:1])
    if finished:
        environment |= {"finished": "2026-11-22T16:10:00+00:00", "wall_seconds": 600.0}
        test = {"loss": 1.0, **{f"{k}_mae": mae if k == "target" else 0.1 for k in labels}}
        results = {"task": task, "objective": objective, "best_epoch": epochs, "test": test, "validation": test}
        (path / "results.json").write_text(json.dumps(results))
        np.savez(path / "predictions_test.npz", **predictions(objective["kind"], seed=seed, identity=identity))
    (path / "run.json").write_text(json.dumps(environment))
    return path


def write_tuning(path: Path, maes: tuple[float, ...] = (60.0, 64.0), *, finished: int = 2, **options: Any) -> Path:
    """A fine-tuning to the paper's JDFT set with a folder per seed, the first `finished` of them done."""
    target = {"kind": "property", "target": "exfoliation_energy"}
    for seed, mae in enumerate(maes):
        write_run(
            path / f"seed_{seed}", target, task="finetune", seed=seed, mae=mae, finished=seed < finished, **options
        )
    if finished == len(maes):
        summary: dict[str, Any] = {
            "task": "finetune",
            "dataset": "jdft",
            "property": "exfoliation_energy",
            "unit": "meV/atom",
        }
        summary |= {"seeds": list(range(len(maes))), "test_mae": list(maes), "pooling": "add", "network": "cgcnn"}
        summary |= {"mean": float(np.mean(maes)), "std": float(np.std(maes, ddof=1))}
        (path / "results.json").write_text(json.dumps(summary))
    return path
