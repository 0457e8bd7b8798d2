"""One run: from an empty directory, or a checkpoint in it, to results.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpt_hpc.data.group import agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.shared_memory import kept_once
from dpt_hpc.data.split import Split
from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.models import Scaling, set_precision
from dpt_hpc.models.heads import ScalarHead
from dpt_hpc.plain_text import from_yaml
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.card import ModelCard, describe_training
from dpt_hpc.train.checkpoint import load_state, load_weights
from dpt_hpc.train.compat import differences
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig, RunConfig
from dpt_hpc.train.counting import Counts, count_edges, needs_counts
from dpt_hpc.train.data import PIECE, Data, share_folds, store_for
from dpt_hpc.train.engine import build_engine, choose_device
from dpt_hpc.train.failures import leaving_traceback
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.monitor import Monitor, describe_environment, write_json
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.parts import check_elements, count_single_atoms, denoised_datasets, denoised_ranges
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.references import fit_scaling, training_elements
from dpt_hpc.train.run_dir import check_same_sources, claim_run_dir, save_config
from dpt_hpc.train.run_lock import RunLock
from dpt_hpc.train.scoring import evaluate, write_predictions
from dpt_hpc.train.transfer import learning_rate_scales
from dpt_hpc.train.writer import Restored, go_back, has_checkpoint, restore


def describe_data(dataset: Dataset, config: RunConfig) -> list[dict[str, Any]]:
    """Path, size and digest of each part, for run.json and the model card."""
    return [
        {"path": path, "structures": manifest.num_structures, "digest": manifest.digest}
        for path, manifest in zip(config.data.path, dataset.manifests, strict=True)
    ]


def describe_exclusion(dataset: Dataset, split: Split, paths: Sequence[str]) -> dict[str, Any]:
    """What data.exclude leaves out, for run.json: its files, how many structures, and a digest of their ids."""
    ids = "\n".join(sorted(dataset.ids(split.excluded)))
    return {"path": list(paths), "structures": len(split.excluded), "digest": hashlib.sha256(ids.encode()).hexdigest()}


class Run:
    """A run directory that this process may write into; making one writes nothing.

    command: what makes this very run, for run.json, where this process was not started for it alone.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        seed: int,
        run_dir: Path,
        ranks: Ranks,
        *,
        resume: bool,
        quiet: bool,
        command: str | None = None,
    ) -> None:
        claim_run_dir(run_dir, config, resume=resume)
        self.command = command
        self.config, self.seed, self.run_dir, self.ranks, self.quiet = config, seed, run_dir, ranks, quiet
        self.asked_to_resume = resume
        # Rank 0 looks for all: a network file system may show another rank what was there a moment ago.
        self.resume: bool = ranks.broadcast(resume and has_checkpoint(run_dir / "checkpoints"))
        self.lock = RunLock(run_dir)
        self.restored: Restored | None = None
        self.counts: Counts | None = None

    @property
    def finished(self) -> bool:
        """Whether an earlier call has taken this run to the last epoch of its config."""
        return finished_to(self.run_dir, self.config.training.epochs)

    def trainer(self, dataset: Dataset, split: Split, model: Scaling, sources: dict[str, Any]) -> Trainer:
        """Everything that trains `model`, standing where the run begins or goes on. Writes nothing.

        sources: facts for run.json; a resumed run refuses other ones.
        """
        config = self.config
        check_elements(dataset, config.model.num_elements)
        precision = config.training.precision
        dtype = torch.float64 if precision == "float64" else torch.float32
        model.to(dtype)
        if precision in ("bf16", "tf32"):
            if precision == "tf32" and choose_device(config.engine, self.ranks.world).type != "cuda":
                raise ConfigError(
                    "training.precision is tf32, a format of NVIDIA's tensor cores, but this run is on the CPU.\n"
                    "Set training.precision to bf16 or float32, or engine.device=cuda."
                )
            set_precision(model, precision)
        if self.resume:
            restored = self.restored = self._restore()
            model.load_state_dict(restored.state.get("weights", restored.weights))
        target = getattr(config.objective, "target", None)
        denoised = denoised_ranges(dataset, config.objective, config.data.path)
        data = Data(store_for(dataset, config.data, dtype, target, self.ranks), split, torch.device("cpu"))
        if not self.resume:
            # One rank fits, and all begin with its network: the compositions of all structures are a large matrix.
            first = self.ranks.rank == 0
            agree(self.ranks, lambda: fit_scaling(model, config.objective, data, denoised) if first else None)
            model.load_state_dict(self.ranks.broadcast(model.state_dict() if first else None))
        if self.resume:
            check_same_sources(self.run_dir, sources)
        trained_on = describe_training(dataset, split, self.seed, config, sources)
        if before := sources.get("pretrained"):
            trained_on["pretrained"] = before
        settings = config.model_dump(mode="json")
        card = ModelCard(config.model, training_elements(data, self.ranks), trained_on, config=settings)

        scales = {}
        if isinstance(config, FinetuneConfig):
            scales = learning_rate_scales(model, config.transfer, config.optimizer.learning_rate)
        engine = build_engine(
            build_objective(model, config.objective, self.seed, denoised),
            self.ranks,
            config.engine,
            config.optimizer,
            clip=config.training.clip_norm,
            grad_accumulation=config.training.grad_accumulation,
            scales=scales,
        )
        data = replace(data, device=engine.device)
        edges = dataset.edge_estimate
        if needs_counts(config, self.ranks):
            counts = count_edges(model, data, self.ranks, self.run_dir)
            self.counts = counts if self.ranks.rank == 0 else None

            def fill(edges: NDArray[np.int64]) -> None:
                edges[:] = dataset.edge_estimate
                edges[split.train] = counts.edges

            edges = kept_once(len(dataset), self.ranks.node, fill)
        trainer = Trainer(engine, data, config, self.seed, self.run_dir, card, edges)
        if self.restored is not None:
            trainer.resume(self.restored)
        return trainer

    def train(self, dataset: Dataset, split: Split, model: Scaling, sources: dict[str, Any]) -> None:
        """Train `model`, evaluate the best weights, write predictions and results.

        sources: facts for run.json beside the dataset's; a resumed run refuses other ones.
        Raises EnvironmentFault while another process writes into the directory.
        """
        try:
            self._train(dataset, split, model, sources)
        finally:
            self.lock.release()

    def _train(self, dataset: Dataset, split: Split, model: Scaling, sources: dict[str, Any]) -> None:
        if self.resume:  # before the checkpoint is read
            first = self.ranks.rank == 0
            agree(self.ranks, lambda: self.lock.take(self.config.engine.rank_timeout) if first else None)
        sources = {"dataset": describe_data(dataset, self.config), **sources}
        if whole := denoised_datasets(self.config.objective, self.config.data.path):
            sources["denoised"] = [sources["dataset"][k] for k in whole]
        told = ""
        if self.config.data.exclude is not None:
            sources["excluded"] = describe_exclusion(dataset, split, self.config.data.exclude)
            told = f"{len(split.excluded)} excluded by {', '.join(self.config.data.exclude)}; "
        if (folds := share_folds(dataset, self.config.data, self.seed, self.ranks)) is not None:
            sources["folds"] = folds
        trainer = self.trainer(dataset, split, model, sources)
        engine = trainer.engine
        facts = {
            **describe_environment(),
            **({} if self.command is None else {"command": self.command}),
            "started": _now(),
            "world_size": engine.world_size,
            "launched_by": self.ranks.world.source,
            "nodes": list(dict.fromkeys(self.ranks.gather(self.ranks.world.node) or ())),
            "engine": type(engine).__name__,
            "device": str(engine.device),
            "seed": self.seed,
            **sources,
            "split": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        first = engine.rank == 0
        if first:
            facts = self._prepare(facts, dataset, split)
        engine.ranks.barrier()
        # Without a checkpoint nothing of an earlier log counts, not even its record of epoch 0.
        monitor = Monitor(
            self.run_dir if first else None,
            trainer.total_steps,
            trainer.step if self.resume else -1,
            quiet=self.quiet or not first,
        )
        monitor.say(
            f"{self.run_dir}: {len(split.train)} / {len(split.validation)} / {len(split.test)} structures to train, "
            f"validate, test; {told}{facts['parameters']} parameters; {facts['engine']} on {facts['device']}; "
            f"{self.ranks.world.source}" + (f"; resumed at step {trainer.step}" if self.resume else "")
        )
        if unlike := differences(self.config.compat, self.config):
            monitor.say(unlike)
        single = count_single_atoms(dataset, self.config.objective, self.config.data.path, split) if first else 0
        if single:
            monitor.say(
                f"  {single} of the structures to denoise have one atom, which moves with all its images: their noise "
                "cannot be learnt, and does not count"
            )
        unseen = [SYMBOLS[z] for z in dataset.elements if z not in trainer.card.elements]
        if unseen:
            monitor.warn(f"elements outside the training part, which the network never sees: {', '.join(unseen)}")
        if isinstance(model.noise_head, ScalarHead):
            monitor.warn(
                f"model.name={self.config.model.name} has no vectors: its head knows no direction, and learns next to "
                "nothing of the noise but to answer zero."
            )
        for name, wrong in self.restored.damaged.items() if self.restored else ():
            monitor.warn(f"checkpoint {name}: {wrong}; kept as damaged_{name}, the run goes on from an earlier one.")
        with leaving_traceback(self.run_dir, self.ranks), trainer.data.store:
            try:
                trainer.fit(monitor)
            finally:
                monitor.close()
            self._conclude(trainer, facts, monitor)

    def _restore(self) -> Restored:
        """The checkpoint to go on from. Rank 0 reads it for all: so they agree, and the file system is asked once."""
        first = self.ranks.rank == 0
        found: Restored = self.ranks.broadcast(
            agree(self.ranks, lambda: restore(self.run_dir / "checkpoints") if first else None)
        )
        return found

    def _prepare(self, facts: dict[str, Any], dataset: Dataset, split: Split) -> dict[str, Any]:
        """Write what is known before the first step; returns `facts` with what an earlier part of the run knew."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.lock.take(self.config.engine.rank_timeout)
        if not self.resume:  # another job may have begun it since this one looked
            claim_run_dir(self.run_dir, self.config, resume=self.asked_to_resume)
            if has_checkpoint(self.run_dir / "checkpoints"):
                raise EnvironmentFault(
                    f"run_dir {self.run_dir}: another job has trained here since this one began.\n"
                    "Go on from its last checkpoint with --resume."
                )
        if self.resume and (self.run_dir / "run.json").exists():
            before = json.loads((self.run_dir / "run.json").read_text())
            resumed = [*before.get("resumed", []), facts["started"]]
            facts = {**facts, "started": before["started"], "resumed": resumed}
        if self.restored is not None:
            go_back(self.restored)
        if isinstance(self.config, FinetuneConfig):  # the runs of all seeds are one run to whoever starts them
            save_config(self.config, self.run_dir.parent / "config.yaml")
        save_config(self.config, self.run_dir / "config.yaml")
        write_json(self.run_dir / "run.json", facts)
        if self.counts is not None:
            self.counts.save(self.run_dir)
        parts = {"train": split.train, "validation": split.validation, "test": split.test}
        names = GrowingArrays(self.run_dir / "split.npz")
        for part, indices in parts.items():
            for start in range(0, max(len(indices), 1), PIECE):  # an empty part is written too
                names.add({part: dataset.id_array(indices[start : start + PIECE])})
        names.publish()
        return facts

    def _conclude(self, trainer: Trainer, facts: dict[str, Any], monitor: Monitor) -> None:
        """Evaluate the weights that `training.tested` chooses on validation and test part."""
        engine, data = trainer.engine, trainer.data
        best = self.run_dir / "checkpoints" / "best"
        tested = self.run_dir / "checkpoints" / self.config.training.tested
        trainer.scoring.objective.model.load_state_dict(load_weights(tested))
        results: dict[str, Any] = {
            "task": self.config.task,
            "objective": self.config.objective.model_dump(mode="json"),
            "epochs": self.config.training.epochs,
            "best_epoch": load_state(best)["epoch"] - 1,
            "tested": self.config.training.tested,
            "last_epoch": trainer.epoch - 1,
            "training_seconds": trainer.elapsed,
        }
        if engine.rank == 0:
            results["validation_before"] = _first_validation(self.run_dir / "metrics.jsonl")
        for part in ("validation", "test"):
            indices = getattr(data.split, part)
            if len(indices) == 0:
                continue
            results[part] = evaluate(trainer.scoring, indices)
            write_predictions(self.run_dir / f"predictions_{part}.npz", trainer.scoring, indices)
        if engine.rank == 0:
            write_json(self.run_dir / "results.json", results)
            write_json(self.run_dir / "run.json", {**facts, "finished": _now(), "wall_seconds": trainer.elapsed})
        part = "test" if "test" in results else "validation"
        errors = "  ".join(f"{k} {v:.4g}" for k, v in results[part].items())
        monitor.say(f"best epoch {results['best_epoch']} | {part} {errors} | {self.run_dir}")
        engine.ranks.barrier()


def finished_to(run_dir: Path, epochs: int) -> bool:
    """Whether the run in `run_dir` has been taken to epoch `epochs`, and has its results."""
    try:
        results = json.loads((run_dir / "results.json").read_text())
    except FileNotFoundError:
        return False
    if "epochs" not in results:  # of an early version; results were written at the end of a run then, too
        results = (from_yaml((run_dir / "config.yaml").read_text()) or {}).get("training", {})
    return bool(results.get("epochs", 0) >= epochs)


def _first_validation(log: Path) -> dict[str, float] | None:
    """The validation errors before the first step, from the run's own log."""
    records = map(json.loads, log.read_text().splitlines())
    return next((r["validation"] for r in records if r["kind"] == "epoch" and r["epoch"] == 0), None)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
