"""Errors and predictions of a network over some structures, all ranks taking their share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpt_hpc.data.group import agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.structure import Batch
from dpt_hpc.train import signals
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.data import PIECE, Data
from dpt_hpc.train.engine import Engine
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.objective import VALIDATION_EPOCH, Objective
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.signals import Interrupted

Indices = NDArray[np.int64]
Result = TypeVar("Result")


def zeros(objective: Objective) -> Counter[str]:
    """Sums to add to: every key on every rank, also on one that has no structure with some label."""
    return Counter(dict.fromkeys(objective.sum_names, 0.0))


class EdgeLimit(NamedTuple):
    """What a batch may hold. edges (S,): of the whole dataset's structures · budget: None for any number."""

    edges: NDArray[np.int64]
    budget: int | None


def cut(indices: Indices, size: int, limit: EdgeLimit | None) -> Iterator[Indices]:
    """The structures `indices` in their order, at most `size` at a time, and no more than `limit` allows.

    A structure above the limit goes alone.
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        if limit is None or limit.budget is None:
            yield part
            continue
        first, held = 0, 0
        for k, edges in enumerate(limit.edges[part].tolist()):
            if k > first and held + edges > limit.budget:
                yield part[first:k]
                first, held = k, 0
            held += edges
        yield part[first:]


def evaluate(
    objective: Objective,
    engine: Engine,
    data: Data,
    indices: Indices,
    config: RunConfig,
    limit: EdgeLimit | None = None,
) -> dict[str, float]:
    """Loss and mean absolute errors over `indices`. Raises Interrupted, on all ranks, if one is told to stop."""
    was_training = objective.training
    objective.eval()
    total = zeros(objective)
    counts = dict.fromkeys(objective.terms, 1.0)
    mine = indices[engine.rank :: engine.world_size]
    with torch.no_grad():
        for batch in data.parts(cut(mine, config.training.evaluation_batch_size, limit)):
            if signals.received():
                break  # an evaluation is made again, from the checkpoint before it
            with data.naming(batch):
                _, errors = objective(batch, VALIDATION_EPOCH, counts)
            total.update({k: float(v) for k, v in errors.items()})
    objective.train(was_training)
    sums = engine.ranks.sum({**total, "asked_to_stop": bool(signals.received())})
    _stop_if_asked(sums)
    return objective.metrics_of(sums)


def write_predictions(
    path: Path,
    objective: Objective,
    engine: Engine,
    data: Data,
    indices: Indices,
    config: RunConfig,
    limit: EdgeLimit | None = None,
) -> None:
    """Write predicted and true values of every label over `indices`, in their order, to the npz `path`; collective.

    Keys: structure_ids, num_atoms (S,), atomic_numbers (A,), and <label>_true, <label>_pred of the rows that have
    the label, with <label>_structure: the position in `indices` of each row's structure. No rank ever holds more than
    some thousand structures. Raises Interrupted as above; EnvironmentFault, on every rank, if rank 0 cannot write.
    """
    objective.eval()
    ranks = engine.ranks
    size = config.training.evaluation_batch_size
    share = size * max(PIECE // (size * ranks.size), 1)
    # In each round every rank takes a stretch, and rank 0 appends them in the order of ranks.
    rounds = [
        [np.arange(at, min(at + share, len(indices))) for at in range(start, start + share * ranks.size, share)]
        for start in range(0, len(indices), share * ranks.size)
    ]
    mine = [list(cut(indices[stretches[ranks.rank]], size, limit)) for stretches in rounds]
    batches = data.parts(part for parts in mine for part in parts)
    file = _writing(ranks, path, lambda: GrowingArrays(path))
    with torch.no_grad():
        for stretches, parts in zip(rounds, mine, strict=True):
            found: dict[str, list[NDArray[Any]]] = {}
            first = int(stretches[ranks.rank][0]) if parts else 0
            for _ in parts:
                if signals.received():
                    break
                batch = next(batches)
                for key, rows in _predicted(objective, batch, first).items():
                    found.setdefault(key, []).append(rows)
                first += batch.num_structures
            _stop_if_asked(ranks.sum({"asked_to_stop": bool(signals.received())}))
            gathered = ranks.gather({k: np.concatenate(v) for k, v in found.items()})
            told = indices[np.concatenate(stretches)]
            _writing(ranks, path, partial(_append, file, gathered or [], data.dataset, told))
    _writing(ranks, path, lambda: file.publish() if file is not None else None)


def _predicted(objective: Objective, batch: Batch, first: int) -> dict[str, NDArray[Any]]:
    """The arrays of one batch, whose structures stand at places `first` and on."""
    found: dict[str, Tensor] = {"atomic_numbers": batch.atomic_numbers}
    for label, (predicted, true, mask) in objective.predictions(batch, VALIDATION_EPOCH).items():
        structure = torch.arange(first, first + batch.num_structures, device=mask.device)
        if len(mask) != batch.num_structures:
            structure = structure.index_select(0, batch.batch)
        found[f"{label}_true"], found[f"{label}_pred"] = true[mask], predicted[mask]
        found[f"{label}_structure"] = structure[mask]
    return {key: value.detach().cpu().numpy() for key, value in found.items()}


def _append(
    file: GrowingArrays | None, gathered: Sequence[Mapping[str, NDArray[Any]]], dataset: Dataset, indices: Indices
) -> None:
    if file is None:
        return
    for share in gathered:
        file.add(share)
    file.add({"structure_ids": dataset.id_array(indices), "num_atoms": dataset.num_atoms_of(indices)})


def _writing(ranks: Ranks, path: Path, work: Callable[[], Result]) -> Result | None:
    """What `work` returns on rank 0; None elsewhere. Its error is raised on every rank."""

    def told() -> Result | None:
        if ranks.rank:
            return None
        try:
            return work()
        except OSError as error:
            raise EnvironmentFault(
                f"{path}: cannot be written: {error.strerror or error}.\n"
                "Make room there: training is complete, and the same command writes the predictions again."
            ) from None

    return agree(ranks, told)


def _stop_if_asked(sums: Mapping[str, float]) -> None:
    if sums["asked_to_stop"]:
        raise Interrupted(f"told to stop during an evaluation ({signals.received() or 'another rank'})")
