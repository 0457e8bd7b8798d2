"""Fine-tuning to a property: all weights of a pre-trained network (or none: the baseline), over several seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import EnergyModel, ModelOptions, build_model
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.checkpoint import ModelCard, find_checkpoint, load_card, load_weights
from dpt_hpc.train.config import FinetuneConfig
from dpt_hpc.train.monitor import Monitor, write_json
from dpt_hpc.train.pretrain import Run, describe_data, split_by
from dpt_hpc.train.world import World

NOT_IN_THE_WEIGHTS = ("pooling", "backend", "filters", "table_knots", "max_images")
"""Options of a network that may differ from those it was pre-trained with: they change no tensor."""


def finetune(config: FinetuneConfig, world: World, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run every seed; returns and writes the summary, run_dir/results.json.

    Each seed is a run of its own in run_dir/seed_<n>; with `resume`, finished seeds are not run again.
    """
    dataset = Dataset.open(config.data.path)
    check_target(dataset, config.objective.target)
    run_dir = Path(config.run_dir)
    monitor = Monitor(None, quiet=quiet or world.rank > 0)
    # All seeds are checked before the first one runs, those that an earlier call has finished too.
    runs = [Run(config, seed, run_dir / f"seed_{seed}", world, resume=resume, quiet=quiet) for seed in config.seeds]
    if config.pretrained is not None:
        loaded = load_pretrained(build_model(config.model), config.model, config.pretrained)
        monitor.say(loaded.describe(config.pretrained))
        warn_of_unknown_elements(dataset, config.pretrained, monitor)
    for run in runs:
        if (run.run_dir / "results.json").exists():
            continue
        split = split_by(dataset, config.data.split, run.seed)
        torch.manual_seed(run.seed)
        model = build_model(config.model)
        if config.pretrained is not None:
            load_pretrained(model, config.model, config.pretrained)
        facts = {"datasets": describe_data(dataset, config), "target": config.objective.target}
        card = ModelCard(config.model, tuple(dataset.elements), {**facts, "pretrained": config.pretrained})
        run.train(dataset, split, model, card, extra={"pretrained_from": config.pretrained})
    summary = summarise(config, dataset)
    if world.rank == 0:
        write_json(run_dir / "results.json", summary)
    monitor.say(
        f"{config.objective.target}: test MAE {summary['mean']:.4g} ± {summary['std']:.2g} {summary['unit']} "
        f"over {len(config.seeds)} seeds | {run_dir}"
    )
    return summary


def check_target(dataset: Dataset, target: str) -> None:
    """Refuse a target that the dataset does not have."""
    if target not in dataset.property_names:
        raise DataError(
            f"objective.target is {target!r}, but the dataset has "
            f"{', '.join(dataset.property_names) or 'no properties'}.\nSet objective.target to one of them."
        )


@dataclass(frozen=True)
class Loaded:
    """What became of a pre-trained checkpoint's tensors."""

    loaded: tuple[str, ...]
    reset: tuple[str, ...]
    skipped: tuple[str, ...]

    def describe(self, path: str) -> str:
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in ("loaded", "reset", "skipped"))
        lines = [f"pre-trained {path}: tensors {counts}"]
        for name in ("loaded", "reset", "skipped"):
            tensors = getattr(self, name)
            lines += [f"  {name}: {', '.join(tensors)}"] if tensors else []
        return "\n".join(lines)


def load_pretrained(model: EnergyModel, options: ModelOptions, path: str) -> Loaded:
    """Put all weights of a checkpoint, output layers included, into `model` (method.md, "Training").

    The output scaling belongs to the pre-training labels and is reset to the identity. Raises ConfigError if the
    network differs from the one that was pre-trained.
    """
    card = load_card(path)
    before, now = asdict(card.options), asdict(options)
    differing = [
        f"  model.{f.name}: pre-trained with {before[f.name]!r}, configured {now[f.name]!r}"
        for f in fields(options)
        if f.name not in NOT_IN_THE_WEIGHTS and before[f.name] != now[f.name]
    ]
    if differing:
        raise ConfigError("\n".join([f"pretrained {path}: another network than the one configured.", *differing]))
    weights = load_weights(path)
    own = model.state_dict()
    taken = {k: v for k, v in weights.items() if k in own and k.startswith("network.")}
    model.load_state_dict({**own, **taken})
    return Loaded(
        loaded=tuple(taken),
        reset=tuple(k for k in own if k not in taken),
        skipped=tuple(k for k in weights if k not in own),
    )


def warn_of_unknown_elements(dataset: Dataset, pretrained: str, monitor: Monitor) -> None:
    """Say which elements the pre-trained network has never seen: their weights are the initial ones."""
    known = load_card(pretrained).elements
    unknown = [SYMBOLS[z] for z in dataset.elements if z not in known]
    if unknown:
        monitor.say(f"warning: elements that {find_checkpoint(pretrained)} was not trained on: {', '.join(unknown)}")


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
        "property": target,
        "unit": dataset.property_units[target],
        "network": config.model.name,
        "pooling": config.model.pooling,
        "seeds": list(config.seeds),
        "test_mae": errors,
        "mean": statistics.fmean(errors),
        "std": statistics.stdev(errors) if len(errors) > 1 else 0.0,
        "pretrained_from": config.pretrained,
    }
