"""Pre-training: labels and their derivatives in, a checkpoint out."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split, split_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import Scaling, build_model
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.checkpoint import ModelCard, load_state, load_weights
from dpt_hpc.train.config import (
    DerivativesOptions,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SplitOptions,
    save_config,
)
from dpt_hpc.train.engine import Engine, build_engine
from dpt_hpc.train.loop import Data, Trainer, collect_predictions, evaluate
from dpt_hpc.train.monitor import Monitor, describe_environment, write_arrays, write_json
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.references import fit_scaling
from dpt_hpc.train.world import World

FREE_TO_CHANGE = ("run_dir", "training.epochs", "training.evaluation_batch_size", "checkpoint", "engine.device")
"""Options that may differ when a run is resumed: they do not change what has been computed so far."""


def pretrain(config: PretrainConfig, world: World, *, resume: bool = False, quiet: bool = False) -> Path:
    """Run `config` to its end; returns the run directory.

    Raises ConfigError if the directory holds another run, DataError if data and objective do not fit.
    """
    dataset = Dataset.open(config.data.path)
    split = split_by(dataset, config.data.split, config.seed)
    check_labels(dataset, config.objective)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    card = ModelCard(config.model, tuple(dataset.elements), {"datasets": describe_data(dataset, config)})
    run = Run(config, config.seed, Path(config.run_dir), world, resume=resume, quiet=quiet)
    return run.train(dataset, split, model, card)


def split_by(dataset: Dataset, options: SplitOptions, seed: int) -> Split:
    """The split that `options` describe."""
    labels = dataset.groups if options.by == "group" else np.arange(len(dataset)).astype(str)
    fractions = (options.train, options.validation, options.test)
    return split_dataset(labels, fractions, seed if options.seed is None else options.seed)


def check_labels(dataset: Dataset, objective: Any) -> None:
    """Refuse an objective whose labels the dataset does not have, and a network that cannot tell its elements apart."""
    if not isinstance(objective, DerivativesOptions):
        return
    present = {"energy": dataset.has_energy, "forces": dataset.has_forces, "stress": dataset.has_stress}
    for label, has in present.items():
        if getattr(objective, f"{label}_weight") > 0 and not has.any():
            raise DataError(
                f"objective.{label}_weight is {getattr(objective, f'{label}_weight'):g}, "
                f"but no structure of the dataset has {label}.\n"
                f"Set objective.{label}_weight=0, or ingest the data with its {label}."
            )


def check_elements(dataset: Dataset, num_elements: int) -> None:
    """Refuse elements beyond the network's encoding."""
    beyond = [SYMBOLS[z] for z in dataset.elements if z > num_elements]
    if beyond:
        raise DataError(
            f"model.num_elements is {num_elements}, but the dataset contains {', '.join(beyond)}.\n"
            "Raise model.num_elements, or leave those structures out."
        )


def describe_data(dataset: Dataset, config: RunConfig) -> list[dict[str, Any]]:
    """Path, size and digest of each part, for run.json and the model card."""
    return [
        {"path": path, "structures": manifest.num_structures, "digest": manifest.digest}
        for path, manifest in zip(config.data.path, dataset.manifests, strict=True)
    ]


class Run:
    """One run directory, from an empty one (or a checkpoint in it) to results.json."""

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        seed: int,
        run_dir: Path,
        world: World,
        *,
        resume: bool,
        quiet: bool,
    ) -> None:
        self.config, self.seed, self.run_dir, self.world, self.quiet = config, seed, run_dir, world, quiet
        self.resume = resume and (run_dir / "checkpoints" / "last").exists()
        if resume and (run_dir / "config.yaml").exists():
            _check_same(config, run_dir / "config.yaml")
        elif (run_dir / "config.yaml").exists():
            raise ConfigError(
                f"run_dir {run_dir}: already holds a run.\n"
                "Continue it with --resume, or choose another directory with --set run_dir=DIR."
            )

    def train(
        self, dataset: Dataset, split: Split, model: Scaling, card: ModelCard, extra: dict[str, Any] | None = None
    ) -> Path:
        """Train, evaluate the best weights, write predictions and results."""
        config = self.config
        check_elements(dataset, config.model.num_elements)
        started = datetime.now(timezone.utc)
        clock = time.monotonic()
        dtype = torch.float64 if config.training.precision == "float64" else torch.float32
        model.to(dtype)
        weights = {}
        checkpoint = self.run_dir / "checkpoints" / "last"
        if self.resume:
            weights = load_weights(checkpoint)
            model.load_state_dict(load_state(checkpoint).get("weights", weights))
        target = getattr(config.objective, "target", None)
        objective = build_objective(model, config.objective, self.seed)
        cpu_data = Data(dataset, split, target, dtype, torch.device("cpu"))
        if not self.resume:
            fit_scaling(model, config.objective, cpu_data)
        engine = build_engine(
            objective,
            self.world,
            config.engine,
            config.optimizer,
            clip=config.training.clip_norm,
            grad_accumulation=config.training.grad_accumulation,
        )
        data = Data(dataset, split, target, dtype, engine.device)
        facts = {
            **describe_environment(),
            "started": started.isoformat(timespec="seconds"),
            "world_size": engine.world_size,
            "launched_by": self.world.source,
            "engine": type(engine).__name__,
            "device": str(engine.device),
            "seed": self.seed,
            "dataset": describe_data(dataset, config),
            "split": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
            "parameters": sum(p.numel() for p in model.parameters()),
            **(extra or {}),
        }
        if engine.rank == 0:
            self._prepare(facts, dataset, split)
        engine.barrier()
        trainer = Trainer(engine, data, config, self.seed, self.run_dir, card)
        if self.resume:
            trainer.resume(checkpoint, weights)
        first = engine.rank == 0
        monitor = Monitor(
            self.run_dir if first else None, trainer.total_steps, trainer.step, quiet=self.quiet or not first
        )
        monitor.say(
            f"{self.run_dir}: {len(dataset)} structures ({len(split.train)} / {len(split.validation)} / "
            f"{len(split.test)}), {facts['parameters']} parameters, {facts['engine']} on {facts['device']}, "
            f"{self.world.source}" + (f", resumed at step {trainer.step}" if self.resume else "")
        )
        try:
            trainer.fit(monitor)
        finally:
            monitor.close()
        self._conclude(trainer, engine, data, facts, clock, monitor)
        return self.run_dir

    def _prepare(self, facts: dict[str, Any], dataset: Dataset, split: Split) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run_dir / "config.yaml")
        write_json(self.run_dir / "run.json", facts)
        ids = dataset.structure_ids
        parts = {"train": split.train, "validation": split.validation, "test": split.test}
        write_arrays(self.run_dir / "split.npz", {k: ids[v].astype(str) for k, v in parts.items()})

    def _conclude(
        self, trainer: Trainer, engine: Engine, data: Data, facts: dict[str, Any], clock: float, monitor: Monitor
    ) -> None:
        """Evaluate the best checkpoint's weights on validation and test part."""
        best = self.run_dir / "checkpoints" / "best"
        chosen = trainer.evaluated()
        chosen.model.load_state_dict(load_weights(best))
        results: dict[str, Any] = {
            "task": self.config.task,
            "objective": self.config.objective.model_dump(mode="json"),
            "best_step": load_state(best)["step"],
            "best_epoch": load_state(best)["epoch"] - 1,
        }
        if engine.rank == 0:
            results |= _history(self.run_dir / "metrics.jsonl")
        for part in ("validation", "test"):
            indices = getattr(data.split, part)
            results[part] = evaluate(chosen, engine, data, indices, self.config)
            predictions = collect_predictions(chosen, engine, data, indices, self.config)
            if predictions is not None:
                write_arrays(self.run_dir / f"predictions_{part}.npz", predictions)
        if engine.rank == 0:
            write_json(self.run_dir / "results.json", results)
            finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(
                self.run_dir / "run.json",
                {**facts, "finished": finished, "wall_seconds": time.monotonic() - clock},
            )
        errors = "  ".join(f"{k} {v:.4g}" for k, v in results["test"].items())
        monitor.say(f"best epoch {results['best_epoch']} | test {errors} | {self.run_dir}")
        engine.barrier()


def _history(log: Path) -> dict[str, Any]:
    """The validation errors before the first step, and the seconds that all epochs took, from the run's own log: unlike
    run.json's wall_seconds it knows of the time before an interruption."""
    epochs = [r for r in map(json.loads, log.read_text().splitlines()) if r["kind"] == "epoch"]
    return {
        "validation_before": next((r["validation"] for r in epochs if r["epoch"] == 0), None),
        "epochs": max(r["epoch"] for r in epochs),
        "training_seconds": sum(r.get("seconds", 0.0) for r in epochs),
    }


def _check_same(config: RunConfig, path: Path) -> None:
    """Refuse to resume a run whose options have changed, but for those that are free to."""
    before, now = _flat(yaml.safe_load(path.read_text())), _flat(config.model_dump(mode="json"))
    changed = [
        f"  {key}: was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise ConfigError(
            "\n".join([f"run {path.parent}: cannot resume with other options.", *changed])
            + "\nRestore them, or start a new run with --set run_dir=DIR."
        )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
