"""Evaluation of a trained network on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.errors import DataError
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_model
from dpt_hpc.train.config import (
    DataOptions,
    DerivativesOptions,
    EngineOptions,
    FinetuneConfig,
    OptimizerOptions,
    PretrainConfig,
    PropertyOptions,
)
from dpt_hpc.train.engine import build_engine
from dpt_hpc.train.finetune import check_target
from dpt_hpc.train.loop import Data, collect_predictions, evaluate
from dpt_hpc.train.monitor import write_arrays, write_json
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.world import World


def evaluate_checkpoint(
    checkpoint: str,
    data: tuple[str, ...],
    *,
    target: str | None = None,
    out: Path | None = None,
    allow_unknown_elements: bool = False,
) -> dict[str, float]:
    """Mean absolute errors of a checkpoint over all structures of `data`; with `out`, predictions beside them.

    target: the property that a fine-tuned network predicts; None evaluates energy, forces and stress.
    Raises DataError for elements that the network was not trained on, unless they are allowed.
    """
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
    options: dict[str, Any] = {"run_dir": str(out or ""), "data": DataOptions(path=data)}
    config: PretrainConfig | FinetuneConfig
    if target is not None:
        check_target(dataset, target)
        config = FinetuneConfig(objective=PropertyOptions(target=target), **options)
    else:
        config = PretrainConfig(objective=DerivativesOptions(), **options)
    everything = np.arange(len(dataset))
    objective = build_objective(model, config.objective, seed=0)
    engine = build_engine(
        objective, World(), EngineOptions(kind="torch"), OptimizerOptions(), clip=None, grad_accumulation=1
    )
    source = Data(
        dataset, Split(everything, everything, everything), target, next(model.parameters()).dtype, engine.device
    )
    errors = evaluate(objective, engine, source, everything, config)
    if target is None:
        del errors["loss"]  # weights of a loss are a matter of training
    if out is not None:
        predictions = collect_predictions(objective, engine, source, everything, config)
        assert predictions is not None
        out.mkdir(parents=True, exist_ok=True)
        write_arrays(out / "predictions_test.npz", predictions)
        write_json(out / "results.json", {"task": "evaluate", "checkpoint": checkpoint, "data": data, "test": errors})
    return errors
