"""Evaluation of a trained network on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.progress import Progress
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.errors import DataError
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_model
from dpt_hpc.train.config import EngineOptions, FinetuneConfig, OptimizerOptions, PretrainConfig
from dpt_hpc.train.config_file import check_config
from dpt_hpc.train.data import Data, store_for
from dpt_hpc.train.engine import build_engine
from dpt_hpc.train.monitor import write_json
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.parts import denoised_ranges, target_values
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.scoring import Scoring, evaluate, write_predictions


def evaluate_checkpoint(
    checkpoint: str,
    data: tuple[str, ...],
    *,
    target: str | None = None,
    out: Path | None = None,
    allow_unknown_elements: bool = False,
    quiet: bool = True,
) -> dict[str, float]:
    """Mean absolute errors of a checkpoint over all structures of `data`; with `out`, predictions beside them.

    What is compared is what the network was trained on: energy, forces and stress, noise, or its property. target: the
    property's name in `data`, if it is another one there. quiet: say nothing of how far it is.
    Raises DataError for labels that the data do not have, for elements that the network was not trained on (unless
    they are allowed), and for an `out` that is not empty.
    """
    if out is not None and out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out}: is not empty.\nName a new directory.")
    card = load_card(checkpoint)
    dataset = Dataset.open(data)
    unknown = [SYMBOLS[z] for z in dataset.elements if z not in card.elements]
    if unknown and not allow_unknown_elements:
        raise DataError(
            f"{', '.join(data)}: contains {', '.join(unknown)}, unknown to {find_checkpoint(checkpoint)}.\n"
            "Its predictions for them would be those of random weights.\n"
            "Use --allow-unknown-elements to see them anyway."
        )
    model = load_model(checkpoint)
    options: dict[str, Any] = {"run_dir": str(out or ""), "data": {"path": data}}
    learnt = card.trained_on["objective"]
    if learnt["kind"] == "property":
        learnt = {**learnt, "target": target or learnt["target"]}
        target_values(dataset, learnt["target"])
    elif target is not None:
        raise DataError(
            f"--target {target}: {find_checkpoint(checkpoint)} predicts no property; it learnt {learnt['kind']}.\n"
            "Fine-tune it first (dpt-hpc finetune), or leave --target out."
        )
    if learnt["kind"] == "mixed":  # a dataset that is not here is not to be denoised here
        here = {Path(path).name for path in data}
        learnt = {**learnt, "denoise_datasets": [name for name in learnt["denoise_datasets"] if name in here]}
    options |= {"objective": learnt}
    config: PretrainConfig | FinetuneConfig
    if learnt["kind"] == "property":
        config = check_config(options, FinetuneConfig, str(checkpoint))
    else:
        config = check_config(options, PretrainConfig, str(checkpoint))
    if learnt["kind"] == "derivatives" and not (dataset.has_energy | dataset.has_forces | dataset.has_stress).any():
        raise DataError(f"{', '.join(data)}: no structure has an energy, forces or stress to compare with.")
    target = getattr(config.objective, "target", None)
    everything = np.arange(len(dataset))
    denoised = denoised_ranges(dataset, config.objective, config.data.path)
    objective = build_objective(model, config.objective, seed=0, denoised=denoised)
    engine = build_engine(
        objective, Ranks(), EngineOptions(kind="torch"), OptimizerOptions(), clip=None, grad_accumulation=1
    )
    store = store_for(dataset, config.data, next(model.parameters()).dtype, target, Ranks())
    source = Data(store, Split(everything, everything, everything), engine.device)
    progress = Progress(len(dataset) * (1 if out is None else 2), quiet=quiet)
    scoring = Scoring(objective, engine, source, config.training.evaluation_batch_size, progress=progress)
    errors = evaluate(scoring, everything)
    del errors["loss"]  # its weights are a matter of training
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_predictions(out / "predictions_test.npz", scoring, everything)
        write_json(out / "results.json", {"task": "evaluate", "checkpoint": checkpoint, "data": data, "test": errors})
    progress.close()
    return errors
