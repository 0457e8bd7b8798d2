"""Errors and predictions of a network over some structures, all ranks taking their share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpt_hpc.train import signals
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.data import Data
from dpt_hpc.train.engine import Engine
from dpt_hpc.train.objective import VALIDATION_EPOCH, Objective
from dpt_hpc.train.signals import Interrupted

Indices = NDArray[np.int64]


def zeros(objective: Objective) -> Counter[str]:
    """Sums to add to: every key on every rank, also on one that has no structure with some label."""
    return Counter(dict.fromkeys(objective.sum_names, 0.0))


def evaluate(objective: Objective, engine: Engine, data: Data, indices: Indices, config: RunConfig) -> dict[str, float]:
    """Loss and mean absolute errors over `indices`. Raises Interrupted, on all ranks, if one is told to stop."""
    was_training = objective.training
    objective.eval()
    total = zeros(objective)
    counts = dict.fromkeys(objective.weights, 1.0)
    mine = indices[engine.rank :: engine.world_size]
    with torch.no_grad():
        for batch in data.batches(mine, config.training.evaluation_batch_size):
            if signals.received():
                break  # an evaluation is made again, from the checkpoint before it
            with data.naming(batch):
                _, errors = objective(batch, VALIDATION_EPOCH, counts)
            total.update({k: float(v) for k, v in errors.items()})
    objective.train(was_training)
    sums = engine.ranks.sum({**total, "asked_to_stop": bool(signals.received())})
    _stop_if_asked(sums)
    return objective.metrics_of(sums)


def collect_predictions(
    objective: Objective, engine: Engine, data: Data, indices: Indices, config: RunConfig
) -> dict[str, NDArray[Any]] | None:
    """Predicted and true values of every label over `indices`, in their order, on rank 0; None elsewhere.

    Keys: structure_ids, num_atoms (S,), atomic_numbers (A,), and <label>_true, <label>_pred of the rows that have
    the label, with <label>_structure: the position in `indices` of each row's structure. Raises Interrupted as above.
    """
    objective.eval()
    # Contiguous shares keep the order when ranks are joined.
    mine = np.array_split(np.arange(len(indices)), engine.world_size)[engine.rank]
    parts: dict[str, list[NDArray[Any]]] = {}
    size = config.training.evaluation_batch_size
    with torch.no_grad():
        for start, batch in zip(range(0, len(mine), size), data.batches(indices[mine], size), strict=True):
            if signals.received():
                break
            rows = mine[start : start + size]
            found: dict[str, Tensor] = {"atomic_numbers": batch.atomic_numbers}
            for label, (predicted, true, mask) in objective.predictions(batch, VALIDATION_EPOCH).items():
                structure = torch.as_tensor(rows, device=mask.device)
                if len(mask) != len(rows):
                    structure = structure.index_select(0, batch.batch)
                found[f"{label}_true"], found[f"{label}_pred"] = true[mask], predicted[mask]
                found[f"{label}_structure"] = structure[mask]
            for key, value in found.items():
                parts.setdefault(key, []).append(value.detach().cpu().numpy())
    _stop_if_asked(engine.ranks.sum({"asked_to_stop": bool(signals.received())}))
    gathered = engine.ranks.gather({k: np.concatenate(v) for k, v in parts.items()})
    if gathered is None:
        return None
    keys = {k for share in gathered for k in share}
    joined = {k: np.concatenate([share[k] for share in gathered if k in share]) for k in sorted(keys)}
    joined["structure_ids"] = data.dataset.id_array(indices)
    joined["num_atoms"] = data.dataset.num_atoms[indices]
    return joined


def _stop_if_asked(sums: Mapping[str, float]) -> None:
    if sums["asked_to_stop"]:
        raise Interrupted(f"told to stop during an evaluation ({signals.received() or 'another rank'})")
