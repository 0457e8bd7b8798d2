"""Fine-tuning to a property: all weights of a pre-trained network (or none: the baseline), over several seeds."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError
from dpt_hpc.models import EnergyModel, ModelOptions, build_model
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.checkpoint import load_card, load_weights, weights_digest
from dpt_hpc.train.config import FinetuneConfig
from dpt_hpc.train.data import open_dataset, share_split
from dpt_hpc.train.monitor import Monitor, write_json
from dpt_hpc.train.parts import target_values
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run import Run, finished_to
from dpt_hpc.train.run_dir import claim_run_dir
from dpt_hpc.train.transfer import freeze, weights_in

NOT_IN_THE_WEIGHTS = (
    "pooling",
    "backend",
    "filters",
    "table_knots",
    "max_images",
    "max_neighbors",
    "own_images",
    "envelope",
    "vector_norm",
)
"""Options of a network that may differ from those it was pre-trained with: they change no tensor that its energy
reads, nor what one stands for (as cutoff, gaussian_width and heads do)."""


def finetune(
    config: FinetuneConfig,
    ranks: Ranks,
    *,
    resume: bool = False,
    quiet: bool = False,
    seeds: Sequence[int] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Run every seed; returns and writes the summary, run_dir/results.json.

    Each seed is a run of its own in run_dir/seed_<n>; with `resume`, finished seeds are not run again. seeds: only
    these of the config's are run, others may be elsewhere; the summary is written when all are there, and is else
    empty. command: see Run. Raises ConfigError or DataError, before the first seed, for a directory, network or target
    that does not fit, and for a pre-training that has not ended.
    """
    run_dir = Path(config.run_dir)
    claim_run_dir(run_dir, config, resume=resume)
    mine = config.seeds if seeds is None else seeds
    runs = [
        Run(config, seed, run_dir / f"seed_{seed}", ranks, resume=resume, quiet=quiet, command=command) for seed in mine
    ]
    dataset = open_dataset(config.data, ranks)
    target_values(dataset, config.objective.target)
    monitor = Monitor(None, quiet=quiet or ranks.rank > 0)
    checkpoint = None if config.pretrained is None else find_pretrained(config.pretrained, config.pretrained_epochs)
    unknown: list[str] = []
    if checkpoint is not None:
        model = build_model(config.model)
        loaded = load_pretrained(model, config.model, checkpoint, config.transfer.reset)
        freeze(model, config.transfer)
        monitor.say(loaded.describe(checkpoint))
        if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
            monitor.say(f"  frozen: {', '.join(frozen)}")
        known = load_card(checkpoint).elements
        unknown = [SYMBOLS[z] for z in dataset.elements if z not in known]
        if unknown and ranks.rank == 0:
            print(f"warning: elements that {checkpoint} was not trained on: {', '.join(unknown)}", file=sys.stderr)
    sources = {"pretrained": None if checkpoint is None else describe_checkpoint(checkpoint)}
    for run in runs:
        if run.finished:
            continue
        split = share_split(dataset, config.data, config.objective, run.seed, ranks)
        torch.manual_seed(run.seed)
        model = build_model(config.model)
        if checkpoint is not None:
            load_pretrained(model, config.model, checkpoint, config.transfer.reset)
            freeze(model, config.transfer)
        run.train(dataset, split, model, sources)
    if any(not finished_to(run_dir / f"seed_{seed}", config.training.epochs) for seed in config.seeds):
        return {}
    summary = {**summarise(config, dataset), "elements_new_to_pretrained": unknown}
    if ranks.rank == 0:
        write_json(run_dir / "results.json", summary)
    spread = f" ± {summary['std']:.2g}" if summary["std"] is not None else ""
    monitor.say(
        f"{config.objective.target}: test MAE {summary['mean']:.4g}{spread} {summary['unit']} "
        f"over {len(config.seeds)} seed(s) | {run_dir}"
    )
    return summary


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Where pre-trained weights came from, their SHA-256, what they learnt from, and how many epochs that was planned
    for (None where their card does not say)."""
    card = load_card(checkpoint)
    return {
        "checkpoint": str(checkpoint),
        "digest": weights_digest(checkpoint),
        "epochs": card.training.get("epochs"),
        "trained_on": card.trained_on,
    }


@dataclass(frozen=True)
class Loaded:
    """What became of a pre-trained checkpoint's tensors."""

    loaded: tuple[str, ...]
    reset: tuple[str, ...]
    skipped: tuple[str, ...]

    def describe(self, path: Path) -> str:
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in ("loaded", "reset", "skipped"))
        lines = [f"pre-trained {path}: tensors {counts}"]
        for name in ("loaded", "reset", "skipped"):
            tensors = getattr(self, name)
            lines += [f"  {name}: {', '.join(tensors)}"] if tensors else []
        return "\n".join(lines)


def load_pretrained(model: EnergyModel, options: ModelOptions, path: Path, reset: Sequence[str] = ()) -> Loaded:
    """Put all weights of a checkpoint, output layers included, into `model` (method.md, "Training").

    The output scaling belongs to the pre-training labels and is reset to the identity. reset: modules whose weights
    `model` keeps as they are. Raises ConfigError if the network differs from the one that was pre-trained.
    """
    card = load_card(path)
    before, now = asdict(card.options), asdict(options)
    differing = [
        f"  model.{f.name}: pre-trained with {before.get(f.name)!r}, configured {now[f.name]!r}"
        for f in fields(options)
        if f.name not in NOT_IN_THE_WEIGHTS and before.get(f.name) != now[f.name]
    ]
    if before["name"] != now["name"]:
        differing = [f"  model.name: pre-trained with {before['name']!r}, configured {now['name']!r}"]
    if differing:
        raise ConfigError("\n".join([f"pretrained {path}: another network than the one configured.", *differing]))
    weights = load_weights(path)
    own = model.state_dict()
    afresh = weights_in(model, reset, "transfer.reset")
    taken = {k: v for k, v in weights.items() if k in own and k.startswith("network.") and k not in afresh}
    model.load_state_dict({**own, **taken})
    return Loaded(
        loaded=tuple(taken),
        reset=tuple(k for k in own if k not in taken),
        skipped=tuple(k for k in weights if k not in own),
    )


def summarise(config: FinetuneConfig, dataset: Dataset) -> dict[str, Any]:
    """Test MAE of every seed, mean and sample standard deviation."""
    target = config.objective.target
    errors = []
    for seed in config.seeds:
        results = json.loads((Path(config.run_dir) / f"seed_{seed}" / "results.json").read_text())
        errors.append(results["test"]["target_mae"])
    return {
        "task": "finetune",
        "dataset": "+".join(Path(path).name for path in config.data.path),
        "structures": len(dataset),
        "property": target,
        "unit": dataset.property_units[target],
        "network": config.model.name,
        "pooling": config.model.pooling,
        "seeds": list(config.seeds),
        "test_mae": errors,
        "mean": statistics.fmean(errors),
        "std": statistics.stdev(errors) if len(errors) > 1 else None,
        "pretrained_from": config.pretrained,
    }
